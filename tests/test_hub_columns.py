"""Tables as they lie on the Hub: columns by type and name, splits, configurations, class names."""

import io
import json

import datasets
import numpy as np
import pytest
from hub_server import Repo
from PIL import Image

from kd_trainer.data import load_splits, mask_rule, source_class_names
from kd_trainer.data.columns import find_columns, names_of_ids
from kd_trainer.data.images import decode_image
from kd_trainer.data.listing import MissingSplitError
from kd_trainer.data.mask_files import decode_mask
from kd_trainer.data_arguments import DataArguments

IMAGE, NUMBER = datasets.Image(), datasets.Value("int64")
RAW = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
NAMES = ("image", "mask")


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ("image annotation scene_category", ("image", "annotation")),
        ("pixel_values label", ("pixel_values", "label")),
        ("img segmentation_mask", ("img", "segmentation_mask")),
        ("labels images", ("images", "labels")),
        ("photo mask", ("photo", "mask")),
        ("image drawing", ("image", "drawing")),
        ("first second", ("first", "second")),
        ("drawing pixel_values", ("pixel_values", "drawing")),
        ("image label number", ("image", "label")),
    ],
)
@pytest.mark.parametrize("image", [IMAGE, RAW], ids=["Image", "struct"])
def test_columns_are_found_by_type_and_usual_names(columns, expected, image):
    numbers = ("scene_category", "number")
    features = {name: NUMBER if name in numbers else image for name in columns.split()}
    assert find_columns(features, *NAMES, "data") == expected


def test_a_number_called_label_is_no_mask():
    features = {"image": IMAGE, "label": NUMBER, "segmentation": IMAGE}
    assert find_columns(features, *NAMES, "data") == ("image", "segmentation")
    numbers = {"image": NUMBER, "mask": datasets.Value("string"), "img": IMAGE}
    assert find_columns(numbers, *NAMES, "data") == ("img", "mask")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            "image label annotation",
            "one column of masks in data, got label, annotation. .*--mask_c",
        ),
        ("image a b", "one column of masks in data, got a, b"),
        ("a b c", "one column of masks in data, got a, b, c"),
        ("image", "a column 'mask' in data, got image. Name it with --mask_column"),
        (
            "mask img pixel_values",
            "one column of images in data, got img, pixel_values|, got pixel",
        ),
    ],
)
def test_several_candidates_are_listed_and_none_is_taken(columns, message):
    features = dict.fromkeys(columns.split(), IMAGE)
    with pytest.raises(ValueError, match=f"^Expected .*(?:{message})"):
        find_columns(features, *NAMES, "data")


def parquet(count, start=0, columns=("image", "annotation")):
    """A parquet file of images and masks of one value each, as bytes."""
    rows = {column: [] for column in columns} | {"scene_category": list(range(count))}
    for i in range(start, start + count):
        for column, size in zip(columns, ((8, 8, 3), (8, 8)), strict=True):
            stream = io.BytesIO()
            Image.fromarray(np.full(size, i % 2, np.uint8)).save(stream, "PNG")
            rows[column].append({"bytes": stream.getvalue(), "path": None})
    features = datasets.Features(dict.fromkeys(columns, IMAGE) | {"scene_category": NUMBER})
    file = io.BytesIO()
    datasets.Dataset.from_dict(rows, features=features).to_parquet(file)
    return file.getvalue()


def publish(hub, name, files):
    repo = hub.repos["datasets", name] = Repo()
    content = {path: c if isinstance(c, bytes) else c.encode() for path, c in files.items()}
    repo.commit("Add data", content)
    return name


def both(folder, **options):
    return {
        f"{folder}/train-00000-of-00001.parquet": parquet(4, **options),
        f"{folder}/test-00000-of-00001.parquet": parquet(2, 4, **options),
    }


@pytest.mark.parametrize("streaming", [False, True])
def test_a_data_set_on_the_hub_needs_no_further_flags(streaming, hub, capfd):
    name = publish(hub, "org/scenes", {**both("data"), "id2label.json": '{"0": "sky", "1": "x"}'})
    data = DataArguments(dataset=name, streaming=streaming)
    splits = load_splits(data)
    assert [len(list(splits[split])) for split in ("train", "validation")] == [4, 2]
    row = next(iter(splits["validation"]))
    assert decode_image(row["image"], 0).shape == (8, 8, 3)
    assert decode_mask(row["mask"], 0).shape == (8, 8)
    assert source_class_names(data) == ["sky", "x"]
    said = capfd.readouterr().err
    if not streaming:  # each line is said once
        assert f"{name}: the column image holds the images, annotation the masks." in said
        assert f"{name}: test is the split validation." in said


