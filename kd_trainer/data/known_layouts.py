"""Layouts of well-known data sets, which many others follow: Pascal VOC and Cityscapes."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from kd_trainer.data.folder_layouts import Layout
from kd_trainer.data.listing import (
    IMAGE_SUFFIXES,
    MASK_SUFFIXES,
    is_inside,
    list_images,
    show_names,
    subfolders,
)
from kd_trainer.data.pairing import Pair
from kd_trainer.errors import clipped
from kd_trainer.files import read_regular

VOC_CLASSES = (
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat"),
    *("chair", "cow", "diningtable", "dog", "horse", "motorbike", "person", "pottedplant"),
    *("sheep", "sofa", "train", "tvmonitor"),
)
_VOC_FOLDER = re.compile(r"VOC20\d\d")
_VOC_STEM = re.compile(r"20\d\d_\d{6}")
_LISTS = "ImageSets/Segmentation"

CITYSCAPES_CLASSES = {
    **{7: "road", 8: "sidewalk", 11: "building", 12: "wall", 13: "fence", 17: "pole"},
    **{19: "traffic light", 20: "traffic sign", 21: "vegetation", 22: "terrain", 23: "sky"},
    **{24: "person", 25: "rider", 26: "car", 27: "truck", 28: "bus", 31: "train"},
    **{32: "motorcycle", 33: "bicycle"},
}
"""Name of each class that is evaluated, by its value in `labelIds`; their order is the train id.

