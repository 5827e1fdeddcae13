"""Runs with their preflight, and a teacher that knows the answer without a training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_runs import train_flags
from torch import Tensor, nn

from kd_trainer import build as assembling
from kd_trainer.build import build_run
from kd_trainer.doctor.checks import QUICK, Preflight
from kd_trainer.doctor.finding import Finding, Grade
from kd_trainer.models.configuration_smp import IMAGENET_MEAN, IMAGENET_STD
from kd_trainer.teacher import Teacher


class Green(nn.Module):
    """Finds the foreground of `write_pairs`, whose green is above 120, of values in 0..1."""

    def __init__(self, sharpness: float = 8.0, output: nn.Module | None = None) -> None:
        super().__init__()
        self.sharpness = nn.Parameter(torch.tensor(sharpness))
        self.output = output or nn.Identity()

    def forward(self, pixels: Tensor) -> Tensor:
        smooth = nn.functional.avg_pool2d(pixels[:, 1:2], 5, 1, 2)
        return self.output(self.sharpness * (smooth - 120 / 255))


def knowing(network: nn.Module | None = None, mean: float = 0.0, std: float = 1.0) -> Teacher:
    """A teacher that is told to normalise its images so."""
    statistics = {"mean": (mean,) * 3, "std": (std,) * 3}
    given = {"input_mean": IMAGENET_MEAN, "input_std": IMAGENET_STD}
    return Teacher(network or Green(), num_labels=2, **statistics, **given)


def teach(monkeypatch: pytest.MonkeyPatch, teacher: Teacher) -> None:
    """Let every run have this teacher, whatever its settings name."""
    monkeypatch.setattr(assembling, "make_teacher", lambda *_, **__: teacher)


def flags(data: Path, output: Path, *more: str, teacher: Path | str = "none") -> list[str]:
    """A run with its preflight; teacher `one` is that of `teach`."""
    if teacher == "one":
        teacher = data  # a folder that says nothing: another name would be looked up on the Hub
    given = train_flags(data, output, *more, teacher=teacher)
    given.remove("--no_preflight")  # the first one: a test may give its own
    return given


def looked(run) -> dict[str, Finding]:
    """What the quick preflight finds, by check."""
    return {f.check: f for f in Preflight(run, build_run(run), QUICK).findings()}


def bad(found: dict[str, Finding]) -> dict[str, str]:
    """Grades of the findings that are not ok."""
    return {name: str(f.grade) for name, f in found.items() if f.grade != Grade.OK}
