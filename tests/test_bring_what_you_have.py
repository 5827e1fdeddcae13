"""Each row of docs/bring_what_you_have.md: its input is drawn, and the row's command reads it."""

from __future__ import annotations

import io
import json
import re
import shlex
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import datasets
import numpy as np
import pytest
import test_coco_formats as coco
import test_hub_columns as tables
import test_layouts as folders
import test_mask_formats as masks
from PIL import Image
from test_docs import rows
from test_multi_label import write_planes

from kd_trainer.config import parse
from kd_trainer.data import TransformedDataset, transforms, with_label_count
from kd_trainer.data.sources import load_source

Drawer = Callable[[Path], object]

PAGE = (Path(__file__).parents[1] / "docs/bring_what_you_have.md").read_text(encoding="utf-8")
HEADINGS = ("your data", "your masks", "your images", "your teacher", "the student you want")
HELD_OUT = (2, 1)  # of three images without a split to evaluate on

nothing_said_before = folders.nothing_said_before


def commands(heading: str) -> dict[str, list[str]]:
    """The flags of each row of a table, by its first cell up to a colon."""
    found = {}
    for first, cell, *_ in rows(PAGE, heading):
        (command,) = re.findall(r"`kd-trainer train (.+?)`", cell)
        name = first.partition(":")[0]
        assert name not in found
        found[name] = shlex.split(command)
    return found


LAYOUTS, MASKS = commands("your data"), commands("your masks")


# --- layouts --------------------------------------------------------------------------------------


def laid_out(image: str, mask: str, *splits: str) -> Drawer:
    """Three images a split; `{s}` is the split and `{n}` a number of it."""
    return lambda root: folders.both(root, image, mask, splits or ("train", "val"))


def voc(root: Path) -> None:
    place = root / "VOC2012"
    for split, names in {"train": "abc", "val": "de"}.items():
        for name in names:
            folders.draw(place, f"JPEGImages/{name}.jpg")
            folders.draw(place, f"SegmentationClass/{name}.png", value=15)
        lists = place / "ImageSets/Segmentation"
        lists.mkdir(parents=True, exist_ok=True)
        (lists / f"{split}.txt").write_text("\n".join(names))


def image_folder(root: Path) -> None:
    for split in ("train", "validation"):
        folders.draw(root / split, "a.jpg", "b.jpg", "a_m.png", "b_m.png")
        pairs = [("a.jpg", "a_m.png"), ("b.jpg", "b_m.png")]
        folders.table(root / split, "metadata.csv", pairs, ("file_name", "mask_file_name"))


def csv_file(file: Path, *, folded: bool = True) -> None:
    """A table of three pairs; if not folded, its paths begin in folders that only flags name."""
    pairs = [(f"{n}.jpg", f"m{n}.png") for n in range(3)]
    for image, mask in pairs:
        folders.draw(file.parent, f"photos/{image}", f"drawn/{mask}")
    named = [(f"photos/{i}", f"drawn/{m}") for i, m in pairs]
    folders.table(file.parent, file.name, named if folded else pairs)


def csv_files(root: Path) -> None:
    csv_file(root / "train.csv")
    folders.draw(root, "photos/v.jpg", "drawn/mv.png")
    folders.table(root, "validation.csv", [("photos/v.jpg", "drawn/mv.png")])


def coco_folder(file: str, folder: str, *splits: str) -> Drawer:
    def draw(root: Path) -> None:
        for split in splits:
            coco.write(root, file.format(split), folder.format(split), coco.ANNOTATIONS)

    return draw


published = coco_folder("annotations/instances_{}.json", "{}", "train2017", "val2017")


def label_studio(file: Path) -> None:
    """Its paths are those of the server, and its categories begin at 0."""
    categories = [{"id": 0, "name": "cat"}, {"id": 1, "name": "dog"}]
    annotations = [coco.entry(n % 2, coco.SQUARE, n) for n in range(3)]
    places = (file.parent, file.name, "images", annotations)
    coco.write(*places, categories=categories, images=3)
    content = json.loads(file.read_text())
    for entry in content["images"]:
        entry["file_name"] = f"../../upload/7/{entry['file_name']}"
    file.write_text(json.dumps(content))


