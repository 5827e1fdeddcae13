"""Counts of every evaluation image of a run: small enough to carry to another machine."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from kd_trainer.data import StreamedDataset, TransformedDataset, collate
from kd_trainer.evaluation import (
    EvaluationSettings,
    agreement_of,
    agreement_rows,
    figures_of,
    labels_of,
    normalise,
    pixel_statistics,
    student_rows,
)
from kd_trainer.files import replacing_file
from kd_trainer.losses import LossWeights
from kd_trainer.models.modeling import SmpForSemanticSegmentation
from kd_trainer.teacher import Teacher

Rows = npt.NDArray[np.int32]
_TABLES = ("student", "teacher", "agreement")


@dataclass(frozen=True)
class ImageCounts:
    """Counts of a run, one row an image in the order of the data: int32 (N, K·K + 2·K) each.

    Attributes:
        student: the student's classes against the labels, as `metrics.image_counts` gives them.
        teacher: the teacher's, likewise.
        agreement: the student's classes against the teacher's on the valid pixels.
    """

    student: Rows
    teacher: Rows
    agreement: Rows

    @property
    def num_labels(self) -> int:
        """Number of classes K, from the K·K + 2·K columns."""
        return round((self.student.shape[1] + 1) ** 0.5) - 1

    def confusion(self) -> npt.NDArray[np.int64]:
        """The student's pixels by [truth, prediction], int64 (N, K, K)."""
        k = self.num_labels
        return self.student[:, : k * k].reshape(-1, k, k).astype(np.int64)

    def figures(self, id2label: dict[int, str]) -> dict[str, dict[str, float]]:
        """Metrics of `student` (with `agreement` and `agreement_miou`) and of `teacher`."""
        student = figures_of(self.student, id2label) | agreement_of(self.agreement, id2label)
        return {"student": student, "teacher": figures_of(self.teacher, id2label)}

    def save(self, path: Path) -> None:
        """Write them, all or nothing."""
        tables: dict[str, Any] = {name: getattr(self, name) for name in _TABLES}
        with replacing_file(path) as unfinished:
            np.savez_compressed(unfinished, **tables)


def load_counts(path: Path) -> ImageCounts:
    """Read what `ImageCounts.save` wrote.

    Raises:
        ValueError: if the file is none of ours, or damaged.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            tables: dict[str, Any] = {name: file[name] for name in _TABLES}
    except (KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"Expected the counts of a run in {path}, got a file that cannot be read ({error}). "
            "Delete it: compare.py writes it again if the student is there."
        ) from error
    return ImageCounts(**tables)


@torch.no_grad()
def count_images(
    student: SmpForSemanticSegmentation,
    teacher: Teacher,
    dataset: TransformedDataset | StreamedDataset,
    *,
    batch_size: int,
    ignore_index: int,
    device: torch.device | str,
    batches: int | None = None,
) -> ImageCounts:
    """Run student and teacher over a data set without augmentation, in fp32.

    The sums of the counts give the figures of `evaluate_model` on the same data.

    Args:
        student: put on the device, in eval mode.
        teacher: likewise.
        dataset: samples of evaluation.
        batch_size: images at a time.
        ignore_index: label of the pixels that count nowhere.
        device: where to compute.
        batches: stop after so many; None takes all.
    """
    network: nn.Module = student
    network.to(device).eval().to(memory_format=torch.channels_last)
    teacher.to(device)
    statistics = pixel_statistics(student, device)
    settings = EvaluationSettings(len(labels_of(student)), ignore_index, LossWeights())
    found: dict[str, list[torch.Tensor]] = {name: [] for name in _TABLES}
    loader = DataLoader(dataset, batch_size=batch_size, collate_fn=collate)
    total = len(loader) if batches is None else batches
    steps = tqdm(islice(loader, batches), "count", total, unit="batch", leave=False, disable=None)
    for batch in steps:
        pixels = normalise(batch["pixel_values"].to(device), statistics)
        labels = batch["labels"].to(device)
        raw, guide = student(pixel_values=pixels)["raw_logits"], teacher(pixels)
        found["student"].append(student_rows(raw, labels, settings))
        found["teacher"].append(student_rows(guide, labels, settings))
        found["agreement"].append(agreement_rows(raw, guide, labels, settings))
    tables = {name: torch.cat(rows).cpu().numpy().astype(np.int32) for name, rows in found.items()}
    return ImageCounts(**tables)
