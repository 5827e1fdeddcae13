"""Paths in data lead into the folder of the data, or nowhere: other images are private."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import datasets
import fsspec
import pyarrow
import pyarrow.parquet
import pytest
from huggingface_hub import constants
from pycocotools import mask as coco_mask
from small_runs import write_pairs

from kd_trainer.data import load_splits
from kd_trainer.data.images import decode_image
from kd_trainer.data.listing import is_inside
from kd_trainer.data.mask_files import decode_mask
from kd_trainer.data_arguments import DataArguments

FEATURES = datasets.Features(dict.fromkeys(("image", "mask"), datasets.Image(decode=False)))


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A data set, and beside its folder an image that is none of its business."""
    root = write_pairs(tmp_path / "data", train=2, validation=2)
    shutil.copy(root / "train" / "images" / "p 0.png", tmp_path / "secret.png")
    return root


def table(image: str, root: Path) -> datasets.Dataset:
    mask = {"path": None, "bytes": (root / "train" / "masks" / "p 0.png").read_bytes()}
    rows = {"image": [{"path": image, "bytes": None}], "mask": [mask]}
    return datasets.Dataset.from_dict(rows, features=FEATURES)


def write(kind: str, root: Path, rows: datasets.Dataset) -> Path:
    """Tables as others write them: `datasets` itself would put the images into them."""
    if kind == "parquet":
        for split in ("train", "validation"):
            pyarrow.parquet.write_table(rows.data.table, root / f"{split}.parquet")
        return root / "train.parquet"
    plain = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    rows = rows.cast(datasets.Features(dict.fromkeys(("image", "mask"), plain)))
    datasets.DatasetDict({"train": rows, "validation": rows}).save_to_disk(root / "saved")
    return root / "saved"


def read(path: Path | str, streaming: bool = False) -> list[dict]:
    """The first row of both splits, decoded."""
    splits = load_splits(DataArguments(dataset=str(path), streaming=streaming))
    rows = [next(iter(splits[name])) for name in splits]
    return [{"path": row["image"]["path"], "image": decode_image(row["image"], 0)} for row in rows]


OUTSIDE = {
    "up": "../secret.png",
    "up and down": "train/../../secret.png",
    "absolute": "{root}/../secret.png",
    "elsewhere": "{outside}/secret.png",
    "file address": "file://{outside}/secret.png",
    "web address": "https://example.invalid/secret.png",
    "hub address": "hf://datasets/eve/other@main/secret.png",
    "zip of a file": "zip://a.png::file://{outside}/secret.zip",
}


@pytest.mark.parametrize("how", OUTSIDE)
@pytest.mark.parametrize(
    ("kind", "streaming"),
    [("parquet", False), ("parquet", True), ("saved", False), ("saved", True)],
)
def test_a_path_in_a_table_cannot_leave_the_data(kind, streaming, how, images):
    """The image would be drawn into the report and the panel, which are published."""
    place = OUTSIDE[how].format(root=images, outside=images.parent)
    path = write(kind, images, table(place, images))
    with pytest.raises(
        ValueError, match=r"^Expected paths inside .*, got .*secret.*leads out of it"
    ):
        read(path, streaming)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("place", ["train/images/p 1.png", "{root}/train/images/p 1.png"])
def test_a_path_inside_the_data_is_read_from_wherever_one_stands(
    place, streaming, images, tmp_path, monkeypatch
):
    """A relative path begins at the data, not at the folder in which somebody starts the run."""
    path = write("parquet", images, table(place.format(root=images), images))
    monkeypatch.chdir(tmp_path)
    for found in read(path, streaming):
        assert Path(found["path"]) == images / "train" / "images" / "p 1.png"
        assert found["image"].shape == (64, 64, 3)


