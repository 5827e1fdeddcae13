"""Students that are no networks of smp: stock models of transformers, and modules from Python."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from same_run import assert_resumes_exactly
from stock_models import FAMILIES, stock_model
from tiny import SIDE, Squares, arguments, tiny_student, tiny_teacher
from torch import nn
from transformers import (
    AutoImageProcessor,
    MobileViTImageProcessor,
    SegformerForImageClassification,
)

from kd_trainer.data_arguments import DataArguments
from kd_trainer.evaluation import normalise, pixel_statistics
from kd_trainer.loading import load_student, make_student
from kd_trainer.model_arguments import ModelArguments
from kd_trainer.models.image_processing import resize_image
from kd_trainer.students import (
    MOST_UNITS,
    as_student,
    channels_of,
    has_new_head,
    has_one_logit,
    hold_frozen,
    image_size_of,
    labels_of_student,
    load_module,
    never_used,
    parameter_counts,
    processor_of,
    set_free_units,
    statistics_of,
    student_logits,
    units_of,
)
from kd_trainer.teacher import load_teacher
from kd_trainer.trainer import DistillationTrainer

THREE = ("segformer", "upernet", "mobilevit")


def saved(family: str, folder: Path, num_labels: int = 2, **settings: Any) -> str:
    """The folder of a saved model, with a preprocessing if there are settings of one."""
    stock_model(family, num_labels).save_pretrained(folder)
    if settings:
        (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return str(folder)


def made(source: str, num_labels: int = 2, **data: Any) -> nn.Module:
    """The student of a run."""
    settings = {"dataset": "synthetic", "image_size": 64, "num_labels": num_labels, **data}
    return make_student(ModelArguments(student=source, teacher="none"), DataArguments(**settings))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_used_parameter_is_of_one_unit_or_of_the_rest(family: str):
    """One in two units, or in none where its stage is frozen, would be trained at another rate."""
    student = as_student(stock_model(family), image_size=64)
    units = units_of(student)
    assert 4 <= len(units) <= MOST_UNITS
    named = [name for unit in units for name, _ in unit.parameters()]
    assert len(named) == len(set(named))
    rest = {name for name, _ in student.named_parameters()} - set(named) - never_used(student)
    assert rest
    assert not any(name.startswith(("backbone", f"{student.base_model_prefix}.")) for name in rest)
    pixels = torch.randn(2, 3, 64, 64)
    student_logits(student, pixels).sum().backward()
    without = {name for name, p in student.named_parameters() if p.grad is None}
    assert without == never_used(student)
    student.zero_grad()
    set_free_units(student, 1)
    student_logits(student, pixels).sum().backward()
    trained = {name for name, p in student.named_parameters() if p.grad is not None}
    assert trained == rest | {name for name, _ in units[-1].parameters()}
    assert parameter_counts(student)[2] == sum(student.get_parameter(n).numel() for n in trained)


def test_units_of_a_plain_transformer_are_groups_with_what_is_around_them():
    """Position embeddings that stay free, or a last norm that is frozen, belie the plan."""
    units = units_of(as_student(stock_model("beit"), image_size=64))
    names = [[name for name, _ in unit.parameters()] for unit in units]
    assert any(".embeddings." in name for name in names[0])
    assert all(any(".layers." in name for name in own) for own in names)
    deepest = units_of(as_student(stock_model("mobilenet"), image_size=64))[-1]
    assert any(".layer.15." in name for name, _ in deepest.parameters())


def test_a_saved_model_of_one_logit_keeps_it_and_says_how_to_read_it(tmp_path: Path, capsys):
    """Two classes are two channels in transformers, but people train one logit with a BCE."""
    source = saved("segformer", tmp_path, num_labels=1)
    student = made(source)
    assert "one logit, above 0 where the class is" in capsys.readouterr().err
    assert not has_new_head(student)
    assert channels_of(student) == 1
    assert labels_of_student(student) == {0: "background", 1: "background"}
    named = made(source, class_names=["rest", "road"])
    assert labels_of_student(named) == {0: "rest", 1: "road"}
    assert named.config.id2label == {0: "road"}
    assert has_one_logit(named)
    assert not has_one_logit(as_student(stock_model("segformer")))
    with torch.no_grad():
        stock = named.eval()(torch.ones(1, 3, 64, 64)).logits
        logits = student_logits(named, torch.ones(1, 3, 64, 64))
    assert torch.equal(logits, F.interpolate(stock, (64, 64), mode="bilinear"))


@pytest.mark.parametrize("family", THREE)
def test_a_binary_stock_model_says_the_same_by_its_argmax(family: str):
    """Losses see one logit: with another sign or size its mask would not be the saved model's."""
    model = stock_model(family).eval()
    student = as_student(model, image_size=64)
    assert channels_of(student) == 1
    pixels = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        stock, logits = model(pixel_values=pixels).logits, student_logits(student, pixels)
    whole = F.interpolate(stock, (64, 64), mode="bilinear", align_corners=False)
    assert logits.shape == (2, 1, 64, 64)
    assert torch.equal(logits[:, 0] > 0, whole.argmax(1) == 1)
    assert torch.allclose(logits[:, 0].sigmoid(), whole.softmax(1)[:, 1], atol=1e-6)


