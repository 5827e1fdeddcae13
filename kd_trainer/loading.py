"""Students and teachers from what the user names."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from kd_trainer.data_arguments import DataArguments
from kd_trainer.evaluation import Measured, input_statistics, is_multi_label, labels_of
from kd_trainer.files import parse_yaml
from kd_trainer.model_arguments import ModelArguments
from kd_trainer.models.config_checks import nearest_hint, read_config
from kd_trainer.models.configuration_smp import MULTI_LABEL, architecture_arguments
from kd_trainer.models.modeling import (
    SmpForSemanticSegmentation,
    check_image_size,
    parameter_counts,
)
from kd_trainer.models.weights import SUFFIXES, check_finite_weights
from kd_trainer.parsing import convert
from kd_trainer.sources import model_source, not_here
from kd_trainer.teacher import Teacher, load_teacher


def make_student(model: ModelArguments, data: DataArguments) -> SmpForSemanticSegmentation:
    """A new student, or a saved one to go on from, for the images and names of this run."""
    if model.student is not None:
        student = load_student(model.student, num_labels=data.num_labels, multi_label=True)
        if student.config.multi_label != data.multi_label:
            several = student.config.multi_label
            raise ValueError(
                f"Expected {'' if several else 'no '}--multi_label with {model.student}, which has "
                f"{'several labels' if several else 'one class'} a pixel. "
                f"{'Add it' if several else 'Leave it out'}, or take another --student."
            )
        student.config.image_size = data.image_size
        student.config.semantic_loss_ignore_index = data.ignore_index
        if data.class_names is not None:
            student.config.id2label = data.id2label
            student.config.label2id = {name: index for index, name in data.id2label.items()}
        return student
    student = SmpForSemanticSegmentation.create(
        model.student_arch,
        model.student_encoder,
        encoder_weights=model.encoder_weights,
        id2label=data.id2label,
        image_size=data.image_size,
        semantic_loss_ignore_index=data.ignore_index,
        **({"problem_type": MULTI_LABEL} if data.multi_label else {}),
        **student_options(model),
    )
    check_output_size(student)
    check_finite_weights(student, f"encoder_weights {model.encoder_weights}")
    return student


def load_student(
    source: str | Path, *, num_labels: int | None = None, multi_label: bool = False
) -> SmpForSemanticSegmentation:
    """A saved student, from a folder (its own, or that of its run) or the Hub.

    Args:
        source: where it is.
        num_labels: that it has to have.
        multi_label: whether it may have several labels a pixel.

    Raises:
        FileNotFoundError: if the folder has no config.json.
        ValueError: if it is another kind of model, or has other classes than `num_labels`.
    """
    source = model_source(str(source))
    folder = Path(source)
    looks_local = folder.exists() or str(source).startswith((".", "/", "~", "runs"))
    if looks_local and not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"Expected a saved model with a config.json, got {source}. A training run leaves it in "
            f"the folder `student` of its output folder.{not_here(source)}"
        )
    try:
        config = read_config(source)
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise FileNotFoundError(
            f"Expected a saved model, a folder here or an id on the Hub, got {source}: {reason}"
            f"{not_here(source)}"
        ) from error
    if "_model_class" not in config:
        raise ValueError(
            f"Expected a student of this package or an smp model, got {source} of model_type "
            f"{config.get('model_type')!r}. Other models can be teachers only."
        )
    student: SmpForSemanticSegmentation = SmpForSemanticSegmentation.from_pretrained(str(source))
    check_finite_weights(student, str(source))
    if student.config.multi_label and not multi_label:
        raise ValueError(
            f"Expected a model of one class a pixel, got {source} of several labels a pixel, which "
            "train.py, eval.py and predict.py take so far. Use its sigmoids from Python."
        )
    labels = labels_of(student)
    if num_labels is not None and len(labels) != num_labels:
        raise ValueError(
            f"Expected a model of {num_labels} classes (--num_labels), got {source} with "
            f"{len(labels)}: {', '.join(labels.values())}."
        )
    return student


def load_measured(
    source: str,
    *,
    arch: str | None = None,
    encoder: str | None = None,
    num_labels: int | None = None,
    trust_remote_code: bool = False,
) -> Measured:
    """Any saved model to measure: a student, else whatever can be a teacher.

    Raises:
        FileNotFoundError: if there is no such model.
        ValueError: if it has other classes than `num_labels`, or is no segmentation model.
    """
    source = model_source(source)
    if not source.endswith(SUFFIXES):
        try:
            config = read_config(source)
        except OSError:
            config = {"_model_class": ""}  # `load_student` says what is missing
        if "_model_class" in config or "model_type" not in config:
            return load_student(source, num_labels=num_labels, multi_label=True)
    return load_teacher(
        source,
        num_labels=num_labels,
        arch=arch,
        encoder=encoder,
        trust_remote_code=trust_remote_code,
    )


def make_teacher(model: ModelArguments, student: Measured, *, image_size: int) -> Teacher | None:
    """The teacher the settings name, fed with the student's input of `image_size` pixels."""
    if not model.has_teacher:
        return None
    mean, std = input_statistics(student)
    teacher = load_teacher(
        model.teacher,
        num_labels=len(labels_of(student)),
        arch=model.teacher_arch,
        encoder=model.teacher_encoder,
        image_size=model.teacher_image_size,
        mean=model.teacher_mean,
        std=model.teacher_std,
        input_mean=mean,
        input_std=std,
        id2label=labels_of(student),
        class_map=model.class_map,
        multi_label=is_multi_label(student),
        trust_remote_code=model.trust_remote_code,
    )
    check_finite_weights(teacher.network, f"the teacher {model.teacher}")
    if isinstance(teacher.network, SmpForSemanticSegmentation):
        check_image_size(model.teacher_image_size or image_size, teacher.network)
    return teacher


