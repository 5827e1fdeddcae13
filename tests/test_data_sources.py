"""Sources: pair folders, COCO, parquet, Hub, disk, synthetic; and one clear line for wrong use."""

import json
import shutil
from types import SimpleNamespace

import cv2
import datasets
import numpy as np
import pytest
from datasets.exceptions import DatasetNotFoundError
from pycocotools import mask as coco_mask

from kd_trainer.build import build_run
from kd_trainer.config import build
from kd_trainer.data import StreamedDataset, TransformedDataset, load_splits
from kd_trainer.data.coco_annotations import category_classes
from kd_trainer.data.images import decode_image
from kd_trainer.data.mask_files import decode_mask
from kd_trainer.data.pipeline import mask_rule
from kd_trainer.data.sources import two_columns
from kd_trainer.data.streaming import stream_lengths
from kd_trainer.data_arguments import DataArguments


def load(path, **fields):
    return load_splits(DataArguments(dataset=str(path), **fields))


def masks(rows):
    return [decode_mask(row["mask"], i).astype(int) for i, row in enumerate(rows)]


def check_columns(splits, kind=datasets.Dataset):
    for rows in splits.values():
        assert isinstance(rows, kind)
        assert list(rows.features) == ["image", "mask"]
        assert all(rows.features[c] == datasets.Image(decode=False) for c in ("image", "mask"))


# --- pair folders --------------------------------------------------------------------------------


def test_a_pair_folder_gives_pairs_of_the_same_stem(pair_folder):
    """Two listings sorted apart can pair an image with its neighbour's mask."""
    splits = load(pair_folder)
    check_columns(splits)
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 8, "validation": 4}
    for row in splits["train"]:
        image, mask = row["image"]["path"], row["mask"]["path"]
        assert image.replace("images", "masks").replace(".jpg", ".png") == mask
        assert decode_image(row["image"], 0).shape == (64, 64, 3)
    assert set(np.unique(masks(splits["train"]))) == {0, 255}


def test_folder_and_split_names_are_fields(pair_folder):
    (pair_folder / "train" / "masks").rename(pair_folder / "train" / "parts")
    (pair_folder / "train" / "images").rename(pair_folder / "train" / "photos")
    data = DataArguments(dataset=str(pair_folder), mask_folder="parts", image_folder="photos")
    assert len(load_splits(data, ["train"])["train"]) == 8


@pytest.mark.parametrize("streaming", [False, True])
def test_limits_cut_and_unlabelled_images_follow(pair_folder, streaming):
    extra = pair_folder / "validation" / "images"
    fields = {"max_train_samples": 3, "max_eval_samples": 2, "unlabelled": str(extra)}
    splits = load(pair_folder, streaming=streaming, **fields)
    train, evaluation = list(splits["train"]), list(splits["validation"])
    assert [row["mask"] is None for row in train] == [False] * 3 + [True] * 4
    assert [row["mask"] is None for row in evaluation] == [False] * 2
    if streaming:
        assert sum(stream_lengths(splits["train"])) == 7


def break_pairs(root, what):
    images, found = root / "train" / "images", root / "train" / "masks"
    if what == "no mask":
        (found / "person3.png").unlink()
    elif what == "no image":
        (images / "person3.jpg").unlink()
    elif what == "twice":
        shutil.copy(images / "person3.jpg", images / "person3.png")
    elif what == "empty":
        shutil.rmtree(images)
        (images / "deeper").mkdir(parents=True)
    elif what == "folder":
        found.rename(root / "train" / "parts")
    elif what == "flat":
        shutil.move(images, root / "images")
        shutil.rmtree(root / "train")
        shutil.rmtree(root / "validation")


@pytest.mark.parametrize(
    ("what", "error", "message"),
    [
        (
            "no mask",
            ValueError,
            r"mask of the same stem .* for 1 of 8: person3.jpg \(there is: person0.png\)\.",
        ),
        (
            "no image",
            ValueError,
            r"image of the same stem .* for 1 of 8 .*: person3.png \(there is: person0.jpg\)\.",
        ),
        ("twice", ValueError, r"one file for each name, got person3.jpg and person3.png"),
        ("empty", ValueError, r"got an empty split"),
        ("folder", FileNotFoundError, r"images, parts in .* Name the folder with --mask_folder"),
        (
            "flat",
            FileNotFoundError,
            r"Expected train/images/NAME.jpg and .* got the folders images",
        ),
    ],
)
def test_a_broken_pair_folder_gets_one_clear_line(pair_folder, what, error, message):
    break_pairs(pair_folder, what)
    with pytest.raises(error, match=message) as caught:
        load(pair_folder)
    assert "\n" not in str(caught.value)


