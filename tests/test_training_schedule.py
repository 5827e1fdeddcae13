"""The plan of a run as pure functions: the recipe's own figures, and the ends of each schedule."""

import math
from pathlib import Path

import pytest
import torch
from tiny import Squares, arguments, tiny_student
from transformers import get_scheduler

from kd_trainer.config import build, load_recipe
from kd_trainer.costs import steps_per_epoch
from kd_trainer.doctor.finding import Grade
from kd_trainer.doctor.plan import timeline, warmup_line
from kd_trainer.doctor.resources import plan_finding
from kd_trainer.schedules import TrainingSchedule
from kd_trainer.trainer import DistillationTrainer

COSINE = "rgb_hierarchical_unet_v2_distillation_b0_from_b3_temp_prog"
TIMELINE = "rgb_hierarchical_unet_v2_distillation_b0_from_b3_timeline"
UPDATES = 10


def recipe(name: str = COSINE, **changes: object) -> TrainingSchedule:
    args = build(load_recipe(name) | changes).training
    return args.schedule(7, args.num_train_epochs, UPDATES)


def at(epoch: float) -> int:
    return round(epoch * UPDATES)


def test_recipe_goes_from_four_to_one_along_a_cosine_epoch_by_epoch():
    """`epoch / epochs` instead of `epoch / (epochs - 1)` never reaches the last temperature."""
    table = recipe()
    for epoch in range(50):
        expected = 1 + 3 * 0.5 * (1 + math.cos(math.pi * epoch / 49))
        for update in (at(epoch), at(epoch + 1) - 1):  # the same throughout the epoch
            assert table.temperature(update) == pytest.approx(expected)
    assert table.temperature(0) == 4.0
    assert table.temperature(at(50) - 1) == pytest.approx(1.0)
    assert table.temperature(at(60)) == pytest.approx(1.0)  # held, not extrapolated


def test_timeline_recipe_has_the_temperatures_of_the_timeline():
    """Both recipes must be what they are named after."""
    table = recipe(TIMELINE)
    stated = {0: 4.0, 4: 3.6, 7: 3.2, 10: 2.9, 13: 2.5, 16: 2.2, 19: 1.9, 22: 1.6, 49: 1.0}
    for epoch, temperature in stated.items():
        assert table.temperature(at(epoch)) == pytest.approx(temperature), epoch


def test_recipe_frees_a_unit_every_third_epoch_from_the_sixth_on():
    """One epoch off shifts every stage of the plan."""
    table = recipe()
    free = [table.unfreezing(epoch) for epoch in range(50)]
    assert free == [0] * 5 + [1] * 3 + [2] * 3 + [3] * 3 + [4] * 3 + [5] * 3 + [6] * 3 + [7] * 27
    starts = [table.free_from(f"unit_{unit}") for unit in range(7)]
    assert starts == [23, 20, 17, 14, 11, 8, 5]  # the deepest unit, 6, first
    assert table.free_from("decoder") == 0


def test_recipe_base_rates_are_one_and_three_tenths_of_a_ten_thousandth():
    """The encoder's share is easily applied twice, or not at all."""
    args = build(load_recipe(COSINE)).training
    assert args.learning_rate == 1e-4
    assert args.learning_rate * args.encoder_lr_scale == pytest.approx(3e-5)


