"""The teacher: what it gives, whether it is any good, and whether the masks agree with it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kd_trainer.doctor.finding import Finding, fault, note, ok, several
from kd_trainer.losses import TERMS
from kd_trainer.metrics import image_counts, miou, plane_counts, planes_miou
from kd_trainer.models.image_sizes import AnySize, as_size, size_text

Counts = npt.NDArray[np.int64]

MARGIN = 0.05  # of mIoU: what a wrong setting has to cost before it is called wrong
ENOUGH = 4  # images from which a fault may be concluded; from fewer it is a note
_SHARE = 0.75  # of the images that have to agree, so that one odd image decides nothing
_INFORMATIVE = 0.10  # of mIoU above a constant: a network with less says nothing about masks


@dataclass(frozen=True, eq=False)
class Overlaps:
    """Which class of the masks lies where which class was found, in pixels.

    Attributes:
        both: (K, K) by [truth, prediction].
        truth: (K,) of each class in the masks.
        found: (K,) of each class that was found.
    """

    both: npt.NDArray[np.float64]
    truth: npt.NDArray[np.float64]
    found: npt.NDArray[np.float64]

    @property
    def iou(self) -> npt.NDArray[np.float64]:
        """(K, K), 0 where neither occurs."""
        union = self.truth[:, None] + self.found[None] - self.both
        return np.asarray(self.both / np.maximum(union, 1))


@dataclass(frozen=True, eq=False)
class Predictions:
    """Classes that a network gives to some images, beside their labels; counted once.

    Attributes:
        classes: integer (N, S, S), or of several labels a pixel planes (N, K, S, S) of 0 and 1.
        labels: of the masks, likewise.
        names: of the classes, background first where there is one.
        ignore_index: label that counts nowhere.
        whose: predictions they are, as a finding says it.
    """

    classes: Tensor
    labels: Tensor
    names: Mapping[int, str]
    ignore_index: int = 255
    whose: str = "the teacher"

    def __len__(self) -> int:
        return len(self.labels)

    def of(self, images: Sequence[int] | slice) -> Predictions:
        """Those of some of the images."""
        return replace(self, classes=self.classes[images], labels=self.labels[images])

    @property
    def several(self) -> bool:
        """Whether a pixel may have several labels."""
        return self.labels.ndim == 4

    @cached_property
    def confusions(self) -> Counts:
        """Pixels of each image by [truth, prediction], (N, K, K), or (N, K, 2, 2)."""
        count, maps, ignored = len(self.names), (self.classes, self.labels), self.ignore_index
        if self.several:
            rows = plane_counts(*maps, ignore_index=ignored, boundary=False).view(-1, count, 8)
            return rows[..., :4].reshape(-1, count, 2, 2).cpu().numpy()
        rows = image_counts(*maps, count, ignore_index=ignored, boundary=False)
        return rows[:, : count**2].reshape(-1, count, count).cpu().numpy()

    @cached_property
    def overlaps(self) -> Overlaps:
        """Pixels of all images that have one class in the masks and another one here."""
        if not self.several:
            table = self.confusions.sum(axis=0).astype(float)
            return Overlaps(table, table.sum(axis=1), table.sum(axis=0))
        valid = (self.labels != self.ignore_index).all(dim=1, keepdim=True)
        truth, found = ((maps == 1) & valid for maps in (self.labels, self.classes))
        flat = [maps.transpose(0, 1).flatten(1).double() for maps in (truth, found)]
        return Overlaps((flat[0] @ flat[1].T).numpy(), *(maps.sum(dim=1).numpy() for maps in flat))

    def miou_of(self, tables: Counts) -> npt.NDArray[np.float64]:
        """Mean IoU over the classes that occur, of tables like the `confusions`."""
        return planes_miou(tables) if self.several else miou(tables)

    @cached_property
    def miou(self) -> float:
        """That of all images together."""
        return float(self.miou_of(self.confusions.sum(axis=0)))

    @property
    def commonest(self) -> int:
        """The class that most pixels have, where each has one."""
        return int(self.confusions.sum(axis=(0, 2)).argmax())

    @property
    def constant(self) -> str:
        """What the best constant finds, in words."""
        if self.several:
            return "every label"
        return self.names[self.commonest]

    @property
    def constant_miou(self) -> float:
        """The mIoU of the best constant; NaN of no pixels.

        That is the commonest class everywhere, or of several labels a pixel all that occur.
        """
        if self.several:
            tables = self.confusions.sum(axis=0)
            whole = np.zeros_like(tables)
            whole[..., 1] = tables.sum(axis=-1)
            return float(planes_miou(whole[tables[:, 1].any(axis=-1)]))
        pixels = self.confusions.sum(axis=(0, 2))
        occurring = int((pixels > 0).sum())
        return float(pixels.max() / pixels.sum()) / occurring if occurring else math.nan

    def is_informative(self, figure: float) -> bool:
        """Whether a mIoU is high enough to trust a network more than the masks."""
        return figure >= self.constant_miou + _INFORMATIVE

    def clearly_better_than(self, other: Predictions) -> bool:
        """Whether this mIoU is trusted, and higher on all images together and on most alone."""
        if not self.is_informative(self.miou) or self.miou < other.miou + MARGIN:
            return False
        better = self.miou_of(self.confusions) > other.miou_of(other.confusions)
        return float(np.mean(better)) >= _SHARE


def best_of(others: Mapping[str, Predictions]) -> str:
    """The one with the highest mIoU; nothing where there is none."""
    return max(others, key=lambda name: others[name].miou, default="")


_SUM_TOLERANCE = 1e-3  # probabilities of half precision add up to one only so nearly


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


def output_finding(output: OutputRange) -> Finding:
    """Whether the teacher gives logits.

    Logits are of both signs and unbounded. Values between 0 and 1 at every pixel of every image
    are the output of a sigmoid or a softmax, which the losses would apply once more.
    """
    check = "teacher output"
    bounds = f"{output.low:.4g} to {output.high:.4g}"
    if not output.finite:
        return fault(
            check,
            "Expected finite logits from the teacher, got NaN or infinity",
            "Take another checkpoint of the teacher, or check what it is fed with.",
        )
    if output.low >= 0 and output.high <= 1 + _SUM_TOLERANCE:
        kind = "a softmax" if output.sums_to_one else "a sigmoid"
        return fault(
            check,
            f"Expected logits from the teacher, got values from {bounds} only, as {kind} gives",
            "Save the teacher without its last activation (smp: activation=None).",
        )
    return ok(check, f"logits from {bounds}")


def quality_finding(teacher: Predictions) -> Finding:
    """Whether the teacher is better than the same class everywhere."""
    check, where = "teacher quality", f"on {several(len(teacher), 'image')}"
    name, constant = teacher.constant, teacher.constant_miou
    if not teacher.miou > constant:
        return fault(
            check,
            f"Expected a teacher better than {name} everywhere (mIoU {constant:.3f}), got mIoU "
            f"{teacher.miou:.3f} {where}",
            "Check that it is the right checkpoint, trained for these classes and masks, and that "
            "it is fed with its own normalisation.",
        )
    text = f"mIoU {teacher.miou:.3f} {where} ({name} everywhere: {constant:.3f})"
    if not teacher.is_informative(teacher.miou):
        return note(
            check,
            f"hardly better than one class everywhere: {text}",
            "Look at some masks and at what the teacher finds. So little also keeps faults of "
            "masks and normalisation from being found here.",
        )
    return ok(check, text)


_WORSE = 0.02  # of mIoU


def student_finding(teacher: float, student: float) -> Finding:
    """Whether a saved student is ahead of its teacher already (mIoU on the same images)."""
    if student > teacher + _WORSE:
        own = [term for term in TERMS if term.needs_teacher and not term.pseudo_of]
        flags = " and ".join(f"--{term.flag}" for term in own)
        return note(
            "student",
            f"the student is at mIoU {student:.3f} before it starts, its teacher at {teacher:.3f}",
            f"Take a better teacher, or lower {flags}.",
        )
    return ok("student", f"starts at mIoU {student:.3f}, its teacher has {teacher:.3f}")


_FAR = 2.0  # times the size


def input_size_finding(trained: AnySize, used: AnySize) -> Finding:
    """Whether the teacher sees images of about the size that it was trained with, in pixels."""
    check, made_for, gets = "teacher size", size_text(trained), size_text(used)
    sides = list(zip(as_size(trained), as_size(used), strict=True))
    if any(max(pair) > _FAR * min(pair) for pair in sides):
        larger = ", or a larger --image_size" if any(one > two for one, two in sides) else ""
        return note(
            check,
            f"the teacher was made for {made_for} px and gets {gets} px",
            f"Try --teacher_image_size {made_for}{larger}.",
        )
    return ok(check, f"made for {made_for} px, gets {gets} px")


_NOT_FOUND = 0.05  # of IoU: a class that a network does not find at all
_SURE = 0.2  # of IoU: by how much another class has to fit better before ids are called mixed up


def classes_finding(predictions: Predictions) -> Finding:
    """Whether a network and the masks mean the same by each class.

    Of a binary task this finds inverted masks, of several classes ids that are shifted by one, as
    where one side counts an unlabelled 0. Classes are called mixed up where each of at least
    two (of a binary task both) fits another one clearly better, no two the same.
    """
    check, names, whose = "classes", predictions.names, predictions.whose
    overlaps = predictions.overlaps
    iou = overlaps.iou
    occurring = [c for c in names if overlaps.truth[c] > 0]
    match = {c: int(iou[c].argmax()) for c in occurring}
    mixed = {c: m for c, m in match.items() if m != c and iou[c, m] >= iou[c, c] + _SURE}
    trusted = predictions.is_informative(float(np.mean([iou[c, match[c]] for c in occurring])))
    permuted = len(mixed) >= 2 and len(set(match.values())) == len(match) and trusted
    shift = 0 if permuted or predictions.several else _shift(overlaps.both)
    if shift:
        return fault(
            check,
            f"Expected the same class ids in {whose} and the masks, got ids shifted by one: mask "
            f"value i fits class i {'-' if shift < 0 else '+'} 1 of {whose}",
            "Read the masks as it was trained: with --reduce_labels, value 0 counts nowhere and "
            "value i is class i - 1; or name the value of each class with --mask_values.",
        )
    if not trusted:
        return note(
            check,
            f"could not be compared: {whose} finds too little of what the masks mark",
            "Look at some masks and at what it finds; classes in another order would look so too.",
        )
    if permuted:
        return _permuted_finding(predictions, mixed, float(iou[0, 1]))
    renamed = [
        f"{names[c]} → {names[m]}"
        for c, m in mixed.items()
        if m not in occurring and iou[c, c] < _NOT_FOUND
    ]
    if renamed:
        return note(
            check,
            f"{whose} calls a class of the masks by another id, which no mask has (mask → "
            f"{whose}): {', '.join(renamed)}",
            f"If these mean the same, {_reordered(predictions)}.",
        )
    some = len(occurring) < len(names)
    of = f" of the {len(occurring)} of {len(names)} that occur" if some else ""
    return ok(check, f"{whose} and the masks mean the same by each class{of}")


def _permuted_finding(
    predictions: Predictions, mixed: Mapping[int, int], swapped_iou: float
) -> Finding:
    """Of classes that stand for one another, true to predicted: inverted masks or mixed up ids."""
    check, names, whose = "classes", predictions.names, predictions.whose
    if len(names) == 2 and not predictions.several:
        return fault(
            check,
            f"Expected masks that mark what {whose} finds, got inverted ones: the foreground of "
            f"{whose} fits the background of the masks with IoU {swapped_iou:.2f}",
            "Invert the masks with --mask_values (background first), or take a teacher of the "
            "same foreground.",
        )
    pairs = [f"{names[c]} → {names[m]}" for c, m in list(mixed.items())[:4]]
    return fault(
        check,
        f"Expected the same class ids in {whose} and the masks, got others (mask → {whose}): "
        f"{', '.join(pairs)}{', ...' if len(mixed) > len(pairs) else ''}",
        f"{_reordered(predictions).capitalize()}, or name its classes in the right order with "
        "--class_names.",
    )


def _reordered(predictions: Predictions) -> str:
    """How masks get the order of the classes of a network."""
    if predictions.several:
        return "put the planes into the order of its classes"
    return "name the value of each class, in the order of its own, with --mask_values"


def _shift(table: npt.NDArray[np.float64]) -> int:
    """By how much the network's ids are the masks' ids, shifted: -1, 1, or 0 if they are not.

    Args:
        table: pixels of each true class (row) that the network gives each class (column).
    """
    count = len(table)
    shares = table / np.maximum(table.sum(axis=1, keepdims=True), 1)
    for step in (-1, 1):
        both = [c for c in range(count) if 0 <= c + step < count and table[c].any()]
        if len(both) < 2:
            continue
        moved = float(np.mean([shares[c, c + step] for c in both]))
        # More than a network that gives one class everywhere, which fits one of the classes.
        if moved > max(0.5, float(np.mean([shares[c, c] for c in both])) + _SURE):
            return step
    return 0


_SIDE = 96  # pixels that are enough to see a shift of a thirty-second of an image
_STEPS = 4  # each way, of a thirty-second
_PARTS = 32
_TURNED: Mapping[str, Callable[[Tensor], Tensor]] = {
    "mirrored left to right": lambda maps: maps.flip(-1),
    "mirrored top to bottom": lambda maps: maps.flip(-2),
    "turned by half": lambda maps: maps.flip((-2, -1)),
    "with rows and columns exchanged": lambda maps: maps.transpose(-2, -1),
}


def position_finding(predictions: Predictions) -> Finding:
    """Compare predicted classes with the masks as they are, turned, and moved."""
    check, whose = "mask position", predictions.whose
    for now, others in _elsewhere(predictions):
        how = best_of(others)
        if others[how].clearly_better_than(now):
            return (fault if len(now) >= ENOUGH else note)(
                check,
                f"Expected masks that lie on the objects {whose} finds (mIoU {now.miou:.3f}), got "
                f"masks that lie {how} (mIoU {others[how].miou:.3f}, {several(len(now), 'image')})",
                "Compare some masks with their images: padding, crops, EXIF orientation, the "
                "order of rows and columns.",
            )
    return ok(check, f"neither turned nor moved masks fit {whose} clearly better")


def _elsewhere(predictions: Predictions) -> Iterator[tuple[Predictions, dict[str, Predictions]]]:
    """Predictions in place, and by name as if the masks were turned; then likewise moved.

    Moved ones are compared on the same inner pixels of truth, so that none has an easier border.
    """
    thin = max(1, max(predictions.labels.shape[-2:]) // _SIDE)
    classes, labels = (
        maps[..., ::thin, ::thin] for maps in (predictions.classes, predictions.labels)
    )
    now = replace(predictions, classes=classes, labels=labels)
    turned = {name: turn(classes) for name, turn in _TURNED.items()}
    fitting = {name: maps for name, maps in turned.items() if maps.shape == labels.shape}
    yield now, {name: replace(now, classes=maps) for name, maps in fitting.items()}
    vertical, horizontal = (_shifted(side) for side in labels.shape[-2:])
    inner = labels[..., vertical[0.0], horizontal[0.0]]
    moved = {
        _direction(down, right): replace(now, classes=classes[..., rows, columns], labels=inner)
        for down, rows in vertical.items()
        for right, columns in horizontal.items()
    }
    yield moved.pop(""), moved


def _shifted(side: int) -> dict[float, slice]:
    """The inner pixels of a side, by the share of it that they are moved by."""
    step = max(1, round(side / _PARTS))
    rim = min(_STEPS * step, (side - 1) // 4 // step * step)
    return {by / side: slice(rim - by, side - rim - by) for by in range(-rim, rim + 1, step)}


def _direction(down: float, right: float) -> str:
    """`too far right by 6 % of the width`; nothing for no shift."""
    ways = (("down", "up", down, "height"), ("right", "left", right, "width"))
    words = [
        f"too far {plus if share > 0 else minus} by {abs(share):.1%} of the {side}"
        for plus, minus, share, side in ways
        if share
    ]
    return " and ".join(words)
