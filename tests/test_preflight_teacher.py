"""Checks of a preflight that look at the teacher: each fault is found, and health is not."""

import pytest
import torch
from torch import Tensor, nn

from kd_trainer.doctor.finding import Finding, Grade
from kd_trainer.doctor.input_convention import (
    PRESENT,
    USUAL,
    Feeding,
    Trials,
    alternatives,
    first_batchnorm,
    misfit,
    normalisation_finding,
    position_finding,
)
from kd_trainer.doctor.teacher import (
    OutputRange,
    classes_finding,
    constant_miou,
    input_size_finding,
    output_finding,
    quality_finding,
    rows_of,
    student_finding,
)

BINARY = {0: "background", 1: "person"}
FOUR = {0: "background", 1: "hat", 2: "coat", 3: "shoe"}
SIDE = 64


def truth(images: int = 6, num_labels: int = 2) -> Tensor:
    """Labels with one off-centre rectangle of each class, elsewhere in each image."""
    labels = torch.zeros(images, SIDE, SIDE, dtype=torch.long)
    for index in range(images):
        for label in range(1, num_labels):
            top, left = 3 + 15 * (label - 1) + index, 5 + 3 * index
            labels[index, top : top + 13, left : left + 24 + label] = label
    return labels


def noisy(labels: Tensor, num_labels: int, share: float = 0.02) -> Tensor:
    """The labels with a few wrong pixels, as a good network finds them."""
    random = torch.Generator().manual_seed(3)
    wrong = torch.rand(labels.shape, generator=random) < share
    return torch.where(wrong, (labels + 1) % num_labels, labels)


def found(finding: Finding) -> tuple[str, str]:
    return finding.check, finding.grade


def range_of(output: Tensor) -> OutputRange:
    return OutputRange().add(output[:1]).add(output[1:])


LOGITS = 3 * torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("output", "words"),
    [
        (LOGITS[:, :1].sigmoid(), "as a sigmoid gives"),
        (LOGITS.softmax(dim=1), "as a softmax gives"),
        (LOGITS[:, :2].softmax(dim=1).half(), "as a softmax gives"),
        (LOGITS.sigmoid(), "as a sigmoid gives"),
        (LOGITS * float("nan"), "got NaN or infinity"),
    ],
)
def test_probabilities_and_nan_instead_of_logits_are_found(output: Tensor, words: str):
    """The losses would take the sigmoid of a sigmoid, and the student would learn grey."""
    finding = output_finding(range_of(output))
    assert finding.grade == Grade.FAULT
    assert words in finding.text
    assert finding.cure


@pytest.mark.parametrize(
    "output", [LOGITS, LOGITS[:, :1], 0.01 * LOGITS, LOGITS.log_softmax(dim=1), LOGITS.half()]
)
def test_logits_are_not_taken_for_probabilities(output: Tensor):
    """A weak teacher has small logits, and logarithms of probabilities are logits."""
    assert output_finding(range_of(output)).grade == Grade.OK


def test_a_teacher_no_better_than_a_constant_is_found():
    """It looks like a slow training for as long as one has patience."""
    labels = truth()
    constant, label = constant_miou(labels, 2, 255)
    background = (labels == 0).float().mean()
    assert label == 0
    assert constant == pytest.approx(float(background) / 2)
    assert quality_finding(constant, constant, "background", 6).grade == Grade.FAULT
    assert quality_finding(float("nan"), constant, "background", 6).grade == Grade.FAULT
    assert quality_finding(constant + 0.01, constant, "background", 6).grade == Grade.NOTE
    assert quality_finding(constant + 0.11, constant, "background", 6).grade == Grade.OK


def test_a_constant_is_judged_on_the_pixels_that_count():
    """Ignored pixels would make the class around them the best guess."""
    labels = truth(2)
    labels[labels == 0] = 255
    assert constant_miou(labels, 2, 255) == (1.0, 1)


def test_a_student_ahead_of_its_teacher_is_a_note():
    """It would be taught to get worse; that can be wanted, so the training goes on."""
    assert student_finding(0.6, 0.7).grade == Grade.NOTE
    assert student_finding(0.7, 0.6).grade == Grade.OK
    assert student_finding(0.7, 0.71).grade == Grade.OK


def classes(prediction: Tensor, labels: Tensor, names: dict[int, str]) -> Finding:
    count = len(names)
    constant, _ = constant_miou(labels, count, 255)
    return classes_finding(rows_of(prediction, labels, count, 255), names, constant=constant)


def test_inverted_masks_are_found():
    """The student would learn the background, with a good-looking loss."""
    labels = truth()
    finding = classes(1 - noisy(labels, 2), labels, BINARY)
    assert finding.grade == Grade.FAULT
    assert "inverted" in finding.text


