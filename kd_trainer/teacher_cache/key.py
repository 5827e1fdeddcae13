"""What a teacher's logits depend on beside the picture: each set of it has its own folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from kd_trainer.checkpointing.fingerprint import tensors_digest
from kd_trainer.teacher import Teacher

FORMAT = 1
"""Number of the file format and of the way from file bytes to logits: a change of either counts."""

# What a configuration says of where it was loaded from, and by which version.
_OF_THE_COPY = ("_name_or_path", "transformers_version")


def about(teacher: Teacher, *, image_size: int, precision: str, folded: bool) -> dict[str, Any]:
    """Everything that decides a teacher's logits for given file bytes, as plain values.

    Args:
        teacher: the frozen network behind the student's input and classes.
        image_size: side of the pictures and of the logits in pixels.
        precision: in which the network runs: no, bf16 or fp16.
        folded: whether its BatchNorms are multiplied into its convolutions, which rounds otherwise.
    """
    network = teacher.network
    tensors = dict(network.named_parameters()) | dict(network.named_buffers())
    return {
        "format": FORMAT,
        "stored_as": "float16",
        "weights": tensors_digest(tensors, values=True),
        "network": hashlib.sha256(_shape_of(network).encode()).hexdigest()[:16],
        "precision": precision,
        "folded": folded,
        "image_size": image_size,
        "teacher_image_size": teacher.image_size,
        "num_labels": teacher.num_labels,
        "class_order": teacher.order,
        "input_mean": teacher.input_mean,
        "input_std": teacher.input_std,
        "scale": teacher.scale.flatten().tolist(),
        "shift": teacher.shift.flatten().tolist(),
    }


def _shape_of(network: nn.Module) -> str:
    """How a network computes, as text: equal weights in another network give other logits."""
    config = getattr(network, "config", None)
    settings = {}
    if isinstance(config, PreTrainedConfig):
        settings = json.loads(config.to_json_string(use_diff=False))
    kept = {name: value for name, value in settings.items() if name not in _OF_THE_COPY}
    return f"{network!r}\n{json.dumps(kept, sort_keys=True)}"


def folder_name(ingredients: Mapping[str, Any]) -> str:
    """32 hexadecimal digits that stand for the ingredients."""
    text = json.dumps(ingredients, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]
