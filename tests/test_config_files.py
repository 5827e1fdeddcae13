"""What a stranger's configuration may say: the network, in plain values; no code, no places."""

import inspect
import json
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
from timm.models import build_model_with_cfg
from tiny import tiny_student
from transformers import SegformerConfig, SegformerForSemanticSegmentation

from kd_trainer.config import (
    DEFAULT_RECIPE,
    ONLY_FLAGS,
    RECIPES,
    load_recipe,
    merged,
    parse,
)
from kd_trainer.files import parse_yaml
from kd_trainer.loading import load_student
from kd_trainer.models import config_checks
from kd_trainer.models.config_checks import read_config, timm_arguments
from kd_trainer.models.configuration_smp import SmpConfig
from kd_trainer.models.modeling import SmpForSemanticSegmentation
from kd_trainer.teacher import load_teacher

# Paths, downloads, classes and functions that timm or its builder would take.
SOURCES = {
    "checkpoint_path": "extra.pth",
    "pretrained": True,
    "pretrained_cfg": {"file": "extra.pth"},
    "pretrained_cfg_overlay": {"url": "http://localhost/extra.pth"},
    "pretrained_strict": False,
    "cache_dir": "/tmp",
    "hf_hub_id": "eve/model",
    "features_only": False,
    "feature_cls": "hook",
    "feature_cfg": {"feature_cls": "hook"},
    "no_such_argument": 1,
}


def written(folder: Path, config: object) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("own", [True, False], ids=["ours", "smp"])
@pytest.mark.parametrize("name", SOURCES)
def test_a_config_names_no_weights_paths_or_classes(name, own, tmp_path):
    """timm.create_model loads a pickle from `checkpoint_path`, and others are as open."""
    config = {"_model_class": "Unet", "encoder_name": "tu-resnet18", "classes": 1}
    extra = {name: SOURCES[name]}
    config |= {"model_type": "smp", "encoder_kwargs": extra} if own else extra
    refused = rf"^Expected arguments of the encoder's own network as encoder_kwargs .*'{name}'"
    with pytest.raises(ValueError, match=refused):
        SmpConfig.from_pretrained(written(tmp_path, config))


@pytest.mark.parametrize("value", [{"a": 1}, "../x.pth", "a/b", 5000, 1e999, [[[1]]]])
def test_arguments_of_an_encoder_are_plain_values(value):
    with pytest.raises(ValueError, match=r"^Expected plain values up to 4096 as encoder_kwargs st"):
        SmpConfig(encoder_name="tu-resnet18", encoder_kwargs={"stem_width": value})


def test_arguments_of_the_network_itself_are_taken(tmp_path):
    """An encoder that was trained at another size cannot be built without them."""
    taken = {"img_size": 64, "patch_size": 8, "class_token": True, "act_layer": "relu"}
    config = SmpConfig(encoder_name="tu-vit_tiny_patch16_224", encoder_kwargs=taken)
    assert config.encoder_kwargs == taken
    with pytest.raises(ValueError, match="encoder's own network"):  # smp would swallow them
        SmpConfig(encoder_name="resnet18", encoder_kwargs={"block": "x"})


def test_no_argument_of_the_factory_is_among_those_of_a_network():
    """A file of timm with a network that takes `pretrained_cfg` would open the door again."""
    models = {timm.models.model_entrypoint(m).__module__: m for m in timm.list_models()}
    found = set().union(*map(timm_arguments, models.values()))
    assert len(models) > 50
    assert {"img_size", "drop_path_rate", "act_layer"} <= found
    for function in (timm.create_model, build_model_with_cfg):
        assert not found & set(inspect.signature(function).parameters)
    assert not found & {
        *SOURCES,
        "cfg",
        "device",
        "dtype",
        "num_classes",
        "pretrained_window_sizes",
    }


@pytest.mark.parametrize("name", ["tu-local-dir:/tmp/x", "tu-hf-hub:eve/model", "tu-resnet18./x"])
def test_an_encoder_is_a_name_and_no_place(name):
    with pytest.raises(ValueError, match=r"^Expected the name of an encoder as encoder_name"):
        SmpConfig(encoder_name=name)