@pytest.mark.parametrize(
    ("order", "words"),
    [([0, 2, 1, 3], "hat → coat, coat → hat"), ([0, 2, 3, 1], "hat → coat, coat → shoe, shoe")],
)
def test_mixed_up_class_ids_are_found_and_named(order: list[int], words: str):
    """The terms of the teacher and of the masks would pull to different classes."""
    labels = truth(num_labels=4)
    finding = classes(torch.tensor(order)[noisy(labels, 4)], labels, FOUR)
    assert finding.grade == Grade.FAULT
    assert words in finding.text


@pytest.mark.parametrize("step", [-1, 1])
def test_class_ids_that_are_shifted_by_one_are_found(step: int):
    """ADE20K's convention: what one side calls 0 the other does not have. All was called well."""
    labels = truth(num_labels=4)
    # What one side does not have is found somewhere among the classes that both have.
    finding = classes((noisy(labels, 4) + step).clamp(0, 3), labels, FOUR)
    assert finding.grade == Grade.FAULT
    assert f"shifted by one: mask value i fits class i {step:+d}".replace("1", " 1") in finding.text
    assert "--reduce_labels" in finding.cure


def test_one_class_under_an_id_that_no_mask_has_is_noted():
    """Of two classes that occur one was never found, and all was called well."""
    labels = truth(num_labels=2) * 2
    finding = classes(labels // 2 * 3, labels, FOUR)
    assert finding.grade == Grade.NOTE
    assert f"{FOUR[2]} → {FOUR[3]}" in finding.text
    assert "--mask_values" in finding.cure
    assert "2 of 4 that occur" in classes(labels, labels, FOUR).text


@pytest.mark.parametrize("kind", ["good", "one class taken for another", "random", "constant"])
@pytest.mark.parametrize("names", [BINARY, FOUR], ids=["binary", "four"])
def test_weak_teachers_are_not_called_mixed_up(kind: str, names: dict[int, str]):
    """A teacher that confuses two garments means the same by them; one that knows nothing says
    nothing about the masks."""
    count = len(names)
    labels = truth(num_labels=count)
    random = torch.Generator().manual_seed(5)
    prediction = {
        "good": noisy(labels, count),
        "one class taken for another": torch.where(labels == count - 1, 1, labels),
        "random": torch.randint(0, count, labels.shape, generator=random),
        "constant": torch.zeros_like(labels),
    }[kind]
    compared = kind not in ("random", "constant")  # of what says nothing nothing is called well
    finding = classes(prediction, labels, names)
    assert finding.grade == (Grade.OK if compared else Grade.NOTE)
    assert ("could not be compared" in finding.text) is not compared


def position(prediction: Tensor, labels: Tensor, count: int = 2) -> Finding:
    constant, _ = constant_miou(labels, count, 255)
    return position_finding(prediction, labels, count, ignore_index=255, constant=constant)


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m.roll(4, -1), "too far right by 6.2% of the width"),
        (lambda m: m.roll(-6, -2), "too far up by 9.4% of the height"),
        (
            lambda m: m.roll((4, -4), (-2, -1)),
            "too far down by 6.2% of the height and too far left",
        ),
        (lambda m: m.flip(-1), "mirrored left to right"),
        (lambda m: m.flip(-2), "mirrored top to bottom"),
        (lambda m: m.transpose(-2, -1), "rows and columns exchanged"),
    ],
    ids=["right", "up", "both", "mirrored", "upside down", "transposed"],
)
def test_masks_elsewhere_are_found_with_the_way_they_went(change, words: str, count: int):
    """Such masks still give half of the IoU, and a student that is half wrong."""
    labels = truth(num_labels=count)
    finding = position(noisy(labels, count), change(labels), count)
    assert finding.grade == Grade.FAULT
    assert words in finding.text


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3])
def test_masks_in_place_are_not_called_moved(share: float):
    """Also beside a teacher that is wrong on a third of the pixels."""
    labels = truth()
    assert position(noisy(labels, 2, share), labels).grade == Grade.OK
    assert position(torch.zeros_like(labels), labels).grade == Grade.OK


def test_two_images_are_too_few_for_a_fault_of_position():
    """On a slow machine a training looks at two; a stop needs more than that."""
    labels = truth(2)
    assert position(labels, labels.flip(-1)).grade == Grade.NOTE


RIGHT, WRONG = USUAL["ImageNet's"], USUAL["mean and std 0.5"]


