"""Where two models see different things on one picture, and how much of it that is."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from kd_trainer.metrics import SegmentationCounts, image_counts
from kd_trainer.reports.panels import (
    FALSE_NEGATIVE,
    FALSE_POSITIVE,
    Picture,
    class_colours,
    error_map,
)

# As errors of the student, with the teacher's mask in the place of the truth.
ONLY_STUDENT = FALSE_POSITIVE
ONLY_TEACHER = FALSE_NEGATIVE
OTHER_CLASS = (160, 50, 190)
_NOTHING_IGNORED = -1


@dataclass(frozen=True)
class Disagreement:
    """How far two masks of one picture are apart.

    Attributes:
        pixels: share of the pixels of which the class differs, 0 to 1.
        iou: mean over the foreground classes that either found; NaN if neither found any.
    """

    pixels: float
    iou: float


def disagreement(teacher: np.ndarray, student: np.ndarray, num_labels: int) -> Disagreement:
    """Compare two masks.

    Args:
        teacher: class ids (H, W).
        student: class ids (H, W).
        num_labels: number of classes, background first.
    """
    truth, guess = (torch.from_numpy(mask.astype(np.int64))[None] for mask in (teacher, student))
    row = image_counts(
        guess, truth, num_labels, ignore_index=_NOTHING_IGNORED, boundary=False
    ).numpy()
    # Numbers for names: those of the model may be such that a figure could not be called so.
    names = {index: str(index) for index in range(num_labels)}
    figures = SegmentationCounts.zero(num_labels).add(row).metrics(names)
    return Disagreement(1 - figures["pixel_accuracy"], figures["iou_foreground"])


def disagreement_map(image: Picture, teacher: np.ndarray, student: np.ndarray) -> Picture:
    """A grey image, coloured where the masks differ.

    Blue where only the teacher found something, orange where only the student did, purple where
    both did and disagree about the class.

    Args:
        image: uint8 (H, W, 3).
        teacher: class ids (H, W).
        student: class ids (H, W).
    """
    shown = error_map(image, teacher, student, ignore_index=_NOTHING_IGNORED)
    shown[(teacher != student) & (teacher != 0) & (student != 0)] = OTHER_CLASS
    return shown


def mask_picture(mask: np.ndarray, num_labels: int) -> Picture:
    """A mask to look at: white on black for two classes, else in the colours of the classes."""
    if num_labels == 2:
        return np.where((mask > 0)[..., None], 255, 0).astype(np.uint8).repeat(3, axis=2)
    return class_colours(num_labels)[mask]
