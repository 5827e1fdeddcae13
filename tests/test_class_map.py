"""A teacher of many classes teaches a student of few."""

import json

import pytest
import torch
from small_runs import write_pairs
from test_teacher import segformer
from transformers import SegformerImageProcessor

from kd_trainer.build import build_run
from kd_trainer.class_map import class_map_text, merge_logits, translate
from kd_trainer.config import build
from kd_trainer.model_arguments import ModelArguments
from kd_trainer.teacher import Teacher, load_teacher

PERSON = {0: "background", 1: "person"}
CITY = {0: "road, route", 1: "sidewalk", 2: "person", 3: "rider", 4: "sky"}
STREET = {0: "background", 1: "street", 2: "people"}


def groups(text, teacher=CITY, ours=PERSON):
    return translate(text, teacher, ours).groups


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_merged_logits_are_the_sums_of_the_probabilities(classes):
    """Anything but the logarithm of a sum of exponentials, a mean or a maximum, is another net."""
    torch.manual_seed(classes)
    logits = 8 * torch.randn(2, 21, 5, 4, dtype=torch.float64)
    cut = torch.randperm(21).tensor_split(classes)
    parts = tuple(tuple(part.tolist()) for part in cut)
    merged = merge_logits(logits, parts)
    probabilities = logits.softmax(1)
    brute = torch.stack([probabilities[:, list(ids)].sum(1) for ids in parts], 1)
    torch.testing.assert_close(merged.softmax(1), brute, rtol=1e-12, atol=1e-15)
    assert torch.isfinite(merge_logits(1e4 * logits, parts)).all()


def test_a_binary_student_gets_one_logit_of_which_the_sigmoid_is_the_sum():
    """z = logsumexp(foreground) - logsumexp(background), which one logit alone cannot show."""

    class Fixed(torch.nn.Module):
        def __init__(self, logits):
            super().__init__()
            self.logits = torch.nn.Parameter(logits)

        def forward(self, _):
            return self.logits

    logits = 3 * torch.randn(2, 5, 6, 6)
    teacher = Teacher(Fixed(logits), num_labels=2, class_map=groups("person=person+rider"))
    answer = teacher(torch.zeros(2, 3, 6, 6))
    assert answer.shape == (2, 1, 6, 6)
    expected = logits.double().softmax(1)[:, [2, 3]].sum(1, keepdim=True)
    torch.testing.assert_close(answer.double().sigmoid(), expected, rtol=1e-5, atol=1e-6)
    one = Teacher(Fixed(logits[:, :1]), num_labels=2, class_map=((1,), (0,)))
    assert torch.equal(one(torch.zeros(2, 3, 6, 6)), -logits[:, :1])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("person=person+rider; background=*", ((0, 1, 4), (2, 3))),
        ("background = * ; PERSON = Rider+2", ((0, 1, 4), (3, 2))),
        ("person=person+rider", ((0, 1, 4), (2, 3))),
        ("person+rider", ((0, 1, 4), (2, 3))),
        ("1=2", ((0, 1, 3, 4), (2,))),
        ("background=road+sky; person=*", ((0, 4), (1, 2, 3))),
        ("person=route", ((1, 2, 3, 4), (0,))),
    ],
)
def test_a_map_is_read_by_name_and_by_id(text, expected):
    """What nobody names is background, which is the student's class of everything else."""
    assert groups(text) == expected


def test_a_map_of_several_classes():
    """Two classes of five; what is left is said."""
    found = translate("street=road+sidewalk; people=person+rider", CITY, STREET)
    assert found.groups == ((4,), (0, 1), (2, 3))
    assert "background = sky" in found.note
    assert "what --class_map does not name is background" in found.note


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("person=persons", "Did you mean person"),
        ("human=person", "Expected a class of the student"),
        ("person=person; person=rider", "person once"),
        ("person=person; background=person+*", "Expected a class of the teacher"),
        ("person=person; background=person+sky", "person twice"),
        ("person=*; background=*", "Expected one \\*"),
        ("person=7", "Expected a class of the teacher"),
        ("person", None),
        ("person=", "CLASS=NAME"),
        ("person=*", "none for background"),
    ],
)
def test_a_map_that_says_nothing_clear_is_refused(text, message):
    """A class that is nobody's, or two masters', would be taught wrong for days."""
    if message is None:
        assert groups(text) is not None
        return
    with pytest.raises(ValueError, match=message):
        groups(text)


