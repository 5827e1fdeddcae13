"""Folders and tables of images and masks as people have them: what is read, said and refused."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import datasets
import numpy as np
import pytest

from kd_trainer.build import evaluation_dataset
from kd_trainer.commands.data import data_main
from kd_trainer.commands.train import prepare
from kd_trainer.config import build, parse
from kd_trainer.data import folder_layouts, layouts, load_splits
from kd_trainer.data.folder_layouts import words_of
from kd_trainer.data.hold_out import folders_of, held_out, row_names
from kd_trainer.data.known_layouts import CITYSCAPES_CLASSES
from kd_trainer.data.listing import MissingSplitError
from kd_trainer.data.mask_files import decode_mask
from kd_trainer.data.pairing import find_naming
from kd_trainer.data.pipeline import mask_rule, with_label_count
from kd_trainer.data.sources import known_label_count, load_source, source_class_names
from kd_trainer.data_arguments import DataArguments
from kd_trainer.files import FolderLock
from kd_trainer.measurement import settings_of_run


@pytest.fixture(autouse=True)
def nothing_said_before(monkeypatch):
    """What was found is said once in a process."""
    monkeypatch.setattr(layouts, "_SAID", set())


def draw(root, *names, value=255):
    """A picture at each of these paths, whatever it is for; half of it has the value."""
    pixels = np.zeros((8, 8), np.uint8)
    pixels[:4] = value
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".npy":
            np.save(path, pixels)
            continue
        assert cv2.imwrite(str(path), pixels)
    return root


def both(root, image, mask, splits=("train", "val"), count=3):
    """Images and masks of splits; `{s}` is the split and `{n}` a number."""
    for split in splits:
        for n in range(count):
            draw(root, *(form.format(s=split, n=f"{split[:1]}{n:02}") for form in (image, mask)))
    return root


def paths(root, split="train", **fields):
    """The pairs of a split, below the root."""
    rows = load_splits(DataArguments(dataset=str(root), **fields), [split])[split]
    cells = [(row["image"]["path"], row["mask"]["path"]) for row in rows]
    return [tuple(str(Path(p).relative_to(root)) for p in cell) for cell in cells]


LAYOUTS = {
    "split first": ("{s}/images/{n}.jpg", "{s}/masks/{n}.png"),
    "kind first": ("images/{s}/{n}.jpg", "masks/{s}/{n}.png"),
    "ADE20K": ("images/{s}ing/{n}.jpg", "annotations/{s}ing/{n}.png"),
    "mmsegmentation": ("img_dir/{s}/{n}.jpg", "ann_dir/{s}/{n}.png"),
    "CamVid": ("{s}/{n}.png", "{s}annot/{n}.png"),
    "Kaggle": ("{s}_images/{n}.jpg", "{s}_masks/{n}.png"),
    "wrapped": ("archive/segmentation/{s}/{n}.jpg", "archive/segmentation/{s}_labels/{n}.png"),
    "ISIC": (
        "ISIC_Task1-2_{s}_Input/{n}.jpg",
        "ISIC_Task1_{s}_GroundTruth/{n}_segmentation.png",
    ),
    "masks inside": ("{s}/{n}.jpg", "{s}/masks/{n}.png"),
    "cities": ("images/{s}/b/{n}.png", "labels/{s}/b/{n}.png"),
    "suffix": ("{s}/images/{n}.jpg", "{s}/masks/{n}_mask.png"),
    "prefixes": ("{s}/images/img_{n}.jpg", "{s}/masks/mask_{n}.png"),
    "ending kept": ("{s}/images/{n}.jpg", "{s}/masks/{n}.jpg.png"),
    "other words": ("{s}/images/{n}_sat.jpg", "{s}/masks/{n}_lbl.png"),
    "beside, suffix": ("{s}/img_{n}.tif", "{s}/img_{n}_masks.tif"),
    "beside, prefix": ("{s}/{n}.jpg", "{s}/mask_{n}.png"),
    "beside, ending": ("{s}/{n}.jpg", "{s}/{n}.png"),
    "upper case": ("Images/{s}/{n}.JPG", "Masks/{s}/{n}.PNG"),
    "other formats": ("{s}/images/{n}.webp", "{s}/masks/{n}.bmp"),
    "arrays": ("images/{s}/{n}.png", "masks/{s}/{n}.npy"),
    "arrays beside": ("{s}/{n}.png", "{s}/{n}.npy"),
    "JPEG masks": ("{s}/images/{n}.png", "{s}/masks/{n}.jpeg"),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_layout_is_found_and_each_image_has_its_own_mask(name, tmp_path):
    """Each was refused before; pairs that are off by one would train on noise."""
    image, mask = LAYOUTS[name]
    splits = ("train", "valid") if name == "ADE20K" else ("train", "val")
    both(tmp_path, image, mask, splits)
    if name == "ADE20K":
        for kind in ("images", "annotations"):
            (tmp_path / kind / "validing").rename(tmp_path / kind / "validation")
    expected = [
        tuple(form.format(s="train", n=f"t{n:02}") for form in (image, mask)) for n in range(3)
    ]
    assert paths(tmp_path) == expected
    assert len(paths(tmp_path, "validation")) == 3


def test_nn_unet_folders_are_found(tmp_path):
    draw(tmp_path, *(f"imagesTr/case_{n}_0000.png" for n in range(3)))
    draw(tmp_path, *(f"labelsTr/case_{n}.png" for n in range(3)))
    assert paths(tmp_path)[1] == ("imagesTr/case_1_0000.png", "labelsTr/case_1.png")


def test_vessels_of_drive_are_what_is_drawn_by_hand_and_not_the_field_of_view(tmp_path, capsys):
    """Both pair with the images; a student of the other one finds a disc."""
    for split, last in (("training", 3), ("test", 2)):
        for n in range(1, last + 1):
            name = f"{split}/{{}}/{n + (20 if split == 'training' else 0):02}_{{}}.png"
            draw(tmp_path, name.format("images", split), name.format("mask", f"{split}_mask"))
            draw(tmp_path, name.format("1st_manual", "manual1"))
    draw(tmp_path, *(f"test/2nd_manual/0{n}_manual2.png" for n in (1, 2)))
    assert paths(tmp_path)[0] == (
        "training/images/21_training.png",
        "training/1st_manual/21_manual1.png",
    )
    assert paths(tmp_path, "validation")[1][1] == "test/1st_manual/02_manual1.png"
    assert "masks in SPLIT/1st_manual" in capsys.readouterr().err
    assert paths(tmp_path, mask_folder="mask")[0][1] == "training/mask/21_training_mask.png"
    shutil.rmtree(tmp_path / "test/1st_manual")  # as the challenge gives it away
    shutil.rmtree(tmp_path / "test/2nd_manual")
    loaded = load_source(DataArguments(dataset=str(tmp_path)))
    assert [len(rows) for rows in loaded.splits.values()] == [2, 1]


def test_what_was_found_is_said_in_two_lines_with_the_way_to_overrule_it(tmp_path, capsys):
    load_splits(DataArguments(dataset=str(both(tmp_path, *LAYOUTS["CamVid"]))))
    said = capsys.readouterr().err.splitlines()
    assert said[0].endswith(
        "(folders): images in SPLIT, masks in SPLITannot; 3 images of train; 3 images of val."
    )
    assert said[1].startswith("Otherwise: --layout, --image_folder")
    load_splits(DataArguments(dataset=str(tmp_path)))
    assert capsys.readouterr().err == ""


def test_a_pair_folder_is_read_as_before_and_silently(pair_folder, capsys):
    """Rows in another order are other batches, and so other weights."""
    draw(pair_folder, "train/labels/person0.png", "train/images_small/person0.png")
    expected = [(f"train/images/person{n}.jpg", f"train/masks/person{n}.png") for n in range(8)]
    assert paths(pair_folder) == expected
    load_splits(DataArguments(dataset=str(pair_folder)))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("mask", ["masks/{s}_{n}.png", "images/{s}_{n}_mask.png"])
def test_names_of_images_may_begin_with_their_split(mask, tmp_path, capsys):
    """Images to evaluate on were trained on, and a share was held out of the mixture."""
    root = both(tmp_path, "images/{s}_{n}.jpg", mask, ("train", "val", "Test"))
    for split, found in (("train", "train"), ("validation", "val"), ("test", "Test")):
        assert [Path(image).name for image, _ in paths(root, split)] == [
            f"{found}_{found[0]}{n:02}.jpg" for n in range(3)
        ]
    load_splits(DataArguments(dataset=str(root)))
    assert "names begin with their split" in capsys.readouterr().err


@pytest.mark.parametrize("others", [["test_1", "bus_1"], ["training", "tested_1"], ["train_7"]])
def test_words_of_splits_in_some_names_are_no_splits(others, tmp_path):
    names = ["train_1", "train_2", *others]
    draw(tmp_path, *(f"{kind}/{name}.png" for name in names for kind in ("images", "masks")))
    splits = load_splits(DataArguments(dataset=str(tmp_path)))
    assert sum(map(len, splits.values())) == len(names)


@pytest.mark.parametrize("name", ["val", "valid", "validation", "dev", "test", "testing"])
def test_the_split_to_evaluate_on_goes_by_its_usual_names(name, tmp_path):
    root = both(tmp_path, *LAYOUTS["split first"], splits=("train", name), count=2)
    assert paths(root, "validation")[0][0].startswith(f"{name}/images")
    loaded = load_source(DataArguments(dataset=str(root)))
    assert loaded.held_out == ()
    assert list(loaded.splits) == ["train", "validation"]


def test_a_split_that_is_named_is_taken_and_a_wrong_name_gets_one_clear_line(tmp_path):
    root = both(tmp_path, *LAYOUTS["kind first"], splits=("train", "val", "test"), count=2)
    assert paths(root, "test", eval_split="test")[0][0].startswith("images/test")
    with pytest.raises(
        FileNotFoundError, match=r"'tset' .* test, train, val .*Did you mean 'test'"
    ):
        paths(root, "tset", eval_split="tset")
    both(root, "images/fold1/{n}.png", "masks/fold1/{n}.png")
    assert len(paths(root, "fold1", train_split="fold1")) == 6


def test_a_test_split_without_masks_is_left_alone_and_one_to_evaluate_on_is_refused(tmp_path):
    root = both(tmp_path, *LAYOUTS["split first"], splits=("train",), count=4)
    draw(root, "test/images/a.jpg")
    assert load_source(DataArguments(dataset=str(root))).held_out
    draw(root, "val/images/a.jpg")
    with pytest.raises(FileNotFoundError, match=r"val/images/NAME.jpg and val/.*--mask_folder"):
        load_splits(DataArguments(dataset=str(root)))
    draw(tmp_path / "b", "images/train/a.jpg", "masks/train/a.png", "images/val/b.jpg")
    with pytest.raises(ValueError, match=r"masks for the images in .*images/val, got none, while"):
        load_splits(DataArguments(dataset=str(tmp_path / "b")))


def test_two_readings_are_listed_and_a_flag_chooses(tmp_path):
    """The first of them would be right by chance."""
    root = both(tmp_path, *LAYOUTS["kind first"], count=2)
    both(root, "images/{s}/{n}.jpg", "labels/{s}/{n}.png", count=2)
    message = r"one folder of masks .* labels/train, masks/train\. Say which with --mask_folder"
    with pytest.raises(ValueError, match=message):
        paths(root)
    assert paths(root, mask_folder="labels")[0][1] == "labels/train/t00.png"
    assert paths(root, mask_folder="masks")[0][1] == "masks/train/t00.png"


def test_folders_that_differ_in_what_follows_are_named_by_their_whole_path(tmp_path):
    draw(tmp_path, "images/a.png", "masks/cat/a.png", "masks/dog/a.png")
    with pytest.raises(ValueError, match=r"Say which with --mask_folder 'masks/cat' or "):
        paths(tmp_path)
    rows = load_splits(DataArguments(dataset=str(tmp_path), mask_folder="masks/cat"), ["train"])
    assert rows["train"][0]["mask"]["path"].endswith("masks/cat/a.png")


def test_doubt_about_other_folders_stops_no_split_that_is_clear(tmp_path):
    root = both(tmp_path, *LAYOUTS["split first"], splits=("train", "val"), count=2)
    draw(root, "images/a.png", "masks/a.png", "labels/a.png", "features/train/a.npy")
    both(root, "images/{s}/{n}.jpg", "masks/{s}/{n}.png", splits=("test",), count=2)
    draw(root, "labels/test/t00.png", "labels/test/t01.png")
    assert len(paths(root, "validation")) == 2
    with pytest.raises(ValueError, match=r"one folder of masks .*labels/test, masks/test"):
        paths(root, "test", eval_split="test")


def test_folders_of_any_name_are_chosen_by_flags(tmp_path):
    root = both(tmp_path, "{s}_rgb_left/{n}.jpg", "{s}_ids/{n}.png", count=2)
    with pytest.raises(FileNotFoundError, match=r"Expected train/images/NAME.jpg and .* got the"):
        paths(root)
    found = paths(root, image_folder="*_rgb_left", mask_folder="*_ids")
    assert found[0] == ("train_rgb_left/t00.jpg", "train_ids/t00.png")


def test_what_systems_leave_is_no_data(tmp_path):
    root = both(tmp_path, *LAYOUTS["kind first"], count=2)
    draw(root, "__MACOSX/images/train/x.png", "images/train/@eaDir/t00.png", ".cache/masks/a.png")
    (root / "images/train/._t00.jpg").write_bytes(b"\0")
    (root / "masks/train/Thumbs.db").write_bytes(b"\0")
    (root / "images/loop").symlink_to(root, target_is_directory=True)
    assert len(paths(root)) == 2


def test_a_missing_partner_is_named_whatever_the_names_are(tmp_path):
    root = both(tmp_path, *LAYOUTS["suffix"], count=4)
    (root / "train/masks/t02_mask.png").unlink()
    with pytest.raises(ValueError, match=r"a mask of the same stem .* 1 of 4: t02.jpg"):
        paths(root)
    draw(root, "train/masks/t02_mask.png", "train/masks/t09_mask.png")
    with pytest.raises(ValueError, match=r"an image of the same stem .* 1 of 5 .*: t09_mask.png"):
        paths(root)


@pytest.mark.parametrize(
    ("images", "masks"), [(["a"], ["b"]), (["a1", "b2"], ["c1", "d2"]), (["a"], ["banana"])]
)
def test_names_that_have_nothing_in_common_are_no_pairs(images, masks):
    left, right = find_naming(images, masks)
    assert {left(name) for name in images} != {right(name) for name in masks}


# --- no split -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("image", "mask"),
    [
        ("images/{n}.jpg", "masks/{n}.png"),
        ("{n}.jpg", "{n}_mask.png"),
        ("train/images/{n}.jpg", "train/masks/{n}.png"),
        ("images/train/{n}.jpg", "masks/train/{n}.png"),
    ],
)
def test_without_a_split_to_evaluate_on_the_same_images_are_always_held_out(
    image, mask, tmp_path, capsys
):
    """Figures of two runs on other images are not comparable, and trained ones are too good."""
    root = both(tmp_path, image, mask, splits=("train",), count=20)
    data = DataArguments(dataset=str(root), eval_fraction=0.25)
    splits = load_splits(data)
    assert "5 of 20 images of train are held out to evaluate on" in capsys.readouterr().err
    names = {n: {row["image"]["path"] for row in rows} for n, rows in splits.items()}
    assert (len(names["train"]), len(names["validation"])) == (15, 5)
    assert not names["train"] & names["validation"]
    shutil.copytree(root, tmp_path.parent / f"{tmp_path.name}_copy")
    data.dataset = str(tmp_path.parent / f"{tmp_path.name}_copy")
    elsewhere = {row["image"]["path"] for row in load_splits(data, ["validation"])["validation"]}
    assert {Path(p).name for p in elsewhere} == {Path(p).name for p in names["validation"]}


def test_an_image_more_moves_no_other_ones_across():
    before = [f"{n}.png" for n in range(200)]
    chosen = {before[i] for i in held_out(before, 0.1, None)}
    after = [*before, "new.png"]
    assert len(chosen - {after[i] for i in held_out(after, 0.1, None)}) <= 1


def test_groups_stay_together_and_a_name_without_group_is_refused(tmp_path):
    """Two slices of one patient on both sides, and the figures are those of training images."""
    names = [f"p{patient}/slice{n}.png" for patient in range(10) for n in range(6)]
    for pattern in (r"^(p\d+)/", r"^p\d+"):
        chosen = {names[i] for i in held_out(names, 0.2, pattern)}
        patients = {name.split("/")[0] for name in chosen}
        assert len(chosen) == 12
        assert len(patients) == 2
    with pytest.raises(ValueError, match=r"--group_by q\(\\d\) to match .* got p0/slice0.png"):
        held_out(names, 0.2, r"q(\d)")
    with pytest.raises(ValueError, match=r"at least 2 groups by --group_by p.* got 1"):
        held_out(names, 0.2, "p")
    with pytest.raises(ValueError, match=r"regular expression as --group_by, got '\('"):
        DataArguments(group_by="(")


def test_whole_folders_are_held_out_where_each_holds_several_images(tmp_path, capsys):
    """Of slices of one patient on both sides the figures are those of training images."""
    for patient in range(5):
        both(tmp_path, f"images/P{patient}/{{n}}.png", f"masks/P{patient}/{{n}}.png", ("x",), 4)
    whole, single = (
        load_splits(DataArguments(dataset=str(tmp_path), eval_fraction=0.4, group_by=group))
        for group in (None, "none")
    )
    counts = [
        {Path(row["image"]["path"]).parent.name for row in splits["validation"]}
        for splits in (whole, single)
    ]
    assert [len(splits["validation"]) for splits in (whole, single)] == [8, 8]
    assert (len(counts[0]), len(counts[1]) > 2) == (2, True)
    said = capsys.readouterr().err
    assert f"as whole folders (images/{min(counts[0])}, images/{max(counts[0])})" in said
    assert said.count("--group_by none takes single images") == 1


@pytest.mark.parametrize(
    ("names", "folders"),
    [
        (["a/p1/s1/1", "a/p1/s2/1", "a/p2/s3/1", "a/p2/s4/1", "a/p3/s5/1", "a/p3/s5/2"], 3),
        (["i/1", "i/2", "i/3", "i/4"], 0),  # one for all
        (["a/1", "a/2", "b/3", "b/4"], 0),  # one of two would be half of them
        (["a/images/1", "b/images/2", "c/images/3"], 0),  # one each
        (["1", "a/2", "a/3", "b/4", "b/5", "c/6"], 0),
    ],
)
def test_which_folders_belong_to_somebody(names, folders):
    assert len({*(folders_of(names) or ())}) == folders


def test_nothing_is_held_out_where_a_split_is_there_or_was_named(tmp_path):
    root = both(tmp_path, *LAYOUTS["split first"], splits=("train",), count=4)
    assert len(paths(root)) == 4  # a training without evaluation
    for fields in ({"eval_split": "test"}, {"eval_fraction": 0.0}):
        with pytest.raises(FileNotFoundError, match="Name the splits with"):
            load_splits(DataArguments(dataset=str(root), **fields))


def test_a_stream_of_listed_files_is_held_out_of_as_well(tmp_path):
    root = both(tmp_path, "images/{n}.jpg", "masks/{n}.png", splits=("train",), count=10)
    rows, stream = (
        load_splits(DataArguments(dataset=str(root), streaming=s)) for s in (False, True)
    )
    for name in rows:
        assert [r["image"]["path"] for r in rows[name]] == [
            r["image"]["path"] for r in stream[name]
        ]


def rows_of(names):
    mask = cv2.imencode(".png", np.eye(8, dtype=np.uint8))[1].tobytes()
    cells = [{"bytes": mask, "path": name} for name in names]
    features = datasets.Features({"image": datasets.Image(), "mask": datasets.Image()})
    return datasets.Dataset.from_dict({"image": cells, "mask": cells}, features=features)


@pytest.mark.parametrize("names", [[f"{n}.png" for n in range(10)], [None] * 10])
def test_a_table_without_a_split_to_evaluate_on_is_held_out_of_as_well(names, tmp_path):
    rows_of(names).to_parquet(tmp_path / "train.parquet")
    for source in (tmp_path, tmp_path / "train.parquet"):
        loaded = load_source(DataArguments(dataset=str(source), eval_fraction=0.3))
        assert {n: len(rows) for n, rows in loaded.splits.items()} == {"train": 7, "validation": 3}
        assert len(loaded.held_out) == 3
        with pytest.raises(MissingSplitError, match="no images can be held out of a stream"):
            load_source(DataArguments(dataset=str(source), streaming=True))


def test_names_of_rows_do_not_depend_on_where_the_data_lies(tmp_path, monkeypatch):
    """The other machine of a user would hold other images out."""
    names = []
    for place in ("a", "b/c"):
        root = draw(tmp_path / place, "x/1.png", "x/2.png")
        table(root, "pairs.csv", [("x/1.png", "x/1.png"), ("x/2.png", "x/2.png")])
        monkeypatch.chdir(root)
        for source in ("pairs.csv", str(root / "pairs.csv")):
            rows = load_splits(DataArguments(dataset=source), ["train"])["train"]
            names += [row_names(rows, Path(source).parent), row_names(rows, root)]
    assert all(some == ["x/1.png", "x/2.png"] for some in names)


def test_what_calibrates_an_export_is_not_what_it_is_measured_on(tmp_path):
    root = both(tmp_path, "images/{n}.png", "masks/{n}.png", splits=("train",), count=10)
    swapped = DataArguments(dataset=str(root), train_split="validation", eval_split="train")
    assert len(evaluation_dataset(swapped, batch_size=1)) == 10
    assert len(evaluation_dataset(swapped, batch_size=1, apart_from="validation")) == 9


# --- VOC and Cityscapes ---------------------------------------------------------------------------


@pytest.fixture(params=["", "VOCdevkit/VOC2012"])
def voc(request, tmp_path):
    root = tmp_path / "data" / request.param
    for n in range(5):
        draw(root, f"JPEGImages/{n}.jpg", f"SegmentationClass/{n}.png")
        draw(root, f"SegmentationObject/{n}.png")
    draw(root, "JPEGImages/of_detection.jpg")
    (root / "ImageSets/Segmentation").mkdir(parents=True)
    for split, numbers in {"train": "3\n1\n2\n", "val": "0\n4\n"}.items():
        (root / f"ImageSets/Segmentation/{split}.txt").write_text(numbers)
    return tmp_path / "data"


def test_voc_lists_say_which_image_is_in_which_split(voc, capsys):
    assert [Path(image).stem for image, _ in paths(voc)] == ["3", "1", "2"]
    assert [Path(mask).parent.name for _, mask in paths(voc, "validation")] == [
        "SegmentationClass"
    ] * 2
    assert "(voc): images in JPEGImages, masks in SegmentationClass" in capsys.readouterr().err
    assert "SegmentationObject" in paths(voc, mask_folder="SegmentationObject")[0][1]


def test_only_what_is_called_as_in_voc_has_its_classes(voc):
    """Labelling tools export their own classes in its layout."""
    data = DataArguments(dataset=str(voc))
    named = DataArguments(dataset=str(voc), num_labels=21)
    if not (voc / "VOCdevkit").exists():
        assert source_class_names(named) is None
        assert with_label_count(load_splits(data), data).num_labels == 2
    for file in [*voc.rglob("JPEGImages/?.jpg"), *voc.rglob("SegmentationClass/?.png")]:
        file.rename(file.with_stem(f"2007_{file.stem:0>6}"))
    for file in voc.rglob("Segmentation/*.txt"):
        file.write_text("".join(f"2007_{n:0>6}\n" for n in file.read_text().split()))
    names = source_class_names(named)
    assert (len(names), names[15]) == (21, "person")
    assert known_label_count(data) == 21


@pytest.mark.parametrize("line", ["../3", "/etc/hostname", "a\\..\\..\\b", "3\n3", "9", ""])
def test_a_voc_list_names_files_of_its_folders_once(voc, line):
    next(voc.rglob("train.txt")).write_text(line)
    with pytest.raises((ValueError, FileNotFoundError), match=r"^Expected .*train\.txt"):
        paths(voc)


def cityscapes(root, *kinds):
    for split, city in (("train", "aachen"), ("train", "bochum"), ("val", "lindau")):
        stem = f"{city}_000000_000019"
        draw(root, f"leftImg8bit/{split}/{city}/{stem}_leftImg8bit.png")
        for kind, value in (("color", 3), ("instanceIds", 4), *kinds):
            draw(root, f"gtFine/{split}/{city}/{stem}_gtFine_{kind}.png", value=value)
    return root


def test_of_the_masks_of_cityscapes_the_train_ids_are_taken(tmp_path):
    root = cityscapes(tmp_path, ("labelTrainIds", 13), ("labelIds", 26))
    assert [mask.split("_gtFine_")[1] for _, mask in paths(root)] == ["labelTrainIds.png"] * 2
    assert len(paths(root, "validation")) == 1


def test_label_ids_of_cityscapes_are_read_by_the_official_table(tmp_path):
    """Value 26 is a car, train id 13; value 0, unlabelled, counts nowhere."""
    data = DataArguments(dataset=str(cityscapes(tmp_path, ("labelIds", 26))), num_labels=19)
    splits = load_splits(data)
    labels = mask_rule(splits, data).labels(decode_mask(splits["train"][0]["mask"], 0), "x")
    assert np.unique(labels).tolist() == [13, 255]
    assert source_class_names(data)[13] == "car"
    assert len(CITYSCAPES_CLASSES) == 19


# --- tables ---------------------------------------------------------------------------------------


def table(root, name, rows, head=("image", "mask"), delimiter=","):
    lines = [delimiter.join(row) for row in ([head] if head else []) + rows]
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text("\n".join(lines) + "\n")
    return root / name


ROWS = [(f"photos/{n}.jpg", f"drawn/m{n}.png") for n in (2, 0, 1)]


@pytest.fixture
def listed(tmp_path):
    draw(tmp_path, *(name for row in ROWS for name in row))
    return tmp_path


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"delimiter": ";"},
        {"head": None},
        {"head": ("file_name", "mask_file_name")},
        {"head": ("filepath", "annotation")},
    ],
)
def test_a_csv_of_paths_is_a_source(how, listed):
    assert paths(table(listed, "pairs.csv", ROWS, **how).parent) == [*ROWS]
    rows = load_splits(DataArguments(dataset=str(listed / "pairs.csv")))
    assert sorted(map(len, rows.values())) == [1, 2]


def test_csv_files_of_splits_belong_together(listed):
    table(listed, "train.csv", ROWS[:2])
    table(listed, "val.csv", ROWS[2:])
    table(listed, "train_rle.csv", [("1.jpg", "1 3 10 2")], ("img", "rle_mask"))
    for source in (listed, listed / "train.csv", listed / "val.csv"):
        splits = load_splits(DataArguments(dataset=str(source)))
        assert {n: len(rows) for n, rows in splits.items()} == {"train": 2, "validation": 1}


def test_a_column_may_say_the_split(listed):
    rows = [(*row, split) for row, split in zip(ROWS, ("train", "val", "train"), strict=True)]
    source = table(listed, "pairs.csv", rows, ("image", "mask", "split"))
    splits = load_splits(DataArguments(dataset=str(source)))
    assert {n: len(rows) for n, rows in splits.items()} == {"train": 2, "validation": 1}


@pytest.mark.parametrize("ending", ["jsonl", "csv"])
def test_metadata_of_an_image_folder_names_the_masks(ending, tmp_path):
    for split in ("train", "validation"):
        draw(tmp_path / split, "a.jpg", "b.jpg", "a_m.png", "b_m.png")
        rows = [("a.jpg", "a_m.png"), ("b.jpg", "b_m.png")]
        head = ("file_name", "mask_file_name")
        if ending == "csv":
            table(tmp_path / split, "metadata.csv", rows, head)
        else:
            lines = [json.dumps(dict(zip(head, row, strict=True)) | {"id": 3}) for row in rows]
            (tmp_path / split / "metadata.jsonl").write_text("\n".join(lines))
    assert paths(tmp_path)[1] == ("train/b.jpg", "train/b_m.png")
    assert len(paths(tmp_path, "validation")) == 2


@pytest.mark.parametrize("path", ["../secret.png", "{secret}", "a\\..\\..\\secret.png"])
def test_a_table_leads_nowhere_else(path, tmp_path):
    """Whoever trains on a stranger's table would publish what it names in a report."""
    draw(tmp_path, "secret.png")
    root = draw(tmp_path / "data", "m.png")
    table(root, "pairs.csv", [(path.format(secret=tmp_path / "secret.png"), "m.png")])
    with pytest.raises(ValueError, match=r"^Expected paths inside .*, which leads out of it"):
        paths(root)
    for fields in ({}, {"mask_folder": str(root)}):
        with pytest.raises(ValueError, match="leads out of it"):
            load_splits(DataArguments(dataset=str(root / "pairs.csv"), **fields))


