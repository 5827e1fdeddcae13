"""Tables of classes and their colours that lie beside coloured masks, as other programs write them.

- `class_dict.csv`: lines of `name,r,g,b`, as the data sets of Kaggle have it (CamVid);
- `labelmap.txt`: `name:r,g,b:parts:actions`, of CVAT;
- `label_colors.txt`, `labels.txt`: `r g b name`, as CamVid is published.

A table is `--mask_colors` in a file: it says the order and the names of the classes.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import NamedTuple

from kd_trainer.errors import clipped
from kd_trainer.files import read_regular
from kd_trainer.mask_flags import IGNORED, show_color

_FILES = ("class_dict.csv", "class_dict_seg.csv", "labelmap.txt", "label_colors.txt", "labels.txt")
_MOST_BYTES = 2**16
_NUMBERS = r"(?P<r>\d{1,3})[\s,]+(?P<g>\d{1,3})[\s,]+(?P<b>\d{1,3})"
_LINES = (
    re.compile(rf"{_NUMBERS}[\s,]+(?P<name>[^\d\s].*)"),
    re.compile(rf"(?P<name>[^:,]*[^:,\s])\s*[:,\s]\s*{_NUMBERS}\s*(?:[:,].*)?"),
)
# How tables call what nobody labelled; published figures leave it out.
_NOWHERE = frozenset({"void", "ignore", "ignored", "unlabeled", "unlabelled"})
_BACKGROUND = "background"


class ClassTable(NamedTuple):
    """A table beside masks.

    Attributes:
        file: that holds it.
        names: of the class of each 0xRRGGBB, in the order of the file.
    """

    file: Path
    names: Mapping[int, str]


def find_class_table(dataset: Path, mask: str | None) -> ClassTable | None:
    """The table in the folder of a data set, or in one between it and a mask; None without.

    Raises:
        ValueError: if only some of its lines name a colour.
    """
    root = dataset.parent if dataset.is_file() else dataset
    above = [folder for folder in Path(mask or "").parents if folder.is_relative_to(root)]
    for folder in dict.fromkeys([*above, root]):
        for file in (folder / name for name in _FILES):
            if file.is_file() and file.stat().st_size <= _MOST_BYTES and (names := _read(file)):
                return ClassTable(file, names)
    return None


def _read(file: Path) -> dict[int, str]:
    """The names by colour; nothing where the file holds something else."""
    text = read_regular(file.resolve()).decode("utf-8-sig", errors="replace")
    lines = [line.strip() for line in text.splitlines()]
    lines = [line for line in lines if line and not line.startswith("#")]
    names: dict[int, str] = {}
    for number, line in enumerate(lines):
        match = next(filter(None, (pattern.fullmatch(line) for pattern in _LINES)), None)
        red, green, blue = (int(match[c]) for c in "rgb") if match else (256, 256, 256)
        if match is None or max(red, green, blue) > 255:
            if names:
                raise ValueError(
                    f"Expected a class and its colour (0 to 255) in each line of {file}, got "
                    f"{clipped(line)!a}. Correct the line, or name the classes with --mask_colors."
                )
            if number:  # more than a head
                return {}
            continue
        color = red << 16 | green << 8 | blue
        if names.setdefault(color, match["name"].strip()) != match["name"].strip():
            raise ValueError(
                f"Expected one class for each colour in {file}, got {clipped(names[color])!a} and "
                f"{clipped(match['name'])!a} for {show_color(color)}. Correct one, or name the "
                "classes with --mask_colors."
            )
    return names


def color_flags_of(
    table: ClassTable, seen: Collection[int], num_labels: int | None, order: Collection[str] | None
) -> list[str]:
    """`--mask_colors` that say what a table says.

    What tables call void or unlabelled counts nowhere, and what they call background is class 0, as
    is black where they do not name it.

    Args:
        table: of classes.
        seen: colours in masks.
        num_labels: how many classes there are, if that is known; void is one of them if they are
            then as many as the names in the table.
        order: names of the classes, whose order counts if they are those of the table.

    Raises:
        ValueError: if the table has another number of classes.
    """
    black = {} if 0 in table.names or 0 not in seen else {0: _BACKGROUND}
    names = {**black, **table.names}
    ignored = {name for name in names.values() if name.casefold() in _NOWHERE}
    places = {name: place for place, name in enumerate(dict.fromkeys(names.values()))}
    count = len(places)
    if num_labels == count:
        ignored = set()
    elif num_labels not in (None, count - len(ignored)):
        raise ValueError(
            f"Expected {num_labels} classes (--num_labels) in {table.file}, got "
            f"{count - len(ignored)}. Leave --num_labels out, or merge them with --mask_colors, "
            "where one name twice is one class."
        )
    first = {name for name in names.values() if name.casefold().strip("_") == _BACKGROUND}
    if order is not None and {*order} == {*places} - ignored:
        places |= {name: place for place, name in enumerate(order)}
        first = set()
    ordered = sorted(names, key=lambda color: (names[color] not in first, places[names[color]]))
    return [
        f"{IGNORED if names[color] in ignored else names[color]}={show_color(color)}"
        for color in ordered
    ]
