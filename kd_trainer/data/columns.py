"""Data sets with an image column and a mask column: parquet files and the Hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow  # type: ignore[import-untyped]
import pyarrow.parquet  # type: ignore[import-untyped]
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub import constants

from kd_trainer.data.coco_files import file_for_split
from kd_trainer.data.foreign_paths import confined, is_address_inside
from kd_trainer.data.listing import MissingSplitError, did_you_mean, show_names
from kd_trainer.own_errors import is_own


def parquet_files(path: Path, split: str, other_splits: Sequence[str]) -> list[Path]:
    """The parquet files of a split, in the order of their names.

    They are `<split>.parquet`, `<split>-*.parquet` or `<split>/*.parquet` in a folder or its
    `data` folder; beside a single file, the file with the other split's name.

    Raises:
        FileNotFoundError: if there are none; says what there is.
    """
    if path.is_file():
        return [file_for_split(path, split, other_splits)]
    for folder in (path, path / "data"):
        for pattern in (f"{split}.parquet", f"{split}-*.parquet", f"{split}/*.parquet"):
            if files := sorted(folder.glob(pattern)):
                return files
    found = sorted(str(p.relative_to(path)) for p in path.rglob("*.parquet"))
    raise MissingSplitError(
        split,
        f"Expected {split}.parquet, {split}-*.parquet or {split}/*.parquet in {path}, got "
        f"{show_names(found)}. Name the splits with --train_split and --eval_split.",
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


def load_hub(name: str, split: str, *, streaming: bool, not_local: str) -> Any:
    """Load a split of a data set on the Hub, all columns.

    Args:
        name: `owner/name`.
        split: name of the split.
        streaming: read while iterating, keep nothing.
        not_local: a sentence that says why it is no folder, for the error.

    Raises:
        FileNotFoundError: if the Hub cannot be reached or has no such data set.
        ValueError: if the data set has no such split, or is made of files of another place.
    """
    if streaming and "[" in split:  # `datasets` cuts slices of indexed data alone
        whole = split.partition("[")[0]
        raise ValueError(
            f"Expected the whole split {whole} of {name} with --streaming, got {split}. Leave "
            "--streaming out."
        )
    try:
        _check_own_files(name)
        return datasets.load_dataset(name, split=split, streaming=streaming)
    except (DatasetNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(
            f"Expected a folder, a file or a data set on the Hub, got {name!r}. {not_local} The "
            f"Hub says: {str(error).splitlines()[0]}"
        ) from None
    except ValueError as error:
        if is_own(error):
            raise
        raise MissingSplitError(
            split,
            f"Expected the split {split!r} of {name} on the Hub, got: {str(error).splitlines()[0]} "
            "Name the splits with --train_split and --eval_split.",
        ) from None


def _check_own_files(name: str) -> None:
    """Refuse a data set on the Hub whose card names files of this machine, or of another place.

    `datasets` would read them, with the token of whoever loads it.
    """
    roots = [place for place in hub_places(name) if isinstance(place, str)]
    files = datasets.load_dataset_builder(name).config.data_files or {}
    for file in (str(file) for some in files.values() for file in some):
        if not any(is_address_inside(file, root) for root in roots):
            raise ValueError(
                f"Expected the files of {name} in its own repository, got {file}, which its card "
                "names. Load it from a copy of your own that holds all of its files."
            )


def hub_places(name: str) -> list[Path | str]:
    """Where the pictures of a data set on the Hub may lie: in its caches, or in its repository."""
    cache = Path(constants.HF_HUB_CACHE) / f"datasets--{name.replace('/', '--')}"
    unpacked = Path(datasets.config.EXTRACTED_DATASETS_PATH)
    address = f"hf://datasets/{name}"
    return [cache, unpacked, f"{address}@", f"{address}/"]


def two_columns(
    loaded: Any,
    *,
    image_column: str,
    mask_column: str,
    name: str,
    places: Sequence[Path | str] = (),
) -> Any:
    """Keep the two columns, named `image` and `mask`, as undecoded images.

    Args:
        loaded: a Dataset or an IterableDataset.
        image_column: of the photographs.
        mask_column: of the masks.
        name: of the data, for messages.
        places: where pictures may lie that are stored as paths.

    Raises:
        ValueError: if a column is missing or holds no images (lists the columns), or a path leads
            out of the places.
    """
    features = loaded.features
    if features is None:  # a stream without a schema
        features = _features_of(next(iter(loaded), {}))
    for column, flag in ((image_column, "image_column"), (mask_column, "mask_column")):
        if column not in features:
            raise ValueError(
                f"Expected a column {column!r} in {name}, got {', '.join(features)}."
                f"{did_you_mean(column, features)} Name it with --{flag}."
            )
        if not _holds_images(features[column]):
            raise ValueError(
                f"Expected images in the column {column!r} of {name}, got {features[column]}. "
                f"Name another column with --{flag}."
            )
    if image_column == mask_column:
        raise ValueError(f"Expected two columns, got {image_column!r} for image and mask.")
    kept = loaded.select_columns([image_column, mask_column])
    # In two steps, because the old names may be the new ones the other way round.
    kept = kept.rename_columns({image_column: "image_", mask_column: "mask_"})
    kept = kept.rename_columns({"image_": "image", "mask_": "mask"})
    return confined(kept, places, name)


def _features_of(row: dict[str, Any]) -> dict[str, Any]:
    """Enough of the schema of one row to choose columns by."""
    kinds: dict[type, Any] = {bytes: datasets.Value("binary"), str: datasets.Value("string")}
    return {
        name: value if isinstance(value, dict) else kinds.get(type(value), type(value))
        for name, value in row.items()
    }


def _holds_images(feature: Any) -> bool:
    if isinstance(feature, datasets.Image):
        return True
    if isinstance(feature, dict):
        return set(feature) == {"bytes", "path"}
    return isinstance(feature, datasets.Value) and feature.dtype in ("string", "binary")
