"""Dataclass fields as flags and as YAML values: one conversion for both."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import re
import types
import typing
from collections.abc import Collection, Iterable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Union

_SHOWN = 200  # characters of a wrong value
_LARGEST = 2**63
_WORDS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY = {"k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
# Flags of other programs, and what they are called here: the first that a script has.
RENAMED = {
    **dict.fromkeys(("lr", "base_lr", "max_lr"), ("learning_rate",)),
    **dict.fromkeys(("min_lr", "lr_min", "eta_min"), ("min_learning_rate",)),
    **dict.fromkeys(("wd",), ("weight_decay",)),
    **dict.fromkeys(("bs", "b", "train_batch_size"), ("batch_size",)),
    **dict.fromkeys(("num_epochs", "max_epochs", "n_epochs"), ("epochs",)),
    **dict.fromkeys(("workers", "num_workers", "j"), ("dataloader_num_workers", "workers")),
    **dict.fromkeys(("imgsz", "img_size", "input_size", "resolution"), ("image_size",)),
    **dict.fromkeys(("data", "data_dir", "data_path", "dataset_name"), ("dataset",)),
    **dict.fromkeys(("out", "out_dir", "save_dir", "work_dir", "o"), ("output_dir",)),
    **dict.fromkeys(("num_classes", "n_classes", "nc"), ("num_labels",)),
    **dict.fromkeys(("arch", "architecture"), ("student_arch",)),
    **dict.fromkeys(("encoder", "encoder_name", "backbone"), ("student_encoder",)),
    **dict.fromkeys(("teacher_model", "teacher_path"), ("teacher",)),
    **dict.fromkeys(("student_model", "model", "model_name_or_path"), ("student",)),
    **dict.fromkeys(("amp", "precision", "half"), ("mixed_precision",)),
    **dict.fromkeys(("optimizer", "opt"), ("optim",)),
    **dict.fromkeys(("grad_accum", "accumulate_grad_batches"), ("gradient_accumulation_steps",)),
    **dict.fromkeys(("clip_grad", "grad_clip", "gradient_clip_val"), ("max_grad_norm",)),
    **dict.fromkeys(("temperature", "temp", "tau", "t"), ("temperature_start",)),
    **dict.fromkeys(("alpha", "kd_weight", "distill_weight"), ("kl_weight",)),
    **dict.fromkeys(("opset_version",), ("opset",)),
    **dict.fromkeys(("weights", "pretrained"), ("encoder_weights",)),
    **dict.fromkeys(("scheduler", "lr_schedule"), ("lr_scheduler_type",)),
    **dict.fromkeys(("cache", "cache_dir"), ("teacher_cache",)),
    **dict.fromkeys(("no_cuda", "cpu"), ("use_cpu",)),
}
# Those that mean nothing here, or not in this script, and what to do.
ABSENT = {
    **dict.fromkeys(
        ("early_stopping_patience", "early_stopping_threshold", "early_stopping", "patience"),
        "A run is not stopped early, and keeps its best student; shorten it with --epochs.",
    ),
    **dict.fromkeys(
        ("image_size", "imgsz", "img_size", "input_size", "resolution"),
        "The size is the student's own, with which it was trained.",
    ),
    **dict.fromkeys(
        ("freeze_encoder", "freeze_backbone"),
        "An encoder that stays frozen has --unfreeze_start_epoch at or after the last epoch.",
    ),
    **dict.fromkeys(
        ("overwrite_output_dir", "overwrite", "logging_dir", "log_dir"),
        "Each run has a folder of its own, with its logs: --output_dir.",
    ),
    **dict.fromkeys(
        ("train_images", "train_masks", "train_dir"),
        "Images and masks are found below --dataset, in train/images and train/masks.",
    ),
    **dict.fromkeys(
        ("model", "model_name_or_path", "checkpoint", "ckpt"),
        "Saved models are named as words without a flag: eval.py MODEL, export.py MODEL.",
    ),
    **dict.fromkeys(
        ("repo_id", "hub_model_id"), "It is a word without a flag: push.py FOLDER OWNER/NAME."
    ),
    "teacher_stream": "It is gone, as it never ran on a GPU. Take the line out.",
    **dict.fromkeys(
        ("opset", "opset_version"), "It is a flag of scripts/export.py, which writes ONNX files."
    ),
    **dict.fromkeys(
        ("device", "gpu", "gpus", "gpu_id", "cuda"),
        "No flag chooses it; the variable CUDA_VISIBLE_DEVICES says which GPUs can be used.",
    ),
    **dict.fromkeys(
        ("nproc_per_node", "num_processes", "world_size"),
        "Several processes are started with accelerate launch or torchrun.",
    ),
}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", re.IGNORECASE)


def check_choice(name: str, value: object, options: tuple[str, ...]) -> None:
    """Refuse a value that is not among the options."""
    if value not in options:
        raise ValueError(f"Expected --{name} to be one of {', '.join(options)}, got {value!r}.")


def check_at_least(name: str, value: float, bound: float, cure: str = "") -> None:
    """Refuse a number that is not finite or lies below the bound."""
    if not (math.isfinite(value) and value >= bound):
        raise ValueError(f"Expected --{name} of at least {bound:g}, got {value!r}.{cure}")


def check_folder(name: str, path: str) -> None:
    """Refuse a folder to write to whose place, or a part of whose path, is taken by a file."""
    place = Path(path).absolute()
    taken = next((p for p in (place, *place.parents) if p.exists()), place)
    if taken.is_file():
        raise ValueError(
            f"Expected a folder as --{name}, got {path}, where {taken.name} is a file. Name "
            "another folder."
        )


def expanded(value: Any) -> Any:
    """Text that names a place in a home folder, in full; anything else as it is.

    A shell expands only the `~` that starts a word, so `--flag=~/x` and YAML arrive as written.
    """
    if isinstance(value, list):
        return [expanded(item) for item in value]
    if isinstance(value, str) and value.startswith("~"):
        with contextlib.suppress(RuntimeError):  # `~name` of nobody is a file of that name
            return str(Path(value).expanduser())
    return value


def help_field(default: Any, text: str) -> Any:
    """A dataclass field whose help is shown by `--help`."""
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata={"help": text})
    return dataclasses.field(default=default, metadata={"help": text})


def hints_of(classes: Sequence[type]) -> dict[str, Any]:
    """Resolved type of every field of these dataclasses; the first class that has a name wins."""
    hints: dict[str, Any] = {}
    for cls in reversed(classes):
        resolved = typing.get_type_hints(cls)
        hints |= {f.name: resolved[f.name] for f in dataclasses.fields(cls) if f.init}
    return hints


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that `name` may be a misspelling of; None if none is like it.

    The dashes before a flag, which all flags share, say nothing; neither do capitals.
    """
    by_word = {word.lstrip("-").casefold(): word for word in reversed(list(known))}
    near = get_close_matches(name.lstrip("-").casefold(), by_word, n=1, cutoff=0.65)
    return by_word[near[0]] if near else None


