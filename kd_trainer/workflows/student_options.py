"""The student's own arguments of its smp architecture, from flags and recipes."""

from __future__ import annotations

import copy
from typing import Any

import torch
import yaml

from kd_trainer.arguments import ModelArguments
from kd_trainer.fields import convert
from kd_trainer.models.config_checks import nearest_hint
from kd_trainer.models.configuration_smp import architecture_arguments
from kd_trainer.models.modeling import SmpForSemanticSegmentation
from kd_trainer.safe_files import parse_yaml

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
