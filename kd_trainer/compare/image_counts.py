"""Counts of every evaluation image of a run: small enough to carry to another machine."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kd_trainer.arguments import DistillationArguments
from kd_trainer.data import StreamedDataset, TransformedDataset
from kd_trainer.evaluation import (
    AGREEMENT,
    Measured,
    RowCounter,
    agreement_of,
    figures_of,
)
from kd_trainer.files import replacing_file
from kd_trainer.inference import evaluator_for
from kd_trainer.reports.contents import STUDENT, TEACHER
from kd_trainer.teacher import Teacher

Rows = npt.NDArray[np.int32]


@dataclass(frozen=True)
class ImageCounts:
    """Counts of a run, one row an image in the order of the data: int32 (N, C) each.

    C is K·K + 2·K, see `metrics.image_counts`, and of several labels a pixel K·8.

    Attributes:
        student: the student's classes against the labels.
        teacher: the teacher's, likewise.
        agreement: the student's classes against the teacher's on the valid pixels.
    """

    student: Rows
    teacher: Rows
    agreement: Rows

    def confusion(self, *, multi_label: bool = False) -> npt.NDArray[np.int64]:
        """The student's pixels by [truth, prediction], int64 (N, K, K), or (N, K, 2, 2)."""
        if multi_label:
            tables = self.student.reshape(len(self.student), -1, 8)[..., :4]
            return tables.reshape(*tables.shape[:2], 2, 2).astype(np.int64)
        k = round((self.student.shape[1] + 1) ** 0.5) - 1  # from the K·K + 2·K columns
        return self.student[:, : k * k].reshape(-1, k, k).astype(np.int64)

    def figures(
        self, id2label: dict[int, str], *, multi_label: bool = False
    ) -> dict[str, dict[str, float]]:
        """Metrics of `student` (with `agreement` and `agreement_miou`) and of `teacher`."""
        student, teacher = (
            figures_of(rows, id2label, multi_label=multi_label)
            for rows in (self.student, self.teacher)
        )
        same = agreement_of(self.agreement, id2label, multi_label=multi_label)
        return {"student": student | same, "teacher": teacher}

    def save(self, path: Path) -> None:
        """Write them, all or nothing."""
        with replacing_file(path) as unfinished:
            np.savez_compressed(unfinished, **vars(self))


def load_counts(path: Path) -> ImageCounts:
    """Read what `ImageCounts.save` wrote.

    Raises:
        ValueError: if the file is none of ours, or damaged.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            return ImageCounts(*(file[name] for name in (STUDENT, TEACHER, AGREEMENT)))
    except (KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"Expected the counts of a run in {path}, got a file that cannot be read ({error}). "
            "Delete it: compare.py writes it again if the student is there."
        ) from error


def count_images(
    student: Measured,
    teacher: Teacher | None,
    dataset: TransformedDataset | StreamedDataset,
    args: DistillationArguments,
    *,
    ignore_index: int,
    batches: int | None = None,
) -> ImageCounts:
    """Counts of student and teacher on the evaluation images, or on the first batches of them."""
    evaluator = evaluator_for(dataset, student, teacher, ignore_index, args.device)
    counter = RowCounter(evaluator.settings)
    size = args.per_device_eval_batch_size
    evaluator.run(dataset, counter, batch_size=size, batches=batches, title="count")
    tables: dict[str, Any] = {who: rows.astype(np.int32) for who, rows in counter.rows().items()}
    return ImageCounts(**tables)
