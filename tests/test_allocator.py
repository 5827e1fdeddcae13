"""Freed memory that is kept: counted in page faults, in a process of its own."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny import Squares, arguments, tiny_student

from kd_trainer import allocator
from kd_trainer.trainer import DistillationTrainer

COUNT = """
import ctypes, json, resource
from kd_trainer.allocator import keep_freed_memory, usual_memory

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = libc.malloc(size)
    ctypes.memset(block, 1, size)
    libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

size = 96 * 2**20
found = {"before": [faults(), faults()]}
assert keep_freed_memory()
found["kept"] = [faults(), faults()]
assert usual_memory()
found["after"] = [faults(), faults()]
print(json.dumps(found))
"""

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")


@glibc
def test_a_kept_block_is_not_asked_of_the_system_again():
    """A block of 96 MiB is up to 24,576 pages; each that has to be fetched again is a fault."""
    done = subprocess.run(
        [sys.executable, "-c", COUNT], capture_output=True, text=True, check=True, timeout=120
    )
    found: dict[str, list[int]] = json.loads(done.stdout)
    again = {name: second for name, (_, second) in found.items()}
    assert again["kept"] < 20
    assert again["before"] > 40  # huge pages make them few, but never none
    assert again["after"] > 40


def test_another_libc_is_left_alone(monkeypatch: pytest.MonkeyPatch):
    """musl and macOS have no such function."""
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda _: pytest.fail("called"))
    assert not allocator.keep_freed_memory()
    assert not allocator.usual_memory()


@pytest.mark.parametrize("kept", [True, False])
def test_a_trainer_on_a_cpu_keeps_memory_unless_told_otherwise(
    kept: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The whole process is changed, so there is a flag."""
    calls: list[Any] = []
    monkeypatch.setattr("kd_trainer.trainer.keep_freed_memory", lambda: calls.append(1))
    changed = {} if kept else {"keep_freed_memory": False}
    DistillationTrainer(tiny_student(), arguments(tmp_path, **changed), train_dataset=Squares(4))
    assert len(calls) == kept
