"""The packages that only an export needs."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import segmentation_models_pytorch as smp
import torch
from torch import Tensor
from torch.export import ExportedProgram

from kd_trainer import errors
from kd_trainer.models.config_checks import check_statistics
from kd_trainer.models.configuration_smp import build_network
from kd_trainer.models.modeling import SmpForSemanticSegmentation


def require(name: str) -> Any:
    """A module of the extra `export`.

    Raises:
        ValueError: if it is not installed; says how to install it.
    """
    return errors.require(name, extra="export")


def require_all() -> None:
    """Refuse to start an ONNX export that could not be finished.

    Raises:
        ValueError: if one of the packages is not installed.
    """
    for name in errors.EXTRAS["export"]:
        require(name)


METADATA_FILE = "metadata.json"


def write_program(program: ExportedProgram, path: Path, metadata: Mapping[str, str]) -> None:
    """Write a traced student as one file for `torch.export.load`.

    The metadata is in it too: `torch.export.load(path, extra_files={"metadata.json": ""})`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    program.example_inputs = None  # they would be in the file: 10 MiB at 640 pixels
    torch.export.save(program, path, extra_files={METADATA_FILE: json.dumps(dict(metadata))})


def read_program(path: Path) -> Callable[[Tensor], Tensor]:
    """The network in such a file, as a function of a batch."""
    module: Callable[[Tensor], Tensor] = torch.export.load(path).module()
    return module


def write_smp(student: SmpForSemanticSegmentation, folder: Path) -> None:
    """Write the folder that `smp.from_pretrained` reads, strictly: with all weights.

    It has none of our keys in its config.json, so that `tu-*` students can be read.
    """
    network = build_network(student.config)
    network.load_state_dict(student.state_dict())
    network.save_pretrained(folder)
    # smp's card names a licence that nobody has chosen.
    (folder / "README.md").unlink(missing_ok=True)


def read_smp(folder: Path) -> Callable[[Tensor], Tensor]:
    """The network in such a folder, as a function of a batch, in eval mode."""
    with contextlib.redirect_stdout(io.StringIO()):  # it tells where it found them
        network: Callable[[Tensor], Tensor] = smp.from_pretrained(str(folder)).eval()
    return network


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
