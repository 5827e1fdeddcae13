"""Images held out of a split that is trained on, where a data set has none to evaluate on.

Which ones depends on their names alone: runs of other seeds, and of other machines, compare on the
same images, and an image that is added later moves few others.
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
            whole match) is the same stay together.

    Raises:
        ValueError: if a name does not match, or nothing would be left on one of the two sides.
    """
    groups: dict[str, list[int]] = defaultdict(list)
    for number, name in enumerate(names):
        groups[name if group_by is None else _group(name, group_by)].append(number)
    if len(groups) < 2:
        what = "images" if group_by is None else f"groups by --group_by {group_by}"
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
    """

    rest: datasets.Dataset
    chosen: datasets.Dataset
    names: tuple[str, ...]


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
    return Division(rows.select(rest), rows.select(chosen), tuple(names[i] for i in chosen))