def test_rate_warms_up_for_five_epochs_and_ends_at_the_minimum():
    """A cosine that is counted from epoch 0, or that ends at 0, gives other rates throughout."""
    rate = recipe().rate("decoder")
    assert rate(0) == 0.0
    assert rate(at(2.5)) == pytest.approx(0.5)
    assert rate(at(5)) == pytest.approx(1.0)
    assert rate(at(27.5)) == pytest.approx(0.5 * (1 + 0.01))  # half way down
    assert 1e-4 * rate(at(50)) == pytest.approx(1e-6)
    assert 1e-4 * rate(at(55)) == pytest.approx(1e-6)
    falling = [rate(update) for update in range(at(5), at(50) + 1)]
    assert falling == sorted(falling, reverse=True)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("cosine", {}),
        ("linear", {}),
        ("polynomial", {"power": 0.9}),
        ("cosine_with_restarts", {"num_cycles": 3}),
        ("constant_with_warmup", {}),
    ],
)
def test_a_rate_falls_as_the_scheduler_of_that_name_in_transformers(kind, options):
    """The name is taken from there, and with it what people expect."""
    rate = recipe(lr_scheduler_type=kind, lr_scheduler_kwargs=options, min_learning_rate=0).rate("")
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    more = {"lr_end": 0.0} if kind == "polynomial" else {}
    own = get_scheduler(kind, optimizer, at(5), at(50), options | more)
    for step in range(at(50) + 1):
        assert rate(step) == pytest.approx(own.get_last_lr()[0], abs=1e-9), step
        optimizer.step()
        own.step()


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "to be one of cosine, linear, "),
        ({"lr_scheduler_kwargs": {"power": 2.0}}, "kwargs of cosine as none"),
        ({"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": "{"}, "an object of power"),
        (
            {
                "lr_scheduler_type": "cosine_with_restarts",
                "lr_scheduler_kwargs": {"num_cycles": 0.5},
            },
            "as a whole number above 0",
        ),
    ],
)
def test_a_shape_that_cannot_be_followed_is_refused(changes, match):
    """A rate that depends on figures is no function of the step, and could not be resumed."""
    with pytest.raises(ValueError, match=match):
        recipe(**changes)


def test_rate_of_a_frozen_unit_is_zero_and_then_that_of_all_others():
    """Weight decay and momentum would move a unit that is frozen in name only."""
    table = recipe()
    decoder = table.rate("decoder")
    for unit in range(7):
        rate, start = table.rate(f"unit_{unit}"), table.free_from(f"unit_{unit}")
        assert rate(at(start) - 1) == 0.0
        assert rate(at(start)) == decoder(at(start)) > 0
        assert rate(at(50)) == decoder(at(50))


def test_freed_unit_ramps_up_if_asked_to():
    """The optional ramp must neither touch the decoder nor last for ever."""
    table = recipe(unfreeze_warmup_epochs=2.0)
    rate, decoder = table.rate("unit_6"), table.rate("decoder")
    assert rate(at(5)) == 0.0
    assert rate(at(6)) == pytest.approx(0.5 * decoder(at(6)))
    assert rate(at(7)) == pytest.approx(decoder(at(7)))
    assert decoder(at(6)) == recipe().rate("decoder")(at(6))


def test_ramp_does_not_hold_back_what_was_never_frozen(tmp_path: Path):
    """A unit that is free from epoch 0 has the warm-up already."""
    args = arguments(tmp_path, unfreeze_warmup_epochs=1.0)
    table = args.schedule(4, 2, UPDATES)
    assert table.rate("unit_3")(at(0.5)) == table.rate("decoder")(at(0.5)) > 0


def test_temperature_per_step_reaches_both_ends():
    """Per step the last update, not the one after it, has the last temperature."""
    table = recipe(temperature_per="step", temperature_schedule="linear")
    values = [table.temperature(update) for update in range(at(50))]
    assert values[0] == 4.0
    assert values[-1] == pytest.approx(1.0)
    assert len(set(values)) == at(50)
    assert values == sorted(values, reverse=True)
    assert table.temperature(at(50)) == pytest.approx(1.0)


@pytest.mark.parametrize("per", ["epoch", "step"])
def test_run_of_one_update_has_the_first_temperature(tmp_path: Path, per: str):
    """A progress of 0/0 is an error at the very end of somebody's set-up."""
    args = arguments(tmp_path, temperature_per=per, warmup_epochs=0)
    table = args.schedule(4, 1 / UPDATES, UPDATES)
    assert table.temperature(0) == 4.0
    assert table.rate("decoder")(0) == 1.0


