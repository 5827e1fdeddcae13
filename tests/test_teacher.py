import copy
import json

import pytest
import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from small_runs import write_pairs
from torch import nn
from transformers import (
    SegformerConfig,
    SegformerForSemanticSegmentation,
    SegformerImageProcessor,
    ViTConfig,
)

from kd_trainer.build import build_run
from kd_trainer.config import build
from kd_trainer.measurement import data_arguments_of
from kd_trainer.models.modeling import SmpForSemanticSegmentation
from kd_trainer.teacher import Teacher, load_teacher, saved_class_names

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
OTHER = ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
PERSON = {0: "background", 1: "person"}


class Mean(nn.Module):
    """One logit: the mean over the channels of what it is given."""

    def __init__(self, channels=1):
        super().__init__()
        self.gain = nn.Parameter(torch.arange(1.0, channels + 1).view(1, -1, 1, 1))
        self.norm = nn.BatchNorm2d(3, affine=False)
        self.seen = None

    def forward(self, x):
        self.seen = x
        return self.norm(x).mean(1, keepdim=True) * self.gain


def student(**options):
    return SmpForSemanticSegmentation.create(
        encoder="mobilenet_v2",
        encoder_weights="none",
        **{"id2label": PERSON, "image_size": 64, "decoder_channels": (8, 8, 8, 8, 8), **options},
    ).eval()


def segformer(num_labels, labels=None):
    config = SegformerConfig(
        num_encoder_blocks=2,
        depths=[1, 1],
        sr_ratios=[2, 1],
        hidden_sizes=[8, 16],
        patch_sizes=[7, 3],
        strides=[4, 2],
        num_attention_heads=[1, 2],
        mlp_ratios=[2, 2],
        decoder_hidden_size=8,
        id2label=labels or {i: f"c{i}" for i in range(num_labels)},
    )
    return SegformerForSemanticSegmentation(config).eval()


def normalised(pixels, statistics):
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in statistics)
    return (pixels - mean) / std


def test_teacher_stays_in_eval_mode_and_never_changes():
    """One batch in train mode moves its running statistics, and with them every later target."""
    teacher = Teacher(Mean(), num_labels=2)
    before = copy.deepcopy(teacher.state_dict())
    holder = nn.ModuleList([teacher]).train()
    assert not any(module.training for module in teacher.modules())
    logits = holder[0](torch.randn(2, 3, 8, 8))
    assert not logits.requires_grad
    assert not any(p.requires_grad for p in teacher.parameters())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_teacher_sees_images_in_its_own_normalisation():
    """A teacher fed with the student's statistics is quietly a worse teacher."""
    pixels = torch.rand(2, 3, 8, 8)
    network = Mean()
    teacher = Teacher(network, num_labels=2, mean=OTHER[0], std=OTHER[1])
    teacher(normalised(pixels, IMAGENET))
    torch.testing.assert_close(network.seen, normalised(pixels, OTHER))
    images = normalised(pixels, IMAGENET)
    same = Teacher(network, num_labels=2)
    same(images)
    assert network.seen is images


def test_teacher_works_at_its_own_size_and_answers_at_the_students():
    """Large teachers are often trained at another resolution."""
    network = Mean()
    logits = Teacher(network, num_labels=2, image_size=32)(torch.randn(2, 3, 64, 96))
    assert network.seen.shape == (2, 3, 32, 32)
    assert logits.shape == (2, 1, 64, 96)


def test_two_class_softmax_becomes_one_logit():
    """sigmoid(l1 - l0) is the softmax's second class; l1 alone is not."""
    network = Mean(channels=2)
    images = torch.randn(1, 3, 8, 8)
    logits = Teacher(network, num_labels=2)(images)
    torch.testing.assert_close(logits.sigmoid(), network(images).softmax(1)[:, 1:])


