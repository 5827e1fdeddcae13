"""`--on_bad_sample skip`: bad rows are named, counted and left out, and nothing replaces them."""

import json
import subprocess
import sys
from pathlib import Path

import cv2
import datasets
import numpy as np
import pytest
from safetensors.torch import load_file
from small_runs import SIDE, save_network, train_flags, write_pairs
from spoiled import REASONS, spoiled_pairs
from torch.utils.data import DataLoader

from kd_trainer.commands.evaluate import evaluate_main
from kd_trainer.commands.train import train
from kd_trainer.config import parse
from kd_trainer.data import (
    BadSample,
    StreamedDataset,
    TransformedDataset,
    collate,
    load_splits,
    transforms,
    usable_splits,
)
from kd_trainer.data.bad_samples import Readable, check_split, readable_values
from kd_trainer.data_arguments import DataArguments

BAD_ROWS = [0, 4, 6, 8, 10]  # p 0, p 2, p 4, p 6, p 8: rows go by name, and p 10 follows p 1
SKIP = ("--on_bad_sample", "skip", "--max_bad_share", "0.5")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> tuple[Path, Path]:
    return spoiled_pairs(tmp_path_factory.mktemp("pairs"))


def settings(path: object, **fields: object) -> DataArguments:
    chosen = {"augmentation": "light", "image_size": SIDE, "on_bad_sample": "skip"}
    return DataArguments(dataset=str(path), **(chosen | {"max_bad_share": 0.5} | fields))


def usable(data: DataArguments) -> tuple[list, list[BadSample]]:
    """Training samples of what is left, and what was left out."""
    splits, bad = usable_splits(load_splits(data), data)
    dataset = TransformedDataset(splits["train"], transforms(splits, data, seed=0)[0])
    return [dataset[i] for i in range(len(dataset))], bad["train"]


def same(one: list, other: list) -> bool:
    return all(a[k].equal(b[k]) for a, b in zip(one, other, strict=True) for k in a)


def test_what_is_left_is_the_data_set_that_never_held_the_bad_rows(pairs):
    """A substitute, or rows that keep their old numbers and so other draws, would show here."""
    bad, good = pairs
    found, left_out = usable(settings(bad))
    expected, none = usable(settings(good))
    assert same(found, expected)
    assert none == []
    assert [Path(sample.file).stem for sample in left_out] == [f"p {n}" for n in (0, 2, 4, 6, 8)]
    for sample, reason in zip(left_out, REASONS.values(), strict=True):
        assert reason in sample.reason
        assert Path(sample.file).name in sample.reason


def test_by_default_the_first_bad_sample_is_an_error(pairs):
    """Skipping must be asked for: a data set that shrinks by itself is a silent substitute."""
    assert DataArguments().on_bad_sample == "error"
    with pytest.raises(
        ValueError, match=r"^Expected a readable image, got .*p 0.png: image file is tru"
    ):
        usable(settings(pairs[0], on_bad_sample="error", max_bad_share=0.01))


@pytest.mark.slow
def test_a_run_over_bad_files_is_the_run_without_them_bit_for_bit(tmp_path, capfd):
    """Order of the data, batches and augmentation all depend on the number of rows."""
    for name, data in zip(("bad", "good"), spoiled_pairs(tmp_path / "data"), strict=True):
        out = tmp_path / name
        results = train(parse(train_flags(data, out, *SKIP, "--epochs", "1")))
        assert results == json.loads((out / "results.json").read_text())
        assert (results["bad_samples"], results["train_images"]) == (5 if name == "bad" else 0, 7)
    first, second = (load_file(tmp_path / n / "student/model.safetensors") for n in ("bad", "good"))
    assert all(first[key].equal(second[key]) for key in second)
    listed = (tmp_path / "bad" / "bad_samples.txt").read_text().splitlines()[1:]
    assert [line.split("\t")[:2] for line in listed] == [["train", str(n)] for n in BAD_ROWS]
    printed = capfd.readouterr().err
    assert [printed.count(f"left out: train row {n}: Expected ") for n in BAD_ROWS] == [1] * 5


def test_too_many_bad_samples_end_the_run_with_the_first_reason(pairs, tmp_path):
    """With a wrong folder of masks every sample is bad, and nothing would be left to train on."""
    with pytest.raises(ValueError, match=r"^Expected at most 1.00% .*got 5 of 12.*p 0.png"):
        usable(settings(pairs[0], max_bad_share=0.01))
    root = write_pairs(tmp_path, train=4, validation=3)
    for number in range(3):
        (root / "validation" / "images" / f"p {number}.png").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"split 'validation' .*got 3 of 3"):
        usable(settings(root, max_bad_share=1))


