"""The frontier of latency and mIoU: what is timed, what it is compared with, who is called best."""

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
from benchmarks.frontier import ENGINES, INT8, ONNX, TORCH, Contender, frontier
from benchmarks.frontier_main import frontier_main, named_folders
from benchmarks.frontier_page import frontier_chart, frontier_table
from kd_trainer.costs import RawLogits, macs, picture
from kd_trainer.export.graph import export_program, metadata_of
from kd_trainer.export.onnx_file import write_onnx
from kd_trainer.loading import load_student

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
    exported = {"onnx-int8": {"miou": 0.84, "kept_in_fp32": ["encoder.layer1"]}}
    (fast / "export.json").write_text(json.dumps(exported))
    return folders


def test_every_engine_runs_the_network_it_is_said_to_run(runs, monkeypatch):
    """A figure of another file, or of another input, could never be told by looking at it."""
    pixels = picture(SIDE)
    slow, fast = (Contender.load(runs[name]) for name in ("slow", "fast"))
    with torch.no_grad():
        of_slow, of_fast = (RawLogits(one.network)(pixels).numpy() for one in (slow, fast))
        made = slow.calls(pixels)
        monkeypatch.setattr(frontier_module, "onnx_bytes", None)  # the file is there
        read = fast.calls(pixels)
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
    """Rows of a busy machine: in the second pass everything takes ten times as long."""
    slow, fast = {TORCH: 3.0, ONNX: 2.0}, {TORCH: 1.5, ONNX: 1.0, INT8: 0.5}
    each = {"teacher": {TORCH: 6.0, ONNX: 4.0}, "slow": slow, "fast": fast}
    load = (1.0, 10.0, 1.0, 3.0)
    asked = {}

    def passes(calls, inputs, repeats, threads, *, progress):
        asked.update(calls=list(calls), repeats=repeats, threads=threads)
        return {
            f"{name} {engine}": [seconds * busy for busy in load]
            for name, engines in each.items()
            for engine, seconds in engines.items()
        }

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(frontier_module, "passes", passes)
        patch.setattr(frontier_module, "onnx_bytes", lambda network, side: b"a model")
        patch.setattr(frontier_module, "onnx_call", lambda model, pixels, threads: None)
        found = frontier(runs, side=SIDE, repeats=4)
    assert asked["repeats"] == 4
    assert asked["threads"] == 1
    assert len(asked["calls"]) == 7
    return found


def test_speed_is_that_of_neighbouring_calls(rows):
    """Medians over all passes would compare a quiet minute of one with a busy one of another."""
    by_name = {row["name"]: row for row in rows}
    assert by_name["teacher"]["speed"] == {TORCH: 1.0, ONNX: 1.0}
    assert by_name["slow"]["speed"] == {TORCH: 2.0, ONNX: 2.0}
    assert by_name["fast"]["speed"] == {TORCH: 4.0, ONNX: 4.0}
    assert by_name["fast"]["latency"][ONNX]["median"] == pytest.approx(2000.0)
    assert by_name["fast"]["latency"][INT8]["median"] == pytest.approx(1000.0)


def test_figures_are_those_of_the_files(rows, runs):
    """Sizes and mIoU of a neighbour's folder would look just as plausible."""
    by_name = {row["name"]: row for row in rows}
    fast = by_name["fast"]
    network = load_student(runs["fast"] / "student").eval()
    assert fast["parameters"] + fast["never_used"] == sum(p.numel() for p in network.parameters())
    assert fast["gflop"] == pytest.approx(2e-9 * macs(RawLogits(network), SIDE))
    assert 0 < fast["encoder_gflop"] < fast["gflop"]
    assert fast["mib"]["onnx"] == (runs["fast"] / "student.onnx").stat().st_size / 2**20
    assert (fast["int8_miou"], fast["int8_kept_in_fp32"]) == (0.84, ["encoder.layer1"])
    assert {name: row["miou"] for name, row in by_name.items()} == MIOU
    assert by_name["slow"]["miou_share"] == pytest.approx(0.8 / 0.9)
    assert by_name["slow"]["mib"]["int8"] is by_name["slow"]["int8_miou"] is None


def test_best_are_those_that_no_other_beats(rows):
    """The slow one is slower and worse than the fast one; the teacher is slowest and best."""
    assert {row["name"]: row["best"] for row in rows} == {
        "teacher": True,
        "slow": False,
        "fast": True,
    }


def test_table_and_chart_show_every_model(rows):
    """A model that was left out of a picture is taken for one that was not tried."""
    table = frontier_table(rows)
    lines = table.splitlines()
    assert all(len(re.findall(rf"^\|\s+{name} \|", table, re.MULTILINE)) == 2 for name in MIOU)
    fast = next(line for line in lines if " fast |" in line)
    assert "0.8500" in fast
    assert "94.4%" in fast
    assert "2000 (4.00)" in next(line for line in reversed(lines) if " fast |" in line)
    chart = frontier_chart(rows, title="mIoU & latency")
    assert "mIoU &amp; latency" in chart
    assert all(f"<title>{name}</title>" in chart for name in MIOU)
    in_legend = len(MIOU)
    assert chart.count("<use") == 4 + in_legend  # int8 of one


def test_a_model_without_figures_is_measured_all_the_same(runs, tmp_path):
    """Latency of a network that somebody else trained is known, its mIoU is not."""
    shutil.copytree(runs["slow"] / "student", tmp_path / "bare")
    (row,) = frontier({"bare": tmp_path / "bare"}, side=SIDE, repeats=1, progress=False)
    assert row["latency"][ONNX]["repeats"] == 1
    assert row["speed"] == {TORCH: 1.0, ONNX: 1.0}
    assert row["miou"] is row["miou_share"] is row["best"] is None
    assert "no data" in frontier_chart([row], title="one")


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
