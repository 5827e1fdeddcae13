"""Checkpoints are complete or do not count; nothing good is removed before its successor is."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from tiny import arguments

from kd_trainer.checkpointing import checkpoints
from kd_trainer.checkpointing.checkpoints import (
    MARKER,
    check_complete,
    checkpoint_folders,
    complete,
    fault,
    move_to_backup,
    newest_complete,
    read_marker,
    recover_interrupted_replace,
    remove,
    rotate,
    step_of,
)
from kd_trainer.checkpointing.resume import progress_file, read_progress

RUN = {"batch_size": 4, "learning_rate": 1e-4, "names": ["background", "person"]}


def save(output: Path, update: int, *, finished: bool = True, text: str = "weights") -> Path:
    folder = output / f"checkpoint-{update}"
    (folder / "inner").mkdir(parents=True)
    (folder / "model.bin").write_text(text)
    (folder / "inner" / "state.json").write_text(json.dumps({"update": update}))
    if finished:
        complete(folder, RUN)
    return folder


def names(output: Path) -> list[str]:
    return sorted(p.name for p in output.iterdir())


def truncate(folder: Path) -> None:
    os.truncate(folder / "model.bin", 3)


def lengthen(folder: Path) -> None:
    (folder / "model.bin").write_text("weights and more")


def flip(folder: Path) -> None:
    (folder / "model.bin").write_text("weightz")


def lose(folder: Path) -> None:
    (folder / "inner" / "state.json").unlink()


def cut_off(folder: Path) -> None:
    (folder / MARKER).unlink()


def garble_marker(folder: Path) -> None:
    os.truncate(folder / MARKER, 50)


def flip_marker(folder: Path) -> None:
    text = (folder / MARKER).read_text()
    (folder / MARKER).write_text(text.replace('"batch_size": 4', '"batch_size": 5'))


def nest_marker(folder: Path) -> None:
    (folder / MARKER).write_text("[" * 100_000)


def empty_marker(folder: Path) -> None:
    content: dict[str, object] = {"step": 2}
    (folder / MARKER).write_text(json.dumps(content | {"check": checkpoints._check(content)}))


DAMAGES = {
    nest_marker: "COMPLETE.json is damaged",
    empty_marker: "COMPLETE.json is damaged",
    truncate: "model.bin is truncated: 3 bytes instead of 7",
    lengthen: "model.bin is too long: 16 bytes instead of 7",
    flip: "model.bin is damaged: its bytes have changed",
    lose: "inner/state.json is missing",
    cut_off: "no COMPLETE.json",
    garble_marker: "COMPLETE.json is damaged: it cannot be read",
    flip_marker: "COMPLETE.json is damaged: its content has changed",
}


def test_a_complete_checkpoint_says_what_run_it_is_of(tmp_path: Path):
    """What was not read back could not be compared."""
    folder = save(tmp_path, 3)
    assert fault(folder) is None
    check_complete(folder)
    marker = read_marker(folder)
    assert (marker["step"], marker["run"]) == (3, RUN)
    assert sorted(marker["files"]) == ["inner/state.json", "model.bin"]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda d: d.__name__)
def test_damage_is_named_and_the_checkpoint_before_it_is_taken(tmp_path: Path, damage):
    """A damaged checkpoint that loads would poison the run without a word."""
    good, bad = save(tmp_path, 3), save(tmp_path, 6)
    damage(bad)
    with pytest.raises(ValueError, match=r"^Expected a complete checkpoint, got .*6: ") as error:
        check_complete(bad)
    assert DAMAGES[damage] in str(error.value)
    newest = newest_complete(tmp_path)
    assert newest.folder == good
    assert DAMAGES[damage] in newest.skipped[bad]


def test_only_names_that_a_training_gives_are_checkpoints():
    """`checkpoint-08` would be taken for the newest of eight updates, and deleted in its place."""
    assert step_of(Path("checkpoint-10")) == 10
    for name in ("checkpoint-08", "checkpoint-٣", "checkpoint-1 (copy)", "my checkpoint-1"):
        assert step_of(Path(name)) == -1, name


def test_the_newest_is_that_of_the_last_update(tmp_path: Path):
    """By name as text, 9 comes after 10."""
    for update in (9, 10, 2):
        save(tmp_path, update)
    (tmp_path / "checkpoint-best").mkdir()
    assert newest_complete(tmp_path) == (tmp_path / "checkpoint-10", {})


def test_nothing_to_go_on_from_is_an_error(tmp_path: Path):
    """A silent fresh start loses the run that somebody wanted to go on with."""
    with pytest.raises(FileNotFoundError, match=r"^Expected a checkpoint in"):
        newest_complete(tmp_path)
    save(tmp_path, 3, finished=False)
    save(tmp_path, 6, finished=False)
    with pytest.raises(ValueError, match=r"checkpoint-6: no COMPLETE.*checkpoint-3: no COMPLETE"):
        newest_complete(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"^Expected a checkpoint folder"):
        check_complete(tmp_path / "nowhere")


def test_the_marker_comes_after_every_file_is_on_the_disk(tmp_path: Path, monkeypatch):
    """A marker that reaches the disk before the weights says after a power cut that all is well."""
    folder, synced = save(tmp_path, 3, finished=False), []
    monkeypatch.setattr(checkpoints, "_sync", lambda path: synced.append((path, names(folder))))
    complete(folder, RUN)
    before = [path for path, there in synced if MARKER not in there]
    files = ("model.bin", "inner/state.json", "inner", f"{MARKER}.partial")
    assert {folder, *(folder / name for name in files)} == set(before)
    assert before[-1] == folder / f"{MARKER}.partial"
    assert [path for path, there in synced if MARKER in there] == [folder, tmp_path]
    assert names(folder) == [MARKER, "inner", "model.bin"]


@pytest.mark.parametrize(
    ("limit", "best", "left"),
    [
        (None, None, [1, 2, 3, 4]),
        (0, 1, [1, 2, 3, 4]),
        (3, None, [2, 3, 4]),
        (2, None, [3, 4]),
        (2, 1, [1, 4]),
        (1, None, [4]),
        (1, 1, [1, 4]),
        (1, 4, [4]),
    ],
)
def test_the_newest_and_the_best_stay(tmp_path: Path, limit, best, left):
    """The best student is loaded at the end, from its checkpoint."""
    folders = {update: save(tmp_path, update) for update in (1, 2, 3, 4)}
    # The Trainer may write the path of the best in another way.
    other = None if best is None else tmp_path / ".." / tmp_path.name / f"checkpoint-{best}"
    rotate(tmp_path, limit, folders[4], other)
    assert [checkpoints.step_of(p) for p in checkpoint_folders(tmp_path)] == left


def test_leftovers_go_once_something_newer_is_complete(tmp_path: Path):
    """They would pile up with every crash; but a newer one may be a save in progress elsewhere."""
    save(tmp_path, 1)
    save(tmp_path, 2, finished=False)
    kept = save(tmp_path, 3)
    save(tmp_path, 4, finished=False)
    rotate(tmp_path, None, kept)
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-3", "checkpoint-4"]


def test_half_a_deletion_does_not_look_complete(tmp_path: Path, monkeypatch):
    """Killed while it deletes, a process leaves some of the files."""
    folder = save(tmp_path, 3)
    monkeypatch.setattr(checkpoints.shutil, "rmtree", lambda path, **kwargs: None)
    remove(folder)
    assert "no COMPLETE.json" in str(fault(folder))


def test_a_link_goes_and_the_checkpoint_of_another_run_stays(tmp_path: Path):
    """A link in a run folder would cost another run its checkpoint."""
    other, output = save(tmp_path / "other", 1), tmp_path / "run"
    kept = save(output, 2)
    (output / "checkpoint-1").symlink_to(other)
    rotate(output, 1, kept)
    assert names(output) == ["checkpoint-2"]
    assert fault(other) is None


def test_a_complete_checkpoint_stays_until_its_replacement_is_complete(tmp_path: Path):
    """Saving the same update again must not be the moment at which a crash loses it."""
    old = save(tmp_path, 3, text="old")
    move_to_backup(old)
    save(tmp_path, 3, finished=False, text="half")
    recover_interrupted_replace(tmp_path)  # what the next start does after a crash here
    assert names(tmp_path) == ["checkpoint-3"]
    assert (old / "model.bin").read_text() == "old"
    assert fault(old) is None

    move_to_backup(old)
    save(tmp_path, 3, text="new")
    recover_interrupted_replace(tmp_path)
    assert names(tmp_path) == ["checkpoint-3"]
    assert (old / "model.bin").read_text() == "new"

    cut_off(old)
    move_to_backup(old)
    assert names(tmp_path) == []


def test_a_checkpoint_of_other_optimizer_groups_is_refused(tmp_path: Path):
    """Its optimizer would fail to load with torch's words, hours after the data was prepared."""
    args = arguments(tmp_path)
    torch.save({"seconds": 1.0}, progress_file(tmp_path, args))
    with pytest.raises(ValueError, match=r"^Expected a checkpoint of this version, got .* earlier"):
        read_progress(tmp_path, args)
