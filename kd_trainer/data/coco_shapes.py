"""Shapes of COCO annotations, polygons and RLE, as pixels.

pycocotools draws them, so a mask has the very pixels of other COCO tools (`cv2.fillPoly` differs at
the edges). It looks at nothing that it is given, so it gets what was looked at here.
"""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pycocotools import mask as coco_mask

from kd_trainer.own_errors import is_own

MAX_LENGTH = 1_000_000
"""Pixels along the edges of one annotation: half a second and 300 MiB in pycocotools."""

_FARTHEST = 10  # sides of the picture that a polygon's corner may be away


def draw(
    image: dict[str, Any], found: Sequence[tuple[int, dict[str, Any]]], source: Path
) -> npt.NDArray[np.uint8]:
    """Class ids (H, W) of the annotations of one image entry, later ones on top.

    Raises:
        ValueError: if an annotation has no segmentation, or one of another size.
    """
    height, width = int(image["height"]), int(image["width"])
    mask = np.zeros((height, width), np.uint8)
    for number, entry in found:
        shape = entry.get("segmentation")
        where = f"annotation {entry.get('id')} of {source}"
        if not shape:
            raise ValueError(
                f"Expected a segmentation (polygons or RLE), got none in {where}. Boxes are not "
                "enough for masks."
            )
        mask[_pixels(shape, height, width, where)] = number
    return mask


def _pixels(shape: Any, height: int, width: int, where: str) -> npt.NDArray[np.bool_]:
    try:
        rle = _run_lengths(shape, height, width, where)
        return np.zeros((height, width), np.bool_) if rle is None else _decoded(rle)
    except (TypeError, KeyError, AttributeError, OverflowError) as error:
        raise _no_shape(where, type(error).__name__) from None
    except ValueError as error:
        if is_own(error):
            raise
        raise _no_shape(where, str(error)) from None


def _decoded(rle: Any) -> npt.NDArray[np.bool_]:
    return np.asarray(coco_mask.decode(rle)).astype(np.bool_)


def _no_shape(where: str, reason: str) -> ValueError:
    return ValueError(
        f"Expected polygons or RLE as the segmentation, got something else ({reason[:100]}) in "
        f"{where}. Correct the annotation, or remove it."
    )


def _run_lengths(shape: Any, height: int, width: int, where: str) -> Any:
    """What pycocotools decodes; None for polygons without any area."""
    if isinstance(shape, dict):
        if list(shape["size"]) != [height, width]:
            raise ValueError(
                f"Expected RLE of size {[height, width]} like its image, got "
                f"{reprlib.repr(shape['size'])} in {where}."
            )
        size, counts = [height, width], shape["counts"]
        if isinstance(counts, str):
            return {"size": size, "counts": counts}
        if not all(isinstance(count, int) and count >= 0 for count in counts):
            raise _no_shape(where, "counts that are no numbers of pixels")
        if sum(counts) != height * width:
            raise _no_shape(where, f"counts of {sum(counts)} pixels")
        return coco_mask.frPyObjects({"size": size, "counts": counts}, height, width)
    # pycocotools reads a "polygon" of four numbers as a box; fewer than three points hold no area.
    polygons = [np.asarray(polygon, float) for polygon in shape if len(polygon) >= 6]
    if not polygons:
        return None
    if any(polygon.ndim != 1 for polygon in polygons):
        raise _no_shape(where, "a polygon that is no list of x, y, x, y, ...")
    # It walks along every edge, so a corner far away takes hours, and one at infinity all memory.
    farthest = np.abs(np.concatenate(polygons)).max()
    if not farthest <= _FARTHEST * max(height, width):
        raise _no_shape(where, f"a corner at {farthest:g}")
    length = sum(_length(polygon) for polygon in polygons)
    if length > MAX_LENGTH:
        raise _no_shape(where, f"edges of {length:,.0f} pixels")
    return coco_mask.merge(coco_mask.frPyObjects([p.tolist() for p in polygons], height, width))


def _length(polygon: npt.NDArray[np.float64]) -> float:
    """Pixels along the edges of a polygon."""
    points = polygon[: len(polygon) // 2 * 2].reshape(-1, 2)
    return float(np.abs(points - np.roll(points, 1, axis=0)).max(1).sum())