def test_a_missing_folder_suggests_the_nearest(pair_folder):
    with pytest.raises(FileNotFoundError, match=r"'pears' in it does not. Did you mean 'pairs'\?"):
        load(pair_folder.parent / "pears")
    with pytest.raises(FileNotFoundError, match=r"pairs exists, 'more' in it does not"):
        load(pair_folder / "more" / "still")
    with pytest.raises(FileNotFoundError, match="--unlabelled"):
        load(pair_folder, unlabelled=str(pair_folder / "nothing"))
    with pytest.raises(ValueError, match=r"got none; its folders are: images, masks"):
        load(pair_folder, unlabelled=str(pair_folder / "train"))


def test_wrong_arguments_are_named(pair_folder):
    with pytest.raises(ValueError, match="Expected --dataset, got nothing"):
        load("")
    with pytest.raises(ValueError, match="different splits"):
        load(pair_folder, eval_split="train")
    with pytest.raises(ValueError, match="--max_eval_samples of at least 1, got 0"):
        load(pair_folder, max_eval_samples=0)
    with pytest.raises(ValueError, match="a COCO json or a parquet file"):
        load(pair_folder / "train" / "images" / "person0.jpg")


def test_a_stray_file_makes_no_other_source_of_a_pair_folder(pair_folder):
    """One notes.parquet, and the images beside it would not be found any more."""
    for file in ("notes.parquet", "train/notes.parquet", "annotations/notes.json"):
        (pair_folder / file).parent.mkdir(exist_ok=True)
        (pair_folder / file).write_bytes(b"no matter what")
    assert len(load(pair_folder)["train"]) == 8


@pytest.mark.parametrize("source", ["parquet", "pair_folder", "synthetic", "owner/people"])
def test_a_category_of_no_coco_data_is_refused(source, request):
    """It would be ignored, and every foreground taken for that category."""
    named = source not in ("synthetic", "owner/people")
    path = request.getfixturevalue(source) if named else source
    with pytest.raises(ValueError, match=r"Expected COCO annotations with --category cat, got"):
        load(path, category="cat")


@pytest.mark.parametrize("streaming", [False, True])
def test_an_unreadable_image_without_mask_is_found_before_the_run(pair_folder, streaming):
    more = pair_folder / "validation" / "images"
    (more / "broken.jpg").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"Expected a readable image, got .*broken\.jpg"):
        load(pair_folder, unlabelled=str(more), streaming=streaming)


def test_synthetic_images_are_a_source():
    fields = {"image_size": 32, "synthetic_train": 3, "synthetic_eval": 2}
    splits = load("synthetic", **fields)
    check_columns(splits)
    assert [len(splits[n]) for n in ("train", "validation")] == [3, 2]
    check_columns(load("synthetic", streaming=True, **fields), datasets.IterableDataset)
    with pytest.raises(ValueError, match=r"split of the synthetic data \(train, validation\)"):
        load("synthetic", eval_split="test", **fields)


# --- COCO ----------------------------------------------------------------------------------------

SQUARE = [[1, 1, 9, 1, 9, 9, 1, 9]]


def compressed(array):
    rle = coco_mask.encode(np.asfortranarray(array.astype(np.uint8)))
    return {"size": list(array.shape), "counts": rle["counts"].decode()}


def uncompressed(array):
    flat = array.T.ravel().astype(int)
    edges = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff([0, *edges, len(flat)]).tolist()
    return {"size": list(array.shape), "counts": counts if flat[0] == 0 else [0, *counts]}


def coco_content(annotations, count=3, categories=("person", "dog")):
    return {
        "images": [
            {"id": 10 + i, "file_name": f"{i}.png", "height": 16, "width": 20} for i in range(count)
        ],
        "categories": [{"id": 5 + 2 * i, "name": name} for i, name in enumerate(categories)],
        "annotations": [
            {"id": n, "image_id": 10 + image, "category_id": category, "segmentation": shape}
            | {"area": area}
            for n, (image, category, shape, area) in enumerate(annotations)
        ],
    }


