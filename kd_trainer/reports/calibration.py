"""Whether a network is right as often as it says: reliability bins and the calibration error.

The confidence of a pixel is the probability of the class it is given. Over the pixels of one
confidence the share that is right should be that confidence. Guo et al. 2017, arXiv 1706.04599.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

BINS = 15


def reliability_counts(
    raw_logits: Tensor, labels: Tensor, *, ignore_index: int, bins: int = BINS
) -> Tensor:
    """Counts of a batch by confidence, on the device.

    Args:
        raw_logits: (B, K, H, W); K = 1 for a binary network.
        labels: class ids (B, H, W) or `ignore_index`.
        ignore_index: label of the pixels that do not count.
        bins: number of equal bins over confidences 0 to 1; a bin holds its lower end.

    Returns:
        float64 (3, bins): pixels, sum of their confidences, number of them that are right.
    """
    logits = raw_logits.float()
    if logits.shape[1] == 1:
        predicted = (logits[:, 0] > 0).long()
        confidence = logits[:, 0].abs().sigmoid()
    else:
        confidence, predicted = logits.softmax(dim=1).max(dim=1)
    valid = labels.long() != ignore_index
    sure = confidence[valid].double()
    right = (predicted == labels.long())[valid].double()
    place = (sure * bins).floor().long().clamp(max=bins - 1)
    table = torch.stack([torch.ones_like(sure), sure, right])
    return table.new_zeros(3, bins).index_add_(1, place, table)


@dataclass(frozen=True, eq=False)
class Reliability:
    """Summed counts of `reliability_counts`.

    Attributes:
        counts: float64 (3, bins).
    """

    counts: npt.NDArray[Any]

    @classmethod
    def zero(cls, bins: int = BINS) -> Reliability:
        """Counts of an empty set."""
        return cls(np.zeros((3, bins)))

    def add(self, counts: Tensor) -> Reliability:
        """Counts with those of one more batch."""
        return Reliability(self.counts + counts.cpu().numpy())

    @property
    def error(self) -> float:
        """Expected calibration error, 0..1: mean over pixels of |confidence − share right|.

        NaN without a pixel.
        """
        pixels, confidence, right = self.counts
        return float(abs(right - confidence).sum() / pixels.sum()) if pixels.sum() else math.nan

    @property
    def gap(self) -> float:
        """Mean confidence minus share right, −1..1: above 0 the network is too sure of itself."""
        pixels, confidence, right = self.counts.sum(axis=1)
        return float((confidence - right) / pixels) if pixels else math.nan

    def points(self) -> list[tuple[float, float]]:
        """(mean confidence, share right) of every bin that holds a pixel."""
        pixels, confidence, right = self.counts[:, self.counts[0] > 0]
        return list(zip((confidence / pixels).tolist(), (right / pixels).tolist(), strict=True))

    def shares(self) -> list[tuple[float, float]]:
        """(middle of the bin, share of all pixels in it) of every bin that holds a pixel."""
        total, bins = self.counts[0].sum(), self.counts.shape[1]
        return [
            ((place + 0.5) / bins, float(pixels / total))
            for place, pixels in enumerate(self.counts[0])
            if pixels
        ]
