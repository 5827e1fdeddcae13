"""Signals and kills that reach a training through its launcher."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file
from same_run import assert_same_tensors
from small_runs import train_flags, write_pairs

from kd_trainer.checkpointing.checkpoints import checkpoint_folders, fault, step_of

ROOT = Path(__file__).parents[1]
LAUNCHERS = {
    "python": [sys.executable],
    "accelerate": [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--quiet"],
    "torchrun": [
        *(sys.executable, "-m", "torch.distributed.run"),
        *("--standalone", "--nproc_per_node", "2"),
    ],
}
UPDATES = 24


def start(launcher: str, data: Path, out: Path, *more: str) -> subprocess.Popen[str]:
    """A run of 12 epochs of two updates in a group of its own, as a terminal starts it."""
    flags = train_flags(data, out, "--epochs", "12", "--save_total_limit", "2", *more)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment |= {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        [*LAUNCHERS[launcher], str(ROOT / "scripts" / "train.py"), *flags],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def when_saved(process: subprocess.Popen[str], out: Path) -> None:
    """Wait for the first complete checkpoint."""
    for _ in range(4000):
        if any(out.glob("checkpoint-*/COMPLETE.json")):
            return
        if process.poll() is not None:
            break
        time.sleep(0.05)
    process.kill()
    raise AssertionError(process.communicate()[0][-3000:])


def kill_all(process: subprocess.Popen[str]) -> None:
    """SIGKILL for the ranks first: their launcher would tell them to stop in time."""
    launcher = psutil.Process(process.pid)
    for one in [*launcher.children(recursive=True), launcher]:
        one.kill()
    process.communicate()


def finish(launcher: str, data: Path, out: Path, *more: str) -> str:
    process = start(launcher, data, out, *more)
    said = process.communicate(timeout=600)[0]
    assert process.returncode == 0, said[-3000:]
    return said


def saved_update(out: Path) -> int:
    whole = [p for p in checkpoint_folders(out) if fault(p) is None]
    return max(step_of(p) for p in whole)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "number", "group", "code"),
    [
        ("python", signal.SIGTERM, False, 143),
        ("python", signal.SIGINT, True, 130),
        ("accelerate", signal.SIGTERM, False, -signal.SIGTERM),
    ],
)
def test_signal_to_the_launcher_reaches_the_training(
    launcher: str, number: int, group: bool, code: int, tmp_path: Path
):
    """`accelerate launch` with one process passes nothing on: the training would go on unseen.

    A terminal sends Ctrl-C to the whole group, with it to the processes that read the data.
    """
    data = write_pairs(tmp_path / "data", train=4, validation=2)
    out = tmp_path / "out"
    process = start(launcher, data, out, "--dataloader_num_workers", "1")
    when_saved(process, out)
    (os.killpg if group else os.kill)(process.pid, number)
    said = process.communicate(timeout=300)[0]
    assert process.returncode == code, said[-3000:]
    found = re.search(r"^stopped by SIG\w+ after step (\d+) of 24, saved as", said, re.MULTILINE)
    assert found, said[-3000:]
    assert "Go on with the same command and --resume." in said
    assert saved_update(out) == int(found[1]) < UPDATES


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_stopped_and_killed_go_on_to_the_same_student(tmp_path: Path):
    """Each has random numbers of its own, and all of them have to stop after the same update."""
    data = write_pairs(tmp_path / "data", train=8, validation=2)
    finish("torchrun", data, tmp_path / "whole")
    out, resumed = tmp_path / "out", ("--resume",)
    process = start("torchrun", data, out)
    when_saved(process, out)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=300)[0]
    assert process.returncode != 0
    assert "stopped by SIGTERM after step" in said
    stopped = saved_update(out)
    assert stopped < UPDATES
    names = {p.name for p in (out / f"checkpoint-{stopped}").iterdir()}
    assert {"rng_state_0.pth", "rng_state_1.pth", "progress_0.pt", "progress_1.pt"} <= names

    process = start("torchrun", data, out, *resumed)
    for _ in range(2000):
        if saved_update(out) > stopped or process.poll() is not None:
            break
        time.sleep(0.05)
    assert process.poll() is None, process.communicate()[0][-3000:]
    kill_all(process)
    assert stopped < saved_update(out) < UPDATES
    refused = start("python", data, out, *resumed)
    assert "Expected the run's" in (told := refused.communicate(timeout=300)[0])
    assert "world_size 2" in told
    finish("torchrun", data, out, *resumed)
    students = [
        load_file(tmp_path / name / "student/model.safetensors") for name in ("whole", "out")
    ]
    assert_same_tensors(*students)


@pytest.mark.distributed
@pytest.mark.parametrize("rank", [0, 1])
def test_a_save_that_fails_on_one_process_ends_all_of_them(rank: int, tmp_path: Path):
    """The others would wait for it at a barrier until their time limit, which is half an hour."""
    data = write_pairs(tmp_path / "data", train=8, validation=2)
    worker = str(ROOT / "tests" / "workers" / "failing_save.py")
    flags = train_flags(data, tmp_path / "out", "--save_strategy", "epoch")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = f"{ROOT}:{ROOT / 'tests'}"
    done = subprocess.run(
        [*LAUNCHERS["torchrun"], worker, str(rank), *flags],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode != 0
    assert "Expected to write a checkpoint into" in done.stderr
    assert "No space left on device" in done.stderr
    assert f"got a failure of 1, which says why. Process {1 - rank} stops with it." in done.stderr
    assert not list((tmp_path / "out").glob("checkpoint-*"))


@pytest.mark.slow
@pytest.mark.distributed
def test_the_same_command_goes_on_after_the_death_of_a_process(tmp_path: Path):
    """As a launcher that restarts gives it: one that only starts, or only goes on, ends for good.

    The end is a line that names the process, instead of a reset connection. torchrun's own
    --max-restarts is left out: its gloo processes often do not find each other again, whatever
    they run.
    """
    data = write_pairs(tmp_path / "data", train=8, validation=2)
    finish("torchrun", data, tmp_path / "whole")
    out, resumed = tmp_path / "out", ("--resume", "auto")
    process = start("torchrun", data, out, *resumed)
    when_saved(process, out)
    victim = psutil.Process(process.pid).children()[-1]
    victim.kill()
    said = process.communicate(timeout=300)[0]
    assert process.returncode != 0
    named = re.search(rf"error: Expected all 2 processes .* process \d \(pid {victim.pid}\)", said)
    # torchrun names it too, and may end the other process before that can say anything.
    assert named or "exitcode  : -15" in said, said
    assert 'scripts/train.py", line' not in said, said  # torchrun adds a traceback of its own
    finish("torchrun", data, out, *resumed)
    students = [
        load_file(tmp_path / name / "student/model.safetensors") for name in ("whole", "out")
    ]
    assert_same_tensors(*students)
