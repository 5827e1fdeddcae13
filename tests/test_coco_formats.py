"""COCO data sets as they are published and as labelling tools export them."""

import json

import cv2
import numpy as np
import pytest
from pycocotools import mask as coco_mask

from kd_trainer.data import load_splits, mask_rule, source_class_names
from kd_trainer.data.coco import file_for_split, is_coco_folder
from kd_trainer.data.coco_annotations import without_root
from kd_trainer.data.listing import MissingSplitError, split_names
from kd_trainer.data_arguments import DataArguments

SIDE = 40
SQUARE = [[5, 5, 15, 5, 15, 15, 5, 15]]
OTHER = [[20, 20, 35, 20, 35, 35, 20, 35]]
CATEGORIES = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}, {"id": 3, "name": "car"}]


def entry(category, shape, image=0, **fields):
    return {"image_id": image, "category_id": category, "segmentation": shape, **fields}


def write(root, file, folder, annotations, *, categories=CATEGORIES, images=2):
    """An annotation file, and its images of one grey level each."""
    (root / folder).mkdir(parents=True, exist_ok=True)
    (root / file).parent.mkdir(parents=True, exist_ok=True)
    entries = []
    for number in range(images):
        name = f"{number}.png"
        cv2.imwrite(str(root / folder / name), np.full((SIDE, SIDE, 3), number, np.uint8))
        entries.append({"id": number, "file_name": name, "height": SIDE, "width": SIDE})
    numbered = [{"id": i, **one} for i, one in enumerate(annotations)]
    content = {"images": entries, "annotations": numbered, "categories": categories}
    (root / file).write_text(json.dumps(content))


ANNOTATIONS = [entry(1, SQUARE), entry(2, OTHER), entry(3, SQUARE, 1), entry(2, OTHER, 1)]
LAYOUTS = {
    "published": ("annotations/instances_{}.json", "{}", ("train2017", "val2017")),
    "roboflow": ("{}/_annotations.coco.json", "{}", ("train", "valid")),
    "short": ("annotations/{}.json", "images/{}", ("train", "val")),
    "test alone": ("annotations/{}.json", "images/{}", ("train", "test")),
    "images of a year": ("annotations/instances_{}.json", "{}2017", ("train", "val")),
}


@pytest.fixture
def coco(tmp_path):
    for split in ("train", "validation"):
        write(tmp_path, f"annotations/{split}.json", f"images/{split}", ANNOTATIONS)
    return tmp_path


def labels(root, split="train", **settings):
    data = DataArguments(dataset=str(root), **settings)
    splits = load_splits(data)
    rule = mask_rule(splits, data)
    return [rule.labels(rule.decode(row["mask"], 0), "mask") for row in splits[split]]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_folder_is_enough(layout, tmp_path, capsys):
    file, folder, splits = LAYOUTS[layout]
    for split, count in zip(splits, (3, 2), strict=True):
        write(tmp_path, file.format(split), folder.format(split), ANNOTATIONS, images=count)
    data = DataArguments(dataset=str(tmp_path), num_labels=4)
    assert {name: len(rows) for name, rows in load_splits(data).items()} == {
        "train": 3,
        "validation": 2,
    }
    assert f"Split validation: {tmp_path / file.format(splits[1])}" in capsys.readouterr().err
    assert source_class_names(data) == ["background", "cat", "dog", "car"]


def test_a_name_that_is_there_is_taken_without_a_word(coco, capsys):
    write(coco, "annotations/val.json", "images/val", ANNOTATIONS, images=1)
    data = DataArguments(dataset=str(coco), num_labels=4)
    assert len(load_splits(data)["validation"]) == 2
    assert "Split" not in capsys.readouterr().err


def test_another_split_of_the_run_is_never_meant(tmp_path):
    """To measure on what was trained on says nothing, so no name stands for two splits."""
    write(tmp_path, "annotations/val.json", "images/val", ANNOTATIONS)
    data = DataArguments(dataset=str(tmp_path), num_labels=4, train_split="val", eval_fraction=0)
    with pytest.raises(MissingSplitError, match=r"annotations of split 'validation' at .*val.json"):
        load_splits(data)
    assert "val" not in split_names("validation", ("val",))


