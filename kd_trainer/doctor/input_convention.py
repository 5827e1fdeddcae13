"""Whether the teacher gets its pictures normalised as in its training.

Two witnesses. The running statistics of its first BatchNorm say what it was trained on: measured on
networks trained with ImageNet's, the input fits them ten times better with ImageNet's than with a
mean and std of 0.5, though the mIoU may differ by no more than 0.01. The mIoU says what it costs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from kd_trainer.doctor.finding import Finding, fault, note, ok, several
from kd_trainer.doctor.images import Seen, within
from kd_trainer.doctor.teacher import (
    ENOUGH,
    MARGIN,
    Rows,
    clearly_better,
    knows_something,
    miou,
    rows_of,
)
from kd_trainer.evaluation import classes_of
from kd_trainer.teacher import Teacher

PRESENT = "the present one"
_STRANGE = 0.25  # nats: another kind of picture alone rarely moves the statistics so far
_TIMES = 4.0  # that another normalisation has to fit better


@dataclass(frozen=True)
class Feeding:
    """A way to normalise pictures for a network.

    Attributes:
        mean: per channel, of values in 0..1.
        std: likewise.
        bgr: whether the channels come in the order blue, green, red.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    bgr: bool = False

    def inputs(self, values: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) of values in 0..1 as the network gets them."""
        mean, std = (values.new_tensor(v).view(1, 3, 1, 1) for v in (self.mean, self.std))
        return ((values.flip(1) if self.bgr else values) - mean) / std

    def cure(self) -> str:
        """What to do if this is the right one."""
        if self.bgr:
            return "Swap the input channels of the teacher's first convolution and save it."
        mean, std = (" ".join(f"{v:.6g}" for v in values) for values in (self.mean, self.std))
        return f"Give --teacher_mean {mean} --teacher_std {std}."


USUAL = {
    "ImageNet's": Feeding((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "mean and std 0.5": Feeding((0.5,) * 3, (0.5,) * 3),
    "values 0..1": Feeding((0.0,) * 3, (1.0,) * 3),
    "values 0..255": Feeding((0.0,) * 3, (1 / 255,) * 3),
}
"""Normalisations that networks are commonly trained with."""


def alternatives(present: Feeding) -> dict[str, Feeding]:
    """The usual ways that differ from the present one, and the present one with swapped colours."""
    others = {
        name: way
        for name, way in USUAL.items()
        if not np.allclose([way.mean, way.std], [present.mean, present.std], atol=1e-4)
    }
    return others | {"the order BGR": Feeding(present.mean, present.std, bgr=True)}


def first_batchnorm(network: nn.Module) -> nn.BatchNorm2d | None:
    """The first BatchNorm of a network that knows what it was trained on, if there is one."""
    norms = (m for m in network.modules() if isinstance(m, nn.BatchNorm2d))
    return next((m for m in norms if m.running_mean is not None), None)


def misfit(features: Tensor, norm: nn.BatchNorm2d) -> float:
    """How far features (B, C, H, W) are from what a BatchNorm was trained on.

    The KL divergence of two normal distributions with the mean and variance of each, in nats,
    mean over the channels: 0 where they agree.
    """
    assert norm.running_mean is not None
    assert norm.running_var is not None
    features = features.detach().float()
    mean, variance = features.mean(dim=(0, 2, 3)), features.var(dim=(0, 2, 3)) + norm.eps
    own = norm.running_var.float() + norm.eps
    difference = mean - norm.running_mean.float()
    divergence = (own / variance).log() + (variance + difference**2) / own - 1
    return float(divergence.mean()) / 2


@dataclass(frozen=True)
class Trials:
    """What happened when the teacher was fed in other ways.

    Attributes:
        ways: that were tried, by name.
        now: counts as it is fed, on the images of `others`.
        others: counts of each way; empty where no way could be clearly better.
        misfits: of each way and of the `PRESENT` one; empty without a BatchNorm.
    """

    ways: Mapping[str, Feeding]
    now: Rows
    others: Mapping[str, Rows] = field(default_factory=dict)
    misfits: Mapping[str, float] = field(default_factory=dict)


def normalisation_finding(trials: Trials, num_labels: int, *, constant: float) -> Finding:
    """Whether the teacher does clearly better, or was trained, with another usual normalisation.

    Args:
        trials: what was tried.
        num_labels: classes.
        constant: mIoU of a constant prediction: what comes near it proves nothing.
    """
    check, here = "normalisation", miou(trials.now, num_labels)
    figures = {name: miou(rows, num_labels) for name, rows in trials.others.items()}
    best = max(figures, key=lambda name: figures[name], default="")
    if (
        best
        and knows_something(figures[best], constant)
        and clearly_better(trials.others[best], trials.now, num_labels)
    ):
        images = len(trials.now)
        return (fault if images >= ENOUGH else note)(
            check,
            f"Expected the teacher's own normalisation, got one with mIoU {here:.3f} where {best} "
            f"gives {figures[best]:.3f} ({several(images, 'image')})",
            trials.ways[best].cure(),
        )
    fits = {name: value for name, value in trials.misfits.items() if name != PRESENT}
    near = min(fits, key=lambda name: fits[name], default="")
    present = trials.misfits.get(PRESENT, 0.0)
    if near and present > _STRANGE and fits[near] * _TIMES < present:
        return note(
            check,
            f"the teacher's first BatchNorm was trained on other input: {near} fits it with "
            f"{fits[near]:.2f} nats, the present one with {present:.2f}",
            trials.ways[near].cure(),
        )
    return ok(check, _fine(here, figures, best, trials.misfits))


def _fine(
    here: float, figures: Mapping[str, float], best: str, misfits: Mapping[str, float]
) -> str:
    fits = f"; its first BatchNorm fits with {misfits[PRESENT]:.2f} nats" if misfits else ""
    if best:
        return f"mIoU {here:.3f}, {best} gives {figures[best]:.3f}{fits}"
    return f"mIoU {here:.3f} leaves none {MARGIN} better{fits}"


_FITTED = 8  # images whose first features are kept: 100 MB each way at 640 px


def present_feeding(teacher: Teacher) -> Feeding:
    """Mean and std with which the teacher's pictures are normalised now."""
    std = [i / float(s) for i, s in zip(teacher.input_std, teacher.scale.flatten(), strict=True)]
    shift = teacher.shift.flatten()
    mean = [m - float(b) * s for m, b, s in zip(teacher.input_mean, shift, std, strict=True)]
    return Feeding(tuple(mean), tuple(std))