def stored_table(cells: list[dict], root: Path) -> Path:
    """Tables of cells as they are, which `datasets` would change while it makes a data set."""
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    mask = {"path": None, "bytes": (root / "train" / "masks" / "p 0.png").read_bytes()}
    columns = {"image": cells, "mask": [mask] * len(cells)}
    arrays = {name: pyarrow.array(column, kind) for name, column in columns.items()}
    for split in ("train", "validation"):
        pyarrow.parquet.write_table(pyarrow.table(arrays), root / f"{split}.parquet")
    return root / "train.parquet"


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("further", [[], [{"bytes": None, "path": "train/images/p 0.png"}]])
def test_bytes_do_not_let_a_path_through(streaming, further, images):
    """`datasets` drops the bytes of an image whose path is a file here, and would read that."""
    secret = str(images.parent / "secret.png")
    path = stored_table([{"bytes": b"no image", "path": secret}, *further], images)
    with pytest.raises(ValueError, match=r"^Expected a readable image, got .*secret.png \(row 0"):
        read(path, streaming)
    path = stored_table([{"bytes": b"", "path": secret}, *further], images)
    with pytest.raises(ValueError, match=r"^Expected an image, got no bytes at .*secret.png"):
        read(path, streaming)


def test_stored_images_keep_their_names(images):
    """With the bytes in the table the path is a name, whatever it looks like."""
    stored = (images / "train" / "images" / "p 0.png").read_bytes()
    path = stored_table([{"bytes": stored, "path": "/home/me/p 0.png"}], images)
    assert [found["path"] for found in read(path)] == ["/home/me/p 0.png"] * 2
    assert [found["path"] for found in read(path, True)] == ["train.parquet: /home/me/p 0.png"] * 2


@pytest.mark.parametrize("streaming", [False, True])
def test_columns_of_bare_bytes_or_paths_are_images_too(streaming, images):
    """Tables that `datasets` has not written have no struct of bytes and path."""
    folder = images / "train"
    columns = {
        "image": ["train/images/p 0.png"],
        "mask": [(folder / "masks" / "p 0.png").read_bytes()],
    }
    for split in ("train", "validation"):
        pyarrow.parquet.write_table(pyarrow.table(columns), images / f"{split}.parquet")
    found = read(images / "train.parquet", streaming)
    assert [Path(one["path"]) for one in found] == [folder / "images" / "p 0.png"] * 2


def coco(root: Path, file_name: str) -> Path:
    (root / "annotations").mkdir()
    shape = {"id": 1, "image_id": 1, "category_id": 1, "segmentation": [[0, 0, 9, 0, 9, 9]]}
    content = {
        "categories": [{"id": 1, "name": "box"}],
        "images": [{"id": 1, "file_name": file_name, "height": 64, "width": 64}],
        "annotations": [shape],
    }
    for split in ("train", "validation"):
        (root / "annotations" / f"{split}.json").write_text(json.dumps(content))
    return root / "annotations" / "train.json"


@pytest.mark.parametrize(
    "name",
    [
        "../secret.png",
        "{outside}/secret.png",
        "a/../../secret.png",
        "..\\secret.png",
        "file://{outside}/secret.png",
        "..",
        "{outside}/",
    ],
)
def test_a_file_name_in_coco_annotations_cannot_leave_the_images(name, images):
    path = coco(images, name.format(outside=images.parent))
    with pytest.raises(FileNotFoundError, match=r"^Expected the images of .*, got none of "):
        read(path)


@pytest.mark.parametrize(
    "name",
    [
        "/home/me/data/p 1.png",
        "../../label-studio/data/media/upload/1/p 1.png",
        "C:\\Users\\me\\p 1.png",
        "\\\\server\\share\\p 1.png",
        "images\\p 1.png",
        "/data/local-files/?d=photos/p 1.png",
        "http://localhost:8080/data/p 1.png",
        "D:\\data\\train\\images\\p 1.png",
    ],
)
def test_a_path_of_a_labelling_tool_is_looked_up_by_its_end_and_said(name, images, capsys):
    """Label Studio and tools on Windows write where the files lay on the machine they ran on."""
    (images.parent / "p 1.png").write_bytes(b"the file of that name outside")
    found = read(coco(images, name))[0]
    assert Path(found["path"]) == images / "train" / "images" / "p 1.png"
    told = capsys.readouterr().err
    assert "1 of 1 file names of " in told
    assert f"{name} is " in told


def test_two_paths_that_would_be_one_file_here_are_named(images):
    """The masks of two images would both be taught on one of them."""
    path = coco(images, "/a/p 1.png")
    for file in path.parent.iterdir():
        content = json.loads(file.read_text())
        content["images"].append(content["images"][0] | {"id": 2, "file_name": "/b/p 1.png"})
        file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"another file, got /a/p 1.png and /b/p 1.png, which are"):
        read(path)


