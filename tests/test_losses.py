"""The loss terms against float64 numpy written from the formulas, and their invariances."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from kd_trainer.losses import (
    TERMS,
    LossTerms,
    LossWeights,
    Term,
    distillation_terms,
    labelled_images,
    weighted_sum,
)
from kd_trainer.losses.terms import WEIGHTED

IGNORE = 255
NAMES = ["kl", "mse", "bce", "dice"]
CHANNELS = pytest.mark.parametrize("channels", [1, 2, 4])


def draw(channels, *, batch=3, size=(6, 5), seed=0, dtype=torch.float64, ignored=0.2, scale=3.0):
    """Random student and teacher logits and labels, with a share of ignored pixels."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, channels, *size)
    student = (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)
    teacher = (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)
    labels = torch.randint(0, max(channels, 2), (batch, *size), generator=generator)
    labels[0] %= 2  # an image that does not show every class
    labels[torch.rand(labels.shape, generator=generator) < ignored] = IGNORE
    return student, teacher, labels


def values(terms):
    return {name: value.item() for name, value in terms.named().items()}


def gradients(student, teacher, labels, **options):
    """Gradient of each term with respect to the student's logits."""
    student = student.clone().requires_grad_()
    terms = distillation_terms(student, teacher, labels, **options).named()
    return {
        name: torch.autograd.grad(term, student, retain_graph=True)[0]
        for name, term in terms.items()
    }


def softmax(x, axis=0):
    e = np.exp(x - x.max(axis=axis, keepdims=True))
    return e / e.sum(axis=axis, keepdims=True)


def probabilities(logits):
    """Class probabilities of one pixel's logits; one logit stands for (0, z)."""
    return softmax(np.concatenate([[0.0], logits]) if len(logits) == 1 else logits)


def reference(student, teacher, labels, temperature, mask=None, pos_weight=1.0):
    """The four terms pixel by pixel, from probabilities instead of logits."""
    s, t, y = (x.double().numpy() if x.is_floating_point() else x.numpy() for x in
               (student, teacher, labels))  # fmt: skip
    batch, channels, height, width = s.shape
    kl, mse, bce, dice = [], [], [], []
    for b in range(batch):
        overlap, areas = np.zeros(max(channels, 2)), np.zeros(max(channels, 2))
        shown = set()
        for i in range(height):
            for j in range(width):
                u, v, label = s[b, :, i, j], t[b, :, i, j], y[b, i, j]
                if (label != IGNORE) if mask is None else mask[b, i, j]:
                    p, q = probabilities(u / temperature), probabilities(v / temperature)
                    kl.append(temperature**2 * np.sum(q * np.log(q / p)))
                    shift = 0 if channels == 1 else 1
                    mse.append(np.mean(((u - shift * u.mean()) - (v - shift * v.mean())) ** 2))
                if label != IGNORE:
                    p = probabilities(u)
                    bce.append(-np.log(p[label]) * (pos_weight if label == 1 else 1.0))
                    shown.add(int(label))
                    areas += p
                    areas[label] += 1
                    overlap[label] += p[label]
        classes = [1] if channels == 1 else sorted(shown)
        ratios = [1 - (2 * overlap[c] + 1) / (areas[c] + 1) for c in classes]
        dice += [np.mean(ratios)] if shown else []
    named = {"kl": kl, "mse": mse, "bce": bce, "dice": dice}
    return {name: np.mean(pixels) for name, pixels in named.items()}


@CHANNELS
@pytest.mark.parametrize(("temperature", "size"), [(1.0, (6, 5)), (2.5, (12, 10)), (16.0, (3, 8))])
def test_each_term_equals_the_formula_in_numpy(channels, temperature, size):
    """A wrong divisor, a missing T² or an uncentred MSE would only shift the balance of terms.

    `batchmean` on maps of pixels, for one, grows fourfold each time the side of an image doubles.
    """
    student, teacher, labels = draw(channels, size=size)
    got = values(distillation_terms(student, teacher, labels, temperature=temperature))
    assert list(got) == NAMES
    assert got == pytest.approx(reference(student, teacher, labels, temperature), rel=1e-10)


