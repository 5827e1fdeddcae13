"""Pseudo labels: task terms against the teacher's answers, where images have no mask."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import SIDE, Squares, arguments, tiny_student, tiny_teacher

from kd_trainer.accepted import check_accepted
from kd_trainer.console import console_line
from kd_trainer.doctor.loss import Gradients, share_finding
from kd_trainer.losses import (
    TERMS,
    LossWeights,
    PseudoLabels,
    distillation_terms,
    labelled_images,
    unlabelled_images,
    weighted_sum,
)
from kd_trainer.model_card import CardFacts, render
from kd_trainer.reports.charts import history_charts
from kd_trainer.trainer import DistillationTrainer

IGNORE = 255
CHANNELS = pytest.mark.parametrize("channels", [1, 2, 4])
KINDS = pytest.mark.parametrize("kind", ["hard", "soft"])
BOTH = LossWeights(bce=0.5, dice=1.0, pseudo=2.0)
PSEUDO = {"pseudo_bce", "pseudo_dice"}


def draw(channels, *, size=(6, 5), seed=0, scale=2.0):
    """Four images, of which two carry no label; a part of each is not followed."""
    random = torch.Generator().manual_seed(seed)
    shape = (4, channels, *size)
    student, teacher = (
        scale * torch.randn(shape, generator=random, dtype=torch.float64) for _ in range(2)
    )
    labels = torch.randint(0, max(channels, 2), (4, *size), generator=random)
    labels[[1, 3]] = IGNORE
    followed = torch.rand(labels.shape, generator=random) < 0.8
    labels[~followed] = IGNORE
    return student, teacher, labels, followed


def terms_of(student, teacher, labels, followed, weights=BOTH, **options):
    return distillation_terms(
        student,
        teacher,
        labels,
        temperature=3.0,
        distil_mask=followed,
        weights=weights,
        **options,
    ).named()


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def probabilities(logits):
    """Class probabilities of one pixel's logits; one logit stands for (0, z)."""
    return softmax(np.concatenate([[0.0], logits]) if len(logits) == 1 else logits)


def reference(student, teacher, labels, followed, kind, confidence, factors=None):
    """BCE and Dice against the teacher, pixel by pixel from probabilities."""
    s, t, y, d = (x.numpy() for x in (student, teacher, labels, followed))
    channels = s.shape[1]
    classes = max(channels, 2)
    factors = np.ones(classes) if factors is None else np.array(factors)
    entropy, pixels, dice = 0.0, 0, []
    for b in range(len(s)):
        overlap, areas, shown, there = np.zeros(classes), np.zeros(classes), set(), False
        for i, j in np.ndindex(*s.shape[2:]):
            if y[b, i, j] != IGNORE or not d[b, i, j]:
                continue
            pixels, there = pixels + 1, True
            p, q = probabilities(s[b, :, i, j]), probabilities(t[b, :, i, j])
            if q.max() < confidence:
                continue
            shown.add(int(q.argmax()))
            if kind == "hard":
                q = np.eye(classes)[q.argmax()]
            entropy -= np.sum(factors * q * np.log(p))
            overlap += np.minimum(p, q)
            areas += p + q
        counted = [1] if channels == 1 else sorted(shown)
        ratios = [1 - (2 * overlap[c] + 1) / (areas[c] + 1) for c in counted]
        dice += [np.mean(ratios) if shown else 0.0] if there else []
    return {"pseudo_bce": entropy / max(pixels, 1), "pseudo_dice": np.mean(dice or [0.0])}


@CHANNELS
@KINDS
@pytest.mark.parametrize("confidence", [0.0, 0.85])
@pytest.mark.parametrize("size", [(6, 5), (12, 10)])
def test_the_terms_equal_the_formulas_in_numpy(channels, kind, confidence, size):
    """Divided by the confident pixels instead, three sure ones would weigh as much as a batch."""
    drawn = draw(channels, size=size)
    got = terms_of(*drawn, pseudo=PseudoLabels(kind, confidence))
    expected = reference(*drawn, kind, confidence)
    if confidence:
        assert expected["pseudo_bce"] < reference(*drawn, kind, 0.0)["pseudo_bce"]
    for name, value in expected.items():
        assert got[name].item() == pytest.approx(value, rel=1e-10), name


