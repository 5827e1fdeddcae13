"""COCO annotations, polygons and RLE, as masks of class ids.

pycocotools draws the shapes, so a mask has the very pixels of other COCO tools (`cv2.fillPoly`
differs at the edges). Where objects overlap, the smaller one is on top.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import cv2
import datasets
import numpy as np
import numpy.typing as npt
from datasets.exceptions import DatasetGenerationError
from datasets.fingerprint import Hasher
from pycocotools import mask as coco_mask

from kd_trainer.data.coco_files import find_annotations, find_images, read_annotations
from kd_trainer.data.listing import FEATURES, did_you_mean, show_names, stream_shards

DRAWING = 1
"""Counts up when the same annotations are drawn as other pixels: it invalidates cached masks."""

_FARTHEST = 10  # sides of the picture that a polygon's corner may be away


@dataclass(frozen=True)
class CocoSplit:
    """One annotation file with its photographs.

    Args:
        annotations: the json file.
        path: what was given as the data set, near which the photographs are looked for.
        split: name of the split.
        category: name of the foreground, or None.
        num_labels: classes with the background.
        limit: use the first so many images, or all (None).
    """

    annotations: Path
    path: Path
    split: str
    category: str | None
    num_labels: int
    limit: int | None

    def __getstate__(self) -> dict[str, Any]:
        # A worker that is spawned, and the hash of the data, need the file's name, not its content.
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    @cached_property
    def records(self) -> list[tuple[dict[str, Any], list[tuple[int, dict[str, Any]]]]]:
        """Image entries by file name, each with (class, annotation), largest area first."""
        content = read_annotations(self.annotations)
        classes = category_classes(
            content["categories"], self.category, self.num_labels, self.annotations
        )
        by_image: dict[Any, list[tuple[int, dict[str, Any]]]] = {}
        for entry in content["annotations"]:
            if entry["category_id"] in classes:
                found = by_image.setdefault(entry["image_id"], [])
                found.append((classes[entry["category_id"]], entry))
        images = sorted(content["images"], key=lambda image: str(image["file_name"]))
        records = []
        for image in images[: self.limit]:
            found = by_image.get(image["id"], [])
            found.sort(key=lambda pair: (-float(pair[1].get("area", 0)), str(pair[1].get("id"))))
            records.append((image, found))
        return records

    @cached_property
    def images(self) -> Path:
        """Folder of the photographs."""
        names = [str(image["file_name"]) for image, _ in self.records]
        return find_images(self.annotations, self.path, self.split, names)

    def rows(self, ranges: Sequence[tuple[int, int]]) -> Iterator[dict[str, Any]]:
        """Rows of the records in `ranges` (start, stop), masks drawn on the way."""
        for start, stop in ranges:
            for image, found in self.records[start:stop]:
                mask = draw(image, found, self.annotations)
                png = cv2.imencode(".png", mask)[1].tobytes()
                path = str(self.images / image["file_name"])
                name = f"{self.annotations.name}: {image['file_name']}"
                yield {
                    "image": {"path": path, "bytes": None},
                    "mask": {"path": name, "bytes": png},
                }


def load_coco(
    path: Path,
    split: str,
    *,
    other_splits: Sequence[str],
    category: str | None,
    num_labels: int,
    limit: int | None,
    streaming: bool,
) -> tuple[Any, list[int]]:
    """Load a split of a COCO data set; drawn masks are kept in the cache of `datasets`.

    Args:
        path: a folder (`annotations/<split>.json` and the images), or a json file.
        split: name of the split.
        other_splits: names that stand in `path`, if it is a file, where `split` belongs.
        category: name of the foreground category; None if the file has only one, or, with more
            than two labels, for classes in the order of the categories' ids.
        num_labels: classes with the background.
        limit: use the first so many images by file name, or all.
        streaming: draw masks while iterating, keep nothing.

    Returns:
        A Dataset or IterableDataset with the columns `image` and `mask`, and the shard lengths.

    Raises:
        FileNotFoundError: if annotations or photographs are missing.
        ValueError: if the json, its categories or segmentations cannot be used.
    """
    annotations = find_annotations(path, split, other_splits)
    source = CocoSplit(annotations, path, split, category, num_labels, limit)
    count = len(source.records)
    if not count:
        raise ValueError(f"Expected images in {annotations}, got an empty split.")
    source.images  # noqa: B018  -- missing photographs are an error now, not in the first epoch
    shards = stream_shards(count)
    ranges = list(pairwise(count * i // shards for i in range(shards + 1)))
    lengths = [stop - start for start, stop in ranges]
    return (_stream if streaming else _drawn)(source, ranges), lengths


def _stream(source: CocoSplit, ranges: list[tuple[int, int]]) -> datasets.IterableDataset:
    return datasets.IterableDataset.from_generator(
        source.rows, features=FEATURES, gen_kwargs={"ranges": ranges}
    )


def _drawn(source: CocoSplit, ranges: list[tuple[int, int]]) -> datasets.Dataset:
    stat = source.annotations.stat()
    state = [source.__getstate__(), source.images, stat.st_mtime_ns, stat.st_size, DRAWING]
    try:
        return datasets.Dataset.from_generator(
            source.rows,
            features=FEATURES,
            gen_kwargs={"ranges": ranges},
            fingerprint=Hasher.hash(repr(state)),
        )
    except DatasetGenerationError as error:  # show our own line, not the wrapper's
        if isinstance(error.__cause__, ValueError):
            raise error.__cause__ from None
        raise


def category_classes(
    categories: Sequence[dict[str, Any]], category: str | None, num_labels: int, path: Path
) -> dict[int, int]:
    """Class of each used category id.

    Raises:
        ValueError: if the categories do not fit `category` and `num_labels`; lists them.
    """
    named = foreground_categories(categories)
    names, ids = list(named.values()), list(named)
    if category is None and num_labels == 2 and len(ids) == 1:
        return {ids[0]: 1}
    if category is None and num_labels == len(ids) + 1:
        return {category_id: number for number, category_id in enumerate(ids, 1)}
    if category is None:
        raise ValueError(
            f"Expected {num_labels - 1} categories for --num_labels {num_labels}, got {len(ids)} "
            f"in {path}: {show_names(names)}. Name the foreground with --category, or set "
            f"--num_labels {len(ids) + 1} for one class each."
        )
    if num_labels != 2:
        raise ValueError(
            f"Expected --num_labels 2 with --category {category}, got {num_labels}. Leave "
            "--category out for one class for each category."
        )
    if category not in names:
        raise ValueError(
            f"Expected --category to be a category of {path}, got {category!r}; there are "
            f"{show_names(names)}.{did_you_mean(category, names)}"
        )
    return {i: 1 for i, name in zip(ids, names, strict=True) if name == category}


def foreground_categories(categories: Sequence[dict[str, Any]]) -> dict[int, str]:
    """Name of each category but the background, by id, in the order of the ids."""
    ordered = sorted(categories, key=lambda c: c["id"])
    return {int(c["id"]): str(c["name"]) for c in ordered if c["name"] != "background"}


def coco_class_names(path: Path, split: str, other_splits: Sequence[str]) -> list[str]:
    """Names of the classes of a COCO data set without `category`, background first."""
    content = read_annotations(find_annotations(path, split, other_splits))
    return ["background", *foreground_categories(content["categories"]).values()]


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
        if str(error).startswith("Expected"):
            raise
        raise _no_shape(where, str(error)) from None


def _decoded(rle: Any) -> npt.NDArray[np.bool_]:
    return np.asarray(coco_mask.decode(rle)).astype(np.bool_)


def _no_shape(where: str, reason: str) -> ValueError:
    return ValueError(
        f"Expected polygons or RLE as the segmentation, got something else ({reason}) in {where}. "
        "Correct the annotation, or remove it."
    )


def _run_lengths(shape: Any, height: int, width: int, where: str) -> Any:
    """What pycocotools decodes; None for polygons without any area."""
    if isinstance(shape, dict):
        if list(shape["size"]) != [height, width]:
            raise ValueError(
                f"Expected RLE of size {[height, width]} like its image, got {shape['size']} in "
                f"{where}."
            )
        is_list = isinstance(shape["counts"], list)
        if is_list and sum(shape["counts"]) != height * width:
            raise _no_shape(where, f"counts of {sum(shape['counts'])} pixels")
        return coco_mask.frPyObjects(shape, height, width) if is_list else shape
    # pycocotools reads a "polygon" of four numbers as a box; fewer than three points hold no area.
    polygons = [polygon for polygon in shape if len(polygon) >= 6]
    if not polygons:
        return None
    # It walks along every edge, so a corner far away takes hours, and one at infinity all memory.
    corners = np.abs(np.concatenate([np.asarray(polygon, float) for polygon in polygons]))
    if not (corners <= _FARTHEST * max(height, width)).all():
        raise _no_shape(where, f"a corner at {corners.max():g}")
    return coco_mask.merge(coco_mask.frPyObjects(polygons, height, width))
