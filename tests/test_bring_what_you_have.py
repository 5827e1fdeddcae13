"""Each row of docs/bring_what_you_have.md: its input is drawn, and the row's command reads it."""

from __future__ import annotations

import io
import json
import re
import shlex
import zlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import datasets
import numpy as np
import pytest
import test_class_tables as tables_of_colours
import test_coco_formats as coco
import test_hub_columns as tables
import test_layouts as folders
import test_mask_formats as masks
from PIL import Image
from test_docs import rows
from test_multi_label import write_planes

from kd_trainer.commands.train import run_train
from kd_trainer.config import parse
from kd_trainer.data import TransformedDataset, transforms, with_label_count
from kd_trainer.data.mask_colors import voc_color
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


def label_studio(root: Path, name: str = "result.json") -> None:
    """One file; its paths are those of the server, and its categories begin at 0."""
    categories = [{"id": 0, "name": "cat"}, {"id": 1, "name": "dog"}]
    annotations = [coco.entry(n % 2, coco.SQUARE, n) for n in range(3)]
    coco.write(root, name, "images", annotations, categories=categories, images=3)
    content = json.loads((root / name).read_text())
    for entry in content["images"]:
        entry["file_name"] = f"../../upload/7/{entry['file_name']}"
    (root / name).write_text(json.dumps(content))


def cvat_masks(root: Path) -> None:
    """Three images and coloured masks under one list, as CVAT exports them."""
    names = [f"{n}" for n in range(3)]
    for n, name in enumerate(names):
        for kind, cell in (("JPEGImages", masks.IMAGE), ("SegmentationClass", masks.coloured)):
            (root / kind).mkdir(parents=True, exist_ok=True)
            encoded = cell if isinstance(cell, dict) else cell(masks.ids(n, 3))
            (root / kind / f"{name}.png").write_bytes(encoded["bytes"])
    (root / "ImageSets/Segmentation").mkdir(parents=True)
    (root / "ImageSets/Segmentation/default.txt").write_text("\n".join(names))
    tables_of_colours.table(root / "labelmap.txt", {1: "cat", 2: "dog", 0: "background"})


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
    "DRIVE": (
        lambda root: [
            folders.both(root, "{s}/images/{n}.tif", f"{{s}}/{kind}.png", ("training", "test"))
            for kind in ("mask/{n}_mask", "1st_manual/{n}_manual1")
        ],
        (3, 3),
        2,
    ),
    "a folder more on both sides": (laid_out(*folders.LAYOUTS["cities"]), (3, 3), 2),
    "both in one folder": (laid_out("{n}.jpg", "{n}_mask.png", "x"), HELD_OUT, 2),
    "both in one folder, told apart by the ending": (
        laid_out(*folders.LAYOUTS["beside, ending"]),
        (3, 3),
        2,
    ),
    "splits in the names of the images": (
        laid_out("images/{s}_{n}.jpg", "masks/{s}_{n}.png"),
        (3, 3),
        2,
    ),
    "no splits": (laid_out("images/{n}.jpg", "masks/{n}.png", "x"), HELD_OUT, 2),
    "no splits, several images of a patient": (
        laid_out("images/patient{s}_{n}.png", "masks/patient{s}_{n}.png", "1", "2", "3"),
        (6, 3),
        2,
    ),
    "no splits, a folder a patient": (
        laid_out("images/patient{s}/{n}.png", "masks/patient{s}/{n}.png", "7", "8", "9"),
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
    "COCO whose validation file lacks some categories, or numbers them anew": (
        lambda root: [
            coco.write(root, "annotations/train.json", "images/train", coco.ANNOTATIONS),
            coco.write(
                *(root, "annotations/val.json", "images/val", [coco.entry(1, coco.SQUARE)]),
                categories=coco.FEWER,
            ),
        ],
        (2, 2),
        4,
    ),
    "COCO whose categories make fewer classes": (published, (2, 2), 3),
    "Roboflow, COCO export": (
        coco_folder("{}/_annotations.coco.json", "{}", "train", "valid"),
        (2, 2),
        4,
    ),
    "Label Studio, COCO export": (label_studio, HELD_OUT, 3),
    "CVAT, COCO export": (
        partial(label_studio, name="annotations/instances_default.json"),
        HELD_OUT,
        3,
    ),
    "CVAT, segmentation masks": (cvat_masks, HELD_OUT, 3),
    "one COCO file by any other name, without splits": (
        lambda file: label_studio(file.parent, file.name),
        HELD_OUT,
        3,
    ),
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
    "class ids with a gap": (values(0, 1, 2, 4), 4),
    "class ids with large gaps": (values(0, 11, 20), 21),
    "class ids from 1, no 0": (values(1, 2, 3), 3),
    "class ids from 1, 0 is not labelled": (values(0, 1, 2, 3), 3),
    "further values that count nowhere": (values(0, 1, 2, 3, 4), 4),
    "any other values": (values(0, 50, 100, 200), 4),
    "more classes than wanted": (values(0, 1, 2, 3, 9), 2),
    "palette PNG": (pairs(palette, classes=4), 4),
    "colours": (pairs(masks.coloured, classes=4), 4),
    "colours with a table of their classes beside them": (
        lambda root: [
            pairs(masks.coloured, classes=4)(root),
            tables_of_colours.table(root / "class_dict.csv"),
        ],
        3,
    ),
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


# --- newcomers ------------------------------------------------------------------------------------


def photo(file: Path, mask: np.ndarray) -> None:
    """An image that shows what its mask says, on noise of its own."""
    seed = zlib.crc32(f"{file.parent.name}/{file.name}".encode())
    noise = np.random.default_rng(seed).integers(0, 100, (*mask.shape, 3), np.uint8)
    file.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(file), noise + (mask[..., None] * 40 % 150).astype(np.uint8))


