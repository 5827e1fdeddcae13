"""Counts and ratios against scikit-learn on flattened pixels, and boundaries against OpenCV."""

import math

import cv2
import numpy as np
import pytest
import torch
from sklearn import metrics as sk

from kd_trainer.metrics import SegmentationCounts, agreement, boundary_width, image_counts

IGNORE = 255


def names(num_labels):
    return {0: "background"} | {index: f"thing{index}" for index in range(1, num_labels)}


def draw(num_labels, *, batch=5, size=(24, 30), seed=0, ignored=0.15, right=0.7):
    """Blobs as truth, and a prediction that is right on most pixels."""
    rng = np.random.default_rng(seed)
    noise = rng.normal(size=(batch, num_labels, *size)).astype(np.float32)
    smooth = [[cv2.GaussianBlur(plane, (0, 0), 3) for plane in image] for image in noise]
    labels = np.argmax(np.array(smooth), axis=1)
    wrong = rng.integers(0, num_labels, labels.shape)
    prediction = np.where(rng.random(labels.shape) < right, labels, wrong)
    labels = np.where(rng.random(labels.shape) < ignored, IGNORE, labels)
    return torch.from_numpy(prediction), torch.from_numpy(labels)


def figures(prediction, labels, num_labels, **options):
    rows = image_counts(prediction, labels, num_labels, **options).numpy()
    return SegmentationCounts.zero(num_labels).add(rows).metrics(names(num_labels))


def flat(prediction, labels):
    """Valid pixels as two vectors (truth, prediction), the way scikit-learn takes them."""
    valid = labels != IGNORE
    return labels[valid].numpy(), prediction[valid].numpy()


@pytest.mark.parametrize("num_labels", [2, 3, 9])
def test_figures_equal_those_of_scikit_learn_on_the_valid_pixels(num_labels):
    """Swapped axes of the confusion exchange precision and recall, and nothing else notices."""
    prediction, labels = draw(num_labels)
    prediction[prediction == 1] = 0  # an asymmetric error: misses outnumber false alarms
    truth, guess = flat(prediction, labels)
    got = figures(prediction, labels, num_labels)
    front, every = list(range(1, num_labels)), list(range(num_labels))
    mean = {"average": "macro", "zero_division": 0}
    expected = {
        "miou": sk.jaccard_score(truth, guess, labels=every, **mean),
        "iou_foreground": sk.jaccard_score(truth, guess, labels=front, **mean),
        "dice": sk.f1_score(truth, guess, labels=front, **mean),
        "precision": sk.precision_score(truth, guess, labels=front, **mean),
        "recall": sk.recall_score(truth, guess, labels=front, **mean),
        "pixel_accuracy": sk.accuracy_score(truth, guess),
    }
    for index, name in names(num_labels).items():
        one = {"labels": [index], "average": "macro", "zero_division": 0}
        expected[f"iou_{name}"] = sk.jaccard_score(truth, guess, **one)
        expected[f"dice_{name}"] = sk.f1_score(truth, guess, **one)
    expected["mean_image_iou"] = np.mean(
        [sk.jaccard_score(*flat(p, t), average="macro")
         for p, t in zip(prediction, labels, strict=True)]
    )  # fmt: skip
    assert {name: got[name] for name in expected} == pytest.approx(expected, abs=1e-12)
    assert set(got) == {*expected, "boundary_iou"}


def test_binary_precision_and_recall_differ_as_scikit_learn_says():
    """With both classes nearly symmetric an exchange of the two would pass unnoticed."""
    prediction, labels = draw(2)
    prediction[:, :, :10] = 1
    truth, guess = flat(prediction, labels)
    got = figures(prediction, labels, 2)
    assert got["precision"] == pytest.approx(sk.precision_score(truth, guess), abs=1e-12)
    assert got["recall"] == pytest.approx(sk.recall_score(truth, guess), abs=1e-12)
    assert got["recall"] - got["precision"] > 0.1


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_the_confusion_of_each_picture_equals_scikit_learn_s(dtype):
    """Rows are [truth, prediction]; uint8 products wrap around from 16 classes on."""
    num_labels = 20
    prediction, labels = draw(num_labels)
    rows = image_counts(prediction.to(dtype), labels.to(dtype), num_labels, boundary=False)
    assert rows.shape == (5, num_labels * (num_labels + 2))
    assert rows.dtype == torch.int64
    for row, p, t in zip(rows, prediction, labels, strict=True):
        table = sk.confusion_matrix(*flat(p, t), labels=range(num_labels))
        assert np.array_equal(row[: num_labels**2].reshape(num_labels, -1).numpy(), table)
        assert not row[num_labels**2 :].any()


def test_a_class_that_never_occurs_takes_part_in_no_mean():
    """Counted as 0 or 1 it moves the mIoU by a class's share; its own figure is no number."""
    prediction, labels = draw(3)
    four = figures(prediction, labels, 4)
    three = figures(prediction, labels, 3)
    assert {name: four[name] for name in three} == three
    assert math.isnan(four["iou_thing3"])
    assert math.isnan(four["dice_thing3"])