def test_a_new_head_is_said_and_the_encoder_stays(tmp_path: Path, capsys):
    """A head of random weights that nobody mentions looks like a model that does not work."""
    source = saved("segformer", tmp_path, num_labels=5)
    student = made(source, num_labels=3, class_names=["road", "car", "sky"])
    assert "gets a new head for 3 classes (decode_head.classifier)." in capsys.readouterr().err
    assert has_new_head(student)
    assert labels_of_student(student) == {0: "road", 1: "car", 2: "sky"}
    before, after = stock_model("segformer", 5).state_dict(), student.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"decode_head.classifier.weight", "decode_head.classifier.bias"}


def test_a_head_of_as_many_classes_is_kept(tmp_path: Path, capsys):
    """Training it anew would throw away what the model knows."""
    student = made(saved("segformer", tmp_path, num_labels=3), num_labels=3)
    assert "keeps its head of 3 classes" in capsys.readouterr().err
    assert not has_new_head(student)
    before = stock_model("segformer", 3).state_dict()
    assert all(torch.equal(before[name], value) for name, value in student.state_dict().items())


def test_a_classifier_of_images_is_an_encoder_to_start_from(tmp_path: Path, capsys):
    """Pretrained encoders such as nvidia/mit-b0 are saved so."""
    torch.manual_seed(0)
    config = stock_model("segformer").config
    classifier = SegformerForImageClassification(config)
    classifier.save_pretrained(tmp_path)
    student = made(str(tmp_path))
    assert "gets a new head for 2 classes (decode_head." in capsys.readouterr().err
    encoder = {n: v for n, v in classifier.state_dict().items() if n.startswith("segformer.")}
    assert all(torch.equal(student.state_dict()[name], value) for name, value in encoder.items())


def test_an_encoder_without_its_weights_is_refused(tmp_path: Path):
    """It would be trained from random numbers under the name of a pretrained one."""
    source = saved("segformer", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"hidden_sizes": [8, 16, 16, 32]}))
    with pytest.raises(ValueError, match=r"^Expected the weights of a Segformer.*none that fit"):
        made(source)


def test_half_precision_weights_are_trained_in_fp32(tmp_path: Path):
    """transformers loads in the type of the file; steps of 1e-5 are lost in fp16."""
    stock_model("segformer").half().save_pretrained(tmp_path)
    assert {p.dtype for p in made(str(tmp_path)).parameters()} == {torch.float32}


def test_statistics_are_those_of_its_own_preprocessing(tmp_path: Path):
    """With ImageNet's a model trained with others starts from wrong features."""
    settings = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.2, 0.2], "size": 48}
    source = saved("segformer", tmp_path, **settings)
    assert statistics_of(made(source)) == ([0.5, 0.4, 0.3], [0.2, 0.2, 0.2])
    assert image_size_of(load_student(source)) == (48, 48)
    assert image_size_of(made(source)) == (64, 64)


