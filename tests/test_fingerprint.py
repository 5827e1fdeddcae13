"""What makes a run the one it is: every setting, the networks and the data, not where they lie."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import write_pairs
from tiny import Squares, arguments

from kd_trainer.arguments import DistillationArguments
from kd_trainer.checkpointing import fingerprint
from kd_trainer.checkpointing.fingerprint import (
    check_same_run,
    samples_digest,
    settings_of,
    tensors_digest,
)
from kd_trainer.data import load_splits
from kd_trainer.data.images import content_digest
from kd_trainer.data_arguments import DataArguments

FREE = {
    "output_dir": "elsewhere",
    "logging_steps": 7,
    "panel_images": 2,
    "panel_limit": 0,
    "report": False,
    "save_total_limit": 9,
    "dataloader_num_workers": 2,
    "disable_tqdm": False,
    "save_strategy": "epoch",
    "hub_private_repo": False,
    "hub_pictures": True,
    "keep_freed_memory": False,
}
BINDING = {
    "per_device_train_batch_size": 3,
    "gradient_accumulation_steps": 2,
    "num_train_epochs": 5,
    "max_steps": 7,
    "learning_rate": 2e-3,
    "min_learning_rate": 2e-6,
    "warmup_epochs": 1.0,
    "weight_decay": 0.5,
    "adam_beta2": 0.9,
    "kl_weight": 0.9,
    "pos_weight": 2.0,
    "temperature_start": 5.0,
    "unfreeze_start_epoch": 1,
    "encoder_lr_scale": 0.5,
    "seed": 1,
    "mixed_precision": "bf16",
    "dataloader_drop_last": False,
    "train_sampling_strategy": "sequential",
    "optim": "adamw_torch",
    "eval_steps": 3,
}


def changed(folder: Path, **options: Any) -> set[str]:
    before = settings_of(arguments(folder))
    now = settings_of(arguments(options.pop("output_dir", folder), **options))
    assert json.loads(json.dumps(now)) == now  # it is written down as JSON
    return {d.name for d in fingerprint.differences(before, now)}


@pytest.mark.parametrize("name", BINDING)
def test_what_is_learned_depends_on_it(name: str, tmp_path: Path):
    """One that is forgotten lets a run go on as another."""
    assert name in changed(tmp_path, **{name: BINDING[name]})


def test_the_rest_is_free(tmp_path: Path):
    """A run must go on where disks, screens and numbers of cores are other ones."""
    assert changed(tmp_path, **FREE) == set()


def test_saves_count_where_the_best_is_chosen_among_them(tmp_path: Path):
    """With fewer saves another student may be kept."""
    best = {"eval_strategy": "steps", "save_strategy": "steps", "load_best_model_at_end": True}
    args = [arguments(tmp_path, **best, eval_steps=2, save_steps=n) for n in (2, 4)]
    assert settings_of(args[0]) != settings_of(args[1])


def test_every_name_that_is_left_out_is_a_setting():
    """A misspelt name leaves nothing out, or a renamed field comes in unseen."""
    known = {field.name for field in dataclasses.fields(DistillationArguments)}
    known |= {"dataloader_multiprocessing_context", "dataloader_in_order"}  # of transformers 5.15
    assert known >= fingerprint.WITHOUT_EFFECT | fingerprint._OF_THE_TRAINER


def test_both_values_are_shown_with_the_reason():
    """ "Other settings" sends a user to compare two files of a hundred lines."""
    before, now = {"world_size": 2, "seed": 4}, {"world_size": 1, "seed": 4}
    with pytest.raises(ValueError, match=r"^Expected the run's world_size 2, got 1 \(with another"):
        check_same_run(before, now, "checkpoint-3")
    before |= {"per_device_train_batch_size": 4}
    now |= {"per_device_train_batch_size": 2}
    with pytest.raises(ValueError, match=r"batch_size 4, world_size 2, got batch_size 2, world"):
        check_same_run(before, now, "checkpoint-3")
    check_same_run(now, dict(now), "checkpoint-3")


def test_tensors_are_told_apart_by_names_shapes_and_values():
    """A teacher that was trained on has the same names and shapes."""
    one = {"a": torch.zeros(2, 3), "b": torch.ones((), dtype=torch.int64)}
    assert tensors_digest(one, values=True) == tensors_digest(dict(reversed(one.items())), values=1)
    other = one | {"a": one["a"] + 1e-7}
    assert tensors_digest(one, values=True) != tensors_digest(other, values=True)
    assert tensors_digest(one, values=False) == tensors_digest(other, values=False)
    for wrong in ({"a": torch.zeros(3, 2)}, {"a": one["a"].half()}, {"c": one["a"]}):
        assert tensors_digest(one, values=False) != tensors_digest(one | wrong, values=False)


def digest(root: Path, *, streaming: bool = False) -> str:
    data = DataArguments(dataset=str(root), streaming=streaming)
    return content_digest(load_splits(data, ["train"])["train"])


@pytest.mark.parametrize("streaming", [False, True])
def test_moved_data_is_the_same_and_changed_data_is_not(tmp_path: Path, streaming: bool):
    """A path says nothing about what lies there."""
    root = write_pairs(tmp_path / "one", train=6)
    first = digest(root, streaming=streaming)
    assert digest(shutil.copytree(root, tmp_path / "two"), streaming=streaming) == first
    mask = root / "train" / "masks" / "p 3.png"
    content = bytearray(mask.read_bytes())
    content[-20] ^= 1
    mask.write_bytes(content)
    assert digest(root, streaming=streaming) != first


def test_each_file_of_a_large_data_set_counts_by_name_and_size(tmp_path: Path):
    """Only some are read; one that was added, renamed or replaced has to show all the same."""
    root = write_pairs(tmp_path / "one", train=60)
    first = digest(root)
    image = root / "train" / "images" / "p 31.png"
    content = image.read_bytes()
    image.write_bytes(content + b"\0")
    assert digest(root) != first
    image.write_bytes(content)
    assert digest(root) == first
    for kind in ("images", "masks"):
        (root / "train" / kind / "p 31.png").rename(root / "train" / kind / "p 310.png")
    assert digest(root) != first


def test_a_setting_that_an_older_version_did_not_have_counts_as_its_default():
    """Each new field would make every run of the version before impossible to go on with."""
    known = {"seed": 1, "max_bad_share": 0.01, "sync_batchnorm": False, "image_size": 640}
    before = {"seed": 1, "image_size": 640}
    check_same_run(before, known, "checkpoint-1")
    check_same_run(known, before, "checkpoint-1")
    with pytest.raises(ValueError, match=r"the run's sync_batchnorm False, got True"):
        check_same_run(before, known | {"sync_batchnorm": True}, "checkpoint-1")


PATHS = {
    "dataset": "train_content",
    "unlabelled": "train_content",
    "teacher": "teacher_weights",
    "student": "student_tensors",
    "encoder_weights": "student_tensors",
}


@pytest.mark.parametrize("path", PATHS)
def test_a_path_counts_only_if_something_else_was_read_there(path: str):
    """A run goes on where another disk is mounted, or where a file was downloaded again."""
    before = {path: "/a/x", PATHS[path]: "1", "eval_content": "2"}
    check_same_run(before, before | {path: "/b/y"}, "checkpoint-1")
    with pytest.raises(ValueError, match=rf"{path} /a/x"):
        check_same_run(before, before | {path: "/b/y", PATHS[path]: "3"}, "checkpoint-1")


class Changed(Squares):
    """The squares, but for those samples that `change` alters."""

    def __init__(self, length: int, change) -> None:
        super().__init__(length)
        self.change = change

    def __getitem__(self, index: int):
        sample = super().__getitem__(index)
        return sample | {"labels": sample["labels"] + int(self.change(index))}


def test_one_other_mask_among_64_samples_is_another_data_set():
    """Four samples say nothing about the other 60: the run would go on with other masks."""
    first = samples_digest(Squares(64))
    assert samples_digest(Squares(64)) == first
    for index in (1, 7, 30, 63):
        assert samples_digest(Changed(64, lambda i, index=index: i == index)) != first, index
    far = samples_digest(Squares(1000))
    assert samples_digest(Changed(1000, lambda i: i >= 980)) != far


def test_a_data_set_with_a_rare_augmentation_is_not_compared():
    """Its digest would differ each time, and no run of it could be resumed."""
    random.seed(3)
    for _ in range(5):
        assert samples_digest(Changed(100, lambda _: random.random() < 0.2)) is None
