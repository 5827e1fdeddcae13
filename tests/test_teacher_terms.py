"""CWD, DIST, DKD and the boundary KL against float64 numpy written from the papers' formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.ndimage import maximum_filter, minimum_filter
from scipy.special import expit, log_softmax, rel_entr, softmax
from scipy.stats import pearsonr
from test_losses import draw

from kd_trainer.config import parse
from kd_trainer.losses import TERMS, LossWeights, distillation_terms

IGNORE = 255
NEW = ("cwd", "dist_intra", "dist_inter", "dkd", "boundary_kl")
TITLES = {term.name: term for term in TERMS}


def named(channels: int) -> list[str]:
    """Of the new terms those that teach so many logits."""
    return [name for name in NEW if TITLES[name].function(channels)]


def terms_of(student, teacher, labels, name, **options):
    options = {"temperature": 2.5} | options
    weights = LossWeights(**{name: 1.0})
    return getattr(distillation_terms(student, teacher, labels, weights=weights, **options), name)


def probabilities(logits):
    """Of one image (K, H, W): of one logit the foreground's."""
    return expit(logits) if len(logits) == 1 else softmax(logits, axis=0)


def two(logits):
    """One logit as two of a softmax."""
    return np.concatenate([np.zeros_like(logits), logits]) if len(logits) == 1 else logits


def reference(student, teacher, labels, mask, temperature):
    """Each term, pixel by pixel and map by map."""
    s, t, y, m = (x.numpy() for x in (student, teacher, labels, mask))
    channels = s.shape[1]
    images = [i for i in range(len(s)) if m[i].any()]
    found = {name: [] for name in NEW}
    bands, divergences = [], []
    for i in images:
        for k in range(channels):
            p, q = (softmax(x[i, k][m[i]] / 4) for x in (s, t))
            found["cwd"].append(16 * rel_entr(q, p).sum())
            maps = [probabilities(x[i])[k][m[i]] for x in (s, t)]
            found["dist_intra"].append(1 - pearsonr(*maps).statistic)
        teacher_class = two(t[i]).argmax(axis=0)
        classes = np.where(y[i] == IGNORE, teacher_class, y[i])
        p, q = (softmax(two(x[i]) / temperature, axis=0) for x in (s, t))
        high = maximum_filter(np.where(m[i], classes, -1), 7, mode="constant", cval=-1)
        low = minimum_filter(np.where(m[i], classes, 99), 7, mode="constant", cval=99)
        bands.append((1 + 4 * (high != low))[m[i]])
        divergences.append(rel_entr(q, p).sum(axis=0)[m[i]])
        for row, column in zip(*np.nonzero(m[i]), strict=True):
            if channels < 3:
                continue
            sharp = [softmax(x[i, :, row, column]) for x in (s, t)]
            found["dist_inter"].append(1 - pearsonr(*sharp).statistic)
            target = classes[row, column]
            logs = [x[i, :, row, column] / temperature for x in (s, t)]
            of_target = [softmax(z)[target] for z in logs]
            pair = [np.array([one, 1 - one]) for one in of_target]
            rest = [np.exp(log_softmax(np.delete(z, target))) for z in logs]
            value = rel_entr(pair[1], pair[0]).sum() + 8 * rel_entr(rest[1], rest[0]).sum()
            found["dkd"].append(temperature**2 * value)
    weights, values = np.concatenate(bands), np.concatenate(divergences)
    assert 1 < weights.mean() < 5  # some of both
    means = {name: np.mean(parts) for name, parts in found.items() if parts}
    return means | {"boundary_kl": temperature**2 * (weights * values).sum() / weights.sum()}


