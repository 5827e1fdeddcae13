"""Arguments of the student's architecture from the command line to the saved folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import segmentation_models_pytorch as smp
import torch
import yaml
from small_runs import SIDE, train_flags, write_pairs

from kd_trainer.commands.train import train
from kd_trainer.config import build, load_recipe, parse
from kd_trainer.data_arguments import DataArguments
from kd_trainer.loading import make_student, student_options
from kd_trainer.model_arguments import ModelArguments

FPN = ("decoder_pyramid_channels=32", "decoder_segmentation_channels=32", "decoder_dropout=0.1")


def options(*given: str, arch: str = "unet", channels: list[int] | None = None) -> dict:
    model = ModelArguments(
        student_arch=arch, decoder_channels=channels, student_options=list(given) or None
    )
    return student_options(model)


def test_values_have_the_type_of_the_argument():
    """A number that stays text builds no layer; a dropout that is cut to 0 trains another net."""
    assert options(*FPN, "decoder_merge_policy=cat", arch="fpn") == {
        "decoder_pyramid_channels": 32,
        "decoder_segmentation_channels": 32,
        "decoder_dropout": 0.1,
        "decoder_merge_policy": "cat",
    }
    found = options("decoder_channels=32,16", "encoder_depth=2", "decoder_attention_type=scse")
    assert found == {
        "decoder_channels": (32, 16),
        "encoder_depth": 2,
        "decoder_attention_type": "scse",
    }
    assert options("decoder_aspp_separable=false", arch="deeplabv3plus") == {
        "decoder_aspp_separable": False
    }
    assert options("decoder_attention_type=null") == {"decoder_attention_type": None}
    assert options() == {}


def test_decoder_channels_are_one_number_where_the_architecture_takes_one():
    """A tuple of one number would fail deep inside smp."""
    assert options(arch="pan", channels=[16]) == {"decoder_channels": 16}
    assert options(channels=[16, 8, 8, 8, 8]) == {"decoder_channels": (16, 8, 8, 8, 8)}


WRONG = {
    "typing error": (
        {"given": ["decoder_piramid_channels=8"], "arch": "fpn"},
        "'decoder_piramid_channels'. Did you mean 'decoder_pyramid_channels'?",
    ),
    "argument of another architecture": (
        {"given": ["decoder_pyramid_channels=8"]},
        "Expected an argument of unet in --student_options",
    ),
    "no value": ({"given": ["decoder_dropout"], "arch": "fpn"}, "like decoder_dropout=0.1, got"),
    "empty value": ({"given": ["decoder_dropout="], "arch": "fpn"}, "like decoder_dropout=0.1"),
    "another type": (
        {"given": ["decoder_pyramid_channels=wide"], "arch": "fpn"},
        "--student_options decoder_pyramid_channels to be a whole number, got 'wide'",
    ),
    "twice": ({"given": ["encoder_depth=3", "encoder_depth=4"]}, "encoder_depth once"),
    "channels twice": (
        {"given": ["decoder_channels=8,8"], "channels": [8, 8]},
        "--decoder_channels and --student_options",
    ),
    "follows from the classes": ({"given": ["classes=3"]}, "It follows from --num_labels."),
    "has a flag": ({"given": ["encoder_name=resnet18"]}, "Use --student_encoder."),
    "two numbers for one": (
        {"arch": "pan", "channels": [8, 4]},
        "one number as --decoder_channels",
    ),
    "channels under another name": (
        {"arch": "fpn", "channels": [8]},
        "null takes back those of a recipe. Did you mean 'decoder_pyramid_channels'?",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_option_is_refused_with_its_cure(case: str):
    """What smp says of a wrong argument is a traceback, and timm takes any name at all."""
    wrong, expected = WRONG[case]
    more = {name: value for name, value in wrong.items() if name != "given"}
    with pytest.raises(ValueError, match=r"^Expected ") as error:
        options(*wrong.get("given", []), **more)
    assert expected in str(error.value)


def test_map_of_another_size_is_refused():
    """The losses would fail at the first update, after all data has been read."""
    model = ModelArguments(
        student_arch="fpn",
        student_encoder="resnet18",
        encoder_weights="none",
        student_options=["upsampling=2"],
    )
    with pytest.raises(ValueError, match=r"^Expected a student whose map .* 64, got 32"):
        make_student(model, DataArguments(dataset="x", image_size=64, num_labels=2))


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, and a run of an FPN with staged unfreezing."""
    root = tmp_path_factory.mktemp("options")
    write_pairs(root / "data")
    train(parse(flags(root, *FPN)))
    return root


def flags(root: Path, *given: str) -> list[str]:
    words = train_flags(root / "data", root / "out", "--student_arch", "fpn")
    at = words.index("--decoder_channels")
    words = words[:at] + words[at + 6 :]
    words[words.index("--unfreeze_every") + 1] = "1"
    return [*words, "--student_options", *given]


def test_run_writes_down_the_options_and_saves_a_dual_student(ground: Path):
    """Options that only the process knew would make a folder that nobody can load."""
    out = ground / "out"
    written = yaml.safe_load((out / "config.yaml").read_text())
    assert written["student_options"] == list(FPN)
    again = build(load_recipe(str(out / "config.yaml")))
    assert student_options(again.model)["decoder_dropout"] == 0.1
    config = json.loads((out / "student" / "config.json").read_text())
    assert config["decoder_pyramid_channels"] == 32
    network = smp.from_pretrained(str(out / "student"))
    assert type(network).__name__ == "FPN"
    with torch.no_grad():
        assert network.eval()(torch.zeros(1, 3, SIDE, SIDE)).shape == (1, 1, SIDE, SIDE)


def test_option_that_changes_no_weight_is_part_of_the_run(ground: Path):
    """A resumed run with another dropout has the same tensors, and would be taken for the same."""
    other = [*FPN[:2], "decoder_dropout=0.5"]
    with pytest.raises(ValueError, match=r"student_options .*dropout=0\.1, got .*dropout=0\.5"):
        train(parse([*flags(ground, *other), "--resume"]))


def test_saved_student_takes_no_options(ground: Path):
    """It has its network already; a flag without effect looks like one that had some."""
    words = train_flags(
        ground / "data", ground / "next", "--student", str(ground / "out" / "student")
    )
    with pytest.raises(ValueError, match=r"^Expected --student alone, got it with --student_opt"):
        parse([*words, "--student_options", FPN[0]])