Source: cityscapesScripts, helpers/labels.py.
"""
_CITYSCAPES_IDS = 34  # 0..33; the licence plate, -1, is never drawn
_DEEPEST = 3  # levels of folders, the first included, in which a data set is looked for
_KINDS = ("labelTrainIds", "labelIds")


def places(root: Path, names: Sequence[str]) -> Iterator[Path]:
    """The folder itself, or those up to two below it, that hold all folders of these names."""
    level = [root]
    for _ in range(_DEEPEST):
        found = [place for place in level if all((place / name).is_dir() for name in names)]
        if found:
            yield from found
            return
        level = [place / name for place in level for name in folders_in(place)]


def folders_in(folder: Path) -> list[str]:
    """Names of the visible folders in a folder, sorted; asks the disk for no file by itself."""
    with os.scandir(folder) as entries:
        return sorted(e.name for e in entries if not e.name.startswith(".") and e.is_dir())


def read_voc(root: Path, image_folder: str | None, mask_folder: str | None) -> Layout | None:
    """Pascal VOC: images and masks of all splits in two folders, and a list of names a split.

    Its classes are taken where folder or images are called as there: VOC2012, 2007_000032.

    Args:
        root: of the data set.
        image_folder: what the folder of images is called, or None for JPEGImages.
        mask_folder: what that of masks is called, or None for SegmentationClass.

    Raises:
        ValueError: if there are several; names them.
    """
    sides = (image_folder or "JPEGImages", mask_folder or "SegmentationClass")
    found = [place for place in places(root, sides) if any((place / _LISTS).glob("*.txt"))]
    if not found:
        return None
    if len(found) > 1:
        raise ValueError(
            f"Expected one VOC data set in {root}, got {show_names([p.name for p in found])}. Name "
            "the folder of one as --dataset."
        )
    lists = {path.stem: path for path in sorted((found[0] / _LISTS).glob("*.txt"))}
    # Labelling tools write the same layout for classes of their own.
    its_own = _VOC_FOLDER.fullmatch(found[0].name) or all(
        map(_VOC_STEM.fullmatch, _stems(next(iter(lists.values()))))
    )
    return Layout(
        "voc",
        f"images in {sides[0]}, masks in {sides[1]}, splits in {_LISTS}",
        {split: partial(_voc_pairs, found[0], sides, path) for split, path in lists.items()},
        {"image_folder": sides[0], "mask_folder": sides[1]},
        class_names=VOC_CLASSES if its_own else None,
    )


def _stems(names: Path) -> list[str]:
    text = read_regular(names.resolve()).decode("utf-8-sig", errors="replace")
    return [line.strip() for line in text.splitlines() if line.strip()]


def _voc_pairs(place: Path, sides: tuple[str, str], names: Path) -> list[Pair]:
    """The pairs of a list of names.

    Raises:
        ValueError: if a name leads out of the folder, or is there twice; if the list is empty.
        FileNotFoundError: if an image or a mask is missing.
    """
    stems = _stems(names)
    if not stems:
        raise ValueError(f"Expected a name in each line of {names}, got an empty split.")
    if len({*stems}) < len(stems):
        twice = next(stem for stem in stems if stems.count(stem) > 1)
        raise ValueError(f"Expected each name once in {names}, got {clipped(twice)} twice.")
    for stem in stems:
        if not is_inside(stem) or not stem.isprintable():
            raise ValueError(
                f"Expected names of images without a folder in {names}, got {clipped(stem)!a}."
            )
    endings = ((".jpg", *sorted(IMAGE_SUFFIXES)), (".png", *sorted(MASK_SUFFIXES)))
    images, masks = (
        [_file(place / side, stem, ends) for stem in stems]
        for side, ends in zip(sides, endings, strict=True)
    )
    for side, files in zip(sides, (images, masks), strict=True):
        missing = [stem for stem, file in zip(stems, files, strict=True) if file is None]
        if missing:
            raise FileNotFoundError(
                f"Expected a file for each name of {names} in {place / side}, got none for "
                f"{len(missing)} of {len(stems)}: {show_names(missing)}. Add the files or remove "
                "the lines."
            )
    return [(i, m) for i, m in zip(images, masks, strict=True) if i is not None and m is not None]


def _file(folder: Path, stem: str, endings: Sequence[str]) -> Path | None:
    return next((f for end in endings if (f := folder / f"{stem}{end}").is_file()), None)


def read_cityscapes(root: Path) -> Layout | None:
    """Cityscapes: a folder a city, several masks an image, of which the train ids are taken.

    Where only `labelIds` lie there, the official table says which class they mean.
    """
    place = next(places(root, ("leftImg8bit", "gtFine")), None)
    if place is None:
        return None
    images, masks = place / "leftImg8bit", place / "gtFine"
    splits = sorted(p.name for p in images.iterdir() if (masks / p.name).is_dir())
    kind = next((k for k in _KINDS if next(masks.glob(f"*/*/*_gtFine_{k}.png"), None)), None)
    if kind is None or not splits:
        return None
    by_id = kind == "labelIds"
    ignored = tuple(i for i in range(_CITYSCAPES_IDS) if i not in CITYSCAPES_CLASSES)
    table = ", read by the official table" if by_id else ""
    return Layout(
        "cityscapes",
        f"images in leftImg8bit/SPLIT/CITY, masks in gtFine/SPLIT/CITY (*_{kind}.png{table}); "
        f"{len(CITYSCAPES_CLASSES)} classes",
        {split: partial(_city_pairs, images / split, masks / split, kind) for split in splits},
        class_names=tuple(CITYSCAPES_CLASSES.values()),
        mask_values=tuple(CITYSCAPES_CLASSES) if by_id else None,
        ignored_values=ignored if by_id else (),
    )


def _city_pairs(images: Path, masks: Path, kind: str) -> list[Pair]:
    """The images of all cities of a split with their masks.

    Raises:
        ValueError: if there are none.
        FileNotFoundError: if a mask is missing.
    """
    ending = "_leftImg8bit.png"
    listed = (file for city in subfolders(images) for file in list_images(images / city))
    files = [file for file in listed if file.name.endswith(ending)]
    if not files:
        raise ValueError(f"Expected CITY/NAME{ending} in {images}, got an empty split.")
    named = [
        masks / f.parent.name / f"{f.name.removesuffix(ending)}_gtFine_{kind}.png" for f in files
    ]
    missing = [mask.name for mask in named if not mask.is_file()]
    if missing:
        raise FileNotFoundError(
            f"Expected a mask for each image in {masks}, got none for {len(missing)} of "
            f"{len(files)}: {show_names(missing)}. Add the files, or remove the images."
        )
    return list(zip(files, named, strict=True))
