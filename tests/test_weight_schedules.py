"""Weights of loss terms that change over a run."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from same_run import assert_resumes_exactly
from tiny import Squares, arguments, tiny_student, tiny_teacher

from kd_trainer.compare.budget import Budget, baseline_settings
from kd_trainer.config import build, parse
from kd_trainer.costs import without_teacher
from kd_trainer.losses import SCHEDULED, LossWeights
from kd_trainer.model_card import _loss
from kd_trainer.schedules import WeightSchedule, read_weight_schedules, weight_schedule_words
from kd_trainer.trainer import DistillationTrainer

BINARY = ("kl", "mse", "bce", "dice")


def test_weights_are_linear_between_points_and_held_beyond_them():
    """By hand: from 1 to 0.5 over 20 epochs, and at epoch 30 a jump to 2."""
    weight = WeightSchedule(((10, 1.0), (30, 0.5), (30, 2.0)))
    found = [weight(epoch) for epoch in (0, 10, 20, 29.999, 30, 31, 500)]
    assert found == pytest.approx([1, 1, 0.75, 0.500025, 2, 2, 2])
    assert weight.peak == 2.0


@pytest.mark.parametrize(
    ("points", "value"), [(((5, 0.0), (5, 3.0)), [0, 3]), (((0, 3.0), (5, 3.0), (5, 0.0)), [3, 0])]
)
def test_a_term_is_switched_by_two_points_of_one_epoch(points, value):
    """Half a step of the other weight would ask a teacher that has no part in the stretch."""
    weight = WeightSchedule(points)
    assert [weight(4.999), weight(5.0)] == value


def test_words_are_read_and_written_alike():
    """A configuration that is written has to mean the run that wrote it."""
    words = ["kl=0:1,20:0.5", "task=0:0,25:0,25:1"]
    for given in (words, [" ".join(words)], ["kl=0:1", "20:0.5", words[1]]):
        assert weight_schedule_words(read_weight_schedules(given, SCHEDULED)) == words
    assert read_weight_schedules(None, SCHEDULED) == {}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("kl=0:1,a:2", "got 'a:2'"),
        ("0:1,2:3", "got '0:1'"),
        ("kl", "got 'kl'"),
        ("kl=0:1 kl=3:2", "each term once.*got 'kl=3:2'"),
        ("focul=0:1", r"got one for focul\. Did you mean focal"),
        ("kl=5:1,2:1", "epochs in order.*got 5:1,2:1"),
        ("kl=1:1,1:2,1:3", "none of them more than twice"),
        ("kl=0:-1", "weights from 0"),
        ("kl=0:nan", "weights from 0"),
        ("kl=-1:1", "got -1:1"),
        ("kl=0:1,9:0 mse=0:0 task=0:0,9:0,9:1 bce=0:0,9:0,12:1 dice=0:0", "leaves none at epoch 9"),
    ],
)
def test_schedules_that_cannot_be_are_refused_at_the_start(words, message, tmp_path: Path):
    """A stretch without any term would end the run in the night it is reached."""
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, weight_schedule=words.split())


def test_a_weight_beside_its_schedule_is_refused_where_it_was_given():
    """Only one of them can count; that of a recipe is its default."""
    run = ["--dataset", "x", "--teacher", "t", "--weight_schedule", "kl=0:1,9:0.2"]
    with pytest.raises(ValueError, match="Expected --kl_weight or a --weight_schedule for kl"):
        parse([*run, "--kl_weight", "0.4"])
    assert parse(run).training.loss_weights.kl == 1


def test_epochs_are_those_of_the_plan(tmp_path: Path):
    """Unfreezing of half as many epochs beside weights of all would be another recipe."""
    args = arguments(tmp_path, weight_schedule=["kl=0:1,50:0"], plan_epochs=50)
    schedule = args.schedule(3, epochs=10, steps_per_epoch=4)
    assert [schedule.weights(step)["kl"] for step in (0, 20, 40)] == pytest.approx([1, 0.5, 0])


def test_what_looks_at_a_run_as_a_whole_sees_the_highest_weight(tmp_path: Path):
    """A term of weight 0 at the first step is one of the run all the same."""
    args = arguments(tmp_path, weight_schedule=["kl=0:0,5:0,5:2"], mse_weight=0.0)
    args.loss_weights.check_teacher()
    assert args.loss_weights.kl == 2
    with pytest.raises(ValueError, match="follows the teacher"):
        arguments(tmp_path, weight_schedule=["kl=0:0"], mse_weight=0.0).loss_weights.check_teacher()
    assert LossWeights().following({"kl": 3.0}).kl == 0  # without a teacher


class Watched(DistillationTrainer):
    """Notes at which steps the teacher is asked."""

    def teacher_logits(self, inputs: Any, maps: Any = None) -> Any:
        if self.model.training:
            self.__dict__.setdefault("asked", []).append(self.state.global_step)
        return super().teacher_logits(inputs, maps)


SCHEDULE = ["kl=0:0,1:0,1:1,2:0.5,2:0", "mse=0:0", "bce=0:1,3:0.25"]


def trained(folder: Path, blank: bool = False, **more: Any) -> Watched:
    options: dict[str, Any] = {"num_train_epochs": 3, "eval_strategy": "epoch", "logging_steps": 1}
    options |= {"gradient_accumulation_steps": 2, "load_best_model_at_end": False}
    args = arguments(folder, weight_schedule=SCHEDULE, **options | more)
    data = {"train_dataset": Squares(12), "eval_dataset": Squares(2, offset=50)}
    return Watched(tiny_student(seed=9 * blank), args, teacher=tiny_teacher(), **data)


def test_a_term_of_weight_0_is_neither_computed_nor_asked_for(tmp_path: Path):
    """A teacher that is asked in vain is most of a step."""
    trainer = trained(tmp_path, logging_steps=2)
    trainer.train()
    assert sorted(set(trainer.asked)) == [3, 4, 5]  # of nine steps, three an epoch
    logs = [log for log in trainer.state.log_history if "loss" in log]
    kl = {log["step"]: (log.get("kl"), log["weight/kl"]) for log in logs}
    assert {step: mean is None for step, (mean, _) in kl.items()} == {
        2: True,
        4: False,
        6: False,
        8: True,
    }
    assert kl[6][1] == pytest.approx(1 - 0.5 * 2 / 3, abs=1e-5)  # linear within the epoch
    assert all("mse" not in log for log in logs)
    # The loss of a step is the sum at its own weights, and a mean is over what was computed.
    single = trained(tmp_path / "single")
    single.train()
    steps = [log for log in single.state.log_history if "loss" in log]
    for log in steps:
        factors = {"kl": log["weight/kl"], "bce": log["weight/bce"], "dice": 1.0}
        total = sum(factor * log.get(name, 0.0) for name, factor in factors.items())
        assert log["loss"] == pytest.approx(total, abs=1e-4), log["step"]
    assert kl[4][0] == pytest.approx(steps[3]["kl"], rel=1e-5)
    evaluated = [log for log in trainer.state.log_history if "eval_kl" in log]
    assert len(evaluated) == 3  # at each evaluation, whatever the weight


def test_a_run_with_schedules_resumes_bit_for_bit(tmp_path: Path):
    """Before, in and after the stretch of a term, and within an epoch."""
    make = lambda folder, **more: trained(folder, logging_steps=2, **more)  # noqa: E731
    assert_resumes_exactly(make, tmp_path, [2, 3, 5])


def test_the_baseline_of_a_comparison_has_the_schedules_of_its_own_terms(tmp_path: Path):
    """In the epochs in which they come at the same steps."""
    settings = {"output_dir": str(tmp_path), "teacher": "t", "unlabelled": "u", "use_cpu": True}
    settings |= {"num_train_epochs": 8, "weight_schedule": ["kl=0:1,4:0", "bce=0:1,4:0.5"]}
    assert without_teacher(settings)["weight_schedule"] == ["bce=0:1,4:0.5"]
    only = settings | {"weight_schedule": ["kl=0:1,4:0"]}
    assert without_teacher(only)["weight_schedule"] is None
    budget = Budget(80, {"baseline": 4, "distilled": 10}, {"baseline": 8, "distilled": 20})
    alone = build(baseline_settings(settings, build(settings).training, budget)).training
    steps = alone.schedule(7, 20.0, 4), build(settings).training.schedule(7, 8.0, 10)
    for step in range(0, 80, 7):
        assert steps[0].weights(step)["bce"] == pytest.approx(
            steps[1].weights(step)["bce"], abs=1e-5
        )


def test_a_stage_of_the_teacher_alone_is_none_of_the_baseline(tmp_path: Path):
    """Without any term it would end in an error at its first step, once the preflight is over."""
    settings = {"output_dir": str(tmp_path), "teacher": "t", "use_cpu": True}
    settings |= {"eval_strategy": "no", "report_to": "none"}
    budget = Budget(80, {"baseline": 10, "distilled": 10}, {"baseline": 20, "distilled": 20})
    for words, expected in (
        (["kl=0:1,4:1,4:0", "task=0:0,4:0,4:1"], None),
        (["task=0:0,4:0,4:0.5"], ["task=0:0.5"]),
        (["task=0:0.5,4:0.5,4:1"], ["task=0:0.5,4:0.5,4:1"]),
    ):
        given = settings | {"weight_schedule": words}
        alone = baseline_settings(given, build(given).training, budget)
        assert alone["weight_schedule"] == expected
        DistillationTrainer(tiny_student(), build(alone).training)
    unheld = arguments(tmp_path, weight_schedule=["task=0:0,4:0,4:1"])
    with pytest.raises(ValueError, match=r"without a teacher, got .* none at epoch 0\."):
        DistillationTrainer(tiny_student(), unheld)


def test_a_card_tells_the_weights_in_turn():
    """The weight of a flag that the schedule replaced is none of the run's."""

    settings: dict[str, Any] = {"kl_weight": 0.3, "bce_weight": 0.5, "task_weight": 2.0}
    facts = SimpleNamespace(teacher="t", settings=settings)
    assert _loss(facts) == "0.3 KL(T) + 1 BCE"  # type: ignore[arg-type]
    settings["weight_schedule"] = ["kl=0:1,5:1,9:0.5", "task=0:0,5:0,5:1"]
    assert _loss(facts) == "1 → 0.5 KL(T) + 0 → 0.5 BCE"  # type: ignore[arg-type]
