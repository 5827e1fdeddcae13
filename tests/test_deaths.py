"""Processes that die under a training, launchers that are none, clocks that are set."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import train_flags, write_pairs
from test_interruptions import during_update, script

from kd_trainer.checkpointing import stopping
from kd_trainer.checkpointing.checkpoints import check_complete, checkpoint_folders, never_complete
from kd_trainer.commands.train import find_checkpoint, train
from kd_trainer.config import parse
from kd_trainer.processes import Peer, cause_of_death


@pytest.fixture(scope="module")
def data(tmp_path_factory: Any) -> Path:
    return write_pairs(tmp_path_factory.mktemp("pairs"), train=4, validation=2)


def ended() -> int:
    """Number of a process that is no more, for which its parent has not asked yet."""
    number = os.posix_spawn("/bin/true", ["true"], {})
    os.waitid(os.P_PID, number, os.WEXITED | os.WNOWAIT)
    return number


def test_launcher_is_who_set_the_variables_not_whose_name_says_so(monkeypatch: Any):
    """A script in a folder called `torch` that starts a training and ends would stop it."""
    launched = os.environ | {"TORCHELASTIC_RUN_ID": "one-that-this-process-does-not-have"}
    child = subprocess.Popen(["cat"], env=launched, stdin=subprocess.PIPE)
    try:
        while not Path(f"/proc/{child.pid}/environ").read_bytes():
            time.sleep(0.01)
        assert stopping._is_launcher(os.getpid(), child.pid)
        assert not stopping._is_launcher(child.pid, child.pid)  # as after `torchrun script.sh`
    finally:
        child.communicate()
    monkeypatch.setenv("ACCELERATE_DYNAMO_MODE", "default")  # as the Trainer sets it
    assert not stopping._is_launcher(os.getppid())


@pytest.mark.slow
def test_training_outlives_a_script_whose_path_names_a_launcher(tmp_path: Path):
    """The words were searched for in the command line of the parent."""
    folder = tmp_path / "torch_accelerate"
    folder.mkdir()
    code = (
        "import time; from kd_trainer.checkpointing import stopping; stopping._outlive_launcher();"
        f"open({str(tmp_path / 'ready')!r}, 'w'); time.sleep(0.5);"
        f"open({str(tmp_path / 'lived')!r}, 'w')"
    )
    starter = folder / "start.py"
    starter.write_text(
        "import os, subprocess, sys, time\n"
        f"subprocess.Popen([sys.executable, '-c', {code!r}])\n"
        f"while not os.path.exists({str(tmp_path / 'ready')!r}): time.sleep(0.02)\n"
    )
    root = str(Path(__file__).parents[1])
    subprocess.run(
        [sys.executable, str(starter)], check=True, env=os.environ | {"PYTHONPATH": root}
    )
    end = time.monotonic() + 10
    while not (tmp_path / "lived").exists() and time.monotonic() < end:
        time.sleep(0.05)
    assert (tmp_path / "lived").exists()


@pytest.mark.parametrize(
    "number", [signal.SIGUSR1, pytest.param(signal.SIGHUP, marks=pytest.mark.slow)]
)
def test_signals_of_schedulers_and_lost_terminals_save(data: Path, tmp_path: Path, number: int):
    """They ended the process at once, with all that was done since the last epoch."""
    flags = train_flags(data, tmp_path / "out", "--epochs", "2")
    with during_update(1, lambda: signal.raise_signal(number)):
        assert script(*flags) == 128 + number
    check_complete(tmp_path / "out" / "checkpoint-1")


def test_nohup_stays_in_force(monkeypatch: Any):
    """A run that was started to outlive its terminal ended with it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stopping.stoppable(type("Trainer", (), {})()):
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_time_of_training_does_not_follow_the_clock_on_the_wall(
    data: Path, tmp_path: Path, monkeypatch: Any
):
    """A clock that is set back by years gave a training of -99,999,991 s, also when resumed."""
    clock, shift = time.time, [0.0]
    monkeypatch.setattr(time, "time", lambda: clock() + shift[0])

    def set_back() -> None:
        shift[0] -= 1e8

    flags = train_flags(data, tmp_path / "out", "--epochs", "2")
    stop = during_update(3, lambda: (set_back(), signal.raise_signal(signal.SIGTERM)))
    with stop, pytest.raises(stopping.Stopped):
        train(parse(flags))
    saved = torch.load(tmp_path / "out/checkpoint-3/progress_0.pt", weights_only=True)["seconds"]
    assert 0 < saved < 600
    with during_update(4, set_back):
        results = train(parse([*flags, "--resume", "auto"]))
    assert saved < results["train_seconds"] < 600
    assert results["images_per_second"] > 0


