"""Whether the teacher gets its images normalised as in its training.

Two witnesses. The running statistics of its first BatchNorm say what it was trained on: measured on
networks trained with ImageNet's, the input fits them ten times better with ImageNet's than with a
mean and std of 0.5, though the mIoU may differ by no more than 0.01. The mIoU says what it costs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor, nn

from kd_trainer.doctor.data import within
from kd_trainer.doctor.finding import Finding, fault, note, ok, several
from kd_trainer.doctor.teacher import ENOUGH, MARGIN, Predictions, best_of
from kd_trainer.evaluation import masks_of
from kd_trainer.models.configuration_smp import IMAGENET_MEAN, IMAGENET_STD
from kd_trainer.teacher import Teacher

PRESENT = "the present one"
_STRANGE = 0.25  # nats: another kind of image alone rarely moves the statistics so far
_TIMES = 4.0  # that another normalisation has to fit better
_FITTED = 8  # images whose first features are kept: 100 MB each way at 640 px


@dataclass(frozen=True)
class InputConvention:
    """A way to normalise images for a network.

    Attributes:
        mean: per channel, of values in 0..1.
        std: likewise.
        bgr: whether the channels come in the order blue, green, red.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    bgr: bool = False

    def inputs(self, values: Tensor) -> Tensor:
        """Images (B, 3, H, W) of values in 0..1 as the network gets them."""
        mean, std = (values.new_tensor(v).view(1, 3, 1, 1) for v in (self.mean, self.std))
        return ((values.flip(1) if self.bgr else values) - mean) / std

    def cure(self) -> str:
        """What to do if this is the right one."""
        if self.bgr:
            return "Swap the input channels of the teacher's first convolution and save it."
        mean, std = (" ".join(f"{v:.6g}" for v in values) for values in (self.mean, self.std))
        return f"Give --teacher_mean {mean} --teacher_std {std}."


USUAL = {
    "ImageNet's": InputConvention(tuple(IMAGENET_MEAN), tuple(IMAGENET_STD)),
    "mean and std 0.5": InputConvention((0.5,) * 3, (0.5,) * 3),
    "values 0..1": InputConvention((0.0,) * 3, (1.0,) * 3),
    "values 0..255": InputConvention((0.0,) * 3, (1 / 255,) * 3),
}
"""Normalisations that networks are commonly trained with."""


def alternatives(present: InputConvention) -> dict[str, InputConvention]:
    """The usual ones that differ from the present one, and the present one with swapped colours."""
    others = {
        name: convention
        for name, convention in USUAL.items()
        if not np.allclose(
            [convention.mean, convention.std], [present.mean, present.std], atol=1e-4
        )
    }
    return others | {"the order BGR": replace(present, bgr=True)}


def first_batchnorm(network: nn.Module) -> nn.BatchNorm2d | None:
    """The first BatchNorm of a network that knows what it was trained on, if there is one."""
    norms = (m for m in network.modules() if isinstance(m, nn.BatchNorm2d))
    return next((m for m in norms if m.running_mean is not None), None)


def batchnorm_distance(features: Tensor, norm: nn.BatchNorm2d) -> float:
    """How far features (B, C, H, W) are from what a BatchNorm was trained on.

    The KL divergence of two normal distributions with the mean and variance of each, in nats,
    mean over the channels: 0 where they agree.
    """
    assert norm.running_mean is not None
    assert norm.running_var is not None
    features = features.detach().float()
    mean, variance = features.mean(dim=(0, 2, 3)), features.var(dim=(0, 2, 3)) + norm.eps
    trained = norm.running_var.float() + norm.eps
    difference = mean - norm.running_mean.float()
    divergence = (trained / variance).log() + (variance + difference**2) / trained - 1
    return float(divergence.mean()) / 2


@dataclass(frozen=True)
class ConventionTrial:
    """What happened when the teacher's input was normalised in other ways.

    Attributes:
        conventions: that were tried, by name.
        now: predictions as it is, on the images of `others`.
        others: predictions with each one; empty where none could be clearly better.
        distances: of each one's input, and of the `PRESENT` one's, from what the first BatchNorm
            was trained on, in nats; empty without one.
    """

    conventions: Mapping[str, InputConvention]
    now: Predictions
    others: Mapping[str, Predictions] = field(default_factory=dict)
    distances: Mapping[str, float] = field(default_factory=dict)