@CHANNELS
@KINDS
def test_class_weights_count_for_the_teachers_answers_too(channels, kind):
    """A rare class would be pulled up by labels, and down again by the teacher's answers."""
    drawn = draw(channels)
    factors = (1.0, 3.0) if channels == 1 else tuple(range(1, channels + 1))
    weight = 3.0 if channels == 1 else factors
    got = terms_of(*drawn, pos_weight=weight, pseudo=PseudoLabels(kind))
    expected = reference(*drawn, kind, 0.0, factors)
    assert got["pseudo_bce"].item() == pytest.approx(expected["pseudo_bce"], rel=1e-10)


@CHANNELS
@KINDS
def test_gradients_agree_with_finite_differences(channels, kind):
    """A detached share or target keeps the value right and the training wrong."""
    student, *rest = draw(channels, size=(3, 2), scale=1.0)

    def total(logits):
        terms = terms_of(logits, *rest, pseudo=PseudoLabels(kind, 0.55))
        return terms["pseudo_bce"], terms["pseudo_dice"]

    assert torch.autograd.gradcheck(total, (student.requires_grad_(),))


@CHANNELS
def test_soft_dice_is_least_where_the_student_is_the_teacher(channels):
    """With the product as overlap it would be least for a student that is surer than its teacher,
    and soft labels would teach what hard ones do."""
    _, teacher, labels, followed = draw(channels)
    student = teacher.clone().requires_grad_()
    soft = PseudoLabels("soft")
    same = terms_of(student, teacher, labels, followed, pseudo=soft)["pseudo_dice"].item()
    surer = terms_of(2 * student, teacher, labels, followed, pseudo=soft)["pseudo_dice"].item()
    assert same == pytest.approx(0.0, abs=1e-12)
    assert surer > 0.01


@CHANNELS
def test_of_a_teacher_that_is_sure_soft_labels_are_hard_ones(channels):
    """Both are one loss with another target; two that drift apart would not be comparable."""
    student, teacher, *rest = draw(channels)
    hard, soft = (
        terms_of(student, 1e4 * teacher, *rest, pseudo=PseudoLabels(k)) for k in ("hard", "soft")
    )
    for name in PSEUDO:
        assert soft[name].item() == pytest.approx(hard[name].item(), rel=1e-9)


@CHANNELS
@KINDS
@pytest.mark.parametrize("case", ["all labelled", "nothing followed", "never sure"])
def test_without_an_unlabelled_pixel_they_are_exactly_zero(channels, kind, case):
    """0/0 would poison the batch; a constant would break backward."""
    student, teacher, labels, followed = draw(channels)
    student.requires_grad_()
    if case == "all labelled":
        labels[:], followed[:] = 0, True
    elif case == "nothing followed":
        followed[:], labels[1:] = False, IGNORE
    pseudo = PseudoLabels(kind, 1.0 if case == "never sure" else 0.0)
    terms = terms_of(student, teacher, labels, followed, pseudo=pseudo)
    for name in PSEUDO:
        assert terms[name].item() == 0.0
        (gradient,) = torch.autograd.grad(terms[name], student, retain_graph=True)
        assert not gradient.any()
        assert bool(gradient.isfinite().all())


