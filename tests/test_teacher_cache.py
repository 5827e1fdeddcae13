"""The teacher's logits on the disk: what they depend on, how they are kept, how much they take."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from asked import GB, SHAPE, Asked, assert_whole, files
from tiny import SIDE, tiny_student, tiny_teacher
from torch import nn

from kd_trainer.fields import parse_size
from kd_trainer.teacher import Teacher
from kd_trainer.teacher_cache import (
    Room,
    TargetCache,
    about,
    as_half,
    fill,
    folder_name,
)
from kd_trainer.teacher_cache.coding import decode, encode
from kd_trainer.teacher_cache.filling import stored
from kd_trainer.teacher_cache.shards import bucket_of, shard_paths, write_shard


def test_a_filled_cache_gives_each_image_its_own_logits(tmp_path: Path):
    """Logits of another picture look like a bad teacher, and train one student on another's."""
    asked = Asked(files(100))
    assert fill(tmp_path / "a", asked.work(batch_size=3, threads=2), Room(tmp_path, GB)) == 100
    assert_whole(tmp_path / "a", asked)


def test_a_second_run_asks_for_what_is_new_and_nothing_else(tmp_path: Path):
    """The point of the cache; and photographs that were added have to be there too."""
    room, folder = Room(tmp_path, GB), tmp_path / "a"
    fill(folder, Asked(files(20)).work(), room)
    again = Asked(files(20))
    assert fill(folder, again.work(), room) == 0
    assert again.count == 0
    more = Asked(files(30))
    assert fill(folder, more.work(), room) == 10
    assert_whole(folder, more)


def test_the_same_file_in_two_rows_is_kept_once(tmp_path: Path):
    asked = Asked([*files(5), *files(5)])
    assert fill(tmp_path / "a", asked.work(), Room(tmp_path, GB)) == 5
    assert len(TargetCache(tmp_path / "a", SHAPE)) == 5


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
        "class order": Teacher(network, order=[1, 0], **plain),
        "classes": Teacher(network, num_labels=3),
    }


def name_of(teacher: Teacher, **changed: Any) -> str:
    settings = {"image_size": SIDE, "precision": "no", "folded": True}
    return folder_name(about(teacher, **(settings | changed)))


def test_nothing_that_changes_the_logits_leaves_the_folder_the_same():
    """A stale entry is silently wrong: the student would follow a teacher that is not there."""
    base = Teacher(tiny_student(seed=7), num_labels=2)
    names = {what: name_of(teacher) for what, teacher in changed_teachers().items()}
    names["picture size"] = name_of(base, image_size=64)
    names["precision"] = name_of(base, precision="bf16")
    names["folded"] = name_of(base, folded=False)
    names["none"] = name_of(base)
    assert len(set(names.values())) == len(names), names


def test_the_folder_of_a_teacher_is_the_same_for_a_copy_of_it(tmp_path: Path):
    """Else moving a teacher, or loading it again, would ask it for everything anew."""
    one = Teacher(tiny_student(seed=7), num_labels=2)
    one.network.save_pretrained(tmp_path / "moved")
    again = type(one.network).from_pretrained(tmp_path / "moved")
    assert name_of(one) == name_of(Teacher(again, num_labels=2))
    assert name_of(tiny_teacher()) == name_of(tiny_teacher())
    json.dumps(about(one, image_size=SIDE, precision="no", folded=False))


def test_another_file_of_the_same_name_has_no_entry(tmp_path: Path):
    """Entries go by the bytes: an image that was edited must not meet the old logits."""
    asked = Asked(files(3))
    fill(tmp_path / "a", asked.work(), Room(tmp_path, GB))
    cache = TargetCache(tmp_path / "a", SHAPE)
    with pytest.raises(ValueError, match=r"logits of photo.jpg .* got none.*--resume"):
        cache.logits(b"file 1 edited", "photo.jpg")


def test_an_image_that_changes_while_the_cache_is_filled_is_an_error(tmp_path: Path):
    asked = Asked(files(12))
    work = asked.work()
    asked.data[11] = b"edited meanwhile"
    with pytest.raises(ValueError, match="row 11 as it was when the run began"):
        fill(tmp_path / "a", work, Room(tmp_path, GB))