def closest(name: str, known: Iterable[str]) -> str:
    """` Did you mean ...?`, or nothing if no name is near."""
    near = nearest(name, known)
    return f" Did you mean {near}?" if near else ""


def flag_hint(flag: str, known: Collection[str]) -> str:
    """What to write instead of an unknown flag (or field of a recipe), or why there is none."""
    dashes = "--" if flag.startswith("-") else ""
    name = flag.lstrip("-").replace("-", "_").lower()
    for renamed in RENAMED.get(name, ()):
        if dashes + renamed in known:
            return f" It is called {dashes}{renamed} here."
    return f" {ABSENT[name]}" if name in ABSENT else closest(name, known)


def convert(name: str, value: Any, hint: Any) -> Any:
    """`value` (text from a flag, or what YAML made of it) as the type of the field.

    Raises:
        ValueError: if it cannot be one; names the field and the wanted type.
    """
    options = _options(hint)
    if value == "" and options == (str,):
        return ""  # as good as not given, and what a configuration written without it says
    if value == ["null"] and type(None) in options:
        return None  # the one way to take back a list that a recipe gives
    if value is None or (isinstance(value, str) and value.lower() in ("null", "")):
        if type(None) in options:
            return None
        raise ValueError(f"Expected a value for --{name}, got none.")
    for option in options:
        try:
            return expanded(_convert_to(value, option))
        except (TypeError, ValueError, KeyError, OverflowError, RecursionError):
            continue
    wanted = " or ".join(_type_name(o) for o in options if o is not type(None))
    shown = repr(value)
    shown = shown if len(shown) <= _SHOWN else f"{shown[: _SHOWN - 3]}..."
    raise ValueError(f"Expected --{name} to be {wanted}, got {shown}.")


def _options(hint: Any) -> tuple[Any, ...]:
    union = typing.get_origin(hint) in (Union, types.UnionType)
    options = typing.get_args(hint) if union else (hint,)
    # Text accepts everything, so it comes last; None has been dealt with.
    return tuple(sorted(options, key=lambda o: (o is str, o is type(None))))


