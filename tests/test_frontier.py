"""The frontier of latency and mIoU: what is timed, what it is compared with, and what is shown."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import SIDE, tiny_student

from benchmarks import frontier as frontier_module
from benchmarks.frontier import (
    ENGINES,
    INT8,
    ONNX,
    TORCH,
    FrontierArguments,
    calls_of,
    frontier,
    frontier_chart,
    frontier_main,
    frontier_table,
    named_folders,
)
from kd_trainer.costs import RawLogits, macs, noise_image
from kd_trainer.export.graph import export_program, metadata_of
from kd_trainer.export.onnx_file import write_onnx
from kd_trainer.loading import load_student, network_size

MIOU = {"teacher": 0.9, "slow": 0.8, "fast": 0.85}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of runs: the teacher's with nothing exported, `fast` with both ONNX files."""
    root = tmp_path_factory.mktemp("frontier")
    folders = {name: root / name for name in MIOU}
    for seed, (name, folder) in enumerate(folders.items()):
        tiny_student(seed=seed).save_pretrained(folder / "student")
        (folder / "results.json").write_text(json.dumps({"student_miou": MIOU[name]}))
    fast = folders["fast"]
    student = load_student(fast / "student").eval()
    metadata = metadata_of(student, with_preprocessing=False, precision="fp32")
    program = export_program(student, prune=False)
    write_onnx(program, fast / "student.onnx", metadata, with_preprocessing=False)
    # Another network stands for the int8 file, so that it can be told from the fp32 one.
    other = load_student(folders["slow"] / "student").eval()
    write_onnx(
        export_program(other, prune=False),
        fast / "student_int8.onnx",
        metadata,
        with_preprocessing=False,
    )
    exported = {"onnx-int8": {"miou": 0.84}}
    (fast / "export.json").write_text(json.dumps(exported))
    return folders


def test_every_engine_runs_the_network_it_is_said_to_run(runs, monkeypatch):
    """A figure of another file, or of another input, could never be told by looking at it."""
    pixels = noise_image(SIDE)
    slow, fast = (load_student(runs[name]).eval() for name in ("slow", "fast"))
    with torch.no_grad():
        of_slow, of_fast = (RawLogits(network)(pixels).numpy() for network in (slow, fast))
        made = calls_of(runs["slow"], slow, pixels)
        monkeypatch.setattr(frontier_module, "onnx_bytes", None)  # the file is there
        read = calls_of(runs["fast"], fast, pixels)
        assert list(made) == [TORCH, ONNX]
        assert list(read) == list(ENGINES)
        for call, expected in (
            *((made[engine], of_slow) for engine in (TORCH, ONNX)),
            *((read[engine], of_fast) for engine in (TORCH, ONNX)),
            (read[INT8], of_slow),
        ):
            np.testing.assert_allclose(np.asarray(call()), expected, rtol=1e-3, atol=1e-3)


@pytest.fixture(scope="module")
def rows(runs) -> list[dict]:
    """Rows of a busy machine: in the second round everything takes ten times as long."""
    slow, fast = {TORCH: 3.0, ONNX: 2.0}, {TORCH: 1.5, ONNX: 1.0, INT8: 0.5}
    each = {"teacher": {TORCH: 6.0, ONNX: 4.0}, "slow": slow, "fast": fast}
    load = (1.0, 10.0, 1.0, 3.0)
    asked = {}

    def take_turns(variants, rounds, *, warm_up):
        asked.update(variants=list(variants), rounds=rounds, threads=torch.get_num_threads())
        return {
            (name, engine): [milliseconds * busy for busy in load]
            for name, engines in each.items()
            for engine, milliseconds in engines.items()
        }

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(frontier_module, "take_turns", take_turns)
        patch.setattr(frontier_module, "onnx_bytes", lambda network, side: b"a model")
        patch.setattr(frontier_module, "onnx_call", lambda model, pixels, threads: None)
        measured = frontier(runs, FrontierArguments(image_size=SIDE, repeats=4))
    assert asked["rounds"] == 4
    assert asked["threads"] == 1
    assert len(asked["variants"]) == 7
    return measured


def test_speed_is_that_of_neighbouring_calls(rows):
    """Medians over all rounds would compare a quiet minute of one with a busy one of another."""
    by_name = {row["name"]: row for row in rows}
    assert by_name["teacher"]["speed"] == {TORCH: 1.0, ONNX: 1.0}
    assert by_name["slow"]["speed"] == {TORCH: 2.0, ONNX: 2.0}
    assert by_name["fast"]["speed"] == {TORCH: 4.0, ONNX: 4.0}
    assert by_name["fast"]["latency"][ONNX]["median"] == pytest.approx(2.0)
    assert by_name["fast"]["latency"][INT8]["median"] == pytest.approx(1.0)