def parquet(root: Path) -> None:
    for path, content in tables.both("data").items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content)


def saved(root: Path) -> None:
    file = root.parent / "rows.parquet"
    file.write_bytes(tables.parquet(3))
    split = datasets.Dataset.from_parquet(str(file))
    datasets.DatasetDict({"train": split, "test": split}).save_to_disk(root)


DRAWN_LAYOUTS: dict[str, tuple[Drawer, tuple[int, int], int]] = {
    "pair folder": (
        laid_out("{s}/images/{n}.jpg", "{s}/masks/{n}.png", "train", "validation"),
        (3, 3),
        2,
    ),
    "kind before split": (laid_out(*folders.LAYOUTS["kind first"]), (3, 3), 2),
    "ADE20K": (
        laid_out("images/{s}/{n}.jpg", "annotations/{s}/{n}.png", "training", "validation"),
        (3, 3),
        2,
    ),
    "mmsegmentation": (laid_out(*folders.LAYOUTS["mmsegmentation"]), (3, 3), 2),
    "CamVid": (laid_out(*folders.LAYOUTS["CamVid"]), (3, 3), 2),
    "kind and split in one name": (laid_out(*folders.LAYOUTS["Kaggle"]), (3, 3), 2),
    "nnU-Net, images": (
        laid_out("images{s}/case_{n}_0000.png", "labels{s}/case_{n}.png", "Tr"),
        HELD_OUT,
        2,
    ),
    "ISIC": (laid_out(*folders.LAYOUTS["ISIC"], "Training", "Validation"), (3, 3), 2),
    "a folder more on both sides": (laid_out(*folders.LAYOUTS["cities"]), (3, 3), 2),
    "both in one folder": (laid_out("{n}.jpg", "{n}_mask.png", "x"), HELD_OUT, 2),
    "both in one folder, told apart by the ending": (
        laid_out(*folders.LAYOUTS["beside, ending"]),
        (3, 3),
        2,
    ),
    "no splits": (laid_out("images/{n}.jpg", "masks/{n}.png", "x"), HELD_OUT, 2),
    "no splits, several images of a patient": (
        laid_out("images/patient{s}_{n}.png", "masks/patient{s}_{n}.png", "1", "2", "3"),
        (6, 3),
        2,
    ),
    "folders of names that nobody guesses": (
        laid_out("{s}_rgb_left/{n}.jpg", "{s}_ids/{n}.png"),
        (3, 3),
        2,
    ),
    "masks of two tasks beside each other": (
        lambda root: [
            folders.both(root, "images/{s}/{n}.jpg", f"{kind}/{{s}}/{{n}}.png")
            for kind in ("masks", "labels")
        ],
        (3, 3),
        2,
    ),
    "Pascal VOC": (voc, (3, 2), 21),
    "Cityscapes": (
        lambda root: folders.cityscapes(root, ("labelTrainIds", 13), ("labelIds", 26)),
        (2, 1),
        19,
    ),
    "Cityscapes with `labelIds` alone": (
        lambda root: folders.cityscapes(root, ("labelIds", 26)),
        (2, 1),
        19,
    ),
    "Hugging Face image folder": (image_folder, (2, 2), 2),
    "csv of two columns of paths and, if you like, one called `split`": (csv_file, HELD_OUT, 2),
    "csv files of splits": (csv_files, (3, 1), 2),
    "csv whose files lie elsewhere": (partial(csv_file, folded=False), HELD_OUT, 2),
    "COCO as published": (published, (2, 2), 4),
    "COCO of which one category, or several as one, is the foreground": (published, (2, 2), 2),
    "COCO whose categories make fewer classes": (published, (2, 2), 3),
    "Roboflow, COCO export": (
        coco_folder("{}/_annotations.coco.json", "{}", "train", "valid"),
        (2, 2),
        4,
    ),
    "Label Studio, COCO export": (label_studio, HELD_OUT, 3),
    "parquet": (parquet, (4, 2), 2),
    "folder of `save_to_disk`": (saved, (3, 3), 2),
}
ON_THE_HUB: dict[str, dict[str, Any]] = {
    "Hub, whatever its columns and splits are called": tables.both("data"),
    "Hub, one of several configurations": {
        "README.md": tables.CARD.replace("cars", "small"),
        **tables.both("people"),
        **tables.both("small"),
    },
    "Hub, with names of columns that cannot be guessed": tables.both("data", columns=("a", "b")),
}


