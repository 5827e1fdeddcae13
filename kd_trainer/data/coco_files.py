"""Where a COCO data set keeps its annotation files and photographs, and what one has to say."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kd_trainer.data.decoding import MAX_PIXELS
from kd_trainer.data.foreign_paths import is_inside
from kd_trainer.data.listing import missing_path, show_names

_FIELDS = {
    "images": ("id", "file_name", "height", "width"),
    "annotations": ("image_id", "category_id"),
    "categories": ("id", "name"),
}
"""What each entry of a COCO json has to say; the rest of it may be missing."""


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
                raise missing_path(sibling, f"the file of split {split!r}")
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
    found = any(file.is_file() for split in splits for file in _candidates(root, split))
    return found or any((root / "annotations").glob("*.json"))


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
    found = sorted(p.name for p in (path / "annotations").glob("*.json"))
    raise FileNotFoundError(
        f"Expected COCO annotations of split {split!r} at {candidates[0]} (or "
        f"annotations/instances_{split}.json), got {show_names(found) or 'no json file'}. Name "
        "the splits with --train_split and --eval_split."
    )


def find_images(annotations: Path, path: Path, split: str, names: Sequence[str]) -> Path:
    """The folder that holds the photographs `names`.

    Raises:
        FileNotFoundError: if no folder holds the first one, or one of them is missing.
    """
    beside = annotations.parent
    root = path if path.is_dir() else beside.parent if beside.name == "annotations" else beside
    places = (root / "images" / split, root / split / "images", root / split, root / "images")
    for folder in (*places, root, beside):
        missing = [name for name in names if not (folder / name).is_file()]
        if names and len(missing) == len(names):
            continue
        if missing:
            raise FileNotFoundError(
                f"Expected each image of {annotations} in {folder}, got none for {len(missing)} of "
                f"{len(names)}: {show_names(missing)}. Add the files or remove their entries."
            )
        return folder
    raise FileNotFoundError(
        f"Expected the images of {annotations} in one of {', '.join(map(str, places))}, got none "
        f"of {show_names(list(names))}. Move them there."
    )


def read_annotations(path: Path) -> dict[str, Any]:
    """The content of a COCO json, every entry with the fields that are read later.

    Raises:
        ValueError: if it is no such json; names the first entry at fault.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"Expected a COCO json, got {path}: {error}.") from None
    lists = content if isinstance(content, dict) else {}
    missing = [kind for kind in _FIELDS if not isinstance(lists.get(kind), list)]
    if missing:
        raise ValueError(
            f"Expected a COCO json with {', '.join(_FIELDS)}, got {path} without "
            f"{', '.join(missing)}."
        )
    for kind, fields in _FIELDS.items():
        for number, entry in enumerate(lists[kind]):
            said = entry if isinstance(entry, dict) else {}
            lacking = [field for field in fields if said.get(field) is None]
            if lacking:
                raise ValueError(
                    f"Expected {', '.join(fields)} in each entry of {kind!r}, got entry {number} "
                    f"(from 0) of {path} without {', '.join(lacking)}: {json.dumps(entry)[:100]}. "
                    "Add what is missing, or remove the entry."
                )
    for entry in lists["images"]:
        _check_image(entry, path)
    return lists


def _check_image(entry: dict[str, Any], path: Path) -> None:
    """Refuse an image outside the folder, or of a size that nobody can draw masks of."""
    if not is_inside(str(entry["file_name"])):
        raise ValueError(
            f"Expected each file_name inside the folder of the images, got {entry['file_name']!r} "
            f"in {path}, which leads out of it. Copy the file there, and name it from there."
        )
    height, width = entry["height"], entry["width"]
    whole = all(isinstance(side, int | float) and side == int(side) for side in (height, width))
    if not (whole and height > 0 and width > 0 and height * width <= MAX_PIXELS):
        raise ValueError(
            f"Expected a height and a width of at most {MAX_PIXELS:,} pixels together, got "
            f"{height!r} and {width!r} for {entry['file_name']} in {path}. Correct the entry."
        )
