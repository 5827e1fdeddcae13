"""Static int8 quantisation with onnxruntime: QDQ format, a scale for each channel of a weight.

Activations are asymmetric uint8: SiLU networks fall apart with symmetric ones. Rare extremes of
their ranges are cut off: a range that holds them all leaves too few of the 256 steps for the rest,
which cost 1.7 points of mIoU on an EfficientNet U-Net, and without them nothing. If the result is
not good enough, the parts of the network that int8 hurts most stay in fp32; how much it hurts is
measured, because the usual suspects (the first layer and the head) are often harmless.

Source: onnxruntime's documentation of quantisation; Jacob et al. 2018, arXiv 1712.05877.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from kd_trainer.export.onnx_file import Batch, OnnxStudent, quiet, require, save_onnx
from kd_trainer.fields import closest

# Images on which the sensitivity of the parts is compared: it only has to rank them.
SENSITIVITY_IMAGES = 16
_ENDS = ("Sigmoid", "Softmax")
PERCENTILE = 99.99
BINS = 2048
# Values of a tensor that are counted of each batch: at 640 pixels all of them would take minutes.
MOST_VALUES = 2**15


def write_ranges(source: Path, batches: Sequence[Mapping[str, Batch]], target: Path) -> None:
    """Write the range of every activation, in the file that `quantize_static` reads.

    Args:
        source: an ONNX file.
        batches: its inputs by name; one image each needs the least memory.
        target: a JSON file in a folder that also takes a temporary model.
    """
    calibration = require("onnxruntime.quantization.calibrate")
    with quiet():  # it prints its settings
        calibrator = calibration.create_calibrator(
            source,
            augmented_model_path=str(target.with_suffix(".onnx")),
            calibrate_method=calibration.CalibrationMethod.Percentile,
            extra_options={"percentile": PERCENTILE, "num_bins": BINS, "symmetric": False},
        )
        names = sorted(calibrator.tensors_to_calibrate)
        histograms = calibration.HistogramCollector(
            method="percentile",
            symmetric=False,
            num_bins=BINS,
            num_quantized_bins=None,
            percentile=PERCENTILE,
            scenario="same",
        )
        for batch in tqdm(batches, desc="calibrate", unit="batch", disable=None):
            outputs = calibrator.infer_session.run(names, dict(batch))
            seen = zip(names, outputs, strict=True)
            histograms.collect({name: [_some(values)] for name, values in seen})
        calibrator.collector = histograms
        calibration.save_tensors_data(calibrator.compute_data(), target)


def _some(values: Any) -> Batch:
    """At most MOST_VALUES values, spread evenly; an odd step does not stay in one column."""
    flat: Batch = np.asarray(values).ravel()
    return flat[:: max(1, -(-flat.size // MOST_VALUES)) | 1]


def part_name(weight: str) -> str:
    """Part of the network that a weight belongs to: its path up to the first number.

    `encoder.blocks.3.1.conv_pw.weight` gives `encoder.blocks.3`, `encoder.conv_stem.weight` gives
    `encoder.conv_stem`.
    """
    words = weight.split(".")
    end = next((i for i, word in enumerate(words) if word.isdecimal()), len(words) - 2)
    return ".".join(words[: end + 1])


def parts_of(model: Any) -> dict[str, list[str]]:
    """Names of the nodes of each part, in the order of execution.

    A node without a weight belongs to the part before it. Under the empty name stands what is never
    quantised: the preprocessing before the first weight and the probabilities at the end.
    """
    weights = {weight.name for weight in model.graph.initializer}
    outputs = {output.name for output in model.graph.output}
    parts: dict[str, list[str]] = {"": []}
    current = ""
    for node in model.graph.node:
        named = [n for n in node.input if n in weights and n.endswith(".weight")]
        current = part_name(named[0]) if named else current
        ends = node.op_type in _ENDS and outputs & set(node.output)
        parts.setdefault("" if ends else current, []).append(node.name)
    return parts


class Quantiser:
    """Writes int8 versions of one ONNX file, all from one calibration.

    Args:
        source: fp32 file of `write_onnx`.
        batches: inputs as the file takes them, to calibrate on; one image each.
        work: an empty folder for what is kept between versions.
        metadata: for the files.
    """

    def __init__(
        self, source: Path, batches: Sequence[Batch], work: Path, metadata: Mapping[str, str]
    ) -> None:
        self.source = source
        self.batches = batches
        self.work = work
        self.metadata = metadata
        model = require("onnx").load(str(source))
        self.parts, self.input_name = parts_of(model), model.graph.input[0].name

    def write(self, target: Path, *, left_out: Sequence[str] = ()) -> None:
        """Write a version in which these parts stay in fp32.

        Raises:
            ValueError: if there is no such part; names the nearest.
        """
        names = [name for name in self.parts if name]
        for part in left_out:
            if part not in names:
                raise ValueError(
                    f"Expected parts of the network in --int8_exclude, got {part!r}."
                    f"{closest(part, names)} There are {', '.join(names)}."
                )
        self._quantise(target, exclude=[n for p in ("", *left_out) for n in self.parts[p]])

    def by_sensitivity(self) -> list[str]:
        """The parts, that one first which alone in int8 moves the output most (mean square)."""
        batches = self.batches[:SENSITIVITY_IMAGES]
        exact = OnnxStudent(self.source)
        wanted = [exact(batch) for batch in batches]
        error: dict[str, float] = {}
        for part in tqdm(
            [p for p in self.parts if p], desc="sensitivity", unit="part", disable=None
        ):
            others = chain.from_iterable(n for p, n in self.parts.items() if p != part)
            path = self.work / "part.onnx"
            self._quantise(path, exclude=list(others))
            network = OnnxStudent(path)
            squares = [
                np.square(network(b) - w).mean() for b, w in zip(batches, wanted, strict=True)
            ]
            error[part] = float(np.mean(squares))
        return sorted(error, key=lambda part: -error[part])

    def _quantise(self, target: Path, *, exclude: list[str]) -> None:
        quantization = require("onnxruntime.quantization")
        ranges = self.work / "ranges.json"  # of the fp32 network, whatever is quantised afterwards
        if not ranges.exists():
            write_ranges(self.source, [{self.input_name: b} for b in self.batches], ranges)
        with quiet():  # it advises a preparation that fails on graphs of dynamic size
            quantization.quantize_static(
                str(self.source),
                str(target),
                None,
                quant_format=quantization.QuantFormat.QDQ,
                per_channel=True,
                activation_type=quantization.QuantType.QUInt8,
                weight_type=quantization.QuantType.QInt8,
                nodes_to_exclude=exclude,
                calibrate_method=quantization.CalibrationMethod.Percentile,
                calibration_cache_path=ranges,
            )
        save_onnx(require("onnx").load(str(target)), target, self.metadata)
