"""The teacher of a preflight fed in other ways than the run's."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress

import torch
from torch import Tensor, nn

from kd_trainer.evaluation import classes_of
from kd_trainer.preflight.counts import Rows
from kd_trainer.preflight.normalisation import Feeding, first_batchnorm, misfit
from kd_trainer.teacher import Teacher
from kd_trainer.workflows.preflight.images import Seen, within

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
