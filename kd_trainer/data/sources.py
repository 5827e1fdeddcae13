"""Every source as rows with an image and a mask: folders, tables, parquet files, the Hub."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub import constants

from kd_trainer.data.coco import (
    coco_class_names,
    coco_label_count,
    is_coco_folder,
    load_coco,
)
from kd_trainer.data.columns import class_names_beside, find_columns
from kd_trainer.data.folder_layouts import Layout
from kd_trainer.data.hold_out import Division, divide
from kd_trainer.data.layouts import (
    MASKS,
    find_layout,
    find_pairs,
    in_pair_folder,
    known_layout,
    say,
    say_split,
    split_of,
)
from kd_trainer.data.listing import (
    MissingSplitError,
    confined,
    did_you_mean,
    is_address_inside,
    missing_path,
    path_dataset,
    show_names,
    split_names,
    stream_shards,
    unlabelled_dataset,
)
from kd_trainer.data.pairing import example
from kd_trainer.data.parquet import has_parquet, load_parquet, parquet_files
from kd_trainer.data.path_tables import TABLE_SUFFIXES
from kd_trainer.data.streaming import stream_lengths, with_lengths
from kd_trainer.data.synthetic import synthetic_splits
from kd_trainer.data_arguments import DataArguments
from kd_trainer.errors import is_own


def load_hub(
    name: str,
    split: str,
    *,
    streaming: bool,
    not_local: str,
    config: str | None = None,
    other_splits: Sequence[str] = (),
) -> Any:
    """Load a split of a data set on the Hub, all columns.

    Args:
        name: `owner/name`.
        split: name of the split.
        streaming: read while iterating, keep nothing.
        not_local: a sentence that says why it is no folder, for the error.
        config: name of the configuration, of a data set that has several.
        other_splits: of the run, for which no other name stands.

    Raises:
        FileNotFoundError: if the Hub cannot be reached or has no such data set.
        ValueError: if the data set has no such split or configuration, or is made of files of
            another place.
    """
    if streaming and "[" in split:  # `datasets` cuts slices of indexed data alone
        whole = split.partition("[")[0]
        raise ValueError(
            f"Expected the whole split {whole} of {name} with --streaming, got {split}. Leave "
            "--streaming out."
        )
    try:
        options = {} if config is None else {"name": config}
        present = _own_files(name, options)
        names = [name for name in split_names(split, other_splits) if name in present]
        taken = names[0] if names else split  # also a part of one (`train[:75%]`)
        loaded = datasets.load_dataset(name, split=taken, streaming=streaming, **options)
        say_split(name, split, taken)
        return loaded
    except (DatasetNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(
            f"Expected a folder, a file or a data set on the Hub, got {name!r}. {not_local} The "
            f"Hub says: {str(error).splitlines()[0]}"
        ) from None
    except ValueError as error:
        if is_own(error):
            raise
        if "onfig" in str(error).splitlines()[0]:
            raise _no_config(name, config) from None
        raise MissingSplitError(
            split,
            f"Expected the split {split!r} of {name} on the Hub, got: {str(error).splitlines()[0]} "
            "Name the splits with --train_split and --eval_split.",
        ) from None


def _no_config(name: str, config: str | None) -> ValueError:
    configs = datasets.get_dataset_config_names(name)
    return ValueError(
        f"Expected one of the {len(configs)} configurations of {name} as --dataset_config, got "
        f"{config or 'none'}. There are {', '.join(configs[:20])}."
        f"{did_you_mean(config or '', configs)}"
    )


def _own_files(name: str, options: Mapping[str, str]) -> list[str]:
    """The splits of a data set on the Hub, as far as its files say them.

    Its card may name files of this machine, or of another place, which is refused: `datasets` would
    read them, with the token of whoever loads it.
    """
    roots = [place for place in hub_places(name) if isinstance(place, str)]
    files = datasets.load_dataset_builder(name, **options).config.data_files or {}
    for file in (str(file) for some in files.values() for file in some):
        if not any(is_address_inside(file, root) for root in roots):
            raise ValueError(
                f"Expected the files of {name} in its own repository, got {file}, which its card "
                "names. Load it from a copy of your own that holds all of its files."
            )
    return [str(split) for split in files]


def hub_places(name: str) -> list[Path | str]:
    """Where the images of a data set on the Hub may lie: in its caches, or in its repository."""
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
        image_column: of the images; see `find_columns`.
        mask_column: of the masks, likewise.
        name: of the data, for messages.
        places: where images may lie that are stored as paths.

    Raises:
        ValueError: if a column is missing or holds no images (lists the columns), or a path leads
            out of the places.
    """
    features = loaded.features
    if features is None:  # a stream without a schema
        features = _features_of(next(iter(loaded), {}))
    images, masks = find_columns(features, image_column, mask_column, name)
    if (images, masks) != (image_column, mask_column):
        say(
            f"{name}: the column {images} holds the images, {masks} the masks. Otherwise: "
            "--image_column, --mask_column."
        )
    kept = loaded.select_columns([images, masks])
    # In two steps, because the old names may be the new ones the other way round.
    kept = kept.rename_columns({images: "image_", masks: "mask_"})
    kept = kept.rename_columns({"image_": "image", "mask_": "mask"})
    return confined(kept, places, name)


