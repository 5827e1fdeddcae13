"""Saved models of transformers: their weights, checked, and what their files say of the input."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import (
    AutoModelForSemanticSegmentation,
    AutoModelForUniversalSegmentation,
    AutoTokenizer,
)
from transformers.image_processing_base import ImageProcessingMixin
from transformers.models.auto.modeling_auto import MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES
from transformers.utils import IMAGE_PROCESSOR_NAME, PROCESSOR_NAME
from transformers.utils.hub import cached_file

from kd_trainer.errors import is_own, printable
from kd_trainer.models.config_checks import check_statistics, is_finite_number
from kd_trainer.models.configuration_smp import (
    IMAGENET_MEAN,
    IMAGENET_STD,
)
from kd_trainer.models.weights import (
    load_pretrained,
)
from kd_trainer.universal import MODEL_TYPES, TASK, OneFormerForSemanticSegmentation

Statistics = Sequence[float]
_FLIPPED = "do_flip_channel_order"


def load_stock(
    source: str, config: dict[str, Any], *, trust_remote_code: bool = False, **options: Any
) -> tuple[Any, dict[str, Any]]:
    """A saved model of `AutoModelForSemanticSegmentation`, and what was found of its weights.

    Args:
        source: folder or Hub id.
        config: what its config.json holds.
        trust_remote_code: run code that comes with it.
        **options: of `load_pretrained`.

    Raises:
        ValueError: if it is no such model, contradicts itself, or would fetch code.
    """
    if trust_remote_code:
        _announce_code(source, config)
    else:
        check_sources(config, source)
    # Of a config.json that contradicts itself, each model complains with an error of its own; those
    # of code that the user trusts are the user's to see.
    wrong = ValueError if trust_remote_code else Exception
    try:
        kind: Any = AutoModelForSemanticSegmentation
        if config.get("model_type") in MODEL_TYPES:
            kind = AutoModelForUniversalSegmentation
        return load_pretrained(
            kind.from_pretrained, source, trust_remote_code=trust_remote_code, **options
        )
    except wrong as error:
        if is_own(error):
            raise
        if config.get("model_type") in _KNOWN_TYPES:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(
                f"Expected a config.json that describes a {config['model_type']} in {source!r}, "
                f"got: {reason[:300].rstrip('.')}. Correct it, or download the model again."
            ) from error
        raise ValueError(
            f"Expected a semantic segmentation model in {source!r}, got model_type "
            f"{config.get('model_type')!r}. {_other_kind(config, trust_remote_code, error)}"
        ) from error


_KNOWN_TYPES = {*MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES, *MODEL_TYPES}


def _other_kind(config: dict[str, Any], trust_remote_code: bool, error: Exception) -> str:
    """What to do about a model that AutoModelForSemanticSegmentation does not know."""
    if not config.get("auto_map"):
        return (
            "That kind of model is not supported: choose one that "
            f"AutoModelForSemanticSegmentation loads, a {', '.join(MODEL_TYPES)}, or one of smp."
        )
    if trust_remote_code:
        return f"Its own code ended with: {' '.join(str(error).split())[:300].rstrip('.')}."
    return (
        "If you trust the code that it brings along, add --trust_remote_code to this command "
        "line: no file can choose it."
    )


def check_sources(config: dict[str, Any], source: str) -> None:
    """Refuse what makes transformers fetch code, or timm read another place than the model's own.

    Raises:
        ValueError: names the entry.
    """
    waiting: list[Any] = [config]
    while waiting:
        value = waiting.pop()
        if isinstance(value, list):
            waiting += value
        if not isinstance(value, dict):
            continue
        for name, entry in value.items():
            kernel = name.endswith("_implementation") and "/" in str(entry)
            if kernel or (name == "backbone" and ":" in str(entry)):
                raise ValueError(
                    f"Expected a model that is built of known parts in {source!r}, got {name} "
                    f"{str(entry)[:80]!r} in its config.json. Delete the entry, if you do not need "
                    "what it points to."
                )
            waiting.append(entry)


def _announce_code(source: str, config: dict[str, Any]) -> None:
    """Say whose code is about to run: that of the model, or of a repository that it points to."""
    named = config.get("auto_map")
    values = [str(v) for v in named.values()] if isinstance(named, dict) else []
    owners = dict.fromkeys(v.split("--")[0] if "--" in v else source for v in values)
    for owner in map(printable, owners):
        print(f"Running Python code of {owner}, as --trust_remote_code asks for.", file=sys.stderr)


def saved_preprocessing(source: str, **hub: Any) -> dict[str, Any]:
    """What the files of a model say of its image processor; empty without one.

    It has a file of its own, or a part in that of a processor for images and words.
    """
    may_be_missing = {"_raise_exceptions_for_missing_entries": False, **hub}
    files = (IMAGE_PROCESSOR_NAME, PROCESSOR_NAME)
    if all(cached_file(source, file, **may_be_missing) is None for file in files):
        return {}
    settings: Any = None
    with contextlib.suppress(AttributeError, TypeError, RecursionError):  # of what is no object
        settings, _ = ImageProcessingMixin.get_image_processor_dict(source, **hub)
    if not isinstance(settings, dict):
        raise ValueError(
            f"Expected one JSON object in the {IMAGE_PROCESSOR_NAME} of {source}, got something "
            "else. Correct it, or delete it."
        )
    return settings


def image_channels(config: Any) -> int:
    """Channels of the images that a saved model takes, as its configuration says."""
    backbone = getattr(config, "backbone_config", None)
    said = (("in_channels", config), ("num_channels", config), ("num_channels", backbone))
    return int(next((n for name, one in said if (n := getattr(one, name, None))), 3))


def saved_statistics(
    source: str,
    config: dict[str, Any],
    usual: tuple[Statistics, Statistics] = (IMAGENET_MEAN, IMAGENET_STD),
    **hub: Any,
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std that a saved model's own preprocessing applies to values in 0..1.

    Args:
        source: where it is.
        config: what its config.json holds.
        usual: what is taken where it says nothing; as many numbers as its images have channels.
        **hub: as in `load_teacher`.

    Raises:
        ValueError: if no image can be normalised with them.
    """
    settings = saved_preprocessing(source, **hub) or config
    channels = len(usual[0])
    mean, std = (
        values if settings.get(name) is None else settings[name]
        for name, values in zip(("image_mean", "image_std"), usual, strict=True)
    )
    # transformers takes one number for all channels too.
    mean, std = ([v] * channels if isinstance(v, int | float) else v for v in (mean, std))
    # MobileViT's processor does not normalise, and does not say so.
    if settings.get("do_normalize", _FLIPPED not in settings) is False:
        mean, std = (0.0,) * channels, (1.0,) * channels
    where = f"the preprocessing of {source}"
    check_statistics(mean, std, where, channels)
    factor = settings.get("rescale_factor", 1 / 255)
    if settings.get("do_rescale") is False:
        factor = 1.0
    if not (is_finite_number(factor) and factor > 0):
        raise ValueError(
            "Expected rescale_factor as a finite number above 0 in the preprocessing of "
            f"{source}, got {str(factor)[:80]}. Give that which it was trained with."
        )
    brightest = 255 * factor
    return tuple(m / brightest for m in mean), tuple(s / brightest for s in std)