def test_every_layout_of_the_page_is_drawn_here():
    assert [*DRAWN_LAYOUTS, *ON_THE_HUB] == [*LAYOUTS]


def understood(flags: list[str]) -> tuple[tuple[int, ...], int]:
    """Images of both splits, and classes, as a training finds them; each sample can be made."""
    data = replace(parse(flags).data, image_size=[32])
    splits = load_source(data).splits
    data = with_label_count(splits, data)
    _, evaluation = transforms(splits, data, seed=0)
    for split in splits.values():
        assert all(s["distil_mask"].any() for s in TransformedDataset(split, evaluation))
    return tuple(map(len, splits.values())), data.label_count


@pytest.mark.parametrize("row", DRAWN_LAYOUTS)
def test_the_command_of_a_layout_reads_it(row, tmp_path, monkeypatch, capfd):
    """Who copies the command of a row gets all images of the split, and the classes there are."""
    monkeypatch.chdir(tmp_path)
    draw, images, classes = DRAWN_LAYOUTS[row]
    draw(Path(parse(LAYOUTS[row]).data.dataset))
    assert understood(LAYOUTS[row]) == (images, classes)


@pytest.mark.parametrize("row", ON_THE_HUB)
def test_the_command_of_a_data_set_on_the_hub_reads_it(row, hub, capfd):
    tables.publish(hub, "OWNER/NAME", ON_THE_HUB[row])
    assert understood(LAYOUTS[row]) == ((4, 2), 2)


# --- masks ----------------------------------------------------------------------------------------

SIDE = masks.SIDE


def pairs(*makes: Callable[[np.ndarray], dict[str, Any]], classes: int = 2) -> Drawer:
    """Four and two images with masks, of which each of `makes` encodes its share."""

    def draw(root: Path) -> None:
        for split, count in (("train", 4), ("validation", 2)):
            for kind in ("images", "masks"):
                (root / split / kind).mkdir(parents=True)
            for n in range(count):
                cell = makes[n % len(makes)](masks.ids(n, classes))
                name = f"{n}{Path(cell['path']).suffix}"
                (root / split / "masks" / name).write_bytes(cell["bytes"])
                (root / split / "images" / f"{n}.png").write_bytes(masks.IMAGE["bytes"])

    return draw


def values(*table: int, classes: int | None = None) -> Drawer:
    """Masks that hold these values in place of class ids."""
    wide = np.asarray(table, np.uint8 if max(table) < 256 else np.uint16)
    return pairs(lambda mask: masks.encode(wide[mask]), classes=classes or len(table))


def palette(mask: np.ndarray) -> dict[str, Any]:
    image, stream = Image.fromarray(mask).convert("P"), io.BytesIO()
    image.putpalette(masks.COLORS.tobytes())
    image.save(stream, "PNG")
    return {"bytes": stream.getvalue(), "path": "some.png"}


def shades(mask: np.ndarray) -> dict[str, Any]:
    """A matte: from black to white, but for the mask, which is white."""
    return masks.encode(np.maximum(masks.gradient(mask), mask * np.uint8(255)))


def cut_out(mask: np.ndarray) -> dict[str, Any]:
    noise = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    return masks.encode(np.dstack([noise, mask * np.uint8(255)]))


