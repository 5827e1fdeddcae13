"""Whether the teacher gets its pictures normalised as in its training.

Two witnesses. The running statistics of its first BatchNorm say what it was trained on: measured on
networks trained with ImageNet's, the input fits them ten times better with ImageNet's than with a
mean and std of 0.5, though the mIoU may differ by no more than 0.01. The mIoU says what it costs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor, nn

from kd_trainer.preflight.counts import (
    ENOUGH,
    MARGIN,
    Rows,
    clearly_better,
    knows_something,
    miou,
)
from kd_trainer.preflight.finding import Finding, fault, note, ok, several

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