def test_a_folder_that_the_user_names_is_one_where_paths_may_lie(tmp_path):
    for name in ("photos/0.jpg", "drawn/0.png"):
        draw(tmp_path, name)
    fields = {"image_folder": str(tmp_path / "photos"), "mask_folder": str(tmp_path / "drawn")}
    for row in (
        ("0.jpg", "0.png"),
        (str(tmp_path / "photos/0.jpg"), str(tmp_path / "drawn/0.png")),
    ):
        source = table(tmp_path / "lists", "pairs.csv", [row])
        rows = load_splits(DataArguments(dataset=str(source), **fields), ["train"])["train"]
        assert rows[0]["mask"]["path"] == str(tmp_path / "drawn/0.png")


def test_wrong_tables_get_one_clear_line(listed):
    cases = [
        ([("a", "b")], ("x", "y"), r"column of paths of images and .*, got x, y"),
        (
            [("no.jpg", "no.png")],
            ("image", "mask"),
            r"files of the column 'image' .* 1 of 1: no.jpg",
        ),
        ([(*ROWS[0], "x.png")], ("image", "mask", "label"), None),
        ([(*ROWS[0], "x.png")], ("image", "gt", "label"), r"one column for masks .* gt, label"),
        ([ROWS[0], ("a.jpg",)], ("image", "mask"), r"2 cells in each row of .*, got 1 in row 2"),
        ([ROWS[0], ("", "m.png")], ("image", "mask"), r"a path in each row .*'image' .*empty cell"),
    ]
    for rows, head, message in cases:
        source = table(listed, "pairs.csv", rows, head)
        if message is None:
            assert len(load_splits(DataArguments(dataset=str(source)), ["train"])["train"]) == 1
            continue
        with pytest.raises((ValueError, FileNotFoundError), match=message) as seen:
            load_splits(DataArguments(dataset=str(source)), ["train"])
        assert "\n" not in str(seen.value)


