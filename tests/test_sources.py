"""A run is its student wherever a model is named; a path that is not here says where here is."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_student

from kd_trainer.arguments import DistillationArguments
from kd_trainer.commands.predict import PredictArguments, load_segmenter
from kd_trainer.commands.report import build_report
from kd_trainer.data_arguments import DataArguments
from kd_trainer.evaluation import raw_logits
from kd_trainer.hub import find_source
from kd_trainer.loading import load_measured, load_student
from kd_trainer.model_arguments import ModelArguments
from kd_trainer.models.image_processing import SmpImageProcessor
from kd_trainer.sources import model_source
from kd_trainer.teacher import load_teacher
from kd_trainer.teacher_targets import cache_root
from kd_trainer.web_demo.models import load_demo_student, load_demo_teacher

PICTURE = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """The output folder of a run, as far as its student goes."""
    root = tmp_path_factory.mktemp("trained") / "run"
    student = tiny_student()
    student.save_pretrained(root / "student")
    SmpImageProcessor.from_model_config(student.config).save_pretrained(root / "student")
    (root / "config.yaml").write_text("dataset: photos\n")
    return root


@pytest.fixture(scope="module")
def expected(run: Path) -> torch.Tensor:
    """What the student in the run says to the picture."""
    with torch.no_grad():
        return answer(load_student(run / "student"))


def _teacher_of_demo(source: str) -> Any:
    return load_demo_teacher(ModelArguments(teacher=source), load_demo_student(source))


# What each script does with the name of a model; each gives something that looks at a picture.
LOADERS: dict[str, Callable[[str], Any]] = {
    "--student": lambda source: load_student(str(ModelArguments(student=source).student)),
    "eval": load_measured,
    "teacher": lambda source: load_teacher(source, num_labels=2),
    "--teacher": lambda source: load_teacher(ModelArguments(teacher=source).teacher, num_labels=2),
    "predict": lambda source: load_segmenter(PredictArguments(model=source)).segmenter,
    "demo --teacher": lambda source: _teacher_of_demo(source).segmenter,
    "push": lambda source: load_student(find_source(source).student),
}


def answer(model: Any) -> torch.Tensor:
    network = getattr(model, "network", model)
    if isinstance(network, torch.nn.Module):
        return raw_logits(network.eval(), PICTURE)
    return network(PICTURE)


@pytest.mark.parametrize("name", LOADERS)
def test_a_run_is_its_student_wherever_a_model_is_named(
    name: str, run: Path, expected: torch.Tensor
):
    """`runs/x` is what people name; they were told that it has no config.json, or is no B3."""
    weights = run / "student" / "model.safetensors"
    with torch.no_grad():
        for source in (run, weights) if name == "eval" else (run,):
            assert torch.equal(answer(LOADERS[name](str(source))), expected), source


@pytest.mark.parametrize("name", LOADERS)
def test_a_home_folder_is_found_wherever_a_model_is_named(
    name: str, run: Path, expected: torch.Tensor, monkeypatch
):
    """A shell writes `~` out, Python does not: `~/run` was looked for on the Hub."""
    monkeypatch.setenv("HOME", str(run.parent))
    with torch.no_grad():
        for source in ("~/run", "~/run/student"):
            assert torch.equal(answer(LOADERS[name](source)), expected), source


def test_a_home_folder_is_written_out_in_every_place_that_settings_name(monkeypatch, tmp_path):
    """`~/x` as it stands is a folder of that name in the working folder."""
    monkeypatch.setenv("HOME", str(tmp_path))
    data = DataArguments(dataset="~/a", unlabelled="~/b")
    model = ModelArguments(teacher="~/c", student="~/d", encoder_weights="~/e")
    cache = {"teacher_targets": "cached", "teacher_cache": "~/g"}
    training = DistillationArguments(output_dir="~/f", use_cpu=True, **cache)
    found = [data.dataset, data.unlabelled, model.teacher, model.student, model.encoder_weights]
    found += [training.output_dir, training.teacher_cache]
    assert found == [str(tmp_path / name) for name in "abcdefg"]
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    default = cache_root(DistillationArguments(output_dir="x", use_cpu=True))
    assert default == tmp_path / ".cache" / "kd_trainer" / "teacher_logits"
    assert model_source("~no one/x") == "~no one/x", "a folder of that name"


def test_only_a_run_and_the_weights_of_a_folder_mean_another_place(run: Path, tmp_path: Path):
    """A bare state dict beside a config.json of something else stays a bare state dict."""
    assert find_source(run).run == find_source(run / "student").run == run
    assert model_source("owner/name") == "owner/name"
    assert model_source(str(run / "student")) == str(run / "student")
    weights = shutil.copy(run / "student" / "model.safetensors", tmp_path)
    assert model_source(str(weights)) == str(weights)
    for text in ('{"lr": 0.1}', "[1]", "no json"):
        (tmp_path / "config.json").write_text(text)
        assert model_source(str(weights)) == str(weights)
    both = shutil.copytree(run, tmp_path / "both")
    shutil.copy(run / "student" / "config.json", both)
    assert model_source(str(both)) == str(both), "a model that holds another one"


@pytest.mark.parametrize("source", ["runs/x", "runs/x/student", "photos/best.pth"])
def test_a_path_of_another_folder_says_where_it_was_looked_for(source, tmp_path, monkeypatch):
    """The same command in another folder fails, and the Hub's answer explains nothing."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    message = rf"^Expected .* There is no {source} in the working folder {tmp_path}: name its place"
    for load in (LOADERS["eval"], LOADERS["teacher"]):
        with pytest.raises(FileNotFoundError, match=message):
            load(source)


def test_a_report_from_another_folder_asks_for_the_data(run: Path, tmp_path: Path, monkeypatch):
    """The run's own relative path is not what the user typed."""
    monkeypatch.chdir(tmp_path)
    for folder in (run, run / "student"):
        with pytest.raises(FileNotFoundError, match=r"photos, got nothing .*place with --dataset"):
            build_report(folder)
