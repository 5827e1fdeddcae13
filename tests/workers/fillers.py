"""Fills a folder of a teacher's logits: killed at every point of it, or beside other processes.

Usage: fillers.py kill FOLDER     writes `found.json`: what became of each point
       fillers.py share FOLDER    three processes at once, each writes `done_N.json`
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from asked import GB, Asked, files

from kd_trainer.teacher_cache import Room, fill
from kd_trainer.teacher_cache import shards as shards_module
from kd_trainer.teacher_cache.filling import stored
from kd_trainer.teacher_cache.shards import BUCKETS

IMAGES = 4
SHARED = 120
PROCESSES = 3


def cut_in_half(handle: int) -> None:
    """Leave half of a file, as if the rest had not been written yet; folders stay as they are."""
    if stat.S_ISREG(os.fstat(handle).st_mode):
        os.ftruncate(handle, os.fstat(handle).st_size // 2)


class Killer:
    """Counts and names the calls that touch the disk or the teacher, and dies in one of them."""

    def __init__(self, number: int, half: bool = False) -> None:
        self.number, self.half = number, half
        self.calls: list[str] = []

    def wrap(self, owner: Any, name: str, cut: Callable[..., None] | None = None) -> None:
        original = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            here = len(self.calls) == self.number
            self.calls.append(name)
            if here and not self.half:
                os.kill(os.getpid(), signal.SIGKILL)
            result = original(*args, **kwargs)
            if here:
                if cut is not None:
                    cut(*args)
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(owner, name, wrapped)

    def install(self, asked: Asked) -> None:
        """`half` dies after the call; of a file that is being flushed only half is there then."""
        self.wrap(asked, "ask")
        self.wrap(os, "fsync", cut_in_half)
        self.wrap(Path, "replace")
        self.wrap(shards_module, "_sync")


def one_fill(folder: Path, killer: Killer | None) -> list[str]:
    asked = Asked(files(IMAGES))
    if killer is not None:
        killer.install(asked)
    fill(folder, asked.work(), Room(folder.parent, GB), quiet=True)
    return [] if killer is None else killer.calls


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


def kill(root: Path) -> None:
    counted = Killer(-1)

    def count() -> None:
        (root / "calls.json").write_text(json.dumps(one_fill(root / "count", counted)))

    assert forked(count) == 0
    calls = json.loads((root / "calls.json").read_text())
    found = []
    for number, call in enumerate(calls):
        for half in (False, True):
            folder = root / f"{number}_{half}" / "a"
            died = forked(lambda: one_fill(folder, Killer(number, half)))  # noqa: B023
            left = stored(folder)
            again = Asked(files(IMAGES))
            fill(folder, again.work(), Room(folder.parent, GB), quiet=True)
            found.append(
                {"at": f"{call} {half}", "died": died, "left": len(left.images)}
                | {"damaged": len(left.damaged), "asked": again.count}
                | {"names": sorted(p.name for p in folder.iterdir()), "folder": str(folder)}
            )
    (root / "found.json").write_text(json.dumps(found))
    shutil.rmtree(root / "count")


def share(folder: Path, number: int) -> None:
    asked = Asked(files(SHARED), seconds=0.004)
    (folder / f"ready_{number}").touch()
    while len(list(folder.glob("ready_*"))) < PROCESSES:  # so that all of them begin at once
        time.sleep(0.005)
    done = fill(
        folder / "root" / "a",
        asked.work(),
        Room(folder / "root", GB),
        first=BUCKETS * (number // 2) // 2,  # two begin at the same bucket
        quiet=True,
    )
    (folder / f"done_{number}.json").write_text(json.dumps({"done": done, "asked": asked.count}))


def together(folder: Path) -> None:
    children = []
    for number in range(PROCESSES):
        child = os.fork()
        if child == 0:
            share(folder, number)
            os._exit(0)
        children.append(child)
    for child in children:
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


if __name__ == "__main__":
    place = Path(sys.argv[2])
    if sys.argv[1] == "kill":
        kill(place)
    else:
        together(place)
