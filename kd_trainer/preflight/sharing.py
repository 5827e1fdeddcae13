"""Whether two splits share images: by size first, and by hash where sizes are equal."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kd_trainer.preflight.finding import Finding, fault, note, ok, several

Cell = Mapping[str, Any]

_SHOWN = 3
_MOST = 0.5  # of a split: from here the figures of an evaluation say nothing


@dataclass
class Shared:
    """What two splits have in common.

    Attributes:
        pairs: names of (evaluation image, training image) of equal bytes.
        evaluation: evaluation images that were looked at.
        training: training images that were looked at.
        complete: whether that was all of both.
    """

    pairs: dict[str, str] = field(default_factory=dict)
    evaluation: int = 0
    training: int = 0
    complete: bool = True


def find_shared(
    training: Iterable[Cell],
    evaluation: Iterable[Cell],
    evaluation_cell: Callable[[int], Cell],
    going: Callable[[], bool],
) -> Shared:
    """Look for evaluation images whose encoded bytes are those of a training image.

    A picture that was saved anew is not found: that would mean to decode them all.

    Args:
        training: cells `{bytes, path}`, in order.
        evaluation: likewise.
        evaluation_cell: gives one of the latter again, by its number.
        going: False once time is up; then what was found so far is returned.
    """
    found = Shared()
    by_size: dict[int, list[int]] = defaultdict(list)
    for number, cell in enumerate(evaluation):
        by_size[_size(cell)].append(number)
        found.evaluation += 1
        if not going():
            found.complete = False
            break
    known: dict[int, dict[bytes, int]] = {}
    for number, cell in enumerate(training):
        size = _size(cell)
        found.training += 1
        if size in by_size:
            if size not in known:
                known[size] = {_digest(evaluation_cell(n)): n for n in by_size[size]}
            match = known[size].get(_digest(cell))
            if match is not None:
                found.pairs[_name(evaluation_cell(match), match)] = _name(cell, number)
        if not going():
            found.complete = False
            break
    return found


def _size(cell: Cell) -> int:
    return len(cell["bytes"]) if cell.get("bytes") else Path(cell["path"]).stat().st_size


def _digest(cell: Cell) -> bytes:
    data = cell["bytes"] if cell.get("bytes") else Path(cell["path"]).read_bytes()
    return hashlib.blake2b(data, digest_size=16).digest()


def _name(cell: Cell, number: int) -> str:
    path = cell.get("path")
    return Path(path).name if path else f"row {number}"


def sharing_finding(shared: Shared) -> Finding:
    """Whether what is measured was trained on."""
    check = "shared images"
    looked = (
        f"{several(shared.evaluation, 'evaluation image')} and "
        f"{several(shared.training, 'training image')}"
    )
    looked += "" if shared.complete else " that were looked at"
    if not shared.pairs:
        return ok(check, f"none among {looked}")
    names = [a if a == b else f"{a} = {b}" for a, b in shared.pairs.items()]
    shown = ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
    # Where time was too short for all training images, most of those looked at are as telling.
    fewest = min(shared.evaluation, shared.training)
    grade = fault if len(names) > _MOST * fewest else note
    return grade(
        check,
        f"Expected evaluation images that are not trained on, got {several(len(names), 'image')} "
        f"in both splits ({shown}) among {looked}",
        "Remove them from one split: figures of images that were trained on are too good.",
    )
