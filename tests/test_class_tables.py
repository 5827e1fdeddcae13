"""Tables of colours beside masks: read as `--mask_colors`, said, and overruled by it."""

from pathlib import Path

import cv2
import numpy as np
import pytest
from test_layouts import both, nothing_said_before
from test_mask_formats import COLORS, SIDE, ids

from kd_trainer.commands.data import data_main
from kd_trainer.config import parse
from kd_trainer.data import load_splits, mask_rule, with_label_count
from kd_trainer.data_arguments import DataArguments
from kd_trainer.found_settings import learn_from_sources

__all__ = ["nothing_said_before"]

# In another order than that of the colours, as classes without a table would be.
NAMES = {0: "sky", 3: "car", 1: "Void", 2: "road"}
TABLES = {
    "class_dict.csv": ("name, r, g, b\n", "{n},{r},{g},{b}\n"),
    "labelmap.txt": ("# label:color_rgb:parts:actions\n", "{n}:{r},{g},{b}::\n"),
    "label_colors.txt": ("", "{r} {g} {b}\t\t{n}\n"),
    "labels.txt": ("", "{n} {r} {g} {b}\n"),
}


def table(file, names=NAMES, form=None):
    head, line = form or TABLES[file.name]
    numbers = {place: dict(zip("rgb", map(int, COLORS[place]), strict=True)) for place in names}
    file.write_text(head + "".join(line.format(n=n, **numbers[i]) for i, n in names.items()))


def folder(root, classes=4, *, colors=COLORS):
    """Images and coloured masks of two splits, as CamVid lies in its archive."""
    for split, count in (("train", 3), ("val", 2)):
        for n in range(count):
            image, mask = root / f"{split}/{n}.png", root / f"{split}_labels/{n}_L.png"
            for file in (image, mask):
                file.parent.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(image), np.zeros((SIDE, SIDE, 3), np.uint8))
            cv2.imwrite(str(mask), np.asarray(colors)[ids(n, classes)][..., ::-1])
    return root


def read(root, **settings):
    """The settings with what the data says, and the labels of its first mask."""
    splits = load_splits(DataArguments(dataset=str(root), **settings))
    data = with_label_count(splits, DataArguments(dataset=str(root), **settings))
    rule = mask_rule(splits, data)
    return data, rule.labels(rule.decode(splits["train"][0]["mask"], 0), "a mask")


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("place", [".", "camvid"])
def test_colours_and_names_are_those_of_the_table(name, place, tmp_path, capsys):
    """Without it classes are in the order of their colours, and called class_1, class_2."""
    table(folder(tmp_path / place) / name)
    data, labels = read(tmp_path)
    assert data.id2label == {0: "sky", 1: "car", 2: "road"}
    assert np.array_equal(labels, np.uint8([0, 255, 2, 1])[ids(0, 4)])
    said = capsys.readouterr().err
    assert f"the 3 colours and names of {tmp_path / place / name}: sky, car, road" in said
    assert "255,0,0 counts nowhere. --mask_colors overrules." in said


def test_who_looks_at_the_data_is_told(tmp_path, capsys):
    table(folder(tmp_path / "photos") / "class_dict.csv")
    data_main([str(tmp_path / "photos"), "--output", str(tmp_path / "look.png")])
    said = capsys.readouterr().out
    assert "class_dict.csv: sky, car, road; 255,0,0 counts nowhere" in said
    assert "--mask_colors sky=0,0,0 car=0,0,255 ignore=255,0,0 road=0,255,0" in said


def test_a_run_writes_down_what_the_table_says(tmp_path):
    """So it goes on, and is measured, without the table."""
    table(folder(tmp_path) / "class_dict.csv")
    run = parse(["--dataset", str(tmp_path), "--teacher", "none"])
    data = learn_from_sources(run, load_splits(run.data))
    assert data.mask_colors == ["sky=0,0,0", "car=0,0,255", "ignore=255,0,0", "road=0,255,0"]
    assert (data.num_labels, list(data.id2label.values())) == (3, ["sky", "car", "road"])


