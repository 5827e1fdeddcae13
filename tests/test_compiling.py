"""torch.compile of student and teacher: the same results, and recompiles that are seen."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import Squares, arguments, tiny_student, tiny_teacher

from kd_trainer.teacher import Answers
from kd_trainer.trainer import DistillationTrainer


def logs_of(folder: Path, **options) -> list[dict[str, float]]:
    trainer = DistillationTrainer(
        tiny_student(),
        arguments(
            folder, num_train_epochs=2, unfreeze_start_epoch=1, learning_rate=1e-4, **options
        ),
        teacher=tiny_teacher(),
        train_dataset=Squares(4),
    )
    trainer.train()
    return [log for log in trainer.state.log_history if "loss" in log]


def test_compiled_run_learns_the_same_and_counts_its_graphs(tmp_path: Path, monkeypatch):
    """torch gives up after some recompiles without a word; the count in the log shows both."""
    plain = logs_of(tmp_path / "plain")
    # transformers writes these for accelerate, and other tests must not find them.
    for name in ("ACCELERATE_DYNAMO_BACKEND", "ACCELERATE_DYNAMO_MODE"):
        monkeypatch.setenv(name, "no")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = logs_of(tmp_path / "compiled", torch_compile_backend="eager", compile_teacher=True)
    assert [log["loss"] for log in compiled] == pytest.approx(
        [log["loss"] for log in plain], rel=1e-4
    )
    graphs = [log["compiled_graphs"] for log in compiled]
    frozen, freed = graphs[1], graphs[-1]
    assert frozen >= 2  # student and teacher
    assert freed > frozen  # a unit was freed, which is another graph
    assert all("compiled_graphs" not in log for log in plain)


def test_compiled_teacher_answers_the_same():
    """A teacher compiled before it is folded would answer as another network."""
    teacher = tiny_teacher()
    pixels = torch.randn(2, 3, 32, 32)
    answers = Answers(teacher, precision="no", backend="eager")
    assert torch.allclose(answers.ask(pixels), teacher(pixels), rtol=1e-4, atol=1e-5)
