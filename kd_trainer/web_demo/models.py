"""The models of the web demo: loaded once, tried once, with what they weigh."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedConfig
from transformers.utils import SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file

from kd_trainer.arguments import ModelArguments
from kd_trainer.costs import file_mib
from kd_trainer.evaluation import labels_of
from kd_trainer.export import load_onnx
from kd_trainer.inference import Segmenter, onnx_segmenter, torch_segmenter
from kd_trainer.loading import load_student, network_name, network_size
from kd_trainer.models.modeling import SmpForSemanticSegmentation, check_image_size
from kd_trainer.models.weights import SUFFIXES, check_finite_weights
from kd_trainer.sources import model_source
from kd_trainer.teacher import Teacher, load_teacher


@dataclass(frozen=True)
class DemoModel:
    """A model that the demo shows.

    Args:
        name: architecture and encoder; never a path, because strangers read it.
        segmenter: pictures to logits.
        class_names: background first.
        parameters: without those that no output depends on; None if unknown.
        file_mib: size of the weight file; None if unknown.
        runs_on: engine and device, in words.
    """

    name: str
    segmenter: Segmenter
    class_names: tuple[str, ...]
    parameters: int | None
    file_mib: float | None
    runs_on: str


def load_demo_student(source: str) -> DemoModel:
    """A student from a folder, the Hub or an ONNX file of scripts/export.py.

    Raises:
        FileNotFoundError: if there is no such model.
        ValueError: if it is none of these, or does not take pictures of the size it asks for.
    """
    if source.endswith(".onnx"):
        return _tried(_from_onnx(source), source, "its saved image size")
    source = model_source(source)
    student = load_student(source)
    side = student.config.image_size
    check_image_size(side, student)
    made = _described(student, torch_segmenter(student, side), source, labels_of(student))
    return _tried(made, source, "its saved image size")


def load_demo_teacher(model: ModelArguments, student: DemoModel) -> DemoModel | None:
    """The teacher that the settings name, with the student's classes in the student's order.

    It is shown pictures at the size it was saved with, else at the student's.

    Raises:
        FileNotFoundError: if there is no such model.
        ValueError: if it has other classes, or does not take pictures of that size.
    """
    if not model.has_teacher:
        return None
    source = model.teacher
    if source.endswith(".onnx"):
        made = _from_onnx(source)
        if made.class_names != student.class_names:
            raise ValueError(
                f"Expected a teacher of the student's classes {', '.join(student.class_names)}, "
                f"got {source} with {', '.join(made.class_names)}. Name another one."
            )
        return _tried(made, source, "its saved image size")
    labels = dict(enumerate(student.class_names))
    teacher = load_teacher(
        source,
        num_labels=len(labels),
        arch=model.teacher_arch,
        encoder=model.teacher_encoder,
        mean=model.teacher_mean,
        std=model.teacher_std,
        id2label=labels,
        trust_remote_code=model.trust_remote_code,
    )
    check_finite_weights(teacher.network, source)
    side = model.teacher_image_size or _saved_side(source) or student.segmenter.image_size
    if isinstance(teacher.network, SmpForSemanticSegmentation):
        check_image_size(side, teacher.network)
    made = _described(teacher, torch_segmenter(teacher, side), source, labels)
    return _tried(made, source, "--teacher_image_size")


def _from_onnx(source: str) -> DemoModel:
    threads = torch.get_num_threads()
    exported = load_onnx(source, threads=threads)
    told = exported.metadata
    return DemoModel(
        f"{told['architecture']} {told['encoder']}, {told['precision']}",
        onnx_segmenter(exported),
        tuple(exported.class_names),
        None,
        file_mib(source),
        f"onnxruntime, CPU, {_threads(threads)}",
    )


def _described(
    model: SmpForSemanticSegmentation | Teacher,
    segmenter: Segmenter,
    source: str,
    labels: dict[int, str],
) -> DemoModel:
    network = model.network if isinstance(model, Teacher) else model
    device = segmenter.statistics[0].device
    place = f"CPU, {_threads(torch.get_num_threads())}"
    if device.type == "cuda":
        place = torch.cuda.get_device_name(device)
    return DemoModel(
        network_name(network),
        segmenter,
        tuple(labels[index] for index in sorted(labels)),
        network_size(network)[0],
        file_mib(source) or _cached_mib(source),
        f"torch, {place}",
    )


def _threads(count: int) -> str:
    return f"{count} thread{'s' if count > 1 else ''}"


def _saved_side(source: str) -> int | None:
    """The image size that one of our own models was saved with."""
    if source.endswith(SUFFIXES):
        return None
    config: dict[str, Any]
    config, _ = PreTrainedConfig.get_config_dict(source)
    return config.get("image_size") if "_model_class" in config else None


def _cached_mib(source: str) -> float | None:
    """Size of the weights that were fetched from the Hub."""
    if Path(source).exists():
        return None  # a folder whose weights are no safetensors
    found = cached_file(source, SAFE_WEIGHTS_NAME, _raise_exceptions_for_missing_entries=False)
    return None if found is None else file_mib(found)


def _tried(model: DemoModel, source: str, size_from: str) -> DemoModel:
    """The model, after one call: the first is slow, and one that fails would fail on the page."""
    side = model.segmenter.image_size
    try:
        model.segmenter.logits([np.zeros((side, side, 3), np.uint8)])
    except (ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"Expected a model that takes pictures of {side} x {side} pixels, got {source}: "
            f"{reason} Change {size_from}."
        ) from error
    return model
