"""Two runs compared bit for bit, for the tests of resuming."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from kd_trainer.trainer import DistillationTrainer

MakeTrainer = Callable[..., DistillationTrainer]


def log_of(trainer: DistillationTrainer) -> list[dict[str, Any]]:
    """Everything that was logged, but for figures of time."""

    def of_time(name: str) -> bool:
        return name.endswith(("_runtime", "_per_second"))

    return [{k: v for k, v in log.items() if not of_time(k)} for log in trainer.state.log_history]


def assert_same_tensors(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def assert_same_run(one: DistillationTrainer, other: DistillationTrainer) -> None:
    """Weights, buffers, the optimizer's state, learning rates, best figure and log."""
    assert_same_tensors(one.model.state_dict(), other.model.state_dict())
    left, right = one.optimizer.state_dict(), other.optimizer.state_dict()
    assert left["state"].keys() == right["state"].keys()
    assert left["state"]
    for index, moments in left["state"].items():
        assert_same_tensors(moments, right["state"][index])
    assert left["param_groups"] == right["param_groups"]
    assert (
        one.lr_scheduler.state_dict()["last_epoch"]
        == (other.lr_scheduler.state_dict()["last_epoch"])
    )
    assert (one.ema is None) == (other.ema is None)
    if one.ema is not None:
        assert_same_tensors(one.ema.network.state_dict(), other.ema.network.state_dict())
    assert one.state.best_metric == other.state.best_metric
    assert log_of(one) == log_of(other)


def assert_resumes_exactly(make: MakeTrainer, folder: Path, updates: list[int]) -> None:
    """Resume from each of `updates` and compare with the run that was not interrupted.

    Args:
        make: a trainer with (output folder, further arguments); each call a new one.
        folder: for the runs.
        updates: after which the run is interrupted.
    """
    whole = make(folder / "whole", save_strategy="no")
    whole.train()
    saved = make(folder / "saved", save_strategy="steps", save_steps=1, save_total_limit=None)
    saved.train()
    assert_same_run(whole, saved)  # saving changes nothing
    assert max(updates) < whole.state.max_steps
    for update in updates:
        resumed = make(folder / "saved", save_strategy="no", blank=True)
        torch.manual_seed(1234 + update)  # what a new process would have drawn
        resumed.train(str(folder / "saved" / f"checkpoint-{update}"))
        assert_same_run(whole, resumed)