def test_a_student_without_background_leaves_no_class_of_the_teacher_to_nobody():
    """Dropped, their probability would silently be shared out among the others."""
    ours = {0: "street", 1: "people"}
    with pytest.raises(ValueError, match="got none for sidewalk, rider, sky"):
        groups("street=road; people=person", ours=ours)
    with pytest.raises(ValueError, match="got none for sidewalk"):
        translate(None, {0: "street", 1: "people", 2: "sidewalk"}, ours)
    assert groups("street=*; people=person", ours=ours) == ((0, 1, 3, 4), (2,))


def test_names_that_are_all_there_need_no_map():
    """Only the background is called otherwise in ADE20K: it is all the rest."""
    found = translate(None, CITY, PERSON)
    assert found.groups == ((0, 1, 3, 4), (2,))
    assert "person = person" in found.note
    assert "--class_map" in found.note
    voc = {0: "background", 1: "aeroplane", 2: "Person"}
    assert translate(None, voc, PERSON).groups == ((0, 1), (2,))
    with pytest.raises(ValueError, match=r"called foreground.*--class_map \"foreground=NAME"):
        translate(None, CITY, {0: "background", 1: "foreground"}, "ade")
    assert translate(None, PERSON, PERSON).groups is None
    assert translate(None, {0: "person"}, PERSON).groups is None


@pytest.mark.parametrize("suffix", ["yaml", "json"])
def test_a_file_holds_the_same_and_its_content_is_the_setting(suffix, tmp_path):
    """A run that is resumed with another file of the same name is another run."""
    content = {"person": ["person", "rider"], "background": "*"}
    file = tmp_path / f"map.{suffix}"
    file.write_text(json.dumps(content))
    assert class_map_text(str(file)) == "person=person+rider; background=*"
    model = ModelArguments(teacher="x", class_map=str(file))
    assert model.class_map == "person=person+rider; background=*"
    with pytest.raises(FileNotFoundError, match="class map"):
        class_map_text(str(tmp_path / "none.yaml"))
    file.write_text("[1]")
    with pytest.raises(ValueError, match="Expected lines like"):
        class_map_text(str(file))


def test_a_model_of_ade20k_teaches_in_one_flag(tmp_path, capsys):
    """Its preprocessing says do_reduce_labels, which is how its own masks were read, not these."""
    names = {i: f"thing {i}" for i in range(150)} | {12: "person"}
    segformer(150, names).save_pretrained(tmp_path / "ade")
    SegformerImageProcessor(do_reduce_labels=True).save_pretrained(tmp_path / "ade")
    root = write_pairs(tmp_path / "data")
    settings = {"dataset": str(root), "image_size": 64, "augmentation": "none", "use_cpu": True}
    settings |= {"student_encoder": "resnet18", "encoder_weights": "none"}
    settings |= {"teacher": str(tmp_path / "ade"), "class_names": ["background", "person"]}
    parts = build_run(build(settings))
    said = capsys.readouterr().err
    assert "read as they are" in said
    assert "person = person" in said
    assert parts.train_dataset.transform.rule.values != (1, 2)
    pixels = torch.randn(1, 3, 64, 64)
    probability = parts.teacher.network(pixels).logits.softmax(1)[:, 12:13]
    z = merge_logits(parts.teacher.network(pixels).logits, parts.teacher.class_map)
    torch.testing.assert_close(z.softmax(1)[:, 1:], probability, rtol=1e-4, atol=1e-6)
    assert parts.teacher(pixels).shape == (1, 1, 64, 64)
    named = load_teacher(
        settings["teacher"], num_labels=2, id2label=PERSON, class_map="person=12+thing 3"
    )
    assert named.class_map[1] == (12, 3)
    assert named.id2label == PERSON