@pytest.mark.parametrize(
    ("given", "split", "files", "expected"),
    [
        ("instances_train2017.json", "validation", ("instances_val2017.json",), 0),
        ("instances_val2017.json", "train", ("instances_train2017.json",), 0),
        ("instances_train2017.json", "train", ("instances_train.json",), None),
        ("train.json", "validation", ("test.json", "valid.json"), 1),
        ("test.json", "validation", ("val.json",), 0),
        ("test.json", "validation", (), None),
    ],
)
def test_a_json_finds_the_file_of_another_split(given, split, files, expected, tmp_path):
    for name in (given, *files):
        (tmp_path / name).touch()
    other = {"train": "validation", "validation": "train"}[split]
    found = file_for_split(tmp_path / given, split, (other,))
    assert found.name == (given if expected is None else files[expected])


ROOT = {"id": 0, "name": "animals", "supercategory": "none"}
GROUPED = [ROOT, *({**c, "supercategory": "animals"} for c in CATEGORIES[:2])]


def test_a_category_that_only_groups_others_is_no_class(tmp_path):
    """Roboflow writes it; there would be a class without pixels, and all others shifted."""
    for split in ("train", "valid"):
        file = f"{split}/_annotations.coco.json"
        write(tmp_path, file, split, ANNOTATIONS[:2], categories=GROUPED)
    data = DataArguments(dataset=str(tmp_path), num_labels=3)
    assert source_class_names(data) == ["background", "cat", "dog"]
    assert set(np.unique(labels(tmp_path, num_labels=3))) == {0, 1, 2}


@pytest.mark.parametrize(
    ("categories", "count"),
    [
        ([*GROUPED[1:], {**ROOT, "supercategory": "animals"}], 3),  # named after itself, and used
        ([{"id": i, "name": n, "supercategory": n} for i, n in enumerate("abc")], 3),
        ([{"id": 1, "name": "cat"}, {"id": 9, "name": "never drawn"}], 2),
    ],
)
def test_a_category_without_annotations_stays_a_class(categories, count):
    used = [entry(0, SQUARE)] if ROOT["name"] in {c["name"] for c in categories} else []
    assert len(without_root({"annotations": used, "categories": categories})) == count


FEWER = [{"id": 0, "name": "car"}, {"id": 1, "name": "dog"}]  # numbered anew


@pytest.mark.parametrize(
    ("settings", "inside"),
    [
        ({}, (3, 2)),
        ({"num_labels": 4}, (3, 2)),
        ({"category": ["cat", "dog"]}, (0, 1)),
        ({"merge_classes": ["background=rest", "pet=cat,dog", "car=car"]}, (2, 1)),
    ],
)
def test_a_split_may_lack_categories_and_number_them_anew(settings, inside, tmp_path):
    """By ids a car would be counted as a cat."""
    write(tmp_path, "annotations/train.json", "images/train", ANNOTATIONS)
    annotations = [entry(0, SQUARE), entry(1, OTHER)]
    write(tmp_path, "annotations/val.json", "images/val", annotations, categories=FEWER)
    drawn = labels(tmp_path, "validation", **settings)[0]
    assert (drawn[10, 10], drawn[25, 25]) == inside
    assert source_class_names(DataArguments(dataset=str(tmp_path))) == [
        *("background", "cat", "dog", "car")
    ]


@pytest.mark.parametrize(
    ("settings", "bird"),
    [({}, 255), ({"category": "cat"}, 0), ({"merge_classes": ["x=cat", "y=rest"]}, 1)],
)
def test_objects_of_a_category_that_nothing_is_trained_on_count_nowhere(
    settings, bird, tmp_path, capsys
):
    """As background they would punish a student for what nobody told it."""
    write(tmp_path, "annotations/train.json", "images/train", ANNOTATIONS)
    categories = [*CATEGORIES, {"id": 4, "name": "bird"}]
    annotations = [entry(4, SQUARE), entry(1, OTHER)]
    write(tmp_path, "annotations/val.json", "images/val", annotations, categories=categories)
    assert labels(tmp_path, "validation", **settings)[0][10, 10] == bird
    said = capsys.readouterr().err
    assert ("1 objects of" in said) == ("has no category bird" in said) == (bird == 255)


def test_boxes_without_an_outline_are_left_out_and_counted(tmp_path, capsys):
    boxes = [entry(1, []), {"image_id": 1, "category_id": 1, "bbox": [1, 1, 9, 9]}]
    for split in ("train", "validation"):
        shapes = [entry(1, SQUARE), *boxes]
        write(tmp_path, f"annotations/{split}.json", f"images/{split}", shapes)
    first, second = labels(tmp_path, category="cat")
    assert first[10, 10] == 1
    assert not second.any()
    said = capsys.readouterr().err
    assert f"2 of 3 objects of {tmp_path / 'annotations/train.json'} are boxes without an" in said


