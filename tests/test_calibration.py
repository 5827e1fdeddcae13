"""Reliability: every valid pixel in its bin, and the error that follows from the bins."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from kd_trainer.reports.calibration import Reliability, reliability_counts


@pytest.mark.parametrize("channels", [1, 4])
def test_reliability_is_that_of_an_independent_count(channels: int):
    """A calibration error is one number that nobody can check by looking."""
    draw = np.random.default_rng(channels)
    logits = draw.normal(0, 3, (3, channels, 16, 16))
    labels = draw.integers(0, max(channels, 2), (3, 16, 16))
    labels[draw.random(labels.shape) < 0.2] = 255
    total = Reliability.zero()
    for part in (slice(0, 2), slice(2, 3)):
        batch = torch.tensor(logits[part]), torch.tensor(labels[part])
        total = total.add(reliability_counts(*batch, ignore_index=255))

    if channels == 1:
        foreground = 1 / (1 + np.exp(-logits[:, 0]))
        chances = np.stack([1 - foreground, foreground], axis=1)
    else:
        powers = np.exp(logits)
        chances = powers / powers.sum(axis=1, keepdims=True)
    valid = labels != 255
    sure, right = chances.max(axis=1)[valid], (chances.argmax(axis=1) == labels)[valid]
    edges = np.linspace(0, 1, 16)
    pixels, _ = np.histogram(sure, edges)
    assert (total.counts[0] == pixels).all()
    assert (total.counts[2] == np.histogram(sure, edges, weights=right.astype(float))[0]).all()
    expected, points = 0.0, []
    for low, high in pairwise(edges):
        inside = (sure >= low) & ((sure < high) | (high == 1))
        if inside.any():
            points.append((sure[inside].mean(), right[inside].mean()))
            expected += inside.mean() * abs(sure[inside].mean() - right[inside].mean())
    assert total.error == pytest.approx(expected, abs=1e-6)
    assert total.gap == pytest.approx(sure.mean() - right.mean(), abs=1e-6)
    assert np.array(total.points()) == pytest.approx(np.array(points), abs=1e-6)
    assert sum(share for _, share in total.shares()) == pytest.approx(1)


def test_reliability_of_the_sure_and_of_nothing():
    """A confidence of exactly 1 belongs to the last bin, not to one after it."""
    logits, labels = torch.tensor([[[[40.0, -40.0]]]]), torch.tensor([[[1, 1]]])
    sure = Reliability.zero().add(reliability_counts(logits, labels, ignore_index=255))
    assert sure.counts[0].tolist() == [0.0] * 14 + [2.0]
    assert sure.error == pytest.approx(0.5)
    nothing = reliability_counts(logits, torch.full_like(labels, 255), ignore_index=255)
    assert math.isnan(Reliability.zero().add(nothing).error)
    assert Reliability.zero().points() == []