@CHANNELS
@KINDS
def test_what_lies_outside_of_the_unlabelled_pixels_has_no_part(channels, kind):
    """Padding, labelled pixels and what no number is there would leak into value or gradient."""
    student, teacher, labels, followed = draw(channels)
    expected = terms_of(student, teacher, labels, followed, pseudo=PseudoLabels(kind))
    outside = (~followed | (labels != IGNORE)).unsqueeze(1)
    teacher = torch.where(outside, math.nan, teacher)
    student = torch.where(outside, math.nan, student).requires_grad_()
    got = terms_of(student, teacher, labels, followed, pseudo=PseudoLabels(kind))
    for name in PSEUDO:
        assert got[name].item() == expected[name].item()
        (gradient,) = torch.autograd.grad(got[name], student, retain_graph=True)
        assert bool(gradient.isfinite().all())


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_of_several_labels_a_pixel_each_class_is_an_image_of_its_own(kind):
    """One argmax over independent classes would teach that a pixel has only one of them."""
    student, teacher, labels, followed = draw(3)
    planes = torch.where(labels.unsqueeze(1) == IGNORE, IGNORE, torch.ones(1, 3, 1, 1).long())
    got = terms_of(student, teacher, planes, followed, pseudo=PseudoLabels(kind))
    each = [
        reference(s, t, labels, followed, kind, 0.0)
        for s, t in zip(student.split(1, dim=1), teacher.split(1, dim=1), strict=True)
    ]
    for name in PSEUDO:
        expected = np.mean([one[name] for one in each])
        assert got[name].item() == pytest.approx(expected, rel=1e-10)
    batch = {"labels": planes, "distil_mask": followed}
    assert unlabelled_images([batch], IGNORE).item() == 3 * 2


def test_every_task_term_has_its_pseudo_form_with_hard_labels():
    """One that was forgotten would leave its share of the loss to the labelled images."""
    task = [term.name for term in TERMS if not term.needs_teacher]
    weights = LossWeights(**dict.fromkeys(task, 1.0), task=0.5, pseudo=3.0)
    terms = terms_of(*draw(1), weights=weights)
    assert list(terms) == [*task, *(f"pseudo_{name}" for name in task)]
    factors = weights.effective()
    assert all(factors[f"pseudo_{name}"] == 1.5 for name in task)
    expected = sum(0.5 * terms[n] + 1.5 * terms[f"pseudo_{n}"] for n in task)
    named = distillation_terms(
        *draw(1)[:3], temperature=3.0, distil_mask=draw(1)[3], weights=weights
    )
    assert weighted_sum(named, weights).item() == pytest.approx(expected.item(), rel=1e-12)


@CHANNELS
def test_a_pseudo_term_of_hard_labels_is_the_task_term_of_the_teachers_classes(channels):
    """It is what the teacher's maps as masks would give."""
    student, teacher, _, _ = draw(channels)
    classes = (teacher[:, 0] > 0).long() if channels == 1 else teacher.argmax(1)
    none, every = torch.full_like(classes, IGNORE), torch.ones_like(classes, dtype=torch.bool)
    task = ("bce", "dice", "focal", "lovasz", "tversky")
    weights = LossWeights(**dict.fromkeys(task, 1.0), pseudo=1.0)
    got = terms_of(student, teacher, none, every, weights)
    expected = terms_of(student, teacher, classes, every, weights)
    for name in task:
        assert got[f"pseudo_{name}"].item() == pytest.approx(expected[name].item(), rel=1e-12)


@CHANNELS
@KINDS
def test_dice_of_uneven_micro_batches_is_that_of_the_whole_step(channels, kind):
    """The mean over each micro-batch's own images would give one beside labelled ones more."""
    student, teacher, labels, followed = draw(channels)
    student.requires_grad_()
    pseudo = PseudoLabels(kind, 0.6)
    labels[2] = IGNORE  # three unlabelled images, in parts of one and two
    whole = terms_of(student, teacher, labels, followed, pseudo=pseudo)["pseudo_dice"]
    expected = torch.autograd.grad(whole, student)[0]
    halves = [slice(0, 2), slice(2, 4)]
    batches = [{"labels": labels[h], "distil_mask": followed[h]} for h in halves]
    images = unlabelled_images(batches, IGNORE)
    assert images.item() == 1.5
    parts = [
        terms_of(
            student[h], teacher[h], labels[h], followed[h], pseudo=pseudo, pseudo_images=images
        )["pseudo_dice"]
        for h in halves
    ]
    mean = torch.stack(parts).mean()
    assert mean.item() == pytest.approx(whole.item(), rel=1e-12)
    assert torch.allclose(torch.autograd.grad(mean, student)[0], expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["focal", "lovasz", "tversky"])
