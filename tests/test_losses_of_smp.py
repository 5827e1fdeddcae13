"""Focal, Lovász, Tversky and class weights, against float64 numpy written from the papers."""

import math

import cv2
import numpy as np
import pytest
import torch
import yaml
from small_runs import train_flags, write_pairs
from test_losses import IGNORE, draw, probabilities

from kd_trainer.argument_checks import check_class_weights
from kd_trainer.build import build_run
from kd_trainer.commands.train import train
from kd_trainer.config import parse
from kd_trainer.losses import LossWeights, distillation_terms

NAMES = ("focal", "lovasz", "tversky")
WEIGHTS = LossWeights(focal=1.0, lovasz=1.0, tversky=1.0)
CHANNELS = pytest.mark.parametrize("channels", [1, 2, 4])


def computed(student, labels, weights=WEIGHTS, **options):
    terms = distillation_terms(student, None, labels, temperature=3.0, weights=weights, **options)
    return {name: value.item() for name, value in terms.named().items()}


def gradients(student, labels, name):
    student = student.clone().requires_grad_()
    weights = LossWeights(**{name: 1.0})
    terms = distillation_terms(student, None, labels, temperature=1.0, weights=weights)
    return torch.autograd.grad(getattr(terms, name), student)[0]


def jaccard_loss(wrong, positive):
    """1 - IoU of a prediction that errs on the set `wrong`: what Lovász extends to real errors."""
    return len(wrong) / max(len(wrong | positive), 1)


def lovasz_extension(errors, positive):
    """Sum of the errors, largest first, each times what its pixel adds to the set function."""
    order = sorted(range(len(errors)), key=lambda pixel: -errors[pixel])
    total, wrong = 0.0, set()
    for pixel in order:
        before = jaccard_loss(wrong, positive)
        wrong.add(pixel)
        total += errors[pixel] * (jaccard_loss(wrong, positive) - before)
    return total


def reference(student, labels):
    """The three terms from single pixels."""
    logits, truth = student.double().numpy(), labels.numpy()
    focal, lovasz, tversky = [], [], []
    for scores, ids in zip(logits, truth, strict=True):
        places = np.argwhere(ids != IGNORE)
        pixels = [(scores[:, i, j], int(ids[i, j])) for i, j in places]
        if not pixels:
            continue
        chances = [probabilities(z) for z, _ in pixels]
        focal += [
            -((1 - p[y]) ** 2) * np.log(p[y]) for p, (_, y) in zip(chances, pixels, strict=True)
        ]
        classes = [1] if len(scores) == 1 else sorted({y for _, y in pixels})
        ratios, surrogates = [], []
        for k in classes:
            positive = {n for n, (_, y) in enumerate(pixels) if y == k}
            p = np.array([chance[k] for chance in chances])
            y = np.array([n in positive for n in range(len(pixels))], float)
            hit, alarm, miss = (p * y).sum(), (p * (1 - y)).sum(), ((1 - p) * y).sum()
            ratios.append(1 - (hit + 1) / (hit + 0.3 * alarm + 0.7 * miss + 1))
            if len(scores) == 1:
                signs = 2 * y - 1
                z = np.array([pixel[0][0] for pixel in pixels])
                errors = np.maximum(1 - z * signs, 0)
            else:
                errors = np.abs(y - p)
            surrogates.append(lovasz_extension(list(errors), positive))
        tversky.append(np.mean(ratios))
        lovasz.append(np.mean(surrogates))
    return dict(zip(NAMES, map(np.mean, (focal, lovasz, tversky)), strict=True))


@CHANNELS
@pytest.mark.parametrize("size", [(6, 5), (12, 10)])
def test_each_term_equals_the_formula_in_numpy(channels, size):
    """smp's classes count ignored pixels into means, and take sigmoids where ours is a softmax."""
    student, _, labels = draw(channels, size=size, batch=4)
    labels[3] = IGNORE  # an image that has no part in any mean
    labels[2][labels[2] == 1] = 0  # one without the foreground, or a class
    got = computed(student, labels)
    assert list(got) == list(NAMES)
    assert got == pytest.approx(reference(student, labels), rel=2e-6)


@CHANNELS
def test_nothing_that_is_ignored_has_an_influence(channels):
    """Padding of rotated images would else teach the background."""
    student, _, labels = draw(channels)
    other = student.clone()
    ignored = (labels == IGNORE).unsqueeze(1).expand_as(student)
    other[ignored] = math.nan
    assert computed(other, labels) == computed(student, labels)
    for name in NAMES:
        gradient = gradients(other, labels, name)
        assert torch.equal(gradient, gradients(student, labels, name))
        assert not gradient[ignored].any()
        assert gradient[~ignored].any()


@CHANNELS
def test_a_batch_without_valid_pixels_gives_zero_and_a_gradient_of_zero(channels):
    """smp's mean over nothing is NaN, and its Lovász an empty tensor."""
    student, _, labels = draw(channels)
    labels[:] = IGNORE
    assert set(computed(student, labels).values()) == {0.0}
    assert not any(gradients(student, labels, name).any() for name in NAMES)


