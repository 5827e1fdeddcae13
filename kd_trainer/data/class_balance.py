"""How often each class occurs in the masks of a data set, and the weights that balance it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from kd_trainer.data.images import BadSampleError, image_name
from kd_trainer.data.masks import MaskRule
from kd_trainer.data.pipeline import sample_rows

MASKS = 1000
"""Masks that are counted at most: about five seconds at 640 px."""


def class_pixels(
    rows: Any, rule: MaskRule, *, skip_bad: bool = False
) -> tuple[npt.NDArray[np.int64], int]:
    """Pixels of each class, int64 (K,), and the number of masks they were counted in.

    Args:
        rows: with the column `mask`; up to `MASKS` spread over them (of a stream: its first).
        rule: how the masks are read; ignored pixels count nowhere.
        skip_bad: pass over masks that cannot be used, which the training leaves out too.

    Raises:
        BadSampleError: if a mask cannot be used.
    """
    pixels, masks = np.zeros(256, np.int64), 0
    for index, row in enumerate(sample_rows(rows, MASKS)):
        try:
            labels = rule.labels(rule.decode(row["mask"], index), image_name(row["mask"], index))
        except BadSampleError:
            if not skip_bad:
                raise
            continue
        pixels += np.bincount(labels.ravel(), minlength=256)
        masks += 1
    return pixels[: rule.num_labels], masks


def balanced_weights(
    pixels: npt.NDArray[np.int64], names: Sequence[str], masks: int
) -> npt.NDArray[np.float64]:
    """N / (K·n) for a class of n of all N pixels: each class then weighs the same in a sum.

    Their mean over the pixels is 1, so the size of the loss stays what it was.

    Raises:
        ValueError: if a class has no pixel.
    """
    missing = [name for name, count in zip(names, pixels, strict=True) if not count]
    if missing:
        raise ValueError(
            f"Expected pixels of each class for --class_weights balanced, got none of "
            f"{', '.join(missing[:5])} in the {masks:,} training masks that were counted. Give one "
            "number a class instead."
        )
    return np.asarray(pixels.sum() / (len(pixels) * pixels), np.float64)
