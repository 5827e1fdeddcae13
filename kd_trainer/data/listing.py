"""What the sources share: columns, names of splits, lists of files, paths inside the data.

A data set of a stranger may name any file of this machine, or any address, as an image. Whoever
trains on it and publishes a report, or a panel, would publish that image.
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any
from urllib.parse import unquote

import datasets
import pyarrow as pa  # type: ignore[import-untyped]

from kd_trainer.data.images import image_shape
from kd_trainer.fields import nearest

Row = dict[str, Any]

_IMAGE = datasets.Image(decode=False)
_PLAIN = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}


def is_inside(name: str) -> bool:
    """Whether a relative path stays below the folder it is read from, by its text alone."""
    parts = (*PurePosixPath(name).parts, *PureWindowsPath(name).parts)
    rooted = PurePosixPath(name).is_absolute() or bool(PureWindowsPath(name).anchor)
    return not rooted and ".." not in parts and "\0" not in name


def is_address_inside(address: str, root: str) -> bool:
    """Whether an address is one file below another address, by its text alone.

    The library that reads `hf://` addresses decodes them and sends the token before anything takes
    `..` out, and reads a chain of addresses (`file:///a.png::hf://...`) from either end.
    """
    rest = unquote(address.removeprefix(root))
    one = "://" in root and "::" not in rest and "://" not in rest
    return one and address.startswith(root) and is_inside(rest)


def inside(path: str, roots: Sequence[str], name: str) -> str:
    """A path that stands in a row, as one that can be read.

    Symbolic links are followed: they are part of this machine's folders, not of the data.

    Args:
        path: of the row; a relative one begins at the first root.
        roots: absolute folders, and beginnings of addresses.
        name: of the data, for the message.

    Raises:
        ValueError: if the path leads out of all of them.
    """
    if "://" in path:
        if any(is_address_inside(path, root) for root in roots):
            return path
        if "::" in path and any("://" in root and root in path for root in roots):
            raise ValueError(
                f"Expected one address of an image in {name}, got a chain of them: {path}. Leave "
                "--streaming out, which unpacks archives first, or store the images themselves "
                "in the data."
            )
    elif is_inside(path):
        return str(Path(roots[0]) / path)
    elif ".." not in Path(path).parts and any(Path(path).is_relative_to(root) for root in roots):
        return path
    raise ValueError(
        f"Expected paths inside {roots[0]}, got {path} in {name}, which leads out of it. Store the "
        "images themselves in the data, or copy them there and name them from there."
    )


def confined(rows: Any, roots: Sequence[Path | str], name: str) -> Any:
    """A Dataset or IterableDataset of which every path leads into the data.

    Args:
        rows: with the columns `image` and `mask`: images, or their bytes or paths.
        roots: see `inside`; the first is a folder.
        name: of the data, for messages.

    Returns:
        The same rows, both columns as undecoded images.

    Raises:
        ValueError: if a path leads elsewhere; for a stream, when its row comes.
    """
    indexed = isinstance(rows, datasets.Dataset)
    rows = _cast(rows, _IMAGE) if indexed else rows
    if indexed and not _has_paths(rows):
        return rows
    # As plain tables: `datasets` forgets the bytes of an image whose path is a file here, which
    # would bring in a file that nobody has looked at.
    for column, feature in (rows.features or {}).items():
        if isinstance(feature, datasets.Image | dict):
            rows = rows.cast_column(column, _PLAIN)
    places: dict[str, None] = {}  # in order, once
    for root in roots:
        if isinstance(root, Path):
            places |= {str(root.absolute()): None, str(root.resolve()): None}
        else:
            places[root] = None
    options = {"roots": list(places), "name": name}
    plain = datasets.Features({"image": _PLAIN, "mask": _PLAIN})
    return _cast(rows.map(_with_paths, fn_kwargs=options, features=plain), _IMAGE)


def _cast(rows: Any, feature: Any) -> Any:
    for column in ("image", "mask"):
        rows = rows.cast_column(column, feature)
    return rows


def _has_paths(rows: datasets.Dataset) -> bool:
    """Whether an image is stored as its path alone; looks at no image."""
    for column in ("image", "mask"):
        for cells in rows.data.column(column).chunks:
            stored, path = cells.field("bytes"), cells.field("path")
            if (stored.is_null().to_numpy(False) & path.is_valid().to_numpy(False)).any():
                return True
    return False


def _with_paths(row: Row, roots: Sequence[str], name: str) -> Row:
    return {column: _inner_cell(cell, roots, name) for column, cell in row.items()}


def _inner_cell(cell: Any, roots: Sequence[str], name: str) -> Row | None:
    if cell is None or isinstance(cell, bytes | str):
        kinds = (("bytes", bytes), ("path", str))
        cell = {key: cell if isinstance(cell, kind) else None for key, kind in kinds}
    stored, path = cell.get("bytes"), cell.get("path")
    if stored is not None:  # the path is a name only, and is written so that it cannot be a file
        return {"bytes": stored, "path": f"{Path(name).name}: {path}" if path else None}
    return {"bytes": None, "path": inside(path, roots, name)} if path else None


FEATURES = datasets.Features(
    {"image": datasets.Image(decode=False), "mask": datasets.Image(decode=False)}
)
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"})
LOSSY_SUFFIXES = frozenset({".jpg", ".jpeg"})
"""JPEG changes values: of masks such a file is read where there is nothing better."""
MASK_SUFFIXES = (IMAGE_SUFFIXES - LOSSY_SUFFIXES) | {".npy"}
_MAX_SHARDS = 64
_MIN_SHARD_ROWS = 64
_SAMPLE = 200  # images without masks whose first bytes are read before a run


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


_SPLITS = (
    ("train", "training", "train2017", "train2014"),
    ("validation", "val", "valid", "val2017", "val2014", "dev", "test", "testing"),
)
"""Names of splits, the usual one first; `test` is measured on only where nothing else is."""


def split_names(split: str, others: Collection[str] = ()) -> tuple[str, ...]:
    """What a split may be called in a data set, itself first.

    Args:
        split: its name.
        others: names of further splits, which are never meant.

    >>> split_names("validation")[:4]
    ('validation', 'val', 'valid', 'val2017')
    >>> split_names("test")
    ('test', 'testing')
    >>> split_names("fold3")
    ('fold3',)
    """
    family: tuple[str, ...] = next((names for names in _SPLITS if split in names), ())
    if split.startswith("test"):  # whoever asks for it wants no other
        family = tuple(name for name in family if name.startswith("test"))
    return split, *(name for name in family if name != split and name not in others)


class MissingSplitError(FileNotFoundError, ValueError):
    """A data set does not hold a split.

    Args:
        split: its name.
        message: what was expected, what there is and the cure.
    """

    def __init__(self, split: str, message: str) -> None:
        super().__init__(message)
        self.split = split


def missing_path(path: Path, description: str) -> FileNotFoundError:
    """The error for a path that is not there: names the deepest part that is, and the nearest."""
    parent = path.absolute().parent
    missing = path.absolute()
    while not parent.is_dir():
        missing, parent = parent, parent.parent
    suggestion = did_you_mean(missing.name, (p.name for p in parent.iterdir()))
    return FileNotFoundError(
        f"Expected {description} at {path}, got nothing there. {parent} exists, {missing.name!r} "
        f"in it does not.{suggestion}"
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


def list_masks(folder: Path) -> list[Path]:
    """The mask files directly in `folder`, sorted by name; a JPEG only if its name has no other."""
    lossless = list_images(folder, MASK_SUFFIXES)
    stems = {file.stem for file in lossless}
    lossy = [file for file in list_images(folder, LOSSY_SUFFIXES) if file.stem not in stems]
    return sorted([*lossless, *lossy], key=lambda file: file.name) if lossy else lossless


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
    """The images of a folder, each with the mask None.

    Args:
        folder: that holds the files themselves.
        look: read the first bytes of a sample spread over them.

    Raises:
        FileNotFoundError: if the folder is missing.
        ValueError: if it holds no images, or one of the sample is none.
    """
    path = Path(folder)
    if not path.is_dir():
        raise missing_path(path, "a folder of images (--unlabelled)")
    images = list_images(path)
    if not images:
        inside = show_names(subfolders(path)) or "nothing"
        raise ValueError(
            f"Expected images in {path} (--unlabelled), got none; its folders are: {inside}. "
            "Name the folder that holds the files."
        )
    count = min(_SAMPLE, len(images)) if look else 0
    for index in (len(images) * i // count for i in range(count)):
        image_shape(_cell(images[index]), index)
    return path_dataset(images, [None] * len(images))
