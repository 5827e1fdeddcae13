"""Masks drawn from the polygons and run lengths of COCO annotations."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pycocotools import mask as coco_mask

MAX_LENGTH = 1_000_000
"""Pixels along the edges of one annotation: half a second and 300 MiB in pycocotools."""

_FARTHEST = 10  # sides of the image that a polygon's corner may be away


def draw(
    image: dict[str, Any], annotations: Sequence[tuple[int, dict[str, Any]]], source: Path
) -> npt.NDArray[np.uint8]:
    """Class ids (H, W) of the annotations (class, entry) of one image, later ones on top.

    Raises:
        ValueError: if an annotation has no segmentation, or one that cannot be drawn.
    """
    height, width = int(image["height"]), int(image["width"])
    mask = np.zeros((height, width), np.uint8)
    for class_id, entry in annotations:
        where = f"annotation {entry.get('id')} of {source}"
        if not entry.get("segmentation"):
            raise ValueError(
                f"Expected a segmentation (polygons or RLE), got none in {where}. Boxes are not "
                "enough for masks."
            )
        try:
            rle = _run_lengths(entry["segmentation"], height, width)
            if rle is not None:
                mask[coco_mask.decode(rle).astype(np.bool_)] = class_id
        except (TypeError, KeyError, AttributeError, OverflowError, ValueError) as error:
            reason = str(error) if isinstance(error, ValueError) else type(error).__name__
            raise ValueError(
                "Expected polygons or RLE as the segmentation, got something else "
                f"({reason[:100]}) in {where}. Correct the annotation, or remove it."
            ) from None
    return mask


def _run_lengths(shape: Any, height: int, width: int) -> Any:
    """What pycocotools decodes; None for polygons without any area.

    Raises:
        ValueError: with the reason alone; and whatever else a wrong type stumbles over.
    """
    if isinstance(shape, dict):
        size, counts = [height, width], shape["counts"]
        if list(shape["size"]) != size:
            raise ValueError(f"RLE of size {reprlib.repr(shape['size'])} for {size}, its image")
        if isinstance(counts, str):
            return {"size": size, "counts": counts}
        if not all(isinstance(count, int) and count >= 0 for count in counts):
            raise ValueError("counts that are no numbers of pixels")
        if sum(counts) != height * width:
            raise ValueError(f"counts of {sum(counts)} pixels")
        return coco_mask.frPyObjects({"size": size, "counts": counts}, height, width)
    # pycocotools reads a "polygon" of four numbers as a box; fewer than three points hold no area.
    polygons = [np.asarray(polygon, float) for polygon in shape if len(polygon) >= 6]
    if not polygons:
        return None
    if any(polygon.ndim != 1 for polygon in polygons):
        raise ValueError("a polygon that is no list of x, y, x, y, ...")
    # It walks along every edge, so a corner far away takes hours, and one at infinity all memory.
    farthest = np.abs(np.concatenate(polygons)).max()
    if not farthest <= _FARTHEST * max(height, width):
        raise ValueError(f"a corner at {farthest:g}")
    length = 0.0
    for polygon in polygons:
        points = polygon[: len(polygon) // 2 * 2].reshape(-1, 2)
        length += float(np.abs(points - np.roll(points, 1, axis=0)).max(1).sum())
    if length > MAX_LENGTH:
        raise ValueError(f"edges of {length:,.0f} pixels")
    return coco_mask.merge(coco_mask.frPyObjects([p.tolist() for p in polygons], height, width))
