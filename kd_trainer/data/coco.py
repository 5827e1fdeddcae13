"""COCO data sets: annotation files, their images, and the masks drawn from them."""

from __future__ import annotations

import json
import math
import reprlib
import sys
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import cv2
import datasets
import numpy as np
import numpy.typing as npt
import torch.distributed as dist
from datasets.exceptions import DatasetGenerationError
from datasets.fingerprint import Hasher
from pycocotools import mask as coco_mask
from tqdm import tqdm

from kd_trainer.data.images import MAX_PIXELS
from kd_trainer.data.listing import (
    FEATURES,
    MissingSplitError,
    did_you_mean,
    is_inside,
    missing_path,
    show_names,
    stream_shards,
)
from kd_trainer.data.masks import MaskRule
from kd_trainer.data_arguments import DataArguments
from kd_trainer.errors import printable

DRAWING = 2
"""Counts up when the same annotations are drawn as other pixels: it invalidates cached masks."""


@dataclass(frozen=True)
class CocoSplit:
    """One annotation file with its images.

    Args:
        annotations: the json file.
        path: of the data set, near which the images are looked for.
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
    ignore_index: int
    multi_label: bool = False

    def __getstate__(self) -> dict[str, Any]:
        # A worker that is spawned, and the hash of the data, need the file's name, not its content.
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    @cached_property
    def records(self) -> list[tuple[dict[str, Any], list[tuple[int, int, dict[str, Any]]]]]:
        """Image entries by file name, each with (class, value in its mask, annotation).

        Crowds come first, the others by area.
        """
        content = read_annotations(self.annotations)
        # Of several labels a pixel each category has a plane, and there is no background.
        classes = category_classes(
            content["categories"],
            self.category,
            self.num_labels + self.multi_label,
            self.annotations,
        )
        by_image: dict[Any, list[tuple[int, int, dict[str, Any]]]] = defaultdict(list)
        for entry in sorted(content["annotations"], key=_drawing_order):
            if entry["category_id"] in classes:
                class_id = classes[entry["category_id"]]
                value = 1 if self.multi_label else class_id
                value = self.ignore_index if entry.get("iscrowd") else value
                by_image[entry["image_id"]].append((class_id, value, entry))
        images = sorted(content["images"], key=lambda image: image["file_name"])
        return [(image, by_image[image["id"]]) for image in images[: self.limit]]

    @cached_property
    def images(self) -> tuple[Path, list[str]]:
        """Folder of the images, and the file there of each record."""
        names = [image["file_name"] for image, _ in self.records]
        return find_images(self.annotations, self.path, self.split, names)

    def rows(self, ranges: Sequence[tuple[int, int]]) -> Iterator[dict[str, Any]]:
        """Rows of the records in `ranges` (start, stop), masks drawn on the way."""
        folder, files = self.images
        for row in chain.from_iterable(range(start, stop) for start, stop in ranges):
            image, annotations = self.records[row]
            mask = self._mask(image, annotations)
            png = cv2.imencode(".png", mask)[1].tobytes()
            name = f"{self.annotations.name}: {image['file_name']}"
            yield {
                "image": {"path": str(folder / files[row]), "bytes": None},
                "mask": {"path": name, "bytes": png},
            }

    def _mask(
        self, image: dict[str, Any], annotations: list[tuple[int, int, dict[str, Any]]]
    ) -> npt.NDArray[np.uint8]:
        """Class ids (H, W), or the planes of the classes one below another (K·H, W)."""
        if not self.multi_label:
            drawn = [(value, entry) for _, value, entry in annotations]
            return draw(image, drawn, self.annotations)
        planes = [
            [(value, entry) for of, value, entry in annotations if of == number]
            for number in range(1, self.num_labels + 1)
        ]
        return np.vstack([draw(image, plane, self.annotations) for plane in planes])


def _drawing_order(entry: dict[str, Any]) -> tuple[bool, float, str]:
    return not entry.get("iscrowd"), -(entry.get("area") or 0), str(entry.get("id"))


def load_coco(
    path: Path,
    split: str,
    data: DataArguments,
    *,
    other_splits: Sequence[str],
    limit: int | None,
) -> tuple[Any, list[int]]:
    """Load a split of a COCO data set; drawn masks are kept in the cache of `datasets`.

    Args:
        path: a folder (`annotations/<split>.json` and the images), or a json file.
        split: name of the split.
        data: `category` is the foreground; without it the file has only one, or, with more than two
            labels, classes are in the order of the categories' ids. Crowd regions are
            `ignore_index`. With `streaming` masks are drawn while iterating, and nothing is kept.
        other_splits: names that stand in `path`, if it is a file, where `split` belongs.
        limit: use the first so many images by file name, or all.

    Returns:
        A Dataset or IterableDataset with the columns `image` and `mask`, and the shard lengths.

    Raises:
        FileNotFoundError: if annotations or images are missing.
        ValueError: if the json, its categories or segmentations cannot be used.
    """
    MaskRule(tuple(range(data.num_labels)), data.ignore_index)  # refuses what no byte can number
    annotations = find_annotations(path, split, other_splits)
    source = CocoSplit(
        annotations,
        path,
        split,
        data.category,
        data.num_labels,
        limit,
        data.ignore_index,
        data.multi_label,
    )
    count = len(source.records)
    if not count:
        raise ValueError(f"Expected images in {annotations}, got an empty split.")
    _report_relocated(source)  # and missing images are an error now, not in the first epoch
    shards = stream_shards(count)
    ranges = list(pairwise(count * i // shards for i in range(shards + 1)))
    lengths = [stop - start for start, stop in ranges]
    if data.streaming:
        rows = datasets.IterableDataset.from_generator(
            source.rows, features=FEATURES, gen_kwargs={"ranges": ranges}
        )
        return rows, lengths
    return _draw_all(source, ranges), lengths


def _report_relocated(source: CocoSplit) -> None:
    """Say once where files lie whose names are paths of another machine."""
    folder, files = source.images
    names = [image["file_name"] for image, _ in source.records]
    moved = [pair for pair in zip(names, files, strict=True) if pair[0] != pair[1]]
    if moved and not (dist.is_available() and dist.is_initialized() and dist.get_rank()):
        tqdm.write(
            printable(
                f"{len(moved)} of {len(names)} file names of {source.annotations} are paths of "
                f"another machine; in {folder} {moved[0][0]} is {moved[0][1]}."
            ),
            file=sys.stderr,
        )


def _draw_all(source: CocoSplit, ranges: list[tuple[int, int]]) -> datasets.Dataset:
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


def file_for_split(path: Path, split: str, other_splits: Sequence[str]) -> Path:
    """The sibling of `path` for another split: the same name with the split's name exchanged.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the name of `path` holds no split's name.
    """
    for name in sorted((split, *other_splits), key=len, reverse=True):
        if name in path.name:
            sibling = path.with_name(path.name.replace(name, split))
            if not sibling.is_file():
                missing = missing_path(sibling, f"the file of split {split!r}")
                raise MissingSplitError(split, str(missing))
            return sibling
    names = " or ".join(repr(n) for n in (split, *other_splits))
    raise ValueError(
        f"Expected a file name that holds the split's name ({names}), got {path.name}. Rename the "
        "file, name the splits with --train_split and --eval_split, or pass the folder."
    )


def _candidates(root: Path, split: str) -> list[Path]:
    folder = root / "annotations"
    return [
        folder / f"{split}.json",
        folder / f"instances_{split}.json",
        root / f"{split}.json",
        root / f"instances_{split}.json",
        root / split / "_annotations.coco.json",
        root / split / "annotations.json",
    ]


def is_coco_folder(root: Path, splits: Sequence[str]) -> bool:
    """Whether a folder holds COCO annotations of one of the splits, or an `annotations` folder."""
    files = (file for split in splits for file in _candidates(root, split))
    return any(file.is_file() for file in files) or any((root / "annotations").glob("*.json"))


def find_annotations(path: Path, split: str, other_splits: Sequence[str]) -> Path:
    """The annotation file of a split, for a folder or a json file of any split.

    Raises:
        FileNotFoundError: if there is none; says where it was looked for.
    """
    if path.suffix == ".json":
        return file_for_split(path, split, other_splits)
    candidates = _candidates(path, split)
    for file in candidates:
        if file.is_file():
            return file
    others = sorted(p.name for p in (path / "annotations").glob("*.json"))
    raise MissingSplitError(
        split,
        f"Expected COCO annotations of split {split!r} at {candidates[0]} (or "
        f"annotations/instances_{split}.json), got {show_names(others) or 'no json file'}. Name "
        "the splits with --train_split and --eval_split.",
    )


def find_images(
    annotations: Path, path: Path, split: str, names: Sequence[str]
) -> tuple[Path, list[str]]:
    """The folder that holds the images `names`, and what each is called in it.

    Raises:
        FileNotFoundError: if no folder holds any of them, or one of them is missing.
        ValueError: if two names that lead out of the folder end in the same file.
    """
    beside = annotations.parent
    root = path if path.is_dir() else beside.parent if beside.name == "annotations" else beside
    places = (root / "images" / split, root / split / "images", root / split, root / "images")
    for folder in (*places, root, beside):
        files = {name: _name_in(folder, name) for name in names}
        missing = [name for name, file in files.items() if file is None]
        if len(missing) == len(files):
            continue
        if missing:
            raise FileNotFoundError(
                f"Expected each image of {annotations} in {folder}, got none for {len(missing)} of "
                f"{len(names)}: {show_names(missing)}. Add the files or remove their entries."
            )
        owners: dict[str | None, str] = {}
        for name, file in files.items():
            if owners.setdefault(file, name) != name:
                raise ValueError(
                    f"Expected each file_name of {annotations} to mean another file, got "
                    f"{owners[file]} and {name}, which are both {file} in {folder}. Keep the "
                    "folders of the names there."
                )
        return folder, [files[name] or name for name in names]
    raise FileNotFoundError(
        f"Expected the images of {annotations} in one of {', '.join(map(str, places))}, got none "
        f"of {show_names(list(names))}. Move them there."
    )


def _name_in(folder: Path, name: str) -> str | None:
    """What the file of a `file_name` is called in a folder; never a place outside of it.

    Labelling tools write the paths of their own machine, absolute, upwards or of Windows. The
    longest end of such a path that is a file here is meant.
    """
    slashed = name.replace("\\", "/")
    readings = [name, slashed]
    if not is_inside(name) or "://" in name:
        parts = slashed.split("/")
        readings = ["/".join(parts[i:]) for i in range(len(parts))]
    return next((r for r in readings if is_inside(r) and (folder / r).is_file()), None)


Kind = tuple[Callable[[Any], bool], str]


def _is_whole(value: Any) -> bool:
    if isinstance(value, float):
        return value.is_integer()
    return isinstance(value, int) and not isinstance(value, bool)


def _is_id(value: Any) -> bool:
    return isinstance(value, str) or _is_whole(value)


def _is_category_id(value: Any) -> bool:
    return _is_whole(value) or (isinstance(value, str) and value.isdecimal() and len(value) < 20)


def _is_file_name(value: Any) -> bool:
    # Half of a surrogate pair cannot be stored, and a control character is obeyed by a terminal.
    return isinstance(value, str) and not any(
        unicodedata.category(c) in ("Cc", "Cs") for c in value
    )


_ID: Kind = (_is_id, "a whole number or a text")
_CATEGORY: Kind = (_is_category_id, "a whole number")
_SIDE: Kind = (lambda _: True, "a whole number")  # both sides are checked together
_FIELDS: dict[str, dict[str, Kind]] = {
    "images": {
        "id": _ID,
        "file_name": (_is_file_name, "a text without control characters"),
        "height": _SIDE,
        "width": _SIDE,
    },
    "annotations": {
        "image_id": _ID,
        "category_id": _CATEGORY,
        "area": (lambda v: isinstance(v, int | float) and abs(v) < math.inf, "a finite number"),
        "iscrowd": (lambda v: isinstance(v, int | float) and v in (0, 1), "0 or 1"),
    },
    "categories": {"id": _CATEGORY, "name": (lambda v: isinstance(v, str | int), "a text")},
}
_OPTIONAL = ("area", "iscrowd")


def read_annotations(path: Path) -> dict[str, Any]:
    """The content of a COCO json, every entry with fields of the kinds that are read later.

    Categories are whole numbers afterwards, also where the file has them as text.

    Raises:
        ValueError: if it is no such json; names the first entry at fault.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except RecursionError:
        raise ValueError(
            f"Expected a COCO json, got {path}, which is nested too deeply. Export it again."
        ) from None
    except ValueError as error:
        raise ValueError(f"Expected a COCO json, got {path}: {error}.") from None
    lists = content if isinstance(content, dict) else {}
    missing = [kind for kind in _FIELDS if not isinstance(lists.get(kind), list)]
    if missing:
        raise ValueError(
            f"Expected a COCO json with {', '.join(_FIELDS)}, got {path} without "
            f"{', '.join(missing)}."
        )
    for kind in _FIELDS:
        for number, entry in enumerate(lists[kind]):
            _check_entry(entry, kind, f"entry {number} (from 0) of {path}")
    for entry in lists["images"]:
        _check_size(entry, path)
    for kind, field in (("annotations", "category_id"), ("categories", "id")):
        for entry in lists[kind]:
            entry[field] = int(entry[field])
    return lists


