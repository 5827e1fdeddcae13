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

from benchmarks.contenders import Turn
from benchmarks.evaluation import Noise
from benchmarks.main import PARTS, benchmark_main, parse_benchmark
from benchmarks.pictures import draw_pairs, pair_files
from benchmarks.plain_loop import PlainDataset
from benchmarks.steps import bottleneck, summary, take_turns
from benchmarks.stopwatch import OTHER, Stopwatch


def test_stopwatch_counts_each_part_without_what_lies_inside(monkeypatch):
    """A teacher counted in the loss as well would make the loss look dear."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    watch = Stopwatch(torch.device("cpu"))
    with watch.part("before"):
        now[0] += 100
    watch.start()
    now[0] += 1
    with watch.part("loss"):
        now[0] += 2
        with watch.part("teacher"):
            now[0] += 4
        now[0] += 8
    wall, _, parts = watch.stop()
    assert wall == 15
    assert parts == {OTHER: 1, "loss": 10, "teacher": 4}


def test_ratios_are_taken_within_a_round():
    """Rounds that met a busy machine would otherwise be compared with others that did not."""
    slow = [Turn(s, 2 * s, {"data": s}) for s in (2.0, 20.0, 2.0)]
    fast = [Turn(s, s, {"data": s / 2, "teacher": s / 2}) for s in (1.0, 10.0, 0.5)]
    found = summary({"plain": slow, "ours": fast})
    assert found["ratios"]["plain / ours"] == {"seconds": 2.0, "cpu_seconds": 4.0}
    assert found["median"]["plain"]["seconds"] == 2.0
    assert "student" not in str(found["ratios"])
    assert found["bottleneck"] is None


def test_the_next_bottleneck_is_what_the_student_alone_does_not_pay():
    """The largest part is the student's own, and nothing of ours can be gained there."""
    said = bottleneck(
        {
            "ours": {"student backward": 0.5, "teacher": 0.1, "loss": 0.2},
            "student": {"student backward": 0.45, "loss": 0.18},
        }
    )
    assert "most goes into teacher (100.0 ms" in said
    assert "student backward is the largest part (62%)" in said


def test_turns_alternate_and_turn_round():
    """One that always comes first would always meet the cold caches of the other."""
    order: list[str] = []

    def contender(name: str):
        def turn(steps: int) -> Turn:
            order.append(f"{name}{steps}")
            return Turn(1.0, 1.0, {})

        return turn

    turns = take_turns({"a": contender("a"), "b": contender("b")}, steps=3, pairs=2)
    assert order == ["a1", "b1", "a3", "b3", "b3", "a3"]
    assert [len(own) for own in turns.values()] == [2, 2]


def test_drawn_pairs_are_photographs_with_masks_of_their_size(tmp_path: Path):
    """A benchmark of empty pictures would decode them in no time."""
    pairs = pair_files(draw_pairs(tmp_path, count=2), "train")
    assert len(pairs) == 2
    for image, mask in pairs:
        picture, shown = cv2.imread(str(image)), cv2.imread(str(mask), cv2.IMREAD_UNCHANGED)
        assert picture.shape == (480, 640, 3)
        assert shown.shape == (480, 640)
        assert set(np.unique(shown)) == {0, 255}
        assert picture.std() > 10
    pixels, target = PlainDataset(pairs, 64)[0]
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
    }
    benchmark_main(["train", *(word for pair in flags.items() for word in pair)])
    printed = capsys.readouterr().out
    found = json.loads(file.read_text())
    assert set(found["rounds"]) == {"plain", "student", "ours", "cached"}
    pairs = {"plain / ours", "ours / student", "plain / student"}
    assert set(found["ratios"]) == pairs | {"plain / cached", "cached / student"}
    assert found["breakdown"]["ours"]["teacher"] > found["breakdown"]["cached"]["teacher"]
    assert "teacher" not in found["breakdown"]["student"]
    for name, parts in found["breakdown"].items():
        assert sum(parts.values()) == pytest.approx(found["median"][name]["seconds"])
        assert {"data", "student forward", "student backward", "optimizer"} <= parts.keys()
    assert "0 of 5 units free" in printed
    assert "Next bottleneck" in printed
    assert found["work"]["image_size"] == 64


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


def test_a_folder_without_pairs_is_refused(tmp_path: Path):
    """The plain loop lists files itself, and would divide by no images."""
    with pytest.raises(FileNotFoundError, match="no photographs in"):
        pair_files(tmp_path, "train")
    data = write_pairs(tmp_path / "data", train=2)
    next((data / "train" / "masks").iterdir()).unlink()
    with pytest.raises(FileNotFoundError, match="no mask of p"):
        pair_files(data, "train")


def test_every_measurement_has_a_name_and_defaults():
    """A part whose defaults contradict themselves would fail for everybody who just starts it."""
    for word, part in PARTS.items():
        found, args = parse_benchmark([word])
        assert found is part
        assert isinstance(args, part.arguments)
    assert parse_benchmark([])[0] is PARTS["train"]
    assert len(Noise(3, 32)) == 3


def test_a_measurement_of_the_data_runs(tmp_path: Path, capsys):
    """Tables on the terminal, and the same figures in the file."""
    file = tmp_path / "data.json"
    flags = ("--image_size", "64", "--repeats", "1", "--images", "2", "3", "--json", str(file))
    benchmark_main(["data", *flags])
    printed = capsys.readouterr().out
    found = json.loads(file.read_text())
    assert set(found["growth"]) == {"2", "3", "ratio"}
    fog = found["augmentation"]["transforms"]["SoftFog"]
    row = ["SoftFog", f"{fog['probability']:.3f}", f"{fog['library']:.2f}", f"{fog['ours']:.2f}"]
    assert row in [[c.strip() for c in x.strip("|").split("|")] for x in printed.splitlines()]
    assert f"{found['decoding']['cv2']['ratio']:.2f}" in printed