@CHANNELS
def test_the_distillation_mask_moves_kl_and_mse_and_no_task_term(channels):
    """Images without labels would otherwise teach nothing, or train on their padding."""
    student, teacher, labels = draw(channels)
    labels[0] = IGNORE
    mask = torch.rand(labels.shape, generator=torch.Generator().manual_seed(1)) < 0.7
    got = values(distillation_terms(student, teacher, labels, temperature=2.0, distil_mask=mask))
    assert got == pytest.approx(reference(student, teacher, labels, 2.0, mask=mask), rel=1e-10)
    assert mask[0].any(), "the image without labels must take part"


def test_pos_weight_multiplies_the_foreground_and_not_the_divisor():
    """Dividing by the sum of weights would silently undo the weighting's scale."""
    student, teacher, labels = draw(1)
    got = values(distillation_terms(student, teacher, labels, temperature=1.0, pos_weight=3.0))
    assert got == pytest.approx(reference(student, teacher, labels, 1.0, pos_weight=3.0), rel=1e-10)


@CHANNELS
@pytest.mark.parametrize("name", NAMES)
def test_gradients_agree_with_finite_differences(channels, name):
    """A detached or re-normalised factor keeps the value right and the training wrong."""
    student, teacher, labels = draw(channels, batch=2, size=(3, 2), scale=1.0)
    weights = LossWeights(**{name: 1.0})

    def term(logits):
        terms = distillation_terms(logits, teacher, labels, temperature=3.0, weights=weights)
        return getattr(terms, name)

    assert torch.autograd.gradcheck(term, (student.requires_grad_(),))


@CHANNELS
def test_dice_of_unevenly_labelled_micro_batches_on_two_ranks_is_that_of_the_whole(channels):
    """The mean over the labelled images of each would give one beside unlabelled ones more weight.

    What is averaged over micro-batches and ranks is the mean over the labelled images of all, in
    value and gradient; one micro-batch has none at all.
    """
    student, _, labels = draw(channels, batch=8)
    student.requires_grad_()
    labels[[1, 3, 4, 5, 7]] = IGNORE  # fewer than one a micro-batch
    options = {"temperature": 1.0, "weights": LossWeights(dice=1.0)}
    whole = distillation_terms(student, None, labels, **options).dice
    expected = torch.autograd.grad(whole, student)[0]
    ranks = [(slice(0, 2), slice(2, 4)), (slice(4, 6), slice(6, 8))]
    counts = [labelled_images([{"labels": labels[s]} for s in rank], IGNORE) for rank in ranks]
    images = torch.stack(counts).mean()
    parts = [
        distillation_terms(student[s], None, labels[s], dice_images=images, **options).dice
        for rank in ranks
        for s in rank
    ]
    mean = torch.stack(parts).mean()
    assert mean.item() == pytest.approx(whole.item(), rel=1e-12)
    assert torch.allclose(torch.autograd.grad(mean, student)[0], expected, rtol=1e-12, atol=0)


def test_an_empty_image_predicted_empty_has_no_dice_loss_and_a_false_alarm_has():
    """Without ε in the numerator a correct empty prediction would cost 1."""
    labels = torch.zeros(1, 8, 8, dtype=torch.uint8)
    quiet, loud = torch.full((1, 1, 8, 8), -30.0), torch.full((1, 1, 8, 8), 30.0)
    assert distillation_terms(quiet, None, labels, temperature=1.0).dice.item() < 1e-6
    assert distillation_terms(loud, None, labels, temperature=1.0).dice.item() == pytest.approx(
        1 - 1 / 65
    )


@CHANNELS
def test_an_image_without_valid_pixels_gives_zero_and_a_gradient_of_zero(channels):
    """0/0 would poison the whole batch; a constant would break backward."""
    student, teacher, labels = draw(channels)
    labels[:] = IGNORE
    got = distillation_terms(student, teacher, labels, temperature=2.0)
    assert set(values(got).values()) == {0.0}
    assert all(not g.any() for g in gradients(student, teacher, labels, temperature=2.0).values())


