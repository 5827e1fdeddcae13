"""Parquet files of a data set: which ones are a split, and their rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow  # type: ignore[import-untyped]
import pyarrow.parquet  # type: ignore[import-untyped]

from kd_trainer.data.coco import file_for_split
from kd_trainer.data.layouts import say_split
from kd_trainer.data.listing import MissingSplitError, show_names, split_names


def parquet_files(path: Path, split: str, other_splits: Sequence[str]) -> list[Path]:
    """The parquet files of a split, in the order of their names.

    They are `<split>.parquet`, `<split>-*.parquet` or `<split>/*.parquet` in a folder or its
    `data` folder; beside a single file, the file with the other split's name.

    Raises:
        FileNotFoundError: if there are none; says what there is.
    """
    if path.is_file():
        return [file_for_split(path, split, other_splits)]
    for name in split_names(split, other_splits):
        for folder in (path, path / "data"):
            for pattern in (f"{name}.parquet", f"{name}-*.parquet", f"{name}/*.parquet"):
                if files := sorted(folder.glob(pattern)):
                    say_split(path, split, name)
                    return files
    others = sorted(str(p.relative_to(path)) for p in path.rglob("*.parquet"))
    raise MissingSplitError(
        split,
        f"Expected {split}.parquet, {split}-*.parquet or {split}/*.parquet in {path}, got "
        f"{show_names(others)}. Name the splits with --train_split and --eval_split.",
    )


def has_parquet(folder: Path) -> bool:
    """Whether there are parquet files where `parquet_files` looks for them, of any split."""
    patterns = ("*.parquet", "*/*.parquet", "data/*/*.parquet")
    return any(next(folder.glob(pattern), None) is not None for pattern in patterns)


def load_parquet(files: Sequence[Path], *, streaming: bool) -> tuple[Any, list[int]]:
    """Load parquet files as one data set, all columns.

    Returns:
        A Dataset or IterableDataset, and the number of rows of each file.

    Raises:
        ValueError: if a file is no parquet file.
    """
    try:
        lengths = [pyarrow.parquet.read_metadata(file).num_rows for file in files]
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise ValueError(
            f"Expected parquet files, got {show_names(_names(files))}: {error}."
        ) from (None)
    loaded = datasets.load_dataset(
        "parquet", data_files={"train": _names(files)}, split="train", streaming=streaming
    )
    return loaded, lengths


def _names(files: Sequence[Path]) -> list[str]:
    return [str(file) for file in files]
