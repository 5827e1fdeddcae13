"""What each activation ranges over, measured on images: the input of static quantisation.

Rare extremes are cut off. A range that holds them all leaves too few of the 256 steps for the
rest: on an EfficientNet U-Net that cost 1.7 points of mIoU, without them nothing.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from kd_trainer.export.files import require
from kd_trainer.export.session import Batch

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
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its settings
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