def test_names_inside_the_images_are_not_spoken_of(images, capsys):
    read(coco(images, "train/images/p 1.png"))
    assert "another machine" not in capsys.readouterr().err


def test_a_file_name_in_a_folder_below_is_what_many_annotations_hold(images):
    assert read(coco(images, "train/images/p 1.png"))[0]["image"].shape == (64, 64, 3)


# Runs of 9^9 pixels as COCO compresses them: valid, but for the size of the image.
RUNS = coco_mask.frPyObjects({"size": [64, 64], "counts": [0, 9**9]}, 64, 64)["counts"].decode()
ODD = {
    "bomb": ({"height": 50_000, "width": 50_000}, {}, "at most 89,478,485 pixels"),
    "endless": ({"height": 10**400}, {}, "at most 89,478,485 pixels"),
    "no number": ({"height": "64"}, {}, "got '64' and 64"),
    "negative": ({"height": -64, "width": -64}, {}, "got -64 and -64"),
    "far corner": ({}, {"segmentation": [[0, 0, 1e9, 0, 9, 9]]}, "a corner at 1e\\+09"),
    "corner nowhere": ({}, {"segmentation": [[0, 0, float("nan"), 0, 9, 9]]}, "a corner at nan"),
    "words": ({}, {"segmentation": [["a", "b", "c", "d", "e", "f"]]}, "polygons or RLE"),
    "long runs": ({}, {"segmentation": {"size": [64, 64], "counts": [0, 9**9]}}, "387420489 pix"),
    "garbled runs": ({}, {"segmentation": {"size": [64, 64], "counts": RUNS}}, "polygons or RLE"),
    "negative runs": (
        {},
        {"segmentation": {"size": [64, 64], "counts": [0, -1, 4097]}},
        "no numbers of pixels",
    ),
    "long way": ({}, {"segmentation": [[0, 0, 640, 640] * 1000]}, "edges of 1,280,000 pixels"),
    "points": ({}, {"segmentation": [[[0, 0]] * 6]}, "no list of x, y"),
    "infinite": ({"height": float("inf")}, {}, "got inf and 64"),
    "not a number": ({"width": float("nan")}, {}, "got 64 and nan"),
    "true": ({"width": True}, {}, "got 64 and True"),
    "area in words": ({}, {"area": "large"}, "a finite number as area .* got 'large' in entry 0"),
    "area nowhere": ({}, {"area": float("nan")}, "a finite number as area .* got nan"),
    "crowd in words": ({}, {"iscrowd": "no"}, "0 or 1 as iscrowd .* got 'no'"),
    "category list": ({}, {"category_id": [1]}, "a whole number as category_id .* got \\[1\\]"),
    "image list": ({}, {"image_id": {}}, "a whole number or a text as image_id .* got {}"),
    "name list": ({"file_name": ["a"]}, {}, "a text without control .* as file_name .* got \\['a'"),
    "name of a bell": ({"file_name": "\a.png"}, {}, "as file_name .* got '.x07.png'"),
    "no runs": ({}, {"segmentation": {"size": [64, 64]}}, "polygons or RLE"),
}


def test_annotations_that_are_nested_without_end_get_one_line(images):
    path = coco(images, "train/images/p 1.png")
    path.write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"^Expected a COCO json, got .* nested too deeply"):
        read(path)


def test_numbers_written_as_text_and_a_byte_order_mark_are_read(images):
    """Category ids as text matched nothing, so that every mask was empty."""
    path = coco(images, "train/images/p 1.png")
    for file in path.parent.iterdir():
        content = json.loads(file.read_text())
        content["annotations"][0] |= {"category_id": "1", "area": 5.5, "iscrowd": False}
        content["categories"][0]["id"] = "1"
        file.write_text(json.dumps(content), encoding="utf-8-sig")
    splits = load_splits(DataArguments(dataset=str(path)))
    assert decode_mask(splits["train"][0]["mask"], 0).any()


@pytest.mark.parametrize("how", ODD)
def test_annotations_that_cannot_be_drawn_are_named(how, images):
    """A number in a json may ask for all memory, or for hours, as well as an image's head may."""
    image, annotation, message = ODD[how]
    path = coco(images, "train/images/p 1.png")
    for file in path.parent.iterdir():
        content = json.loads(file.read_text())
        content["images"][0] |= image
        content["annotations"][0] |= annotation
        file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"^Expected .*{message}.*json"):
        read(path)