def _check_entry(entry: Any, kind: str, where: str) -> None:
    values = entry if isinstance(entry, dict) else {}
    needed = [field for field in _FIELDS[kind] if field not in _OPTIONAL]
    missing = [field for field in needed if values.get(field) is None]
    if missing:
        raise ValueError(
            f"Expected {', '.join(needed)} in each entry of {kind!r}, got {where} without "
            f"{', '.join(missing)}: {reprlib.repr(entry)}. Add what is missing, or remove the "
            "entry."
        )
    for field, (fits, description) in _FIELDS[kind].items():
        value = values.get(field)
        if value is not None and not fits(value):
            raise ValueError(
                f"Expected {description} as {field} in each entry of {kind!r}, got "
                f"{reprlib.repr(value)} in {where}. Correct the entry, or remove it."
            )


def _check_size(entry: dict[str, Any], path: Path) -> None:
    """Refuse an image of a size that nobody can draw masks of."""
    height, width = entry["height"], entry["width"]
    whole = _is_whole(height) and _is_whole(width)
    if not (whole and height > 0 and width > 0 and height * width <= MAX_PIXELS):
        raise ValueError(
            f"Expected a height and a width of at most {MAX_PIXELS:,} pixels together, got "
            f"{reprlib.repr(height)} and {reprlib.repr(width)} for {entry['file_name']} in {path}. "
            "Correct the entry."
        )


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
