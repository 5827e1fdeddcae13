"""Several teachers, and several looks of one: the mean of their probabilities."""

import pytest
import torch
from small_runs import write_pairs
from tiny import SIDE, tiny_student
from torch import nn

from kd_trainer.build import build_run
from kd_trainer.config import build
from kd_trainer.model_arguments import ModelArguments
from kd_trainer.parsing import convert, hints_of
from kd_trainer.teacher import Teacher, TeacherInference
from kd_trainer.teacher_cache import cache_key
from kd_trainer.teacher_ensemble import ensemble_of, mean_logits


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_the_mean_is_that_of_the_probabilities(channels):
    """A mean of logits lets the surest teacher decide alone."""
    torch.manual_seed(channels)
    logits = [4 * torch.randn(2, channels, 3, 3, dtype=torch.float64) for _ in range(3)]
    weights = [2.0, 1.0, 0.5]

    def probabilities(z):
        return z.sigmoid() if channels == 1 else z.softmax(1)

    mean = sum(w * probabilities(z) for w, z in zip(weights, logits, strict=True)) / 3.5
    found = probabilities(mean_logits(logits, weights))
    torch.testing.assert_close(found, mean, rtol=1e-12, atol=1e-15)
    sure = [300 * torch.ones(1, channels, 1, 1), 300 * torch.ones(1, channels, 1, 1)]
    assert torch.isfinite(mean_logits(sure, [1.0, 1.0])).all()


def teachers(count=2):
    statistics = [((0.5,) * 3, (0.5,) * 3), ((0.4, 0.3, 0.2), (0.2,) * 3)]
    return [
        Teacher(tiny_student(seed=seed).eval(), num_labels=2, mean=mean, std=std)
        for seed, (mean, std) in zip(range(count), statistics, strict=False)
    ]


def test_each_teacher_sees_the_image_in_its_own_normalisation_whatever_the_students_is():
    """All of them behind one teacher, which is told the student's statistics once more."""
    several, images = teachers(), torch.randn(2, 3, SIDE, SIDE)
    one = ensemble_of(several, weights=[3, 1])
    p = 0.75 * several[0](images).sigmoid() + 0.25 * several[1](images).sigmoid()
    torch.testing.assert_close(one(images).sigmoid(), p, rtol=1e-4, atol=1e-6)
    other = ((0.1, 0.2, 0.3), (0.3, 0.2, 0.1))
    one.expect_input(*other)
    shifted = (images * 0.225 + 0.45 - torch.tensor(other[0]).view(1, 3, 1, 1)) / torch.tensor(
        other[1]
    ).view(1, 3, 1, 1)
    for teacher in several:
        teacher.expect_input(*other)
    p = 0.75 * several[0](shifted).sigmoid() + 0.25 * several[1](shifted).sigmoid()
    for teacher in several:  # as they were when they became members
        teacher.expect_input((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    torch.testing.assert_close(one(shifted).sigmoid(), p, rtol=1e-3, atol=1e-4)


def test_the_mirrored_look_is_mirrored_back():
    """Its answer the wrong way round would blur every map along its middle."""

    class Left(nn.Module):
        """Sure of the left half, and of what is bright."""

        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.ones(()))

        def forward(self, x):
            ramp = torch.linspace(2, -2, x.shape[-1])
            return (x.mean(1, keepdim=True) + ramp) * self.gain

    plain = Teacher(Left(), num_labels=2)
    images = torch.randn(1, 3, 8, 8)
    flipped = ensemble_of([plain], flip=True)
    p = (plain(images).sigmoid() + plain(images.flip(-1)).sigmoid().flip(-1)) / 2
    torch.testing.assert_close(flipped(images).sigmoid(), p)
    assert ensemble_of([plain]) is plain


def test_an_ensemble_is_asked_like_one_teacher_in_a_training():
    """Folded, in half precision, and frozen."""
    one = ensemble_of(teachers(), flip=True)
    images = torch.randn(1, 3, SIDE, SIDE)
    assert not any(m.training for m in one.train().modules())
    assert not any(p.requires_grad for p in one.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        rounded = TeacherInference(one, precision="bf16")(images)
    torch.testing.assert_close(rounded, one(images), rtol=0.1, atol=0.1)


def test_the_cache_tells_ensembles_apart():
    """Weights of the mean, the flip, and what lies before and behind each network."""
    keys = [
        cache_key(teacher, image_size=SIDE, precision="no", folded=True)
        for teacher in (
            teachers()[0],
            ensemble_of(teachers()),
            ensemble_of(teachers()),
            ensemble_of(teachers(), weights=[2, 1]),
            ensemble_of(teachers(), flip=True),
            ensemble_of(teachers(1), flip=True),
            ensemble_of([*teachers(1), Teacher(tiny_student(seed=1), num_labels=2)]),
            ensemble_of([*teachers(1), Teacher(tiny_student(seed=1), num_labels=2, image_size=64)]),
        )
    ]
    assert keys[1] == keys[2]
    assert len({str(key) for key in keys}) == len(keys) - 1


def test_several_teachers_are_named_like_one():
    """One string stays one, also with a space in it; a list is several."""
    assert ModelArguments(teacher="a b").teacher == "a b"
    hint = hints_of([ModelArguments])["teacher"]
    assert convert("teacher", "my teacher/", hint) == "my teacher/"
    assert convert("teacher", ["a", "b"], hint) == ["a", "b"]
    assert convert("teacher", "", hint) == ""
    assert ModelArguments(teacher=["a"]).teacher == "a"
    several = ModelArguments(teacher=["x/a", "b"], teacher_shares=[2, 1])
    assert several.teachers == ["x/a", "b"]
    assert not ModelArguments(teacher="none").has_teacher
    with pytest.raises(ValueError, match="stand alone"):
        ModelArguments(teacher=["a", "none"])
    for weights in ([1], [1, 0], [1, 2, 3]):
        with pytest.raises(ValueError, match="for each of 2 teachers"):
            ModelArguments(teacher=["a", "b"], teacher_shares=weights)


def test_a_run_with_two_teachers_and_a_flip(tmp_path):
    """From the settings to the targets, and to what the run writes down."""
    folders = [str(tmp_path / name) for name in ("one", "two")]
    for seed, folder in enumerate(folders):
        tiny_student(seed=seed).save_pretrained(folder)
    settings = {"dataset": str(write_pairs(tmp_path / "data")), "image_size": SIDE}
    settings |= {"class_names": ["background", "person"], "augmentation": "none", "use_cpu": True}
    settings |= {"student_encoder": "resnet18", "encoder_weights": "none"}
    run = build(settings | {"teacher": folders, "teacher_flip": True, "teacher_shares": [2, 1]})
    parts = build_run(run)
    assert run.resolved()["teacher"] == folders
    assert run.model.teacher_name == "one + two"
    images = torch.randn(1, 3, SIDE, SIDE)
    members = parts.teacher.network.teachers
    looks = [m(images).sigmoid() for m in members]
    looks = [
        (p + m(images.flip(-1)).sigmoid().flip(-1)) / 2 for p, m in zip(looks, members, strict=True)
    ]
    expected = (2 * looks[0] + looks[1]) / 3
    torch.testing.assert_close(parts.teacher(images).sigmoid(), expected, rtol=1e-4, atol=1e-5)
