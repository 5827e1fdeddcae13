"""What holds for the loss terms of any logits: signs, zeros, bounds, and what has no influence."""

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from kd_trainer.losses import LossTerms, distillation_terms

IGNORE = 255
SEEDS = st.integers(0, 2**31 - 1)
CHANNELS = st.sampled_from([1, 2, 3, 5])
SCALES = st.sampled_from([1e-3, 0.1, 1.0, 8.0, 60.0])
TEMPERATURES = st.floats(0.25, 8)
Drawn = tuple[Tensor, Tensor, Tensor]


def draw(seed: int, channels: int, scale: float, ignored: float = 0.3) -> Drawn:
    """Student and teacher logits (2, K, 4, 5) in float64 and labels, some of them ignored."""
    random = torch.Generator().manual_seed(seed)
    shape = (2, channels, 4, 5)
    student, teacher = (
        torch.randn(shape, generator=random, dtype=torch.float64) * scale for _ in range(2)
    )
    labels = torch.randint(0, max(channels, 2), (2, 4, 5), generator=random)
    labels[torch.rand(labels.shape, generator=random) < ignored] = IGNORE
    return student, teacher, labels


def values(terms: LossTerms) -> dict[str, float]:
    return {name: float(term.detach()) for name, term in terms.named().items()}


@given(SEEDS, CHANNELS, SCALES, TEMPERATURES)
def test_no_term_is_negative_and_dice_is_at_most_one(seed, channels, scale, temperature):
    """A negative divergence or a Dice above 1 is a sign that some mean went wrong."""
    found = values(distillation_terms(*draw(seed, channels, scale), temperature=temperature))
    assert set(found) == {"kl", "mse", "bce", "dice"}
    assert all(math.isfinite(value) and value >= -1e-12 for value in found.values())
    assert found["dice"] <= 1


@given(SEEDS, CHANNELS, SCALES, TEMPERATURES)
def test_kl_and_mse_are_zero_for_equal_logits_and_for_those_alone(
    seed, channels, scale, temperature
):
    """Zero elsewhere would teach nothing there; above zero here would push a perfect student."""
    student, teacher, labels = draw(seed, channels, scale, ignored=0.0)
    same = values(distillation_terms(teacher, teacher, labels, temperature=temperature))
    assert same["kl"] == pytest.approx(0, abs=1e-12)
    assert same["mse"] == 0
    # Softmax distributions do not know a constant on all channels, and neither do these terms.
    gap = student - teacher
    gap = gap if channels == 1 else gap - gap.mean(dim=1, keepdim=True)
    assume(scale <= 8 and gap.abs().max() > 1e-4)  # else both sides are sure, to the last bit
    other = values(distillation_terms(student, teacher, labels, temperature=temperature))
    assert other["kl"] > 0
    assert other["mse"] > 0


@given(SEEDS, CHANNELS, SCALES, TEMPERATURES)
def test_the_order_of_pixels_and_of_pictures_does_not_matter(seed, channels, scale, temperature):
    """A term that knows where a pixel lies has mixed up an axis."""
    student, teacher, labels = draw(seed, channels, scale)
    before = values(distillation_terms(student, teacher, labels, temperature=temperature))
    random = torch.Generator().manual_seed(seed)
    pixels = torch.randperm(20, generator=random)
    moved = [
        t.flatten(-2)[..., pixels].reshape(t.shape)[[1, 0]] for t in (student, teacher, labels)
    ]
    after = values(distillation_terms(*moved, temperature=temperature))
    assert after == pytest.approx(before, rel=1e-9, abs=1e-12)


@given(SEEDS, CHANNELS, SCALES, st.sampled_from([0.0, -7.5, 1e30, float("inf"), float("nan")]))
def test_pixels_that_do_not_count_change_no_bit_of_value_or_gradient(seed, channels, scale, filler):
    """A network's answer on ignored pixels is arbitrary, and may be NaN."""
    student, teacher, labels = draw(seed, channels, scale)
    assume(0 < int((labels == IGNORE).sum()) < labels.numel())
    outside = (labels == IGNORE).unsqueeze(1)
    results = []
    for value in (0.25, filler):
        own, guide = (torch.where(outside, value, t) for t in (student, teacher))
        own.requires_grad_()
        terms = distillation_terms(own, guide, labels, temperature=2.0).named()
        gradients = [torch.autograd.grad(t, own, retain_graph=True)[0] for t in terms.values()]
        results.append([*(t.detach() for t in terms.values()), *gradients])
        zeros = [g[outside.expand_as(g)] for g in gradients]
        assert all((z == 0).all() for z in zeros)
    assert all(a.equal(b) for a, b in zip(*results, strict=True))


@given(SEEDS, CHANNELS, SCALES, TEMPERATURES)
def test_pixelwise_terms_of_parts_average_to_the_whole_by_their_pixels(
    seed, channels, scale, temperature
):
    """Means of means would weigh a pixel of a small part more."""
    student, teacher, labels = draw(seed, channels, scale)
    counts = [int((labels[b] != IGNORE).sum()) for b in range(2)]
    assume(all(counts))
    whole = values(distillation_terms(student, teacher, labels, temperature=temperature))
    parts = [
        values(
            distillation_terms(
                student[b : b + 1], teacher[b : b + 1], labels[b : b + 1], temperature=temperature
            )
        )
        for b in range(2)
    ]
    for name in ("kl", "mse", "bce"):
        mean = sum(c * part[name] for c, part in zip(counts, parts, strict=True)) / sum(counts)
        assert whole[name] == pytest.approx(mean, rel=1e-9, abs=1e-12)
    assert whole["dice"] == pytest.approx((parts[0]["dice"] + parts[1]["dice"]) / 2, abs=1e-12)


@given(SEEDS, SCALES, TEMPERATURES)
def test_swapping_the_two_classes_of_one_logit_changes_neither_kl_nor_mse_nor_bce(
    seed, scale, temperature
):
    """-z is the logit of the other class; only Dice prefers the foreground."""
    student, teacher, labels = draw(seed, 1, scale)
    swapped = torch.where(labels == IGNORE, IGNORE, 1 - labels)
    before = values(distillation_terms(student, teacher, labels, temperature=temperature))
    after = values(distillation_terms(-student, -teacher, swapped, temperature=temperature))
    for name in ("kl", "mse", "bce"):
        assert after[name] == pytest.approx(before[name], rel=1e-9, abs=1e-12)


@given(SEEDS, CHANNELS, st.sampled_from([0.1, 1.0, 8.0]))
def test_a_step_along_the_gradient_comes_nearer_to_the_teacher(seed, channels, scale):
    """A wrong sign of one term hides behind the others in a training."""
    student, teacher, labels = draw(seed, channels, scale)
    assume(bool((labels != IGNORE).any()))
    for name in ("kl", "mse", "bce", "dice"):
        own = student.clone().requires_grad_()
        term = distillation_terms(own, teacher, labels, temperature=2.0).named()[name]
        (gradient,) = torch.autograd.grad(term, own)
        if gradient.norm() < 1e-9:
            continue
        step = own.detach() - 1e-4 * gradient / gradient.norm()
        after = distillation_terms(step, teacher, labels, temperature=2.0).named()[name]
        assert after < term