@pytest.fixture
def blob():
    array = np.zeros((16, 20), np.uint8)
    array[4:12, 6:15] = 1
    return array


@pytest.fixture
def coco(tmp_path, blob):
    """Image 0: polygon and RLE of persons, 1: a dog over a person, 2: nothing."""
    root = tmp_path / "coco"
    (root / "annotations").mkdir(parents=True)
    annotations = [
        (0, 5, SQUARE, 64),
        (0, 5, compressed(blob), 72),
        (1, 7, SQUARE, 64),
        (1, 5, uncompressed(blob), 72),
    ]
    for split in ("train", "validation"):
        (root / split).mkdir()
        for i in range(3):
            cv2.imwrite(str(root / split / f"{i}.png"), np.full((16, 20, 3), 40 * i, np.uint8))
        content = coco_content(annotations)
        (root / "annotations" / f"{split}.json").write_text(json.dumps(content))
    return root


def square():
    return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(SQUARE, 16, 20)))


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"category": "dog"}, ["background", "dog"]),
        ({"num_labels": 3}, ["background", "person", "dog"]),
        ({"num_labels": 3, "class_names": ["none", "human", "pet"]}, ["none", "human", "pet"]),
    ],
)
def test_a_student_is_called_what_its_categories_are(coco, settings, names):
    """`--category cat` gave a student, and a card, that found persons."""
    data = {"dataset": str(coco), "teacher": "none", "image_size": 64, "augmentation": "none"}
    student = {"student_encoder": "resnet18", "encoder_weights": "none", "use_cpu": True}
    run = build(
        data | student | {"eval_strategy": "no", "per_device_train_batch_size": 1} | settings
    )
    assert list(build_run(run).student.config.id2label.values()) == names
    assert run.resolved()["class_names"] == names


def test_a_foreground_that_nobody_named_is_no_person():
    assert DataArguments(dataset="cats/", num_labels=2).id2label == {
        0: "background",
        1: "foreground",
    }
    assert DataArguments(dataset="cats/", category="cat").id2label[1] == "cat"
    assert DataArguments(dataset="synthetic").id2label[1] == "person"


@pytest.mark.parametrize("streaming", [False, True])
def test_a_coco_category_is_the_union_of_its_shapes(coco, blob, streaming):
    splits = load(coco, category="person", streaming=streaming)
    drawn = masks(splits["train"])
    np.testing.assert_array_equal(drawn[0], square() | blob)
    np.testing.assert_array_equal(drawn[1], blob)
    assert not drawn[2].any()
    check_columns(splits, datasets.IterableDataset if streaming else datasets.Dataset)
    if streaming:
        assert sum(stream_lengths(splits["train"])) == 3


def test_coco_classes_follow_the_order_of_the_categories_and_small_shapes_lie_on_top(coco, blob):
    drawn = masks(load(coco, num_labels=3)["train"])
    expected = blob.astype(int)
    expected[square() == 1] = 2  # the dog is smaller than the person behind it
    np.testing.assert_array_equal(drawn[1], expected)


CROWD = np.zeros((16, 20), np.uint8)
CROWD[:, 5:] = 1


def crowded(coco, persons=(SQUARE,), **fields):
    """Labels of image 0, in which a crowd reaches into a person, under the rule that is found."""
    for file in (coco / "annotations").iterdir():
        shapes = [(0, 5, shape, 64) for shape in persons]
        content = coco_content([*shapes, (0, 5, uncompressed(CROWD), 1), (1, 7, SQUARE, 64)])
        content["annotations"][len(shapes)]["iscrowd"] = 1
        file.write_text(json.dumps(content))
    data = DataArguments(dataset=str(coco), **fields)
    splits = load_splits(data)
    cell = next(iter(splits["train"]))["mask"]
    return mask_rule(splits, data, every_class=bool(persons)).labels(decode_mask(cell, 0), "x")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "fields", [{"category": "person"}, {"num_labels": 3}, {"num_labels": 3, "ignore_index": 99}]
)
def test_a_crowd_of_coco_counts_nowhere_but_where_an_object_lies_on_it(fields, streaming, coco):
    """A crowd is a rough outline around what nobody drew: COCO's own figures leave it out."""
    labels = crowded(coco, **fields, streaming=streaming)
    expected = np.where(CROWD, fields.get("ignore_index", 255), 0)
    expected[square() == 1] = 1
    np.testing.assert_array_equal(labels, expected)


