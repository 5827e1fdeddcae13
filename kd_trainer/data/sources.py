"""`load_splits`: from `--dataset` to a dictionary of splits with the columns image and mask."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets

from kd_trainer.arguments import DataArguments
from kd_trainer.data.coco import coco_class_names, load_coco
from kd_trainer.data.coco_files import is_coco_folder
from kd_trainer.data.columns import (
    has_parquet,
    hub_places,
    load_hub,
    load_parquet,
    parquet_files,
    two_columns,
)
from kd_trainer.data.folders import load_pair_folder
from kd_trainer.data.listing import (
    MissingSplitError,
    did_you_mean,
    missing_path,
    stream_shards,
    unlabelled_dataset,
)
from kd_trainer.data.streaming import stream_lengths, with_lengths
from kd_trainer.data.synthetic import synthetic_splits

SYNTHETIC_SEED = 0
"""The synthetic pictures are one data set: runs with other seeds compare on the same pictures."""

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def load_splits(
    data: DataArguments, splits: Sequence[str] | None = None
) -> datasets.DatasetDict | datasets.IterableDatasetDict:
    """Load the splits of a data set; photographs and masks are listed or stored, not decoded.

    Args:
        data: `dataset` is a pair folder, a COCO folder or json, a parquet file or folder, a folder
            of `save_to_disk`, a Hub id, or `synthetic`; further fields say which part of it.
        splits: names of the splits; by default `data.train_split` and `data.eval_split`. The
            unlabelled photographs come after the rows of the split to train on.

    Returns:
        The splits by name, with exactly the columns `image` and `mask`, both
        `datasets.Image(decode=False)`; `mask` is None for unlabelled photographs. With
        `data.streaming` an IterableDatasetDict.

    Raises:
        FileNotFoundError: if a folder or file is missing; names the nearest one.
        ValueError: if files do not pair, a split is empty, or a column or category is unknown.
    """
    names = tuple(splits) if splits is not None else (data.train_split, data.eval_split)
    if len(set(names)) != len(names):
        raise ValueError(
            f"Expected different splits to train and to evaluate on, got {' and '.join(names)}. "
            "Set --train_split and --eval_split."
        )
    for flag in ("max_train_samples", "max_eval_samples"):
        limit = getattr(data, flag)
        if limit is not None and limit < 1:
            raise ValueError(f"Expected --{flag} of at least 1, got {limit}.")
    loaded = {name: _load_split(data, name) for name in names}
    return (datasets.IterableDatasetDict if data.streaming else datasets.DatasetDict)(loaded)


def _load_split(data: DataArguments, split: str) -> Any:
    # An evaluation of the split that was trained on is an evaluation: its limit comes last.
    limits = {data.train_split: data.max_train_samples, data.eval_split: data.max_eval_samples}
    limit = limits.get(split)
    rows, lengths = _labelled(data, split, limit)
    if isinstance(rows, datasets.Dataset):
        rows = _first(rows, limit, f"split {split!r} of {data.dataset}")
        if data.streaming:
            rows, lengths = _stream(rows)
    elif limit is not None:
        rows, lengths = _first_of_stream(rows, limit, lengths or stream_lengths(rows))
    if data.unlabelled is not None and split == data.train_split:
        more = unlabelled_dataset(data.unlabelled, look=data.on_bad_sample == "error")
        if data.streaming:
            more, more_lengths = _stream(more)
            known = lengths or stream_lengths(rows)
            lengths = None if known is None else [*known, *more_lengths]
        rows = datasets.concatenate_datasets([rows, more])
    return with_lengths(rows, lengths) if data.streaming and lengths else rows


def _labelled(data: DataArguments, split: str, limit: int | None) -> tuple[Any, list[int] | None]:
    """The rows of the source, a Dataset or a stream, and the shard lengths where known."""
    others = tuple(s for s in (data.train_split, data.eval_split) if s != split)
    if data.dataset == "synthetic":
        _check_no_category(data)
        return _synthetic(data, split), None
    path = Path(data.dataset).expanduser()
    columns: dict[str, Any] = {"image_column": data.image_column, "mask_column": data.mask_column}
    if not data.dataset or not path.exists():
        rows = _from_hub(data, split)
        places = hub_places(data.dataset)
        return two_columns(rows, name=data.dataset, places=places, **columns), None
    if is_coco(data):
        return load_coco(
            path,
            split,
            other_splits=others,
            category=data.category,
            num_labels=data.num_labels,
            ignore_index=data.ignore_index,
            limit=limit,
            streaming=data.streaming,
        )
    _check_no_category(data)
    if path.suffix == ".parquet" or (not _is_pair_folder(data, path) and has_parquet(path)):
        files = parquet_files(path, split, others)
        rows, lengths = load_parquet(files, streaming=data.streaming)
        root = path.parent if path.is_file() else path
        return two_columns(rows, name=str(path), places=[root], **columns), lengths
    if path.is_file():
        raise ValueError(
            f"Expected a folder, a COCO json or a parquet file as --dataset, got {path}."
        )
    if (path / "dataset_dict.json").is_file():
        rows = _first(_from_disk(path, split), limit, f"split {split!r} of {path}")
        known: list[int] | None = None
        if data.streaming:  # before the paths are looked at, as a stream reads them in its own way
            rows, known = _stream(rows)
        return two_columns(rows, name=str(path), places=[path], **columns), known
    folders = {"image_folder": data.image_folder, "mask_folder": data.mask_folder}
    return load_pair_folder(path, split, **folders), None


def source_class_names(data: DataArguments) -> list[str] | None:
    """Names of the classes that the data itself has, background first; None if it has none."""
    if not data.dataset or not is_coco(data):
        return None
    if data.category is not None:
        return ["background", data.category]
    path = Path(data.dataset).expanduser()
    return coco_class_names(path, data.train_split, (data.eval_split,))


def is_coco(data: DataArguments) -> bool:
    """Whether the masks are drawn from COCO annotations."""
    path = Path(data.dataset).expanduser()
    if path.suffix == ".json":
        return path.exists()
    splits = (data.train_split, data.eval_split)
    return path.is_dir() and not _is_pair_folder(data, path) and is_coco_folder(path, splits)


def _is_pair_folder(data: DataArguments, path: Path) -> bool:
    """Whether a split has a folder of masks; stray files of another kind then count for nothing."""
    splits = (data.train_split, data.eval_split)
    return any((path / split / data.mask_folder).is_dir() for split in splits)


def _check_no_category(data: DataArguments) -> None:
    if data.category is not None:
        raise ValueError(
            f"Expected COCO annotations with --category {data.category}, got {data.dataset}, whose "
            "masks say what the foreground is. Leave --category out."
        )


def _synthetic(data: DataArguments, split: str) -> datasets.Dataset:
    drawn = synthetic_splits(
        data.synthetic_train, data.synthetic_eval, size=data.image_size, seed=SYNTHETIC_SEED
    )
    if split not in drawn:
        raise MissingSplitError(
            split, f"Expected a split of the synthetic data ({', '.join(drawn)}), got {split!r}."
        )
    return drawn[split]


def _from_disk(path: Path, split: str) -> datasets.Dataset:
    saved = datasets.load_from_disk(str(path))
    if split not in saved:
        raise MissingSplitError(
            split,
            f"Expected the split {split!r} in {path}, got {', '.join(saved)}."
            f"{did_you_mean(split, saved)} Name the splits with --train_split and --eval_split.",
        )
    return saved[split]


def _from_hub(data: DataArguments, split: str) -> Any:
    if not data.dataset:
        raise ValueError(
            "Expected --dataset, got nothing. Name a folder, a file, a data set on the Hub, or "
            "`synthetic`."
        )
    missing = missing_path(Path(data.dataset).expanduser(), "a data set (--dataset)")
    first = Path(data.dataset).parts[0]
    if not _HUB_ID.fullmatch(data.dataset) or (Path(first).is_dir() and first != "."):
        raise missing
    _check_no_category(data)
    return load_hub(
        data.dataset,
        split,
        streaming=data.streaming,
        not_local=f"There is no such path here ({missing}).",
    )


def _first(rows: datasets.Dataset, limit: int | None, name: str) -> datasets.Dataset:
    if not len(rows):
        raise ValueError(f"Expected images in {name}, got an empty split.")
    return rows if limit is None or limit >= len(rows) else rows.select(range(limit))


def _stream(rows: datasets.Dataset) -> tuple[datasets.IterableDataset, list[int]]:
    shards = stream_shards(len(rows))
    lengths = [len(rows) // shards + (i < len(rows) % shards) for i in range(shards)]
    return rows.to_iterable_dataset(num_shards=shards), lengths


def _first_of_stream(rows: Any, limit: int, lengths: list[int] | None) -> tuple[Any, list[int]]:
    if lengths is not None and sum(lengths) <= limit:
        return rows, lengths
    return rows.take(limit), [limit]
