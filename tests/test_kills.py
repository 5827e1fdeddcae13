"""Killed at any moment of a save, a run goes on to the weights of the one that was left alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


@pytest.mark.slow
def test_sigkill_at_any_point_of_a_save_loses_only_what_came_after_the_last_one(tmp_path: Path):
    """A stock save that is killed leaves half a model and makes every later resume fail.

    Two updates of six are saved and a limit of one checkpoint is set; the save after the fourth is
    killed. The next start finds the checkpoint of the fourth if its marker is there, else that of
    the second, and ends bit for bit where the run ends that was left alone.
    """
    command = [sys.executable, str(TESTS / "workers" / "killed_saves.py"), str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path_of_tests()}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads((tmp_path / "found.json").read_text())
    found = {point["at"]: point for point in told["found"]}
    assert len(found) >= 20
    page = (TESTS.parent / "docs" / "what_survives_what.md").read_text(encoding="utf-8")
    assert f"| {len(found)} points |" in page
    files = ("model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json")
    needed = [f"half write {name}" for name in (*files, "COMPLETE.json.partial")]
    needed += ["before rename COMPLETE.json.partial", "before delete COMPLETE.json"]
    assert {*needed, "half delete checkpoint-2"} <= found.keys()
    marked = told["calls"].index("rename COMPLETE.json.partial")
    for at, point in found.items():
        assert point["died"] == -signal.SIGKILL, at
        assert point["after"] == ["checkpoint-2", "checkpoint-4"], at
        assert point["resumed"] == 0, at
        assert point["from"] == (4 if point["number"] > marked else 2), at
        assert point["same"], at
        assert point["left"] == ["checkpoint-6"], at


def path_of_tests() -> str:
    return os.pathsep.join([str(TESTS), str(TESTS.parent)])
