"""Checks of the masks alone: whether they mark anything, and whether they look inverted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kd_trainer.preflight.finding import Finding, fault, note, ok, several

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