def test_a_mask_that_contradicts_the_rule_is_bad(tmp_path, monkeypatch):
    """Each of 0, 1 and 255 is known; which reading is right only the whole data set says."""
    root = write_pairs(tmp_path, train=8)
    for path in root.glob("*/masks/*.png"):
        if path.name != "p 3.png":
            cv2.imwrite(str(path), cv2.imread(str(path), 0) // 255)
    monkeypatch.setattr("kd_trainer.data.pipeline.SAMPLE", 2)  # the rule comes from others
    found, bad = usable(settings(root))
    assert len(found) == 7
    assert [sample.row for sample in bad] == [3]
    assert "255 may be foreground or ignored" in bad[0].reason
    assert "p 3.png" in bad[0].reason


def parquet(root: Path, bad: Path) -> Path:
    """The pair folder as parquet files that hold the images."""
    root.mkdir()
    for split in ("train", "validation"):
        rows = {
            column: [
                {"path": path.name, "bytes": path.read_bytes() or b"nothing"}
                for path in sorted((bad / split / folder).iterdir())
            ]
            for column, folder in (("image", "images"), ("mask", "masks"))
        }
        features = datasets.Features(dict.fromkeys(rows, datasets.Image(decode=False)))
        datasets.Dataset.from_dict(rows, features=features).to_parquet(root / f"{split}.parquet")
    return root


def coco(root: Path, bad: Path) -> Path:
    """The images of the pair folder with a box as polygon; one entry has another size."""
    (root / "annotations").mkdir(parents=True)
    for split in ("train", "validation"):
        (root / split).mkdir()
        names = sorted(path.name for path in (bad / split / "images").iterdir())
        for name in names:
            (root / split / name).write_bytes((bad / split / "images" / name).read_bytes())
        sizes = {name: SIDE // 2 if name == "p 4.png" else SIDE for name in names}
        box = [2, 2, 20, 2, 20, 20, 2, 20]
        content = {
            "categories": [{"id": 1, "name": "box"}],
            "images": [
                {"id": i, "file_name": name, "height": SIDE, "width": sizes[name]}
                for i, name in enumerate(names)
            ],
            "annotations": [
                {"id": i, "image_id": i, "category_id": 1, "segmentation": [box]}
                for i in range(len(names))
            ],
        }
        (root / "annotations" / f"{split}.json").write_text(json.dumps(content))
    return root


@pytest.mark.parametrize(("make", "expected"), [(parquet, BAD_ROWS), (coco, [0, 4, 6])])
def test_other_sources_lose_their_bad_rows_too(make, expected, pairs, tmp_path):
    """Each source names its cells in its own way."""
    found, bad = usable(settings(make(tmp_path / "data", pairs[0])))
    assert [sample.row for sample in bad] == expected[: len(bad)]
    assert len(bad) == (len(expected) if make is parquet else 3)
    assert len(found) + len(bad) == 12


def test_unlabelled_images_are_looked_at_too(pairs, tmp_path):
    """They are rows of the training split, of which only the first bytes are read before a run."""
    more = tmp_path / "more"
    more.mkdir()
    image = (pairs[1] / "train" / "images" / "p 1.png").read_bytes()
    (more / "a.png").write_bytes(image)
    (more / "b.png").write_bytes(image[:-200])
    found, bad = usable(settings(pairs[1], unlabelled=str(more)))
    assert len(found) == 8
    assert [(sample.row, Path(sample.file).name) for sample in bad] == [(8, "b.png")]


def streamed(data: DataArguments, **options: object) -> StreamedDataset:
    splits, _ = usable_splits(load_splits(data), data)
    transform = transforms(splits, data, seed=0)[1]
    chosen = {"shuffle": False, "seed": 0, "max_bad_share": data.max_bad_share, "name": "train"}
    return StreamedDataset(splits["train"], transform, **(chosen | options))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_leaves_the_same_rows_out_and_names_each_once(workers, tmp_path, capfd):
    """Without an index there is no pass before the run; and each epoch reads the files anew."""
    bad, good = spoiled_pairs(tmp_path)
    stream = streamed(settings(bad, streaming=True, augmentation="none"), batch_size=2)
    loader = DataLoader(stream, batch_size=2, collate_fn=collate, num_workers=workers)
    for _ in range(2):
        images = [image for batch in loader for image in batch["pixel_values"]]
    expected = usable(settings(good, augmentation="none"))[0]
    key = np.ndarray.tobytes
    assert sorted(key(i.numpy()) for i in images) == sorted(
        key(sample["pixel_values"].numpy()) for sample in expected
    )
    assert [sample.row for sample in stream.bad_samples] == BAD_ROWS
    printed = capfd.readouterr().err
    assert [printed.count(f"left out: train row {n}: Expected ") for n in BAD_ROWS] == [1] * 5


def test_a_stream_stops_at_one_bad_sample_too_many(pairs):
    """The share is of the announced length, so it does not depend on when bad rows come."""
    stream = streamed(settings(pairs[0], streaming=True, max_bad_share=0.2))
    with pytest.raises(ValueError, match=r"^Expected at most 20.00% .* got 3 of 12"):
        list(stream)
    strict = streamed(settings(pairs[0], streaming=True), max_bad_share=None)
    with pytest.raises(ValueError, match=r"^Expected a readable image, got .*p 0.png"):
        list(strict)
    with pytest.raises(ValueError, match=r"^Expected one process with --streaming"):
        streamed(settings(pairs[0], streaming=True), even=True, world_size=2)


def test_eval_leaves_bad_samples_out_and_says_so(tmp_path, capfd):
    """A figure over fewer images than the split has must not look like one over all of them."""
    root = write_pairs(tmp_path / "data", train=2, validation=4)
    (root / "validation" / "images" / "p 1.png").write_bytes(b"no image")
    model, out = save_network(tmp_path / "net"), tmp_path / "out"
    for more in ((), ("--streaming",)):
        evaluate_main([str(model), "--dataset", str(root), "--output_dir", str(out), *SKIP, *more])
        results = json.loads((out / "eval_results.json").read_text())
        assert (results["eval_images"], results["bad_samples"]) == (3, 1)
        assert "p 1.png" in (out / "bad_samples.txt").read_text()
        assert "3 images, 1 bad ones left out" in capfd.readouterr().out


def test_names_cannot_write_to_the_terminal_or_break_the_list():
    """A file name of a stranger may hold tabs, line breaks and escape sequences."""
    odd = BadSample("train", 3, "a\x1b[2J\tb\n.png", "Expected é, got \x07")
    assert odd.line() == "train\t3\ta\\x1b[2J\\tb\\n.png\tExpected é, got \\x07"
    assert str(odd) == "train row 3: Expected é, got \\x07"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"on_bad_sample": "ignore"}, "one of error, skip, got 'ignore'"),
        ({"on_bad_sample": "skip", "max_bad_share": 1.5}, "between 0 and 1, got 1.5"),
        ({"max_bad_share": 0.1}, "--on_bad_sample skip with --max_bad_share 0.1, got error"),
    ],
)
def test_settings_that_do_nothing_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        DataArguments(**fields)


