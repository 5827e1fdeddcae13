"""The teacher's logits on the disk: what they depend on, how they are kept, how much they take."""

from __future__ import annotations

import json
import sqlite3
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from asked import GB, SHAPE, Asked, assert_whole, files
from tiny import SIDE, tiny_student, tiny_teacher
from torch import nn

from kd_trainer import teacher_cache
from kd_trainer.fields import parse_size
from kd_trainer.teacher import Teacher
from kd_trainer.teacher_cache import (
    CacheBudget,
    TeacherCache,
    as_half,
    cache_file,
    cache_key,
    cached_images,
    decode,
    encode,
)


@pytest.fixture(autouse=True)
def each_batch_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """These teachers answer in no time; a real one takes longer than a transaction."""
    monkeypatch.setattr(teacher_cache, "_WRITE_SECONDS", 0.0)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "a.sqlite"


def test_a_filled_cache_gives_each_image_its_own_logits(file: Path):
    """Logits of another image look like a bad teacher, and train one student on another's."""
    asked = Asked(files(100))
    assert asked.writer(file, batch_size=3, threads=2).fill() == 100
    assert_whole(file, asked)


def test_a_second_run_asks_for_what_is_new_and_nothing_else(file: Path):
    """The point of the cache; and images that were added have to be there too."""
    Asked(files(20)).writer(file).fill()
    again = Asked(files(20))
    assert again.writer(file).fill() == 0
    assert again.count == 0
    more = Asked(files(30))
    assert more.writer(file).fill() == 10
    assert more.count == 10 + 8  # which are measured first
    assert_whole(file, more)


def test_the_same_file_in_two_rows_is_kept_once(file: Path):
    assert Asked([*files(5), *files(5)]).writer(file).fill() == 5
    assert len(cached_images(file)) == 5


def test_half_precision_is_exact_for_bf16_and_near_for_fp32():
    """The docs promise it; an evaluation must find the teacher's own classes."""
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 64, 64, generator=draw) * 8
    bf16 = logits.bfloat16().float()
    assert torch.equal(torch.from_numpy(as_half(bf16)).float(), bf16)
    near = torch.from_numpy(decode(encode(as_half(logits)), (3, 64, 64))).float()
    assert (near - logits).abs().max() < 0.008  # half a step at logits of 16 to 32
    assert torch.equal(near > 0, logits > 0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e5])
def test_logits_that_half_precision_cannot_hold_are_refused(value: float):
    """They would come back as infinity, and the loss would stop the run hours later."""
    logits = torch.zeros(1, 4, 4)
    logits[0, 1, 2] = value
    with pytest.raises(FloatingPointError, match="at most 65504"):
        as_half(logits)


def changed_teachers() -> dict[str, Teacher]:
    """One teacher, and others that differ from it in one thing each."""
    network = tiny_student(seed=7)
    other_weights = tiny_student(seed=7)
    with torch.no_grad():
        next(other_weights.encoder.parameters()).view(-1)[0] += 1e-6
    buffers = tiny_student(seed=7)
    for name, value in buffers.named_buffers():
        if name.endswith("running_mean"):
            value += 1e-6
            break
    activation = tiny_student(seed=7)
    for module in activation.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.ReLU):
                setattr(module, name, nn.ReLU6())
    plain = {"num_labels": 2}
    return {
        "weights": Teacher(other_weights, **plain),
        "running statistics": Teacher(buffers, **plain),
        "activation": Teacher(activation, **plain),
        "dtype": Teacher(tiny_student(seed=7).bfloat16(), **plain),
        "input size": Teacher(network, image_size=64, **plain),
        "mean": Teacher(network, mean=(0.5, 0.456, 0.406), **plain),
        "std": Teacher(network, std=(0.3, 0.224, 0.225), **plain),
        "student's mean": Teacher(network, input_mean=(0.5, 0.456, 0.406), **plain),
        "both means": Teacher(network, mean=(0.5,) * 3, input_mean=(0.5,) * 3, **plain),
        "both deviations": Teacher(network, std=(0.3,) * 3, input_std=(0.3,) * 3, **plain),
        "class order": Teacher(network, class_map=((1,), (0,)), **plain),
        "class map": Teacher(network, class_map=((0,), (1,)), **plain),
        "classes": Teacher(network, num_labels=3),
    }


