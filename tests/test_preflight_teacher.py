"""Checks of a preflight that look at the teacher: each fault is found, and health is not."""

import pytest
import torch
from torch import Tensor, nn

from kd_trainer.doctor.finding import Finding, Grade
from kd_trainer.doctor.input_convention import (
    PRESENT,
    USUAL,
    ConventionTrial,
    InputConvention,
    alternatives,
    batchnorm_distance,
    first_batchnorm,
    normalisation_finding,
)
from kd_trainer.doctor.teacher import (
    OutputRange,
    Predictions,
    classes_finding,
    input_size_finding,
    output_finding,
    position_finding,
    quality_finding,
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
    nothing = torch.zeros_like(labels)
    constant = Predictions(nothing, labels, BINARY)
    assert (
        constant.miou
        == constant.constant_miou
        == pytest.approx(float((labels == 0).float().mean()) / 2)
    )
    assert quality_finding(constant).grade == Grade.FAULT
    assert "better than background everywhere" in quality_finding(constant).text
    assert quality_finding(Predictions(nothing, nothing + 255, BINARY)).grade == Grade.FAULT
    little = torch.where(torch.arange(SIDE) < 10, labels, 0)
    assert quality_finding(Predictions(little, labels, BINARY)).grade == Grade.NOTE
    assert quality_finding(Predictions(noisy(labels, 2), labels, BINARY)).grade == Grade.OK


def test_a_constant_is_judged_on_the_pixels_that_count():
    """Ignored pixels would make the class around them the best guess."""
    labels = truth(2)
    labels[labels == 0] = 255
    constant = Predictions(labels, labels, BINARY)
    assert (constant.constant_miou, constant.commonest) == (1.0, 1)


def test_a_student_ahead_of_its_teacher_is_a_note():
    """It would be taught to get worse; that can be wanted, so the training goes on."""
    assert student_finding(0.6, 0.7).grade == Grade.NOTE
    assert student_finding(0.7, 0.6).grade == Grade.OK
    assert student_finding(0.7, 0.71).grade == Grade.OK


def classes(prediction: Tensor, labels: Tensor, names: dict[int, str]) -> Finding:
    return classes_finding(Predictions(prediction, labels, names))


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


def position(prediction: Tensor, labels: Tensor, names: dict[int, str] = BINARY) -> Finding:
    return position_finding(Predictions(prediction, labels, names))


@pytest.mark.parametrize("names", [BINARY, FOUR], ids=["binary", "four"])
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
def test_masks_elsewhere_are_found_with_the_way_they_went(change, words: str, names):
    """Such masks still give half of the IoU, and a student that is half wrong."""
    labels = truth(num_labels=len(names))
    finding = position(noisy(labels, len(names)), change(labels), names)
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


def trial(right_share: float, wrong_share: float, images: int = 6) -> ConventionTrial:
    """A teacher that is fed wrongly, of so many wrong pixels in either way."""
    labels = truth(images)
    right, wrong = (
        Predictions(noisy(labels, 2, share), labels, BINARY) for share in (right_share, wrong_share)
    )
    return ConventionTrial({"right": RIGHT}, wrong, {"right": right})


def test_a_normalisation_that_costs_figures_is_a_fault_with_the_flags():
    """The teacher would be worse than it is, and nothing else would look wrong."""
    finding = normalisation_finding(trial(0.01, 0.2))
    assert finding.grade == Grade.FAULT
    assert "--teacher_mean 0.485 0.456 0.406 --teacher_std 0.229 0.224 0.225" in finding.cure


@pytest.mark.parametrize(
    ("right", "wrong", "images", "grade"),
    [
        (0.10, 0.11, 6, Grade.OK),
        (0.20, 0.01, 6, Grade.OK),
        (0.01, 0.20, 2, Grade.NOTE),
        (0.30, 0.50, 6, Grade.OK),
    ],
    ids=["as good", "worse", "two images", "near a constant"],
)
def test_a_normalisation_is_not_blamed_for_chance(right, wrong, images, grade):
    """With four tries one is always the best; it has to be clearly so."""
    assert normalisation_finding(trial(right, wrong, images)).grade == grade


def test_the_first_batchnorm_tells_what_the_teacher_was_trained_on():
    """Robust teachers lose no mIoU by wrong input, so that figures alone do not show it."""
    torch.manual_seed(0)
    images = torch.rand(8, 3, 32, 32) * torch.linspace(0.2, 1, 8).view(8, 1, 1, 1)
    network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8, momentum=None))
    network(RIGHT.inputs(images))  # its training
    norm = first_batchnorm(network)
    assert norm is not None
    right, wrong = (
        batchnorm_distance(network[0](convention.inputs(images[::2])), norm)
        for convention in (RIGHT, WRONG)
    )
    # By hand, for one channel: KL of N(0, 1) from N(1, 4).
    unit = nn.BatchNorm2d(1, eps=0)
    unit.running_mean, unit.running_var = torch.ones(1), torch.full((1,), 4.0)
    values = torch.tensor([1.0, -1.0]).view(1, 1, 1, 2) / 2**0.5  # mean 0, variance 1
    expected = (torch.log(torch.tensor(4.0)) + 2 / 4 - 1) / 2
    assert batchnorm_distance(values, unit) == pytest.approx(float(expected), abs=1e-6)

    now = trial(0.01, 0.01).now
    distances = {"ImageNet's": right, PRESENT: wrong}
    finding = normalisation_finding(ConventionTrial(alternatives(WRONG), now, {}, distances))
    assert finding.grade == Grade.NOTE
    assert "--teacher_mean 0.485" in finding.cure
    distances = {"mean and std 0.5": wrong, PRESENT: right}
    healthy = ConventionTrial(alternatives(RIGHT), now, {}, distances)
    assert normalisation_finding(healthy).grade == Grade.OK


def test_a_network_without_running_statistics_has_no_such_witness():
    """Transformers have none, and a BatchNorm may be told to keep none."""
    assert first_batchnorm(nn.Sequential(nn.Conv2d(3, 1, 1), nn.GroupNorm(1, 1))) is None
    assert first_batchnorm(nn.BatchNorm2d(3, track_running_stats=False)) is None


def test_the_present_normalisation_is_not_its_own_alternative():
    """It would always be as good, and its colours swapped are tried as well."""
    others = alternatives(InputConvention((0.485, 0.456, 0.406), (0.229, 0.224, 0.2250001)))
    assert list(others) == ["mean and std 0.5", "values 0..1", "values 0..255", "the order BGR"]
    image = torch.rand(1, 3, 2, 2)
    swapped = others["the order BGR"].inputs(image)
    assert torch.allclose(swapped, RIGHT.inputs(image.flip(1)), atol=1e-5)
    assert torch.equal(others["values 0..255"].inputs(image), image / torch.tensor(1 / 255))


@pytest.mark.parametrize(("trained", "given", "grade"), [(640, 128, "note"), (128, 224, "ok")])
def test_a_teacher_far_from_its_size_is_a_note(trained: int, given: int, grade: str):
    """Nets see objects of another size than they were trained with."""
    finding = input_size_finding(trained, given)
    assert finding.grade == grade
    assert ("--teacher_image_size 640" in finding.cure) == (grade == "note")
