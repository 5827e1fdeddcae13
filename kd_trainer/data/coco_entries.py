"""What a COCO json says, looked at before any of it is used: types, finite numbers, sizes."""

from __future__ import annotations

import json
import math
import reprlib
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kd_trainer.data.decoding import MAX_PIXELS


def _is_whole(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value) and value == int(value)


def _is_id(value: Any) -> bool:
    return isinstance(value, str) or _is_whole(value)


def _is_category_id(value: Any) -> bool:
    return _is_whole(value) or (isinstance(value, str) and value.isdecimal() and len(value) < 20)


def _is_file_name(value: Any) -> bool:
    # Half of a surrogate pair cannot be stored, and a control character is obeyed by a terminal.
    return isinstance(value, str) and not any(
        unicodedata.category(c) in ("Cc", "Cs") for c in value
    )


def _is_area(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _is_flag(value: Any) -> bool:
    return isinstance(value, int | float) and value in (0, 1)


def _is_anything(_: Any) -> bool:
    return True


Kind = tuple[Callable[[Any], bool], str]
_ID: Kind = (_is_id, "a whole number or a text")
_CATEGORY: Kind = (_is_category_id, "a whole number")
_SIDE: Kind = (_is_anything, "a whole number")  # both sides are looked at together
_NEEDED: dict[str, dict[str, Kind]] = {
    "images": {
        "id": _ID,
        "file_name": (_is_file_name, "a text without control characters"),
        "height": _SIDE,
        "width": _SIDE,
    },
    "annotations": {"image_id": _ID, "category_id": _CATEGORY},
    "categories": {"id": _CATEGORY, "name": (lambda name: isinstance(name, str | int), "a text")},
}
_OPTIONAL: dict[str, dict[str, Kind]] = {
    "annotations": {"area": (_is_area, "a finite number"), "iscrowd": (_is_flag, "0 or 1")}
}


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
    missing = [kind for kind in _NEEDED if not isinstance(lists.get(kind), list)]
    if missing:
        raise ValueError(
            f"Expected a COCO json with {', '.join(_NEEDED)}, got {path} without "
            f"{', '.join(missing)}."
        )
    for kind in _NEEDED:
        for number, entry in enumerate(lists[kind]):
            _check_entry(entry, kind, f"entry {number} (from 0) of {path}")
    for entry in lists["images"]:
        _check_size(entry, path)
    for kind, field in (("annotations", "category_id"), ("categories", "id")):
        for entry in lists[kind]:
            entry[field] = int(entry[field])
    return lists


def _check_entry(entry: Any, kind: str, where: str) -> None:
    needed = _NEEDED[kind]
    said = entry if isinstance(entry, dict) else {}
    lacking = [field for field in needed if said.get(field) is None]
    if lacking:
        raise ValueError(
            f"Expected {', '.join(needed)} in each entry of {kind!r}, got {where} without "
            f"{', '.join(lacking)}: {reprlib.repr(entry)}. Add what is missing, or "
            "remove the entry."
        )
    for field, (fits, what) in (needed | _OPTIONAL.get(kind, {})).items():
        value = said.get(field)
        if value is not None and not fits(value):
            raise ValueError(
                f"Expected {what} as {field} in each entry of {kind!r}, got {reprlib.repr(value)} "
                f"in {where}. Correct the entry, or remove it."
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