def _fed(teacher: Teacher, sample: Mapping[str, Tensor], way: Feeding) -> Tensor:
    """Pictures in the student's normalisation that the teacher turns into those of `way`."""
    values = sample["pixel_values"][None].to(teacher.scale.device).float() / 255
    pixels = (way.inputs(values) - teacher.shift) / teacher.scale
    return pixels.contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def fed_otherwise(
    seen: Seen, teacher: Teacher, ways: Mapping[str, Feeding], seconds: float
) -> dict[str, Rows]:
    """Counts of the teacher when its pictures are normalised in other ways.

    Args:
        seen: the images; all ways are tried on the first ones, until time is up.
        teacher: on its device.
        ways: to try.
        seconds: that this may take; two images are looked at in any case.
    """
    found: dict[str, list[Tensor]] = {name: [] for name in ways}
    for sample in within(seconds, seen.samples, least=2):
        for name, way in ways.items():
            found[name].append(classes_of(teacher(_fed(teacher, sample, way)))[0].cpu())
    return {name: seen.rows(maps) for name, maps in found.items()}


class _ReachedError(Exception):
    """Ends a forward pass where all that is wanted is known."""


@torch.no_grad()
def misfits(
    seen: Seen, teacher: Teacher, ways: Mapping[str, Feeding], seconds: float
) -> dict[str, float]:
    """How badly the input of each way fits the teacher's first BatchNorm; empty without one.

    Nothing behind that layer is computed. Arguments as for `fed_otherwise`.
    """
    norm = first_batchnorm(teacher.network)
    if norm is None:
        return {}
    features: dict[str, list[Tensor]] = {name: [] for name in ways}
    kept: list[Tensor] = []

    def keep(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        kept.append(inputs[0])
        raise _ReachedError

    handle = norm.register_forward_pre_hook(keep)
    try:
        for sample in within(seconds, seen.samples[:_FITTED], least=2):
            for name, way in ways.items():
                with suppress(_ReachedError):
                    teacher(_fed(teacher, sample, way))
                features[name].append(kept.pop())
    finally:
        handle.remove()
    return {name: misfit(torch.cat(maps), norm) for name, maps in features.items()}


SIDE = 96  # pixels that are enough to see a shift of a thirty-second of a picture
STEPS = 4  # each way, of a thirty-second
_PARTS = 32

TURNED: Mapping[str, Callable[[Tensor], Tensor]] = {
    "mirrored left to right": lambda maps: maps.flip(-1),
    "mirrored top to bottom": lambda maps: maps.flip(-2),
    "turned by half": lambda maps: maps.flip((-2, -1)),
    "with rows and columns exchanged": lambda maps: maps.transpose(-2, -1),
}


def thinned(maps: Tensor) -> Tensor:
    """Integer maps (N, S, S) at every so many pixels, at most twice `SIDE` wide."""
    step = max(1, maps.shape[-1] // SIDE)
    return maps[:, ::step, ::step]


def position_finding(
    classes: Tensor,
    labels: Tensor,
    num_labels: int,
    *,
    ignore_index: int,
    constant: float,
    whose: str = "the teacher",
) -> Finding:
    """Compare predicted classes with the masks as they are, turned, and moved.

    Args:
        classes: that a network finds, integer (N, S, S).
        labels: of the masks, likewise.
        num_labels: classes.
        ignore_index: label that counts nowhere.
        constant: mIoU of a constant prediction: a network near it says nothing.
        whose: prediction it is.
    """
    check = "mask position"
    classes, labels = thinned(classes), thinned(labels)

    def count(maps: Tensor, truth: Tensor) -> Rows:
        return rows_of(maps, truth, num_labels, ignore_index)

    now = count(classes, labels)
    turned = {name: count(turn(classes), labels) for name, turn in TURNED.items()}
    found = _best(turned, now, num_labels, constant)
    if found is not None:
        return _wrong(found, turned[found], now, num_labels, whose)
    inner, windows = _windows(classes, labels)
    moved = {name: count(window, inner) for name, window in windows.items()}
    still = moved.pop("")
    found = _best(moved, still, num_labels, constant)
    if found is not None:
        return _wrong(found, moved[found], still, num_labels, whose)
    return ok(check, f"neither turned nor moved masks fit {whose} clearly better")


def _best(others: Mapping[str, Rows], now: Rows, num_labels: int, constant: float) -> str | None:
    figures = {name: miou(rows, num_labels) for name, rows in others.items()}
    best = max(figures, key=lambda name: figures[name])
    trusted = knows_something(figures[best], constant)
    return best if trusted and clearly_better(others[best], now, num_labels) else None


def _wrong(how: str, best: Rows, now: Rows, num_labels: int, whose: str) -> Finding:
    grade = fault if len(now) >= ENOUGH else note
    return grade(
        "mask position",
        f"Expected masks that lie on the objects {whose} finds (mIoU {miou(now, num_labels):.3f}), "
        f"got masks that lie {how} (mIoU {miou(best, num_labels):.3f}, "
        f"{several(len(now), 'image')})",
        "Compare some masks with their pictures: padding, crops, EXIF orientation, the order of "
        "rows and columns.",
    )


def _windows(classes: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The inner part of the labels, and predictions as if the masks lay elsewhere by a few steps.

    All are compared on the same pixels of truth, so that none has an easier border.
    """
    side = labels.shape[-1]
    step = max(1, round(side / _PARTS))
    rim = min(STEPS * step, (side - 1) // 4 // step * step)
    inside = slice(rim, side - rim)
    windows = {}
    for down in range(-rim, rim + 1, step):
        for right in range(-rim, rim + 1, step):
            rows = slice(rim - down, side - rim - down)
            columns = slice(rim - right, side - rim - right)
            windows[_direction(down / side, right / side)] = classes[:, rows, columns]
    return labels[:, inside, inside], windows


def _direction(down: float, right: float) -> str:
    """`too far right by 6 % of the width`; nothing for no shift."""
    ways = (("down", "up", down, "height"), ("right", "left", right, "width"))
    words = [
        f"too far {plus if share > 0 else minus} by {abs(share):.1%} of the {side}"
        for plus, minus, share, side in ways
        if share
    ]
    return " and ".join(words)


def as_maps(maps: list[Tensor]) -> Tensor:
    """Stack maps (S, S) of single images as int64 (N, S, S)."""
    return torch.stack(maps).long()