def test_crowds_alone_are_never_foreground(coco):
    """Masks of 0 and 255 mean background and foreground elsewhere."""
    labels = crowded(coco, (), category="person")
    np.testing.assert_array_equal(labels, np.where(CROWD, 255, 0))
    data = DataArguments(dataset=str(coco), category="person")
    with pytest.raises(ValueError, match=r"^Expected foreground in the masks, got only 0 in all"):
        mask_rule(load_splits(data), data)


def test_classes_that_no_byte_can_number_are_refused_before_they_are_drawn(coco):
    rewrite(coco, **coco_content([], categories=[f"c{i}" for i in range(300)]))
    with pytest.raises(ValueError, match=r"^Expected --ignore_index between 301 .* and 255"):
        load(coco, num_labels=301)


def test_a_coco_json_finds_its_twin_and_its_images(coco):
    splits = load(coco / "annotations" / "train.json", category="dog", max_train_samples=2)
    assert {n: len(rows) for n, rows in splits.items()} == {"train": 2, "validation": 3}
    assert "validation" in splits["validation"][0]["image"]["path"]
    (coco / "annotations" / "train.json").rename(coco / "annotations" / "people.json")
    with pytest.raises(ValueError, match=r"holds the split's name .* got people.json"):
        load(coco / "annotations" / "people.json", category="dog")


def test_changed_annotations_are_drawn_again(coco):
    """A cache that outlives the annotations would train on the old masks."""
    assert masks(load(coco, category="person")["train"])[0].any()
    file = coco / "annotations" / "train.json"
    file.write_text(json.dumps(coco_content([])))
    assert not masks(load(coco, category="person")["train"])[0].any()