def drawn(channels, size, seed=0):
    """Logits, large patches as labels, and a mask that leaves out pixels of each side's."""
    student, teacher, labels = draw(channels, size=size, seed=seed)
    patches = torch.zeros(size, dtype=torch.long)
    patches[size[0] // 2 :] = 1
    labels = torch.where(labels == IGNORE, labels, patches.expand_as(labels))
    labels[1] = IGNORE  # a photograph without labels
    teacher[1] = teacher[1].mean(dim=(1, 2), keepdim=True) + 0.01 * teacher[1]
    mask = torch.rand(labels.shape, generator=torch.Generator().manual_seed(seed)) > 0.2
    return student, teacher, labels, mask


@pytest.mark.parametrize("channels", [1, 2, 4])
@pytest.mark.parametrize(("temperature", "size"), [(1.0, (12, 11)), (3.0, (24, 10))])
def test_each_term_equals_the_formula_in_numpy(channels, temperature, size):
    """At two sizes, with masks, with and without labels."""
    student, teacher, labels, mask = drawn(channels, size)
    wanted = reference(student, teacher, labels, mask, temperature)
    assert named(channels) == [name for name in NEW if name in wanted]
    for name, value in wanted.items():
        options = {"temperature": temperature, "distil_mask": mask}
        found = terms_of(student, teacher, labels, name, **options).item()
        assert found == pytest.approx(value, rel=1e-9), name


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_a_mean_does_not_grow_with_the_image(channels):
    """A sum over pixels needs other weights at each size."""
    student, teacher, labels, mask = drawn(channels, (12, 11))
    tiled = [x.repeat(*[1] * (x.ndim - 2), 2, 2) for x in (student, teacher, labels, mask)]
    for name in set(named(channels)) - {"boundary_kl"}:  # whose boundaries are others
        small = terms_of(student, teacher, labels, name, distil_mask=mask)
        large = terms_of(*tiled[:3], name, distil_mask=tiled[3])
        assert large.item() == pytest.approx(small.item(), rel=1e-9), name


@pytest.mark.parametrize("channels", [1, 2, 4])
@pytest.mark.parametrize("name", NEW)
def test_gradients_agree_with_finite_differences(channels, name):
    """A detached part would leave the value right and the student untaught."""
    if name not in named(channels):
        return
    student, teacher, labels, mask = drawn(channels, (8, 5))
    student = (student[:2] / 3).requires_grad_()
    call = lambda s: terms_of(s, teacher[:2], labels[:2], name, distil_mask=mask[:2])  # noqa: E731
    assert torch.autograd.gradcheck(call, (student,), atol=1e-6)
    gradient = torch.autograd.grad(call(student), student)[0]
    assert gradient.norm() > 1e-3
    assert (gradient[~mask[:2].unsqueeze(1).expand_as(gradient)] == 0).all()


@pytest.mark.parametrize("channels", [1, 2, 4])
@pytest.mark.parametrize("name", NEW)
def test_equal_logits_have_no_loss_and_others_one(channels, name):
    """Whatever else is asked of a student, the teacher's own answer must cost nothing."""
    if name not in named(channels):
        return
    student, teacher, labels, mask = drawn(channels, (8, 5))
    same = terms_of(teacher, teacher, labels, name, distil_mask=mask)
    assert same.item() == pytest.approx(0, abs=1e-9)
    assert terms_of(student, teacher, labels, name, distil_mask=mask).item() > 0.01


@pytest.mark.parametrize("channels", [1, 2, 4])
@pytest.mark.parametrize("name", NEW)
@pytest.mark.parametrize("spoiled", [math.nan, math.inf, -1e30])
def test_pixels_that_do_not_count_change_nothing(channels, name, spoiled):
    """Padding and the outside of a rotation hold whatever the networks say there."""
    if name not in named(channels):
        return
    student, teacher, labels, mask = drawn(channels, (8, 5))
    found = []
    for value in (0.0, spoiled):
        s, t = (torch.where(mask.unsqueeze(1), x, value) for x in (student, teacher))
        s.requires_grad_()
        term = terms_of(s, t, labels, name, distil_mask=mask)
        found.append((term.item(), torch.autograd.grad(term, s)[0]))
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("channels", [1, 2, 4])
@pytest.mark.parametrize("name", NEW)
@pytest.mark.parametrize("case", ["no pixel counts", "constant", "sure"])
def test_images_without_contrast_or_pixels_stay_finite(channels, name, case):
    """0/0 of one image without foreground would end the run."""
    if name not in named(channels):
        return
    student, teacher, labels, mask = drawn(channels, (8, 5))
    student, teacher = student.float(), teacher.float()
    if case == "no pixel counts":
        mask[:] = False
    elif case == "constant":
        student, teacher = (torch.zeros_like(x) for x in (student, teacher))
    else:
        student, teacher = (x.sign() * 200 for x in (student, teacher))
    student.requires_grad_()
    term = terms_of(student, teacher, labels, name, distil_mask=mask)
    (gradient,) = torch.autograd.grad(term, student)
    assert torch.isfinite(term)
    assert torch.isfinite(gradient).all()
    if case == "no pixel counts":
        assert (term.item(), gradient.abs().sum().item()) == (0, 0)


@pytest.mark.parametrize(
    ("name", "reason"), [("dist_inter", "correlate by 1 or -1"), ("dkd", "one class beside")]
)
@pytest.mark.parametrize("channels", [1, 2])
def test_what_teaches_nothing_to_few_logits_is_refused_with_its_reason(name, reason, channels):
    """It would be computed, logged, and have no gradient."""
    with pytest.raises(ValueError, match=reason):
        LossWeights(**{name: 1.0}).check_channels(channels)
    LossWeights(**{name: 1.0}).check_channels(3)


def test_each_has_a_flag_and_none_a_weight():
    """A recipe that computes one more term is another recipe."""
    weights = parse(["--dataset", "x", "--teacher", "t"]).training.loss_weights
    assert [getattr(weights, name) for name in NEW] == [0] * len(NEW)
    given = parse(["--dataset", "x", "--teacher", "t", "--dkd_weight", "2"]).training.loss_weights
    assert given.dkd == 2
