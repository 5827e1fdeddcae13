"""Interrupted runs of train.py: what stops them, what goes on, and what is refused."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from same_run import assert_same_tensors
from small_runs import save_network, train_flags, write_pairs
from transformers import Trainer

from kd_trainer.checkpointing import stopping
from kd_trainer.checkpointing.checkpoints import (
    MARKER,
    check_complete,
    checkpoint_folders,
    complete,
    fault,
    move_to_backup,
    read_marker,
)
from kd_trainer.commands.train import run_train, train
from kd_trainer.config import parse
from kd_trainer.errors import run_script

ONE_AN_EPOCH = ("--epochs", "4", "--batch_size", "4")


@contextmanager
def during_update(number: int, act: Any) -> Iterator[None]:
    """Call `act` in the middle of an update, counted from 1."""
    step = Trainer.training_step

    def acting(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == number - 1:
            act()
        return step(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "training_step", acting)
        yield


def script(*flags: str) -> int:
    """Exit code of scripts/train.py."""
    with pytest.raises(SystemExit) as ended:
        run_script(lambda: run_train(parse(flags)) and sys.exit(0))
    return int(ended.value.code)


@pytest.fixture(scope="module")
def ground(tmp_path_factory: Any) -> Path:
    """`data`, `teacher`; `whole`, a run of four updates, and `cut`, stopped in its third."""
    root = tmp_path_factory.mktemp("ground")
    write_pairs(root / "data", train=4, validation=2)
    save_network(root / "teacher")
    flags = [*ONE_AN_EPOCH, "--save_total_limit", "3"]
    train(parse(train_flags(root / "data", root / "whole", *flags, teacher=root / "teacher")))
    run = parse(train_flags(root / "data", root / "cut", *flags, teacher=root / "teacher"))
    told = r"^stopped by SIGTERM after step 3 of 4, saved as .*checkpoint-3\.$"
    terminate = during_update(3, lambda: signal.raise_signal(signal.SIGTERM))
    with terminate, pytest.raises(stopping.Stopped, match=told):
        train(run)
    return root


@pytest.fixture
def cut(ground: Path, tmp_path: Path) -> Any:
    """The command line that goes on with a copy of the interrupted run."""
    shutil.copytree(ground / "cut", tmp_path / "out")

    def flags(*more: str, data: Path = ground / "data", teacher: Path = ground / "teacher") -> Any:
        fixed = [*ONE_AN_EPOCH, "--save_total_limit", "3", "--resume", *more]
        return train_flags(data, tmp_path / "out", *fixed, teacher=teacher)

    return flags


def student(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "student" / "model.safetensors")


def test_stopped_run_goes_on_to_the_same_student(ground: Path, cut: Any, tmp_path: Path):
    """With the best of all evaluations, before and after; the time is that of both parts."""
    first = torch.load(tmp_path / "out/checkpoint-3/progress_0.pt", weights_only=True)["seconds"]
    results = train(parse(cut("--dataloader_num_workers", "1", "--logging_steps", "3")))
    assert_same_tensors(student(ground / "whole"), student(tmp_path / "out"))
    assert [entry["epoch"] for entry in results["eval_history"]] == [1, 2, 3, 4]
    assert results["train_seconds"] > first > 0
    expected = 16 / results["train_seconds"]
    assert results["images_per_second"] == pytest.approx(expected, abs=2e-3)


def test_moved_run_goes_on(ground: Path, cut: Any, tmp_path: Path):
    """The Trainer wrote down where the best checkpoint lay; it would load none at the end."""
    shutil.move(tmp_path / "out", tmp_path / "moved")
    flags = cut()
    flags[flags.index("--output_dir") + 1] = str(tmp_path / "moved")
    train(parse(flags))
    assert_same_tensors(student(ground / "whole"), student(tmp_path / "moved"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_ends_in_one_line(ground: Path, tmp_path: Path, capfd: Any, number: int, code: int):
    """Hours of work are lost if nobody is told that there is something to go on from.

    In the first epoch, of two updates: between two evaluations.
    """
    flags = train_flags(ground / "data", tmp_path / "out", "--epochs", "2")
    before = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)}
    with during_update(1, lambda: signal.raise_signal(number)):
        assert script(*flags) == code
    lines = capfd.readouterr().err.strip().splitlines()
    assert lines[-1].startswith(f"stopped by {signal.Signals(number).name} after step 1 of 4")
    assert lines[-1].endswith("Go on with the same command and --resume.")
    check_complete(tmp_path / "out" / "checkpoint-1")
    assert {each: signal.getsignal(each) for each in before} == before


def test_second_ctrl_c_stops_at_once(ground: Path, tmp_path: Path, monkeypatch: Any):
    """A save on a disk that hangs must not hold a user for ever."""
    monkeypatch.setattr(stopping, "_ONE_PRESS", 0.01)

    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        time.sleep(0.05)
        signal.raise_signal(signal.SIGINT)

    flags = train_flags(ground / "data", tmp_path / "out", "--epochs", "2")
    with during_update(2, twice):
        assert script(*flags) == 130
    assert checkpoint_folders(tmp_path / "out") == []


REFUSED = {
    "batch size": (("--batch_size", "2"), "the run's batch_size 4, got 2"),
    "epochs": (("--epochs", "6"), "epochs 4.0, got 6.0 (learning rates and temperature are curves"),
    "schedule": (("--unfreeze_start_epoch", "1"), "the run's unfreeze_start_epoch 0, got 1"),
    "loss": (("--mse_weight", "0.7"), "the run's mse_weight 0.5, got 0.7"),
    "precision": (("--mixed_precision", "bf16"), "the run's mixed_precision no, got bf16"),
    "seed": (("--seed", "1"), "data_seed 42, seed 42, got data_seed 1, seed 1"),
    "accumulation": (("--gradient_accumulation_steps", "2"), "steps 1, got 2"),
    "architecture": (("--decoder_channels", "16", "8", "8", "8", "16"), "student_tensors "),
    "number of images": (("--max_eval_samples", "1"), "eval_images 2, max_eval_samples None, got"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_another_run_is_refused_with_both_values(cut: Any, tmp_path: Path, case: str):
    """It would train on, and the curves would show nothing."""
    flags, expected = REFUSED[case]
    before = (tmp_path / "out" / "config.yaml").read_text()
    with pytest.raises(ValueError, match=r"^Expected the run's ") as error:
        train(parse(cut(*flags)))
    assert expected in str(error.value)
    assert (tmp_path / "out" / "config.yaml").read_text() == before


def test_data_and_teacher_may_have_moved(ground: Path, cut: Any, tmp_path: Path):
    """The run goes on on another machine, which mounts its disks elsewhere."""
    data, teacher = tmp_path / "elsewhere", tmp_path / "other"
    shutil.copytree(ground / "data", data)
    shutil.copytree(ground / "teacher", teacher)
    train(parse(cut(data=data, teacher=teacher)))
    assert_same_tensors(student(ground / "whole"), student(tmp_path / "out"))


def test_other_data_and_another_teacher_are_refused(ground: Path, cut: Any, tmp_path: Path):
    """Under the same name, too: only the content tells them apart."""
    teacher = tmp_path / "teacher"
    with pytest.raises(ValueError, match=r"the run's teacher \S+, teacher_weights"):
        train(parse(cut(teacher=save_network(teacher, seed=8))))
    masks = ground / "data" / "train" / "masks"
    first, second = sorted(masks.iterdir())[:2]
    saved = first.read_bytes()
    try:
        first.write_bytes(second.read_bytes())
        with pytest.raises(ValueError, match=r"train_content \w{16}, got \w{16} \(the training im"):
            train(parse(cut()))
    finally:
        first.write_bytes(saved)


def test_damaged_newest_is_skipped_aloud_and_named_when_asked_for(cut: Any, tmp_path: Path, capsys):
    """Work is lost, and whoever owns it has to hear of it."""
    broken = tmp_path / "out" / "checkpoint-3"
    weights = broken / "optimizer.pt"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    assert script(*cut(str(broken))) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"error: Expected a complete checkpoint, got {broken}: optimizer.pt is")
    train(parse(cut()))
    said = capsys.readouterr().err
    assert f"skipped {broken}: optimizer.pt is damaged" in said
    assert "Going on from checkpoint-2: what came after it is done again." in said


def test_missing_best_is_refused(cut: Any, tmp_path: Path):
    """The end of the run would keep the last student and call it the best."""
    folders = checkpoint_folders(tmp_path / "out")
    for folder in folders[:-1]:
        shutil.rmtree(folder)
    state = folders[-1] / "trainer_state.json"
    saved = json.loads(state.read_text())
    assert saved["best_global_step"] is not None
    # Whichever evaluation was the best, it is to be that of a checkpoint which is gone.
    saved |= {"best_global_step": 1, "best_model_checkpoint": str(tmp_path / "out/checkpoint-1")}
    state.write_text(json.dumps(saved))
    complete(folders[-1], read_marker(folders[-1])["run"])
    with pytest.raises(FileNotFoundError, match=r"^Expected the best student so far in"):
        train(parse(cut()))


def test_nothing_complete_is_an_error(cut: Any, tmp_path: Path):
    """And a fresh start in its place would overwrite what could be saved by hand."""
    for folder in checkpoint_folders(tmp_path / "out"):
        (folder / MARKER).unlink()
    with pytest.raises(ValueError, match=r"^Expected a complete checkpoint in .* got none"):
        train(parse(cut()))


def full(*args: Any, **kwargs: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("file", ["optimizer", "weights", "marker"])
def test_full_disk_is_named_and_the_last_good_checkpoint_stays(cut: Any, tmp_path, file: str):
    """Half a checkpoint would keep the disk full, and the next start from working."""
    places = {
        "optimizer": "torch.save",
        "weights": "transformers.modeling_utils.safe_save_file",
        "marker": "kd_trainer.checkpointing.resume.complete",
    }
    run = parse(cut())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(places[file], full)
        with pytest.raises(
            OSError, match=r"^Expected to write a checkpoint into .*-4, got: No spa"
        ):
            train(run)
    left = checkpoint_folders(tmp_path / "out")
    assert left[-1].name == "checkpoint-3"
    assert [fault(folder) for folder in left] == [None] * len(left)


def test_file_that_cannot_grow_is_named(cut: Any, tmp_path: Path):
    """A limit of the system stands for a disk that fills up: safetensors writes past Python."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    run = parse(cut())
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, limits[1]))
    try:
        with pytest.raises(OSError, match=r"^Expected to write a checkpoint into .*MiB are free"):
            train(run)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert checkpoint_folders(tmp_path / "out")[-1].name == "checkpoint-3"


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="a folder that nobody can write to")
def test_folder_that_cannot_be_written_to_is_found_before_the_data(tmp_path: Path):
    """After an epoch is too late."""
    with pytest.raises(OSError, match=r"^Expected an --output_dir that can be written to, got /pr"):
        train(parse(train_flags(tmp_path / "nowhere", "/proc/runs/out")))