@CHANNELS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_logits_are_computed_in_fp32(channels, dtype, autocast):
    """Summed in half precision, 10,000 pixels stop adding up: the loss freezes unnoticed."""
    student, teacher, labels = draw(channels, size=(100, 100), dtype=dtype)
    expected = distillation_terms(student.float(), teacher.float(), labels, temperature=4.0)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        got = distillation_terms(student, teacher, labels, temperature=4.0)
    for name, value in got.named().items():
        assert value.dtype == torch.float32
        assert value.item() == getattr(expected, name).item(), name


@CHANNELS
def test_extreme_logits_stay_finite_and_are_not_clamped(channels):
    """log(sigmoid) overflows at 90; a clamp would hide it and stop the gradient."""
    student, teacher, labels = draw(channels, dtype=torch.float32, scale=3e3)
    got = values(distillation_terms(student, teacher, labels, temperature=1.0))
    assert all(math.isfinite(value) for value in got.values())
    assert min(got["kl"], got["bce"]) > 500
    assert all(
        g.isfinite().all() for g in gradients(student, teacher, labels, temperature=1.0).values()
    )


@CHANNELS
def test_a_non_finite_valid_logit_reaches_the_loss(channels):
    """A replaced NaN would let a diverged network train on."""
    student, teacher, labels = draw(channels, ignored=0.0)
    student[0, 0, 0, 0] = float("nan")
    got = values(distillation_terms(student, teacher, labels, temperature=1.0))
    assert all(math.isnan(value) for value in got.values())


@CHANNELS
def test_no_term_reads_a_value_on_the_host(channels):
    """On the meta device a tensor has no values: `.item()`, boolean indexing and `if` fail."""
    student, teacher, labels = (x.to("meta") for x in draw(channels))
    mask = torch.ones(labels.shape, dtype=torch.bool, device="meta")
    terms = distillation_terms(
        student.requires_grad_(), teacher, labels, temperature=2.0, distil_mask=mask,
        pos_weight=2.0 if channels == 1 else None,
    )  # fmt: skip
    weighted_sum(terms, LossWeights(**dict.fromkeys(NAMES, 1.0))).backward()
    assert student.grad.shape == student.shape


def test_no_gradient_flows_into_the_teacher():
    """A teacher that forgot `no_grad` would be trained towards its student."""
    student, teacher, labels = draw(1)
    teacher.requires_grad_()
    got = distillation_terms(student.requires_grad_(), teacher, labels, temperature=2.0)
    weighted_sum(got, LossWeights(kl=1.0, mse=1.0)).backward()
    assert student.grad is not None
    assert teacher.grad is None


def test_a_teacher_from_inference_mode_can_be_learned_from():
    """Inference tensors may not be saved for backward: the MSE would fail at the first step."""
    student, teacher, labels = draw(1, dtype=torch.float32)
    with torch.inference_mode():
        teacher = teacher * 1.0
    got = distillation_terms(student.requires_grad_(), teacher, labels, temperature=2.0)
    weighted_sum(got, LossWeights(kl=1.0, mse=1.0)).backward()
    assert student.grad.any()


@pytest.mark.parametrize(
    ("weights", "wanted"),
    [
        (LossWeights(mse=0.5, bce=0.5), ["mse", "bce"]),
        (LossWeights(kl=1.0, mse=1.0, bce=1.0, dice=1.0, task=0.0), ["kl", "mse"]),
    ],
)
def test_terms_of_weight_zero_are_not_computed(monkeypatch, weights, wanted):
    """They cost time and memory, and a NaN in one of them would matter.

    With a task weight of 0, pure imitation, the labels may hold anything.
    """

    def never(**_):
        pytest.fail("computed a term of weight 0")

    rows = [term if term.name in wanted else replace(term, binary=never) for term in TERMS]
    monkeypatch.setattr("kd_trainer.losses.terms.TERMS", rows)
    terms = distillation_terms(*draw(1), temperature=1.0, weights=weights)
    assert list(terms.named()) == wanted
    assert {getattr(terms, name) for name in set(NAMES) - set(wanted)} == {None}


