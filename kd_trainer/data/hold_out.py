"""Images held out of a split that is trained on, where a data set has none to evaluate on.

Which ones depends on their names alone: runs of other seeds, and of other machines, compare on the
same images, and an image that is added later moves few others.

Images in folders of their own (of a patient, a city, a video) stay together: their likes on both
sides would make the figures those of images that were trained on.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

from kd_trainer.errors import clipped

HOLD_OUT_SEED = 0
SINGLE = "none"
"""In the place of a pattern of groups: each image by itself, whatever folder it is in."""
_LEAST_FOLDERS = 3  # of two, one would be about half of the images


def row_names(rows: datasets.Dataset, root: Path) -> list[str]:
    """What each row is called wherever the data lies; reads no image.

    The path of its image below `root`, or else below what all their paths have in common; the
    number of a row without one.
    """
    cells = rows.select_columns("image").with_format("arrow")[:]["image"].combine_chunks()
    paths = [path and os.path.abspath(path) for path in cells.field("path").to_pylist()]  # noqa: PTH100
    known = [path for path in paths if path]
    above = os.path.abspath(root)  # noqa: PTH100
    if known and not all(path.startswith(f"{above}{os.sep}") for path in known):
        above = os.path.commonpath([os.path.dirname(path) for path in known])  # noqa: PTH120
    return [
        Path(path[len(above) :].lstrip(os.sep)).as_posix() if path else f"row {number}"
        for number, path in enumerate(paths)
    ]


def held_out(names: Sequence[str], fraction: float, group_by: str | None) -> list[int]:
    """The numbers of the rows to evaluate on, rising.

    Args:
        names: of all rows.
        fraction: of them that are held out, above 0 and below 1; at least one, and not all.
        group_by: a regular expression; rows in whose names its first group (or, without one, the
            whole match) is the same stay together. None keeps folders whole (`folders_of`), and
            `SINGLE` keeps nothing together.

    Raises:
        ValueError: if a name does not match, or nothing would be left on one of the two sides.
    """
    groups: dict[str, list[int]] = defaultdict(list)
    if group_by == SINGLE:
        keys = names
    elif group_by is None:
        keys = folders_of(names) or names
    else:
        keys = [_group(name, group_by) for name in names]
    for number, key in enumerate(keys):
        groups[key].append(number)
    if len(groups) < 2:
        what = "images" if keys is names else f"groups by --group_by {group_by}"
        raise ValueError(
            f"Expected at least 2 {what} to hold some out of, got {len(groups)}. Name the split "
            "to evaluate on with --eval_split, or train without one: --eval_strategy no."
        )
    target = max(1, round(fraction * len(names)))
    chosen: list[int] = []
    ordered = sorted(groups, key=_draw)
    for name in ordered:
        if len(chosen) + len(groups[name]) <= min(target, len(names) - 1):
            chosen += groups[name]
    smallest = min(ordered, key=lambda name: len(groups[name]))
    return sorted(chosen or groups[smallest])


def folders_of(names: Sequence[str]) -> list[str] | None:
    """The folder of each image, where at least three hold several; None where they do not.

    Of folders in folders it is the first level on which there are three: that of patients, not of
    their series.
    """
    above = [name.split("/")[:-1] for name in names]
    for depth in range(1, min(map(len, above), default=0) + 1):
        folders = ["/".join(parts[:depth]) for parts in above]
        if (count := len({*folders})) >= _LEAST_FOLDERS:
            return folders if len(names) >= 2 * count else None
    return None


def _group(name: str, pattern: str) -> str:
    match = re.search(pattern, name)
    group = match and (match.group(1) if match.re.groups else match.group())
    if group is None:
        raise ValueError(
            f"Expected --group_by {pattern} to match the name of each image, got "
            f"{clipped(name)}, in which it finds nothing. Write a pattern for all of them."
        )
    return group


def _draw(name: str) -> bytes:
    return hashlib.blake2b(f"{HOLD_OUT_SEED} {name}".encode(errors="surrogateescape")).digest()


@dataclass(frozen=True)
class Division:
    """A data set in two.

    Attributes:
        rest: the rows to train on.
        chosen: those that are held out.
        names: of those that are held out.
        folders: those that are held out as a whole; empty where none are.
    """

    rest: datasets.Dataset
    chosen: datasets.Dataset
    names: tuple[str, ...]
    folders: tuple[str, ...] = ()


def divide(rows: Any, root: Path, fraction: float, group_by: str | None) -> Division:
    """Hold rows out of a data set.

    Args:
        rows: with the column `image`; not a stream, of which nothing is known before it is read.
        root: at which the names of the images begin.
        fraction: see `held_out`.
        group_by: likewise.

    Raises:
        ValueError: as `held_out`.
    """
    names = row_names(rows, root)
    chosen = held_out(names, fraction, group_by)
    rest = sorted({*range(len(rows))} - {*chosen})
    folders = folders_of(names) if group_by is None else None
    whole = () if folders is None else tuple(dict.fromkeys(folders[i] for i in chosen))
    return Division(rows.select(rest), rows.select(chosen), tuple(names[i] for i in chosen), whole)