def test_names_of_classes_stand_in_place_of_values(tmp_path):
    for split in ("train", "validation"):
        (tmp_path / f"{split}.parquet").write_bytes(parquet(3))
    (tmp_path / "id2label.json").write_text('{"0": "sky", "1": "cat", "2": "dog"}')
    merge = ["rest=sky,2", "pet=cat"]
    data = DataArguments(dataset=str(tmp_path), merge_classes=merge)
    rule = mask_rule(load_splits(data), data)
    assert rule.labels(np.uint8([[0, 1, 2]]), "mask").tolist() == [[0, 1, 0]]
    reduced = DataArguments(dataset=str(tmp_path), num_labels=2, ignore_index=0)
    assert source_class_names(reduced) == ["cat", "dog"]


def test_a_data_set_without_names_of_classes_has_none(hub):
    assert source_class_names(DataArguments(dataset=publish(hub, "org/bare", both("data")))) is None


CARD = """---
configs:
- config_name: people
  data_files:
  - {split: train, path: people/train*}
  - {split: test, path: people/test*}
- config_name: cars
  data_files:
  - {split: train, path: cars/train*}
  - {split: test, path: cars/test*}
---
"""


def test_one_of_several_configurations_has_to_be_named(hub):
    files = {"README.md": CARD, **both("people"), **both("cars", columns=("img", "mask"))}
    name = publish(hub, "org/several", files)
    for config, got in ((None, "none"), ("car", "car")):
        with pytest.raises(ValueError, match=rf"one of the 2 .* got {got}\. There are .*people"):
            load_splits(DataArguments(dataset=name, dataset_config=config))
    splits = load_splits(DataArguments(dataset=name, dataset_config="cars"))
    assert len(splits["validation"]) == 2


def test_a_configuration_of_local_data_is_refused(tmp_path):
    (tmp_path / "train.parquet").write_bytes(parquet(4))
    with pytest.raises(ValueError, match=r"on the Hub with --dataset_config cars, got"):
        load_splits(DataArguments(dataset=str(tmp_path), dataset_config="cars"))


def test_local_tables_have_the_usual_splits_and_columns(tmp_path):
    for split, start in (("train", 0), ("val", 4)):
        file = tmp_path / f"{split}-00000-of-00001.parquet"
        file.write_bytes(parquet(3, start, columns=("pixel_values", "label")))
    (tmp_path / "id2label.json").write_text(json.dumps({0: "background", 1: "kerb"}))
    data = DataArguments(dataset=str(tmp_path))
    assert {name: len(rows) for name, rows in load_splits(data).items()} == {
        "train": 3,
        "validation": 3,
    }
    assert source_class_names(data) == ["background", "kerb"]
    single = DataArguments(dataset=str(tmp_path / "train-00000-of-00001.parquet"))
    assert len(load_splits(single)["validation"]) == 3


def test_a_saved_dataset_dict_has_them_too(tmp_path):
    (tmp_path / "rows.parquet").write_bytes(parquet(3))
    rows = datasets.Dataset.from_parquet(str(tmp_path / "rows.parquet"))
    (tmp_path / "rows.parquet").unlink()
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(tmp_path)
    assert len(load_splits(DataArguments(dataset=str(tmp_path)))["validation"]) == 3
    with pytest.raises(MissingSplitError, match="'fold' in"):
        load_splits(DataArguments(dataset=str(tmp_path), eval_split="fold"))


@pytest.mark.parametrize(
    "content", ["[1, 2]", '{"1": "a"}', '{"0": 5}', '{"x": "a"}', "{", "[" * 100_000, "{}"]
)
def test_names_that_are_none_are_an_error(content, tmp_path):
    (tmp_path / "id2label.json").write_text(content)
    with pytest.raises(ValueError, match=r"^Expected the name of each class by its number in .*"):
        names_of_ids(tmp_path / "id2label.json")