def network_name(network: nn.Module) -> str:
    """Architecture and encoder of an smp model, the class name of any other."""
    if isinstance(network, SmpForSemanticSegmentation):
        return f"{network.config._model_class} {network.config.encoder_name}"
    return type(network).__name__


def network_size(network: nn.Module) -> tuple[int, int]:
    """Number of parameters (used, never used by any forward pass)."""
    if isinstance(network, SmpForSemanticSegmentation):
        used, never_used, _ = parameter_counts(network)
        return used, never_used
    return sum(p.numel() for p in network.parameters()), 0


# Decided by other settings, or by what a student is: logits for each class of an RGB picture.
_DECIDED = {
    "encoder_name": "Use --student_encoder",
    "encoder_weights": "Use --encoder_weights",
    "classes": "It follows from --num_labels",
    "in_channels": "A student sees RGB pictures: leave it out",
    "activation": "A student gives logits: leave it out",
    "aux_params": "Only the segmentation head is trained here: leave it out",
}


def student_options(model: ModelArguments) -> dict[str, Any]:
    """What a new student gives to its architecture beside encoder and classes.

    `--decoder_channels` is a list for some architectures and one number for others, which decides
    what it becomes here.

    Args:
        model: settings of the student.

    Raises:
        ValueError: if the architecture has no such argument (names the nearest), its value is of
            another type, it is given twice, or another setting decides it.
    """
    defaults = architecture_arguments(model.student_arch)
    given: dict[str, Any] = {}
    for text in model.student_options or ():
        name, _, value = text.partition("=")
        if name in given:
            raise ValueError(f"Expected {name} once in --student_options, got it twice.")
        _check_name(name, model.student_arch, defaults)
        given[name] = _converted(name, value, defaults[name])
    if model.decoder_channels is not None:
        if "decoder_channels" in given:
            raise ValueError(
                "Expected the decoder's channels once, got --decoder_channels and "
                "--student_options decoder_channels. Leave one of them out."
            )
        given["decoder_channels"] = _channels(model, defaults)
    return given


def _check_name(name: str, arch: str, defaults: dict[str, Any]) -> None:
    if name in _DECIDED:
        raise ValueError(f"Expected no {name} in --student_options, got one. {_DECIDED[name]}.")
    if name not in defaults:
        hint = nearest_hint(name, [known for known in defaults if known not in _DECIDED])
        raise ValueError(
            f"Expected an argument of {arch} in --student_options, got {name!r}. {hint}"
        )


def _converted(name: str, text: str, default: Any) -> Any:
    """Text as the type of the default; without one, as YAML reads it."""
    if default is None:
        try:
            return parse_yaml(text)
        except (yaml.YAMLError, ValueError) as error:
            raise ValueError(
                f"Expected a plain value as {name} in --student_options, got {text[:80]!r}: "
                f"{' '.join(str(error).split())}. Write a number, a word, true or false."
            ) from None
    value = convert(
        f"student_options {name}", text, list[int] if isinstance(default, list) else type(default)
    )
    return tuple(value) if isinstance(value, list) else value


def _channels(model: ModelArguments, defaults: dict[str, Any]) -> Any:
    channels = tuple(model.decoder_channels or ())
    if "decoder_channels" not in defaults:
        hint = nearest_hint("decoder_channels", [n for n in defaults if n not in _DECIDED])
        raise ValueError(
            f"Expected no --decoder_channels for {model.student_arch}, got "
            f"{' '.join(map(str, channels))}. Its arguments are set by --student_options; "
            f"--decoder_channels null takes back those of a recipe. {hint}"
        )
    one_number = isinstance(defaults["decoder_channels"], int)
    if one_number and len(channels) != 1:
        raise ValueError(
            f"Expected one number as --decoder_channels of {model.student_arch} (default "
            f"{defaults['decoder_channels']}), got {' '.join(map(str, channels))}. Give one."
        )
    return channels[0] if one_number else channels


@torch.no_grad()
def check_output_size(student: SmpForSemanticSegmentation) -> None:
    """Refuse a student whose map is not as large as its picture; no arithmetic is done.

    Raises:
        ValueError: some options, such as `upsampling`, decide it.
    """
    side = student.config.image_size
    twin: Any = copy.deepcopy(student)
    found = twin.to("meta").eval()(torch.empty(1, 3, side, side, device="meta")).logits
    if tuple(found.shape[-2:]) != (side, side):
        got = "x".join(map(str, found.shape[-2:]))
        raise ValueError(
            f"Expected a student whose map has the size of its picture, {side}x{side}, got {got}. "
            "Leave upsampling out of --student_options, or let it make up for the encoder_depth."
        )
