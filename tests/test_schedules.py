"""The recipe's tables of temperature and free units, and what the schedules refuse."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kd_trainer.schedules import (
    TEMPERATURE_KINDS,
    TemperatureSchedule,
    UnfreezeSchedule,
    epoch_progress,
)

# The second recipe: temperatures by epoch index, written out in the recipe's timeline.
TIMELINE = ((0, 4.0), (4, 3.6), (7, 3.2), (10, 2.9), (13, 2.5), (16, 2.2), (19, 1.9), (22, 1.6),
            (49, 1.0))  # fmt: skip
# 2.5 + 1.5·cos(π·epoch/49), to three digits.
COSINE = {0: 4.0, 7: 3.851, 14: 3.435, 21: 2.834, 24: 2.548, 25: 2.452, 28: 2.166, 35: 1.565,
          42: 1.149, 49: 1.0}  # fmt: skip
UNFREEZING = {0: 0, 4: 0, 5: 1, 7: 1, 8: 2, 11: 3, 14: 4, 17: 5, 20: 6, 22: 6, 23: 7, 49: 7}


def piecewise(points=TIMELINE):
    return TemperatureSchedule("piecewise", points[0][1], points[-1][1], points)


def test_the_recipe_s_cosine_over_fifty_epochs():
    """A divisor of 50 instead of 49 never reaches 1.0; a full period would return to 4.0."""
    schedule = TemperatureSchedule("cosine", 4.0, 1.0)
    got = {epoch: schedule(epoch_progress(epoch, 50)) for epoch in COSINE}
    assert got == pytest.approx(COSINE, abs=6e-4)
    assert (got[0], got[49]) == (4.0, 1.0)


def test_the_timeline_s_temperatures_by_epoch():
    """The table of the recipe, and straight lines between its rows."""
    schedule = piecewise()
    got = {epoch: schedule(epoch_progress(epoch, 50)) for epoch, _ in TIMELINE}
    assert got == pytest.approx(dict(TIMELINE), abs=1e-12)
    assert schedule(epoch_progress(2, 50)) == pytest.approx(3.8)
    assert schedule(epoch_progress(35, 50)) == pytest.approx(1.6 - 0.6 * 13 / 27)


def test_piecewise_positions_scale_with_the_run():
    """A run of 25 epochs passes the same temperatures at half the epochs."""
    assert piecewise()(epoch_progress(12, 25)) == pytest.approx(piecewise()(24.5 / 49))


@pytest.mark.parametrize(
    ("kind", "middle"), [("cosine", 2.5), ("linear", 2.5), ("exponential", 2.0), ("constant", 4.0)]
)
def test_each_kind_starts_ends_and_passes_the_middle_where_its_name_says(kind, middle):
    """Cosine and linear agree in the middle, so the quarter is looked at as well."""
    schedule = TemperatureSchedule(kind, 4.0, 1.0)
    assert schedule(0.0) == 4.0
    assert schedule(0.5) == pytest.approx(middle)
    assert schedule(1.0) == pytest.approx(4.0 if kind == "constant" else 1.0)
    quarter = {"cosine": 2.5 + 1.5 * math.sqrt(0.5), "linear": 3.25, "exponential": 4**0.75}
    assert schedule(0.25) == pytest.approx(quarter.get(kind, 4.0))


@pytest.mark.parametrize("kind", TEMPERATURE_KINDS)
def test_a_run_of_one_epoch_has_the_start_temperature(kind):
    """Epochs − 1 is 0 there."""
    schedule = piecewise() if kind == "piecewise" else TemperatureSchedule(kind, 3.0, 1.0)
    assert schedule(epoch_progress(0, 1)) == schedule.start


@given(
    kind=st.sampled_from([kind for kind in TEMPERATURE_KINDS if kind != "piecewise"]),
    start=st.floats(0.1, 50),
    end=st.floats(0.1, 50),
    progress=st.floats(-2, 3),
)
def test_temperatures_stay_between_start_and_end(kind, start, end, progress):
    """Beyond the end of a run a cosine would rise again and a line fall below zero."""
    low, high = sorted((start, end))
    temperature = TemperatureSchedule(kind, start, end)(progress)
    assert low * (1 - 1e-12) <= temperature <= high * (1 + 1e-12)


def test_temperatures_are_held_beyond_both_ends():
    """The last log of a run may lie a step behind it."""
    for schedule in (TemperatureSchedule("linear", 4.0, 1.0), piecewise()):
        assert (schedule(-0.5), schedule(1.02)) == (4.0, 1.0)


def test_points_from_yaml_make_an_equal_and_hashable_schedule():
    """Lists would compare unequal to the recipe's tuples and could be changed behind its back."""
    from_yaml = TemperatureSchedule("piecewise", 4.0, 1.0, [list(point) for point in TIMELINE])
    assert from_yaml == piecewise()
    assert hash(from_yaml) == hash(piecewise())


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (("cosin", 4.0, 1.0), "got 'cosin'. Did you mean 'cosine'"),
        (("nothing", 4.0, 1.0), "got 'nothing'. Choose one of them"),
        (("Linear", 4.0, 1.0), "Did you mean 'linear'"),
        (("cosine", 0.0, 1.0), "temperature start > 0, got 0.0"),
        (("cosine", 4.0, -1.0), "temperature end > 0, got -1.0"),
        (("cosine", math.nan, 1.0), "temperature start > 0, got nan"),
        (("cosine", 4.0, 1.0, TIMELINE), "no points for the cosine schedule, got 9"),
        (("piecewise", 4.0, 1.0), "at least two points"),
        (("piecewise", 4.0, 4.0, ((0, 4.0),)), "at least two points"),
        (("piecewise", 4.0, 1.0, ((1, 4.0), (9, 1.0))), "rising from 0"),
        (("piecewise", 4.0, 1.0, ((0, 4.0), (5, 2.0), (5, 1.5), (9, 1.0))), "rising from 0"),
        (("piecewise", 4.0, 1.0, ((0, 4.0), (math.inf, 1.0))), "rising from 0"),
        (("piecewise", 4.0, 1.0, ((0, 4.0), (5, 0.0), (9, 1.0))), "at position 5 > 0, got 0"),
        (("piecewise", 5.0, 1.0, TIMELINE), "from start 5 to end 1, got 4 to 1"),
        (("piecewise", 4.0, 0.5, TIMELINE), "from start 4 to end 0.5, got 4 to 1"),
    ],
)
def test_a_schedule_that_makes_no_sense_is_refused_at_once(arguments, match):
    """Found at epoch 30 it would have cost a night."""
    with pytest.raises(ValueError, match=match):
        TemperatureSchedule(*arguments)


