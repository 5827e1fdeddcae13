"""Cells of a data set: what a picture is called, its bytes, and the error that a bad one gets.

A cell is what `datasets.Image(decode=False)` gives: a dict with `bytes` and `path`, either of
which may be None.
"""

from __future__ import annotations

import errno
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import fsspec  # type: ignore[import-untyped]

Cell = Mapping[str, Any]

MAX_BYTES = 2**30
"""Largest file that is read as one picture: 1 GiB."""

# What is wrong with the one file; anything else (a full table of open files, a broken disk) is
# wrong with the machine, and no reason to go on without the sample.
_OF_THE_FILE = (errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOTDIR)


class BadSampleError(ValueError):
    """A photograph or a mask that cannot be used; the message names the file."""


class MissingFileError(BadSampleError, FileNotFoundError):
    """A file that was listed and is not there."""


def cell_name(cell: Cell | None, index: int) -> str:
    """What to call a row's file in a message: its path, else the number of the row."""
    cell = cell or {}
    path = cell.get("path")
    if path and cell.get("bytes") is None:
        return str(path)
    return f"{path} (row {index})" if path else f"row {index}"


def read_cell(cell: Cell | None, name: str) -> bytes:
    """The encoded bytes of a cell, from memory, a local file or a remote address (hf://, ...).

    Raises:
        MissingFileError: if the file is gone.
        BadSampleError: if the cell has neither bytes nor a path, or the file cannot be read.
    """
    cell = cell or {}
    stored = cell.get("bytes")
    if stored is not None:
        if not stored:
            raise BadSampleError(f"Expected a picture, got no bytes at {name}. Remove the row.")
        return bytes(stored)
    path = cell.get("path")
    if not path:
        raise BadSampleError(
            f"Expected an image with bytes or a path, got an empty cell at {name}."
        )
    if "://" in path:
        with fsspec.open(path, "rb") as remote:
            content = bytes(remote.read(MAX_BYTES + 1))
        if len(content) > MAX_BYTES:
            raise _too_many_bytes("more", path)
        return content
    try:
        file = Path(path)
        _check_file(file)
        return file.read_bytes()
    except FileNotFoundError:
        raise MissingFileError(
            f"Expected the file {path}, got nothing there. Was it moved after the data was listed?"
        ) from None
    except OSError as error:
        if error.errno not in _OF_THE_FILE:
            raise
        raise BadSampleError(
            f"Expected a readable file, got {path}: {error.strerror}. Mend or remove it."
        ) from None


def _check_file(path: Path) -> None:
    """Refuse what would be read without end (a pipe, a device) or fill the memory."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        what = "a folder" if stat.S_ISDIR(status.st_mode) else "a device or a pipe"
        raise BadSampleError(f"Expected a file, got {what} at {path}. Rename or remove it.")
    if not status.st_size:
        raise BadSampleError(
            f"Expected a picture, got an empty file: {path}. Replace or remove it."
        )
    if status.st_size > MAX_BYTES:
        raise _too_many_bytes(f"{status.st_size:,}", path)


def _too_many_bytes(size: str, path: object) -> BadSampleError:
    return BadSampleError(
        f"Expected a picture of at most {MAX_BYTES:,} bytes, got {size} in {path}. Make it "
        "smaller, or cut it into pieces."
    )
