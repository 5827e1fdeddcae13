"""How well classes fit labels: rows of counts, one an image, and when one set is clearly better."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kd_trainer.evaluation import figures_of
from kd_trainer.metrics import image_counts

Rows = npt.NDArray[np.int64]

MARGIN = 0.05  # of mIoU: what a wrong setting has to cost before it is called wrong
ENOUGH = 4  # images from which a fault may be concluded; from fewer it is a note
_SHARE = 0.75  # of the images that have to agree, so that one odd image decides nothing
_KNOWS = 0.10  # of mIoU above a constant: a network that knows less says nothing about masks


def rows_of(classes: Tensor, labels: Tensor, num_labels: int, ignore_index: int) -> Rows:
    """Counts of predicted classes against labels, both integer (N, H, W): int64 (N, C)."""
    rows = image_counts(classes, labels, num_labels, ignore_index=ignore_index, boundary=False)
    return rows.cpu().numpy()


def miou(rows: Rows, num_labels: int) -> float:
    """Mean IoU over the classes that occur, of all images together."""
    return figures_of(rows, {i: str(i) for i in range(num_labels)})["miou"]


def confusion(rows: Rows, num_labels: int) -> npt.NDArray[np.int64]:
    """Pixels of all images by [truth, prediction], (K, K)."""
    return rows[:, : num_labels**2].sum(axis=0).reshape(num_labels, num_labels)


def constant_miou(labels: Tensor, num_labels: int, ignore_index: int) -> tuple[float, int]:
    """The best mIoU that the same class everywhere has on labels (N, H, W), and that class."""
    figures = [
        miou(rows_of(torch.full_like(labels, c), labels, num_labels, ignore_index), num_labels)
        for c in range(num_labels)
    ]
    best = int(np.nanargmax(figures)) if not np.isnan(figures).all() else 0
    return figures[best], best


def clearly_better(other: Rows, now: Rows, num_labels: int) -> bool:
    """Whether `other` beats `now` on the same images, all together and most of them alone."""
    if miou(other, num_labels) < miou(now, num_labels) + MARGIN:
        return False
    pairs = zip(_each(other, num_labels), _each(now, num_labels), strict=True)
    better = [a > b for a, b in pairs]
    return float(np.mean(better)) >= _SHARE


def _each(rows: Rows, num_labels: int) -> Sequence[float]:
    return [miou(row[None], num_labels) for row in rows]


def knows_something(figure: float, constant: float) -> bool:
    """Whether a mIoU is high enough to trust the network more than the masks."""
    return figure >= constant + _KNOWS