def test_a_term_of_class_ids_alone_is_refused_with_soft_labels(name, tmp_path: Path):
    """It would be left out of the loss on unlabelled images without a word."""
    weights = LossWeights(**{name: 1.0}, pseudo=1.0)
    with pytest.raises(ValueError, match=rf"hard with the term {name}, got soft"):
        terms_of(*draw(2), weights=weights, pseudo=PseudoLabels("soft"))
    options = {f"{name}_weight": 1.0, "pseudo_weight": 1.0, "pseudo_labels": "soft"}
    with pytest.raises(ValueError, match=rf"or --{name}_weight 0"):
        arguments(tmp_path, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pseudo_weight": -1.0}, "Expected loss weight pseudo >= 0"),
        ({"pseudo_weight": 1.0, "pseudo_confidence": 1.5}, "--pseudo_confidence from 0 to 1"),
        ({"pseudo_weight": 1.0, "pseudo_labels": "firm"}, "--pseudo_labels to be one of hard, so"),
        ({"pseudo_confidence": 0.9}, "--pseudo_weight above 0 with --pseudo_confidence 0.9"),
        ({"pseudo_labels": "soft"}, "--pseudo_weight above 0 with --pseudo_labels soft"),
    ],
)
def test_settings_that_would_do_nothing_or_nonsense_are_refused(options, message, tmp_path: Path):
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, **options)


def test_a_weight_by_schedule_is_a_weight(tmp_path: Path):
    """Asked for `--pseudo_weight` alone, a run that starts them later could set no confidence."""
    later = ["pseudo=0:0,10:1"]
    args = arguments(tmp_path, weight_schedule=later, pseudo_confidence=0.9)
    assert (args.loss_weights.pseudo, args.pseudo.confidence) == (1.0, 0.9)


def test_pseudo_labels_without_a_teacher_are_refused(tmp_path: Path):
    """The weights of terms that need one are set to 0 without it: nothing would be left of them."""
    args = arguments(tmp_path, pseudo_weight=1.0)
    with pytest.raises(ValueError, match=r"--teacher with --pseudo_weight 1, got none.*Name one"):
        check_accepted(tiny_student(), None, args, None, {})


class SomeWithoutMask(Squares):
    """Squares of which only every fifth has a mask."""

    def __getitem__(self, index):
        sample = super().__getitem__(index)
        if index % 5:
            sample["labels"] = torch.full_like(sample["labels"], IGNORE)
        return sample


class WithoutFollowed(Squares):
    def __getitem__(self, index):
        sample = super().__getitem__(index)
        return {name: sample[name] for name in ("pixel_values", "labels")}


def test_a_training_logs_them_and_their_shares_and_its_evaluation_leaves_them_out(tmp_path: Path):
    """A list of names kept elsewhere would hide a term that steers."""
    args = arguments(
        tmp_path, pseudo_weight=2.0, max_steps=4, eval_strategy="steps", eval_steps=4,
        per_device_train_batch_size=5, gradient_accumulation_steps=2,
    )  # fmt: skip
    trainer = DistillationTrainer(
        tiny_student(),
        args,
        teacher=tiny_teacher(),
        train_dataset=SomeWithoutMask(40),
        eval_dataset=Squares(3),
    )
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    factors = {"kl": 0.3, "mse": 0.5, "bce": 0.5, "dice": 1.0, "pseudo_bce": 1.0, "pseudo_dice": 2}
    for log in logs:
        expected = sum(factor * log[name] for name, factor in factors.items())
        assert log["loss"] == pytest.approx(expected, rel=1e-4)
        assert log["pseudo_dice"] > 0.05
    assert logs[0]["grad_share/pseudo_bce"] > 0
    shares = [log[f"grad_share/{name}"] for log in logs for name in factors]
    assert sum(shares) == pytest.approx(len(logs))
    charts = history_charts(trainer.state.log_history, ["a", "b"])
    assert sum(">pseudo_bce<" in chart for chart in charts) == 2  # training, shares
    assert "pseudo_dice " in str(console_line(logs[0]))
    evaluation = next(log for log in trainer.state.log_history if "eval_miou" in log)
    assert not any("pseudo" in name for name in evaluation)
    assert evaluation["eval_loss"] > 0