def test_a_data_folder_and_files_in_it_may_be_links(images, tmp_path):
    """Subsets of large collections are often folders of links; these are the user's own."""
    link = tmp_path / "link"
    link.symlink_to(images, target_is_directory=True)
    image = images / "train" / "images" / "p 0.png"
    shutil.move(image, tmp_path / "moved.png")
    image.symlink_to(tmp_path / "moved.png")
    assert read(link)[0]["image"].shape == (64, 64, 3)
    for place in ("train/images/p 0.png", str(link / "train/images/p 0.png")):
        assert read(write("parquet", link, table(place, images)))[0]["image"].ndim == 3


ELSEWHERE_ON_THE_HUB = (
    "file://{secret}::hf://datasets/me/people@main/a.png",
    "zip://a.png::hf://datasets/me/people@main/a.zip",
    "simplecache::hf://datasets/me/people@main/a.png",
    "hf://datasets/me/people@main/file://{secret}",
    "hf://datasets/me/people2@main/a.png",
    "hf://datasets/me/people/../private/a.png",
    "hf://datasets/me/people@main/../../../private/resolve/main/a.png",
    "hf://datasets/me/people@main/%2E%2E/%2e%2e/a.png",
    "hf://datasets/me/people@..%2F..%2Fprivate/a.png",
    "hf://datasets/me/people@main/b\\..\\..\\a.png",
    "HF://datasets/me/people@main/a.png",
    "https://huggingface.co/datasets/me/people/resolve/main/a.png",
)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_data_set_of_the_hub_reads_its_own_files_only(streaming, images, tmp_path, monkeypatch):
    """Files of the Hub lie in the cache, under absolute paths, or are addresses."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    own = tmp_path / "cache" / "datasets--me--people" / "snapshots" / "a.png"
    own.parent.mkdir(parents=True)
    shutil.copy(tmp_path / "secret.png", own)
    builder = SimpleNamespace(config=SimpleNamespace(data_files=None))
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda name: builder)

    def answer(place: str):
        def load(name, *, split, streaming):
            rows = table(place, images)
            return rows.to_iterable_dataset() if streaming else rows

        monkeypatch.setattr(datasets, "load_dataset", load)

    answer(str(own))
    assert read("me/people", streaming)[0]["path"] == str(own)
    for place in (str(tmp_path / "secret.png"), str(own.parents[3] / "datasets--me--x" / "a.png")):
        answer(place)
        with pytest.raises(ValueError, match=r"^Expected paths inside .*in me/people"):
            read("me/people", streaming)
    for place in ELSEWHERE_ON_THE_HUB:
        answer(place.format(secret=tmp_path / "secret.png"))
        with pytest.raises(ValueError, match=r"^Expected (paths inside|one address) .*in me/peop"):
            read("me/people", streaming)
    answer("hf://datasets/me/people@0a1b/a.png")  # its own, which nobody serves here
    splits = load_splits(DataArguments(dataset="me/people", streaming=streaming))
    assert next(iter(splits["train"]))["image"]["path"].startswith("hf://datasets/me/people@")


@pytest.mark.parametrize(
    ("name", "inside"),
    [
        ("a.png", True),
        ("b/写真 1.png", True),
        ("b/..c/a.png", True),
        ("../a.png", False),
        ("b/../a.png", False),
        ("/a.png", False),
        ("\\\\server\\a.png", False),
        ("C:\\a.png", False),
        ("b\\..\\..\\a.png", False),
        ("a\0.png", False),
    ],
)
def test_is_inside_reads_paths_of_both_kinds(name, inside):
    """Annotations made on Windows are read here, and the other way round."""
    assert is_inside(name) is inside


def test_a_remote_image_is_read_no_further_than_a_local_one(monkeypatch):
    """A server may send without end."""
    monkeypatch.setattr("kd_trainer.data.images.MAX_BYTES", 10)
    fsspec.filesystem("memory").pipe("/much.png", bytes(11))
    with pytest.raises(ValueError, match=r"^Expected an image of at most 10 bytes, got more in"):
        decode_image({"bytes": None, "path": "memory://much.png"}, 0)
