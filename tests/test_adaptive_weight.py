"""Less of the teacher once the student is better than it, and all of it again when it is not."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from same_run import assert_resumes_exactly
from tiny import Squares, arguments, tiny_student, tiny_teacher

from kd_trainer.adaptive_weight import AdaptiveWeight
from kd_trainer.build import build_run
from kd_trainer.config import parse
from kd_trainer.losses import LossWeights
from kd_trainer.trainer import DistillationTrainer


def after(*ratios: float) -> AdaptiveWeight:
    state = AdaptiveWeight()
    for ratio in ratios:
        state.update(0.8 * ratio, 0.8)
    return state


def test_weights_are_those_of_the_formula():
    """By hand: of 1.02, twice, e^-0.4 of the teacher, and 1 - e^-0.8 of the way to task 1."""
    state = after(1.02, 1.02)
    assert state.distillation == pytest.approx(math.exp(-0.4))
    assert state.task(0.25) == pytest.approx(0.25 + 0.75 * (1 - math.exp(-0.8)))
    assert state.task(3.0) == 3.0
    assert after(1.1, 1.1).distillation == 0
    for ratios in ((0.5,), (1.0, 1.0), (0.9, 0.99, 1.0)):
        assert (after(*ratios).distillation, after(*ratios).task(0.25)) == (1, 0.25)


def test_the_ratio_is_smoothed_by_half():
    """From 0.9 over 1.1: 1.0, and then 1.05."""
    assert [round(after(*[0.9, 1.1, 1.1][:n]).ratio, 9) for n in (1, 2, 3)] == [0.9, 1.0, 1.05]


def test_one_evaluation_changes_nothing():
    """The reference switches the teacher off for good after a single noisy one."""
    assert after(1.5).distillation == 1
    assert after(0.2, 2.0, 0.2, 2.0).distillation == 1
    assert not after(1.02, 1.5).off  # above 1 twice, beyond the limit once
    assert after(1.02, 1.5).distillation == pytest.approx(math.exp(-0.6))


def test_a_teacher_that_is_off_is_back_below_one_and_not_before():
    """A student that drifts away from a teacher which is never asked again cannot come back."""
    state = after(1.1, 1.1)
    for student, off in ((1.0, True), (0.98, True), (0.97, False), (1.2, False)):
        state.update(student, 1.0)
        assert state.off is off, (student, state.ratio)
    assert state.distillation == 1  # the first evaluation above 1 again


@pytest.mark.parametrize(("student", "teacher"), [(0.5, 0.0), (math.nan, 0.5), (0.5, math.nan)])
def test_a_figure_that_says_nothing_changes_nothing(student: float, teacher: float):
    """A ratio of infinity would switch the teacher off, one of NaN stay for ever."""
    state = after(1.02, 1.02)
    before = vars(state).copy()
    state.update(student, teacher)
    assert vars(state) == before


def test_all_terms_of_the_teacher_fade_and_no_other():
    """With one of them left the teacher would be asked for it in each step."""
    weights = LossWeights(kl=1.0, mse=0.5, bce=0.25, task=0.5).scaled(0.0, 0.75)
    assert (weights.kl, weights.mse, weights.bce, weights.task) == (0, 0, 0.25, 0.75)
    assert not weights.ask_teacher


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"eval_strategy": "no"}, "Expected --eval_strategy epoch or steps with --adaptive_weight"),
        ({"task_weight": 0.0}, "Expected a loss term that compares with labels"),
        ({"weight_schedule": ["task=0:0,5:0,5:1"]}, "got none at epoch 0"),
    ],
)
def test_what_it_cannot_work_with_is_refused(more: dict[str, Any], message: str, tmp_path: Path):
    """It would do nothing, or leave a loss without a term in the middle of a run."""
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, adaptive_weight=True, **{"eval_strategy": "epoch"} | more)


def test_it_needs_a_teacher_and_one_evaluation_set(tmp_path: Path):
    """A flag that does nothing looks like one that does."""
    run = parse(["--dataset", "synthetic", "--teacher", "none", "--adaptive_weight"])
    with pytest.raises(ValueError, match="Expected a --teacher with --adaptive_weight"):
        build_run(run)
    args = arguments(tmp_path, adaptive_weight=True, eval_strategy="epoch")
    sets = {"a": Squares(2), "b": Squares(2)}
    with pytest.raises(ValueError, match="Expected one evaluation set with adaptive_weight"):
        DistillationTrainer(tiny_student(), args, teacher=tiny_teacher(), eval_dataset=sets)


def trained(folder: Path, blank: bool = False, **more: Any) -> DistillationTrainer:
    """A student that is soon better than its teacher, whose weights are random."""
    options: dict[str, Any] = {
        "num_train_epochs": 4,
        "learning_rate": 1e-2,
        "eval_strategy": "steps",
    }
    options |= {"eval_steps": 2, "load_best_model_at_end": False, "task_weight": 0.5}
    args = arguments(folder, adaptive_weight=True, **options | more)
    data = {"train_dataset": Squares(8), "eval_dataset": Squares(4, offset=50)}
    return DistillationTrainer(tiny_student(seed=9 * blank), args, teacher=tiny_teacher(), **data)


@pytest.mark.slow
def test_a_run_switches_its_teacher_off_and_resumes_bit_for_bit(tmp_path: Path):
    """From before the switch, between the two evaluations that it takes, and after it."""
    trainer = trained(tmp_path / "look")
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    factors = [log["adaptive/distillation"] for log in logs]
    assert factors[0] == 1
    assert factors[-1] == 0
    # A log follows the step it is of, whose weights were those of the evaluation before.
    asked = ["kl" in log for log in logs]
    off = asked.index(False)
    assert 2 <= off < len(logs) - 1
    assert not any(asked[off:])
    ratios = [
        log["eval_miou"] / log["eval_teacher_miou"]
        for log in trainer.state.log_history
        if "eval_miou" in log
    ]
    assert logs[-1]["adaptive/ratio"] == pytest.approx(_smoothed(ratios[: (len(logs) - 1) // 2]))
    trainer.evaluate()  # of the user's, after the training
    assert trainer.adaptive is not None
    assert trainer.adaptive.ratio == pytest.approx(_smoothed(ratios))
    assert_resumes_exactly(trained, tmp_path, [1, 2, off, off + 1])


def _smoothed(ratios: list[float]) -> float:
    value = ratios[0]
    for ratio in ratios[1:]:
        value = (value + ratio) / 2
    return value
