"""Paths that stand in data: they lead into the folder of the data, or nowhere.

A data set of a stranger may name any file of this machine, or any address, as a picture. Whoever
trains on it and publishes a report, or a panel, would publish that picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any
from urllib.parse import unquote

import datasets

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
                f"Expected one address of a picture in {name}, got a chain of them: {path}. Leave "
                "--streaming out, which unpacks archives first, or store the pictures themselves "
                "in the data."
            )
    elif is_inside(path):
        return str(Path(roots[0]) / path)
    elif ".." not in Path(path).parts and any(Path(path).is_relative_to(root) for root in roots):
        return path
    raise ValueError(
        f"Expected paths inside {roots[0]}, got {path} in {name}, which leads out of it. Store the "
        "pictures themselves in the data, or copy them there and name them from there."
    )


def confined(rows: Any, roots: Sequence[Path | str], name: str) -> Any:
    """A Dataset or IterableDataset of which every path leads into the data.

    Args:
        rows: with the columns `image` and `mask`: pictures, or their bytes or paths.
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
    """Whether a picture is stored as its path alone; looks at no picture."""
    for column in ("image", "mask"):
        for cells in rows.data.column(column).chunks:
            stored, path = cells.field("bytes"), cells.field("path")
            if (stored.is_null().to_numpy(False) & path.is_valid().to_numpy(False)).any():
                return True
    return False


def _with_paths(row: Row, roots: Sequence[str], name: str) -> Row:
    return {column: _cell(cell, roots, name) for column, cell in row.items()}


def _cell(cell: Any, roots: Sequence[str], name: str) -> Row | None:
    if cell is None or isinstance(cell, bytes | str):
        kinds = (("bytes", bytes), ("path", str))
        cell = {key: cell if isinstance(cell, kind) else None for key, kind in kinds}
    stored, path = cell.get("bytes"), cell.get("path")
    if stored is not None:  # the path is a name only, and is written so that it cannot be a file
        return {"bytes": stored, "path": f"{Path(name).name}: {path}" if path else None}
    return {"bytes": None, "path": inside(path, roots, name)} if path else None