def fractions(mask: np.ndarray) -> dict[str, Any]:
    return masks.encode(cv2.GaussianBlur(mask.astype(np.float32), (0, 0), 1), "TIFF")


def beside_unlabelled(root: Path) -> None:
    values(0, 255)(root)
    folders.draw(root.parent / "more", "a.jpg", "b.jpg")


DRAWN_MASKS: dict[str, tuple[Drawer, int]] = {
    "0 and 1": (values(0, 1), 2),
    "0 and 255": (values(0, 255), 2),
    "0, 1 and 255 in one mask": (values(0, 1, 255), 2),
    "0, 1 and 255, never 1 and 255 in one mask": (
        pairs(masks.encode, lambda mask: masks.encode(mask * np.uint8(255))),
        2,
    ),
    "files of single bits": (pairs(lambda mask: masks.encode(mask > 0)), 2),
    "two other values": (values(0, 128), 2),
    "0 and 255 with soft edges": (pairs(lambda mask: masks.encode(masks.blurred(mask))), 2),
    "binary JPEG": (pairs(lambda mask: masks.encode(mask * np.uint8(255), "JPEG")), 2),
    "grey levels": (pairs(shades), 2),
    "floats from 0.0 to 1.0 (TIFF, `.npy`)": (pairs(fractions), 2),
    "transparency on one colour": (pairs(partial(masks.with_alpha, 255)), 2),
    "cut-out photos, transparent elsewhere": (pairs(cut_out), 2),
    "one colour on black": (pairs(masks.coloured), 2),
    "class ids from 0, 255 ignored": (values(0, 1, 2, 3, 255), 4),
    "class ids with large gaps": (values(0, 11, 20), 21),
    "class ids from 1, no 0": (values(1, 2, 3), 3),
    "class ids from 1, 0 is not labelled": (values(0, 1, 2, 3), 3),
    "further values that count nowhere": (values(0, 1, 2, 3, 4), 4),
    "any other values": (values(0, 50, 100, 200), 4),
    "more classes than wanted": (values(0, 1, 2, 3, 9), 2),
    "palette PNG": (pairs(palette, classes=4), 4),
    "colours": (pairs(masks.coloured, classes=4), 4),
    "colours with names": (pairs(masks.coloured, classes=4), 2),
    "colours of the palette of Pascal VOC": (pairs(masks.voc, classes=3), 21),
    "floats that are whole numbers (TIFF, `.npy`)": (
        pairs(lambda mask: masks.encode(mask.astype(np.float32), "TIFF"), classes=4),
        4,
    ),
    "`.npy` of ids, bool, or one channel a class (one-hot)": (
        pairs(
            *(
                partial(lambda make, mask: masks.array(make(mask)), masks.ARRAYS[kind][1])
                for kind in ("int64", "one-hot")
            ),
            classes=4,
        ),
        4,
    ),
    "several labels a pixel": (write_planes, 3),
    "images without any masks, beside those with": (beside_unlabelled, 2),
}


def test_all_masks_of_the_page_are_drawn_here():
    assert [*DRAWN_MASKS] == [*MASKS]


@pytest.mark.parametrize("row", DRAWN_MASKS)
def test_the_command_of_masks_reads_them(row, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    draw, classes = DRAWN_MASKS[row]
    draw(Path("photos"))
    unlabelled = 2 if "--unlabelled" in MASKS[row] else 0
    assert understood(MASKS[row]) == ((4 + unlabelled, 2), classes)


# --- all tables -----------------------------------------------------------------------------------


@pytest.mark.parametrize("heading", HEADINGS)
def test_every_command_of_the_page_is_one_that_a_training_takes(heading):
    """Flags that contradict each other, or a recipe, are refused here already."""
    found = commands(heading)
    assert len(found) >= 7
    for flags in found.values():
        run = parse(flags)
        assert run.data.dataset
        assert run.model.teacher or run.model.teacher_maps
