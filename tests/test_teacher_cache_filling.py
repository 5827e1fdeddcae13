"""Filling a cache: killed at any point, by several processes, with its progress shown."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from asked import SHAPE, Asked, assert_whole, files
from torch.utils.data import DataLoader, Dataset
from workers import fillers

from kd_trainer import teacher_cache
from kd_trainer.teacher_cache import TeacherCache

TESTS = Path(__file__).parent
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{TESTS.parent}:{TESTS}"}


@pytest.fixture(autouse=True)
def each_batch_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """These teachers answer in no time; a real one takes longer than a transaction."""
    monkeypatch.setattr(teacher_cache, "_WRITE_SECONDS", 0.0)


def worker(*words: str) -> None:
    command = [sys.executable, str(TESTS / "workers" / "fillers.py"), *words]
    done = subprocess.run(command, env=ENVIRONMENT, text=True, capture_output=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_killed_at_any_point_it_goes_on_where_it_was(tmp_path: Path):
    """Half a batch would be read as logits; a lock that stays would stop everybody.

    Each point is a call of sqlite or of the teacher; the process is killed before it or after it,
    with the changes of an open transaction on the disk.
    """
    worker("kill", str(tmp_path))
    points = json.loads((tmp_path / "points.json").read_text())
    assert {point["call"] for point in points} == {"connect", "execute", "executemany", "infer"}
    asked = Asked(files(fillers.IMAGES))
    for point in points:
        assert point["died"] == -signal.SIGKILL, point
        missing = fillers.IMAGES - point["left"]
        assert point["asked"] == 2 * missing, point  # as few as these are all measured first
        assert_whole(Path(point["file"]), asked)
    assert {point["left"] for point in points} == set(range(fillers.IMAGES))
    assert any(point["journal"] for point in points)


@pytest.mark.distributed
@pytest.mark.parametrize("kind", ["ranks", "runs"])
def test_processes_that_fill_at_once_share_the_work(tmp_path: Path, kind: str):
    """Two ranks, or two runs: few images are asked for twice, and nobody waits for nothing."""
    worker(kind, str(tmp_path))
    asked = [int((tmp_path / f"asked_{i}").read_text()) - 8 for i in range(fillers.PROCESSES)]
    assert fillers.SHARED <= sum(asked) < 1.25 * fillers.SHARED
    assert min(asked) > fillers.SHARED / 10
    assert_whole(tmp_path / "root" / "a.sqlite", Asked(files(fillers.SHARED)))


class Logits(Dataset[torch.Tensor]):
    """The logits of each of twenty files."""

    def __init__(self, cache: TeacherCache) -> None:
        self.cache = cache

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.from_numpy(self.cache.logits(files(20)[index], "x"))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_data_workers_read_what_their_parent_reads(tmp_path: Path, method: str):
    """A connection that two processes use loses its locks, and cannot be sent to a new one."""
    asked, file = Asked(files(20)), tmp_path / "a.sqlite"
    asked.writer(file).fill()
    data = Logits(TeacherCache(file, SHAPE))
    expected = torch.stack([data[index] for index in range(20)])
    loader = DataLoader(data, 5, num_workers=2, multiprocessing_context=method)
    assert torch.equal(torch.cat(list(loader)), expected)


def test_the_images_of_a_batch_do_not_depend_on_the_order(tmp_path: Path):
    """A GPU may round them together: a run that fills again must get the logits that it had."""

    def batches(name: str, rank: int) -> set[tuple[int, ...]]:
        asked, seen = Asked(files(30)), set()
        infer = asked.infer

        def seeing(pixels: torch.Tensor) -> torch.Tensor:
            seen.add(tuple(pixels[:, 0, 0, 0].tolist()))
            return infer(pixels)

        asked.infer = seeing
        writer = asked.writer(tmp_path / f"{name}.sqlite", batch_size=4)
        writer.fill(rank=rank, world_size=3)
        return {batch for batch in seen if len(batch) > 1}

    assert len(batches("a", 0)) == 8
    assert batches("b", 0) == batches("c", 2) == batches("d", 1)


def test_an_error_of_the_teacher_leaves_what_was_done(tmp_path: Path):
    """A run that ends there should not have to begin again."""
    asked, file = Asked(files(40)), tmp_path / "a.sqlite"
    infer = asked.infer

    def failing(pixels: torch.Tensor) -> torch.Tensor:
        if asked.count == 30:
            raise FloatingPointError("broken")
        return infer(pixels)

    asked.infer = failing
    with pytest.raises(FloatingPointError, match="broken"):
        asked.writer(file).fill()
    again = Asked(files(40))
    assert again.writer(file).fill() == 40 - (30 - 8)
    assert_whole(file, again)


def test_a_bar_shows_how_far_it_is(tmp_path: Path, capsys):
    """Hours of silence look like a run that hangs."""
    Asked(files(25)).writer(tmp_path / "a.sqlite", batch_size=2).fill(quiet=False)
    assert "ask teacher: 100%" in capsys.readouterr().err