@pytest.mark.parametrize(
    "entry",
    [
        {"attn_implementation": "eve/kernels"},
        {"backbone_config": {"model_type": "timm_backbone", "backbone": "local-dir:/tmp/x"}},
    ],
)
def test_a_teacher_of_transformers_points_to_no_other_code_or_place(entry, tmp_path):
    folder = written(tmp_path, {"model_type": "upernet"} | entry)
    with pytest.raises(ValueError, match=r"^Expected a model that is built of known parts"):
        load_teacher(str(folder), num_labels=2)


def test_a_network_that_no_memory_holds_is_refused_before_it_is_built(tmp_path, monkeypatch):
    """It would fill the memory until the system ends the process, or the whole session."""
    monkeypatch.setattr("kd_trainer.models.config_checks.MOST_PARAMETERS", 10**6)
    config = {"_model_class": "Unet", "encoder_name": "tu-convnext_atto", "classes": 1}
    config |= {"dims": [256] * 4, "depths": [1000] * 4}
    with pytest.raises(ValueError, match=r"^Expected arguments that Unet takes .*1,000,000 param"):
        SmpForSemanticSegmentation(SmpConfig.from_pretrained(written(tmp_path, config)))


ODD = [
    *("", "x", "640", "../..", "a" * 5000, "\0", None, True, False, 0, -1, 1, 3, 31, 4097, 32_000),
    *(10**30, 1e999, -1e999, float("nan"), 0.5, 1e-320, [], [None], [0, 0, 0], ["a"] * 3, [1e999]),
    *([[[[1]]]], {}, {"a": 1}, {"0": "a"}, {"1": "a", "x": {}}, {"quant_method": "bnb"}, "float12"),
]


BREAKS = ["", "\x00", "[" * 100_000, "9" * 5000, "\ud800"]


def complaint(call) -> Exception | None:
    try:
        call()
    except Exception as error:
        return error
    return None


def check_one_line(error: Exception, case: object) -> None:
    """An error that the scripts print without a traceback, and that a terminal can hold."""
    assert isinstance(error, ValueError | OSError), f"case {case}: {error!r}"
    assert str(error).startswith("Expected "), f"case {case}: {error!r}"
    assert "\n" not in str(error), f"case {case}: {error!r}"
    assert len(str(error)) < 2000, f"case {case}: {len(str(error))} characters"


def mutated(config: dict, draw: random.Random) -> str:
    """A config.json that differs in up to three entries, or in its text."""
    names = [*config, "dtype", "quantization_config", "num_labels", "to_dict", "__class__", "x"]
    for _ in range(draw.randint(1, 3)):
        name = draw.choice(names)
        value = draw.choice([draw.choice(ODD), config.get(draw.choice([*config]))])
        if draw.random() < 0.2:
            config.pop(name, None)
        else:
            config[name] = value
    text = json.dumps(config)
    kind = draw.random()
    if kind < 0.1:
        cut = draw.randrange(len(text))
        text = text[:cut] + draw.choice(BREAKS) + text[cut:]
    elif kind < 0.15:
        text = draw.choice(["[]", "1", "null", '"x"', "{" * 50_000, "9" * 5000, ""])
    return text


