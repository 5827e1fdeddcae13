"""Mutated images, masks, annotations and runs: each gives a sample or an error of ours."""

import json
import subprocess
import sys
from pathlib import Path

import fuzz_coco
import pytest

FOLDER = Path(__file__).parent
PAIRS = 48  # sound pairs that the cases are made from; cases -48 to -1 are these themselves
RUN_FILES = 6  # likewise, of a finished run


def fed(driver: str, first: int, last: int, place: Path) -> dict:
    """What became of the cases; a crash, a hang or a full memory fails here with its number."""
    place.write_text(" ")
    script = str(FOLDER / f"fuzz_{driver}.py")
    command = [sys.executable, "-X", "faulthandler", script, str(first), str(last), str(place)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, errors="replace")
    assert done.returncode == 0, f"case {place.read_text()}: {done.stderr[-3000:]}"
    return json.loads(done.stdout)


def test_a_few_hundred_mutated_files_give_samples_or_errors_of_ours(tmp_path):
    """A reader that dies on one broken file takes a night's training with it."""
    found = fed("images", -PAIRS, 400, tmp_path / "place")
    assert found["faults"] == {}
    assert found["sample"] + found["error"] == PAIRS + 400
    assert found["sound"] == PAIRS, "pairs that do not fit would all end at the same early error"
    assert found["sample"] > PAIRS + 20, "mutations that only break heads try nothing else"


@pytest.mark.slow
def test_ten_thousand_mutated_files_give_samples_or_errors_of_ours(tmp_path):
    found = fed("images", 0, 10_000, tmp_path / "place")
    assert found["faults"] == {}
    assert found["sample"] + found["error"] == 10_000
    assert found["sample"] > 500
    page = (FOLDER.parent / "docs" / "what_survives_what.md").read_text(encoding="utf-8")
    told = f"10,000: {found['sample']:,} gave a sample, {found['error']:,} an error"
    assert told in page, told


def test_a_few_hundred_mutated_coco_files_give_samples_or_errors_of_ours():
    """Whoever exports annotations once a week will one day export a NaN."""
    found = {number: fuzz_coco.outcome(number) for number in range(-fuzz_coco.SOUND, 300)}
    assert {n: o for n, o in found.items() if o not in ("sample", "error")} == {}
    assert {found[number] for number in range(-fuzz_coco.SOUND, 0)} == {"sample"}
    assert list(found.values()).count("sample") > fuzz_coco.SOUND + 40


@pytest.mark.slow
def test_ten_thousand_mutated_coco_files_give_samples_or_errors_of_ours(tmp_path):
    found = fed("coco", 0, 10_000, tmp_path / "place")
    assert found["faults"] == {}
    assert found["sample"] + found["error"] == 10_000
    page = (FOLDER.parent / "docs" / "bad_input.md").read_text(encoding="utf-8")
    told = (
        f"10,000 mutated COCO files: {found['sample']:,} gave samples, {found['error']:,} an error"
    )
    assert told in page, told


@pytest.mark.slow
def test_a_hundred_mutated_files_of_a_run_give_report_and_card_or_errors_of_ours(tmp_path):
    """A run folder is handed around: its files were edited, or written by something else."""
    found = fed("run_folders", -RUN_FILES, 120, tmp_path / "place")
    assert found["faults"] == {}
    assert found["sound"] == RUN_FILES
    assert found["sample"] > RUN_FILES + 10
    assert found["error"] > 60