PROCESS = """
import sys, torch.distributed as dist
from kd_trainer.data_arguments import DataArguments
from kd_trainer.data import load_splits, usable_splits
folder, store, rank = sys.argv[1:]
dist.init_process_group("gloo", init_method="file://" + store, rank=int(rank), world_size=2)
data = DataArguments(dataset=folder, on_bad_sample="skip", max_bad_share=0.5)
splits, bad = usable_splits(load_splits(data), data, shared=True)
print(dist.get_world_size(), [b.row for b in bad["train"]], len(splits["train"]))
"""


@pytest.mark.distributed
def test_two_processes_divide_the_files_and_agree(pairs, tmp_path):
    """Ranks with different lists would train on different data and wait for each other forever."""
    started = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(pairs[0]), str(tmp_path / "store"), str(rank)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    ended = [process.communicate(timeout=300) for process in started]
    assert [out.strip() for out, _ in ended] == [f"2 {BAD_ROWS} 7"] * 2, ended
    assert [err.count("left out") for _, err in ended] == [5, 0]


def test_workers_find_what_one_process_finds(pairs):
    """The look is made once; later askers get what is remembered, so it is told apart here."""
    rows = load_splits(settings(pairs[0]))["train"]
    alone = check_split(rows, readable_values(settings(pairs[0], num_labels=2)), name="train")
    shuffled = rows.select(range(11, -1, -1))  # other rows: nothing is remembered of them
    readable = Readable(frozenset({0, 1, 255}))
    assert check_split(shuffled, readable, name="train", workers=2) == alone[::-1]