def test_logits_are_float32_whatever_the_teachers_own_precision():
    """Half-precision targets in the losses lose what the teacher knows about close calls."""
    teacher = Teacher(Mean(3).to(torch.bfloat16), num_labels=3)
    assert teacher(torch.randn(1, 3, 8, 8)).dtype == torch.float32
    full = Teacher(Mean(3), num_labels=3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert full(torch.randn(1, 3, 8, 8)).dtype == torch.float32


def test_wrong_number_of_channels_is_refused():
    """Broadcasting would compare three classes with one."""
    with pytest.raises(ValueError, match="Expected a teacher of 4 classes, got 3 channels"):
        Teacher(Mean(3), num_labels=4)(torch.randn(1, 3, 8, 8))
    with pytest.raises(ValueError, match="Expected three finite numbers"):
        Teacher(Mean(), num_labels=2, std=(0.2, 0.0, 0.2))


def test_own_folder_gives_the_raw_logit(tmp_path):
    """Of the two output channels the first is only there for stock processors."""
    model = student(image_mean=list(OTHER[0]), image_std=list(OTHER[1]))
    model.save_pretrained(tmp_path)
    teacher = load_teacher(str(tmp_path), num_labels=2, input_mean=OTHER[0], input_std=OTHER[1])
    assert teacher.same_statistics  # found in config.json
    assert teacher.id2label == PERSON
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(images).raw_logits
    torch.testing.assert_close(teacher(images), expected, rtol=1e-4, atol=1e-4)


def test_smp_folder_is_a_teacher(tmp_path):
    """Most trained U-Nets come from smp alone; an activation there would give probabilities."""
    model = smp.Unet(
        "mobilenet_v2", encoder_weights=None, decoder_channels=(8,) * 5, activation="sigmoid"
    ).eval()
    model.save_pretrained(tmp_path)
    images = torch.randn(1, 3, 64, 64)
    logits = load_teacher(str(tmp_path), num_labels=2)(images)
    with torch.no_grad():
        torch.testing.assert_close(logits.sigmoid(), model(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("classes", [2, 4])
def test_a_teacher_that_counts_the_classes_otherwise_is_reordered_by_name(tmp_path, classes):
    """Counted alike by number only, it would teach the background as the person."""
    names = ["background", "person", "dog", "cat"][:classes]
    model = student(id2label=dict(enumerate(reversed(names))))
    model.save_pretrained(tmp_path)
    ours = dict(enumerate(names))
    pixels = torch.randn(1, 3, 64, 64)
    theirs = load_teacher(str(tmp_path), num_labels=classes)(pixels)
    reordered = load_teacher(str(tmp_path), num_labels=classes, id2label=ours)(pixels)
    expected = -theirs if classes == 2 else theirs.flip(1)
    assert torch.equal(reordered, expected)
    other = dict(enumerate(["nothing", *names[1:]]))
    assert torch.equal(
        load_teacher(str(tmp_path), num_labels=classes, id2label=other)(pixels), theirs
    )


def test_a_two_class_softmax_is_reordered_before_it_becomes_one_logit(tmp_path):
    """The sign of the difference of its logits is all that says which class is which."""
    segformer(2, {0: "Person", 1: "Background"}).save_pretrained(tmp_path)
    pixels = torch.randn(1, 3, 64, 64)
    plain = load_teacher(str(tmp_path), num_labels=2)(pixels)
    assert torch.equal(load_teacher(str(tmp_path), num_labels=2, id2label=PERSON)(pixels), -plain)


def test_segformer_is_a_teacher_with_its_logits_resized(tmp_path):
    """Its logits have a quarter of the image's side."""
    model = segformer(3)
    model.save_pretrained(tmp_path)
    images = torch.randn(2, 3, 64, 64)
    logits = load_teacher(str(tmp_path), num_labels=3)(images)
    with torch.no_grad():
        small = model(images).logits
    assert small.shape == (2, 3, 16, 16)
    expected = F.interpolate(small, (64, 64), mode="bilinear", align_corners=False)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


def test_two_class_segformer_teaches_a_one_logit_student(tmp_path):
    """The usual teacher of a binary task outside smp."""
    segformer(2, PERSON).save_pretrained(tmp_path)
    teacher = load_teacher(str(tmp_path), num_labels=2)
    assert teacher(torch.randn(1, 3, 64, 64)).shape == (1, 1, 64, 64)
    assert teacher.id2label == PERSON


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"image_mean": list(OTHER[0]), "image_std": list(OTHER[1])}, OTHER),
        ({"do_normalize": False}, ((0.0,) * 3, (1.0,) * 3)),
        (
            {"rescale_factor": 1 / 127.5, "image_mean": [1.0] * 3, "image_std": [1.0] * 3},
            ((0.5,) * 3, (0.5,) * 3),
        ),
    ],
)
def test_normalisation_comes_from_the_teachers_processor(settings, expected, tmp_path):
    """Many published models do not use ImageNet's statistics."""
    segformer(3).save_pretrained(tmp_path)
    SegformerImageProcessor(**settings).save_pretrained(tmp_path)
    pixels = torch.rand(1, 3, 64, 64)
    seen = []
    teacher = load_teacher(str(tmp_path), num_labels=3)
    teacher.network.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    teacher(normalised(pixels, IMAGENET))
    torch.testing.assert_close(seen[0], normalised(pixels, expected), rtol=1e-4, atol=1e-5)
    given = load_teacher(str(tmp_path), num_labels=3, mean=IMAGENET[0], std=IMAGENET[1])
    assert given.same_statistics


