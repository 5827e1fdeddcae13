"""Findings on the data: which masks mark something, which images are in both splits."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kd_trainer.doctor.finding import Finding, fault, note, ok, several

Array = npt.NDArray[np.integer]

MANY = 100  # masks without foreground from which chance is ruled out for all but the rarest objects
_MOSTLY = 0.5
_LOST = 0.1  # of the masks: small things are smaller still at the size of the training
_BORDER = 0.8


@dataclass(frozen=True)
class MaskFacts:
    """What one mask holds, as shares of its valid pixels.

    Attributes:
        valid: share of all pixels that count.
        foreground: share of classes above 0.
        border: share of foreground on the outermost pixels.
        classes: ids that occur.
    """

    valid: float
    foreground: float
    border: float
    classes: frozenset[int]


def mask_facts(labels: Array, ignore_index: int) -> MaskFacts:
    """Facts of one mask (H, W) of class ids and `ignore_index`."""
    counts = labels != ignore_index
    edge = np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]])
    present = {int(c) for c in np.flatnonzero(np.bincount(labels.ravel()))} - {ignore_index}
    return MaskFacts(
        float(counts.mean()),
        _foreground(labels, ignore_index),
        _foreground(edge, ignore_index),
        frozenset(present),
    )


def marks(labels: Array, ignore_index: int) -> bool:
    """Whether a mask (H, W) holds any class above 0."""
    return bool(((labels > 0) & (labels != ignore_index)).any())


def _foreground(labels: Array, ignore_index: int) -> float:
    valid = labels[labels != ignore_index]
    return float((valid > 0).mean()) if valid.size else 0.0


def mask_finding(
    split: str, facts: Sequence[MaskFacts], *, complete: bool, lost: int = 0
) -> Finding:
    """Whether the masks of a split mark anything at the size of the training.

    Args:
        split: its name.
        facts: of the masks that were looked at, at that size.
        complete: whether these are all of the split.
        lost: how many of them mark something in their own size only.
    """
    check, looked = f"masks, {split}", several(len(facts), "mask")
    grade = fault if complete or len(facts) >= MANY else note
    if not any(f.valid for f in facts):
        return grade(
            check,
            f"Expected pixels that count, got only ignored ones in all of {looked}",
            "Say how the masks are read: --mask_values and --ignore_index.",
        )
    marked = [f for f in facts if f.classes - {0}]
    own = f"; {lost} more only before they are resized to --image_size" if lost else ""
    larger = "Raise --image_size: what is thinner than a pixel there is lost."
    if not marked and lost:
        return grade(
            check,
            f"Expected foreground in the masks at the size of the training, got none in any of "
            f"{looked}{own.replace(' more', '')}",
            larger,
        )
    if not marked:
        return grade(
            check,
            f"Expected foreground in the masks, got none in any of {looked}",
            "Check the masks, or name the values of background and foreground with --mask_values.",
        )
    share = float(np.mean([f.foreground for f in facts]))
    found = f"{len(marked)} of {looked} mark something, {share:.0%} of the pixels{own}"
    if lost > _LOST * len(facts):
        return note(check, found, larger)
    if len(marked) < _MOSTLY * len(facts):
        return note(check, found, "Check that this is how the data is meant to be.")
    return ok(check, found)


def inverted_finding(facts: Sequence[MaskFacts]) -> Finding:
    """Whether binary masks look inverted, judged by themselves: most of the border is foreground.

    Objects fill the inside of pictures more than their border. That is a habit of photographers
    and no law, so this is never a fault; against a teacher `classes_finding` knows better.
    """
    check = "foreground"
    share = float(np.mean([f.foreground for f in facts]))
    border = float(np.mean([f.border for f in facts]))
    shown = f"{share:.0%} of the pixels and {border:.0%} of the border are foreground"
    if share > _MOSTLY and border > max(_BORDER, share):
        return note(
            check,
            f"the masks may be inverted: {shown}",
            "Look at some. --mask_values (background first) turns them round.",
        )
    return ok(check, shown)


def occurrence_finding(facts: Sequence[MaskFacts], names: Mapping[int, str]) -> Finding:
    """Whether every class occurs in the masks that were looked at."""
    seen = frozenset[int]().union(*(f.classes for f in facts))
    missing = [name for label, name in names.items() if label not in seen]
    looked = several(len(facts), "mask")
    if missing:
        return note(
            "class ids",
            f"{', '.join(missing)} in none of {looked}",
            "Check --num_labels, --class_names and --mask_values; a class without pixels is "
            "neither learned nor measured.",
        )
    return ok("class ids", f"each of {len(names)} classes occurs in {looked}")


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
