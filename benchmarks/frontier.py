"""What several trained models cost and what they reach: latency, size and mIoU side by side.

Latencies are those of one picture on one thread of the CPU, all networks and engines by turns in
one process. Absolute times belong to the machine and to what else it did; the speed relative to the
first model, a median over passes in which both were measured side by side, hardly does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from kd_trainer.commands.export import RESULTS
from kd_trainer.costs import (
    Call,
    RawLogits,
    file_mib,
    macs,
    onnx_bytes,
    onnx_call,
    passes,
    picture,
    summary,
)
from kd_trainer.export.exporter import FILES
from kd_trainer.export.onnx_file import OnnxStudent
from kd_trainer.loading import load_student, network_size
from kd_trainer.models.modeling import SmpForSemanticSegmentation, check_image_size
from kd_trainer.run_folder import EXPORTS_SHAPE, RESULTS_SHAPE, read_object
from kd_trainer.sources import model_source

TORCH, ONNX, INT8 = "torch fp32", "onnxruntime fp32", "onnxruntime int8"
ENGINES = (TORCH, ONNX, INT8)


@dataclass
class Contender:
    """A trained model with the files that scripts/export.py left beside it.

    Args:
        folder: of a run, with `student/`, `results.json`, `student_int8.onnx` and `export.json` as
            far as they are there; or of a saved model.
        network: in eval mode on the CPU.
    """

    folder: Path
    network: SmpForSemanticSegmentation

    @classmethod
    def load(cls, folder: str | Path) -> Contender:
        """Read a model.

        Raises:
            FileNotFoundError: if there is none.
            ValueError: if it is no student of this package and no model of smp.
        """
        network = load_student(folder).cpu().float().eval()
        return cls(Path(folder), network)

    def file(self, export: str) -> Path:
        """Where an export of this format lies, if there is one."""
        return self.folder / FILES[export]

    def calls(self, pixels: Tensor) -> dict[str, Call]:
        """What runs it on these pixels (1, 3, H, W), by engine, on one thread.

        A missing fp32 export is made on the way and not kept; int8 needs images to calibrate on, so
        without a file there is none.
        """
        side = pixels.shape[-1]
        plain = RawLogits(self.network)
        found: dict[str, Call] = {TORCH: partial(plain, pixels)}
        if self.file("onnx").is_file():
            found[ONNX] = partial(OnnxStudent(self.file("onnx"), threads=1), pixels.numpy())
        else:
            model = onnx_bytes(plain, side)
            if model is not None:
                found[ONNX] = onnx_call(model, pixels, 1)
        if self.file("onnx-int8").is_file():
            found[INT8] = partial(OnnxStudent(self.file("onnx-int8"), threads=1), pixels.numpy())
        return found

    def figures(self, side: int) -> dict[str, Any]:
        """Everything but latency; what is not known is None."""
        used, never_used = network_size(self.network)
        config = self.network.config
        reached = read_object(self.folder / "results.json", RESULTS_SHAPE)
        exported = read_object(self.folder / RESULTS, EXPORTS_SHAPE).get("onnx-int8", {})
        return {
            "architecture": config._model_class,
            "encoder": config.encoder_name,
            "parameters": used,
            "never_used": never_used,
            "gflop": 2 * macs(RawLogits(self.network), side) / 1e9,
            "encoder_gflop": 2 * macs(self.network.encoder, side) / 1e9,
            "trained_side": config.image_size,
            "miou": reached.get("student_miou"),
            "dice": reached.get("student_dice"),
            "boundary_iou": reached.get("student_boundary_iou"),
            "epochs": reached.get("epochs"),
            "int8_miou": exported.get("miou"),
            "int8_kept_in_fp32": exported.get("kept_in_fp32"),
            "mib": {
                "safetensors": file_mib(model_source(str(self.folder))),
                "onnx": file_mib(self.file("onnx")) if self.file("onnx").is_file() else None,
                "int8": file_mib(self.file("onnx-int8"))
                if self.file("onnx-int8").is_file()
                else None,
            },
        }


def frontier(
    models: Mapping[str, str | Path], *, side: int = 640, repeats: int = 20, progress: bool = True
) -> list[dict[str, Any]]:
    """Measure trained models against the first of them.

    Args:
        models: name -> folder of a run or of a saved model. The first is the one the others are
            compared with, as a rule the teacher.
        side: pixels of the square picture that is timed; the mIoU is that of the training.
        repeats: measured calls of each model on each engine, at least 1.
        progress: draw a bar where there is a terminal.

    Returns:
        A row for each model: `name`, `architecture`, `encoder`, `parameters`, `never_used`,
        `gflop` and `encoder_gflop` (at `side`), `trained_side`, `epochs`, `miou`, `dice` and
        `boundary_iou` (of results.json), `int8_miou` and `int8_kept_in_fp32` (of export.json),
        `mib` of each file, `side`, and for each engine `latency` (milliseconds), `speed` (how many
        times as fast as the first model, median over passes); `miou_share` of the first one's
        mIoU, and `best`: no other model is both at least as fast with ONNX Runtime in fp32 and at
        least as accurate.

    Raises:
        FileNotFoundError: if a model is missing.
        ValueError: if `side` does not fit an encoder, or there is no model.
    """
    if not models:
        raise ValueError("Expected at least one model to measure, got none. Name its folder.")
    found = {name: Contender.load(folder) for name, folder in models.items()}
    for one in found.values():
        check_image_size(side, one.network)
    pixels = picture(side)
    calls = {
        (name, engine): call
        for name, one in found.items()
        for engine, call in one.calls(pixels).items()
    }
    keyed = {" ".join(key): call for key, call in calls.items()}
    seconds = passes(keyed, [], repeats, 1, progress=progress)
    rows = []
    for name, one in found.items():
        row = {"name": name, **one.figures(side), "side": side, "latency": {}, "speed": {}}
        for engine in ENGINES:
            if (name, engine) in calls:
                own = seconds[f"{name} {engine}"]
                row["latency"][engine] = vars(summary(own, 1))
                reference = seconds.get(f"{next(iter(found))} {engine}")
                if reference is not None:
                    row["speed"][engine] = float(np.median(np.divide(reference, own)))
        rows.append(row)
    return _judged(rows)


def _judged(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with their share of the first one's mIoU, and whether any other beats them."""
    first = rows[0]["miou"]
    for row in rows:
        known = row["miou"] is not None and first
        row["miou_share"] = row["miou"] / first if known else None
        row["best"] = None
        if row["miou"] is not None and ONNX in row["latency"]:
            row["best"] = not any(_beats(other, row) for other in rows if other is not row)
    return rows


def _beats(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """At least as good in both, and better in one."""
    if one["miou"] is None or ONNX not in one["latency"]:
        return False
    mine, theirs = one["latency"][ONNX]["median"], other["latency"][ONNX]["median"]
    at_least = mine <= theirs and one["miou"] >= other["miou"]
    return at_least and (mine < theirs or one["miou"] > other["miou"])
