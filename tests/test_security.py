"""Files of strangers are data: no pickle, no YAML and no model of theirs runs code unasked."""

import ast
import contextlib
import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from small_runs import save_network
from tiny import Squares, arguments, tiny_student
from transformers import SegformerConfig, SegformerForSemanticSegmentation

from kd_trainer.checkpointing.checkpoints import complete, read_marker
from kd_trainer.config import load_recipe
from kd_trainer.data_arguments import DataArguments
from kd_trainer.doctor.finding import note, summary, table
from kd_trainer.errors import PACKAGE, Stopped, run_script
from kd_trainer.hub import settings_of
from kd_trainer.loading import load_measured, load_student, make_student, make_teacher
from kd_trainer.model_arguments import ModelArguments
from kd_trainer.models.modeling import SmpForSemanticSegmentation
from kd_trainer.run_folder import run_settings
from kd_trainer.teacher import load_teacher
from kd_trainer.trainer import DistillationTrainer

ROOT = Path(__file__).parents[1]


class Payload:
    """What unpickles to a folder called `marker`: code of a stranger that has run."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def poison(path: Path, marker: Path, how: str) -> Path:
    """Write the payload as `torch.save` does (a zip), or as a bare pickle."""
    if how == "zip":
        torch.save({"state_dict": {"weight": Payload(marker)}}, path)
    else:
        path.write_bytes(pickle.dumps(Payload(marker), protocol=2))
    return path


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "code_has_run"


@pytest.mark.parametrize("how", ["zip", "bare"])
def test_the_payload_of_these_tests_would_run(how, marker, tmp_path):
    """A payload that does nothing would make every other test here pass."""
    with contextlib.suppress(RuntimeError):  # that the bare one is no file of weights, too late
        torch.load(poison(tmp_path / "x.pth", marker, how), weights_only=False)
    assert marker.is_dir()


def encoder_of(file: Path) -> None:
    make_student(
        ModelArguments(student_encoder="resnet18", encoder_weights=str(file)), DataArguments()
    )


def teacher_of(file: Path) -> None:
    load_teacher(str(file), num_labels=2, arch="unet", encoder="resnet18")


def measured_of(file: Path) -> None:
    load_measured(str(file), arch="unet", encoder="resnet18")


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".ckpt"])
@pytest.mark.parametrize("load", [encoder_of, teacher_of, measured_of])
@pytest.mark.parametrize("how", ["zip", "bare"])
def test_a_weight_file_that_would_run_code_is_refused(load, how, suffix, marker, tmp_path):
    with pytest.raises(ValueError, match=r"^Expected a file of tensors only, got .*weights"):
        load(poison(tmp_path / f"weights{suffix}", marker, how))
    assert not marker.exists()


@pytest.mark.parametrize("how", ["zip", "bare"])
def test_a_model_folder_that_would_run_code_is_refused(how, marker, tmp_path):
    """transformers reads pytorch_model.bin where there is no safetensors file."""
    student = save_network(tmp_path / "student")
    sizes = {"hidden_sizes": [8] * 4, "depths": [1] * 4, "decoder_hidden_size": 8}
    sizes["num_attention_heads"] = [1] * 4
    segformer = SegformerForSemanticSegmentation(SegformerConfig(**sizes, num_labels=2))
    segformer.save_pretrained(tmp_path / "segformer")
    for folder in (student, tmp_path / "segformer"):
        (folder / "model.safetensors").unlink()
        poison(folder / "pytorch_model.bin", marker, how)
    loads = (lambda: load_student(student), lambda: load_teacher(str(student), num_labels=2))
    stock = str(tmp_path / "segformer")
    loads += (lambda: load_student(stock), lambda: load_teacher(stock, num_labels=2))
    for load in loads:
        with pytest.raises(ValueError, match=r"^Expected"):
            load()
    assert not marker.exists()


def trainer_in(folder: Path) -> DistillationTrainer:
    args = arguments(
        folder,
        save_strategy="steps",
        save_steps=2,
        save_total_limit=None,
        load_best_model_at_end=False,
    )
    return DistillationTrainer(tiny_student(), args, train_dataset=Squares(8))


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    trainer_in(folder).train()
    return folder / "checkpoint-2"


PICKLED = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "progress_0.pt", "training_args.bin")


def test_every_pickle_of_a_checkpoint_is_among_those_tried(trained):
    """A new file that nobody tried would be the way in."""
    assert {p.name for p in trained.iterdir() if p.suffix in (".pt", ".pth", ".bin", ".pkl")} == {
        *PICKLED
    }


@pytest.mark.parametrize("how", ["zip", "bare"])
@pytest.mark.parametrize("name", PICKLED)
def test_a_checkpoint_that_would_run_code_does_not(name, how, trained, marker, tmp_path):
    """Checkpoints are passed on to colleagues, and resumed from.

    Whoever puts code into one can declare it complete as well.
    """
    checkpoint = shutil.copytree(trained, tmp_path / "run" / "checkpoint-2")
    poison(checkpoint / name, marker, how)
    complete(checkpoint, read_marker(trained)["run"])
    refused = pytest.raises(ValueError, match=r"^Expected a checkpoint of tensors and plain values")
    goes_on = contextlib.nullcontext() if name == "training_args.bin" else refused
    with goes_on:  # nobody reads training_args.bin
        trainer_in(tmp_path / "run").train(resume_from_checkpoint=str(checkpoint))
    assert not marker.exists()


def test_weights_that_are_not_finite_are_named_before_a_run(tmp_path):
    """A teacher of NaN teaches NaN, and a student that starts there never leaves it."""
    for kind in ("teacher", "encoder"):
        network = tiny_student()
        for value in list(network.encoder.parameters())[:1]:
            value.data[0] = float("inf" if kind == "teacher" else "nan")
        if kind == "teacher":
            network.save_pretrained(tmp_path / kind)
        else:
            torch.save(network.encoder.state_dict(), tmp_path / "encoder.pth")
    model = ModelArguments(teacher=str(tmp_path / "teacher"))
    with pytest.raises(FloatingPointError, match=r"in encoder.conv1.weight \(the teacher .*teach"):
        make_teacher(model, tiny_student(), image_size=32)
    with pytest.raises(FloatingPointError, match=r"\(encoder_weights .*encoder.pth\)"):
        encoder_of(tmp_path / "encoder.pth")


CODE = """
from pathlib import Path
Path(__file__).with_name("code_has_run").touch()
Path({marker!r}).touch()
raise ValueError("enough seen")
"""


@pytest.mark.parametrize("trusted", [False, True])
def test_code_of_a_model_runs_only_if_asked_for_and_is_announced(trusted, marker, tmp_path, capfd):
    """Whoever sets the flag should see whose code it was, in the log of the run."""
    folder = tmp_path / "stranger"
    folder.mkdir()
    (folder / "code.py").write_text(CODE.format(marker=str(marker)))
    parts = {"AutoConfig": "code.C", "AutoModelForSemanticSegmentation": "code.M"}
    (folder / "config.json").write_text(json.dumps({"model_type": "strange", "auto_map": parts}))
    model = ModelArguments(teacher=str(folder), trust_remote_code=trusted)
    assert ModelArguments().trust_remote_code is False
    cure = "Its own code ended with: enough seen" if trusted else "add --trust_remote_code"
    with pytest.raises(ValueError, match=rf"^Expected a semantic segmentation model.*{cure}"):
        make_teacher(model, tiny_student(), image_size=32)
    assert marker.exists() is trusted
    announced = f"Running Python code of {folder}, as --trust_remote_code asks for."
    assert capfd.readouterr().err.count(announced) == trusted


@pytest.mark.parametrize("trusted", [False, True])
def test_a_kind_of_model_without_code_is_not_answered_with_trust(trusted, tmp_path):
    """A detector gives boxes, no map of logits: no flag makes it a teacher."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "yolos"}))
    with pytest.raises(ValueError, match=r"got model_type 'yolos'\. That kind") as caught:
        load_teacher(str(tmp_path), num_labels=2, trust_remote_code=trusted)
    assert "trust_remote_code" not in str(caught.value)


