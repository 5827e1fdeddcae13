"""Disks that are full or closed to us: found before a run where possible, else named."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from kd_trainer.errors import is_own
from kd_trainer.safe_files import check_regular, open_regular, sync

# How torch.save says that a write failed: its archive writer passes no reason on.
_OF_TORCH = re.compile(r"PytorchStreamWriter|inline_container|file write failed")


def existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    place = folder.absolute()
    return next(p for p in (place, *place.parents) if p.exists())


def check_writable(folder: Path) -> None:
    """Refuse an output folder that cannot be made or written to; leaves nothing behind.

    Raises:
        OSError: says why not.
    """
    place = existing(folder)
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise OSError(
            f"Expected an --output_dir that can be written to, got {folder}: {error.strerror} in "
            f"{place}. Name another folder, or make room or change the rights there."
        ) from None


# What a training writes into its output folder, or reads there when it goes on.
_OF_A_RUN = re.compile(
    r"config\.yaml|.*results\.json|trainer_state\.json|report\.html|bad_samples\.txt|"
    r"student|panels|runs|hub|\.?checkpoint-.*|\.training"
)


def check_own_files(folder: Path) -> None:
    """Refuse links among what a training writes over, in a folder that was there already.

    Raises:
        ValueError: names the link.
    """
    own = [path for path in folder.glob("*") if _OF_A_RUN.fullmatch(path.name)]
    for path in own:
        inside = [] if path.is_symlink() or not path.is_dir() else path.rglob("*")
        for found in (path, *inside):
            if found.is_symlink():
                check_regular(found)


class FolderLock:
    """Keeps two runs out of one output folder; a process that ends, however, gives it back.

    A lock of the system rather than a file that marks: nothing is left behind by a SIGKILL.
    """

    FILE = ".training"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._handle: int | None = None

    def take(self) -> None:
        """Take it if the folder is there; once taken, nothing happens.

        Raises:
            OSError: if another process has it.
        """
        if self._handle is not None or not self.folder.is_dir():
            return
        check_writable(self.folder)
        handle = open_regular(self.folder / self.FILE, os.O_RDWR | os.O_CREAT)
        try:
            # Not flock, which a process that reads data would inherit, and hold on to for a moment.
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = os.pread(handle, 64, 0).decode(errors="replace").strip()
            os.close(handle)
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                return  # some network disks know no locks
            raise OSError(
                f"Expected an --output_dir in which no training is running, got {self.folder}, in "
                f"which process {owner or 'another'} is at work. Wait for its end, stop it, or "
                "name another folder."
            ) from None
        self._handle = handle
        with suppress(OSError):  # of a full disk, say: the number is for the message alone
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)

    def release(self) -> None:
        """Give it back, if it was taken."""
        if self._handle is not None:
            (self.folder / self.FILE).unlink(missing_ok=True)
            os.close(self._handle)
            self._handle = None


@contextmanager
def replacing_files(folder: Path) -> Iterator[Path]:
    """A folder to write to, whose files take their places in `folder` when the block ends well."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as partial:
        yield Path(partial)
        for file in sorted(p for p in Path(partial).rglob("*") if p.is_file()):
            place = folder / file.relative_to(partial)
            place.parent.mkdir(parents=True, exist_ok=True)
            sync(file)
            file.replace(place)


@contextmanager
def writing(what: str, folder: Path) -> Iterator[None]:
    """Turn what libraries raise when a write fails into one error that names the place.

    Raises:
        OSError: says what could not be written, where and why.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = _reason(error)
        if reason is None:
            raise
        free = shutil.disk_usage(existing(folder)).free / 2**20
        raise OSError(
            f"Expected to write {what} into {folder}, got: {reason} ({free:,.0f} MiB are free "
            "there). Make room or mend the disk, then go on from the last complete checkpoint, if "
            "there is one, with --resume."
        ) from error


def _reason(error: BaseException) -> str | None:
    """Why the disk did not take it; None if the error is not of the disk."""
    text = " ".join(str(error).split())
    if is_own(error):
        return None  # says it already
    if isinstance(error, SafetensorError):
        _, found, reason = text.partition("I/O error: ")
        return reason if found else None
    if isinstance(error, OSError):
        return error.strerror or text
    return "a file could not be written to its end" if _OF_TORCH.search(text) else None