def test_a_class_that_is_only_missed_or_only_imagined_counts_as_zero():
    """Left out of the mean, never predicting a rare class would be rewarded."""
    labels = torch.zeros(1, 8, 8, dtype=torch.long)
    labels[0, :, 4:] = 1
    missed = figures(torch.zeros_like(labels), labels, 2)
    assert [missed[k] for k in ("precision", "recall", "dice", "iou_foreground")] == [0, 0, 0, 0]
    imagined = figures(labels, torch.zeros_like(labels), 2)
    assert [imagined[k] for k in ("precision", "recall", "dice")] == [0, 0, 0]
    assert imagined["miou"] == pytest.approx(0.25)
    assert (missed["boundary_iou"], imagined["boundary_iou"]) == (0, 0)


def outline(mask, depth):
    """A mask minus its erosion by OpenCV; a rim of zeros makes the border an outside."""
    padded = np.pad(mask.astype(np.uint8), 1)
    eroded = cv2.erode(padded, np.ones((3, 3), np.uint8), iterations=depth)[1:-1, 1:-1]
    return mask & ~eroded.astype(bool)


@pytest.mark.parametrize(
    ("size", "depth"), [((20, 20), 1), ((60, 90), 2), ((130, 100), 3), ((40, 400), 8)]
)
@pytest.mark.parametrize("num_labels", [2, 4])
def test_boundary_counts_equal_those_of_opencv_s_erosion(size, depth, num_labels):
    """A band of another depth, or open at the picture's border, changes every boundary IoU."""
    assert boundary_width(*size) == depth
    prediction, labels = draw(num_labels, size=size, batch=3, ignored=0.0, right=0.97)
    rows = image_counts(prediction, labels, num_labels).numpy()[:, num_labels**2 :]
    for row, p, t in zip(rows, prediction.numpy(), labels.numpy(), strict=True):
        pairs = [(outline(t == c, depth), outline(p == c, depth)) for c in range(num_labels)]
        assert row[:num_labels].tolist() == [int((a & b).sum()) for a, b in pairs]
        assert row[num_labels:].tolist() == [int((a | b).sum()) for a, b in pairs]


def test_boundary_width_of_the_recipe_s_pictures():
    """2 % of the diagonal: 18 pixels at 640x640, and never none."""
    assert (boundary_width(640, 640), boundary_width(160, 160), boundary_width(4, 4)) == (18, 5, 1)


def test_boundary_iou_is_the_ratio_of_the_summed_boundaries_of_the_foreground():
    """A shifted square whose bands can be counted by hand: rims of 36 pixels, 18 in common."""
    labels = torch.zeros(1, 30, 30, dtype=torch.long)
    prediction = labels.clone()
    labels[0, 5:15, 5:15] = 1
    prediction[0, 5:15, 6:16] = 1  # one column further: two rows of 9 in common
    got = figures(prediction, labels, 2)
    assert boundary_width(30, 30) == 1
    assert got["boundary_iou"] == pytest.approx(18 / (36 + 36 - 18))


@pytest.mark.parametrize("num_labels", [2, 4])
def test_a_perfect_prediction_is_perfect_beside_ignored_pixels(num_labels):
    """An edge that only the truth has, along an ignored region, would cost boundary IoU."""
    prediction, labels = draw(num_labels, right=1.0, ignored=0.0)
    labels[:, 5:12, 3:20] = IGNORE
    got = figures(prediction, labels, num_labels)
    assert set(got.values()) == {1.0}


@pytest.mark.parametrize("num_labels", [2, 4])
def test_predictions_on_ignored_pixels_have_no_influence(num_labels):
    """Padding is predicted as something; it may not even be a class id."""
    prediction, labels = draw(num_labels)
    expected = image_counts(prediction, labels, num_labels)
    for filler in (0, num_labels - 1, 1000, IGNORE):
        dirty = torch.where(labels == IGNORE, filler, prediction)
        assert torch.equal(image_counts(dirty, labels, num_labels), expected)


def test_an_own_ignore_index_is_honoured():
    """A data set that ignores -1 or 7 has valid pixels of no other meaning."""
    prediction, labels = draw(3)
    expected = image_counts(prediction, labels, 3)
    for index in (-1, 7):
        renamed = torch.where(labels == IGNORE, index, labels)
        assert torch.equal(image_counts(prediction, renamed, 3, ignore_index=index), expected)


def test_a_class_can_be_ignored():
    """Its pixels must leave the boundary counts as well as the confusion."""
    prediction, labels = draw(3, ignored=0.0)
    expected = image_counts(prediction, torch.where(labels == 2, IGNORE, labels), 3)
    assert torch.equal(image_counts(prediction, labels, 3, ignore_index=2), expected)


