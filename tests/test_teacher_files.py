"""Weight files of teachers as people have them."""

import pickle
from argparse import Namespace

import pytest
import segmentation_models_pytorch as smp
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import SegformerConfig, SegformerForSemanticSegmentation

from kd_trainer.loading import teacher_options
from kd_trainer.model_arguments import ModelArguments
from kd_trainer.teacher import load_teacher

IMAGES = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def unet(**options):
    torch.manual_seed(0)
    return smp.Unet("resnet18", encoder_weights=None, **options).eval()


def load(path, **options):
    return load_teacher(str(path), num_labels=2, arch="unet", encoder="resnet18", **options)


def assert_same(teacher, model, images=IMAGES):
    with torch.no_grad():
        expected = model(images)
    torch.testing.assert_close(teacher(images), expected, rtol=1e-4, atol=1e-4)


class Lightning(nn.Module):
    """What smp's tutorial builds: the network beside its statistics and its loss."""

    def __init__(self):
        super().__init__()
        self.model = unet()
        self.register_buffer("std", torch.tensor([0.5, 0.25, 0.25]).view(1, 3, 1, 1))
        self.register_buffer("mean", torch.tensor([0.4, 0.5, 0.6]).view(1, 3, 1, 1))
        self.loss_fn = nn.BCEWithLogitsLoss(pos_weight=torch.tensor([2.0]))


def test_a_lightning_checkpoint_is_read_without_its_loss_and_statistics(tmp_path, capsys):
    """They are no weights of the network, and a strict load of them all fails."""
    module = Lightning()
    content = {"state_dict": module.state_dict(), "hyper_parameters": {"encoder_name": "resnet18"}}
    torch.save(content | {"optimizer_states": [], "epoch": 1}, tmp_path / "last.ckpt")
    teacher = load(tmp_path / "last.ckpt")
    assert_same(teacher, module.model)
    said = capsys.readouterr().err
    assert "left out std (0.5 0.25 0.25), mean (0.4 0.5 0.6), loss_fn.pos_weight (2)" in said
    assert "--teacher_mean" in said
    # Nothing says that they are of values in 0..1: they are not used unasked.
    assert teacher.mean == [0.485, 0.456, 0.406]
    with pytest.raises(ValueError, match=r"hyper_parameters say encoder_name 'resnet18'\."):
        load_teacher(str(tmp_path / "last.ckpt"), num_labels=2, arch="unet", encoder="mobilenet_v2")


@pytest.mark.parametrize("name", ["model_state", "net", "network", "model", "module"])
def test_every_usual_container_is_opened(name, tmp_path):
    """Each training loop calls it otherwise."""
    model = unet()
    torch.save({"epoch": 3, name: model.state_dict(), "best": 0.5}, tmp_path / "best.pt")
    assert_same(load(tmp_path / "best.pt"), model)


@pytest.mark.parametrize("name", ["ema", "ema_state_dict", "state_dict_ema"])
def test_averaged_weights_win_over_raw_ones_and_it_is_said(name, tmp_path, capsys):
    """They are what was evaluated, and what the loop's author calls the model."""
    raw, averaged = unet(), unet()
    nn.init.normal_(averaged.segmentation_head[0].weight)
    content = {"model": raw.state_dict(), name: {"module": averaged.state_dict()}}
    torch.save(content, tmp_path / "both.pth")
    assert_same(load(tmp_path / "both.pth"), averaged)
    assert f"took {name}, the averaged weights" in capsys.readouterr().err
    torch.save({"model": raw.state_dict(), name: {"decay": 0.99}}, tmp_path / "raw.pth")
    assert_same(load(tmp_path / "raw.pth"), raw)


def test_averaged_weights_in_the_same_state_dict_win_too(tmp_path, capsys):
    """Lightning callbacks put a second copy beside the first."""
    raw, averaged = unet(), unet()
    nn.init.normal_(averaged.segmentation_head[0].weight)
    state = {f"model.{k}": v for k, v in raw.state_dict().items()}
    state |= {f"model_ema.module.{k}": v for k, v in averaged.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "both.ckpt")
    assert_same(load(tmp_path / "both.ckpt"), averaged)
    assert "took model_ema.module" in capsys.readouterr().err
    two = {f"teacher.{k}": v for k, v in raw.state_dict().items()}
    torch.save(two | {f"student.{k}": v for k, v in raw.state_dict().items()}, tmp_path / "2.pth")
    with pytest.raises(ValueError, match=r"one network .* got 2: teacher\., student\."):
        load(tmp_path / "2.pth")


