"""What a COCO json holds, checked, and which class each of its categories is."""

from __future__ import annotations

import json
import math
import reprlib
import unicodedata
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from kd_trainer.data.images import MAX_PIXELS
from kd_trainer.data.listing import did_you_mean, show_names
from kd_trainer.mask_flags import IGNORED, REST, ClassMembers

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


def category_classes(
    categories: Sequence[dict[str, Any]], chosen: Collection[str], num_labels: int, path: Path
) -> dict[int, int]:
    """Class of each category id that is drawn.

    Args:
        categories: of the json, without what is no class.
        chosen: names of those that are the foreground; empty for all.
        num_labels: classes with the background.
        path: of the json, for messages.

    Raises:
        ValueError: if the categories do not fit the other two; lists them.
    """
    named = foreground_categories(categories)
    names, ids = list(named.values()), list(named)
    if not chosen and num_labels == 2 and len(ids) == 1:
        return {ids[0]: 1}
    if not chosen and num_labels == len(ids) + 1:
        return {category_id: number for number, category_id in enumerate(ids, 1)}
    if not chosen:
        raise ValueError(
            f"Expected {num_labels - 1} categories for --num_labels {num_labels}, got {len(ids)} "
            f"in {path}: {show_names(names)}. Name the foreground with --category (several are one "
            f"foreground), or set --num_labels {len(ids) + 1} for one class each."
        )
    if num_labels != 2:
        raise ValueError(
            f"Expected --num_labels 2 with --category {' '.join(chosen)}, got {num_labels}. Leave "
            "--category out for one class for each category."
        )
    for category in chosen:
        if category not in names:
            raise _no_category(category, "--category", names, path)
    return {i: 1 for i, name in named.items() if name in chosen}


def merged_classes(
    categories: Sequence[dict[str, Any]], members: ClassMembers, ignore_index: int, path: Path
) -> dict[int, int]:
    """Class of each category id that is drawn, of the classes of `--merge_classes`.

    What nothing is drawn on is the first class, and so are its categories.

    Raises:
        ValueError: if a class is made of another category, or a category is in no class.
    """
    named = foreground_categories(categories)
    groups = [*enumerate(members.members), (ignore_index, members.ignored)]
    owners = {member: number for number, one in groups for member in one}
    if unknown := [m for m in owners if m not in {*named, *named.values(), REST, "background"}]:
        raise _no_category(str(unknown[0]), "--merge_classes", list(named.values()), path)
    classes: dict[int, int] = {}
    for category_id, name in named.items():
        owner = owners.get(name, owners.get(category_id, owners.get(REST)))
        if owner is None:
            raise ValueError(
                f"Expected a class for each category of {path} in --merge_classes, got none for "
                f"{name}. Add it, or background={REST} for all others, or {IGNORED}={name}."
            )
        if owner:
            classes[category_id] = owner
    return classes


def rest_class(members: ClassMembers, ignore_index: int) -> int:
    """Class of a category that `--merge_classes` does not name: that of `REST`, or none."""
    return next((i for i, one in enumerate(members.members) if REST in one), ignore_index)


def _no_category(name: str, flag: str, names: Sequence[str], path: Path) -> ValueError:
    return ValueError(
        f"Expected {flag} to be a category of {path}, got {name!r}; there are "
        f"{show_names(names)}.{did_you_mean(name, names)}"
    )


def foreground_categories(categories: Sequence[dict[str, Any]]) -> dict[int, str]:
    """Name of each category but the background, by id, in the order of the ids."""
    ordered = sorted(categories, key=lambda c: c["id"])
    return {c["id"]: str(c["name"]) for c in ordered if c["name"] != "background"}


def without_root(content: dict[str, Any]) -> list[dict[str, Any]]:
    """The categories without one that only groups the others and that no annotation uses.

    Roboflow writes such a category 0, which other tools would take for a class.
    """
    used = {entry["category_id"] for entry in content["annotations"]}
    # Tools that know no groups name each category after itself.
    pairs = [(c["name"], c.get("supercategory")) for c in content["categories"]]
    groups = [group for name, group in pairs if name != group]
    return [c for c in content["categories"] if c["id"] in used or c["name"] not in groups]


def is_box(entry: dict[str, Any]) -> bool:
    """Whether an annotation has no outline."""
    return not entry.get("segmentation")