def pair(image: Path, mask: Path, labels: np.ndarray) -> None:
    photo(image, labels)
    mask.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(mask), labels)


def voc_newcomer(root: Path) -> None:
    """As it is published: palette files of 21 classes whose border counts nowhere."""
    colours = [c >> shift & 255 for c in map(voc_color, range(256)) for shift in (16, 8, 0)]
    place = root / "VOC2012"
    for split, count in (("train", 6), ("val", 3)):
        names = [f"2007_{split}_{n}" for n in range(count)]
        for n, name in enumerate(names):
            labels = np.uint8([0, 15, 7 + n, 255])[masks.ids(n, 4)]
            photo(place / f"JPEGImages/{name}.jpg", labels)
            image = Image.fromarray(labels).convert("P")
            image.putpalette(colours)
            (place / "SegmentationClass").mkdir(exist_ok=True)
            image.save(place / f"SegmentationClass/{name}.png")
        (place / "ImageSets/Segmentation").mkdir(parents=True, exist_ok=True)
        (place / f"ImageSets/Segmentation/{split}.txt").write_text("\n".join(names) + "\n")


def cityscapes_newcomer(root: Path) -> None:
    """As it is published, with label ids alone."""
    for split, city, count in (("train", "aachen", 6), ("val", "lindau", 3)):
        for n in range(count):
            stem = f"{city}_00000{n}_000019"
            labels = np.uint8([7, 26, 24, 3])[masks.ids(n, 4)]
            drawn = root / f"gtFine/{split}/{city}/{stem}_gtFine_labelIds.png"
            pair(root / f"leftImg8bit/{split}/{city}/{stem}_leftImg8bit.png", drawn, labels)


def camvid_newcomer(root: Path) -> None:
    """Twelve class ids, the last of which is 'void'."""
    for split, count in (("train", 6), ("val", 3)):
        for n in range(count):
            labels = np.uint8([0, 1 + n % 5, 6 + n % 5, 11])[masks.ids(n, 4)]
            pair(root / f"{split}/{n}.png", root / f"{split}annot/{n}.png", labels)


def kaggle_newcomer(root: Path) -> None:
    """Car images and masks side by side, and no split."""
    for n in range(12):
        labels = masks.ids(n) * np.uint8(255)
        pair(root / f"train/car_{n:02}.jpg", root / f"train_masks/car_{n:02}_mask.png", labels)


def roboflow_newcomer(root: Path) -> None:
    """Three splits, and the category that groups the others."""
    names = ("animals", "cat", "dog")
    categories = [
        {"id": i, "name": name, "supercategory": "animals" if i else "none"}
        for i, name in enumerate(names)
    ]
    for split, count in (("train", 6), ("valid", 3), ("test", 3)):
        annotations = [coco.entry(1 + n % 2, coco.SQUARE, n) for n in range(count)]
        annotations += [coco.entry(2 - n % 2, coco.OTHER, n) for n in range(count)]
        file = f"{split}/_annotations.coco.json"
        coco.write(root, file, split, annotations, categories=categories, images=count)
        for n in range(count):
            photo(root / split / f"{n}.png", np.full((coco.SIDE, coco.SIDE), n, np.uint8))


NEWCOMERS = {
    "VOC": (voc_newcomer, 21),
    "Cityscapes": (cityscapes_newcomer, 19),
    "CamVid": (camvid_newcomer, 12),
    "Kaggle": (kaggle_newcomer, 2),
    "Roboflow": (roboflow_newcomer, 3),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NEWCOMERS)
def test_a_newcomer_gets_from_one_command_to_a_report(name, tmp_path, capfd):
    """The flags are those that everybody gives; all else has to be found, and nothing refused."""
    draw, classes = NEWCOMERS[name]
    draw(tmp_path / "data")
    small = "--student_encoder resnet18 --encoder_weights none --image_size 64 --epochs 1"
    flags = ["--dataset", str(tmp_path / "data"), "--output_dir", str(tmp_path / "run")]
    run = parse([*flags, "--teacher", "none", *small.split(), "--batch_size", "2"])
    results = run_train(run)
    config = json.loads((tmp_path / "run/student/config.json").read_text())
    assert len(config["id2label"]) == classes
    assert 0 <= results["student_miou"] <= 1
    assert "<html" in (tmp_path / "run/report.html").read_text(encoding="utf-8")
