"""Several labels a pixel: a binary map for each class instead of one class for each pixel.

A mask is an array of 0 and 1 in a `.npy` file, (K, H, W) or (H, W, K); `ignore_index` marks what
counts nowhere, in one plane or in all. Masks that are drawn from COCO annotations hold the planes
one below another, as one grey PNG of K times the image's height.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kd_trainer.data.images import (
    BadSampleError,
    EncodedImage,
    image_name,
    read_image_bytes,
)
from kd_trainer.data.mask_files import decode_mask, raw_array
from kd_trainer.data.masks import present_values, show_values

Planes = npt.NDArray[np.uint8]
"""(H, W, K) of 0, 1 and `ignore_index`."""


@dataclass(frozen=True)
class PlaneRule:
    """How masks of several labels a pixel are read.

    Raises:
        ValueError: if `ignore_index` is a label.
    """

    num_labels: int
    ignore_index: int = 255

    def __post_init__(self) -> None:
        if not 2 <= self.ignore_index <= 255:
            raise ValueError(
                f"Expected --ignore_index between 2 and 255 with --multi_label, got "
                f"{self.ignore_index}. A plane holds 0 and 1."
            )

    def planes(self, cell: EncodedImage | None, index: int, shape: tuple[int, ...]) -> Planes:
        """The planes (H, W, K) of a mask; all ignored for an image without one.

        Args:
            cell: `bytes` and `path` of the mask, or None.
            index: number of the row, for messages.
            shape: (H, W) of the image.

        Raises:
            BadSampleError: if they are not K planes of the image's size, or hold other values.
        """
        count = self.num_labels
        if cell is None:
            return np.full((*shape, count), self.ignore_index, np.uint8)
        name = image_name(cell, index)
        data = read_image_bytes(cell, name)
        planes = raw_array(data, name)
        if planes is not None:
            if planes.shape == (*shape, count) != (count, *shape):
                planes = np.moveaxis(planes, 2, 0)
        else:
            planes = decode_mask({"bytes": data, "path": cell.get("path")}, index)
            if planes.shape == (count * shape[0], shape[1]):
                planes = planes.reshape(count, *shape)
        if planes.shape != (count, *shape):
            raise BadSampleError(
                f"Expected a .npy mask of {count} planes like its image, ({count}, {shape[0]}, "
                f"{shape[1]}) or ({shape[0]}, {shape[1]}, {count}), got {planes.shape} in {name}. "
                "Set --num_labels to the number of planes, or save the mask again."
            )
        self._check_values(planes, name)
        return np.ascontiguousarray(np.moveaxis(planes, 0, 2).astype(np.uint8))

    def _check_values(self, planes: npt.NDArray[Any], name: str) -> None:
        allowed = (planes == 0) | (planes == 1) | (planes == self.ignore_index)
        if not allowed.all():
            wrong = np.unique(planes[~allowed])[:5]
            raise BadSampleError(
                f"Expected planes of 0, 1 and {self.ignore_index} (--ignore_index), got "
                f"{', '.join(f'{value:g}' for value in wrong)} in {name}. Save 0 and 1."
            )


def check_planes(
    rows: Iterable[dict[str, Any]], rule: PlaneRule, shape_of: Callable[..., tuple[int, int]]
) -> None:
    """Refuse a data set whose planes never hold a 1: 0 and 255 would be read as nothing but gaps.

    Raises:
        ValueError: likewise, or for a mask that cannot be read.
    """
    values: set[int] = set()
    for index, row in enumerate(rows):
        planes = rule.planes(row["mask"], index, shape_of(row["image"], index))
        values |= set(present_values(planes.reshape(len(planes), -1)))
    if values and 1 not in values:
        raise ValueError(
            f"Expected planes in which 1 marks a class, got only {show_values(values)} in the "
            f"masks that were looked at, of which {rule.ignore_index} counts nowhere "
            "(--ignore_index). Save the foreground as 1."
        )
