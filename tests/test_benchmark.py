"""scripts/benchmark.py: what it counts, what it refuses, and that it runs; no figure is judged."""

from __future__ import annotations

import json
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from small_runs import write_pairs

from benchmarks.data import draw_pairs, read_folder
from benchmarks.main import PARTS, benchmark_main, parse_benchmark
from benchmarks.memory import added_mib
from benchmarks.plain_loop import PlainDataset
from benchmarks.timer import Clock, Turn, take_turns
from benchmarks.train import summary


def test_turns_alternate_and_turn_round():
    """One that always comes first would always meet the cold caches of the other."""
    order: list[str] = []

    def variant(name: str):
        return lambda number: order.append(f"{name}{number}") or len(order)

    measured = take_turns({"a": variant("a"), "b": variant("b")}, rounds=2)
    assert order == ["b-1", "a-1", "a0", "b0", "b1", "a1"]
    assert measured == {"a": [3, 6], "b": [4, 5]}


def test_a_clock_gives_what_one_step_took(monkeypatch):
    """A turn of ten steps would otherwise look ten times as slow as one of a single step."""
    monkeypatch.setattr(time, "perf_counter", iter([5.0, 25.0]).__next__)
    monkeypatch.setattr(time, "process_time", iter([0.0, 30.0]).__next__)
    assert Clock(torch.device("cpu")).turn(10) == Turn(2.0, 3.0)


def test_ratios_are_taken_within_a_round():
    """Rounds that met a busy machine would otherwise be compared with others that did not."""
    slow = [Turn(s, 2 * s) for s in (2.0, 20.0, 2.0)]
    fast = [Turn(s, s) for s in (1.0, 10.0, 0.5)]
    compared = summary({"plain": slow, "ours": fast})
    spread = {"seconds": 2.0, "lowest": 2.0, "highest": 4.0, "cpu_seconds": 4.0}
    assert compared["ratios"] == {"plain / ours": spread}
    assert compared["median"]["plain"] == {"seconds": 2.0, "cpu_seconds": 4.0}


def test_memory_that_is_freed_again_counts():
    """The peak is what has to fit; at the end of a step most of it is gone."""
    assert 60 < added_mib(lambda: torch.ones(16 * 2**20).sum().item()) < 80


def test_drawn_pairs_are_images_with_masks_of_their_size(tmp_path: Path):
    """A benchmark of empty images would decode them in no time."""
    rows, _ = read_folder(draw_pairs(tmp_path, count=9))
    files = [(row["image"]["path"], row["mask"]["path"]) for row in rows]
    assert len(files) == 9
    for image, mask in files:
        shown, labelled = cv2.imread(image), cv2.imread(mask, cv2.IMREAD_UNCHANGED)
        assert shown.shape == (480, 640, 3)
        assert labelled.shape == (480, 640)
        assert set(np.unique(labelled)) == {0, 255}
        assert shown.std() > 10
    pixels, target = PlainDataset(files, 64)[0]
    assert pixels.shape == (3, 64, 64)
    assert pixels.dtype == torch.float32
    assert float(pixels.abs().max()) < 4  # normalised
    assert set(target.unique().tolist()) <= {0.0, 1.0}


@pytest.mark.slow
def test_a_measurement_of_training_steps_runs(tmp_path: Path, capsys):
    """The whole path with networks of seconds: data from the disk, four contenders, the file."""
    file = tmp_path / "speed.json"
    flags = {
        "--dataset": str(write_pairs(tmp_path / "data", train=4)),
        "--image_size": "64",
        "--batch_size": "2",
        "--teacher_encoder": "mobilenet_v2",
        "--student_encoder": "mobilenet_v2",
        "--free_units": "0",
        "--steps": "1",
        "--pairs": "1",
        "--memory": "false",
        "--device": "cpu",
        "--json": str(file),
        "--profile": str(tmp_path / "trace"),
    }
    benchmark_main(["train", *(word for pair in flags.items() for word in pair)])
    measured = json.loads(file.read_text())
    assert set(measured["rounds"]) == {"plain", "student", "ours", "cached"}
    pairs = {"plain / ours", "ours / student", "plain / student"}
    assert set(measured["ratios"]) == pairs | {"plain / cached", "cached / student"}
    assert measured["work"]["image_size"] == 64
    printed = capsys.readouterr().out
    assert f"{measured['ratios']['plain / ours']['seconds']:.4g} " in printed
    assert "teacher_logits" in (tmp_path / "trace" / "operations.txt").read_text()


WRONG = {
    "unknown measurement": (["trian"], "Expected one of train, .* Did you mean train?"),
    "unknown flag": (["train", "--step", "3"], "got --step. Did you mean --steps?"),
    "no steps": (["--steps", "0"], "Expected --steps of at least 1, got 0"),
    "contender": (["--contenders", "plain", "theirs"], "one of plain, student, ours, cached, got"),
    "uneven share": (["processes", "--batch_size", "3"], "divisible by 2 processes, got 3"),
    "number": (["evaluation", "--images", "many"], "Expected --images to be"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_use_is_said_before_anything_is_measured(case: str):
    """A measurement takes minutes; a mistyped one should take none."""
    arguments, expected = WRONG[case]
    with pytest.raises(ValueError, match=expected.replace("?", r"\?")):
        parse_benchmark(arguments)


def test_every_measurement_has_a_name_and_defaults():
    """A part whose defaults contradict themselves would fail for everybody who just starts it."""
    for word, part in PARTS.items():
        named, args = parse_benchmark([word])
        assert named == word
        assert isinstance(args, part.arguments)
    assert parse_benchmark([])[0] == "train"


def test_a_measurement_of_the_data_runs(tmp_path: Path, capsys):
    """Tables on the terminal, and the same figures in the file."""
    file = tmp_path / "data.json"
    flags = ("--image_size", "64", "--repeats", "1", "--images", "3", "12", "--json", str(file))
    benchmark_main(["data", *flags])
    printed = capsys.readouterr().out
    measured = json.loads(file.read_text())
    transforms, whole = (measured["augmentation"][name] for name in ("transforms", "list"))
    assert len(transforms) == 17
    fog = transforms["SoftFog"]
    row = ["SoftFog", *(f"{fog[key]:.4g}" for key in ("probability", "library", "ours"))]
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in printed.splitlines()]
    assert row in [line[:4] for line in cells]
    assert fog["library"] > fog["ours"] > 0
    ours = sum(row["probability"] * row["ours"] for row in transforms.values())
    assert whole["ours"] == pytest.approx(ours)
    assert whole["library"] > whole["without_normalize"]
    assert whole["ratio"] == pytest.approx(whole["library"] / ours)
    decoding, growth = measured["decoding"], measured["growth"]
    assert [set(decoding[name]) for name in ("cv2", "PIL")] == 2 * [{"pil", "ours", "ratio"}]
    assert set(decoding["sample"]) == {"none", "heavy"}
    assert set(growth) == {"3", "12"}
    assert growth["12"]["mib"] > growth["3"]["mib"]
    assert all(row["map"] > 0 < row["stream"] for row in growth.values())
