"""What a report looks at: which images it shows, and how far student and teacher are apart."""

import math

import numpy as np
import pytest
import torch

from kd_trainer.commands.shown_images import choose, probability_difference
from kd_trainer.reports.panels import FALSE_NEGATIVE, FALSE_POSITIVE, difference_map


@pytest.mark.parametrize("count", [0, 1, 2, 3, 5, 6, 9, 40])
def test_chosen_images_are_the_best_the_worst_and_those_between(count: int):
    """The images shown decide what a reader thinks of the student."""
    ious = np.random.default_rng(count).permutation(np.linspace(0.1, 0.9, 17))
    ious[[3, 8]] = np.nan
    chosen = choose(ious, count)
    groups: dict[str, list[float]] = {"best": [], "median": [], "worst": []}
    for group, index in chosen:
        groups[group].append(ious[index])
    numbers = [index for _, index in chosen]
    assert len(set(numbers)) == len(numbers) == min(count, 15)
    ordered = sorted(ious[~np.isnan(ious)])
    assert groups["worst"] == ordered[: len(groups["worst"])]
    assert groups["best"] == ordered[::-1][: len(groups["best"])]
    assert max(map(len, groups.values())) - min(map(len, groups.values())) <= 1
    if groups["median"] and count < 15:
        middle = (np.searchsorted(ordered, groups["median"]) + 0.5).mean()
        assert middle == pytest.approx(len(ordered) / 2, abs=1)


def test_difference_to_the_teacher_has_the_sign_of_the_student():
    """With the colours swapped a student that finds too much looks too shy."""
    student, teacher = torch.tensor([[[[5.0, -5.0, 0.0]]]]), torch.tensor([[[[-5.0, 5.0, 0.0]]]])
    difference = probability_difference(student, teacher)
    sigmoid = 1 / (1 + math.exp(-5))
    wanted = [2 * sigmoid - 1, 1 - 2 * sigmoid, 0.0]
    assert difference[0, 0].tolist() == pytest.approx(wanted, abs=1e-6)
    grey = np.full((1, 3, 3), 100, np.uint8)
    picture = difference_map(grey, np.array([[1.0, -1.0, 0.0]]))
    assert tuple(picture[0, 0]) == FALSE_POSITIVE
    assert tuple(picture[0, 1]) == FALSE_NEGATIVE
    assert len(set(picture[0, 2].tolist())) == 1


def test_difference_of_several_classes_is_the_total_variation():
    """The distance has to be 1 for certain networks of different opinion, and 0 for equal ones."""
    logits = torch.tensor([[50.0, 0, 0], [0, 50.0, 0]]).view(2, 3, 1, 1)
    assert probability_difference(logits, logits).max() == 0
    assert probability_difference(logits, logits.flip(0)).flatten().tolist() == pytest.approx(
        [1, 1]
    )
    draw = np.random.default_rng(0)
    raw = draw.normal(0, 2, (2, 3))
    chances = np.exp(raw) / np.exp(raw).sum(axis=1, keepdims=True)
    maps = [torch.tensor(r).view(1, 3, 1, 1) for r in raw]
    wanted = np.abs(chances[0] - chances[1]).sum() / 2
    assert probability_difference(*maps).item() == pytest.approx(wanted, abs=1e-6)