def name_of(teacher: Teacher, **changed: Any) -> str:
    settings = {"image_size": SIDE, "precision": "no", "folded": True}
    return cache_file(Path(), cache_key(teacher, **(settings | changed))).name


def test_nothing_that_changes_the_logits_leaves_the_file_the_same():
    """A stale entry is silently wrong: the student would follow a teacher that is not there."""
    base = Teacher(tiny_student(seed=7), num_labels=2)
    names = {what: name_of(teacher) for what, teacher in changed_teachers().items()}
    names["image size"] = name_of(base, image_size=64)
    names["precision"] = name_of(base, precision="bf16")
    names["folded"] = name_of(base, folded=False)
    names["none"] = name_of(base)
    assert len(set(names.values())) == len(names), names


def test_the_file_of_a_teacher_is_the_same_for_a_copy_of_it(tmp_path: Path):
    """Else moving a teacher, or loading it again, would ask it for everything anew."""
    one = Teacher(tiny_student(seed=7), num_labels=2)
    one.network.save_pretrained(tmp_path / "moved")
    again = type(one.network).from_pretrained(tmp_path / "moved")
    assert name_of(one) == name_of(Teacher(again, num_labels=2))
    assert name_of(tiny_teacher()) == name_of(tiny_teacher())
    json.dumps(cache_key(one, image_size=SIDE, precision="no", folded=False))


def test_another_file_of_the_same_name_has_no_entry(file: Path):
    """Entries go by the bytes: an image that was edited must not meet the old logits."""
    Asked(files(3)).writer(file).fill()
    with pytest.raises(ValueError, match=r"logits of photo.jpg .* got none.*--resume"):
        TeacherCache(file, SHAPE).logits(b"file 1 edited", "photo.jpg")


def test_an_image_that_changes_while_the_cache_is_filled_is_an_error(file: Path):
    asked = Asked(files(12))
    writer = asked.writer(file)
    asked.data[11] = b"edited meanwhile"
    with pytest.raises(ValueError, match="row 11 as it was when the run began"):
        writer.fill()


def changed_byte(file: Path) -> None:
    """Change one byte of logits, as a rotten disk does, which sqlite does not see."""
    with sqlite3.connect(file) as database:
        query = "SELECT data FROM logits ORDER BY length(data) DESC"
        (data,) = database.execute(query).fetchone()
    database.close()
    content = file.read_bytes()
    assert content.count(data[-12:]) == 1
    place = content.index(data[-12:])
    file.write_bytes(content[:place] + bytes([content[place] ^ 0x10]) + content[place + 1 :])


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: file.write_bytes(file.read_bytes()[:-20_000]),
        lambda file: file.write_bytes(b"something else" + file.read_bytes()[14:]),
        changed_byte,
    ],
    ids=["cut off", "no database", "changed byte"],
)
def test_a_damaged_file_is_named_with_what_to_do(file: Path, damage: Callable[[Path], object]):
    """Rotten bytes must not become logits."""
    draw = torch.Generator().manual_seed(0)
    asked = Asked(files(5))
    noise = torch.randn(1, 1, 8, 8, generator=draw)
    asked.infer = lambda pixels: noise + pixels[:, :1]
    asked.writer(file).fill()
    damage(file)
    cache = TeacherCache(file, SHAPE)
    with pytest.raises(ValueError, match=r"a.sqlite as they were written, got .*Delete it"):
        [cache.logits(data, "x") for data in asked.data]
    file.unlink()  # what the message says
    again = Asked(files(5))
    assert again.writer(file).fill() == 5
    assert_whole(file, again)


def test_a_damaged_file_stops_filling_and_stays(file: Path):
    """What is deleted is for its owner to say; another run may read it."""
    file.write_bytes(b"not a database, though long enough to be one" * 100)
    with pytest.raises(ValueError, match=r"got a damaged file: file is not a database\. Delete it"):
        Asked(files(5)).writer(file).fill()
    assert file.stat().st_size == 4400