def rewrite(root, **changes):
    file = root / "annotations" / "train.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_wrong_coco_data_gets_one_clear_line(coco, blob):
    cases = [
        ({"category": "persn"}, r"there are person, dog\. Did you mean 'person'\?"),
        ({"num_labels": 2}, r"got 2 in .*: person, dog\. Name the foreground with --category"),
        ({"num_labels": 3, "category": "dog"}, "--num_labels 2 with --category dog"),
        ({"num_labels": 7}, "Expected 6 categories"),
    ]
    for fields, message in cases:
        with pytest.raises(ValueError, match=message):
            load(coco, **fields)
    boxes = coco_content([(0, 5, [], 4)])
    rewrite(coco, **boxes)
    with pytest.raises(ValueError, match=r"got none in annotation 0 of .*Boxes are not"):
        load(coco, category="person")
    rewrite(coco, **coco_content([(0, 5, compressed(blob[1:]), 4)]))
    with pytest.raises(ValueError, match=r"RLE of size \[15, 20\] for \[16, 20\], its image"):
        load(coco, category="person")
    rewrite(coco, images=[])
    with pytest.raises(ValueError, match="got an empty split"):
        load(coco, category="person")
    rewrite(coco, **coco_content([]))
    (coco / "train" / "1.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"none for 1 of 3: 1.png"):
        load(coco, category="person")
    (coco / "annotations" / "train.json").write_text("{}")
    with pytest.raises(ValueError, match="without images, annotations, categories"):
        load(coco, category="person")
    (coco / "annotations" / "train.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"annotations of split 'train' .* got validation"):
        load(coco, category="person")


@pytest.mark.parametrize(
    ("kind", "field"),
    [
        ("images", "id"),
        ("images", "file_name"),
        ("images", "height"),
        ("annotations", "category_id"),
        ("annotations", "image_id"),
        ("categories", "id"),
        ("categories", "name"),
    ],
)
def test_a_coco_entry_that_lacks_a_field_is_named(coco, kind, field):
    content = coco_content([(0, 5, SQUARE, 64), (1, 5, SQUARE, 64)])
    del content[kind][1][field]
    rewrite(coco, **content)
    message = rf"in each entry of '{kind}', got entry 1 .*train\.json without {field}: {{"
    with pytest.raises(ValueError, match=message) as caught:
        load(coco, category="person")
    assert "\n" not in str(caught.value)


def test_a_category_called_background_is_class_0(tmp_path):
    categories = [{"id": 0, "name": "background"}, {"id": 3, "name": "b"}, {"id": 1, "name": "a"}]
    assert category_classes(categories, (), 3, tmp_path) == {1: 1, 3: 2}
    assert category_classes(categories[:2], (), 2, tmp_path) == {3: 1}


# --- columns -------------------------------------------------------------------------------------


def table(count=5, names=("photo", "label")):
    images = [np.full((8, 8, 3), 10 * i, np.uint8) for i in range(count)]
    labels = [np.full((8, 8), i % 2, np.uint8) for i in range(count)]
    rows = {
        names[0]: [{"bytes": cv2.imencode(".png", i)[1].tobytes(), "path": None} for i in images],
        names[1]: [{"bytes": cv2.imencode(".png", i)[1].tobytes(), "path": None} for i in labels],
        "caption": ["x"] * count,
    }
    features = datasets.Features(
        dict.fromkeys(names, datasets.Image()) | {"caption": datasets.Value("string")}
    )
    return datasets.Dataset.from_dict(rows, features=features)


COLUMNS = {"image_column": "photo", "mask_column": "label"}


@pytest.fixture
def parquet(tmp_path):
    root = tmp_path / "parquet"
    (root / "data").mkdir(parents=True)
    for part in range(2):
        table().to_parquet(root / "data" / f"train-0000{part}-of-00002.parquet")
    table(3).to_parquet(root / "data" / "validation.parquet")
    return root


@pytest.mark.parametrize("streaming", [False, True])
def test_parquet_folders_give_their_columns_undecoded(parquet, streaming):
    splits = load(parquet, streaming=streaming, **COLUMNS)
    check_columns(splits, datasets.IterableDataset if streaming else datasets.Dataset)
    drawn = masks(splits["train"])
    assert [int(mask[0, 0]) for mask in drawn] == [0, 1, 0, 1, 0] * 2
    images = [decode_image(row["image"], 0)[0, 0, 0] for row in splits["validation"]]
    assert images == [0, 10, 20]
    if streaming:
        assert stream_lengths(splits["train"]) in ([5, 5], [10])


def test_a_parquet_file_finds_its_twin_and_limits_hold_in_streams(parquet):
    shutil.copy(parquet / "data" / "validation.parquet", parquet / "data" / "train.parquet")
    one = load(parquet / "data" / "train.parquet", **COLUMNS)
    assert {n: len(rows) for n, rows in one.items()} == {"train": 3, "validation": 3}
    cut = load(parquet, streaming=True, max_eval_samples=2, **COLUMNS)["validation"]
    assert (len(list(cut)), stream_lengths(cut)) == (2, [2])
    uncut = load(parquet, streaming=True, max_eval_samples=9, **COLUMNS)["validation"]
    assert stream_lengths(uncut) == [3]


def test_swapped_column_names_are_not_confused(tmp_path):
    for split in ("train", "validation"):
        table(names=("mask", "image")).to_parquet(tmp_path / f"{split}.parquet")
    rows = load(tmp_path, image_column="mask", mask_column="image")["train"]
    assert decode_image(rows[1]["image"], 0)[0, 0, 0] == 10
    assert decode_mask(rows[1]["mask"], 0)[0, 0] == 1


def test_wrong_columns_and_files_get_one_clear_line(parquet):
    with pytest.raises(ValueError, match=r"a column 'foto' in .*, got photo, label, caption"):
        load(parquet, image_column="foto")
    with pytest.raises(ValueError, match=r"got photo, label, caption.*Name it with --mask_column"):
        load(parquet, image_column="photo", mask_column="lable")
    numbers = table().add_column("size", [1] * 5)
    with pytest.raises(ValueError, match=r"images in the column 'size' of data, got Value"):
        two_columns(numbers, image_column="photo", mask_column="size", name="data")
    with pytest.raises(ValueError, match="two columns, got 'photo'"):
        load(parquet, image_column="photo", mask_column="photo")
    with pytest.raises(FileNotFoundError, match=r"test.parquet, test-\*.parquet .* got data/train"):
        load(parquet, eval_split="test", **COLUMNS)
    (parquet / "data" / "validation.parquet").write_bytes(b"no parquet")
    with pytest.raises(ValueError, match=r"Expected parquet files, got .*validation.parquet"):
        load(parquet, **COLUMNS)


def test_a_saved_dataset_dict_is_a_source(tmp_path):
    saved = datasets.DatasetDict({"train": table(), "validation": table(2)})
    saved.save_to_disk(tmp_path / "saved")
    splits = load(tmp_path / "saved", **COLUMNS)
    check_columns(splits)
    assert len(splits["validation"]) == 2
    with pytest.raises(ValueError, match=r"split 'vladiation' in .* Did you mean 'valid"):
        load(tmp_path / "saved", eval_split="vladiation", **COLUMNS)


def hub_of(monkeypatch, *files):
    """A Hub whose data sets all consist of these files."""
    config = SimpleNamespace(data_files={"train": list(files)})
    builder = SimpleNamespace(config=config)
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda name: builder)


OWN = "hf://datasets/owner/people@0a1b/data/train-0.parquet"


@pytest.mark.parametrize(
    "file",
    [
        "/home/me/private.parquet",
        "file:///home/me/private.parquet",
        "hf://datasets/me/private@main/train.parquet",
        "hf://datasets/owner/people@main/../../../me/private/resolve/main/train.parquet",
        "hf://datasets/owner/people@main/%2e%2e/private.parquet",
        "zip://a.png::hf://datasets/me/private@main/a.zip",
        "file:///home/me/a.zip::hf://datasets/owner/people@main/a.zip",
    ],
)
def test_a_hub_data_set_is_made_of_its_own_files(file, monkeypatch):
    """Its card may name any file, which `datasets` reads with the token of whoever loads it."""
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: table())
    hub_of(monkeypatch, OWN, file)
    with pytest.raises(ValueError, match=r"^Expected the files of owner/people in its ow") as e:
        load("owner/people", **COLUMNS)
    assert file in str(e.value)