@pytest.mark.parametrize("part", ["start", "records", "entry", "end", "length"])
def test_a_damaged_shard_is_named_or_filled_again(tmp_path: Path, part: str):
    """Rotten bytes must not become logits; and nobody should have to clear a folder by hand."""
    asked, room, folder = Asked(files(40)), Room(tmp_path, GB), tmp_path / "a"
    fill(folder, asked.work(), room)
    shard = shard_paths(folder)[5]
    content = bytearray(shard.read_bytes())
    place = {"start": 3, "records": 20, "entry": len(content) - 9, "end": len(content) - 1}
    if part == "length":
        del content[-4:]
    else:
        content[place[part]] ^= 0x10
    shard.write_bytes(content)
    entry = part in ("entry", "end")  # its head is whole: found when it is read
    with pytest.raises(ValueError, match=rf"{shard.name} as they were written, .* Delete it"):
        assert_whole(folder, asked)
    if entry:
        shard.unlink()  # what the message says
    again = Asked(files(40))
    assert 1 <= fill(folder, again.work(), room) < 10
    assert_whole(folder, again)


def test_a_damaged_shard_of_pictures_that_are_gone_does_not_stay(tmp_path: Path):
    """Nothing would take its place, and every later start would stop at it."""
    room, folder = Room(tmp_path, GB), tmp_path / "a"
    fill(folder, Asked(files(40)).work(), room)
    for shard in shard_paths(folder):
        shard.write_bytes(shard.read_bytes()[:-1])
    fewer = Asked(files(3))
    assert fill(folder, fewer.work(), room) == 3
    assert_whole(folder, fewer)


def test_a_shard_that_goes_while_it_is_used_is_named(tmp_path: Path):
    asked = Asked(files(1))
    fill(tmp_path / "a", asked.work(), Room(tmp_path, GB))
    cache = TargetCache(tmp_path / "a", SHAPE)
    shard_paths(tmp_path / "a")[0].unlink()
    with pytest.raises(ValueError, match=r"it is gone\. Delete it and go on with --resume"):
        cache.logits(asked.data[0], "x")


def test_digests_that_agree_in_their_first_half_are_told_apart(tmp_path: Path, monkeypatch):
    """The index is searched by half of a digest; the other half has to be looked at too."""
    names = {b"one": b"\x07" * 8 + b"a" * 8, b"two": b"\x07" * 8 + b"b" * 8}
    logits = {name: np.full(SHAPE, place, np.float16) for place, name in enumerate(names)}
    tmp_path.joinpath("a").mkdir()
    entries = {names[name]: encode(value) for name, value in logits.items()}
    write_shard(tmp_path / "a", bucket_of(names[b"one"]), entries)
    monkeypatch.setattr("kd_trainer.teacher_cache.cache.image_digest", names.__getitem__)
    cache = TargetCache(tmp_path / "a", SHAPE)
    for name, value in logits.items():
        np.testing.assert_array_equal(cache.logits(name, "x"), value)


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
    asked = Asked(files(1000))
    with pytest.raises(ValueError, match=r"1,000 images of about .* kB, together .*Raise it"):
        fill(tmp_path / "a", asked.work(), Room(tmp_path, 20_000))
    assert asked.count < 20
    assert not (tmp_path / "a").exists()


def test_what_other_teachers_left_counts_and_is_named(tmp_path: Path):
    """The bound is one for the folder; what could be deleted should not have to be searched."""
    old, new = tmp_path / "old", tmp_path / "new"
    fill(old, Asked(files(200)).work(), Room(tmp_path, GB))
    (old / "notes.txt").write_bytes(bytes(100_000))  # not ours: takes no room, is no cure
    bound = sum(Room(tmp_path, GB).used().values()) + 1000
    with pytest.raises(ValueError, match=r"delete what is no longer used: 1 other folder in .*old"):
        fill(new, Asked(files(200)).work(), Room(tmp_path, bound))
    assert not new.exists()


def test_a_full_disk_is_refused_before_anything_is_written(tmp_path: Path, monkeypatch):
    usage = type("Usage", (), {"free": 5000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(ValueError, match=r"of free disk at .* got 5 kB. Make room"):
        fill(tmp_path / "a", Asked(files(200)).work(), Room(tmp_path, GB))
    assert stored(tmp_path / "a").images == set()


def test_two_teachers_that_fill_at_once_stay_within_the_bound(tmp_path: Path, monkeypatch):
    """Each of them alone would fit; the folder must not grow beyond what was allowed."""
    monkeypatch.setattr(Room, "check_fits", lambda *args: None)  # both have looked at a free folder
    bound = 12_000
    with pytest.raises(ValueError, match="--teacher_cache_size"):
        fill(tmp_path / "a", Asked(files(400)).work(), Room(tmp_path, bound))
    assert 6_000 < sum(Room(tmp_path, bound).used().values()) <= bound