def normalisation_finding(trial: ConventionTrial) -> Finding:
    """Whether the teacher does clearly better, or was trained, with another usual normalisation."""
    check, now, best = "normalisation", trial.now, best_of(trial.others)
    if best and trial.others[best].clearly_better_than(now):
        return (fault if len(now) >= ENOUGH else note)(
            check,
            f"Expected the teacher's own normalisation, got one with mIoU {now.miou:.3f} where "
            f"{best} gives {trial.others[best].miou:.3f} ({several(len(now), 'image')})",
            trial.conventions[best].cure(),
        )
    distances = dict(trial.distances)
    present = distances.pop(PRESENT, 0.0)
    nearest = min(distances, key=lambda name: distances[name], default="")
    if nearest and present > _STRANGE and distances[nearest] * _TIMES < present:
        return note(
            check,
            f"the teacher's first BatchNorm was trained on other input: {nearest} fits it with "
            f"{distances[nearest]:.2f} nats, the present one with {present:.2f}",
            trial.conventions[nearest].cure(),
        )
    fits = f"; its first BatchNorm fits with {present:.2f} nats" if trial.distances else ""
    others = (
        f", {best} gives {trial.others[best].miou:.3f}" if best else f" leaves none {MARGIN} better"
    )
    return ok(check, f"mIoU {now.miou:.3f}{others}{fits}")


Samples = Sequence[Mapping[str, Tensor]]
Conventions = Mapping[str, InputConvention]


def try_conventions(
    teacher: Teacher, samples: Samples, now: Predictions, seconds: float
) -> ConventionTrial:
    """Show the teacher the images in every usual convention.

    Args:
        teacher: on its device.
        samples: the images of `now`; two of them are taken in any case.
        now: its predictions as it is.
        seconds: that this may take.
    """
    present = InputConvention(tuple(teacher.mean), tuple(teacher.std))
    conventions = alternatives(present)
    straight = {name: c for name, c in conventions.items() if not c.bgr} | {PRESENT: present}
    distances = _distances(teacher, samples[:_FITTED], straight, seconds / 4)
    if now.miou > 1 - MARGIN:  # none can be clearly better
        return ConventionTrial(conventions, now, {}, distances)
    classes = defaultdict[str, list[Tensor]](list)
    for name, inputs in _inputs(teacher, samples, conventions, seconds):
        classes[name].append(masks_of(teacher(inputs), multi_label=now.several).cpu())
    now = now.of(slice(len(classes["the order BGR"])))
    others = {name: replace(now, classes=torch.cat(maps)) for name, maps in classes.items()}
    return ConventionTrial(conventions, now, others, distances)


def _inputs(
    teacher: Teacher, samples: Samples, conventions: Conventions, seconds: float
) -> Iterator[tuple[str, Tensor]]:
    """Each image in every convention, in the student's normalisation, which the teacher undoes.

    The conventions take turns, so that all of them have seen the same images when time is up.
    """
    for sample in within(seconds, samples, least=2):
        values = sample["pixel_values"][None].to(teacher.scale.device).float() / 255
        for name, convention in conventions.items():
            inputs = (convention.inputs(values) - teacher.shift) / teacher.scale
            yield name, inputs.contiguous(memory_format=torch.channels_last)


class _ReachedError(Exception):
    """Ends a forward pass where all that is wanted is known."""


def _distances(
    teacher: Teacher, samples: Samples, conventions: Conventions, seconds: float
) -> dict[str, float]:
    """`batchnorm_distance` of each convention; nothing behind that layer is computed."""
    norm = first_batchnorm(teacher.network)
    if norm is None:
        return {}
    features = defaultdict[str, list[Tensor]](list)
    name = ""

    def keep(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        features[name].append(inputs[0])
        raise _ReachedError

    handle = norm.register_forward_pre_hook(keep)
    try:
        for name, inputs in _inputs(teacher, samples, conventions, seconds):  # noqa: B007
            with suppress(_ReachedError):
                teacher(inputs)
    finally:
        handle.remove()
    return {name: batchnorm_distance(torch.cat(maps), norm) for name, maps in features.items()}
