"""Checks of the teacher: what it gives, whether it is any good, and what it means by a class."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kd_trainer.doctor.finding import Finding, fault, note, ok, several
from kd_trainer.evaluation import figures_of
from kd_trainer.losses import TERMS
from kd_trainer.metrics import image_counts

_SUM_TOLERANCE = 1e-3  # probabilities of half precision add up to one only so nearly
_TWICE = 2.0
_NOTHING = 0.05  # of IoU: a class that a network does not find at all
_SURE = 0.2  # of IoU: by how much another class has to fit better before ids are called mixed up
_WORSE = 0.02  # of mIoU


@dataclass(frozen=True)
class OutputRange:
    """What the channels of a network's raw output hold, over some images.

    Attributes:
        low: smallest value.
        high: largest value.
        sums_to_one: whether several channels add up to 1 at every pixel.
        finite: whether nothing was NaN or infinite.
    """

    low: float = math.inf
    high: float = -math.inf
    sums_to_one: bool = True
    finite: bool = True

    def add(self, output: Tensor) -> OutputRange:
        """With another batch of raw output (B, K, H, W)."""
        values = output.detach().float()
        one = values.shape[1] > 1
        if one:
            one = bool(((values.sum(dim=1) - 1).abs() < _SUM_TOLERANCE).all())
        return OutputRange(
            min(self.low, float(values.min())),
            max(self.high, float(values.max())),
            self.sums_to_one and one,
            self.finite and bool(torch.isfinite(values).all()),
        )


def output_finding(found: OutputRange) -> Finding:
    """Whether the teacher gives logits.

    Logits are of both signs and unbounded. Values between 0 and 1 at every pixel of every image
    are the output of a sigmoid or a softmax, which the losses would apply once more.
    """
    check = "teacher output"
    shown = f"{found.low:.4g} to {found.high:.4g}"
    if not found.finite:
        return fault(
            check,
            "Expected finite logits from the teacher, got NaN or infinity",
            "Take another checkpoint of the teacher, or check what it is fed with.",
        )
    if found.low >= 0 and found.high <= 1 + _SUM_TOLERANCE:
        kind = "a softmax" if found.sums_to_one else "a sigmoid"
        return fault(
            check,
            f"Expected logits from the teacher, got values from {shown} only, as {kind} gives",
            "Save the teacher without its last activation (smp: activation=None).",
        )
    return ok(check, f"logits from {shown}")


def quality_finding(figure: float, constant: float, name: str, images: int) -> Finding:
    """Whether the teacher is better than the same class everywhere.

    Args:
        figure: the teacher's mIoU.
        constant: of the best constant prediction, on the same images.
        name: of the class that this is.
        images: how many there were.
    """
    check = "teacher quality"
    where = f"on {several(images, 'image')}"
    if not figure > constant:
        return fault(
            check,
            f"Expected a teacher better than {name} everywhere (mIoU {constant:.3f}), got mIoU "
            f"{figure:.3f} {where}",
            "Check that it is the right checkpoint, trained for these classes and masks, and that "
            "it is fed with its own normalisation.",
        )
    shown = f"mIoU {figure:.3f} {where} ({name} everywhere: {constant:.3f})"
    if not knows_something(figure, constant):
        return note(
            check,
            f"hardly better than one class everywhere: {shown}",
            "Look at some masks and at what the teacher finds. So little also keeps faults of "
            "masks and normalisation from being found here.",
        )
    return ok(check, shown)


def student_finding(teacher: float, student: float) -> Finding:
    """Whether a saved student is ahead of its teacher already (mIoU on the same images)."""
    if student > teacher + _WORSE:
        flags = " and ".join(f"--{term.flag}" for term in TERMS if term.needs_teacher)
        return note(
            "student",
            f"the student is at mIoU {student:.3f} before it starts, its teacher at {teacher:.3f}",
            f"Take a better teacher, or lower {flags}.",
        )
    return ok("student", f"starts at mIoU {student:.3f}, its teacher has {teacher:.3f}")


def classes_finding(
    rows: Rows, names: Mapping[int, str], *, constant: float, whose: str = "the teacher"
) -> Finding:
    """Whether a network and the masks mean the same by each class.

    Of a binary task this finds inverted masks, of several classes ids that are shifted by one, as
    where one side counts an unlabelled 0. Classes are called mixed up where each of at least
    two (of a binary task both) fits another one clearly better, no two the same.

    Args:
        rows: counts of the network against the masks.
        names: of the classes.
        constant: mIoU of a constant prediction: a network near it says nothing.
        whose: prediction it is.
    """
    check = "classes"
    table = confusion(rows, len(names)).astype(float)
    truth, guess = table.sum(axis=1, keepdims=True), table.sum(axis=0, keepdims=True)
    iou = table / np.maximum(truth + guess - table, 1)
    occurs = [c for c in names if truth[c] > 0]
    match = {c: int(iou[c].argmax()) for c in occurs}
    mixed = {c: m for c, m in match.items() if m != c and iou[c, m] >= iou[c, c] + _SURE}
    trusted = knows_something(float(np.mean([iou[c, match[c]] for c in occurs])), constant)
    permuted = len(mixed) >= 2 and len(set(match.values())) == len(match) and trusted
    shifted = 0 if permuted else _shift(table)
    if shifted:
        return fault(
            check,
            f"Expected the same class ids in {whose} and the masks, got ids shifted by one: mask "
            f"value i fits class i {'-' if shifted < 0 else '+'} 1 of {whose}",
            "Read the masks as it was trained: with --reduce_labels, value 0 counts nowhere and "
            "value i is class i - 1; or name the value of each class with --mask_values.",
        )
    if not trusted:
        return note(
            check,
            f"could not be compared: {whose} finds too little of what the masks mark",
            "Look at some masks and at what it finds; classes in another order would look so too.",
        )
    if not permuted:
        lost = {c: m for c, m in mixed.items() if m not in occurs and iou[c, c] < _NOTHING}
        return _not_permuted(names, occurs, lost, whose)
    if len(names) == 2:
        return fault(
            check,
            f"Expected masks that mark what {whose} finds, got inverted ones: the foreground of "
            f"{whose} fits the background of the masks with IoU {iou[0, 1]:.2f}",
            "Invert the masks with --mask_values (background first), or take a teacher of the "
            "same foreground.",
        )
    pairs = [f"{names[c]} → {names[m]}" for c, m in list(mixed.items())[:4]]
    more = ", ..." if len(mixed) > len(pairs) else ""
    return fault(
        check,
        f"Expected the same class ids in {whose} and the masks, got others (mask → {whose}): "
        f"{', '.join(pairs)}{more}",
        "Name the value of each class in the teacher's order with --mask_values, or its classes "
        "in the right order with --class_names.",
    )


def _not_permuted(
    names: Mapping[int, str], occurs: Sequence[int], lost: Mapping[int, int], whose: str
) -> Finding:
    """Of classes that are where they should be, but for those that no other takes the place of."""
    if lost:
        listed = ", ".join(f"{names[c]} → {names[m]}" for c, m in lost.items())
        return note(
            "classes",
            f"{whose} calls a class of the masks by another id, which no mask has (mask → "
            f"{whose}): {listed}",
            "If these mean the same, name the value of each class with --mask_values.",
        )
    of = f" of the {len(occurs)} of {len(names)} that occur" if len(occurs) < len(names) else ""
    return ok("classes", f"{whose} and the masks mean the same by each class{of}")


def _shift(table: np.ndarray) -> int:
    """By how much the network's ids are the masks' ids, shifted: -1, 1, or 0 if they are not.

    Args:
        table: pixels of each true class (row) that the network gives each class (column).
    """
    count = len(table)
    found = table / np.maximum(table.sum(axis=1, keepdims=True), 1)
    for step in (-1, 1):
        both = [c for c in range(count) if 0 <= c + step < count and table[c].any()]
        if len(both) < 2:
            continue
        moved = float(np.mean([found[c, c + step] for c in both]))
        # More than a network that gives one class everywhere, which fits one of the classes.
        if moved > max(0.5, float(np.mean([found[c, c] for c in both])) + _SURE):
            return step
    return 0


def input_size_finding(trained: int, given: int) -> Finding:
    """Whether the teacher sees pictures of about the size that it was trained with, in pixels."""
    check = "teacher size"
    if max(trained, given) > _TWICE * min(trained, given):
        return note(
            check,
            f"the teacher was made for {trained} px and gets {given} px",
            f"Try --teacher_image_size {trained}, or a larger --image_size."
            if trained > given
            else f"Try --teacher_image_size {trained}.",
        )
    return ok(check, f"made for {trained} px, gets {given} px")


Rows = npt.NDArray[np.int64]

MARGIN = 0.05  # of mIoU: what a wrong setting has to cost before it is called wrong
ENOUGH = 4  # images from which a fault may be concluded; from fewer it is a note
_SHARE = 0.75  # of the images that have to agree, so that one odd image decides nothing
_KNOWS = 0.10  # of mIoU above a constant: a network that knows less says nothing about masks


def rows_of(classes: Tensor, labels: Tensor, num_labels: int, ignore_index: int) -> Rows:
    """Counts of predicted classes against labels, both integer (N, H, W): int64 (N, C)."""
    rows = image_counts(classes, labels, num_labels, ignore_index=ignore_index, boundary=False)
    return rows.cpu().numpy()


def miou(rows: Rows, num_labels: int) -> float:
    """Mean IoU over the classes that occur, of all images together."""
    return figures_of(rows, {i: str(i) for i in range(num_labels)})["miou"]


def confusion(rows: Rows, num_labels: int) -> npt.NDArray[np.int64]:
    """Pixels of all images by [truth, prediction], (K, K)."""
    return rows[:, : num_labels**2].sum(axis=0).reshape(num_labels, num_labels)


def constant_miou(labels: Tensor, num_labels: int, ignore_index: int) -> tuple[float, int]:
    """The best mIoU that the same class everywhere has on labels (N, H, W), and that class."""
    figures = [
        miou(rows_of(torch.full_like(labels, c), labels, num_labels, ignore_index), num_labels)
        for c in range(num_labels)
    ]
    best = int(np.nanargmax(figures)) if not np.isnan(figures).all() else 0
    return figures[best], best


def clearly_better(other: Rows, now: Rows, num_labels: int) -> bool:
    """Whether `other` beats `now` on the same images, all together and most of them alone."""
    if miou(other, num_labels) < miou(now, num_labels) + MARGIN:
        return False
    pairs = zip(_each(other, num_labels), _each(now, num_labels), strict=True)
    better = [a > b for a, b in pairs]
    return float(np.mean(better)) >= _SHARE


def _each(rows: Rows, num_labels: int) -> Sequence[float]:
    return [miou(row[None], num_labels) for row in rows]


def knows_something(figure: float, constant: float) -> bool:
    """Whether a mIoU is high enough to trust the network more than the masks."""
    return figure >= constant + _KNOWS