def wrapped(state, how):
    return {
        "bare": state,
        "module": {f"module.{k}": v for k, v in state.items()},
        "nested": {"state_dict": {f"model.unet.{k}": v for k, v in state.items()}, "epoch": 3},
        "compiled": {"model_state_dict": {f"_orig_mod.module.{k}": v for k, v in state.items()}},
    }[how]


@pytest.mark.parametrize("how", ["bare", "module", "nested", "compiled"])
def test_state_dict_loads_from_any_usual_wrapping(how, tmp_path):
    """Lightning, DataParallel and compile each put their own prefix before the names."""
    model = smp.Unet("resnet18", encoder_weights=None).eval()
    path = tmp_path / "teacher.pth"
    torch.save(wrapped(model.state_dict(), how), path)
    teacher = load_teacher(str(path), num_labels=2, arch="unet", encoder="resnet18")
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(teacher(images), model(images), rtol=1e-4, atol=1e-4)


def test_state_dict_may_lack_the_never_used_head_only(tmp_path):
    """Any other missing weight would leave a teacher that is random in places."""
    model = SmpForSemanticSegmentation.create(encoder_weights="none")
    never = ("encoder.conv_head.", "encoder.bn2.")
    state = {k: v for k, v in model.state_dict().items() if not k.startswith(never)}
    path = tmp_path / "teacher.safetensors"
    save_file(state, path)
    names = {"num_labels": 2, "arch": "unet", "encoder": "timm-efficientnet-b0"}
    teacher = load_teacher(str(path), **names)
    assert torch.equal(teacher.network.encoder.conv_stem.weight, model.encoder.conv_stem.weight)
    state.pop("encoder.bn1.weight")
    state["ema.decay"] = torch.ones(1)
    save_file(state, path)
    with pytest.raises(ValueError, match=r"missing: encoder\.bn1\.weight; extra: ema\.decay"):
        load_teacher(str(path), **names)


def test_two_class_state_dict_is_recognised_by_its_head(tmp_path):
    """A bare state dict does not say whether its two channels are a softmax."""
    model = smp.Unet("resnet18", encoder_weights=None, classes=2).eval()
    save_file(model.state_dict(), tmp_path / "teacher.safetensors")
    path = str(tmp_path / "teacher.safetensors")
    teacher = load_teacher(path, num_labels=2, arch="unet", encoder="resnet18")
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        two = model(images)
    torch.testing.assert_close(teacher(images), two[:, 1:] - two[:, :1], rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="Expected a teacher of 5 classes, got 2 in"):
        load_teacher(path, num_labels=5, arch="unet", encoder="resnet18")


def test_teacher_of_other_classes_is_refused(tmp_path):
    """Distilling unrelated classes trains without any error."""
    segformer(3, {0: "sky", 1: "road", 2: "car"}).save_pretrained(tmp_path)
    message = r"Expected a teacher of 2 classes, got 3 in .* \(sky, road, car\)"
    with pytest.raises(ValueError, match=message):
        load_teacher(str(tmp_path), num_labels=2)


def test_missing_weights_in_a_folder_are_an_error(tmp_path, capfd):
    """Transformers fills them with random numbers and only logs it, in a report of many lines."""
    model = segformer(3)
    state = {k: v for k, v in model.state_dict().items() if "classifier" not in k}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match=r"missing: decode_head\.classifier\.bias, .*classifier"):
        load_teacher(str(tmp_path), num_labels=3)
    assert "REPORT" not in capfd.readouterr().err


