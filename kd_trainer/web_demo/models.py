"""The models of the web demo, and what they say about one image. Knows no browser."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedConfig
from transformers.utils import SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file

from kd_trainer.costs import Latency, file_mib, interleaved
from kd_trainer.data.input_files import read_image
from kd_trainer.evaluation import Measured, is_multi_label, labels_of
from kd_trainer.export import load_onnx
from kd_trainer.inference import (
    Segmenter,
    classes_at,
    onnx_segmenter,
    planes_at,
    render,
    torch_segmenter,
)
from kd_trainer.loading import load_student, network_name, network_size, teacher_options
from kd_trainer.model_arguments import ModelArguments
from kd_trainer.models.image_processing import resize_image
from kd_trainer.models.image_sizes import AnySize
from kd_trainer.models.modeling import SmpForSemanticSegmentation, check_image_size
from kd_trainer.models.weights import SUFFIXES, check_finite_weights
from kd_trainer.reports.contents import STUDENT, TEACHER
from kd_trainer.reports.panels import (
    Disagreement,
    disagreement,
    disagreement_map,
    mask_image,
    overlay,
)
from kd_trainer.sources import model_source
from kd_trainer.students import channels_seen, check_student_size, image_size_of, reads_own_depth
from kd_trainer.teacher import Teacher, load_teacher

# Longer side of what is shown and predicted. More than any screen shows, and the logits of nine
# classes at the 100 megapixels of a large camera are 3.6 GB.
LONGEST = 2048


@dataclass(frozen=True)
class DemoModel:
    """A model that the demo shows.

    Args:
        name: architecture and encoder; never a path, because strangers read it.
        segmenter: images to logits.
        class_names: background first.
        parameters: without those that no output depends on; None if unknown.
        file_mib: size of the weight file; None if unknown.
        runs_on: engine and device, in words.
        multi_label: whether a pixel may have several of the classes.
    """

    name: str
    segmenter: Segmenter
    class_names: tuple[str, ...]
    parameters: int | None
    file_mib: float | None
    runs_on: str
    multi_label: bool = False


Models = Mapping[str, DemoModel]
"""The student, and perhaps a teacher, under the names of `kd_trainer.reports.contents`."""


@dataclass(frozen=True)
class Result:
    """One image as all models see it.

    Attributes:
        image: uint8 (H, W, 3), as it was shown to the models.
        masks: class ids, uint8 (H, W), of each model; of several labels a pixel planes (K, H, W).
        difference: between teacher and student; None without a teacher.
    """

    image: np.ndarray
    masks: dict[str, np.ndarray]
    difference: Disagreement | None


@dataclass(frozen=True)
class Drawings:
    """A result to look at.

    Attributes:
        left: uint8 (H, W, 3), left of the slider: the teacher's overlay, else the image.
        right: the student's overlay.
        masks: uint8 (H, W, 3) of each model.
        difference: uint8 (H, W, 3) where the masks differ; without a teacher the cut-out of the
            student, (H, W, 4).
    """

    left: np.ndarray
    right: np.ndarray
    masks: dict[str, np.ndarray]
    difference: np.ndarray


def load_demo_student(source: str) -> DemoModel:
    """A student from a folder, the Hub or an ONNX file of scripts/export.py.

    Raises:
        FileNotFoundError: if there is no such model.
        ValueError: if it is none of these, or does not take images of the size it asks for.
    """
    if source.endswith(".onnx"):
        return _tried(_from_onnx(source), source, "its saved image size")
    source = model_source(source)
    student = load_student(source)
    if reads_own_depth(student):
        raise _of_other_images(source, channels_seen(student))
    size = image_size_of(student)
    check_student_size(size, student)
    model = _described(student, torch_segmenter(student, size), source, labels_of(student))
    return _tried(model, source, "its saved image size")


def _of_other_images(source: str, channels: int) -> ValueError:
    return ValueError(
        f"Expected a model of 8-bit RGB images, which is what a browser sends, got {source} of "
        f"{channels} channels (--in_channels). Use predict.py."
    )


def load_demo_teacher(model: ModelArguments, student: DemoModel) -> DemoModel | None:
    """The teacher that the settings name, with the student's classes in the student's order.

    It is shown images at the size it was saved with, else at the student's.

    Raises:
        FileNotFoundError: if there is no such model.
        ValueError: if it has other classes, or does not take images of that size.
    """
    if not model.teachers:
        return None
    if len(model.teachers) > 1:
        raise ValueError(
            f"Expected one --teacher to show, got {len(model.teachers)}. Name the one to compare "
            "the student with."
        )
    source = model.teachers[0]
    if source.endswith(".onnx"):
        exported = _from_onnx(source)
        if (exported.class_names, exported.multi_label) != (
            student.class_names,
            student.multi_label,
        ):
            raise ValueError(
                f"Expected a teacher of the student's classes {_classes(student)}, got {source} "
                f"with {_classes(exported)}. Name another one."
            )
        return _tried(exported, source, "its saved image size")
    labels = dict(enumerate(student.class_names))
    teacher = load_teacher(
        source,
        num_labels=len(labels),
        arch=model.teacher_arch,
        encoder=model.teacher_encoder,
        options=teacher_options(model),
        mean=model.teacher_mean,
        std=model.teacher_std,
        id2label=labels,
        class_map=model.class_map,
        multi_label=student.multi_label,
        trust_remote_code=model.trust_remote_code,
    )
    check_finite_weights(teacher.network, source)
    size = model.teacher_image_size or _saved_size(source) or student.segmenter.image_size
    if isinstance(teacher.network, SmpForSemanticSegmentation):
        check_image_size(size, teacher.network)
    shown = _described(teacher, torch_segmenter(teacher, size), source, labels)
    return _tried(shown, source, "--teacher_image_size")


def _classes(model: DemoModel) -> str:
    several = ", several a pixel" if model.multi_label else ""
    return ", ".join(model.class_names) + several


def _from_onnx(source: str) -> DemoModel:
    threads = torch.get_num_threads()
    exported = load_onnx(source, threads=threads)
    if exported.own_depth:
        raise _of_other_images(source, len(exported.image_mean))
    metadata = exported.metadata
    return DemoModel(
        f"{metadata['architecture']} {metadata['encoder']}, {metadata['precision']}",
        onnx_segmenter(exported),
        tuple(exported.class_names),
        None,
        file_mib(source),
        f"onnxruntime, CPU, {_threads(threads)}",
        exported.multi_label,
    )


def _described(
    model: Measured,
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
        is_multi_label(model),
    )


def _threads(count: int) -> str:
    return f"{count} thread{'s' if count > 1 else ''}"


def _saved_size(source: str) -> AnySize | None:
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
    file = cached_file(source, SAFE_WEIGHTS_NAME, _raise_exceptions_for_missing_entries=False)
    return None if file is None else file_mib(file)


def _tried(model: DemoModel, source: str, size_from: str) -> DemoModel:
    """The model, after one call: the first is slow, and one that fails would fail on the page."""
    size = model.segmenter.image_size
    try:
        model.segmenter.logits([np.zeros((*size, 3), np.uint8)])
    except (ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"Expected a model that takes images of {size[0]} x {size[1]} pixels, got {source}: "
            f"{reason} Change {size_from}."
        ) from error
    return model


def read_upload(path: str | Path) -> tuple[np.ndarray, tuple[int, int]]:
    """An image that a visitor sent, read as for training.

    Args:
        path: of the file on this machine.

    Returns:
        uint8 RGB (H, W, 3) of at most LONGEST pixels a side, and the height and width of the file.

    Raises:
        ValueError: if it is no readable image; names the file without its folder.
    """
    file = Path(path)
    try:
        image = np.asarray(read_image(file))
    except ValueError as error:
        raise ValueError(str(error).replace(str(file), file.name)) from error
    height, width = image.shape[:2]
    if max(height, width) <= LONGEST:
        return image, (height, width)
    small = [max(1, round(side * LONGEST / max(height, width))) for side in (height, width)]
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    shrunk = resize_image(pixels, small[0], small[1]).permute(1, 2, 0).contiguous()
    return shrunk.numpy(), (height, width)


def examine(models: Models, image: np.ndarray, threshold: float) -> Result:
    """Masks of all models and how they differ.

    Args:
        models: as `Models` says.
        image: uint8 RGB (H, W, 3).
        threshold: probability from which a binary model's pixel is foreground, or has a label.
    """
    found = planes_at if models[STUDENT].multi_label else classes_at
    masks = {
        role: found(model.segmenter.logits([image])[0], threshold) for role, model in models.items()
    }
    difference = None
    if TEACHER in masks:
        num_labels = len(models[STUDENT].class_names)
        difference = disagreement(masks[TEACHER], masks[STUDENT], num_labels)
    return Result(image, masks, difference)


def drawings(result: Result, num_labels: int) -> Drawings:
    """The images of a result; `num_labels` counts the background too."""
    image, masks = result.image, result.masks
    tinted = {role: overlay(image, mask, num_labels=num_labels) for role, mask in masks.items()}
    if TEACHER in masks:
        difference = disagreement_map(image, masks[TEACHER], masks[STUDENT])
    else:
        difference = render("cutouts", image, masks[STUDENT], num_labels)
    return Drawings(
        tinted.get(TEACHER, image),
        tinted[STUDENT],
        {role: mask_image(mask, num_labels) for role, mask in masks.items()},
        difference,
    )


def milliseconds(models: Models, image: np.ndarray, repeats: int) -> dict[str, Latency]:
    """How long each network takes for this image at its own input size.

    The networks alone, in turn: reading, resizing and drawing cost the same with either.

    Args:
        models: as `Models` says.
        image: uint8 RGB (H, W, 3).
        repeats: measured calls of each, after one that warms up.
    """
    calls = {
        role: partial(model.segmenter.network, model.segmenter.network_input(image))
        for role, model in models.items()
    }
    threads = torch.get_num_threads()
    return interleaved(calls, repeats, threads, warm_up=1, progress=False)