def test_a_hub_id_is_loaded_by_split(monkeypatch):
    hub_of(monkeypatch, OWN)
    asked = []

    def fake(name, *, split, streaming):
        asked.append((name, split, streaming))
        rows = table()
        return rows.to_iterable_dataset() if streaming else rows

    monkeypatch.setattr(datasets, "load_dataset", fake)
    check_columns(load("owner/people", **COLUMNS))
    assert asked == [("owner/people", "train", False), ("owner/people", "validation", False)]
    stream = load("owner/people", streaming=True, max_train_samples=4, **COLUMNS)
    assert stream_lengths(stream["train"]) == [4]
    assert stream_lengths(stream["validation"]) is None


def test_a_hub_that_answers_no_gets_one_clear_line(monkeypatch):
    hub_of(monkeypatch)

    def fail(error):
        def fake(*args, **kwargs):
            raise error

        monkeypatch.setattr(datasets, "load_dataset", fake)

    for error in (DatasetNotFoundError("Dataset 'a/b' doesn't exist"), ConnectionError("offline")):
        fail(error)
        with pytest.raises(FileNotFoundError, match=r"no such path here .* The Hub says: ") as seen:
            load("owner/people")
        assert "\n" not in str(seen.value)
    fail(ValueError("Unknown split \"validation\". Should be one of ['train']."))
    with pytest.raises(ValueError, match=r"split 'train' of owner/people .*Unknown split"):
        load("owner/people")


class Plain:
    """A transform that gives the row's number and the stored values."""

    def __call__(self, row, *, epoch, index):
        pixels = decode_image(row["image"], index)
        return index, int(pixels[0, 0, 0]), int(decode_mask(row["mask"], index).sum())


@pytest.mark.parametrize("source", ["coco", "parquet", "pair_folder"])
def test_each_source_streams_the_rows_it_lists(source, request):
    """The rows of a stream have the numbers, and so the draws, of the map-style data set."""
    fields = {"coco": {"category": "person"}, "parquet": COLUMNS}.get(source, {})
    path = request.getfixturevalue(source)
    rows, stream = (load(path, streaming=s, **fields)["train"] for s in (False, True))
    expected = list(TransformedDataset(rows, Plain()))
    assert [number for number, _, _ in expected] == list(range(len(rows)))
    for shuffle in (False, True):
        ranks = [
            StreamedDataset(stream, Plain(), shuffle=shuffle, seed=0, rank=r, world_size=2)
            for r in range(2)
        ]
        seen = [sample for rank in ranks for sample in rank]
        assert (sorted(seen) if shuffle else seen) == expected
