"""COCO data sets: where annotation files and their images lie, and the rows made of them."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import cv2
import datasets
import numpy as np
import numpy.typing as npt
from datasets.exceptions import DatasetGenerationError
from datasets.fingerprint import Hasher

from kd_trainer.data.coco_annotations import (
    category_classes,
    foreground_categories,
    is_box,
    merged_classes,
    read_annotations,
    rest_class,
    without_root,
)
from kd_trainer.data.coco_drawing import draw
from kd_trainer.data.listing import (
    FEATURES,
    MissingSplitError,
    is_inside,
    missing_path,
    show_names,
    split_names,
    stream_shards,
    subfolders,
)
from kd_trainer.data.masks import MaskRule
from kd_trainer.data_arguments import DataArguments
from kd_trainer.errors import announce
from kd_trainer.mask_flags import ClassMembers, merged_members

DRAWING = 2
"""Counts up when the same annotations are drawn as other pixels: it invalidates cached masks."""


@dataclass(frozen=True)
class CocoSplit:
    """One annotation file with its images.

    Args:
        annotations: the json file.
        reference: the one whose categories are the classes, that of the split to train on.
        path: of the data set, near which the images are looked for.
        split: what it is called in the data set.
        categories: names of those that are the foreground; empty for all.
        num_labels: classes with the background.
        limit: use the first so many images, or all (None).
        ignore_index: value of crowd regions.
        merged: of what each class is made, where that is said.
    """

    annotations: Path
    reference: Path
    path: Path
    split: str
    categories: tuple[str, ...]
    num_labels: int
    limit: int | None
    ignore_index: int
    merged: ClassMembers | None = None
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
        by_image: dict[Any, list[tuple[int, int, dict[str, Any]]]] = defaultdict(list)
        for class_id, value, entry in self._drawn(content):
            by_image[entry["image_id"]].append((class_id, value, entry))
        images = sorted(content["images"], key=lambda image: image["file_name"])
        return [(image, by_image[image["id"]]) for image in images[: self.limit]]

    def _drawn(self, content: dict[str, Any]) -> list[tuple[int, int, dict[str, Any]]]:
        """The annotations with an outline that belong to a class; says how many have none."""
        classes = self._classes(content)
        entries = [e for e in content["annotations"] if e["category_id"] in classes]
        outlined = [entry for entry in entries if not is_box(entry)]
        if entries and not outlined:
            raise ValueError(
                f"Expected a segmentation (polygons or RLE), got none in annotation "
                f"{entries[0].get('id')} of {self.annotations}, nor in any other. Boxes are not "
                "enough for masks."
            )
        if boxes := len(entries) - len(outlined):
            announce(
                f"{boxes:,} of {len(entries):,} objects of {self.annotations} are boxes without an "
                "outline and are left out: what they show counts as background."
            )
        drawn = []
        for entry in sorted(outlined, key=_drawing_order):
            class_id = classes[entry["category_id"]]
            value = 1 if self.multi_label else class_id
            drawn.append((class_id, self.ignore_index if entry.get("iscrowd") else value, entry))
        return drawn

    def _classes(self, content: dict[str, Any]) -> dict[int, int]:
        """Class of each category id that is drawn; says which the split to train on does not have.

        Tools leave out what no image of a split shows, and number the rest anew: names decide.
        """
        same = self.reference == self.annotations
        known = without_root(content if same else read_annotations(self.reference))
        # Of several labels a pixel each category has a plane, and there is no background.
        count = self.num_labels + self.multi_label
        classes = (
            category_classes(known, self.categories, count, self.reference)
            if self.merged is None
            else merged_classes(known, self.merged, self.ignore_index, self.reference)
        )
        if same:
            return classes
        own = foreground_categories(without_root(content))
        named = {name: classes.get(i, 0) for i, name in foreground_categories(known).items()}
        others = {i: name for i, name in own.items() if name not in named}
        label = 0 if self.categories or self.multi_label else self.ignore_index
        if self.merged is not None:
            label = rest_class(self.merged, self.ignore_index)
        unknown = [e for e in content["annotations"] if e["category_id"] in others]
        if unknown and label == self.ignore_index:
            announce(
                f"{len(unknown):,} objects of {self.annotations} count nowhere: {self.reference} "
                f"has no category {show_names([*others.values()])}."
            )
        found = {i: named.get(name, label) for i, name in own.items()}
        return {i: found[i] for i in own if found[i]}

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
        split: name of the split, or a usual other one (`split_names`).
        data: `category` is the foreground; without it the file has only one, or, with more than two
            labels, classes are in the order of the categories' ids. Crowd regions are
            `ignore_index`, and boxes without an outline are left out. With `streaming` masks are
            drawn while iterating, and nothing is kept.
        other_splits: names that stand in `path`, if it is a file, where `split` belongs.
        limit: use the first so many images by file name, or all.

    Returns:
        A Dataset or IterableDataset with the columns `image` and `mask`, and the shard lengths.

    Raises:
        FileNotFoundError: if annotations or images are missing.
        ValueError: if the json, its categories or segmentations cannot be used.
    """
    annotations, name = find_annotations(path, split, other_splits)
    count = coco_label_count(path, data)
    MaskRule(tuple(range(count)), data.ignore_index)  # refuses what no byte can number
    if name != split:
        announce(f"Split {split}: {annotations}. --train_split and --eval_split name others.")
    source = CocoSplit(
        annotations,
        _reference(path, data) or annotations,
        path,
        name,
        tuple(data.categories),
        count,
        limit,
        data.ignore_index,
        None if data.merge_classes is None else merged_members(data.merge_classes),
        data.multi_label,
    )
    images = len(source.records)
    if not images:
        raise ValueError(f"Expected images in {annotations}, got an empty split.")
    _report_relocated(source)  # and missing images are an error now, not in the first epoch
    shards = stream_shards(images)
    ranges = list(pairwise(images * i // shards for i in range(shards + 1)))
    lengths = [stop - start for start, stop in ranges]
    if data.streaming:
        rows = datasets.IterableDataset.from_generator(
            source.rows, features=FEATURES, gen_kwargs={"ranges": ranges}
        )
        return rows, lengths
    return _draw_all(source, ranges), lengths


def _reference(path: Path, data: DataArguments) -> Path | None:
    """The annotations of the split to train on; None if there are none."""
    with suppress(MissingSplitError):
        return find_annotations(path, data.train_split, (data.eval_split,))[0]
    return None


def _report_relocated(source: CocoSplit) -> None:
    """Say once where files lie whose names are paths of another machine."""
    folder, files = source.images
    names = [image["file_name"] for image, _ in source.records]
    moved = [pair for pair in zip(names, files, strict=True) if pair[0] != pair[1]]
    if moved:
        announce(
            f"{len(moved)} of {len(names)} file names of {source.annotations} are paths of "
            f"another machine; in {folder} {moved[0][0]} is {moved[0][1]}."
        )


def _draw_all(source: CocoSplit, ranges: list[tuple[int, int]]) -> datasets.Dataset:
    stats = [file.stat() for file in (source.annotations, source.reference)]
    read = [(stat.st_mtime_ns, stat.st_size) for stat in stats]
    state = [source.__getstate__(), source.images, read, DRAWING]
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


def coco_class_names(path: Path, split: str, other_splits: Sequence[str]) -> list[str]:
    """Names of the classes of a COCO data set without `category`, background first."""
    annotations, _ = find_annotations(path, split, other_splits)
    categories = without_root(read_annotations(annotations))
    return ["background", *foreground_categories(categories).values()]


def coco_label_count(path: Path, data: DataArguments) -> int:
    """Classes with the background: as many as the settings name, else one for each category."""
    if data.num_labels is not None:
        return data.num_labels
    return len(coco_class_names(path, data.train_split, (data.eval_split,))) - data.multi_label


def file_for_split(path: Path, split: str, other_splits: Sequence[str]) -> Path:
    """The sibling of `path` for another split: the same name with the split's name exchanged.

    A file that names no split and lies alone holds the images to train on.

    Raises:
        MissingSplitError: if there is no such file, or the name of `path` holds no split's name.
    """
    wanted = split_names(split, other_splits)
    others = [name for other in other_splits for name in split_names(other, (split,))]
    for name in sorted({*wanted, *others}, key=len, reverse=True):  # `val2017` before `val`
        if not re.search(rf"(?<![^\W\d_]){re.escape(name)}(?![^\W_])", path.name):
            continue
        # The file itself, unless a better one than `test` lies beside it.
        own = (name,) if name in wanted and not name.startswith("test") else ()
        siblings = [path.with_name(path.name.replace(name, n)) for n in (*own, *wanted)]
        sibling = next((file for file in siblings if file.is_file()), None)
        if sibling is None:
            missing = missing_path(siblings[0], f"the file of split {split!r}")
            raise MissingSplitError(split, str(missing))
        return sibling
    if "train" in wanted and len([*path.parent.glob(f"[!.]*{path.suffix}")]) == 1:
        return path
    names = " or ".join(repr(n) for n in (split, *other_splits))
    raise MissingSplitError(
        split,
        f"Expected a file name that holds the split's name ({names}), got {path.name}. Rename the "
        "file, name the splits with --train_split and --eval_split, or pass the folder.",
    )


def _candidates(root: Path, name: str) -> list[Path]:
    folder = root / "annotations"
    return [
        folder / f"{name}.json",
        folder / f"instances_{name}.json",
        root / f"{name}.json",
        root / f"instances_{name}.json",
        root / name / "_annotations.coco.json",
        root / name / "annotations.json",
    ]


def is_coco_folder(root: Path, splits: Sequence[str]) -> bool:
    """Whether a folder holds COCO annotations of one of the splits, or an `annotations` folder."""
    names = (name for split in splits for name in split_names(split))
    files = (file for name in names for file in _candidates(root, name))
    return any(file.is_file() for file in files) or bool(_others(root))


def _others(root: Path) -> list[Path]:
    """Annotation files by any name; or that of Label Studio, which lies beside `images` alone."""
    if files := sorted((root / "annotations").glob("[!.]*.json")):
        return files
    exported = (root / "result.json").is_file() and subfolders(root) == ["images"]
    return [root / "result.json"] if exported else []


def find_annotations(path: Path, split: str, other_splits: Sequence[str]) -> tuple[Path, str]:
    """The annotation file of a split, for a folder or a json file of any split, and its name there.

    Raises:
        FileNotFoundError: if there is none; says where it was looked for.
    """
    names = split_names(split, other_splits)
    if path.suffix == ".json":
        file = file_for_split(path, split, other_splits)
        longest = sorted(names, key=len, reverse=True)
        return file, next((name for name in longest if name in file.name), split)
    for name in names:
        for file in _candidates(path, name):
            if file.is_file():
                return file, name
    others = _others(path)
    with suppress(MissingSplitError):
        if len(others) == 1:
            return file_for_split(others[0], split, other_splits), split
    found = show_names([file.name for file in others])
    raise MissingSplitError(
        split,
        f"Expected COCO annotations of split {split!r} at {_candidates(path, split)[0]} (or "
        f"annotations/instances_{split}.json), got {found or 'no json file'}. Name "
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
    years = [root / name for name in split_names(split) if name.startswith(split)]  # val: val2017
    for folder in (*places, root, beside, *years):
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
