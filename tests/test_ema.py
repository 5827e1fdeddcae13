"""The moving average of the student: what it is, and where it is measured, saved and refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import train_flags, write_pairs
from tiny import Squares, arguments, tiny_student
from transformers import TrainerCallback

from kd_trainer.build import evaluation_dataset
from kd_trainer.commands.train import run_train
from kd_trainer.config import parse
from kd_trainer.ema import EMA_FILE
from kd_trainer.loading import load_student
from kd_trainer.measurement import evaluate_model
from kd_trainer.processes import share_buffers
from kd_trainer.trainer import DistillationTrainer

DECAY = 0.6


class Steps(TrainerCallback):
    """Keeps the student's tensors after each step, in float64."""

    def __init__(self) -> None:
        self.states: list[dict[str, torch.Tensor]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        tensors = kwargs["model"].state_dict().items()
        self.states.append({name: value.detach().double().clone() for name, value in tensors})


def trainer_in(folder: Path, **options: Any) -> DistillationTrainer:
    return DistillationTrainer(
        tiny_student(),
        arguments(folder, **({"ema_decay": DECAY, "max_steps": 5} | options)),
        train_dataset=Squares(6),
        eval_dataset=Squares(3, offset=50),
    )


def by_hand(states: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    average = states[0]
    for step, state in enumerate(states):
        d = min(1 - 1 / (step + 1), DECAY)
        average = {
            name: d * average[name] + (1 - d) * value
            if not name.endswith("num_batches_tracked")
            else value
            for name, value in state.items()
        }
    return average


@pytest.mark.parametrize("accumulation", [1, 2])
def test_it_averages_parameters_and_statistics_once_a_step(tmp_path: Path, accumulation: int):
    """Averaged at each micro-batch, or without its BatchNorms, it would be another network."""
    trainer, steps = trainer_in(tmp_path, gradient_accumulation_steps=accumulation), Steps()
    trainer.add_callback(steps)
    trainer.train()
    assert len(steps.states) == 5
    wanted, found = by_hand(steps.states), trainer.ema.network.state_dict()
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        torch.testing.assert_close(value.double(), wanted[name], rtol=1e-5, atol=1e-6, msg=name)
    moved = [
        name
        for name, value in found.items()
        if not torch.equal(value.double(), steps.states[-1][name])
    ]
    assert any("running_var" in name for name in moved)
    assert not trainer.ema.network.training
    assert not any(p.requires_grad for p in trainer.ema.network.parameters())


def test_a_second_training_begins_a_new_one_that_does_not_answer_for_the_student(tmp_path: Path):
    """accelerate puts a forward pass of its own on the student, which a copy must not share."""
    trainer = trainer_in(tmp_path, mixed_precision="bf16", max_steps=2)
    trainer.train()
    trainer.train()
    images = torch.randn(1, 3, 32, 32)
    before = trainer.ema(images)
    for parameter in trainer.model.parameters():
        parameter.data.zero_()
    assert torch.equal(trainer.ema(images), before)


def test_without_it_nothing_is_kept_measured_or_saved(tmp_path: Path):
    """A run that does not ask for it must not pay for it."""
    trainer = trainer_in(tmp_path, ema_decay=None, save_strategy="steps", save_steps=2)
    trainer.train()
    assert trainer.ema is None
    assert not list(tmp_path.rglob(EMA_FILE))
    assert not any(name.startswith("eval_ema") for name in trainer.evaluate())


def test_the_best_student_may_be_chosen_by_its_figures_and_is_loaded_with_it(tmp_path: Path):
    """Beside the student of one checkpoint the average of another would be saved."""
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "ema_miou"}
    trainer = trainer_in(tmp_path, **options, **best, save_total_limit=None, learning_rate=0.02)
    trainer.train()
    logs = {
        log["step"]: log["eval_ema_miou"] for log in trainer.state.log_history if "eval_miou" in log
    }
    assert trainer.state.best_metric == max(logs.values())
    step = trainer.state.best_global_step
    saved = torch.load(tmp_path / f"checkpoint-{step}" / EMA_FILE, weights_only=True)
    for name, value in trainer.ema.network.state_dict().items():
        assert torch.equal(value, saved[name])
    assert trainer.evaluate()["eval_ema_miou"] == logs[step]
    with pytest.raises(ValueError, match="got 'ema_miou'"):
        trainer_in(tmp_path / "without", **options, **best, ema_decay=None)


def test_a_run_saves_it_as_a_student_of_its_own(tmp_path: Path):
    """Its figures are those of the folder that is left, and another run has no such folder."""
    data = write_pairs(tmp_path / "data")
    flags = train_flags(data, tmp_path / "out", "--ema_decay", "0.9", "--save_strategy", "epoch")
    run = parse(flags)
    run_train(run)
    results = json.loads((tmp_path / "out/results.json").read_text())
    average = load_student(tmp_path / "out/ema")
    found = evaluate_model(average, evaluation_dataset(run.data, batch_size=4))
    assert found.student["miou"] == results["ema_miou"]
    raw = load_student(tmp_path / "out/student")
    pairs = zip(average.parameters(), raw.parameters(), strict=True)
    assert any(not torch.equal(one, other) for one, other in pairs)
    assert "ema_miou" in results["eval_history"][0]


@pytest.mark.parametrize("decay", ["0", "1", "1.5"])
def test_a_decay_that_averages_nothing_is_refused(decay: str):
    """With 1 the first weights would stay for ever."""
    with pytest.raises(ValueError, match="--ema_decay between 0 and 1"):
        parse(["--dataset", "synthetic", "--teacher", "none", "--ema_decay", decay])


def test_weights_that_are_split_among_processes_are_refused(monkeypatch: pytest.MonkeyPatch):
    """Each process would average its part, and save that."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(ValueError, match="got FSDP"):
        parse(["--dataset", "synthetic", "--teacher", "none", "--ema_decay", "0.9"])


def test_buffers_are_shared_in_one_message_for_each_type(monkeypatch):
    """One for each of 177 buffers took 100 ms of a step of two processes, these take 5."""
    messages = []

    def broadcast(tensor: torch.Tensor, src: int) -> None:
        messages.append(tensor.dtype)
        tensor.copy_(torch.arange(tensor.numel()))

    dist = torch.distributed
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "broadcast", broadcast)
    network = torch.nn.Sequential(torch.nn.BatchNorm2d(2), torch.nn.BatchNorm2d(3))
    share_buffers(network)
    assert sorted(map(str, messages)) == ["torch.float32", "torch.int64"]
    found = {name: value.tolist() for name, value in network.named_buffers()}
    assert found == {
        "0.running_mean": [0, 1],
        "0.running_var": [2, 3],
        "0.num_batches_tracked": 0,
        "1.running_mean": [4, 5, 6],
        "1.running_var": [7, 8, 9],
        "1.num_batches_tracked": 1,
    }