def test_progress_must_be_a_number():
    """NaN compares false with everything and would come out as some temperature."""
    with pytest.raises(ValueError, match="finite progress, got nan"):
        TemperatureSchedule("linear", 4.0, 1.0)(math.nan)


@pytest.mark.parametrize(("epoch", "epochs"), [(-1, 5), (0, 0)])
def test_epochs_are_counted_from_zero(epoch, epochs):
    """A negative progress would be held at the start without a word."""
    with pytest.raises(ValueError, match="Epochs are counted from 0"):
        epoch_progress(epoch, epochs)


def test_the_recipe_s_unfreezing_table():
    """Off by one, the deepest unit would be free at the 5th epoch or the last one never."""
    schedule = UnfreezeSchedule(start_epoch=5, every=3, units=7)
    assert {epoch: schedule(epoch) for epoch in UNFREEZING} == UNFREEZING
    assert [schedule.first_free_epoch(rank) for rank in range(7)] == [5, 8, 11, 14, 17, 20, 23]


@given(st.integers(0, 20), st.integers(0, 6), st.integers(1, 12), st.integers(0, 60))
def test_both_directions_of_the_unfreezing_schedule_agree(start, every, units, epoch):
    """Learning rates read one direction and `requires_grad` the other."""
    schedule = UnfreezeSchedule(start, every, units)
    free = sum(schedule.first_free_epoch(rank) <= epoch for rank in range(units))
    assert schedule(epoch) == free


def test_every_zero_frees_all_units_at_the_start_epoch():
    """It is how an encoder trains whole, from epoch 0 or from a later one."""
    assert UnfreezeSchedule(0, 0, 7)(0) == 7
    assert [UnfreezeSchedule(2, 0, 4)(epoch) for epoch in range(4)] == [0, 0, 4, 4]


@pytest.mark.parametrize("name", ["start_epoch", "every", "units"])
def test_an_unfreezing_schedule_counts_whole_epochs_from_zero(name):
    """A fractional epoch would free a unit in the middle of one, on some ranks."""
    good = {"start_epoch": 5, "every": 3, "units": 7}
    with pytest.raises(ValueError, match=f"{name} >= 0, got -1"):
        UnfreezeSchedule(**good | {name: -1})
    with pytest.raises(TypeError, match=f"integer {name}, got 2.5"):
        UnfreezeSchedule(**good | {name: 2.5})


@pytest.mark.parametrize("rank", [-1, 7])
def test_a_unit_that_does_not_exist_has_no_first_epoch(rank):
    """Rank 7 of 7 units would get a plausible epoch."""
    with pytest.raises(ValueError, match=f"unit rank from 0 to 6, got {rank}"):
        UnfreezeSchedule(5, 3, 7).first_free_epoch(rank)