def _type_name(option: Any) -> str:
    if typing.get_origin(option) is list:
        return f"a list, each {_type_name(typing.get_args(option)[0])}"
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "a word"}
    return words.get(option, getattr(option, "__name__", str(option)))


def _convert_to(value: Any, option: Any) -> Any:
    origin = typing.get_origin(option) or option
    if origin is list:
        (item_type,) = typing.get_args(option)
        if isinstance(value, list) and issubclass(item_type, str):
            return [str(item) for item in value]  # as they are: a name may hold a space
        text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
        return [_convert_to(item, item_type) for item in text.replace(",", " ").split()]
    if origin is dict:
        return json.loads(value) if isinstance(value, str) else dict(value)
    if isinstance(value, list):
        raise TypeError
    if option is bool:
        return value if isinstance(value, bool) else _WORDS[str(value).lower()]
    if isinstance(value, bool) and option in (int, float):
        raise TypeError
    if option is int:
        if float(value) != int(float(value)) or abs(float(value)) >= _LARGEST:
            raise ValueError
        return int(float(value))
    if option is str and value is False:
        return "no"  # what YAML makes of a bare `no`
    if option is float and not math.isfinite(float(value)):
        raise ValueError
    if option in (float, str) and not isinstance(value, dict | set | bytes):
        return option(value)
    raise TypeError


def add_fields(
    parser: argparse.ArgumentParser,
    cls: type,
    *,
    title: str,
    aliases: Mapping[str, str] | None = None,
    without_value: Mapping[str, str] | None = None,
    only: Collection[str] | None = None,
    shown: Collection[str] | None = None,
) -> None:
    """A flag for each field of a dataclass; nothing is set for a flag that is not given.

    Args:
        parser: gets the flags, in a group called `title`.
        cls: the dataclass.
        title: heading in the help.
        aliases: further names, as {alias: field}.
        without_value: what a flag given without a value means, as {field: text}.
        only: fields that get a flag (default: all).
        shown: fields with a line in the help (default: all).
    """
    hints, group = hints_of([cls]), parser.add_argument_group(title)
    for field in dataclasses.fields(cls):
        if not field.init or (only is not None and field.name not in only):
            continue
        options = _options(hints[field.name])
        const = (without_value or {}).get(field.name, "true" if bool in options else None)
        many = any(typing.get_origin(o) is list for o in options)
        names = [a for a, target in (aliases or {}).items() if target == field.name]
        group.add_argument(
            f"--{field.name}",
            *(f"--{name}" for name in names),
            dest=field.name,
            default=argparse.SUPPRESS,
            nargs="+" if many else "?" if const is not None else None,
            const=const,
            metavar=_metavar(options),
            help=_help(field) if shown is None or field.name in shown else argparse.SUPPRESS,
        )


def _help(field: dataclasses.Field[Any]) -> str:
    about = str(field.metadata.get("help", "")).split("\n\n")[0]
    about = " ".join(about.split()).replace("%", "%%")
    has_default = field.default is not dataclasses.MISSING and field.default not in (None, "")
    return f"{about} [{field.default}]" if has_default else about


def _metavar(options: Sequence[Any]) -> str:
    first = options[0]
    if typing.get_origin(first) is list:
        return _metavar(typing.get_args(first))
    return {bool: "BOOL", int: "INT", float: "FLOAT"}.get(first, "TEXT")


def parse_point(text: str) -> tuple[float, float]:
    """EPOCH:TEMPERATURE as two numbers."""
    epoch, separator, temperature = str(text).partition(":")
    try:
        return float(epoch), float(temperature) if separator else math.nan
    except ValueError:
        raise ValueError(
            f"Expected --temperature_points like 0:4.0 10:2.0 49:1.0, got {text!r}."
        ) from None


def parse_size(text: str, flag: str) -> int:
    """Bytes of a size such as 20GB, 500 MB or 1.5GiB.

    Raises:
        ValueError: if it is none, or zero.
    """
    found = _SIZE.fullmatch(text.strip())
    size = 0
    if found is not None:
        number, unit, binary = found[1], found[2].lower(), found[3]
        units = _BINARY if binary else _UNITS
        size = int(float(number) * units.get(unit, 0))
    if size <= 0:
        raise ValueError(f"Expected --{flag} as 20GB, 500MB or 1.5GiB, got {text!r}.")
    return size