def test_a_file_that_goes_while_it_is_used_is_named(file: Path):
    asked = Asked(files(1))
    asked.writer(file).fill()
    file.unlink()
    with pytest.raises(OSError, match=r"use the teacher's logits in .*a.sqlite, got: unable to"):
        TeacherCache(file, SHAPE).logits(asked.data[0], "x")
    assert not file.exists()


def test_a_full_cache_is_only_read(file: Path):
    """Several runs read one file, which may belong to somebody else."""
    asked = Asked(files(30))
    asked.writer(file).fill()
    file.chmod(stat.S_IRUSR)
    file.parent.chmod(stat.S_IRUSR | stat.S_IXUSR)
    before = file.stat().st_mtime_ns, file.read_bytes()
    assert asked.writer(file, bound=1).fill() == 0  # a lower bound does not matter
    assert_whole(file, asked)
    file.parent.chmod(stat.S_IRWXU)
    assert (file.stat().st_mtime_ns, file.read_bytes()) == before
    assert [path.name for path in file.parent.iterdir()] == [file.name]


@pytest.mark.parametrize(
    ("text", "size"),
    [("20GB", 20 * GB), ("500 mb", 5e8), ("1.5GiB", 1.5 * 2**30), ("2T", 2e12), ("123", 123)],
)
def test_sizes_are_read_as_people_write_them(text: str, size: float):
    assert parse_size(text, "flag") == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0GB", "20 gigabytes", "1e9"])
def test_what_is_no_size_is_refused(text: str):
    with pytest.raises(ValueError, match="Expected --flag as 20GB"):
        parse_size(text, "flag")


def test_a_cache_that_will_not_fit_is_refused_before_anything_is_written(tmp_path: Path):
    """A disk that is full after hours is worse than an error at the start."""
    asked, file = Asked(files(1000)), tmp_path / "root" / "a.sqlite"
    with pytest.raises(ValueError, match=r"1,000 images of about .* kB, together .*Raise it"):
        asked.writer(file, bound=200_000).fill()
    assert asked.count < 20
    assert not file.parent.exists()


def test_what_other_teachers_left_counts_and_is_named(file: Path):
    """The bound is one for the folder; what could be deleted should not have to be searched."""
    old = file.with_name("old.sqlite")
    Asked(files(200)).writer(old).fill()
    file.with_name("notes.txt").write_bytes(bytes(100_000))  # not ours: is no cure
    bound = old.stat().st_size + 1000
    with pytest.raises(ValueError, match=r"longer used: 1 other file in .*, the largest old"):
        Asked(files(200)).writer(file, bound).fill()
    assert not file.exists()


def test_a_full_disk_is_refused_before_anything_is_written(file: Path, monkeypatch):
    usage = type("Usage", (), {"free": 5000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(ValueError, match=r"of free disk at .* got 5 kB. Make room"):
        Asked(files(200)).writer(file).fill()
    assert not file.exists()


def test_two_teachers_that_fill_at_once_stay_within_the_bound(file: Path):
    """Each of them alone would fit; the folder must not grow beyond what was allowed."""
    asked, other, bound = Asked(files(60)), file.with_name("other.sqlite"), 1_100_000
    infer = asked.infer

    def beside_another(pixels: torch.Tensor) -> torch.Tensor:
        if asked.count == 20:  # begun: both have looked at a folder with room for them
            other.write_bytes(bytes(bound - file.stat().st_size))
        return infer(pixels)

    asked.infer = beside_another
    with pytest.raises(ValueError, match=r"--teacher_cache_size.*largest other"):
        asked.writer(file, bound).fill()
    assert 8 <= len(cached_images(file)) < 60
    assert sum(CacheBudget(file.parent, bound).used().values()) <= bound


def test_a_disk_that_takes_no_more_ends_in_one_line(file: Path, monkeypatch):
    """sqlite's own error names neither the file nor what to do; what was written stays."""
    asked = Asked(files(400))
    statement = "PRAGMA max_page_count = 6"  # as good as a disk that is full
    monkeypatch.setattr(teacher_cache, "_TABLES", (*teacher_cache._TABLES, statement))
    with pytest.raises(OSError, match=r"a.sqlite, got: database or disk is full \(.* are free"):
        asked.writer(file).fill()
    monkeypatch.undo()
    assert 0 < len(cached_images(file)) < 400
    asked.writer(file).fill()
    assert_whole(file, asked)