def test_the_processor_beside_it_does_what_the_training_did(tmp_path: Path):
    """Another resize or normalisation in deployment gives other masks than were measured."""
    settings = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4], "size": 64}
    student = made(saved("mobilevit", tmp_path / "model", **settings))
    processor_of(student, do_reduce_labels=True).save_pretrained(tmp_path)
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    assert processor.do_reduce_labels is True
    image = torch.randint(0, 256, (3, 90, 50), dtype=torch.uint8)
    ours = normalise(resize_image(image, 64, 64)[None], pixel_statistics(student, "cpu"))
    theirs = processor(image, return_tensors="pt")["pixel_values"]
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_a_model_of_bgr_images_takes_rgb_and_says_the_same(tmp_path: Path):
    """MobileViT's own processor turns channels and does not normalise, which no file says."""
    source = saved("mobilevit", tmp_path)
    own = MobileViTImageProcessor(size={"shortest_edge": 64}, crop_size=64)
    own.save_pretrained(tmp_path)
    image = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)
    model = stock_model("mobilevit").eval()
    with torch.no_grad():
        wanted = model(**own(image, return_tensors="pt", do_resize=False)).logits
        wanted = F.interpolate(wanted, (64, 64), mode="bilinear", align_corners=False)
        student = load_student(source).eval()
        pixels = normalise(image[None], pixel_statistics(student, "cpu"))
        found = student_logits(student, pixels)
        mean, std = statistics_of(student)
        teacher = load_teacher(source, num_labels=2, input_mean=mean, input_std=std)
        taught = teacher(pixels)
    assert torch.allclose(found, wanted[:, 1:] - wanted[:, :1], atol=1e-5)
    assert torch.allclose(taught, found, atol=1e-5)
    assert image_size_of(student) == (64, 64)


def test_a_size_that_it_cannot_take_is_refused(tmp_path: Path):
    """It would end in a traceback of torch at the first step."""
    with pytest.raises(ValueError, match=r"^Expected an image size that .* accepts, got 96"):
        made(saved("data2vec", tmp_path), image_size=96)


def maker(student: nn.Module, **options: Any) -> Any:
    teacher = tiny_teacher()

    def make(folder: Path, *, blank: bool = False, **more: Any) -> DistillationTrainer:
        own = copy.deepcopy(student)
        if blank:  # so that every weight has to come from the checkpoint
            own.load_state_dict({k: v * 0 for k, v in own.state_dict().items()})
        return DistillationTrainer(
            own,
            arguments(folder, **{"load_best_model_at_end": False, **options, **more}),
            teacher=teacher,
            train_dataset=Squares(4),
            eval_dataset=Squares(2, offset=50),
        )

    return make


STAGED = {"unfreeze_start_epoch": 1, "unfreeze_every": 1, "num_train_epochs": 3}


@pytest.mark.parametrize(
    "family", ["segformer", "mobilevit", pytest.param("upernet", marks=pytest.mark.slow)]
)
def test_a_resumed_run_is_the_run_bit_for_bit(family: str, tmp_path: Path):
    """Units, their rates and frozen statistics have to come back from the epoch alone."""
    student = as_student(stock_model(family), image_size=SIDE)
    make = maker(student, **STAGED, eval_strategy="steps", eval_steps=2)
    assert_resumes_exactly(make, tmp_path, [3])


@pytest.mark.parametrize("family", ["mobilevit", "mobilenet"])
def test_frozen_units_of_a_stock_model_do_not_move(family: str, tmp_path: Path):
    """`train()` of a stock model sets all of its BatchNorms, whose statistics would then drift."""
    student = as_student(stock_model(family), image_size=SIDE)
    frozen = {n for n, _ in student.named_parameters() if n.startswith(student.base_model_prefix)}
    before = {name: value.clone() for name, value in student.state_dict().items()}
    trainer = maker(student, unfreeze_start_epoch=9)(tmp_path)
    trainer.train()
    after = trainer.model.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert not any(name.startswith(student.base_model_prefix) for name in moved)
    assert frozen.isdisjoint(moved)


