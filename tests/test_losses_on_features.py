"""The terms on feature maps against float64 numpy written from the formulas; what changes none."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from kd_trainer.losses import TERMS, ComparedMaps, LossWeights, feature_terms, pooled_mask
from kd_trainer.losses.features import MaskedGenerator

NAMES = ("fitnet", "at", "feature_cwd", "mgd")
EVERY = pytest.mark.parametrize("name", NAMES)


def draw(size=(6, 4), channels=(3, 5), *, batch=3, seed=0) -> list[ComparedMaps]:
    """Maps of two stages, positive on average as behind a ReLU, with masks of some cells."""
    random = torch.Generator().manual_seed(seed)
    found = []
    for count in channels:
        maps = torch.randn(2, batch, count, *size, generator=random, dtype=torch.float64) + 0.5
        mask = torch.rand(batch, *size, generator=random) < 0.7
        found.append(ComparedMaps(maps[0], maps[1], mask))
    return found


def value(name: str, features: list[ComparedMaps]) -> Tensor:
    return feature_terms({name: features})[name]


def distance_of_directions(one, other):
    return np.sum((one / np.sqrt(np.sum(one**2)) - other / np.sqrt(np.sum(other**2))) ** 2)


def of_one_image(name, student, teacher, mask):
    """A term of maps (C, h, w), cell by cell: (C, N) of the cells that count."""
    s, t = student[:, mask], teacher[:, mask]
    if name == "fitnet":
        return distance_of_directions(s, t)
    if name == "at":
        return distance_of_directions((s**2).mean(axis=0), (t**2).mean(axis=0))
    if name == "mgd":
        return np.sum((s - t) ** 2) / np.sum(t**2)
    divergences = []
    for u, v in zip(s, t, strict=True):
        p, q = (np.exp(z / 4) / np.sum(np.exp(z / 4)) for z in (u, v))
        divergences.append(16 * np.sum(q * np.log(q / p)))
    return np.mean(divergences)


def reference(name, features):
    return sum(
        np.mean(
            [of_one_image(name, *image) for image in zip(*(x.numpy() for x in one), strict=True)]
        )
        for one in features
    )


@EVERY
@pytest.mark.parametrize("size", [(6, 4), (12, 8)])
def test_each_term_equals_the_formula_in_numpy(name: str, size: tuple[int, int]):
    """A wrong norm or divisor would only shift the balance of the terms."""
    features = draw(size)
    assert value(name, features).item() == pytest.approx(reference(name, features), rel=1e-10)


@EVERY
def test_cells_outside_the_mask_have_no_influence(name: str):
    """Padding would be taught otherwise; multiplied by 0, a NaN there would stay one."""
    features = draw()
    spoiled = []
    for student, teacher, mask in features:
        hidden = ~mask.unsqueeze(1)
        student = torch.where(hidden, torch.nan, student).requires_grad_()
        spoiled.append(ComparedMaps(student, torch.where(hidden, torch.inf, teacher), mask))
    found = value(name, spoiled)
    assert found.item() == value(name, features).item()
    gradients = torch.autograd.grad(found, [student for student, _, _ in spoiled])
    for gradient, (_, _, mask) in zip(gradients, spoiled, strict=True):
        assert gradient.isfinite().all()
        assert not gradient[~mask.unsqueeze(1).expand_as(gradient)].any()
        assert gradient.any()


@EVERY
def test_an_image_without_a_cell_that_counts_adds_nothing(name: str):
    """0/0 would make the whole loss NaN: all of an image may be padding."""
    features = draw()
    hidden = [ComparedMaps(s, t, m & (torch.arange(3) != 1)[:, None, None]) for s, t, m in features]
    kept = [ComparedMaps(*(x[[0, 2]] for x in one)) for one in features]
    assert value(name, hidden).item() == pytest.approx(2 / 3 * value(name, kept).item())


@EVERY
def test_the_size_of_the_maps_does_not_matter(name: str):
    """Else a weight found at one image size would be wrong at another."""
    features = draw()
    larger = [
        ComparedMaps(*(x.repeat_interleave(2, -1).repeat_interleave(2, -2) for x in one))
        for one in features
    ]
    assert value(name, larger).item() == pytest.approx(value(name, features).item(), rel=1e-10)


@EVERY
def test_gradients_are_those_of_the_values_and_flow_into_the_student_alone(name: str):
    """A teacher with a gradient would be trained towards the student."""
    ((_, teacher, mask),) = draw((3, 2), (2,), batch=2)
    teacher = teacher.detach()
    student = draw((3, 2), (2,), batch=2, seed=1)[0].student.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda s: value(name, [ComparedMaps(s, teacher, mask)]), student, atol=1e-7
    )


@EVERY
def test_equal_maps_cost_nothing(name: str):
    features = [ComparedMaps(t, t, m) for _, t, m in draw()]
    assert value(name, features).item() == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("name", ["fitnet", "at"])
def test_the_scale_of_maps_does_not_matter_to_directions(name: str):
    """The activations of two networks have scales of their own."""
    features = draw()
    scaled = [ComparedMaps(3 * s, 0.1 * t, m) for s, t, m in features]
    assert value(name, scaled).item() == pytest.approx(value(name, features).item(), rel=1e-10)


def test_a_cell_counts_where_half_of_its_pixels_do():
    mask = torch.zeros(1, 4, 6, dtype=torch.bool)
    mask[0, :2, :2] = True  # the whole first cell, half of the second, a quarter of the third
    mask[0, 0, 2:4] = True
    mask[0, 0, 4] = True
    assert pooled_mask(mask, (2, 3))[0].tolist() == [[True, True, False], [False] * 3]
    assert pooled_mask(mask, (4, 6)) is mask


def test_the_generator_sees_a_quarter_of_the_cells_and_draws_them_anew():
    """With all of them shown it would be a regression of the student's map."""
    head = MaskedGenerator(3, 4)
    shown: list[Tensor] = []
    head.generation[0].register_forward_pre_hook(lambda _, inputs: shown.append(inputs[0]))
    maps = torch.ones(2, 3, 40, 40)
    torch.manual_seed(0)
    head(maps), head(maps)
    shares = [float((one != 0).all(dim=1).float().mean()) for one in shown]
    assert shares == pytest.approx([0.25, 0.25], abs=0.03)
    assert not torch.equal(shown[0] != 0, shown[1] != 0)
    assert not torch.equal(shown[0][0] != 0, shown[0][1] != 0)  # of each image its own


def test_terms_on_features_follow_a_teacher_and_are_off_unless_asked_for():
    assert LossWeights().feature_terms == []
    weights = LossWeights(kl=0.5, at=2.0, mgd=1.0)
    assert weights.feature_terms == ["at", "mgd"]
    assert weights.without_features() == LossWeights(kl=0.5)
    assert weights.without_teacher() == LossWeights()
    assert [term.name for term in TERMS if term.on_features] == list(NAMES)