def test_a_table_and_folders_that_differ_are_two_readings(tmp_path):
    root = both(tmp_path, "images/{s}/{n}.jpg", "masks/{s}/{n}.png", count=2)
    table(root, "train.csv", [("images/train/t00.jpg", "masks/train/t00.png")])
    assert len(paths(root)) == 1
    table(root, "train.csv", [("images/train/t00.jpg", "masks/train/t01.png")])
    with pytest.raises(ValueError, match=r"one way to read .* csv \(.*\) and folders \(.*--layout"):
        paths(root)
    assert len(paths(root, layout="folders")) == 2
    assert paths(root, layout="csv") == [("images/train/t00.jpg", "masks/train/t01.png")]


def test_a_table_of_something_else_is_no_reading(tmp_path):
    """A spreadsheet of notes beside the images would stop a training that works."""
    root = both(tmp_path, *LAYOUTS["kind first"], count=2)
    (root / "notes.csv").write_text("my notes\na,b,c\n")
    (root / "train.csv").write_text("id,age\n1,30\n")
    (root / "val.csv").mkdir()
    assert len(paths(root)) == 2


def test_words_are_told_apart_in_names_of_folders():
    assert words_of("SegmentationClass") == ["segmentationclass"]
    assert words_of("JPEGImages") == ["jpegimages"]
    assert words_of("valannot") == ["val", "annot"]
    assert words_of("train2017") == ["train", "2017"]
    assert words_of("trainers") == ["trainers"]