def _features_of(row: dict[str, Any]) -> dict[str, Any]:
    """Enough of the schema of one row to choose columns by."""
    kinds: dict[type, Any] = {bytes: datasets.Value("binary"), str: datasets.Value("string")}
    return {
        name: value if isinstance(value, dict) else kinds.get(type(value), type(value))
        for name, value in row.items()
    }


SYNTHETIC_SEED = 0
"""The synthetic images are one data set: runs with other seeds compare on the same images."""

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


@dataclass(frozen=True)
class LoadedSplits:
    """What `load_splits` gives, and what is known about it.

    Attributes:
        splits: the splits by name.
        held_out: the images that were held out to evaluate on; empty where there is a split.
    """

    splits: datasets.DatasetDict | datasets.IterableDatasetDict
    held_out: tuple[str, ...] = ()


def load_splits(
    data: DataArguments, splits: Sequence[str] | None = None
) -> datasets.DatasetDict | datasets.IterableDatasetDict:
    """Load the splits of a data set; images and masks are listed or stored, not decoded.

    Args:
        data: `dataset` is a folder of images and masks, a csv file of their paths, a COCO folder or
            json, a parquet file or folder, a folder of `save_to_disk`, a Hub id, or `synthetic`;
            further fields say which part of it.
        splits: names of the splits; by default `data.train_split` and `data.eval_split`. The
            unlabelled images come after the rows of the split to train on.

    Returns:
        The splits by name, with exactly the columns `image` and `mask`, both
        `datasets.Image(decode=False)`; `mask` is None for unlabelled images. With
        `data.streaming` an IterableDatasetDict. Where the data has no `validation`, that is a share
        of the other split, and the other one the rest of it if both are asked for.

    Raises:
        FileNotFoundError: if a folder or file is missing; names the nearest one.
        ValueError: if files do not pair, a split is empty, or a column or category is unknown.
    """
    return load_source(data, splits).splits


def load_source(data: DataArguments, splits: Sequence[str] | None = None) -> LoadedSplits:
    """`load_splits`, and the names of the images that it has held out."""
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
    # An evaluation of the split that was trained on is an evaluation: its limit comes last.
    limits = {data.train_split: data.max_train_samples, data.eval_split: data.max_eval_samples}
    layout = find_layout(data) if _is_laid_out(data, names) else None
    loaded: dict[str, Any] = {}
    listed: dict[str, Any] = {}
    divided: dict[str, datasets.Dataset] = {}
    held_out: tuple[str, ...] = ()
    folders: tuple[str, ...] = ()
    for name in names:
        try:
            rows, lengths = _labelled(data, name, limits.get(name), layout)
        except MissingSplitError as error:
            division, other = _hold_out(data, name, layout, error)
            divided = {name: division.chosen, other: division.rest}
            held_out, folders = division.names, division.folders
            continue
        listed[name] = rows
        loaded[name] = _finished(data, name, limits.get(name), rows, lengths)
    for name in set(names) & divided.keys():
        loaded[name] = _finished(data, name, limits.get(name), divided[name], None)
    if layout is not None:
        _say_layout(data, layout, listed | divided)
    if divided:
        _say_held_out(data, divided, folders)
    kind = datasets.IterableDatasetDict if data.streaming else datasets.DatasetDict
    return LoadedSplits(kind({name: loaded[name] for name in names}), held_out)


def _hold_out(
    data: DataArguments, name: str, layout: Layout | None, missing: MissingSplitError
) -> tuple[Division, str]:
    """The other split in two, for the missing one and for itself, and its name.

    Raises:
        MissingSplitError: if the other one is missing too, or is a stream, or this one was asked
            for by a name that is no default.
    """
    other = data.train_split if name == data.eval_split else data.eval_split
    if not data.eval_fraction or name != DataArguments.eval_split or other == name:
        raise missing
    try:
        rows, _ = _labelled(data, other, None, layout)
    except MissingSplitError:
        raise missing from None
    if not isinstance(rows, datasets.Dataset):
        raise MissingSplitError(
            name,
            f"Expected a split to evaluate on in {data.dataset} with --streaming, got none, and no "
            "images can be held out of a stream. Leave --streaming out, or name a split with "
            "--eval_split.",
        )
    path = Path(data.dataset)
    return divide(
        rows, path.parent if path.is_file() else path, data.eval_fraction, data.group_by
    ), other