@pytest.mark.parametrize("content", ['{"model_type": ', "[]", "[1]"])
def test_a_config_that_is_no_json_object_is_not_called_missing(content, tmp_path):
    """Whoever is told that the file is not there looks for it in vain."""
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(FileNotFoundError, match="got one that is no JSON object at"):
        load_teacher(str(tmp_path), num_labels=2)


def test_unclear_sources_get_one_line(tmp_path):
    """A wrong path must not end in a long trace about repositories."""
    with pytest.raises(FileNotFoundError, match="Expected a weight file") as caught:
        load_teacher(str(tmp_path / "no.pth"), num_labels=2, arch="unet", encoder="resnet18")
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="architecture and encoder of"):
        load_teacher(str(tmp_path / "no.pth"), num_labels=2)
    for source in (tmp_path, tmp_path / "missing" / "folder"):
        with pytest.raises(FileNotFoundError, match=r"Expected a teacher's config\.json") as caught:
            load_teacher(str(source), num_labels=2)
        assert "\n" not in str(caught.value)


def test_model_for_another_task_is_refused(tmp_path):
    """transformers answers with a list of a hundred configuration classes."""
    ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"a semantic segmentation model in .* 'vit'") as caught:
        load_teacher(str(tmp_path), num_labels=2)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["[1, 2]", "[" * 100_000, "5"], ids=["list", "deep", "number"])
def test_a_preprocessor_config_that_is_no_object_is_one_line(text: str, tmp_path):
    """It is a file of whoever saved the teacher."""
    segformer(3).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(text)
    with pytest.raises(ValueError, match=r"^Expected") as caught:
        load_teacher(str(tmp_path), num_labels=3)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        ({"1": "tree", "0": "wall", "10": "sky"}, ["wall", "tree", "sky"]),
        ({"0": "LABEL_0", "1": "LABEL_1"}, None),
        ({"x": "wall"}, None),
        ([1, 2], None),
        (None, None),
    ],
)
def test_saved_names_of_classes_are_in_order_or_none(labels, names, tmp_path):
    """A config.json is a stranger's: what is wrong with it is said where the model is loaded."""
    (tmp_path / "config.json").write_text(json.dumps({"id2label": labels}))
    assert saved_class_names(str(tmp_path)) == names


def test_masks_are_read_as_those_of_a_teacher_of_reduced_labels(tmp_path, capsys):
    """Its class i is mask value i + 1: read as ids, all classes would be shifted."""
    folder = tmp_path / "ade"
    network = segformer(3)
    network.config.id2label = {0: "wall", 1: "floor", 2: "tree"}
    network.save_pretrained(folder)
    SegformerImageProcessor(do_reduce_labels=True).save_pretrained(folder)
    root = write_pairs(tmp_path / "data", num_labels=4)
    settings = {"dataset": str(root), "num_labels": 3, "image_size": 64, "augmentation": "none"}
    student = {"student_encoder": "resnet18", "encoder_weights": "none", "use_cpu": True}
    run = build(settings | student | {"teacher": str(folder)})
    parts = build_run(run)
    assert "mask value 0 counts nowhere" in capsys.readouterr().err
    assert run.resolved()["reduce_labels"] is True
    # No class is the background, which is what value 0 would have been called.
    assert parts.student.config.id2label == {0: "wall", 1: "floor", 2: "tree"}
    assert parts.train_dataset.transform.rule.values == (1, 2, 3)
    assert parts.processor.do_reduce_labels
    parts.processor.save_pretrained(tmp_path / "student")
    for source in (folder, tmp_path / "student"):  # what is measured later is measured alike
        assert data_arguments_of(parts.student, str(source), {}).reduce_labels
    assert (
        data_arguments_of(parts.student, str(folder), {"dataset": "synthetic"}).reduce_labels
        is None
    )
    given = {"mask_values": [1, 2, 3]}
    assert data_arguments_of(parts.student, str(folder), given).reduce_labels is None
    as_ids = build(settings | student | {"teacher": str(folder), "reduce_labels": False})
    with pytest.raises(ValueError, match=r"^Expected the class ids 0\.\.2, got 0, 1, 2, 3"):
        build_run(as_ids)