# --- kd-trainer data ------------------------------------------------------------------------------


def test_a_folder_is_walked_through_once(tmp_path, monkeypatch):
    """Of a million files each walk takes seconds, and who asks for names of classes needs none."""
    root, walks = both(tmp_path, *LAYOUTS["kind first"]), []
    walk = folder_layouts.walk
    monkeypatch.setattr(folder_layouts, "walk", lambda root: walks.append(root) or walk(root))
    data = DataArguments(dataset=str(root))
    splits = load_splits(data)
    data = with_label_count(splits, data)
    mask_rule(splits, data)
    assert source_class_names(data) is None
    assert walks == [root]


def test_the_data_is_shown_and_the_flags_that_it_prints_read_the_same(tmp_path, capsys):
    """Flags that read other rows would be worse than none."""
    root = both(tmp_path / "set", *LAYOUTS["ADE20K"], splits=("train", "test"), count=9)
    data_main([str(root), "--output", str(tmp_path / "look.png")])
    said = capsys.readouterr().out
    assert "images in images/SPLIT, masks in annotations/SPLIT" in said
    assert re.search(r"\| +255 \| foreground \| 50.00% \| +18 \| +green \|", said)
    assert cv2.imread(str(tmp_path / "look.png")).shape[:2] == (18 + 4 * 244, 4 * 244 + 4)
    words = shlex.split(next(line for line in said.splitlines() if "kd-trainer train" in line))
    run = parse(words[2:])
    assert run.dry_run
    splits = load_splits(run.data)
    again = load_splits(DataArguments(dataset=str(root)))
    for name, expected in zip((run.data.train_split, run.data.eval_split), again, strict=True):
        assert list(splits[name]) == list(again[expected])