@pytest.mark.parametrize("update", [3, 4, 8])
def test_a_run_that_saves_its_best_student_only_stops_as_well(
    ground: Path, tmp_path: Path, monkeypatch: Any, update: int
):
    """The Trainer decides on saves itself after an evaluation, here always against one.

    Inside an epoch, in its last update, and in the last update of the run.
    """
    monkeypatch.setattr(Trainer, "_determine_best_metric", lambda *args, **options: False)
    flags = ("--epochs", "4", "--batch_size", "2", "--save_strategy", "best")
    run = parse(train_flags(ground / "data", tmp_path / "out", *flags))
    terminate = during_update(update, lambda: signal.raise_signal(signal.SIGTERM))
    with terminate, pytest.raises(stopping.Stopped, match=rf"after step {update} of 8"):
        train(run)
    assert fault(tmp_path / "out" / f"checkpoint-{update}") is None


HOLDER = """
import sys, time
from pathlib import Path
from kd_trainer.files import FolderLock
lock = FolderLock(Path(sys.argv[1]))
lock.take()
print("held", flush=True)
time.sleep(600)
"""


def test_two_runs_do_not_share_a_folder(cut: Any, tmp_path: Path, capsys: Any):
    """A watchdog that starts a run again too early would have two of them in one folder."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "out")],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        assert script(*cut()) == 1
        said = capsys.readouterr().err
        assert said.startswith("error: Expected an --output_dir in which no training is running")
        assert f"process {holder.pid} is at work" in said
    finally:
        holder.kill()
        holder.communicate()
    train(parse(cut()))  # a killed process holds nothing
    assert not (tmp_path / "out" / ".training").exists()


def test_a_checkpoint_that_waits_to_be_replaced_is_there_for_every_start(cut: Any, tmp_path: Path):
    """It would be put back later, into another run that was started in its folder."""
    for folder in checkpoint_folders(tmp_path / "out"):
        move_to_backup(folder)
    assert checkpoint_folders(tmp_path / "out") == []
    flags = cut()
    flags.remove("--resume")
    with pytest.raises(ValueError, match=r"^Expected --resume or an output folder without"):
        train(parse(flags))
    train(parse(cut(str(tmp_path / "out" / "checkpoint-3"))))