def test_samples_that_do_not_say_what_is_followed_are_refused(tmp_path: Path):
    args = arguments(tmp_path, pseudo_weight=1.0)
    trainer = DistillationTrainer(
        tiny_student(), args, teacher=tiny_teacher(), train_dataset=WithoutFollowed(4)
    )
    with pytest.raises(ValueError, match=r"distil_mask in every sample with pseudo_weight"):
        trainer.train()


@pytest.mark.parametrize("accumulation", [1, 5])
def test_logged_dice_is_a_mean_over_images_with_masks(accumulation, tmp_path: Path):
    """Images without masks would count as 0 and dilute it, here tenfold, beside an undiluted BCE.

    The student stays as it is, so that the mean over the steps of an epoch is one number: in each
    step one image of ten has a mask, in whichever of its micro-batches.
    """

    class OneInTen(Squares):
        def __getitem__(self, index):
            sample = super().__getitem__(index)
            if index % 10 != index // 10:
                sample["labels"] = torch.full_like(sample["labels"], IGNORE)
            return sample

    args = arguments(
        tmp_path, num_train_epochs=1, per_device_train_batch_size=10 // accumulation,
        gradient_accumulation_steps=accumulation, train_sampling_strategy="sequential",
        learning_rate=1e-30, min_learning_rate=0.0, weight_decay=0.0, logging_steps=4,
    )  # fmt: skip
    student = tiny_student(norm=False)
    trainer = DistillationTrainer(student, args, teacher=tiny_teacher(), train_dataset=OneInTen(40))
    trainer.train()
    log = next(log for log in trainer.state.log_history if "loss" in log)
    one_by_one = []
    with torch.no_grad():
        for index in (0, 11, 22, 33):
            sample = OneInTen(40)[index]
            pixels = trainer._normalised({"pixel_values": sample["pixel_values"][None]})
            logits = student(pixels["pixel_values"]).raw_logits
            labels = sample["labels"][None]
            one_by_one.append(distillation_terms(logits, None, labels, temperature=1.0).dice)
    assert log["dice"] == pytest.approx(torch.stack(one_by_one).mean().item(), rel=1e-4)
    assert log["dice"] > 0.2


def test_labelled_and_unlabelled_images_are_counted_apart():
    """A pixel that is neither followed nor labelled makes no image of either kind."""
    labels = torch.full((3, SIDE, SIDE), IGNORE)
    followed = torch.zeros(3, SIDE, SIDE, dtype=torch.bool)
    labels[0], followed[:2] = 1, True
    batch = {"labels": labels, "distil_mask": followed}
    assert labelled_images([batch], IGNORE).item() == 1
    assert unlabelled_images([batch], IGNORE).item() == 1


def test_the_doctor_notes_pseudo_labels_that_are_never_sure():
    """A teacher that is nowhere as sure as was asked teaches nothing on unlabelled images."""
    norms = {"bce": 1.0, "pseudo_bce": 0.0}
    finding = share_finding(Gradients(norms, norms, [], [], {}))
    assert finding.grade == "note"
    assert "--pseudo_confidence" in finding.cure


def test_the_card_of_a_student_names_them():
    """Without them the loss on the card would be that of another run."""
    settings = {"bce_weight": 0.5, "dice_weight": 1.0, "task_weight": 0.5, "pseudo_weight": 2.0}
    config = tiny_student().config.to_dict()
    for teacher, shown in (({"teacher": "big"}, True), ({"teacher": None}, False)):
        facts = CardFacts("me/x", "mit", config, (1, 0), 1.0, "photos", teacher, settings)
        text = render(facts)
        assert "0.25 BCE + 0.5 Dice" in text
        assert ("+ 0.5 pseudo BCE + 1 pseudo Dice" in text) is shown