def fed_configs(cases: range, folder: Path) -> int:
    """How many mutated configurations were taken; all others end in one line of ours."""
    sound = tiny_student().config.to_diff_dict()
    taken = 0
    for case in cases:
        draw = random.Random(case)
        text = mutated(json.loads(json.dumps(sound)), draw)
        (folder / "config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
        error = complaint(lambda: (read_config(folder), SmpConfig.from_pretrained(folder)))
        taken += error is None
        if isinstance(error, OSError):  # what loads a model says which one it is
            assert "JSON" in str(error), case
        elif error is not None:
            check_one_line(error, case)
    return taken


def test_a_few_hundred_mutated_config_json_give_a_model_or_one_line(tmp_path):
    assert 20 < fed_configs(range(300), tmp_path) < 280


@pytest.mark.slow
def test_ten_thousand_mutated_config_json_give_a_model_or_one_line(tmp_path):
    assert fed_configs(range(10_000), tmp_path) > 500


def bomb(levels: int, merge: bool = False) -> str:
    lines = ["a0: &a0 {x: 1}" if merge else "a0: &a0 [x, x]"]
    for n in range(1, levels):
        names = ", ".join([f"*a{n - 1}"] * 9)
        lines.append(f"a{n}: &a{n} {{<<: [{names}]}}" if merge else f"a{n}: &a{n} [{names}]")
    return "\n".join(lines)


YAML_FAULTS = {
    "bomb": bomb(12),
    "merge bomb": bomb(12, merge=True),
    "cycle": "class_names: &a [x, *a]",
    "deep": "class_names: " + "[" * 5000,
    "long number": "seed: " + "9" * 5000,
    "long hexadecimal": "seed: 0x" + "f" * 5000,
    "infinite": "seed: .inf",
    "not a number": "seed: .nan",
    "infinite epochs": "num_train_epochs: .inf",
    "negative infinity": "kl_weight: -.inf",
    "huge": "max_train_samples: 1e300",
    "huge file": "x: " + "a" * 2**21,
    "wrong tag": "seed: !!int x",
    "wrong bool": "streaming: !!bool x",
    "no date": "output_dir: 2001-99-99",
    "bytes": "output_dir: !!binary aGFsbG8=",
    "mapping": "output_dir: {a: b}",
    "no text": "output_dir: \x00",
}


@pytest.mark.parametrize("name", YAML_FAULTS)
def test_a_recipe_that_is_made_to_break_ends_in_one_line(name, tmp_path):
    """A bomb of 500 bytes takes all memory as soon as somebody prints what it holds."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(YAML_FAULTS[name])
    started = time.monotonic()
    with pytest.raises(ValueError, match=r"^Expected ") as caught:
        load_recipe(str(recipe))
    assert time.monotonic() - started < 5
    assert len(str(caught.value)) < 1000
    assert "\n" not in str(caught.value)


YAML_WORDS = [
    "&a",
    "*a",
    "[",
    "]",
    "{",
    "}",
    "- ",
    "? ",
    "!!set",
    "!!int",
    "<<: ",
    "|",
    ">",
    "%",
    "\t",
]
YAML_VALUES = [".inf", "-.nan", "9" * 400, "0x" + "f" * 40, "1:1:1", "2001-01-01", "~", "yes", "''"]
YAML_VALUES += [
    "[1, [2, [3]]]",
    "{a: {b: c}}",
    "!!binary aGk=",
    "1e400",
    "[.inf]",
    "-1",
    "0",
    "x y",
]


def fed_recipes(cases: range, folder: Path) -> int:
    """How many mutated recipes were taken; all others end in one line of ours."""
    sound = (RECIPES / f"{DEFAULT_RECIPE}.yaml").read_text(encoding="utf-8").splitlines()
    recipe, taken = folder / "recipe.yaml", 0
    for case in cases:
        draw, lines = random.Random(case), list(sound)
        for _ in range(draw.randint(1, 3)):
            at = draw.randrange(len(lines))
            key, separator, _ = lines[at].partition(":")
            if draw.random() < 0.6 and separator:
                lines[at] = f"{key}: {draw.choice(YAML_VALUES)}"
            else:
                cut = draw.randrange(len(lines[at]) + 1)
                lines[at] = lines[at][:cut] + draw.choice(YAML_WORDS) + lines[at][cut:]
        recipe.write_text("\n".join(lines), encoding="utf-8")
        error = complaint(lambda: load_recipe(str(recipe)))
        taken += error is None
        if error is not None:
            check_one_line(error, case)
    return taken


def test_mutated_recipes_give_settings_or_one_line(tmp_path):
    assert 5 < fed_recipes(range(100), tmp_path) < 95


@pytest.mark.slow
def test_ten_thousand_mutated_recipes_give_settings_or_one_line(tmp_path):
    assert fed_recipes(range(10_000), tmp_path) > 500


def test_an_alias_that_repeats_a_list_is_taken():
    """What yaml itself writes where two settings are one list."""
    assert parse_yaml("a: &x [1, 2]\nb: *x") == {"a": [1, 2], "b": [1, 2]}


@pytest.mark.parametrize(
    ("entry", "wanted"),
    [
        ({"image_size": "640"}, "a whole number from 1 to 16384 as image_size"),
        ({"image_size": 32_000}, "a whole number from 1 to 16384 as image_size"),
        ({"image_size": 1e999}, "a whole number from 1 to 16384 as image_size"),
        ({"id2label": ["a", "b"]}, "the names of the classes, numbered from 0, as id2label"),
        ({"encoder_name": None}, "the name of an encoder as encoder_name"),
        ({"dtype": "float12"}, "float32, float16, bfloat16 or float64 as dtype"),
        ({"quantization_config": {"quant_method": "x"}}, "nothing as quantization_config"),
    ],
)
def test_a_damaged_config_json_is_one_line_with_its_entry(entry, wanted, tmp_path):
    student = tiny_student()
    student.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | entry
    written(tmp_path, config)
    for load in (load_student, lambda folder: load_teacher(str(folder), num_labels=2)):
        error = complaint(lambda load=load: load(tmp_path))
        check_one_line(error, entry)
        assert str(error).startswith(f"Expected {wanted} of a model, got "), error


def test_a_std_of_zero_is_one_line_with_its_entry(tmp_path):
    """Every logit would be NaN, which a class map does not show."""
    student = tiny_student()
    student.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"image_std": [0.2, 0.0, 0.2]}
    written(tmp_path, config)
    for load in (load_student, lambda folder: load_teacher(str(folder), num_labels=2)):
        error = complaint(lambda load=load: load(tmp_path))
        check_one_line(error, {"image_std": 0})
        assert str(error).startswith("Expected image_std of three finite numbers above 0 in "), (
            error
        )


@pytest.mark.parametrize("entry", [{"depths": "x"}, {"hidden_sizes": [-1] * 4}, {"id2label": []}])
def test_a_damaged_config_json_of_another_model_is_one_line(entry, tmp_path):
    sizes = {"hidden_sizes": [8] * 4, "depths": [1] * 4, "decoder_hidden_size": 8}
    sizes["num_attention_heads"] = [1] * 4
    SegformerForSemanticSegmentation(SegformerConfig(**sizes)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | entry
    source = str(written(tmp_path, config))
    for load in (lambda: load_teacher(source, num_labels=2), lambda: load_student(source)):
        check_one_line(complaint(load), entry)


@pytest.mark.parametrize("name", ONLY_FLAGS)
def test_a_file_cannot_choose_what_only_a_command_line_may(name, tmp_path):
    """Whoever is handed a recipe would run a stranger's code, or publish to a stranger's place."""
    recipe = tmp_path / "recipe.yaml"
    harmful = {"hub_private_repo": "false", "trust_remote_code": "true", "push_to_hub": "true"}
    value = (harmful | {"hub_pictures": "true"}).get(name, "eve/x")
    recipe.write_text(f"{name}: {value}\ndataset: photos\n")
    with pytest.raises(ValueError, match=rf"^Expected --{name} on the command line, got it from"):
        merged(str(recipe), {})
    assert merged(str(recipe), {name: value})["dataset"] == "photos"
    assert name not in load_recipe(str(recipe))


def test_the_flags_that_a_file_cannot_choose_are_these():
    """A list that is checked against itself alone loses a name without a word."""
    who = {"trust_remote_code", "push_to_hub", "hub_model_id", "hub_private_repo", "hub_pictures"}
    assert set(ONLY_FLAGS) == who | {f"trackio_{x}_id" for x in ("space", "bucket", "static_space")}


def test_what_a_command_line_trusts_is_not_written_down_for_the_next_one(tmp_path):
    run = parse(["--dataset", "x", "--output_dir", str(tmp_path), "--trust_remote_code"])
    assert run.model.trust_remote_code
    assert "trust_remote_code" not in run.resolved()


def test_saved_code_names_the_version_of_transformers_that_it_needs(tmp_path):
    """In an older one a stranger's last line was `cannot import name 'PreTrainedConfig'`."""
    tiny_student().save_pretrained(tmp_path)
    old = (
        "import sys, transformers; transformers.__version__ = '4.57.1'; "
        "sys.modules['transformers.image_processing_backends'] = None; "
        f"transformers.AutoConfig.from_pretrained({str(tmp_path)!r}, trust_remote_code=True)"
    )
    done = subprocess.run([sys.executable, "-c", old], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: Expected transformers 5.4 or newer, got 4.57.1. Run `pip")


@pytest.mark.parametrize("entry", ["modeling", "image_processing", "configuration_smp"])
def test_saved_code_imports_each_of_its_files_directly(entry):
    """transformers 5.8 copies no file that only an imported file imports."""
    folder = Path(config_checks.__file__).parent

    def imported(name: str) -> set[str]:
        source = (folder / f"{name}.py").read_text(encoding="utf-8")
        return set(re.findall(r"^from \.(\w+) import", source, re.MULTILINE))

    direct = imported(entry)
    assert direct
    assert {further for name in direct for further in imported(name)} <= direct