def _say_layout(data: DataArguments, layout: Layout, listed: Mapping[str, Any]) -> None:
    sizes = []
    for name, rows in listed.items():
        with suppress(MissingSplitError):  # one that is held out of another has no name
            sizes.append(f"{len(rows):,} images of {split_of(layout, name, data)}")
    first = next(iter(listed.values()))[0]
    names = example(*(Path(first[side]["path"]) for side in ("image", "mask")))
    names = f", {names}" if names and layout.name == "folders" else ""
    part = "column" if "image_column" in layout.flags else "folder"
    say(
        f"{data.dataset} ({layout.name}): {'; '.join([layout.description + names, *sizes])}.",
        f"Otherwise: --layout, --image_{part}, --mask_{part}, --train_split, --eval_split.",
    )


def _say_held_out(
    data: DataArguments, divided: Mapping[str, datasets.Dataset], folders: Sequence[str]
) -> None:
    (missing, chosen), (other, rest) = divided.items()
    whole = (
        f", as whole folders ({show_names(folders)}), whose images may be alike (--group_by none "
        "takes single images)"
    )
    say(
        f"{data.dataset} has no split {missing!r}: {len(chosen):,} of {len(chosen) + len(rest):,} "
        f"images of {other} are held out to evaluate on, always the same ones"
        f"{whole if folders else ''}. Otherwise: --eval_split, --eval_fraction, --group_by."
    )


def _finished(
    data: DataArguments, split: str, limit: int | None, rows: Any, lengths: list[int] | None
) -> Any:
    """The rows of a split with its limit, as a stream if wanted, and the unlabelled ones."""
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
            lengths = lengths or stream_lengths(rows)
            lengths = None if lengths is None else [*lengths, *more_lengths]
        rows = datasets.concatenate_datasets([rows, more])
    return with_lengths(rows, lengths) if data.streaming and lengths else rows


def _labelled(
    data: DataArguments, split: str, limit: int | None, layout: Layout | None
) -> tuple[Any, list[int] | None]:
    """The rows of the source, a Dataset or a stream, and the shard lengths where known."""
    others = tuple(s for s in (data.train_split, data.eval_split) if s != split)
    if data.dataset == "synthetic":
        _check_no_category(data)
        return _synthetic(data, split), None
    path = Path(data.dataset)
    columns: dict[str, Any] = {"image_column": data.image_column, "mask_column": data.mask_column}
    if not data.dataset or not path.exists():
        rows = _from_hub(data, split, others)
        places = hub_places(data.dataset)
        return two_columns(rows, name=data.dataset, places=places, **columns), None
    if data.dataset_config is not None:
        raise ValueError(
            f"Expected a data set on the Hub with --dataset_config {data.dataset_config}, got "
            f"{data.dataset}. Leave it out."
        )
    if is_coco(data):
        return load_coco(path, split, data, other_splits=others, limit=limit)
    _check_no_category(data)
    if _is_parquet(data, path):
        files = parquet_files(path, split, others)
        rows, lengths = load_parquet(files, streaming=data.streaming)
        root = path.parent if path.is_file() else path
        return two_columns(rows, name=str(path), places=[root], **columns), lengths
    if path.is_file() and path.suffix.lower() not in TABLE_SUFFIXES:
        raise ValueError(
            "Expected a folder, a COCO json or a parquet file as --dataset (or a csv file), got "
            f"{path}."
        )
    if _is_saved(path):
        rows = _first(_from_disk(path, split, others), limit, f"split {split!r} of {path}")
        shard_lengths: list[int] | None = None
        if data.streaming:  # before the paths are looked at, as a stream reads them in its own way
            rows, shard_lengths = _stream(rows)
        return two_columns(rows, name=str(path), places=[path], **columns), shard_lengths
    pairs = find_pairs(data, split, layout)
    if layout is None and (names := example(*pairs[0])):
        say(f"{path}: masks have other names than their images, {names}.", about=f"names in {path}")
    return path_dataset(*zip(*pairs, strict=True)), None


def _is_parquet(data: DataArguments, path: Path) -> bool:
    if data.layout is not None:
        return data.layout == "parquet"
    return path.suffix == ".parquet" or (not _is_pair_folder(data, path) and has_parquet(path))


def _is_saved(path: Path) -> bool:
    return (path / "dataset_dict.json").is_file()


def _is_laid_out(data: DataArguments, names: Sequence[str]) -> bool:
    """Whether the data are files on this disk in another layout than that of a pair folder."""
    path = Path(data.dataset)
    if path.is_file():
        return path.suffix.lower() in TABLE_SUFFIXES
    if not data.dataset or not path.is_dir() or is_coco(data):
        return False
    others = _is_parquet(data, path) or _is_saved(path)
    return not others and not all(in_pair_folder(data, name) for name in names)