def test_void_is_a_class_where_the_number_of_classes_says_so(tmp_path):
    table(folder(tmp_path) / "class_dict.csv")
    data, labels = read(tmp_path, num_labels=4)
    assert data.id2label == {0: "sky", 1: "car", 2: "Void", 3: "road"}
    assert np.array_equal(labels, np.uint8([0, 2, 3, 1])[ids(0, 4)])
    with pytest.raises(ValueError, match=r"Expected 7 classes .* in .*class_dict.csv, got 3"):
        read(tmp_path, num_labels=7)


def test_flags_overrule_the_table(tmp_path):
    table(folder(tmp_path) / "labelmap.txt")
    colors = ["0,0,0", "255,0,0", "0,255,0", "0,0,255"]
    data, labels = read(tmp_path, mask_colors=colors)
    assert data.mask_colors == colors
    assert np.array_equal(labels, ids(0, 4))
    data, _ = read(tmp_path, class_names=["road", "car", "sky"])
    assert [one.partition("=")[0] for one in data.mask_colors if "ign" not in one] == [
        *("road", "car", "sky")
    ]


@pytest.mark.parametrize("names", [{1: "cat"}, {1: "cat", 0: "background"}])
def test_the_background_comes_first(names, tmp_path):
    """The one logit of a binary student is the probability of the second class."""
    table(folder(tmp_path, 2) / "labelmap.txt", names)
    data, labels = read(tmp_path)
    assert data.id2label == {0: "background", 1: "cat"}
    assert np.array_equal(labels, ids(0, 2))


def test_masks_of_class_ids_are_read_as_such_beside_a_table(tmp_path):
    """Grey 1 is no colour of it."""
    table(folder(tmp_path, colors=np.arange(4)[:, None].repeat(3, 1)) / "class_dict.csv")
    data, labels = read(tmp_path)
    assert (data.mask_colors, data.num_labels) == (None, 4)
    assert np.array_equal(labels, ids(0, 4))


def test_a_colour_that_the_table_lacks_is_named(tmp_path):
    table(folder(tmp_path) / "class_dict.csv", {0: "sky", 1: "car"})
    with pytest.raises(ValueError, match=r"got also 0,0,255 0,255,0 in .*--mask_colors"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name,r,g,b\nsky,0,0,0\ncar,0,0\n", "in each line of .*, got 'car,0,0'"),
        ("name,r,g,b\nsky,0,0,0\ncar,0,0,256\n", "got 'car,0,0,256'"),
        ("name,r,g,b\nsky,0,0,0\ncar,0,0,0\n", "got 'sky' and 'car' for 0,0,0"),
    ],
)
def test_a_table_that_cannot_be_read_is_an_error(text, message, tmp_path):
    (folder(tmp_path) / "class_dict.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        read(tmp_path)


@pytest.mark.parametrize("text", ["", "sky\ncar\nroad\n", "id,name\n0,sky\n1,car\n"])
def test_a_file_of_that_name_may_hold_something_else(text, tmp_path):
    (folder(tmp_path) / "labels.txt").write_text(text)
    assert read(tmp_path)[0].mask_colors is None


def test_what_cvat_exports_as_masks_is_one_folder_to_train_on(tmp_path):
    """Its list is called default; the labels are those of labelmap.txt, not of Pascal VOC."""
    root = both(tmp_path, "JPEGImages/{n}.png", "SegmentationClass/{n}.png", ("x",), count=10)
    for file in (root / "SegmentationClass").iterdir():
        cv2.imwrite(str(file), COLORS[ids(0, 3)][..., ::-1])
        cv2.imwrite(str(root / "JPEGImages" / file.name), np.zeros((SIDE, SIDE, 3), np.uint8))
    lists = root / "ImageSets/Segmentation"
    lists.mkdir(parents=True)
    stems = [Path(file).stem for file in sorted((root / "JPEGImages").iterdir())]
    (lists / "default.txt").write_text("\n".join(stems))
    table(root / "labelmap.txt", {2: "cat", 1: "dog", 0: "background"})
    data, labels = read(root)
    assert data.id2label == {0: "background", 1: "cat", 2: "dog"}
    assert np.array_equal(labels, np.uint8([0, 2, 1])[ids(0, 3)])