def trials(right_share: float, wrong_share: float, images: int = 6) -> Trials:
    """A teacher that is fed wrongly, of so many wrong pixels in either way."""
    labels = truth(images)

    def count(share: float):
        return rows_of(noisy(labels, 2, share), labels, 2, 255)

    return Trials({"right": RIGHT}, count(wrong_share), {"right": count(right_share)})


def test_a_normalisation_that_costs_figures_is_a_fault_with_the_flags():
    """The teacher would be worse than it is, and nothing else would look wrong."""
    finding = normalisation_finding(trials(0.01, 0.2), 2, constant=0.45)
    assert finding.grade == Grade.FAULT
    assert "--teacher_mean 0.485 0.456 0.406 --teacher_std 0.229 0.224 0.225" in finding.cure


@pytest.mark.parametrize(
    ("right", "wrong", "images", "constant", "grade"),
    [
        (0.10, 0.11, 6, 0.45, Grade.OK),
        (0.20, 0.01, 6, 0.45, Grade.OK),
        (0.01, 0.20, 2, 0.45, Grade.NOTE),
        (0.01, 0.20, 6, 0.95, Grade.OK),
    ],
    ids=["as good", "worse", "two images", "near a constant"],
)
def test_a_normalisation_is_not_blamed_for_chance(right, wrong, images, constant, grade):
    """With four tries one is always the best; it has to be clearly so."""
    finding = normalisation_finding(trials(right, wrong, images), 2, constant=constant)
    assert finding.grade == grade


def test_the_first_batchnorm_tells_what_the_teacher_was_trained_on():
    """Robust teachers lose no mIoU by wrong input, so that figures alone do not show it."""
    torch.manual_seed(0)
    pictures = torch.rand(8, 3, 32, 32) * torch.linspace(0.2, 1, 8).view(8, 1, 1, 1)
    network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8, momentum=None))
    network(RIGHT.inputs(pictures))  # its training
    norm = first_batchnorm(network)
    assert norm is not None
    fits = {
        name: misfit(network[0](way.inputs(pictures[::2])), norm)
        for name, way in {"ImageNet's": RIGHT, PRESENT: WRONG}.items()
    }
    # By hand, for one channel: KL of N(0, 1) from N(1, 4).
    unit = nn.BatchNorm2d(1, eps=0)
    unit.running_mean, unit.running_var = torch.ones(1), torch.full((1,), 4.0)
    values = torch.tensor([1.0, -1.0]).view(1, 1, 1, 2) / 2**0.5  # mean 0, variance 1
    expected = (torch.log(torch.tensor(4.0)) + 2 / 4 - 1) / 2
    assert misfit(values, unit) == pytest.approx(float(expected), abs=1e-6)

    here = Trials(alternatives(WRONG), trials(0.01, 0.01).now, {}, fits)
    finding = normalisation_finding(here, 2, constant=0.45)
    assert finding.grade == Grade.NOTE
    assert "--teacher_mean 0.485" in finding.cure
    swapped = {"mean and std 0.5": fits[PRESENT], PRESENT: fits["ImageNet's"]}
    healthy = Trials(alternatives(RIGHT), here.now, {}, swapped)
    assert normalisation_finding(healthy, 2, constant=0.45).grade == Grade.OK


def test_a_network_without_running_statistics_has_no_such_witness():
    """Transformers have none, and a BatchNorm may be told to keep none."""
    assert first_batchnorm(nn.Sequential(nn.Conv2d(3, 1, 1), nn.GroupNorm(1, 1))) is None
    assert first_batchnorm(nn.BatchNorm2d(3, track_running_stats=False)) is None


def test_the_present_normalisation_is_not_its_own_alternative():
    """It would always be as good, and its colours swapped are tried as well."""
    others = alternatives(Feeding((0.485, 0.456, 0.406), (0.229, 0.224, 0.2250001)))
    assert list(others) == ["mean and std 0.5", "values 0..1", "values 0..255", "the order BGR"]
    picture = torch.rand(1, 3, 2, 2)
    swapped = others["the order BGR"].inputs(picture)
    assert torch.allclose(swapped, RIGHT.inputs(picture.flip(1)), atol=1e-5)
    assert torch.equal(others["values 0..255"].inputs(picture), picture / torch.tensor(1 / 255))


@pytest.mark.parametrize(("trained", "given", "grade"), [(640, 128, "note"), (128, 224, "ok")])
def test_a_teacher_far_from_its_size_is_a_note(trained: int, given: int, grade: str):
    """Nets see objects of another size than they were trained with."""
    finding = input_size_finding(trained, given)
    assert found(finding) == ("teacher size", grade)
    assert ("--teacher_image_size 640" in finding.cure) == (grade == "note")