def test_boxes_alone_are_an_error(tmp_path):
    for split in ("train", "validation"):
        write(tmp_path, f"annotations/{split}.json", f"images/{split}", [entry(1, [])])
    with pytest.raises(ValueError, match=r"polygons or RLE\), got none in annotation 0 .* any"):
        labels(tmp_path, category="cat")


def crowd_rle():
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[25:38, 2:12] = 1
    flat = mask.T.ravel()  # columns first
    changes = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff([0, *changes, flat.size]).tolist()
    packed = coco_mask.encode(np.asfortranarray(mask))
    sizes = {"size": [SIDE, SIDE]}
    return mask, [
        sizes | {"counts": counts},
        sizes | {"counts": packed["counts"].decode()},
    ]


@pytest.mark.parametrize("form", [0, 1], ids=["counts", "compressed"])
@pytest.mark.parametrize("settings", [{"category": ["cat", "dog"]}, {"num_labels": 4}])
def test_a_crowd_of_run_lengths_counts_nowhere(form, settings, tmp_path):
    """As published: crowds are RLE, objects polygons. As foreground they would be learned."""
    area, forms = crowd_rle()
    shapes = [entry(1, SQUARE), entry(1, forms[form], iscrowd=1), entry(2, OTHER, 1)]
    for split in ("train", "validation"):
        write(tmp_path, f"annotations/{split}.json", f"images/{split}", shapes)
    drawn = labels(tmp_path, **settings)[0]
    assert (drawn[area == 1] == 255).all()
    assert (drawn == 255).sum() == area.sum()
    assert drawn[10, 10] == 1


def test_several_categories_are_one_foreground(coco):
    first, second = labels(coco, category=["cat", "car"])
    assert (first[10, 10], first[30, 30], second[10, 10]) == (1, 0, 1)
    data = DataArguments(dataset=str(coco), category=["cat", "car"])
    assert source_class_names(data) == ["background", "cat+car"]
    with pytest.raises(ValueError, match=r"got 'cra'; there are cat, dog, car\."):
        labels(coco, category=["cat", "cra"])


@pytest.mark.parametrize(
    ("merge", "expected"),
    [
        (["background=rest", "pet=cat,dog"], (1, 1, 0, 1)),
        (["background=2", "pet=1,3"], (1, 0, 1, 0)),
        (["background=rest", "cat=cat", "ignore=dog"], (1, 255, 0, 255)),
    ],
)
def test_categories_are_merged_into_classes(merge, expected, coco):
    """By name or by id; what nothing is drawn on is the first class."""
    first, second = labels(coco, merge_classes=merge)
    assert (first[10, 10], first[30, 30], second[10, 10], second[30, 30]) == expected
    assert first[0, 0] == 0
    data = DataArguments(dataset=str(coco), merge_classes=merge)
    assert source_class_names(data) is None
    assert list(data.id2label.values()) == [m.split("=")[0] for m in merge[:2]]


@pytest.mark.parametrize(
    ("merge", "message"),
    [
        (["background=rest", "pet=cta"], r"--merge_classes to be a category .* got 'cta'"),
        (["background=cat", "x=dog"], "got none for car. Add it, or background=rest"),
    ],
)
def test_merged_categories_that_cannot_be_are_named(merge, message, coco):
    with pytest.raises(ValueError, match=message):
        labels(coco, merge_classes=merge)


def test_a_result_json_beside_masks_is_no_annotation_of_them(tmp_path):
    """It may be anything; that of Label Studio lies beside a folder of images alone."""
    write(tmp_path, "result.json", "images", ANNOTATIONS)
    assert is_coco_folder(tmp_path, ("train", "validation"))
    (tmp_path / "masks").mkdir()
    assert not is_coco_folder(tmp_path, ("train", "validation"))


def test_one_of_several_files_that_name_no_split_is_not_taken(tmp_path):
    for name in ("batch_1.json", "batch_2.json"):
        write(tmp_path, f"annotations/{name}", "images", ANNOTATIONS)
    for source in (tmp_path, tmp_path / "annotations/batch_1.json"):
        with pytest.raises(MissingSplitError, match=r"^Expected "):
            load_splits(DataArguments(dataset=str(source)))
