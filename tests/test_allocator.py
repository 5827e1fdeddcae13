"""Freed memory that is kept, and given back: counted in a process of its own."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import train_flags, write_pairs
from tiny import Squares, arguments, tiny_student

from kd_trainer import fast_layers
from kd_trainer.commands.train import train
from kd_trainer.config import parse
from kd_trainer.trainer import DistillationTrainer

COUNT = """
import ctypes, json, os
from kd_trainer.fast_layers import give_back, keep_freed_memory, usual_memory

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
libc.sbrk.restype, libc.sbrk.argtypes = ctypes.c_void_p, [ctypes.c_ssize_t]

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

def kept(mib=96):
    before, block = resident(), libc.malloc(mib * 2**20)
    ctypes.memset(block, 1, mib * 2**20)
    libc.free(block)
    return resident() - before

found = {"before": kept()}
assert keep_freed_memory()
found["kept"] = kept()
libc.free(libc.malloc(3 * 2**30))  # never touched: takes addresses, not memory
found["heap"] = libc.sbrk(0)
libc.free(libc.malloc(3 * 2**30))
found["heap"] = (libc.sbrk(0) - found["heap"]) / 2**20
full = resident()
assert give_back()
found["given back"] = full - resident()
assert usual_memory()
found["after"] = kept()
print(json.dumps(found))
"""

linux = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or not Path("/proc/self/statm").is_file(),
    reason="mallopt is glibc's",
)


@linux
def test_freed_memory_is_kept_until_it_is_given_back():
    """Else each step asks the system for it again; MiB that stay resident after a free."""
    own = {k: v for k, v in os.environ.items() if "MALLOC" not in k}
    for name in ("LD_PRELOAD", "GLIBC_TUNABLES"):
        own.pop(name, None)
    done = subprocess.run(
        [sys.executable, "-c", COUNT], capture_output=True, text=True, check=True, env=own
    )
    found: dict[str, float] = json.loads(done.stdout)
    assert found["before"] < 10
    assert found["kept"] > 90
    assert found["heap"] == 0  # 3 GiB: a threshold of 32 bits would let it shrink
    assert found["given back"] > 80
    assert found["after"] < 10


def test_another_libc_is_left_alone(monkeypatch: pytest.MonkeyPatch):
    """musl and macOS have no such function."""
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(fast_layers.ctypes, "CDLL", lambda _: pytest.fail("called"))
    assert not fast_layers.keep_freed_memory()
    assert not fast_layers.usual_memory()
    assert not fast_layers.give_back()


@pytest.mark.parametrize("kept", [True, False])
def test_a_command_on_a_cpu_keeps_memory_unless_told_otherwise(
    kept: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The whole process is changed, so there is a flag, and no trainer of a notebook does it."""
    calls: list[Any] = []
    monkeypatch.setattr("kd_trainer.build.keep_freed_memory", lambda: calls.append(1))
    data = write_pairs(tmp_path / "data", train=2, validation=1)
    flags = train_flags(data, tmp_path / "out", "--epochs", "1")
    train(parse([*flags, *(() if kept else ("--no_preflight", "--keep_freed_memory", "false"))]))
    assert len(calls) == kept


def test_a_trainer_leaves_the_student_and_the_process_as_they_are(tmp_path: Path):
    """Somebody who makes one to look at it would find other layers in a model of theirs."""
    student = tiny_student("timm-efficientnet-b0")
    before = [type(module) for module in student.modules()]
    limit = torch._dynamo.config.recompile_limit
    DistillationTrainer(student, arguments(tmp_path, torch_compile=True), train_dataset=Squares(4))
    assert [type(module) for module in student.modules()] == before
    assert torch._dynamo.config.recompile_limit == limit
