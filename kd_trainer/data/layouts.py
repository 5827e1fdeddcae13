"""How a folder of images and masks, or a table of their paths, is laid out: found, said, chosen."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist
from tqdm import tqdm

from kd_trainer.data.folder_layouts import Layout, pairs_in, read_folders, split_in
from kd_trainer.data.known_layouts import read_cityscapes, read_voc
from kd_trainer.data.listing import (
    MissingSplitError,
    did_you_mean,
    show_names,
    split_names,
    subfolders,
)
from kd_trainer.data.pairing import Pair
from kd_trainer.data.path_tables import read_csv_files, read_metadata
from kd_trainer.data_arguments import DataArguments
from kd_trainer.errors import printable

IMAGES, MASKS = "images", "masks"
_SAID: set[str] = set()


def in_pair_folder(data: DataArguments, split: str) -> bool:
    """Whether the folder of a split has one of images and one of masks, by the usual names."""
    folder = Path(data.dataset) / split
    images, masks = data.image_folder or IMAGES, data.mask_folder or MASKS
    return data.layout in (None, "folders") and all((folder / n).is_dir() for n in (images, masks))


def find_pairs(data: DataArguments, split: str, layout: Layout | None) -> list[Pair]:
    """The images and masks of a split of a local data set, in a fixed order; reads no image.

    Args:
        data: the settings.
        split: goes by any of its usual names (`split_names`).
        layout: of the data, where it is more than a pair folder.

    Raises:
        MissingSplitError: if there is no such split.
        FileNotFoundError: if a folder or a file is missing.
        ValueError: if what was found does not pair.
    """
    if layout is None or in_pair_folder(data, split):
        folder = Path(data.dataset) / split
        return pairs_in(
            folder / (data.image_folder or IMAGES), folder / (data.mask_folder or MASKS)
        )
    return layout.splits[split_of(layout, split, data)]()


def find_layout(data: DataArguments) -> Layout:
    """How a local folder or csv file is laid out.

    Raises:
        FileNotFoundError: if no layout fits; says what was looked for and what there is.
        ValueError: if several do; lists them.
    """
    root = Path(data.dataset)
    readings = [layout for layout in _readings(root, data) if layout is not None]
    if not readings:
        check_folders(data, data.train_split)
        raise FileNotFoundError(
            f"Expected images and masks in {root}"
            f"{f' in the layout {data.layout}' if data.layout else ''}, got none that belong "
            "together. Name the folders with --image_folder and --mask_folder."
        )
    table, folders = readings[0], readings[-1]
    if table is not folders and not _lists_the_same(table, folders):
        raise ValueError(
            f"Expected one way to read {root}, got {table.name} ({table.description}) and "
            f"{folders.name} ({folders.description}), which differ. Choose one with --layout."
        )
    return table


def known_layout(data: DataArguments) -> Layout | None:
    """The layout of a folder as that of a well-known data set, which may say what its classes are.

    None if it is another one. Looks into few folders, where `find_layout` walks through all.
    """
    root, layout = Path(data.dataset), None
    if root.is_dir() and data.layout in (None, "voc"):
        layout = read_voc(root, data.image_folder, data.mask_folder)
    if root.is_dir() and layout is None and data.layout in (None, "cityscapes"):
        layout = None if data.mask_folder else read_cityscapes(root)
    return layout


def _readings(root: Path, data: DataArguments) -> list[Layout | None]:
    if root.is_file():
        return [read_csv_files(root, data)]
    if (known := known_layout(data)) is not None:  # more than its folders say
        return [known]
    splits = (data.train_split, data.eval_split)
    readers: dict[str, Callable[[], Layout | None]] = {
        "metadata": lambda: read_metadata(root, data),
        "csv": lambda: read_csv_files(root, data),
        "folders": lambda: read_folders(
            root, image_folder=data.image_folder, mask_folder=data.mask_folder, splits=splits
        ),
    }
    if data.layout is not None:
        return [readers[data.layout]()] if data.layout in readers else []
    for name in ("metadata", "csv"):
        layout = readers[name]()
        if layout is not None:
            return [layout, readers["folders"]()]
    return [readers["folders"]()]


def _lists_the_same(table: Layout, folders: Layout) -> bool:
    """Whether a table names nothing but pairs that the folders show too; it may leave some out."""

    def pairs(layout: Layout) -> set[tuple[str, ...]]:
        files = (pair for split in layout.splits.values() for pair in split())
        return {tuple(os.path.abspath(file) for file in pair) for pair in files}  # noqa: PTH100

    try:
        return pairs(table) <= pairs(folders)
    except ValueError:  # the folders hold more than the pairs that somebody has listed
        return True


def split_of(layout: Layout, split: str, data: DataArguments) -> str:
    """What a split is called in a layout.

    Raises:
        MissingSplitError: if it has no such split.
        ValueError: if that split has images and no masks.
    """
    known = {name.casefold(): name for name in layout.splits}
    for name in split_names(split):
        if name.casefold() in known:
            return known[name.casefold()]
        if name in layout.without_masks and (name == split or not name.startswith("test")):
            if (Path(data.dataset) / name).is_dir():
                check_folders(data, name)
            raise ValueError(
                f"Expected masks for the images in {layout.without_masks[name]}, got none, while "
                f"other splits have some ({layout.description}). Add them, or name another split "
                "with --eval_split."
            )
    if "train" in split_names(split) and len(known) == 1 and split_in(*known) is None:
        return known.popitem()[1]  # the one list of an export, such as default
    if (Path(data.dataset) / split).is_dir():
        check_folders(data, split)
    raise MissingSplitError(
        split,
        f"Expected the split {split!r} in {data.dataset}, got {', '.join(layout.splits)} "
        f"({layout.description}).{did_you_mean(split, layout.splits)} Name the splits with "
        "--train_split and --eval_split.",
    )


def check_folders(data: DataArguments, split: str) -> None:
    """Say which folders are missing of those that a split has in a pair folder.

    Raises:
        MissingSplitError: if there is no folder of the split.
        FileNotFoundError: if it lacks the folder of images or that of masks.
    """
    root, folder = Path(data.dataset), Path(data.dataset) / split
    sides = {"image_folder": data.image_folder or IMAGES, "mask_folder": data.mask_folder or MASKS}
    layout = " and ".join(
        f"{split}/{name}/NAME.{end}"
        for name, end in zip(sides.values(), ("jpg", "png"), strict=True)
    )
    if not folder.is_dir():
        folders = subfolders(root)
        raise MissingSplitError(
            split,
            f"Expected {layout} in {root}, got {_content(root, folders)}."
            f"{did_you_mean(split, folders)} Name the splits with --train_split and --eval_split.",
        )
    for flag, name in sides.items():
        if not (folder / name).is_dir():
            folders = subfolders(folder)
            raise FileNotFoundError(
                f"Expected {layout} in {root}, got {_content(folder, folders)} in {folder}."
                f"{did_you_mean(name, folders)} Name the folder with --{flag}."
            )


def _content(folder: Path, folders: list[str]) -> str:
    if folders:
        return f"the folders {', '.join(folders[:8])}" + (" ..." if len(folders) > 8 else "")
    files = [p.name for p in sorted(folder.iterdir())]
    return f"only the files {show_names(files)}" if files else "an empty folder"


def say(*lines: str, about: str = "") -> None:
    """Print what was understood on the main process, once, or once about the same thing."""
    text = "\n".join(map(printable, lines))
    if (about or text) not in _SAID and not (
        dist.is_available() and dist.is_initialized() and dist.get_rank()
    ):
        tqdm.write(text, file=sys.stderr)
    _SAID.add(about or text)


def say_split(source: Path | str, split: str, name: str) -> None:
    """Say which split is taken, where it goes by another name."""
    if name != split:
        say(f"{source}: {name} is the split {split}. Otherwise: --train_split, --eval_split.")
