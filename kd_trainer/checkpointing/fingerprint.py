"""What makes a run the run it is: compared before it goes on, or before its results are used again.

The rule: every setting counts, but for those in `WITHOUT_EFFECT`, which say where things go, what
is shown, and how fast the data is read. A new setting therefore counts until somebody says here
that it does not.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import fields
from enum import Enum
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from kd_trainer.arguments import DistillationArguments
from kd_trainer.config import ALIASES, default_of
from kd_trainer.data import StreamedDataset
from kd_trainer.data_arguments import DataArguments
from kd_trainer.errors import clipped
from kd_trainer.model_arguments import ModelArguments
from kd_trainer.students import resumed_with

# Where a run lies and what it shows while it goes do not change what it learns.
WITHOUT_EFFECT = frozenset(
    {"output_dir", "panel_images", "report_to", "logging_steps", "dataloader_num_workers"}
    | {"panel_limit", "report", "disable_tqdm", "save_total_limit", "no_preflight"}
    | {"teacher_cache", "teacher_cache_size", "keep_freed_memory"}
    | {"push_to_hub", "hub_model_id", "hub_license", "hub_strategy", "hub_private_repo"}
    | {"hub_pictures"}
)
# The same among the fields of the Trainer that a configuration holds only where they were changed.
_OF_THE_TRAINER = frozenset(
    {"resume", "resume_from_checkpoint", "run_name", "project", "trackio_space_id"}
    | {"trackio_bucket_id", "trackio_static_space_id", "log_level", "log_level_replica"}
    | {"log_on_each_node", "logging_first_step", "logging_strategy", "skip_memory_metrics"}
    | {"include_num_input_tokens_seen", "include_for_metrics", "debug", "hub_token"}
    | {"hub_always_push", "hub_revision", "save_on_each_node", "eval_on_start"}
    | {"dataloader_persistent_workers", "dataloader_prefetch_factor", "dataloader_pin_memory"}
    | {"dataloader_multiprocessing_context", "dataloader_in_order", "ddp_timeout", "ddp_backend"}
    | {"torch_empty_cache_steps", "eval_accumulation_steps", "eval_use_gather_object"}
    | {"do_train", "do_eval", "do_predict", "local_rank", "label_names"}
    # said by `mixed_precision` and `device`
    | {"bf16", "fp16", "use_cpu"}
)
# How often it is saved decides which students can be chosen as the best, and nothing else.
_OF_SAVES = frozenset({"save_strategy", "save_steps"})
# Where something lies does not matter while what was read there is the same.
_WITNESSES = {
    "dataset": ("train_content", "eval_content"),
    **dict.fromkeys(("layout", "image_folder", "mask_folder"), ("train_content", "eval_content")),
    "unlabelled": ("train_content",),
    "teacher": ("teacher_weights",),
    "teacher_maps": ("teacher_weights",),
    "student": ("student_tensors",),
    "encoder_weights": ("student_tensors",),  # first weights, which a checkpoint replaces
}
# A run of a version that did not have a setting yet is one with its default.
DEFAULTS: dict[str, Any] = {
    field.name: default_of(field)
    for arguments in (DistillationArguments, ModelArguments, DataArguments)
    for field in fields(arguments)
}
CONTENT = {"train_content": "train", "eval_content": "eval"}
_FLAGS = {field: alias for alias, field in ALIASES.items()}
_SHOWN = 8
_SAMPLES = 64  # twice 640 x 640 pixels of each take about a second
# What to say beside the two values.
_REASONS = {
    "num_train_epochs": "learning rates and temperature are curves over all epochs, so more or "
    "fewer of them are another run",
    "max_steps": "learning rates and temperature are curves over all steps, so more or fewer of "
    "them are another run",
    "world_size": "with another number of processes each step sees other images",
    "per_device_train_batch_size": "each step would see other images",
    "train_content": "the training images or masks are not those it was trained on",
    "eval_content": "the evaluation images or masks are others, and its best student was chosen "
    "by them",
    "teacher_weights": "the teacher is another one",
    "student_tensors": "the student has another architecture",
    "student_traits": "its images are normalised otherwise, or its units are others",
}


class Difference(NamedTuple):
    """A setting with two values; as text `name before → now`."""

    name: str
    before: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.name} {clipped(self.before)} → {clipped(self.now)}"


def differences(
    before: Mapping[str, Any], now: Mapping[str, Any], ignored: frozenset[str] = frozenset()
) -> list[Difference]:
    """What differs between two runs, by name; a missing setting counts as its default."""
    names = sorted((before.keys() | now.keys()) - ignored)
    pairs = [(n, *(run.get(n, DEFAULTS.get(n)) for run in (before, now))) for n in names]
    return [Difference(*pair) for pair in pairs if pair[1] != pair[2]]


def relocated_paths(found: Sequence[Difference]) -> frozenset[str]:
    """Names of paths that differ while everything that was read there is the same."""
    other = {difference.name for difference in found}
    return frozenset(n for n in other if n in _WITNESSES and other.isdisjoint(_WITNESSES[n]))


def check_same_run(before: Mapping[str, Any], now: Mapping[str, Any], where: str) -> None:
    """Refuse to go on with a run as another one.

    Args:
        before: the run that was saved.
        now: the run that is to go on.
        where: the checkpoint lies, for the message.

    Raises:
        ValueError: shows both values of everything that differs.
    """
    found = differences(before, now)
    found = [difference for difference in found if difference.name not in relocated_paths(found)]
    if not found:
        return
    shown = found[:_SHOWN]
    names = [f"{_FLAGS.get(d.name, d.name)} " for d in shown]
    told = ", ".join(name + _text(d.before) for name, d in zip(names, shown, strict=True))
    names = names if len(found) > 1 else [""]
    got = ", ".join(name + _text(d.now) for name, d in zip(names, shown, strict=True))
    if len(found) > _SHOWN:
        told += f" (and {len(found) - _SHOWN} more)"
    reasons = [_REASONS[d.name] for d in shown if d.name in _REASONS]
    because = f" ({'; '.join(reasons)})" if reasons else ""
    raise ValueError(
        f"Expected the run's {told}, got {got}{because}. Go on with what {where} was trained with, "
        "or start another run: leave --resume out, with another --output_dir."
    )


def _text(value: Any) -> str:
    return clipped(" ".join(map(str, value)) if isinstance(value, list) else value)


def fingerprint_of(
    args: DistillationArguments,
    student: nn.Module,
    teacher: nn.Module | None,
    data: Mapping[str, Any],
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    """What makes a run the one it is, as plain values.

    Args:
        args: of the run.
        student: the names, shapes and types of its tensors count, and what `as_student` was told.
        teacher: the values of its tensors count too.
        data: the data set of `train`, and that of `eval` or several by name.
        facts: what is known beside these. Where there are none, a few samples are looked at.
    """
    run: dict[str, Any] = {
        **settings_of(args),
        "student_tensors": tensors_digest(student.state_dict(), values=False),
        **resumed_with(student),
        "teacher_weights": None,
        **{f"{split}_images": _announced(dataset) for split, dataset in data.items()},
    }
    if not facts:  # from Python nobody has looked at the files
        run |= {name: samples_digest(data[split]) for name, split in CONTENT.items()}
    if teacher is not None:
        run["teacher_weights"] = tensors_digest(teacher.state_dict(), values=True)
    plain: dict[str, Any] = json.loads(json.dumps(run | dict(facts)))
    return plain


def _announced(data: Any) -> Any:
    """Number of images, of several sets by name; of a stream before it has left any out."""
    if isinstance(data, Mapping):
        return {name: _announced(one) for name, one in data.items()}
    if data is None:
        return 0
    return data.announced if isinstance(data, StreamedDataset) else len(data)


def settings_of(args: DistillationArguments) -> dict[str, Any]:
    """The training settings that count, with what they come to on this machine."""
    ignored = WITHOUT_EFFECT | _OF_THE_TRAINER
    if not args.load_best_model_at_end:
        ignored |= _OF_SAVES
    values: dict[str, Any] = {"world_size": args.world_size, "device": args.device.type}
    for field in fields(args):
        value = getattr(args, field.name)
        value = value.value if isinstance(value, Enum) else value
        plain = value is None or isinstance(value, bool | int | float | str | list | dict)
        if plain and field.init and field.name not in ignored:
            values[field.name] = value
    return values


def samples_digest(dataset: Any) -> str | None:
    """A short hash of a few samples spread over a data set; None if they cannot tell it.

    Each is drawn twice: where two differ, the data set draws augmentations that no number decides.
    The random generators are left as they were.
    """
    if isinstance(dataset, Mapping):  # several sets by name
        return ", ".join(f"{name} {samples_digest(one)}" for name, one in dataset.items())
    if isinstance(dataset, IterableDataset) or dataset is None or not len(dataset):
        return None
    if hasattr(dataset, "set_epoch"):  # the trainer sets it again as each epoch begins
        dataset.set_epoch(0)  # one that has been trained on stands at a later one
    before = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            return _drawn(dataset)
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])


def _drawn(dataset: Any) -> str | None:
    digest = hashlib.sha256()
    count = min(_SAMPLES, len(dataset))
    for index in range(count):
        one, two = (_sample_digest(dataset[len(dataset) * index // count]) for _ in range(2))
        if one != two:
            return None
        digest.update(one.encode())
    return digest.hexdigest()[:16]


def _sample_digest(sample: Mapping[str, Any]) -> str:
    values = {name: torch.as_tensor(sample[name]) for name in ("pixel_values", "labels")}
    return tensors_digest(values, values=True)


def tensors_digest(state: Mapping[str, Tensor], *, values: bool) -> str:
    """A short hash of the names, shapes and types of tensors, and of their values if asked for."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        if values:
            raw = tensor.cpu().contiguous().reshape(-1).view(torch.uint8)
            digest.update(raw.numpy().data)
    return digest.hexdigest()[:16]
