"""Checkpoints that are complete or do not count.

A process can die at any moment of a save. So a checkpoint counts only once its `COMPLETE.json` is
there: it names every file with its size and SHA-256, and is put in place by a rename, after all of
them have reached the disk. Nothing older is removed before that.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from kd_trainer.files import sync as _sync

MARKER = "COMPLETE.json"
_NAME = re.compile(r"checkpoint-(0|[1-9][0-9]*)")
# Where a checkpoint waits while another of the same step is written.
_ASIDE = ".replaced-"


class Newest(NamedTuple):
    """The newest complete checkpoint, and what is wrong with each newer one."""

    folder: Path
    skipped: dict[Path, str]


def step_of(folder: Path) -> int:
    """Number of the step after which a checkpoint was saved, from its name; -1 for another."""
    found = _NAME.fullmatch(folder.name)
    return int(found[1]) if found else -1


def checkpoint_folders(output: Path) -> list[Path]:
    """The checkpoint folders in an output folder, complete or not, oldest first."""
    found = [p for p in output.glob("checkpoint-*") if p.is_dir() and step_of(p) >= 0]
    return sorted(found, key=step_of)


def complete(folder: Path, run: Mapping[str, Any]) -> None:
    """Declare a checkpoint complete, once every file of it is on the disk.

    Args:
        folder: of the checkpoint, with all its files.
        run: what the run is, to be compared before it goes on; plain values.
    """
    files = {}
    for file in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MARKER):
        files[file.relative_to(folder).as_posix()] = _described(file)
        _sync(file)
    for inner in (p for p in folder.rglob("*") if p.is_dir()):
        _sync(inner)
    _sync(folder)
    content = {"step": step_of(folder), "files": files, "run": dict(run)}
    text = json.dumps(content | {"check": _check(content)}, indent=2, ensure_ascii=False)
    partial = folder / f"{MARKER}.partial"
    partial.write_text(text + "\n", encoding="utf-8")
    _sync(partial)
    partial.replace(folder / MARKER)
    _sync(folder)
    _sync(folder.parent)


def _described(file: Path) -> dict[str, Any]:
    return {"bytes": file.stat().st_size, "sha256": file_digest(file)}


def file_digest(file: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _check(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def read_marker(folder: Path) -> dict[str, Any]:
    """What the marker of a checkpoint holds: `step`, `files`, `run`.

    Raises:
        ValueError: if there is none, or it was damaged; says so without naming the folder.
    """
    file = folder / MARKER
    if not file.is_file():
        raise ValueError(f"no {MARKER}: it was cut off while it was written or deleted")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        check = content.pop("check")
    # also text that is no UTF-8, or brackets in brackets
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise ValueError(f"{MARKER} is damaged: it cannot be read") from None
    parts = isinstance(content.get("files"), dict) and isinstance(content.get("run"), dict)
    if check != _check(content) or not parts:
        raise ValueError(f"{MARKER} is damaged: its content has changed")
    return dict(content)


def fault(folder: Path, *, contents: bool = True) -> str | None:
    """What is wrong with a checkpoint, naming the file; None if it is complete and undamaged.

    Args:
        folder: of the checkpoint.
        contents: read every file and compare its hash, not only names and sizes.
    """
    try:
        files = read_marker(folder)["files"]
    except ValueError as error:
        return str(error)
    for name, wanted in files.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        size = file.stat().st_size
        if size != wanted["bytes"]:
            kind = "truncated" if size < wanted["bytes"] else "too long"
            return f"{name} is {kind}: {size:,} bytes instead of {wanted['bytes']:,}"
        if contents and file_digest(file) != wanted["sha256"]:
            return f"{name} is damaged: its bytes have changed since it was written"
    return None


def never_complete(folder: Path) -> bool:
    """Whether a save of ours was cut off there, so that nothing is lost without it.

    A stock Trainer leaves no marker either, but no `progress_*.pt` beside its last file.
    """
    finished = (folder / "trainer_state.json").is_file() and not any(folder.glob("progress_*.pt"))
    return not (folder / MARKER).is_file() and not finished


def check_complete(folder: Path) -> None:
    """Refuse a checkpoint that cannot be gone on from.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: says which file is missing, truncated or changed.
    """
    if not folder.is_dir():
        raise FileNotFoundError(
            f"Expected a checkpoint folder, got {folder}, which is none. Name one, or leave its "
            "name out for the newest complete one in --output_dir."
        )
    wrong = fault(folder)
    if wrong is not None:
        raise ValueError(
            f"Expected a complete checkpoint, got {folder}: {wrong}. Go on from another one: "
            "--resume FOLDER, or --resume alone for the newest complete one."
        )


def newest_complete(output: Path, *, contents: bool = True) -> Newest:
    """The newest checkpoint of an output folder whose marker holds.

    Raises:
        FileNotFoundError: if there are no checkpoints.
        ValueError: if there are, but none is complete: a fresh start must not look like a resume.
    """
    folders = checkpoint_folders(output)
    if not folders:
        raise FileNotFoundError(
            f"Expected a checkpoint in {output}, got none. Leave --resume out to start anew, or "
            "name the checkpoint's folder."
        )
    skipped: dict[Path, str] = {}
    for folder in reversed(folders):
        wrong = fault(folder, contents=contents)
        if wrong is None:
            return Newest(folder, skipped)
        skipped[folder] = wrong
    told = "; ".join(f"{folder.name}: {wrong}" for folder, wrong in skipped.items())
    raise ValueError(
        f"Expected a complete checkpoint in {output}, got none ({told}). To start anew, delete "
        "these folders or name another --output_dir, and leave --resume out."
    )


def move_to_backup(folder: Path) -> None:
    """Make room for a checkpoint of the same step; a complete one stays until it is replaced."""
    if not folder.is_dir():
        return
    if fault(folder, contents=False) is None:
        folder.rename(folder.parent / f"{_ASIDE}{folder.name}")
    else:
        remove(folder)


def recover_interrupted_replace(output: Path) -> None:
    """Finish or undo replacements of `move_to_backup` that were cut off."""
    for aside in output.glob(f"{_ASIDE}checkpoint-*"):
        folder = output / aside.name.removeprefix(_ASIDE)
        if folder.is_dir() and fault(folder, contents=False) is None:
            remove(aside)
        else:
            remove(folder)
            aside.rename(folder)


def rotate(output: Path, limit: int | None, kept: Path, best: Path | None = None) -> None:
    """Delete the oldest checkpoints beyond `limit`, and incomplete ones older than `kept`.

    Args:
        output: folder of the checkpoints.
        limit: how many stay; None or 0 keeps all that are complete.
        kept: the one just completed; stays.
        best: the one of the best evaluation; stays too.
    """
    held = {p.resolve() for p in (kept, best) if p is not None}  # however they are written
    spare = [p for p in checkpoint_folders(output) if p.resolve() not in held]
    whole = []
    for folder in spare:
        if fault(folder, contents=False) is None:
            whole.append(folder)
        elif step_of(folder) < step_of(kept):
            remove(folder)
    if limit is None or limit <= 0:
        return
    for folder in whole[: max(0, len(whole) - max(0, limit - len(held)))]:
        remove(folder)


def remove(folder: Path) -> None:
    """Delete a checkpoint, its marker first: half of one must not look complete.

    Of a link the link alone goes: what it leads to is not this run's.
    """
    if folder.is_symlink():
        folder.unlink()
        return
    (folder / MARKER).unlink(missing_ok=True)
    # On network disks a file in use cannot go; the rest of the folder then counts as incomplete.
    shutil.rmtree(folder, ignore_errors=True)
