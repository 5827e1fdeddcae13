"""What the sources share: the columns, lists of files, and errors that suggest the nearest name."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

import datasets
import pyarrow as pa  # type: ignore[import-untyped]

from kd_trainer.data.decoding import image_shape
from kd_trainer.fields import nearest

FEATURES = datasets.Features(
    {"image": datasets.Image(decode=False), "mask": datasets.Image(decode=False)}
)
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"})
# JPEG is lossy: its masks hold values that nobody wrote.
MASK_SUFFIXES = frozenset({".png", ".bmp", ".tif", ".tiff", ".gif", ".webp"})
_MAX_SHARDS = 64
_MIN_SHARD_ROWS = 64
_SAMPLE = 200  # photographs without masks whose first bytes are read before a run


def stream_shards(rows: int) -> int:
    """Shards for local rows that are read as a stream; opening each takes time."""
    return max(1, min(_MAX_SHARDS, rows // _MIN_SHARD_ROWS))


def did_you_mean(name: str, options: Iterable[str]) -> str:
    """` Did you mean 'x'?` for the option nearest to `name`, else nothing."""
    near = nearest(name, options)
    return f" Did you mean {near!r}?" if near else ""


def subfolders(folder: Path) -> list[str]:
    """Names of the visible folders in `folder`, sorted."""
    return sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


class MissingSplitError(FileNotFoundError, ValueError):
    """A data set does not hold a split.

    Args:
        split: its name.
        message: what was expected, what there is and the cure.
    """

    def __init__(self, split: str, message: str) -> None:
        super().__init__(message)
        self.split = split


def missing_path(path: Path, what: str) -> FileNotFoundError:
    """The error for a path that is not there: names the deepest part that is, and the nearest."""
    parent = path.absolute().parent
    missing = path.absolute()
    while not parent.is_dir():
        missing, parent = parent, parent.parent
    suggestion = did_you_mean(missing.name, (p.name for p in parent.iterdir()))
    return FileNotFoundError(
        f"Expected {what} at {path}, got nothing there. {parent} exists, {missing.name!r} in it "
        f"does not.{suggestion}"
    )


def list_images(folder: Path, suffixes: Iterable[str] = IMAGE_SUFFIXES) -> list[Path]:
    """The image files directly in `folder`, sorted by name (so that row numbers never change)."""
    allowed = frozenset(suffixes)
    # Names, not paths: of 100,000 files, paths take three times as long to sort.
    names = sorted(
        name
        for name in os.listdir(folder)  # noqa: PTH208
        if not name.startswith(".") and os.path.splitext(name)[1].lower() in allowed  # noqa: PTH122
    )
    for name in names:
        # A half of a surrogate pair stands for a byte that is no UTF-8, which no table can store.
        if not name.isprintable() and any(unicodedata.category(c) in ("Cc", "Cs") for c in name):
            raise ValueError(
                f"Expected file names in UTF-8 without control characters, got {name!a} in "
                f"{folder}. Rename the file."
            )
    return [folder / name for name in names]


def show_names(names: Sequence[str]) -> str:
    """The first three names, and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def path_dataset(images: Sequence[Path], masks: Sequence[Path | None]) -> datasets.Dataset:
    """A data set of paths; nothing is read."""
    columns = {"image": images, "mask": masks}
    table = pa.table({name: _cells(paths) for name, paths in columns.items()})
    info = datasets.DatasetInfo(features=FEATURES)
    return datasets.Dataset(datasets.table.InMemoryTable(table), info=info)


def _cells(paths: Sequence[Path | None]) -> pa.StructArray:
    """A column of paths, made at once: from dictionaries 100,000 rows take a second."""
    named = [None if path is None else str(path) for path in paths]
    arrays = {"bytes": pa.nulls(len(named), pa.binary()), "path": pa.array(named, pa.string())}
    missing = pa.array([path is None for path in paths])
    return pa.StructArray.from_arrays(list(arrays.values()), list(arrays), mask=missing)


def _cell(path: Path) -> dict[str, str | None]:
    return {"path": str(path), "bytes": None}


def unlabelled_dataset(folder: str, *, look: bool = True) -> datasets.Dataset:
    """The photographs of a folder, each with the mask None.

    Args:
        folder: that holds the files themselves.
        look: read the first bytes of a sample spread over them.

    Raises:
        FileNotFoundError: if the folder is missing.
        ValueError: if it holds no images, or one of the sample is none.
    """
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise missing_path(path, "a folder of photographs (--unlabelled)")
    images = list_images(path)
    if not images:
        inside = show_names(subfolders(path)) or "nothing"
        raise ValueError(
            f"Expected photographs in {path} (--unlabelled), got none; its folders are: {inside}. "
            "Name the folder that holds the files."
        )
    count = min(_SAMPLE, len(images)) if look else 0
    for index in (len(images) * i // count for i in range(count)):
        image_shape(_cell(images[index]), index)
    return path_dataset(images, [None] * len(images))
