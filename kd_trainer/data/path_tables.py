"""Tables of file names: csv files, and the `metadata.jsonl` or `metadata.csv` of an image folder.

Paths begin at the folder of the table, or at the folders that the user names with `--image_folder`
and `--mask_folder`, and lead nowhere else, also where they are absolute: a table may be a
stranger's, and whatever it names could end up in a published report.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath

from kd_trainer.data.folder_layouts import SPLIT_WORDS, Layout, split_in, words_of
from kd_trainer.data.listing import (
    IMAGE_SUFFIXES,
    MASK_SUFFIXES,
    did_you_mean,
    inside,
    show_names,
    subfolders,
)
from kd_trainer.data.pairing import IMAGE_WORDS, MASK_WORDS, Pair
from kd_trainer.data_arguments import DataArguments
from kd_trainer.errors import clipped
from kd_trainer.files import open_regular, read_regular

TABLE_SUFFIXES = frozenset({".csv", ".tsv"})
_METADATA = ("metadata.jsonl", "metadata.csv")
_FOR_IMAGES = IMAGE_WORDS | {"file", "filename", "path", "filepath"}
_SPLIT_COLUMNS = ("split", "set", "subset", "partition", "phase")
_DELIMITERS = ",;\t"
_HEAD = 2**16  # bytes in which the first two lines are
_MOST_TABLES = 20  # in one folder
Row = Mapping[str, str]


@dataclass(frozen=True)
class Table:
    """A file with a row an image.

    Attributes:
        path: of the file.
        rows: text by column.
        image: name of the column of images.
        mask: name of the column of masks.
    """

    path: Path
    rows: Sequence[Row]
    image: str
    mask: str


def read_metadata(root: Path, data: DataArguments) -> Layout | None:
    """The metadata of an image folder, in the folder itself or in those of its splits."""
    for name in _METADATA:
        if (root / name).is_file():
            table = read_table(root / name, data)
            return _layout("metadata", data, _divided(table)) if table else None
    files = ((folder, root / folder / name) for folder in subfolders(root) for name in _METADATA)
    tables = {folder: read_table(file, data) for folder, file in files if file.is_file()}
    found = {folder: table for folder, table in tables.items() if table}
    return _layout("metadata", data, found) if found else None


def read_csv_files(path: Path, data: DataArguments) -> Layout | None:
    """A csv file, with those of the other splits beside it, or the csv files of a folder.

    Raises:
        ValueError: if a named file holds no two columns of paths, or a folder several files for
            one split; says what there is.
    """
    if path.is_file():
        table = _named_table(path, data)
        if split_in(path.stem) is None:
            return _layout("csv", data, _divided(table))
    folder = path if path.is_dir() else path.parent
    listed = (f for end in TABLE_SUFFIXES for f in folder.glob(f"[!.]*{end}"))
    files = sorted(file for file in listed if file.is_file())
    if path.is_file():
        files = [f for f in files if _other_words(f) == _other_words(path)]
    tables: dict[str, Table] = {}
    for file in files[:_MOST_TABLES]:
        table_here = None if file.name in _METADATA else read_table(file, data)
        if table_here is None:
            continue
        split = split_in(file.stem) or ""
        if split in tables:
            raise ValueError(
                f"Expected one csv file of paths for each split in {folder}, got "
                f"{tables[split].path.name} and {file.name}. Name one as --dataset."
            )
        tables[split] = table_here
    if set(tables) == {""}:
        tables = _divided(tables[""])
    tables.pop("", None)
    return _layout("csv", data, tables) if tables else None


def _other_words(file: Path) -> list[str]:
    return [word for word in words_of(file.stem) if word not in SPLIT_WORDS]


def _named_table(path: Path, data: DataArguments) -> Table:
    table = read_table(path, data)
    if table is None:
        columns = list(next(iter(read_rows(path, head=True)), {}))
        raise ValueError(
            f"Expected a column of paths of images and one of masks in {path}, got "
            f"{clipped(', '.join(columns), 200) or 'no rows'}. Name them with --image_column and "
            "--mask_column."
        )
    return table


def _layout(name: str, data: DataArguments, tables: Mapping[str, Table]) -> Layout:
    first = next(iter(tables.values()))
    files = list(dict.fromkeys(table.path.name for table in tables.values()))
    return Layout(
        name,
        f"columns {first.image} and {first.mask} of {show_names(files)}",
        {split: partial(_pairs, table, data) for split, table in tables.items()},
        {"image_column": first.image, "mask_column": first.mask},
    )


def _divided(table: Table) -> dict[str, Table]:
    """The table of each split: by a column for it, or by the first folder of all paths."""
    columns = {name.lower(): name for name in table.rows[0]}
    column = next((columns[name] for name in _SPLIT_COLUMNS if name in columns), None)

    def split_of(row: Row) -> str | None:
        if column is not None:
            return row.get(column, "").strip() or "train"
        folders = PurePosixPath(row.get(table.image, "")).parts[:-1]
        return split_in(folders[0]) if folders else None

    splits = [split_of(row) for row in table.rows]
    if None in splits:
        return {"train": table}
    return {
        name: replace(table, rows=[r for r, s in zip(table.rows, splits, strict=True) if s == name])
        for name in sorted({split for split in splits if split})
    }


def read_table(path: Path, data: DataArguments) -> Table | None:
    """A table with a column of paths of images and one of masks; None if it has none.

    Raises:
        ValueError: if the file cannot be read, or several columns could be meant; lists them.
    """
    rows = read_rows(path, head=True)
    columns = _path_columns(path, rows[0], data) if rows else ()
    return Table(path, read_rows(path), *columns) if len(columns) == 2 else None


def _path_columns(path: Path, row: Row, data: DataArguments) -> tuple[str, ...]:
    """The columns of images and masks, as far as there are any, going by the first row."""
    columns = [c for c, value in row.items() if _is_file_name(value)]
    if columns == list(row) == ["1", "2"]:  # without a headline
        return "1", "2"
    masks = [c for c in columns if MASK_WORDS & {*words_of(c)}]
    images = [c for c in columns if c not in masks and _FOR_IMAGES & {*words_of(c)}]
    chosen: list[str] = []
    for flag, names, default in (
        ("image_column", images, DataArguments.image_column),
        ("mask_column", masks, DataArguments.mask_column),
    ):
        asked = getattr(data, flag)
        if asked != default and asked not in row:
            raise ValueError(
                f"Expected a column {asked!r} in {path}, got {clipped(', '.join(row), 200)}."
                f"{did_you_mean(asked, row)} Name it with --{flag}."
            )
        names = [asked] if asked in columns else names
        if len(names) > 1:
            raise ValueError(
                f"Expected one column for {flag.removesuffix('_column')}s in {path}, got "
                f"{', '.join(names)}. Say which with --{flag}."
            )
        chosen += names
    return tuple(chosen)


def read_rows(path: Path, *, head: bool = False) -> list[dict[str, str]]:
    """The rows of a csv file (with `,`, `;` or tabs) or of a file of JSON lines, as text.

    Columns without a headline, where the first line holds paths, are called 1, 2, ...

    Args:
        path: of the file.
        head: read no more than the first row.

    Raises:
        ValueError: if it is no such file; names the line.
    """
    lines = _lines(path, head=head)
    if path.suffix.lower() == ".jsonl":
        return [_json_row(line, n, path) for n, line in enumerate(lines, 1) if line.strip()]
    first = lines[0] if lines else ""
    delimiter = max(_DELIMITERS, key=first.count)
    try:
        cells = [row for row in csv.reader(lines, delimiter=delimiter) if any(row)]
    except csv.Error as error:
        raise ValueError(f"Expected a csv file, got {path}: {error}.") from None
    if not cells:
        return []
    columns = [cell.strip() for cell in cells[0]]
    if all(map(_is_file_name, columns)):
        columns = [str(number) for number in range(1, len(columns) + 1)]
    else:
        cells = cells[1:]
    wrong = next((number for number, row in enumerate(cells, 1) if len(row) != len(columns)), None)
    if wrong is not None and not head:  # what is no table of paths may be of any form
        raise ValueError(
            f"Expected {len(columns)} cells in each row of {path}, got "
            f"{len(cells[wrong - 1])} in row {wrong}. Mend the row."
        )
    return [dict(zip(columns, map(str.strip, row), strict=not head)) for row in cells]


def _is_file_name(cell: str) -> bool:
    return Path(cell).suffix.lower() in IMAGE_SUFFIXES | MASK_SUFFIXES


def _lines(path: Path, *, head: bool) -> list[str]:
    if not head:
        return read_regular(path.resolve()).decode("utf-8-sig", errors="replace").splitlines()
    # Other tables, of many MiB, may lie beside the images.
    with os.fdopen(open_regular(path.resolve(), os.O_RDONLY), "rb") as file:
        return file.read(_HEAD).decode("utf-8-sig", errors="replace").splitlines()[:2]


def _json_row(line: str, number: int, path: Path) -> dict[str, str]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        row = None
    if not isinstance(row, dict):
        raise ValueError(f"Expected a JSON object in each line of {path}, got another in {number}.")
    return {str(name): value if isinstance(value, str) else "" for name, value in row.items()}


def _pairs(table: Table, data: DataArguments) -> list[Pair]:
    """The files that a table names, in its order.

    Raises:
        ValueError: if a path leads out of the folder.
        FileNotFoundError: if a file is missing.
    """
    sides = ((table.image, data.image_folder), (table.mask, data.mask_folder))
    images, masks = (_files(table, column, folder) for column, folder in sides)
    return list(zip(images, masks, strict=True))


def _files(table: Table, column: str, folder: str | None) -> list[Path]:
    root = table.path.parent if folder is None else Path(folder)
    if folder is not None and (table.path.parent / folder).is_dir():
        root = table.path.parent / folder
    roots = list(dict.fromkeys([str(root.absolute()), str(root.resolve())]))
    names = [row.get(column, "").replace("\\", "/") for row in table.rows]
    empty = next((number for number, name in enumerate(names, 1) if not name), None)
    if empty is not None or not all(map(str.isprintable, names)):
        wrong = "an empty cell" if empty is not None else "control characters"
        raise ValueError(
            f"Expected a path in each row of the column {column!r} of {table.path}, got {wrong}. "
            "Mend the row, or remove it."
        )
    files = [Path(inside(name, roots, str(table.path))) for name in names]
    missing = [name for name, file in zip(names, files, strict=True) if not file.is_file()]
    if missing:
        raise FileNotFoundError(
            f"Expected the files of the column {column!r} of {table.path} in {root}, got none for "
            f"{len(missing)} of {len(names)}: {show_names(missing)}. Say where they are with "
            "--image_folder and --mask_folder."
        )
    return files
