"""Pair folders: `<split>/images/NAME.jpg` with `<split>/masks/NAME.png`."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import datasets

from kd_trainer.data.listing import (
    MASK_SUFFIXES,
    MissingSplitError,
    did_you_mean,
    list_images,
    path_dataset,
    show_names,
    subfolders,
)


def load_pair_folder(
    root: Path, split: str, *, image_folder: str, mask_folder: str
) -> datasets.Dataset:
    """Pair the photographs and masks of one split by their stems; reads no file.

    Args:
        root: the folder that holds the splits.
        split: name of the split's folder.
        image_folder: name of the folder of photographs inside it.
        mask_folder: name of the folder of masks beside that.

    Returns:
        Rows sorted by file name, with the columns `image` and `mask`.

    Raises:
        FileNotFoundError: if one of the folders is missing; says what was found.
        ValueError: if the split is empty, a stem occurs twice, or a partner is missing.
    """
    folder = root / split
    _check_folders(root, split, image_folder, mask_folder)
    images = _by_stem(list_images(folder / image_folder), folder / image_folder)
    masks = _by_stem(list_images(folder / mask_folder, MASK_SUFFIXES), folder / mask_folder)
    if not images:
        raise ValueError(
            f"Expected photographs in {folder / image_folder}, got an empty split. Files directly "
            "in that folder count (jpg, png, webp, bmp, tif, gif), deeper ones do not."
        )
    _check_pairs(images, masks, folder / mask_folder)
    return path_dataset(list(images.values()), [masks[stem] for stem in images])


def _check_folders(root: Path, split: str, image_folder: str, mask_folder: str) -> None:
    folder = root / split
    layout = f"{split}/{image_folder}/NAME.jpg and {split}/{mask_folder}/NAME.png"
    if not folder.is_dir():
        found = subfolders(root)
        raise MissingSplitError(
            split,
            f"Expected {layout} in {root}, got {_found(root, found)}.{did_you_mean(split, found)} "
            "Name the splits with --train_split and --eval_split.",
        )
    for name, flag in ((image_folder, "image_folder"), (mask_folder, "mask_folder")):
        if not (folder / name).is_dir():
            found = subfolders(folder)
            raise FileNotFoundError(
                f"Expected {layout} in {root}, got {_found(folder, found)} in {folder}."
                f"{did_you_mean(name, found)} Name the folder with --{flag}."
            )


def _found(folder: Path, folders: list[str]) -> str:
    if folders:
        return f"the folders {', '.join(folders[:8])}" + (" ..." if len(folders) > 8 else "")
    files = [p.name for p in sorted(folder.iterdir())]
    return f"only the files {show_names(files)}" if files else "an empty folder"


def _by_stem(files: list[Path], folder: Path) -> dict[str, Path]:
    by_stem: dict[str, Path] = {}
    for file in files:
        # A Mac writes é as two characters, others as one: to the eye it is the same name.
        stem = unicodedata.normalize("NFC", file.stem)
        if stem in by_stem:
            raise ValueError(
                f"Expected one file for each name, got {by_stem[stem].name} and {file.name} in "
                f"{folder}. Remove one, or rename it and give it a mask of its own name."
            )
        by_stem[stem] = file
    return by_stem


def _other_side(names: dict[str, Path], partners: dict[str, Path], what: str) -> str:
    """A name of the other side, without a partner if there is one: it shows how names differ."""
    alone = [file.name for stem, file in names.items() if stem not in partners]
    shown = alone or [file.name for file in names.values()]
    return f" ({what if alone else 'there is'}: {shown[0]})" if shown else ""


def _check_pairs(images: dict[str, Path], masks: dict[str, Path], mask_folder: Path) -> None:
    bare = [file.name for stem, file in images.items() if stem not in masks]
    if bare:
        lossy = [p.name for p in list_images(mask_folder, {".jpg", ".jpeg"})]
        hint = f" {lossy[0]} is no mask: JPEG changes values, store PNG." if lossy else ""
        raise ValueError(
            f"Expected a mask of the same stem for each image, got none in {mask_folder} for "
            f"{len(bare)} of {len(images)}: {show_names(bare)}"
            f"{_other_side(masks, images, 'masks without an image')}.{hint} Add the masks, or "
            "move the images to a folder of their own and pass it as --unlabelled."
        )
    orphans = [file.name for stem, file in masks.items() if stem not in images]
    if orphans:
        raise ValueError(
            f"Expected an image of the same stem for each mask, got none for {len(orphans)} of "
            f"{len(masks)} in {mask_folder}: {show_names(orphans)}"
            f"{_other_side(images, masks, 'the images')}. Add the images or remove the "
            "masks."
        )