def test_resume_auto_starts_or_goes_on(data: Path, tmp_path: Path):
    """A program that restarts a training gives the same command each time."""
    out = tmp_path / "out"
    run = parse(train_flags(data, out, "--resume", "auto"))
    assert find_checkpoint(run) is None
    cut_off = out / "checkpoint-2"
    cut_off.mkdir(parents=True)
    (cut_off / "model.safetensors").write_bytes(b"half")
    assert find_checkpoint(run) is None  # it died in its first save: nothing was ever done
    (cut_off / "trainer_state.json").write_text("{}")
    assert not never_complete(cut_off)
    with pytest.raises(ValueError, match="Expected a complete checkpoint in"):
        find_checkpoint(run)  # whole, of another program: a fresh start would delete it
    assert checkpoint_folders(out) == [cut_off]


def test_dead_processes_are_named():
    """`Connection reset by peer` and a page of traceback say neither who nor what to do."""
    host = os.uname().nodename
    peers = [Peer(host, os.getpid()), Peer(host, dead := ended())]
    error = RuntimeError("[gloo/transport/tcp/pair.cc:538] Connection closed by peer [::1]:4711")
    told = str(cause_of_death(error, peers))
    assert told.startswith(
        f"Expected all 2 processes to go on, got the end of process 1 (pid {dead}"
    )
    assert told.endswith("Go on with the same command and --resume auto.")
    worker = RuntimeError("DataLoader worker (pid 4711) is killed by signal: Killed. ")
    told = str(cause_of_death(worker, peers[:1]))
    assert "got the end of process 4711: is killed by signal: Killed. " in told
    assert "--dataloader_num_workers" in told
    assert "--resume auto." in told
    assert cause_of_death(RuntimeError("size mismatch"), peers) is None
    os.waitpid(dead, 0)


@pytest.mark.slow
def test_killed_data_worker_ends_in_one_line(data: Path, tmp_path: Path, capfd: Any):
    """Most often the system has killed it for its memory, and the run is to go on with fewer."""
    import psutil

    def kill() -> None:
        for child in psutil.Process().children():
            child.kill()

    flags = train_flags(data, tmp_path / "out", "--dataloader_num_workers", "1", "--epochs", "1")
    with during_update(1, lambda: (kill(), time.sleep(0.5))):
        assert script(*flags) == 1
    last = capfd.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: Expected the processes that read the data to go on, got the end")


def test_peer_that_dies_after_the_marker_leaves_the_checkpoint(
    data: Path, tmp_path: Path, monkeypatch: Any
):
    """The others took their own error for a failed save and deleted what was complete."""
    from kd_trainer.checkpointing import resume

    done = resume.complete

    def declared(folder: Path, run: Any) -> None:
        done(folder, run)
        raise RuntimeError("[gloo] Connection closed by peer")

    monkeypatch.setattr(resume, "complete", declared)
    with pytest.raises(RuntimeError, match="closed by peer"):
        train(parse(train_flags(data, tmp_path / "out")))
    (left,) = checkpoint_folders(tmp_path / "out")
    check_complete(left)


@pytest.mark.slow
def test_nothing_of_a_run_is_written_in_place(data: Path, tmp_path: Path, monkeypatch: Any):
    """Each file that others read may be met half-written, or cut off for ever."""
    replace, placed = Path.replace, set()

    def noting(self: Path, target: Path) -> Path:
        placed.add(Path(target).name)
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", noting)
    out = tmp_path / "out"
    train(parse(train_flags(data, out, "--epochs", "1", "--report", "true", "--panel_images", "1")))
    files = [p for p in out.rglob("*") if p.is_file() and "checkpoint-" not in str(p.parent)]
    names = {p.name for p in files}
    assert {"config.yaml", "results.json", "report.html", "step_000002.png"} <= names
    assert names - placed == set()
