"""Kills runs with SIGKILL at points of a save, resumes them, and writes down what became of them.

Every run is a fork of this process, so that imports and networks are paid for once. A point is the
number of a call during the save and a time: before it, or half-way through.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers.modeling_utils
from tiny import Squares, arguments, tiny_student
from transformers import TrainerState

from kd_trainer.checkpointing import checkpoints
from kd_trainer.trainer import DistillationTrainer

Point = tuple[int, str]
NOWHERE = (-1, "")


class Killer:
    """Counts and names the calls of a save, and kills the process at one of them."""

    def __init__(self, point: Point = NOWHERE) -> None:
        self.point = point
        self.calls: list[str] = []

    def wrap(self, owner: Any, name: str, label: Callable[..., str], half: Any = None) -> None:
        original = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            number, when = self.point
            here = len(self.calls) == number
            self.calls.append(label(*args))
            if here and when == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            if here and when == "half" and name == "rmtree":
                half(*args)
                os.kill(os.getpid(), signal.SIGKILL)
            result = original(*args, **kwargs)
            if here and when == "half":
                half(*args)
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(owner, name, wrapped)

    def install(self) -> None:
        def named(kind: str, place: int) -> Callable[..., str]:
            return lambda *args: f"{kind} {Path(args[place]).name}"

        def cut(place: int) -> Callable[..., None]:
            return lambda *args: os.truncate(args[place], Path(args[place]).stat().st_size // 2)

        self.wrap(torch, "save", named("write", 1), cut(1))
        self.wrap(transformers.modeling_utils, "safe_save_file", named("write", 1), cut(1))
        self.wrap(TrainerState, "save_to_json", named("write", 1), cut(1))
        self.wrap(Path, "write_text", named("write", 0), cut(0))
        self.wrap(checkpoints, "_sync", named("sync", 0))
        self.wrap(Path, "replace", named("rename", 0))
        self.wrap(Path, "unlink", named("delete", 0))
        self.wrap(shutil, "rmtree", named("delete", 0), half_of_the_files)


def half_of_the_files(folder: Path) -> None:
    files = sorted(p for p in folder.iterdir() if p.is_file())
    for file in files[::2]:
        file.unlink()


def run(folder: Path, student: Any, data: Squares, killer: Killer | None, stop: int = 6) -> Any:
    """Train `stop` of 6 updates, from the newest complete checkpoint where there is one."""
    args = arguments(
        folder,
        num_train_epochs=2,
        logging_steps=3,
        save_strategy="steps",
        save_steps=2,
        save_total_limit=1,
        load_best_model_at_end=False,
        unfreeze_start_epoch=1,
    )
    trainer = DistillationTrainer(copy.deepcopy(student), args, train_dataset=data)
    if killer is not None:
        killer.install()
    resumed = any(folder.glob("checkpoint-*"))
    if stop < 6:
        save = trainer._save_checkpoint

        def saved(*given: Any) -> None:
            save(*given)
            if trainer.state.global_step == stop:
                os._exit(0)

        trainer._save_checkpoint = saved
    trainer.train(resumed or None)
    digest = hashlib.sha256()
    for value in trainer.model.state_dict().values():
        digest.update(value.contiguous().numpy().tobytes())
    updates = trainer._resumed and checkpoints.step_of(trainer._resumed)
    left = sorted(p.name for p in folder.iterdir())
    return {"digest": digest.hexdigest(), "resumed": updates, "left": left}


def forked(work: Callable[[], Any], answer: Path) -> int:
    """Status of a fork that does `work` and writes down its answer."""
    child = os.fork()
    if child == 0:
        try:
            answer.write_text(json.dumps(work()))
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def points(calls: list[str]) -> list[Point]:
    """Before and half-way through each write and deletion, and before every third wait."""
    chosen: list[Point] = []
    syncs = itertools.count()
    for number, call in enumerate(calls):
        kind = call.split()[0]
        if kind == "sync" and next(syncs) % 3:
            continue
        chosen.append((number, "before"))
        if kind == "write" or call.startswith("delete checkpoint"):
            chosen.append((number, "half"))
    return chosen


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    student, data = tiny_student("mobilenet_v2"), Squares(6)
    whole, base, answer = folder / "whole", folder / "base", folder / "answer.json"

    assert forked(lambda: run(whole, student, data, None), answer) == 0
    expected = json.loads(answer.read_text())
    assert forked(lambda: run(base, student, data, None, stop=2), answer) == 0

    def calls_of_a_save() -> Any:
        shutil.copytree(base, folder / "counted")
        killer = Killer()
        answer.write_text("")
        save = DistillationTrainer._save_checkpoint

        def once(self: Any, *given: Any) -> None:
            save(self, *given)
            calls = list(killer.calls)
            (folder / "calls.json").open("w").write(json.dumps(calls))
            os._exit(0)

        DistillationTrainer._save_checkpoint = once
        return run(folder / "counted", student, data, killer)

    assert forked(calls_of_a_save, answer) == 0
    calls = json.loads((folder / "calls.json").read_text())
    found = []
    for number, when in points(calls):
        place = folder / f"{number}_{when}"
        shutil.copytree(base, place)
        killer = Killer((number, when))
        died = forked(lambda: run(place, student, data, killer), answer)  # noqa: B023
        after = sorted(p.name for p in place.iterdir())
        again = forked(lambda: run(place, student, data, None), answer)  # noqa: B023
        result = json.loads(answer.read_text()) if again == 0 else {}
        found.append(
            {
                "at": f"{when} {calls[number]}",
                "number": number,
                "died": died,
                "resumed": again,
                "after": after,
            }
            | {"from": result.get("resumed"), "left": result.get("left")}
            | {"same": result.get("digest") == expected["digest"]}
        )
        shutil.rmtree(place)
    (folder / "found.json").write_text(json.dumps({"calls": calls, "found": found}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