@CHANNELS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_fp32(channels, dtype):
    """Under autocast a sum over an image would be rounded to three digits."""
    student, _, labels = draw(channels, size=(40, 40), dtype=dtype)
    expected = computed(student.float(), labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = distillation_terms(student, None, labels, temperature=1.0, weights=WEIGHTS)
    assert {value.dtype for value in terms.named().values()} == {torch.float32}
    assert {name: value.item() for name, value in terms.named().items()} == expected


@CHANNELS
def test_micro_batches_add_up_to_the_batch(channels):
    """A surrogate over the whole batch depends on how images are batched."""
    student, _, labels = draw(channels, batch=4, ignored=0.0)
    whole = computed(student, labels)
    parts = [computed(student[s], labels[s]) for s in (slice(0, 2), slice(2, 4))]
    mean = {name: np.mean([part[name] for part in parts]) for name in NAMES}
    assert whole == pytest.approx(mean, rel=1e-6)


def test_a_miss_costs_more_than_a_false_alarm_in_tversky_alone():
    """With the two exchanged it would punish what a rare class needs."""
    labels = torch.zeros(1, 10, 10, dtype=torch.long)
    labels[0, :5] = 1
    miss, alarm = (torch.where(labels.unsqueeze(1) == 1, 9.0, -9.0) for _ in range(2))
    miss[0, 0, 4], alarm[0, 0, 5] = -9.0, 9.0
    weights = LossWeights(tversky=1.0, lovasz=1.0)
    assert computed(miss, labels, weights)["tversky"] > computed(alarm, labels, weights)["tversky"]


def test_without_weights_they_are_not_computed():
    """Lovász sorts every pixel: who asks for the terms of the recipe must not pay for it."""
    student, teacher, labels = draw(1)
    terms = distillation_terms(student, teacher, labels, temperature=1.0)
    assert list(terms.named()) == ["kl", "mse", "bce", "dice"]


@pytest.mark.parametrize("channels", [2, 4])
def test_class_weights_multiply_the_pixels_of_their_class_and_not_the_divisor(channels):
    """torch divides by the sum of weights, so that micro-batches would not add up."""
    student, _, labels = draw(channels)
    weights = [0.5, 3.0, 0.0, 1.5][:channels]
    got = computed(student, labels, LossWeights(bce=1.0), pos_weight=weights)["bce"]
    valid = np.argwhere(labels.numpy() != IGNORE)
    losses = []
    for b, i, j in valid:
        label = labels[b, i, j]
        losses.append(-weights[label] * np.log(probabilities(student[b, :, i, j].numpy())[label]))
    assert got == pytest.approx(np.mean(losses), rel=1e-10)


@pytest.mark.parametrize(
    "weights", [[1.0], [1.0, -1.0, 1.0], [0.0, 0.0, 0.0], [1.0, math.inf, 1.0]]
)
def test_class_weights_that_fit_no_class_are_refused(weights):
    """A missing one would be read from the next class."""
    student, _, labels = draw(3)
    with pytest.raises(ValueError, match=r"^Expected 3 class weights"):
        computed(student, labels, LossWeights(bce=1.0), pos_weight=weights)


@pytest.mark.parametrize("words", [["even"], ["balanced", "2"], ["0", "2"], ["1", "-1", "2"]])
def test_words_that_are_no_class_weights_are_refused(words):
    """`balanced 2` would be read as one of both."""

    class Args:
        class_weights, pos_weight = words, None

    with pytest.raises(ValueError, match=r"^Expected --class_weights"):
        check_class_weights(Args)


def test_pos_weight_beside_class_weights_is_refused():
    """One of the two would be ignored."""
    with pytest.raises(ValueError, match=r"^Expected either --pos_weight or --class_weights"):
        parse(["--dataset", "synthetic", "--pos_weight", "2", "--class_weights", "balanced"])


@pytest.mark.parametrize("num_labels", [2, 3])
def test_balanced_weights_are_measured_said_and_written_down(num_labels, tmp_path, capsys):
    """A configuration that still says `balanced` would be another run on other data."""
    data = write_pairs(tmp_path / "data", num_labels=num_labels, train=4, validation=2)
    masks = [cv2.imread(str(file), 0) for file in sorted(data.glob("train/masks/*"))]
    values = (0, 255) if num_labels == 2 else (0, 1, 2)
    counts = np.array([sum((mask == value).sum() for mask in masks) for value in values])
    expected = counts.sum() / (num_labels * counts)
    more = ["--class_weights", "balanced", "--num_labels", str(num_labels), "--max_steps", "1"]
    more += ["--focal_weight", "0.5", "--lovasz_weight", "0.5", "--tversky_weight", "0.5"]
    run = parse(train_flags(data, tmp_path / "run", *more))
    train(run)
    said = capsys.readouterr().err
    assert "balanced by the pixels of 4 training masks: background" in said
    written = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["class_weights"]
    assert list(map(float, written)) == pytest.approx(expected, rel=1e-3)
    again = parse(["--config", str(tmp_path / "run" / "config.yaml")]).training.class_factors
    assert again == run.training.class_factors
    if num_labels == 2:
        assert again == pytest.approx(counts[0] / counts[1], rel=1e-3)  # a pos_weight


def test_a_class_that_no_mask_shows_has_no_balanced_weight(tmp_path):
    """An infinite weight, or a silent 0, would go unnoticed."""
    data = write_pairs(tmp_path / "data", num_labels=3, train=4, validation=2)
    more = ["--class_weights", "balanced", "--num_labels", "5", "--class_names", *"abcde"]
    with pytest.raises(ValueError, match=r"^Expected pixels of each class .* none of d, e"):
        build_run(parse(train_flags(data, tmp_path / "run", *more)))
