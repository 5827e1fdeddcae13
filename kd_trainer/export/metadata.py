"""What an ONNX file says of itself, checked before any of it is used: the file may be anybody's."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kd_trainer.config_checks import check_statistics

# An image of this side takes 3 GiB as floats; more is no image size but a mistake.
LARGEST_SIDE = 16_384
MOST_CLASSES = 65_536
_TEXTS = ("architecture", "encoder", "precision", "input")


@dataclass(frozen=True)
class Metadata:
    """The metadata of a file of scripts/export.py, see `metadata_of`; `text` is all of it."""

    text: dict[str, str]
    class_names: list[str]
    image_size: int
    size_multiple: int
    image_mean: list[float]
    image_std: list[float]
    with_preprocessing: bool


def read_metadata(text: Mapping[str, str], path: str | Path) -> Metadata:
    """Check and convert the metadata of a file.

    Raises:
        ValueError: if an entry is missing or makes no sense; names it.
    """
    if "kd_trainer_metadata" not in text:
        raise ValueError(
            f"Expected an ONNX file of scripts/export.py, got {path}, which does not say what "
            "it takes. Export the student anew."
        )
    for name in _TEXTS:
        if name not in text:
            raise _odd(name, "text", text, path)
    size = _whole("image_size", text, path)
    multiple = _whole("size_multiple", text, path)
    if size % multiple:
        raise _odd("size_multiple", f"a divisor of image_size {size}", text, path)
    names = _parsed("class_names", text)
    known = isinstance(names, list) and 2 <= len(names) <= MOST_CLASSES
    if not (known and all(isinstance(name, str) for name in names)):
        raise _odd("class_names", "a JSON list of at least two names", text, path)
    if text.get("preprocessing") not in ("inside", "outside"):
        raise _odd("preprocessing", "inside or outside", text, path)
    mean, std = (_parsed(name, text) for name in ("image_mean", "image_std"))
    check_statistics(mean, std, f"the metadata of {path}")
    return Metadata(dict(text), names, size, multiple, mean, std, text["preprocessing"] == "inside")


def _parsed(name: str, text: Mapping[str, str]) -> Any:
    try:
        return json.loads(text.get(name, ""))
    except (ValueError, RecursionError):
        return None


def _whole(name: str, text: Mapping[str, str], path: str | Path) -> int:
    value = text.get(name, "")
    if not (value.isascii() and value.isdigit() and len(value) <= 9):
        raise _odd(name, "a whole number", text, path)
    if not 1 <= int(value) <= LARGEST_SIDE:
        raise _odd(name, f"1 to {LARGEST_SIDE:,}", text, path)
    return int(value)


def _odd(name: str, wanted: str, text: Mapping[str, str], path: str | Path) -> ValueError:
    value = repr(text[name][:80]) if name in text else "nothing"
    return ValueError(
        f"Expected {wanted} as {name} in the metadata of {path}, got {value}. Export the student "
        "anew."
    )
