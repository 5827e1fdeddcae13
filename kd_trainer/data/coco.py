"""COCO annotations, polygons and RLE, as masks of class ids.

Where objects overlap, the smaller one is on top. A region that is marked as a crowd (`iscrowd`)
counts nowhere, as in the evaluation of COCO, but where an object lies on it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import cv2
import datasets
import torch.distributed as dist
from datasets.exceptions import DatasetGenerationError
from datasets.fingerprint import Hasher
from tqdm import tqdm

from kd_trainer.data.coco_entries import read_annotations
from kd_trainer.data.coco_files import find_annotations, find_images
from kd_trainer.data.coco_shapes import draw
from kd_trainer.data.listing import FEATURES, did_you_mean, show_names, stream_shards
from kd_trainer.data.masks import MaskRule
from kd_trainer.safe_files import plain

DRAWING = 2
"""Counts up when the same annotations are drawn as other pixels: it invalidates cached masks."""


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
        ignore_index: value of crowd regions.
    """

    annotations: Path
    path: Path
    split: str
    category: str | None
    num_labels: int
    limit: int | None
    ignore_index: int = 255

    def __getstate__(self) -> dict[str, Any]:
        # A worker that is spawned, and the hash of the data, need the file's name, not its content.
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    @cached_property
    def records(self) -> list[tuple[dict[str, Any], list[tuple[int, dict[str, Any]]]]]:
        """Image entries by file name, each with (class, annotation): crowds first, then by area."""
        content = read_annotations(self.annotations)
        classes = category_classes(
            content["categories"], self.category, self.num_labels, self.annotations
        )
        by_image: dict[Any, list[tuple[int, dict[str, Any]]]] = {}
        for entry in content["annotations"]:
            if entry["category_id"] in classes:
                found = by_image.setdefault(entry["image_id"], [])
                crowd = bool(entry.get("iscrowd"))
                found.append((self.ignore_index if crowd else classes[entry["category_id"]], entry))
        images = sorted(content["images"], key=lambda image: image["file_name"])
        records = []
        for image in images[: self.limit]:
            found = by_image.get(image["id"], [])
            found.sort(key=_order)
            records.append((image, found))
        return records

    @cached_property
    def images(self) -> tuple[Path, list[str]]:
        """Folder of the photographs, and the file there of each record."""
        names = [image["file_name"] for image, _ in self.records]
        return find_images(self.annotations, self.path, self.split, names)

    def rows(self, ranges: Sequence[tuple[int, int]]) -> Iterator[dict[str, Any]]:
        """Rows of the records in `ranges` (start, stop), masks drawn on the way."""
        folder, files = self.images
        for start, stop in ranges:
            for (image, found), file in zip(
                self.records[start:stop], files[start:stop], strict=True
            ):
                mask = draw(image, found, self.annotations)
                png = cv2.imencode(".png", mask)[1].tobytes()
                path = str(folder / file)
                name = f"{self.annotations.name}: {image['file_name']}"
                yield {
                    "image": {"path": path, "bytes": None},
                    "mask": {"path": name, "bytes": png},
                }


def _order(pair: tuple[int, dict[str, Any]]) -> tuple[bool, float, str]:
    _, entry = pair
    return not entry.get("iscrowd"), -float(entry.get("area") or 0), str(entry.get("id"))


def load_coco(
    path: Path,
    split: str,
    *,
    other_splits: Sequence[str],
    category: str | None,
    num_labels: int,
    ignore_index: int,
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
        ignore_index: value of crowd regions in the masks, which count nowhere.
        limit: use the first so many images by file name, or all.
        streaming: draw masks while iterating, keep nothing.

    Returns:
        A Dataset or IterableDataset with the columns `image` and `mask`, and the shard lengths.

    Raises:
        FileNotFoundError: if annotations or photographs are missing.
        ValueError: if the json, its categories or segmentations cannot be used.
    """
    MaskRule(tuple(range(num_labels)), ignore_index)  # whether a mask of bytes can hold them
    annotations = find_annotations(path, split, other_splits)
    source = CocoSplit(annotations, path, split, category, num_labels, limit, ignore_index)
    count = len(source.records)
    if not count:
        raise ValueError(f"Expected images in {annotations}, got an empty split.")
    _tell_moved(source)  # and missing photographs are an error now, not in the first epoch
    shards = stream_shards(count)
    ranges = list(pairwise(count * i // shards for i in range(shards + 1)))
    lengths = [stop - start for start, stop in ranges]
    return (_stream if streaming else _drawn)(source, ranges), lengths


def _tell_moved(source: CocoSplit) -> None:
    """Say once where files lie whose names are paths of another machine."""
    folder, files = source.images
    names = [image["file_name"] for image, _ in source.records]
    moved = [(name, file) for name, file in zip(names, files, strict=True) if name != file]
    if moved and not (dist.is_available() and dist.is_initialized() and dist.get_rank()):
        tqdm.write(
            plain(
                f"{len(moved)} of {len(names)} file names of {source.annotations} are paths of "
                f"another machine; in {folder} {moved[0][0]} is {moved[0][1]}."
            ),
            file=sys.stderr,
        )


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
    return {c["id"]: str(c["name"]) for c in ordered if c["name"] != "background"}


def coco_class_names(path: Path, split: str, other_splits: Sequence[str]) -> list[str]:
    """Names of the classes of a COCO data set without `category`, background first."""
    content = read_annotations(find_annotations(path, split, other_splits))
    return ["background", *foreground_categories(content["categories"]).values()]
