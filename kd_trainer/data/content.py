"""A cheap fingerprint of a data set: enough to tell another one, not a hash of every byte."""

from __future__ import annotations

import hashlib
import os
import stat
from itertools import islice
from pathlib import Path
from typing import Any

import datasets

READ_ROWS = 16
"""Rows whose images and masks are read: a few milliseconds each."""


def content_digest(rows: Any) -> str:
    """A short hash of a data set with the columns `image` and `mask`, undecoded.

    Of a stream the first rows are hashed. Of any other data set some rows spread over it, and where
    it names files, the name and size of every one. Where the files lie does not matter.

    Args:
        rows: a `datasets.Dataset` or `IterableDataset` as `load_splits` gives it.

    Returns:
        16 hexadecimal digits.
    """
    digest = hashlib.sha256()
    if isinstance(rows, datasets.Dataset):
        count = min(READ_ROWS, len(rows))
        sample = [rows[len(rows) * i // count] for i in range(count)]
        for column in ("image", "mask"):
            _add_files(digest, rows, column, sample)
    else:
        sample = list(islice(rows, READ_ROWS))
    for row in sample:
        for column in ("image", "mask"):
            digest.update(_content(row[column]))
    return digest.hexdigest()[:16]


def _add_files(digest: Any, rows: datasets.Dataset, column: str, sample: list[Any]) -> None:
    """Names and sizes of all files, unless the table itself holds their bytes."""
    cells = [row[column] for row in sample if row[column] is not None]
    if any(cell["bytes"] is not None for cell in cells):
        digest.update(f"{column} {len(rows)}\n".encode())
        return
    for cell in rows.select_columns(column)[:][column]:
        path = None if cell is None else cell["path"]
        name = None if path is None else os.path.basename(path)  # noqa: PTH119 (Path is slow)
        digest.update(f"{column} {name} {_size(path)}\n".encode())


def _size(path: str | None) -> int:
    """Bytes of a file; 0 if it is none. One call of the system: 100,000 files take a second."""
    if path is None:
        return 0
    try:
        status = os.stat(path)  # noqa: PTH116
    except (OSError, ValueError):
        return 0
    return status.st_size if stat.S_ISREG(status.st_mode) else 0


def _content(cell: dict[str, Any] | None) -> bytes:
    if cell is None:
        return b"none\n"
    if cell["bytes"] is not None:
        return hashlib.sha256(cell["bytes"]).digest()
    path = Path(cell["path"])
    return hashlib.sha256(path.read_bytes() if path.is_file() else path.name.encode()).digest()