@pytest.mark.parametrize(
    "options",
    [
        {"decoder_channels": (32, 16, 8, 8, 8)},
        {"decoder_attention_type": "scse", "decoder_channels": (32, 32, 16, 16, 16)},
        {"decoder_use_norm": False},
        {"encoder_depth": 3, "decoder_channels": (16, 8, 8)},
        {"aux_params": {"classes": 4}},
    ],
    ids=["channels", "scse", "no norm", "depth", "aux"],
)
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_options_of_the_decoder_are_read_off_its_shapes(options, suffix, tmp_path, capsys):
    """Nobody remembers them, and the file says them."""
    model = unet(**options)
    path = tmp_path / f"teacher.{suffix}"
    save_file(model.state_dict(), path) if suffix == "safetensors" else torch.save(
        model.state_dict(), path
    )
    with torch.no_grad():
        logits = model(IMAGES)
    expected = logits[0] if "aux_params" in options else logits
    torch.testing.assert_close(load(path)(IMAGES), expected, rtol=1e-4, atol=1e-4)
    said = capsys.readouterr().err
    assert ("left out classification_head" if "aux_params" in options else "shapes say") in said


def test_options_that_no_shape_says_are_flags(tmp_path):
    """Bilinear and nearest enlargement have the same weights."""
    model = unet(decoder_interpolation="bilinear", decoder_channels=(16, 8, 8, 8, 8))
    torch.save(model.state_dict(), tmp_path / "teacher.pth")
    settings = ModelArguments(teacher="x", teacher_options=["decoder_interpolation=bilinear"])
    assert teacher_options(settings) == {"decoder_interpolation": "bilinear"}
    assert_same(load(tmp_path / "teacher.pth", options=teacher_options(settings)), model)
    wrong = ModelArguments(teacher="x", teacher_options=["decoder_chanels=8"])
    with pytest.raises(ValueError, match=r"in --teacher_options, .*decoder_channels"):
        teacher_options(wrong)
    decided = ModelArguments(teacher="x", teacher_options=["classes=2"])
    with pytest.raises(ValueError, match="It follows from the file"):
        teacher_options(decided)
    with pytest.raises(ValueError, match="KEY=VALUE"):
        ModelArguments(teacher="x", teacher_options=["classes"])


def test_a_teacher_of_grey_images_sees_the_brightness_of_rgb_ones(tmp_path, capsys):
    """In its own normalisation, and not in that of one of the colours."""
    model = unet(in_channels=1)
    torch.save(model.state_dict(), tmp_path / "grey.pth")
    mean, std, luma = (
        torch.tensor(v).view(1, 3, 1, 1)
        for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225], [0.299, 0.587, 0.114])
    )
    brightness = ((IMAGES * std + mean) * luma).sum(1, keepdim=True)
    given = load(tmp_path / "grey.pth", mean=(0.3,), std=(0.2,))
    with torch.no_grad():
        expected = model((brightness - 0.3) / 0.2)
    torch.testing.assert_close(given(IMAGES), expected, rtol=1e-3, atol=1e-3)
    capsys.readouterr()
    usual = load(tmp_path / "grey.pth")
    assert usual.mean == pytest.approx([0.299 * 0.485 + 0.587 * 0.456 + 0.114 * 0.406])
    assert "1 channel, it sees the brightness of RGB, with 0.459 and" in capsys.readouterr().err
    with pytest.raises(ValueError, match="one finite number"):
        load(tmp_path / "grey.pth", mean=(0.3, 0.3, 0.3), std=(0.2, 0.2, 0.2))


def test_a_teacher_of_more_channels_teaches_students_of_as_many(tmp_path):
    """Its first convolution says how many; a file that says no mean is fed as the student is."""
    model = unet(in_channels=4)
    torch.save(model.state_dict(), tmp_path / "four.pth")
    smp_folder = tmp_path / "folder"
    model.save_pretrained(smp_folder)
    images = torch.randn(1, 4, 64, 64)
    bands = {"input_mean": [0.1, 0.2, 0.3, 0.4], "input_std": [0.1] * 4}
    for teacher in (
        load(tmp_path / "four.pth", **bands),
        load_teacher(str(smp_folder), num_labels=2, **bands),
    ):
        assert_same(teacher, model, images)
    own = load(tmp_path / "four.pth", mean=[0.0] * 4, std=[1.0] * 4, **bands)
    values = images * 0.1 + torch.tensor(bands["input_mean"]).view(1, 4, 1, 1)
    with torch.no_grad():
        torch.testing.assert_close(own(images), model(values), rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match=r"a teacher of 3 channels, .*, got one of 4\."):
        load(tmp_path / "four.pth")