def with_task(network: Any, source: str, **hub: Any) -> Any:
    """A OneFormer with the words for its task, as `OneFormerProcessor` reads them from its folder.

    Raises:
        ValueError: if its tokenizer is missing.
    """
    if network.config.model_type != "oneformer":
        return network
    length = network.config.task_seq_len
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False, **hub)
        told = tokenizer(
            [TASK], padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        )
        # transformers makes a tokenizer without words where there is no file of one.
        if (read := tokenizer.decode(told["input_ids"][0], skip_special_tokens=True)) != TASK:
            raise ValueError(f"one that reads {TASK!r} as {read!r}")
    except Exception as error:  # of each kind of file another one
        reason = " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__
        raise ValueError(
            f"Expected the tokenizer of a OneFormer, which is told its task in words, in {source}, "
            f"got: {reason}. Save its OneFormerProcessor there, or tokenizer.json alone."
        ) from error
    task = told["input_ids"] * told["attention_mask"]
    return OneFormerForSemanticSegmentation(network, task)


def take_rgb(network: nn.Module, source: str, **hub: Any) -> None:
    """Let a network whose own preprocessing turns images into BGR (MobileViT) take RGB.

    Its first convolution is turned instead, once and exactly: everybody else gives RGB.
    """
    if saved_preprocessing(source, **hub).get(_FLIPPED):
        first = next(m for m in network.modules() if isinstance(m, nn.Conv2d))
        first.weight.data = first.weight.data.flip(1).contiguous()
