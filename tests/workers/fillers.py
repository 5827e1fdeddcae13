"""Fills a file of a teacher's logits: killed at every point of it, or beside other processes.

Usage: fillers.py kill FOLDER     writes `points.json`: what became of each point
       fillers.py ranks FOLDER    three processes at once, of one run; each writes `asked_N`
       fillers.py runs FOLDER     the same of three runs
"""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from asked import Asked, files

from kd_trainer import teacher_cache
from kd_trainer.teacher_cache import cached_images

IMAGES = 3
SHARED = 150
PROCESSES = 3


class Killer:
    """Counts and names the calls of sqlite and of the teacher, and dies in one of them."""

    def __init__(self, number: int, *, after: bool = False) -> None:
        self.number, self.after = number, after
        self.calls: list[str] = []

    def call(self, name: str, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        here = len(self.calls) == self.number
        self.calls.append(name)
        if here and not self.after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*args, **kwargs)
        if here:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    def install(self, asked: Asked) -> None:
        killer, infer, connect = self, asked.infer, sqlite3.connect

        class Connection(sqlite3.Connection):
            def execute(self, *args: Any) -> Any:
                return killer.call("execute", super().execute, *args)

            def executemany(self, *args: Any) -> Any:
                return killer.call("executemany", super().executemany, *args)

        def connected(*args: Any, **kwargs: Any) -> sqlite3.Connection:
            database = connect(*args, factory=Connection, **kwargs)
            # Each change of a page goes to the disk at once, as that of a large transaction does.
            sqlite3.Connection.execute(database, "PRAGMA cache_spill = 1")
            sqlite3.Connection.execute(database, "PRAGMA cache_size = 1")
            return database

        asked.infer = lambda pixels: killer.call("infer", infer, pixels)
        sqlite3.connect = lambda *a, **k: killer.call("connect", connected, *a, **k)


def forked(work: Callable[[], Any]) -> int:
    """Status of a fork that does `work`."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def fill(file: Path, killer: Killer) -> list[str]:
    """Fill it; the names of all calls."""
    asked = Asked(files(IMAGES))
    killer.install(asked)
    asked.writer(file).fill(quiet=True)
    return killer.calls


def kill(root: Path) -> None:
    def count() -> None:
        (root / "calls.json").write_text(json.dumps(fill(root / "whole.sqlite", Killer(-1))))

    assert forked(count) == 0
    points = []
    for number, call in enumerate(json.loads((root / "calls.json").read_text())):
        for after in (False, True):
            file = root / f"{number}_{after}" / "a.sqlite"
            died = forked(lambda: fill(file, Killer(number, after=after)))  # noqa: B023
            journal = file.with_name(f"{file.name}-journal").exists()
            left, again = len(cached_images(file)), Asked(files(IMAGES))
            again.writer(file).fill(quiet=True)
            point = {"call": call, "died": died, "journal": journal, "left": left}
            points.append(point | {"asked": again.count, "file": str(file)})
    (root / "points.json").write_text(json.dumps(points))


def share(folder: Path, number: int, *, ranks: bool) -> None:
    asked = Asked(files(SHARED), seconds=0.02)
    (folder / f"ready_{number}").touch()
    while len(list(folder.glob("ready_*"))) < PROCESSES:  # so that all of them begin at once
        time.sleep(0.005)
    of_a_run = {"rank": number, "world_size": PROCESSES} if ranks else {}
    asked.writer(folder / "root" / "a.sqlite").fill(quiet=True, **of_a_run)
    (folder / f"asked_{number}").write_text(str(asked.count))


def at_once(folder: Path, *, ranks: bool) -> None:
    children = []
    for number in range(PROCESSES):
        child = os.fork()
        if child == 0:
            share(folder, number, ranks=ranks)
            os._exit(0)
        children.append(child)
    for child in children:
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


if __name__ == "__main__":
    place = Path(sys.argv[2])
    teacher_cache._WRITE_SECONDS = 0.0  # each batch, as with a teacher that takes its time
    if sys.argv[1] == "kill":
        kill(place)
    else:
        at_once(place, ranks=sys.argv[1] == "ranks")