def test_warm_up_longer_than_the_run_is_cut_to_the_run(tmp_path: Path):
    """`--epochs 2` of the recipe must not divide by a negative rest."""
    table = arguments(tmp_path, warmup_epochs=5).schedule(4, 2, UPDATES)
    rate = table.rate("decoder")
    assert rate(at(1)) == pytest.approx(0.5)
    assert 0 < rate(at(2)) <= 1


@pytest.mark.parametrize(
    ("epochs", "freed", "warmup"),
    [(50, 7, False), (24, 7, False), (23, 6, False), (9, 2, True), (5, 0, True), (2.5, 0, True)],
)
def test_a_run_too_short_for_its_plan_is_a_note_with_the_flag_that_scales_it(epochs, freed, warmup):
    """Five epochs of the recipe trained the decoder alone, in a warm-up, without a word."""
    args = build(load_recipe(COSINE)).training
    found = plan_finding(args.schedule(7, epochs))
    if freed == 7:
        assert found.grade == Grade.OK
        return
    assert found.grade == Grade.NOTE
    assert f"{freed or 'none'} of 7 encoder units become free" in found.text
    assert ("warms up" in found.text) is warmup
    assert "--plan_epochs" in found.cure
    assert "50 here" in found.cure


@pytest.mark.parametrize("epochs", [5, 8, 2.5, 100])
def test_a_scaled_plan_frees_every_unit_and_warms_up_for_its_tenth(epochs):
    """Scaled rates beside units that are freed as written would train parts that stay frozen."""
    args = build(load_recipe(COSINE) | {"plan_epochs": 50}).training
    table = args.schedule(7, epochs, 100)
    assert plan_finding(table).grade == Grade.OK
    assert table.free_units(0) == 0
    rate = table.rate("decoder")
    assert rate(round(epochs * 100 * 0.05)) == pytest.approx(0.5, abs=0.05)
    assert rate(round(epochs * 100 * 0.1)) == pytest.approx(1.0, abs=0.01)
    for unit in range(7):
        start = table.free_from(f"unit_{unit}")
        assert table.free_units(start) >= 7 - unit > table.free_units(start - 1)


@pytest.mark.parametrize("epochs", [1.5, 0.25, 3])
def test_the_plan_of_a_fractional_last_epoch_is_that_of_its_part(epochs: float):
    """The middle of a whole epoch lies behind the end of the run, where the rate has fallen."""
    args = build(load_recipe(COSINE) | {"warmup_epochs": 0, "num_train_epochs": epochs}).training
    rows = timeline(tiny_student(), args, epochs)
    assert len(rows) == math.ceil(epochs)
    last = len(rows) - 1
    middle = args.schedule(7, epochs).rate_at((last + epochs) / 2)
    assert rows[-1]["decoder_lr_now"] == pytest.approx(1e-4 * middle)
    assert rows[-1]["decoder_lr_now"] > args.min_learning_rate


@pytest.mark.parametrize("drop_last", [True, False])
def test_the_plan_counts_updates_as_a_training_does(drop_last: bool, tmp_path: Path):
    """With a short last batch that is kept, an epoch has one update more."""
    args = arguments(tmp_path, num_train_epochs=2, dataloader_drop_last=drop_last)
    trainer = DistillationTrainer(tiny_student(), args, train_dataset=Squares(5))
    trainer.train()
    assert steps_per_epoch(5, args) == (2 if drop_last else 3)
    assert trainer.state.max_steps == 2 * steps_per_epoch(5, args)


def test_the_plan_says_what_the_warm_up_makes_of_the_first_rates():
    """The recipe as it was written starts with its base rates; five slower epochs are ours."""
    (line,) = warmup_line(recipe(), 1e-4)
    assert "warm up for 5 epochs, an addition to the recipe" in line
    assert "is 1e-05, and 0.0001 with --warmup_epochs 0" in line
    assert warmup_line(recipe(warmup_epochs=0), 1e-4) == []
