"""Filling a cache: killed at any point, by several processes, with its progress shown."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from asked import GB, SHAPE, Asked, assert_whole, files
from workers import fillers

from kd_trainer.teacher_cache import Room, TargetCache, filling
from kd_trainer.teacher_cache.filling import fill
from kd_trainer.teacher_cache.shards import PARTIAL, shard_paths

TESTS = Path(__file__).parent
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{TESTS.parent}:{TESTS}"}


def worker(*words: str) -> None:
    command = [sys.executable, str(TESTS / "workers" / "fillers.py"), *words]
    done = subprocess.run(command, env=ENVIRONMENT, text=True, capture_output=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_killed_at_any_point_it_goes_on_where_it_was(tmp_path: Path):
    """A half-written file would be read as logits; a lock that stays would stop everybody.

    Each point is a call that touches the disk or the teacher; the process is killed before it or
    after it, in a flush with half of the file written.
    """
    worker("kill", str(tmp_path))
    found = json.loads((tmp_path / "found.json").read_text())
    assert len(found) >= 36
    assert {point["at"].split()[0] for point in found} == {"ask", "fsync", "replace", "_sync"}
    asked = Asked(files(fillers.IMAGES))
    left = set()
    for point in found:
        assert point["died"] == -signal.SIGKILL, point
        assert point["damaged"] == 0, point
        missing = fillers.IMAGES - point["left"]
        assert point["asked"] == 2 * missing, point  # as few as these are all measured first
        assert not [name for name in point["names"] if name.endswith(PARTIAL)], point
        assert_whole(Path(point["folder"]), asked)
        left.add(point["left"])
    assert left == set(range(fillers.IMAGES + 1))  # as no two are of one bucket


@pytest.mark.distributed
def test_processes_that_fill_at_once_share_the_work(tmp_path: Path):
    """Two ranks, or two runs: each image is asked for once, and nobody waits for nothing."""
    worker("share", str(tmp_path))
    told = [json.loads((tmp_path / f"done_{i}.json").read_text()) for i in range(3)]
    assert sum(one["done"] for one in told) == fillers.SHARED
    assert min(one["done"] for one in told) > fillers.SHARED / 10
    assert sum(one["asked"] for one in told) <= fillers.SHARED + 3 * 8  # and what was measured
    folder = tmp_path / "root" / "a"
    assert_whole(folder, Asked(files(fillers.SHARED)))
    records = sum(len(filling.read_records(path)) for path in shard_paths(folder))
    assert records == fillers.SHARED


def test_a_full_cache_is_only_read(tmp_path: Path):
    """Several runs read one folder, which may belong to somebody else."""
    asked, folder = Asked(files(30)), tmp_path / "a"
    fill(folder, asked.work(), Room(tmp_path, GB))
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    (folder / "lock").unlink()
    assert fill(folder, asked.work(), Room(tmp_path, 1)) == 0  # a lower bound does not matter
    after = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert after == {path: time for path, time in before.items() if path.name != "lock"}


def test_long_work_is_written_in_parts(tmp_path: Path, monkeypatch):
    """A bucket of thousands of images would be lost as a whole."""
    monkeypatch.setattr(filling, "BUCKETS", 1)
    monkeypatch.setattr(filling, "bucket_of", lambda image: 0)
    monkeypatch.setattr(filling, "_SHARD_BYTES", 200)
    asked = Asked(files(60))
    fill(tmp_path / "a", asked.work(batch_size=4), Room(tmp_path, GB))
    assert 3 < len(shard_paths(tmp_path / "a")) <= 15
    assert_whole(tmp_path / "a", asked)
    assert len(TargetCache(tmp_path / "a", SHAPE)) == 60


def test_an_error_of_the_teacher_leaves_what_was_done(tmp_path: Path):
    """A run that ends there should not have to begin again."""
    asked, folder = Asked(files(40)), tmp_path / "a"
    answer = asked.ask

    def failing(pixels):
        if asked.count > 30:
            raise FloatingPointError("broken")
        return answer(pixels)

    asked.ask = failing
    with pytest.raises(FloatingPointError, match="broken"):
        fill(folder, asked.work(), Room(tmp_path, GB))
    again = Asked(files(40))
    assert 10 < fill(folder, again.work(), Room(tmp_path, GB)) < 30
    assert_whole(folder, again)


def test_a_bar_shows_how_far_it_is(tmp_path: Path, capsys):
    """Hours of silence look like a run that hangs."""
    fill(tmp_path / "a", Asked(files(25)).work(batch_size=2), Room(tmp_path, GB), quiet=False)
    assert "ask teacher: 100%" in capsys.readouterr().err