def test_figures_are_those_of_the_files(rows, runs):
    """Sizes and mIoU of a neighbour's folder would look just as plausible."""
    by_name = {row["name"]: row for row in rows}
    fast = by_name["fast"]
    network = load_student(runs["fast"] / "student").eval()
    assert fast["parameters"] == network_size(network)[0]
    assert fast["gflop"] == pytest.approx(2e-9 * macs(RawLogits(network), SIDE))
    assert 0 < fast["encoder_gflop"] < fast["gflop"]
    assert fast["mib"]["onnx"] == (runs["fast"] / "student.onnx").stat().st_size / 2**20
    assert fast["int8_miou"] == 0.84
    assert {name: row["miou"] for name, row in by_name.items()} == MIOU
    assert by_name["slow"]["miou_share"] == pytest.approx(0.8 / 0.9)
    assert by_name["slow"]["mib"]["int8"] is by_name["slow"]["int8_miou"] is None


def test_table_and_chart_show_every_model(rows):
    """A model that was left out of a chart is taken for one that was not tried."""
    table = frontier_table(rows)
    assert all(len(re.findall(rf"^\|\s+{name} \|", table, re.MULTILINE)) == 2 for name in MIOU)
    quality, costs = (line for line in table.splitlines() if " fast |" in line)
    assert " 0.85 " in quality
    assert " 0.9444 " in quality
    assert " 2 (4.00) " in costs
    chart = frontier_chart(rows, title="mIoU & latency")
    assert "mIoU &amp; latency" in chart
    assert all(f"<title>{name}</title>" in chart for name in MIOU)
    in_legend = len(MIOU)
    assert chart.count("<use") == 4 + in_legend  # int8 of one


def test_a_model_without_figures_is_measured_all_the_same(runs, tmp_path):
    """Latency of a network that somebody else trained is known, its mIoU is not."""
    shutil.copytree(runs["slow"] / "student", tmp_path / "bare")
    args = FrontierArguments(image_size=SIDE, repeats=1)
    (row,) = frontier({"bare": tmp_path / "bare"}, args)
    assert row["latency"][ONNX]["median"] > 0
    assert row["speed"] == {TORCH: 1.0, ONNX: 1.0}
    assert row["miou"] is row["miou_share"] is None
    assert row["memory"] == {}
    assert "no data" in frontier_chart([row], title="one")


@pytest.mark.slow
def test_training_a_model_takes_more_memory_than_using_it(runs):
    """Both are measured in new processes, which find the model by its folder."""
    args = FrontierArguments(image_size=256, repeats=1, memory=1)
    (row,) = frontier({"slow": runs["slow"]}, args)
    assert 0 < row["memory"]["inference"] < row["memory"]["training"]
    assert " MiB of training |" in frontier_table([row])


def test_the_script_writes_what_it_prints(runs, tmp_path, capsys):
    """The flags, the names and the three files, as a user would meet them."""
    flags = ["--image_size", str(SIDE), "--repeats", "1", "--output_dir", str(tmp_path / "out")]
    (tmp_path / "out").mkdir()
    for name in ("kept.md", "kept.svg"):  # as a copy of links of an earlier result
        (tmp_path / name).write_text("earlier")
        (tmp_path / "out" / f"frontier{Path(name).suffix}").hardlink_to(tmp_path / name)
    frontier_main([f"big={runs['teacher']}", str(runs["fast"]), *flags])
    printed = capsys.readouterr().out
    written = json.loads((tmp_path / "out" / "frontier.json").read_text())
    assert [row["name"] for row in written["models"]] == ["big", "fast"]
    assert (tmp_path / "out" / "frontier.md").read_text().strip() in printed
    assert (tmp_path / "out" / "frontier.svg").read_text().startswith("<svg")
    for name in ("kept.md", "kept.svg"):
        assert (tmp_path / name).read_text() == "earlier", "files are replaced, not written over"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a/x", "b/x"], r"^Expected models of different names, got x twice"),
        (["=a"], r"^Expected models as FOLDER or NAME=FOLDER, got '=a'"),
        (["a=./nowhere"], r"^Expected a saved model with a config\.json, got "),
        (["--repeats", "0"], r"^Expected --repeats of at least 1"),
        (["--image_size", "50"], r"^Expected an image size divisible by 8, got 50"),
    ],
)
def test_wrong_use_is_refused(words, message, runs, tmp_path, monkeypatch):
    """Before minutes of measuring."""
    monkeypatch.chdir(tmp_path)
    models = [] if not words[0].startswith("--") else [str(runs["slow"])]
    (tmp_path / "nowhere").mkdir()
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        frontier_main([*models, *words])


def test_a_folder_may_hold_an_equals_sign():
    """Runs are often called by their settings."""
    assert named_folders(["runs/lr=1", "b=runs/lr=2"]) == {"lr=1": "runs/lr=1", "b": "runs/lr=2"}