def test_code_that_lies_in_another_repository_is_announced_by_its_name(
    tmp_path, capfd, monkeypatch
):
    """config.json may point anywhere, and the name of the model says nothing about it."""
    config = {"model_type": "strange", "auto_map": {"AutoConfig": "eve/code--code.C"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = ModelArguments(teacher=str(tmp_path), trust_remote_code=True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises((ValueError, OSError)):
        make_teacher(model, tiny_student(), image_size=32)
    assert "Running Python code of eve/code, as" in capfd.readouterr().err


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.mkdir", "!!python/object/new:os.mkdir"])
def test_a_recipe_is_data(tag, marker, tmp_path):
    """Recipes are passed around like weights; YAML can name any function of Python."""
    recipe = tmp_path / "config.yaml"
    recipe.write_text(f"num_train_epochs: {tag} [{str(marker)!r}]\n")
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "config.json").touch()
    for read in (lambda: load_recipe(str(recipe)), *(lambda f=f: f(tmp_path) for f in READERS)):
        with pytest.raises(ValueError, match=r"^Expected YAML in .*config.yaml"):
            read()
    assert not marker.exists()


READERS = (run_settings, settings_of)


@pytest.mark.parametrize("place", ["../secret.bin", "link.bin", "{folder}/secret.bin"])
def test_an_onnx_file_reads_weights_beside_it_only(place, tmp_path):
    """ONNX may keep weights in other files, and name any file as one."""
    onnx = pytest.importorskip("onnx")
    from kd_trainer.export.onnx_file import load_onnx

    (tmp_path / "secret.bin").write_bytes(np.arange(4, dtype=np.float32).tobytes())
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "link.bin").symlink_to(tmp_path / "secret.bin")
    weight = onnx.TensorProto(name="w", data_type=1, dims=[4])
    weight.data_location = onnx.TensorProto.EXTERNAL
    told = {"location": place.format(folder=tmp_path), "offset": "0", "length": "16"}
    for key, value in told.items():
        weight.external_data.add(key=key, value=value)
    help_, node = onnx.helper, onnx.helper.make_node("Add", ["x", "w"], ["y"])
    ends = [help_.make_tensor_value_info(name, 1, [4]) for name in "xy"]
    graph = help_.make_graph([node], "g", ends[:1], ends[1:], [weight])
    model = help_.make_model(graph, opset_imports=[help_.make_opsetid("", 17)], ir_version=9)
    (folder / "student.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ValueError, match=r"^Expected a readable ONNX file, got .*[Ee]xternal data"):
        load_onnx(folder / "student.onnx")


# What runs code that stands in a file, unless it is told not to.
FORBIDDEN = [
    "pickle.load",
    "pickle.loads",
    "pickle.Unpickler",
    "yaml.load",
    "yaml.full_load",
    "yaml.unsafe_load",
    "yaml.load_all",
    "eval",
    "exec",
    "os.system",
    "os.popen",
    "marshal.loads",
    "torch.hub.load",
    "joblib.load",
    "shelve.open",
    "torch.jit.load",
]
NEEDED = {"torch.load": ("weights_only", True)}
REFUSED = {"allow_pickle": True, "trust_remote_code": True, "shell": True, "weights_only": False}


def runs_code(tree: ast.AST) -> list[str]:
    """Calls in a file that can run code of whoever wrote the data."""
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        given = {k.arg: k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)}
        needed = NEEDED.get(name)
        if (
            name in FORBIDDEN
            or (needed is not None and given.get(needed[0]) is not needed[1])
            or any(given.get(option) is value for option, value in REFUSED.items())
        ):
            found.append(f"{node.lineno}: {ast.unparse(node)}")
    return found


def test_nothing_in_the_package_runs_what_it_reads():
    """The next reader of a file would be written as the last one found on the web was."""
    files = [*ROOT.glob("kd_trainer/**/*.py"), *ROOT.glob("scripts/*.py")]
    found = {str(f): runs_code(ast.parse(f.read_text(encoding="utf-8"))) for f in files}
    assert len(found) > 50
    assert {name: calls for name, calls in found.items() if calls} == {}


@pytest.mark.parametrize(
    "line",
    [
        "pickle.load(f)",
        "torch.load(p)",
        "torch.load(p, weights_only=False)",
        "yaml.load(t, Loader=L)",
        "np.load(p, allow_pickle=True)",
        "AutoModel.from_pretrained(x, trust_remote_code=True)",
        "subprocess.run(c, shell=True)",
        "exec(text)",
    ],
)
def test_the_check_of_the_package_catches(line):
    assert len(runs_code(ast.parse(line))) == 1


def test_a_student_brings_its_code_along_and_does_not_need_it(tmp_path, marker):
    """Our own folders hold modeling.py; with the package installed it must never be run."""
    folder = save_network(tmp_path / "student")
    for path in folder.glob("*.py"):
        path.write_text(f"import os\nos.mkdir({str(marker)!r})\n")
    assert isinstance(load_student(folder), SmpForSemanticSegmentation)
    load_teacher(str(folder), num_labels=2, trust_remote_code=True)
    assert not marker.exists()


EVIL = "x\x1b[2K\rerror: paid\x07\u202e"


@pytest.mark.parametrize(
    "raised", [ValueError(f"Expected a split, got {EVIL}."), OSError(f"nothing at {EVIL}")]
)
def test_a_name_cannot_draw_on_the_terminal(raised, capsys):
    """An escape sequence in a file name or category writes a line of its own, or a title."""

    # Only an error that a file of the package raises is shown as a line.
    code = compile("def stop(raised):\n    raise raised", str(PACKAGE / "data" / "x.py"), "exec")
    exec(code, names := {})
    with pytest.raises(SystemExit):
        run_script(lambda: names["stop"](raised))
    told = capsys.readouterr().err
    assert told.endswith("\n")
    assert told[:-1].isprintable()
    assert r"\x1b[2K" in told


def test_the_line_of_a_stopped_run_is_printable(capsys):
    """It names the checkpoint, and a folder may be called anything."""

    def stop():
        raise Stopped(f"Saved {EVIL}.", 130)

    with pytest.raises(SystemExit):
        run_script(stop)
    assert capsys.readouterr().err[:-1].isprintable()


@pytest.mark.parametrize("show", [table, lambda found: summary(found, 1.0)])
def test_what_a_preflight_tells_is_printable(show):
    """Its lines name files and classes."""
    shown = show([note("masks", f"a class {EVIL}", f"Rename {EVIL}.")])
    assert all(line.isprintable() for line in shown.split("\n"))
    assert r"\x1b" in shown


def test_the_owner_of_code_cannot_hide_itself(tmp_path, capfd):
    """The line that says whose code runs would be erased by the name in the config."""
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "strange", "auto_map": {"AutoConfig": f"{EVIL}--code.C"}})
    )
    with pytest.raises((ValueError, OSError)):
        load_teacher(str(tmp_path), num_labels=2, trust_remote_code=True)
    told = next(line for line in capfd.readouterr().err.split("\n") if "Running Python" in line)
    assert told.isprintable()