def source_layout(data: DataArguments) -> Layout | None:
    """The layout of a local folder or csv file; None for other sources and for pair folders."""
    laid_out = _is_laid_out(data, (data.train_split, data.eval_split))
    return find_layout(data) if laid_out else None


def class_layout(data: DataArguments) -> Layout | None:
    """The layout of a well-known data set, the only one that says its classes; else None."""
    laid_out = _is_laid_out(data, (data.train_split, data.eval_split))
    return known_layout(data) if laid_out else None


def source_class_names(data: DataArguments) -> list[str] | None:
    """Names of the classes that the data itself has, background first; None if it has none."""
    if not data.dataset:
        return None
    if data.class_members is not None and data.class_members.names is not None:
        return None  # the settings have names of their own
    if not is_coco(data):
        names = names_of_values(data)
        if names and data.reduce_labels and len(names) == data.label_count + 1:
            return names[1:]  # value 0, which counts nowhere, has a name too
        return names
    if data.foreground is not None:
        return ["background", data.foreground]
    path = Path(data.dataset)
    names = coco_class_names(path, data.train_split, (data.eval_split,))
    return names[1:] if data.multi_label else names


def known_label_count(data: DataArguments) -> int | None:
    """Classes that settings or source name; None where only the masks can say."""
    if data.num_labels is not None or not data.dataset:
        return data.num_labels
    if is_coco(data):
        return coco_label_count(Path(data.dataset), data)
    named = names_of_values(data)
    return None if named is None else len(named) - bool(data.reduce_labels)


def names_of_values(data: DataArguments) -> list[str] | None:
    """Names of the values in mask files: of the layout, or of an id2label.json; else None."""
    if not data.dataset or data.dataset == "synthetic":
        return None
    layout = class_layout(data)
    if layout is not None and layout.class_names is not None:
        return [*layout.class_names]
    return class_names_beside(data.dataset)


def is_coco(data: DataArguments) -> bool:
    """Whether the masks are drawn from COCO annotations."""
    path = Path(data.dataset)
    if path.suffix == ".json":
        return path.exists()
    if data.layout is not None:
        return data.layout == "coco" and path.is_dir()
    splits = (data.train_split, data.eval_split)
    return path.is_dir() and not _is_pair_folder(data, path) and is_coco_folder(path, splits)


def _is_pair_folder(data: DataArguments, path: Path) -> bool:
    """Whether a split has a folder of masks; stray files of another kind then count for nothing."""
    splits = (data.train_split, data.eval_split)
    return any((path / split / (data.mask_folder or MASKS)).is_dir() for split in splits)


def _check_no_category(data: DataArguments) -> None:
    if data.category is not None:
        raise ValueError(
            f"Expected COCO annotations with --category {' '.join(data.categories)}, got "
            f"{data.dataset}, whose masks say what the foreground is. Leave --category out."
        )


def _synthetic(data: DataArguments, split: str) -> datasets.Dataset:
    drawn = synthetic_splits(
        data.synthetic_train, data.synthetic_eval, size=data.input_size, seed=SYNTHETIC_SEED
    )
    if split not in drawn:
        raise MissingSplitError(
            split, f"Expected a split of the synthetic data ({', '.join(drawn)}), got {split!r}."
        )
    return drawn[split]


def _from_disk(path: Path, split: str, other_splits: Sequence[str]) -> datasets.Dataset:
    saved = datasets.load_from_disk(str(path))
    name = next((name for name in split_names(split, other_splits) if name in saved), None)
    if name is None:
        raise MissingSplitError(
            split,
            f"Expected the split {split!r} in {path}, got {', '.join(saved)}."
            f"{did_you_mean(split, saved)} Name the splits with --train_split and --eval_split.",
        )
    say_split(path, split, name)
    return saved[name]


def _from_hub(data: DataArguments, split: str, other_splits: Sequence[str]) -> Any:
    if not data.dataset:
        raise ValueError(
            "Expected --dataset, got nothing. Name a folder, a file, a data set on the Hub, or "
            "`synthetic`."
        )
    missing = missing_path(Path(data.dataset), "a data set (--dataset)")
    first = Path(data.dataset).parts[0]
    if not _HUB_ID.fullmatch(data.dataset) or (Path(first).is_dir() and first != "."):
        raise missing
    _check_no_category(data)
    return load_hub(
        data.dataset,
        split,
        streaming=data.streaming,
        not_local=f"There is no such path here ({missing}).",
        config=data.dataset_config,
        other_splits=other_splits,
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