@CHANNELS
def test_without_a_teacher_there_are_only_task_terms(channels):
    """A zero KL would read as a perfect imitation in the log."""
    student, teacher, labels = draw(channels)
    alone = distillation_terms(student, None, labels, temperature=2.0)
    assert (alone.kl, alone.mse) == (None, None)
    both = values(distillation_terms(student, teacher, labels, temperature=2.0))
    assert values(alone) == {"bce": both["bce"], "dice": both["dice"]}


def test_the_total_is_the_recipe_s_sum():
    """0.3·2 + 0.5·3 + 0.7·(0.5·5 + 1·7): each weight at its own term, `task` at the last two."""
    terms = LossTerms(**dict(zip(NAMES, torch.tensor([2.0, 3.0, 5.0, 7.0]), strict=True)))
    weights = LossWeights(kl=0.3, mse=0.5, bce=0.5, dice=1.0, task=0.7)
    assert weighted_sum(terms, weights).item() == pytest.approx(0.6 + 1.5 + 0.7 * 9.5)
    supervised = LossTerms(bce=terms.bce, dice=terms.dice)
    assert weighted_sum(supervised, weights).item() == pytest.approx(0.7 * 9.5)


def test_a_term_of_weight_zero_cannot_spoil_the_total():
    """0 times infinity is NaN."""
    terms = LossTerms(kl=torch.tensor(math.inf), bce=torch.tensor(2.0))
    assert weighted_sum(terms, LossWeights(bce=1.0)).item() == 2.0


@pytest.mark.parametrize(
    ("terms", "weights"),
    [
        (LossTerms(), LossWeights(kl=1.0)),
        (LossTerms(bce=torch.tensor(1.0)), LossWeights(kl=1.0)),
        (LossTerms(kl=torch.tensor(1.0)), LossWeights(kl=1.0, dice=1.0)),
    ],
)
def test_a_total_of_nothing_or_without_a_wanted_task_term_is_refused(terms, weights):
    """Training on 0, or without the labels, would run to the end and learn nothing."""
    with pytest.raises(ValueError, match="Expected"):
        weighted_sum(terms, weights)


@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf])
@pytest.mark.parametrize("name", [*NAMES, "task"])
def test_loss_weights_are_finite_and_not_negative(name, value):
    """A negative weight maximises the loss."""
    with pytest.raises(ValueError, match=rf"Expected loss weight {name} >= 0, got {value}"):
        LossWeights(**{name: value})


def test_a_weight_of_no_term_is_refused():
    """The misspelt term would be left out of the loss without a word."""
    with pytest.raises(TypeError, match=r"kl, mse, .*, task or pseudo, got one for kll"):
        LossWeights(kll=0.3)


def far(student, teacher):
    return (student - teacher).square().mean()


FROM_THREE = Term(
    "far", takes=("student", "teacher"), binary=None, softmax=far, softmax_from=3, title="Far",
    degenerate="its gradient is 0",
)  # fmt: skip