def test_masks_that_fit_no_rule_are_drawn_before_the_error(tmp_path, capsys):
    root = both(tmp_path / "set", *LAYOUTS["split first"])
    for number, path in enumerate(sorted(root.glob("*/masks/*.png"))):
        draw(path.parent, path.name, value=(7, 9, 40)[number % 3])
    with pytest.raises(ValueError, match="Expected masks of "):
        data_main([str(root), "--output", str(tmp_path / "look.png")])
    assert (tmp_path / "look.png").is_file()
    assert re.search(r"\| +7 \| not known \|", capsys.readouterr().out)


def test_masks_of_another_size_are_named_and_not_drawn(tmp_path):
    root = both(tmp_path / "set", *LAYOUTS["split first"])
    for path in root.glob("*/masks/*.png"):
        cv2.imwrite(str(path), cv2.imread(str(path), 0)[:5, :4])
    with pytest.raises(ValueError, match=r"^Expected a mask of .* got 4x5 in "):
        data_main([str(root), "--output", str(tmp_path / "look.png")])


def test_the_package_is_the_console_command():
    """`python -m kd_trainer train` is what is typed where the command is not on the path."""
    asked = [sys.executable, "-m", "kd_trainer", "trian"]
    ended = subprocess.run(asked, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 1
    assert ended.stderr.startswith("error: Expected a command among train, data")
    assert ended.stderr.endswith("Did you mean train?\n")


def test_a_run_leaves_the_names_that_it_held_out_and_its_student_is_measured_on_these(tmp_path):
    """Nobody could say afterwards which images the figures are of, and others were trained on."""
    root = both(tmp_path / "set", "images/{n}.png", "masks/{n}.png", splits=("train",), count=6)
    settings = {"dataset": str(root), "teacher": "none", "image_size": 32, "use_cpu": True}
    settings |= {"student_encoder": "resnet18", "encoder_weights": "none", "no_preflight": True}
    settings |= {"output_dir": str(tmp_path / "run"), "per_device_train_batch_size": 2}
    run = build(settings | {"eval_fraction": 0.34})
    lock = FolderLock(run.output)
    try:
        parts, _, _ = prepare(run, lock)
    finally:
        lock.release()
    names = (tmp_path / "run" / "held_out.txt").read_text().splitlines()
    evaluated = [row["image"]["path"] for row in parts.eval_dataset.dataset]
    assert [str(root / name) for name in names] == evaluated
    assert len(names) == 2
    of_run = settings_of_run(str(tmp_path / "run" / "student"), {"dataset": f"{root}/"})
    again = load_splits(DataArguments(dataset=str(root), **of_run), ["validation"])["validation"]
    assert [row["image"]["path"] for row in again] == evaluated