def test_a_teacher_of_rgb_images_sees_a_single_channel_three_times(tmp_path):
    """Most pretrained networks are of RGB images, and many medical images are grey."""
    model = unet()
    torch.save(model.state_dict(), tmp_path / "rgb.pth")
    grey = torch.randn(1, 1, 64, 64)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    teacher = load(tmp_path / "rgb.pth", input_mean=[0.4], input_std=[0.2])
    values = (grey * 0.2 + 0.4).expand(-1, 3, -1, -1)
    with torch.no_grad():
        expected = model((values - mean.view(1, 3, 1, 1)) / std.view(1, 3, 1, 1))
    torch.testing.assert_close(teacher(grey), expected, rtol=1e-3, atol=1e-3)


def test_a_stock_teacher_says_its_channels_itself(tmp_path):
    """A SegFormer of four bands is made by `num_channels`."""
    sizes = {"depths": [1] * 4, "hidden_sizes": [8] * 4, "decoder_hidden_size": 8}
    heads = {"num_attention_heads": [1] * 4, "id2label": {0: "a", 1: "b", 2: "c"}}
    config = SegformerConfig(num_channels=4, **sizes, **heads)
    SegformerForSemanticSegmentation(config).save_pretrained(tmp_path)
    bands = {"input_mean": [0.1] * 4, "input_std": [0.2] * 4}
    teacher = load_teacher(str(tmp_path), num_labels=3, **bands)
    assert teacher(torch.randn(1, 4, 64, 64)).shape == (1, 3, 64, 64)
    assert teacher.same_statistics


class Armed:
    """Whoever unpickles it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("old", [False, True], ids=["zip", "before zip"])
def test_a_whole_pickled_network_is_named_and_not_unpickled(old, tmp_path):
    """torch.save(model) is smp's classic tutorial; reading it runs what its author wrote."""
    torch.save(unet(), tmp_path / "best_model.pth", _use_new_zipfile_serialization=not old)
    with pytest.raises(ValueError, match=r"a whole pickled network \(segmentation_m") as caught:
        load(tmp_path / "best_model.pth")
    message = str(caught.value)
    assert "\n" not in message
    assert "torch.save(network.state_dict(), 'best_model_state.pth')" in message
    content = {"state_dict": unet().state_dict(), "args": Namespace(lr=1e-3)}
    torch.save(content, tmp_path / "args.pth", _use_new_zipfile_serialization=not old)
    with pytest.raises(ValueError, match=r"objects of argparse\.Namespace beside them"):
        load(tmp_path / "args.pth")
    content["args"] = Armed(tmp_path / "ran")
    torch.save(content, tmp_path / "armed.pth", _use_new_zipfile_serialization=not old)
    with pytest.raises(ValueError, match="Expected a file of tensors only") as caught:
        load(tmp_path / "armed.pth")
    assert "torch.load(" not in str(caught.value)  # nobody is told how to run that
    assert not (tmp_path / "ran").exists()


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")  # what people have was made so
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_torchscript_is_named_as_what_it_is(tmp_path):
    """torch itself says something of allowed globals."""
    torch.jit.trace(unet(), IMAGES).save(tmp_path / "scripted.pt")
    with pytest.raises(ValueError, match=r"TorchScript network.*torch\.jit\.load"):
        load(tmp_path / "scripted.pt")


@pytest.mark.parametrize(
    "content",
    [b"", b"\x80\x02c", b"PK\x05\x06" + bytes(18), pickle.dumps({"a": 1}, protocol=2)],
)
def test_what_is_no_weight_file_still_gets_one_line(content, tmp_path):
    """The search for names must not fail on what is broken."""
    (tmp_path / "broken.pth").write_bytes(content)
    with pytest.raises(ValueError, match="Expected") as caught:
        load(tmp_path / "broken.pth")
    assert "\n" not in str(caught.value)