class Net(nn.Module):
    """What a user has: no configuration, a tensor as output."""

    def __init__(self, channels: int = 1) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.deep = nn.Sequential(nn.Conv2d(8, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Conv2d(8, channels, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.deep(self.stem(images)))


def test_a_module_without_units_is_trained_whole_and_that_is_said(tmp_path: Path, capsys):
    """The recipe's plan would promise that its encoder is frozen at first."""
    net = Net()
    before = copy.deepcopy(net.state_dict())
    trainer = DistillationTrainer(
        net, arguments(tmp_path, unfreeze_start_epoch=9), train_dataset=Squares(4)
    )
    assert "Net has no units: all of it is trained from the start" in capsys.readouterr().err
    trainer.train()
    assert trainer.model is net
    assert all(not torch.equal(before[n], v) for n, v in net.state_dict().items() if "bias" in n)


def test_units_of_a_module_are_freed_the_last_first(tmp_path: Path):
    """A user who counts the other way round trains what should be frozen."""
    net = Net()
    trainer = DistillationTrainer(
        net,
        arguments(tmp_path, num_train_epochs=3, unfreeze_start_epoch=1, unfreeze_every=1),
        units=[net.stem, net.deep],
        train_dataset=Squares(2),
    )
    trainer.train()
    free = [log["free_units"] for log in trainer.state.log_history if "free_units" in log]
    assert free == [0, 1, 2]
    assert [unit.name for unit in units_of(net)] == ["stem", "deep"]


def test_units_that_are_no_parts_of_the_network_are_refused():
    """They would stay frozen, or be trained twice, without a word."""
    net = Net()
    wrong = ([Net().stem], [net.stem, net.stem], [net.deep, net.deep[0]], [net])
    for units in wrong:
        with pytest.raises(ValueError, match=r"^Expected units that are parts of the network"):
            as_student(net, units=units)
    with pytest.raises(ValueError, match=r"^Expected no units for a model of smp"):
        as_student(tiny_student(), units=[tiny_student().encoder])


def test_a_module_cannot_be_pushed(tmp_path: Path):
    """Its repository would hold weights that nothing reads."""
    args = arguments(tmp_path, push_to_hub=True, hub_model_id="me/net", hub_license="mit")
    with pytest.raises(ValueError, match=r"^Expected a student of smp or transformers for a push"):
        DistillationTrainer(Net(), args, train_dataset=Squares(2))


def test_a_module_gets_its_images_whatever_its_argument_is_called(tmp_path: Path):
    """The Trainer drops what is no argument of `forward`."""
    args = arguments(tmp_path, remove_unused_columns=True, max_steps=1)
    trainer = DistillationTrainer(Net(), args, train_dataset=Squares(2), eval_dataset=Squares(2))
    trainer.train()
    assert "eval_miou" in trainer.evaluate()


def test_another_number_of_classes_than_channels_is_refused():
    """The losses would meet labels without a channel."""
    with pytest.raises(ValueError, match=r"^Expected a network with a logit for each of 3 classes"):
        as_student(Net(), id2label={0: "a", 1: "b", 2: "c"})


def test_a_run_with_a_module_resumes_bit_for_bit(tmp_path: Path):
    """Its checkpoints are files of tensors: nothing else would bring it back."""
    net = Net()
    student = as_student(net, units=[net.stem, net.deep])
    assert_resumes_exactly(maker(student, **STAGED), tmp_path, [3])


def test_a_frozen_unit_is_in_eval_mode_after_train():
    """`train()` of somebody's module knows nothing of units."""
    net = Net()
    set_free_units(as_student(net, units=[net.stem, net.deep]), 1)
    net.train()
    hold_frozen(net)
    assert not net.stem[1].training
    assert net.deep[1].training


def test_what_a_trainer_saves_of_a_module_is_read_back(tmp_path: Path):
    """Without names, size and statistics the weights are of no use to anybody."""
    net = as_student(Net(3), id2label={0: "a", 1: "b", 2: "c"}, mean=(0.5, 0.4, 0.3), image_size=96)
    DistillationTrainer(net, arguments(tmp_path), train_dataset=Squares(2)).save_model()
    assert {"model.safetensors", "student.json"} <= {file.name for file in tmp_path.iterdir()}
    again = load_module(Net(3), tmp_path)
    assert all(torch.equal(net.state_dict()[n], v) for n, v in again.state_dict().items())
    assert labels_of_student(again) == {0: "a", 1: "b", 2: "c"}
    assert statistics_of(again) == statistics_of(net)
    assert image_size_of(again) == (96, 96)
    with pytest.raises(ValueError, match=r"^Expected the weights of exactly this Net"):
        load_module(Net(4), tmp_path)


def test_a_resume_with_other_units_is_refused(tmp_path: Path):
    """Other units are freed at other epochs, at other rates."""
    one, other = Net(), Net()
    options = {"train_dataset": Squares(4), "teacher": tiny_teacher()}
    args = {"save_strategy": "epoch", "num_train_epochs": 2}
    trainer = DistillationTrainer(
        one, arguments(tmp_path, **args), units=[one.stem, one.deep], **options
    )
    trainer.train()
    trainer = DistillationTrainer(other, arguments(tmp_path, **args), units=[other.deep], **options)
    with pytest.raises(ValueError, match=r"its units are others"):
        trainer.train(str(tmp_path / "checkpoint-2"))