@pytest.mark.parametrize(("channels", "teaches"), [(1, False), (2, False), (3, True)])
def test_a_term_is_refused_with_its_reason_where_it_is_degenerate(monkeypatch, channels, teaches):
    """As correlations of one or two classes are: the teacher would steer nothing, unnoticed."""
    monkeypatch.setattr("kd_trainer.losses.terms.TERMS", (*TERMS, FROM_THREE))
    monkeypatch.setattr("kd_trainer.losses.terms.WEIGHTED", (*WEIGHTED, "far"))
    weights = LossWeights(far=3.0)
    student, teacher, labels = draw(channels, ignored=0.0)
    if teaches:
        terms = distillation_terms(student, teacher, labels, temperature=1.0, weights=weights)
        assert terms.far == far(student, teacher)
        return
    message = rf"term far, .* of {channels} logits? a pixel, got 3: its gradient is 0\. Set --far_"
    with pytest.raises(ValueError, match=message):
        distillation_terms(student, teacher, labels, temperature=1.0, weights=weights)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"teacher": (2, 3, 4, 4)}, ValueError, "teacher logits with 1 channels .*, got 3"),
        ({"teacher": (2, 1, 8, 8)}, ValueError, "Resize the teacher"),
        ({"teacher": (1, 1, 4, 4)}, ValueError, "of the student's shape"),
        ({"teacher": (2, 4, 4)}, ValueError, "teacher logits \\(B, K, H, W\\)"),
        ({"student": (2, 4, 4)}, ValueError, "student logits \\(B, K, H, W\\)"),
        ({"labels": (2, 8, 8)}, ValueError, "labels of shape .*\\(2, 8, 8\\)"),
        ({"labels": (2, 1, 4, 4)}, ValueError, "without a channel dimension"),
        ({"mask": (2, 8, 8)}, ValueError, "distil_mask of shape"),
        ({"label_type": torch.float32}, TypeError, "integer labels, got torch.float32"),
        ({"label_type": torch.bool}, TypeError, "integer labels, got torch.bool"),
        ({"mask_type": torch.uint8}, TypeError, "bool distil_mask, got torch.uint8"),
        ({"student_type": torch.int64}, TypeError, "floating point student"),
        ({"temperature": 0.0}, ValueError, "temperature > 0, got 0.0"),
        ({"temperature": -1.0}, ValueError, "temperature > 0, got -1.0"),
        ({"temperature": math.nan}, ValueError, "temperature > 0, got nan"),
        ({"temperature": torch.tensor(2.0)}, TypeError, "Python number, got Tensor"),
        ({"pos_weight": 0.0}, ValueError, "pos_weight > 0, got 0.0"),
        ({"student": (2, 3, 4, 4), "teacher": (2, 3, 4, 4), "pos_weight": 2.0}, ValueError,
         "no pos_weight for 3 logits"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(change, error, match):
    """Broadcasting would turn most of these into a plausible number."""
    shape = (2, 1, 4, 4)
    student = torch.zeros(change.get("student", shape), dtype=change.get("student_type"))
    teacher = torch.zeros(change.get("teacher", shape))
    labels = torch.zeros(
        change.get("labels", (2, 4, 4)), dtype=change.get("label_type", torch.int64)
    )
    mask = torch.ones(change.get("mask", (2, 4, 4)), dtype=change.get("mask_type", torch.bool))
    with pytest.raises(error, match=match):
        distillation_terms(
            student, teacher, labels, temperature=change.get("temperature", 1.0),
            distil_mask=mask, pos_weight=change.get("pos_weight"),
        )  # fmt: skip


@CHANNELS
@pytest.mark.parametrize("name", ["bce", "dice"])
def test_a_class_id_beyond_the_last_fails(channels, name):
    """A mask of 0 and 2 would otherwise train a binary model towards a probability of two."""
    student, _, labels = draw(channels)
    labels[0, 0, 0] = max(channels, 2)
    with pytest.raises((RuntimeError, IndexError), match="out of bounds"):
        distillation_terms(
            student, None, labels, temperature=1.0, weights=LossWeights(**{name: 1.0})
        )


@CHANNELS
@pytest.mark.parametrize(
    ("ignored", "index", "dtype"),
    [
        (0.2, -100, torch.int64),
        (0.2, 77, torch.uint8),
        (0.0, -256, torch.uint8),  # in eight bits -256 is 0: the whole background
    ],
)
def test_labels_count_alike_in_any_type_and_under_any_ignore_index(channels, ignored, index, dtype):
    """Batches carry uint8 labels, in which numbers wrap around; a hard-wired 255 would count."""
    student, teacher, labels = draw(channels, ignored=ignored)
    expected = values(distillation_terms(student, teacher, labels, temperature=1.0))
    renamed = torch.where(labels == IGNORE, index, labels).to(dtype)
    got = distillation_terms(student, teacher, renamed, temperature=1.0, ignore_index=index)
    assert values(got) == expected


# What holds for any logits.
SEEDS = st.integers(0, 2**31 - 1)
ANY_CHANNELS = st.sampled_from([1, 2, 3, 5])
SCALES = st.sampled_from([1e-3, 0.1, 1.0, 8.0, 60.0])
TEMPERATURES = st.floats(0.25, 8)


@given(SEEDS, ANY_CHANNELS, SCALES, TEMPERATURES)
def test_no_term_is_negative_and_dice_is_at_most_one(seed, channels, scale, temperature):
    """A negative divergence or a Dice above 1 is a sign that some mean went wrong."""
    drawn = draw(channels, seed=seed, scale=scale)
    got = values(distillation_terms(*drawn, temperature=temperature))
    assert all(math.isfinite(value) and value >= -1e-12 for value in got.values())
    assert got["dice"] <= 1


@given(SEEDS, ANY_CHANNELS, SCALES, TEMPERATURES)
def test_kl_and_mse_are_zero_for_equal_logits_and_for_those_alone(
    seed, channels, scale, temperature
):
    """Zero elsewhere would teach nothing there; above zero here would push a perfect student."""
    student, teacher, labels = draw(channels, seed=seed, scale=scale, ignored=0.0)
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


@given(
    SEEDS,
    ANY_CHANNELS,
    SCALES,
    st.sampled_from([0.0, -7.5, 1e30, math.inf, math.nan]),
    st.booleans(),
)
def test_pixels_that_do_not_count_change_no_bit_of_value_or_gradient(
    seed, channels, scale, filler, with_mask
):
    """A network's answer on ignored pixels is arbitrary; 0 times NaN would still be NaN."""
    student, teacher, labels = draw(channels, seed=seed, scale=scale)
    counts = labels != IGNORE
    assume(0 < int(counts.sum()) < labels.numel())
    options = {"temperature": 2.0, "distil_mask": counts if with_mask else None}
    outside = ~counts.unsqueeze(1)
    results = []
    for value in (0.25, filler):
        dirty, teacher_logits = (torch.where(outside, value, t) for t in (student, teacher))
        slopes = gradients(dirty, teacher_logits, labels, **options).values()
        terms = distillation_terms(dirty, teacher_logits, labels, **options).named().values()
        results.append([*terms, *slopes])
        assert not any(slope[outside.expand_as(slope)].any() for slope in slopes)
    assert all(a.equal(b) for a, b in zip(*results, strict=True))


@given(SEEDS, ANY_CHANNELS, SCALES, TEMPERATURES)
def test_terms_of_parts_average_to_the_whole(seed, channels, scale, temperature):
    """By pixels, Dice by images: else accumulated steps would train something else than one batch.

    Means of means would weigh a pixel of a small part more.
    """
    drawn = draw(channels, seed=seed, scale=scale, batch=2)
    counts = [int((image != IGNORE).sum()) for image in drawn[2]]
    assume(all(counts))
    whole = values(distillation_terms(*drawn, temperature=temperature))
    parts = [
        values(distillation_terms(*(x[b : b + 1] for x in drawn), temperature=temperature))
        for b in range(2)
    ]
    for name in NAMES:
        by = [1, 1] if name == "dice" else counts
        mean = np.average([part[name] for part in parts], weights=by)
        assert whole[name] == pytest.approx(mean, rel=1e-9, abs=1e-12), name


def test_a_step_asks_for_the_factors_once_and_not_once_a_term(monkeypatch):
    """Each new row of the table would make every step slower, with the square of their number."""
    asked = []
    own = LossWeights.effective
    monkeypatch.setattr(LossWeights, "effective", lambda self: asked.append(1) or own(self))
    logits = torch.zeros(1, 1, 2, 2)
    labels = torch.zeros(1, 2, 2, dtype=torch.long)
    weights = LossWeights(kl=1.0, bce=1.0)
    distillation_terms(logits, logits, labels, temperature=1.0, weights=weights)
    assert len(asked) <= 2
