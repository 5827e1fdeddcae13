"""The preflight at the start of trainings and comparisons, and scripts/doctor.py."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
from preflight_runs import flags, knowing, teach
from safetensors.torch import load_file
from small_runs import SIDE, save_network, write_pairs

from kd_trainer.build import build_run
from kd_trainer.commands import compare as compare
from kd_trainer.commands.doctor import doctor, doctor_main, parse_doctor
from kd_trainer.commands.train import train
from kd_trainer.compare.arguments import parse_comparison
from kd_trainer.config import parse
from kd_trainer.data import load_splits
from kd_trainer.data.listing import MissingSplitError
from kd_trainer.doctor.finding import Grade, graded
from kd_trainer.doctor.resources import affordable, disk_need

ROOT = Path(__file__).parents[1]
TIMES = ("_seconds", "_per_second", "_ms", "peak_memory_mib", "_threads")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("doctor") / "data", train=10, validation=6)


def test_a_training_is_the_same_with_and_without(data: Path, tmp_path: Path, monkeypatch, capsys):
    """A look that changes what it looks at would make two different runs of one command."""
    teach(monkeypatch, knowing())
    results = {}
    for name, extra in (("with", ()), ("without", ("--no_preflight",))):
        more = ("--epochs", "1", "--max_train_samples", "6", "--augmentation", "light", *extra)
        run = parse(flags(data, tmp_path / name, *more, teacher="one"))
        results[name] = train(run)
        assert ("Preflight: 13 checks passed in " in capsys.readouterr().out) == (name == "with")
    weights = [load_file(tmp_path / n / "student" / "model.safetensors") for n in results]
    assert all(torch.equal(weights[0][name], value) for name, value in weights[1].items())
    plain = [
        {k: v for k, v in result.items() if not k.endswith(TIMES)} for result in results.values()
    ]
    assert plain[0] == plain[1]
    written = [(tmp_path / n / "config.yaml").read_text() for n in results]
    assert written[0].replace("/with", "/without") == written[1]


def test_a_training_with_a_fault_stops_before_anything_is_written(data: Path, tmp_path: Path):
    """One line with the cure, and the way to go on all the same."""
    teacher = save_network(tmp_path / "random")
    run = parse(flags(data, tmp_path / "out", teacher=teacher))
    with pytest.raises(ValueError, match=r"^Expected a teacher better than .*--no_preflight goes"):
        train(run)
    assert not (tmp_path / "out").exists()


def test_a_comparison_looks_once(data: Path, tmp_path: Path, monkeypatch):
    """Six runs would look six times at the same images."""

    def stop(run, parts) -> None:
        assert run.training.no_preflight is False
        assert parts.teacher is not None
        raise ValueError("Expected a better teacher, got this one.")

    monkeypatch.setattr(compare, "check_before_training", stop)
    teacher = save_network(tmp_path / "random")
    given = flags(data, tmp_path / "out", "--eval_strategy", "epoch", teacher=teacher)
    with pytest.raises(ValueError, match="a better teacher"):
        compare.run_compare(parse_comparison(given))
    monkeypatch.setattr(compare, "measure_speed", lambda *_: 1 / 0)  # the next thing it does
    with pytest.raises(ZeroDivisionError):
        compare.run_compare(parse_comparison([*given, "--no_preflight"]))


@pytest.mark.distributed
def test_two_processes_stop_with_the_same_line(data: Path, tmp_path: Path):
    """A rank that does not hear of the fault hangs in the first exchange of gradients."""
    teacher = save_network(tmp_path / "random")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["--standalone", str(ROOT / "scripts" / "train.py")]
    command += flags(data, tmp_path / "out", teacher=teacher)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert lines == [lines[0]] * 2, done.stderr[-2000:]
    assert "Expected a teacher better than" in lines[0]


@pytest.mark.parametrize(
    ("more", "kept"),
    [
        ([], 2),  # two epochs, a checkpoint each
        (["--epochs", "50"], 3),  # --save_total_limit 2, and the next one
        (["--epochs", "50", "--save_total_limit", "1"], 3),  # the best, the newest and the next
        (["--epochs", "50", "--save_total_limit", "null"], 50),
        (["--save_strategy", "no"], 0),
        (["--max_steps", "40", "--save_strategy", "steps", "--save_steps", "0.25"], 3),
    ],
)
def test_checkpoints_on_the_disk_are_counted(more: list[str], kept: int, data, tmp_path: Path):
    """While a checkpoint is written those it will replace are still there."""
    settings = ["--eval_strategy", "no"] if "--max_steps" in more else []
    run = parse(flags(data, tmp_path / "out", *more, *settings))
    assert disk_need(run, build_run(run)).checkpoints == kept


@pytest.mark.parametrize(
    ("batch", "seconds", "expected"),
    [(4, 0.01, (3, 4)), (4, 1.5, (2, 4)), (4, 4.0, (1, 2)), (64, 0.2, (2, 32)), (2, 60.0, (1, 2))],
)
def test_what_is_measured_fits_into_the_time(batch: int, seconds: float, expected):
    """The recipe at 640 px takes 20 s a step on a slow machine; the doctor has a minute."""
    assert affordable(batch, seconds, 20.0) == expected


def test_doctor_prints_a_table_with_the_cost_of_the_run(
    data: Path, tmp_path: Path, monkeypatch, capsys
):
    """All of it: checks, memory and hours, and nothing is written."""
    teach(monkeypatch, knowing())
    run = parse_doctor(flags(data, tmp_path / "out", "--epochs", "100", teacher="one"))
    findings = doctor(run)
    assert graded(findings, Grade.FAULT) == graded(findings, Grade.NOTE) == []
    out = capsys.readouterr().out
    time = next(f.text for f in findings if f.check == "time")
    assert "for 500 steps of" in time
    assert [f.check for f in findings][-2:] == ["memory", "time"]
    assert "check            |" in out.splitlines()[0]
    assert "Nothing is at fault. Looked for" in out
    assert not (tmp_path / "out").exists()


def test_doctor_ends_with_1_at_a_fault(data: Path, tmp_path: Path, capsys):
    """A script that calls it reads the status, not the table; and random weights are a fault."""
    teacher = save_network(tmp_path / "random")
    with pytest.raises(SystemExit) as stop:
        doctor_main(flags(data, tmp_path / "out", teacher=teacher))
    assert stop.value.code == 1
    out = capsys.readouterr().out
    assert "teacher quality  | fault | Expected a teacher better than" in out
    assert "1 fault: this training would be pointless." in out


WRONG = {
    "unknown flag": (["--techer", "x"], "Did you mean --teacher?"),
    "dry run": (["--dry_run"], "Expected no --dry_run, got it: nothing is trained here"),
    "no preflight": (["--no_preflight"], "Expected no --no_preflight"),
    "value": (["--image_size", "big"], "Expected --image_size to be height and width"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_use_of_doctor_is_an_error(case: str, data: Path, tmp_path: Path):
    """Before anything is loaded."""
    more, words = WRONG[case]
    with pytest.raises(ValueError, match=words.replace("?", r"\?")):
        parse_doctor(flags(data, tmp_path / "out") + more)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--image_size", str(SIDE + 1)], "divisible by 32"),
        (["--train_split", "trian"], "Did you mean 'train'?"),
        (["--teacher", "{four}"], "teacher of 2 classes, got 4"),
    ],
)
def test_what_would_stop_the_start_is_a_fault_in_the_table(
    more, words, data, tmp_path: Path, capsys
):
    """Sizes, splits and class counts that do not fit are what a doctor is asked about."""
    four = save_network(tmp_path / "four", num_labels=4)
    given = flags(data, tmp_path / "out") + [word.format(four=four) for word in more]
    (finding,) = doctor(parse_doctor(given))
    assert finding.grade == Grade.FAULT
    assert words in f"{finding.text}. {finding.cure}"
    assert "1 fault: this training would not start." in capsys.readouterr().out


@pytest.mark.parametrize("streaming", [[], ["--streaming"]])
def test_a_set_without_validation_is_said_to_have_none(streaming, data, tmp_path: Path, capsys):
    """It can be trained on: the cure is to leave the evaluation out, and nothing is pointless."""
    alone = tmp_path / "alone"
    shutil.copytree(data / "train", alone / "train")
    given = [*flags(alone, tmp_path / "out"), *streaming, "--eval_fraction", "0"]
    (finding,) = doctor(parse_doctor(given))
    assert finding.cure.endswith("is trained on by train.py with --eval_strategy no.")
    assert "1 fault: this training would not start." in capsys.readouterr().out
    assert not graded(doctor(parse_doctor([*given, "--eval_strategy", "no"])), Grade.FAULT)
    shutil.move(alone / "train", alone / "validation")
    (finding,) = doctor(parse_doctor(given))
    assert "--eval_strategy" not in finding.cure


@pytest.mark.parametrize("kind", ["parquet", "disk", "coco"])
def test_every_source_without_a_split_says_how_to_train_without(kind: str, tmp_path: Path):
    """Whatever way the splits are stored."""
    if kind == "parquet":
        (tmp_path / "train.parquet").touch()
    elif kind == "disk":
        rows = datasets.Dataset.from_dict({"image": ["a"], "mask": ["b"]})
        datasets.DatasetDict(train=rows).save_to_disk(tmp_path)
    else:
        (tmp_path / "annotations").mkdir()
        (tmp_path / "annotations" / "train.json").touch()
    given = [*flags(tmp_path, tmp_path / "out"), "--eval_fraction", "0"]
    with pytest.raises(MissingSplitError) as caught:
        load_splits(parse(given).data, ["validation"])
    assert caught.value.split == "validation"
