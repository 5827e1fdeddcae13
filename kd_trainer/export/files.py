"""The formats of scripts/export.py that are no ONNX: torch.export's file and smp's folder."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import segmentation_models_pytorch as smp
import torch
from torch import Tensor
from torch.export import ExportedProgram

from kd_trainer.configuration_smp import build_network
from kd_trainer.modeling import SmpForSemanticSegmentation

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