def test_figures_do_not_depend_on_batches_or_processes():
    """Averaged over batches, an uneven last batch would weigh its pictures more."""
    prediction, labels = draw(3, batch=7)
    whole = figures(prediction, labels, 3)
    rows = image_counts(prediction, labels, 3).numpy()
    first = SegmentationCounts.zero(3).add(rows[:2]).add(rows[2:3])
    second = SegmentationCounts.zero(3).add(rows[3:])
    total = first + second
    assert total.metrics(names(3)) == pytest.approx(whole, abs=1e-12)
    assert (total.images, first.images, SegmentationCounts.zero(3).images) == (7, 3, 0)


def test_counts_add_up_beyond_32_bits():
    """10,000 pictures of 640x640 are 4.1e9 pixels: as int32 the totals turn negative."""
    rows = np.zeros((3, 8), dtype=np.int32)
    rows[:, 0] = rows[:, 3] = 2**30
    totals = SegmentationCounts.zero(2).add(rows)
    assert totals.confusion.tolist() == [[3 * 2**30, 0], [0, 3 * 2**30]]
    assert (totals + totals).metrics(names(2))["miou"] == 1.0


def test_pictures_without_valid_pixels_leave_no_trace():
    """Photographs without labels, or rows that padded a batch, would lower the per-image mean."""
    prediction, labels = draw(2, batch=3)
    alone = figures(prediction[:2], labels[:2], 2)
    labels[2] = IGNORE
    assert figures(prediction, labels, 2) == alone


def test_an_empty_set_has_no_figures_and_no_warning():
    """0/0 in numpy warns and gives NaN somewhere; a 0 would look like a measurement."""
    got = SegmentationCounts.zero(3).metrics(names(3))
    assert all(math.isnan(value) for value in got.values())
    empty = SegmentationCounts.zero(3).add(np.zeros((0, 15), dtype=np.int64))
    assert empty.images == 0


def test_agreement_is_the_share_of_valid_pixels_with_equal_class():
    """Student against teacher, with the labels' ignored pixels left out."""
    student, labels = draw(3)
    teacher, _ = draw(3, seed=1)
    valid = labels != IGNORE
    rows = image_counts(student, torch.where(valid, teacher, IGNORE), 3, boundary=False)
    counts = SegmentationCounts.zero(3).add(rows.numpy())
    assert agreement(counts) == pytest.approx((student == teacher)[valid].double().mean().item())
    assert math.isnan(agreement(SegmentationCounts.zero(3)))


def test_counting_reads_no_value_on_the_host():
    """On the meta device a tensor has no values: `bincount`, `unique` and `.item()` fail."""
    prediction, labels = (x.to("meta") for x in draw(3))
    assert image_counts(prediction, labels, 3).shape == (5, 15)


@pytest.mark.parametrize("unknown", [2, -1])
@pytest.mark.parametrize("side", [0, 1])
def test_a_class_id_that_does_not_exist_fails(side, unknown):
    """A mask of 0 and 2, or a teacher of more classes, would fill a neighbour's cell."""
    maps = draw(2)
    maps[side][maps[1] != IGNORE] = unknown
    with pytest.raises(RuntimeError, match="out of bounds"):
        image_counts(*maps, 2)


@pytest.mark.parametrize("shape", [(2, 4, 5), (1, 5, 5), (2, 1, 5, 5)])
def test_counts_need_equal_shapes(shape):
    """Broadcasting a single prediction over a batch would give plausible counts."""
    with pytest.raises(ValueError, match="one shape"):
        image_counts(torch.zeros(shape).long(), torch.zeros(2, 5, 5).long(), 2)


def test_counts_need_two_classes():
    """One logit is two classes."""
    with pytest.raises(ValueError, match="num_labels >= 2, got 1"):
        image_counts(torch.zeros(1, 2, 2).long(), torch.zeros(1, 2, 2).long(), 1)


def test_rows_of_other_classes_are_refused():
    """Rows are flat: 15 numbers of three classes are no rows of two."""
    zero = SegmentationCounts.zero(2)
    with pytest.raises(ValueError, match="rows of 8 counts for 2 classes"):
        zero.add(np.zeros((1, 15), dtype=np.int64))
    with pytest.raises(TypeError, match="integer counts, got float64"):
        zero.add(np.zeros((1, 8)))
    with pytest.raises(ValueError, match="totals of 2 classes, got 3"):
        zero + SegmentationCounts.zero(3)


@pytest.mark.parametrize(
    "id2label",
    [{0: "background"}, {0: "a", 1: "a", 2: "b"}, {0: "a", 1: "foreground", 2: "b"}],
)
def test_figures_need_a_name_of_its_own_for_each_class(id2label):
    """Two classes of one name would overwrite each other's IoU."""
    with pytest.raises(ValueError, match="one distinct name for each of 3 classes"):
        SegmentationCounts.zero(3).metrics(id2label)


def test_the_only_foreground_class_may_be_called_foreground():
    """Its IoU is the foreground's IoU."""
    prediction, labels = draw(2)
    rows = image_counts(prediction, labels, 2).numpy()
    got = SegmentationCounts.zero(2).add(rows).metrics({0: "background", 1: "foreground"})
    assert got["iou_foreground"] == figures(prediction, labels, 2)["iou_thing1"]
