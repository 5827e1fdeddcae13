"""The graph that is exported, and what its file says about it.

The graph has dynamic batch, height and width, and no weight that it does not use.

Height and width stay multiples of the encoder's output stride; the metadata names it. Networks that
pool into a fixed grid (PSPNet, UPerNet) or take one size only (some vision transformers) are
exported with a fixed height and width instead.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from kd_trainer.loading import network_name
from kd_trainer.models.config_checks import check_statistics
from kd_trainer.models.image_sizes import Size, as_size, size_text
from kd_trainer.models.modeling import SmpForSemanticSegmentation
from kd_trainer.students import (
    channels_of,
    channels_seen,
    has_several_labels,
    image_size_of,
    keeps_aspect_ratio,
    labels_of_student,
    reads_own_depth,
    size_multiple,
    statistics_of,
    student_logits,
)

RAW_INPUT, IMAGE_INPUT = "pixel_values", "image"
RAW_OUTPUT, PROBABILITY_OUTPUT = "logits", "probabilities"
METADATA_VERSION = 1
# An image of this side takes 3 GiB as floats; more is no image size but a mistake.
LARGEST_SIDE = 16_384
MOST_CLASSES = 65_536
_TEXTS = ("architecture", "encoder", "precision", "input")


class ExportGraph(nn.Module):
    """The network of a student, with or without what comes before and after it.

    Args:
        student: its parts are shared, not copied.
        with_preprocessing: take uint8 images (B, H, W, 3) and give probabilities (B, K, H, W),
            instead of normalised floats (B, 3, H, W) and raw logits (B, K, H, W). K is 1 for a
            binary model, whose probability is that of the foreground. A student of images of other
            depths takes scaled floats (B, H, W, C), see `scaled_channels`.
    """

    def __init__(self, student: nn.Module, *, with_preprocessing: bool) -> None:
        super().__init__()
        self.is_smp = isinstance(student, SmpForSemanticSegmentation)
        if isinstance(student, SmpForSemanticSegmentation):  # weights keep smp's own names
            self.encoder = student.encoder
            self.decoder = student.decoder
            self.segmentation_head = student.segmentation_head
            self.spreads_features = student.config._model_class == "DPT"
        else:
            self.student = student
        self.with_preprocessing = with_preprocessing
        self.sigmoid = uses_sigmoid(student)
        scale = 1 if reads_own_depth(student) else 255
        for name, values in zip(("mean", "std"), statistics_of(student), strict=True):
            scaled = torch.tensor(list(values)).view(1, -1, 1, 1) * scale
            self.register_buffer(name, scaled, persistent=False)
        self.mean: Tensor
        self.std: Tensor

    def forward(self, pixels: Tensor) -> Tensor:
        """Segment a batch, see the class."""
        if self.with_preprocessing:
            pixels = (pixels.permute(0, 3, 1, 2).to(self.mean.dtype) - self.mean) / self.std
        raw = self._logits(pixels)
        if not self.with_preprocessing:
            return raw
        return raw.sigmoid() if self.sigmoid else raw.softmax(dim=1)

    def _logits(self, pixels: Tensor) -> Tensor:
        if not self.is_smp:
            return student_logits(self.student, pixels)
        features = self.encoder(pixels)
        decoded = self.decoder(*features) if self.spreads_features else self.decoder(features)
        raw: Tensor = self.segmentation_head(decoded)
        return raw


def uses_sigmoid(student: nn.Module) -> bool:
    """Whether probabilities are a sigmoid of each logit, else a softmax over all of them."""
    return has_several_labels(student) or channels_of(student) == 1


def example_input(
    student: nn.Module, *, with_preprocessing: bool, fixed_size: bool = False
) -> Tensor:
    """A batch of unequal height and width, unless they are fixed: equal ones become one symbol.

    No feature map of it is one pixel high: a trace takes a 1 for a constant.
    """
    height, width = image_size_of(student)
    if not fixed_size:
        stride = size_multiple(student)
        height, width = max(height, 2 * stride), max(width, 2 * stride)
        width += stride if width == height else 0
    channels = channels_seen(student)
    if with_preprocessing:
        dtype = torch.float32 if reads_own_depth(student) else torch.uint8
        return torch.zeros(2, height, width, channels, dtype=dtype)
    return torch.zeros(2, channels, height, width)


def export_program(
    student: nn.Module,
    *,
    with_preprocessing: bool = False,
    prune: bool = True,
    fixed_size: bool = False,
) -> ExportedProgram:
    """Trace a student in eval mode on the CPU, in fp32.

    Args:
        student: moved to the CPU.
        with_preprocessing: see `ExportGraph`.
        prune: leave out the weights that nothing uses, at the price of tracing twice. The ONNX
            exporter does it by itself.
        fixed_size: take images of the student's own size only; the batch stays dynamic.

    Raises:
        ValueError: if its network cannot be traced.
    """
    graph = ExportGraph(student.float().cpu().eval(), with_preprocessing=with_preprocessing)
    example = example_input(student, with_preprocessing=with_preprocessing, fixed_size=fixed_size)
    sides = () if fixed_size else (1, 2) if with_preprocessing else (2, 3)
    dynamic = (dict.fromkeys((0, *sides), Dim.DYNAMIC),)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            # Constants that timm's modules keep are lifted; the graph is the same.
            warnings.simplefilter("ignore")
            traced = torch.export.export(graph.eval(), (example,), dynamic_shapes=dynamic)
            if not prune:
                return traced
            pruned = _without_unused(traced)
            return torch.export.export(pruned, (example,), dynamic_shapes=dynamic)
    except Exception as error:  # whatever tracing raises, the cure is the same
        reason = " ".join(str(error).split())[:300]
        name = network_name(student)
        wanted = "" if fixed_size else " with dynamic sizes"
        cure = "--format smp, or train another encoder" if fixed_size else "--fixed_size"
        raise ValueError(
            f"Expected a network that torch.export traces{wanted}, got {name}: "
            f"{reason.rstrip('.')}. Export it with {cure}."
        ) from error


def _without_unused(program: ExportedProgram) -> nn.Module:
    """The traced module without computations, parameters and buffers that no output depends on."""
    module: Any = program.module()
    module.graph.eliminate_dead_code()
    used = {str(node.target) for node in module.graph.nodes if node.op == "get_attr"}
    named = [n for n, _ in (*module.named_parameters(), *module.named_buffers())]
    for name in named:
        if name not in used:
            owner, _, leaf = name.rpartition(".")
            delattr(module.get_submodule(owner), leaf)
    module.recompile()
    return module


def metadata_of(
    student: nn.Module,
    *,
    with_preprocessing: bool,
    precision: str,
    fixed_size: bool = False,
) -> dict[str, str]:
    """What a consumer of the exported file needs to know, as text by name.

    `class_names`, `image_mean` and `image_std` are JSON lists, `size_multiple` a whole number
    of pixels, `image_size` one too (HEIGHTxWIDTH where it is no square), `fixed_size` is `true` if
    only `image_size` is taken. `keep_aspect_ratio` is `true`, or not there: whether images are
    fitted into the input and padded at the right or below, with the mean. `multi_label` is `true`,
    or not there: whether a pixel may have several of the classes. `own_depth` likewise: whether
    images have as many channels as `image_mean`, of any bit depth.
    """
    names = [name for _, name in sorted(labels_of_student(student).items())]
    binary = channels_of(student) == 1
    mean, std = statistics_of(student)
    architecture, _, encoder = network_name(student).partition(" ")
    function = "sigmoid" if uses_sigmoid(student) else "softmax"
    if reads_own_depth(student):
        value = "value (bytes / 255, 16 bits / 65535, floats as they are)"
        inside = f"float32 (batch, height, width, {len(mean)}), {value}"
        outside = f"float32 (batch, {len(mean)}, height, width), ({value} - image_mean) / image_std"
    else:
        inside = "uint8 (batch, height, width, 3), RGB"
        outside = "float32 (batch, 3, height, width), RGB, (value / 255 - image_mean) / image_std"
    probabilities = "float32 (batch, channels, height, width), probabilities"
    logits = f"float32 (batch, channels, height, width), logits; {function} gives probabilities"
    channels = f"one channel: {names[1]}" if binary else "a channel for each of class_names"
    kinds = {
        "keep_aspect_ratio": keeps_aspect_ratio(student),
        "multi_label": has_several_labels(student),
        "own_depth": reads_own_depth(student),
    }
    return {
        "kd_trainer_metadata": str(METADATA_VERSION),
        "architecture": architecture,
        "encoder": encoder,
        "class_names": json.dumps(names, ensure_ascii=False),
        "image_size": size_text(image_size_of(student)),
        **{name: "true" for name, holds in kinds.items() if holds},
        "size_multiple": str(size_multiple(student)),
        "fixed_size": "true" if fixed_size else "false",
        "image_mean": json.dumps(mean),
        "image_std": json.dumps(std),
        "preprocessing": "inside" if with_preprocessing else "outside",
        "precision": precision,
        "input": inside if with_preprocessing else outside,
        "output": f"{probabilities if with_preprocessing else logits}; {channels}",
    }


@dataclass(frozen=True)
class Metadata:
    """The metadata of a file of scripts/export.py, see `metadata_of`; `text` is all of it."""

    text: dict[str, str]
    class_names: list[str]
    image_size: Size
    size_multiple: int
    image_mean: list[float]
    image_std: list[float]
    with_preprocessing: bool
    multi_label: bool = False
    own_depth: bool = False


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
    size = _size(text, path)
    multiple = _whole("size_multiple", text, path)
    if any(side % multiple for side in size):
        raise _odd("size_multiple", f"a divisor of image_size {size_text(size)}", text, path)
    names = _parsed("class_names", text)
    counted = isinstance(names, list) and 2 <= len(names) <= MOST_CLASSES
    if not (counted and all(isinstance(name, str) for name in names)):
        raise _odd("class_names", "a JSON list of at least two names", text, path)
    if text.get("preprocessing") not in ("inside", "outside"):
        raise _odd("preprocessing", "inside or outside", text, path)
    mean, std = (_parsed(name, text) for name in ("image_mean", "image_std"))
    several, own_depth = (text.get(name) == "true" for name in ("multi_label", "own_depth"))
    channels = len(mean) if own_depth and isinstance(mean, list) else 3
    check_statistics(mean, std, f"the metadata of {path}", channels)
    inside = text["preprocessing"] == "inside"
    return Metadata(
        dict(text),
        names,
        size,
        multiple,
        mean,
        std,
        inside,
        multi_label=several,
        own_depth=own_depth,
    )


def _parsed(name: str, text: Mapping[str, str]) -> Any:
    try:
        return json.loads(text.get(name, ""))
    except (ValueError, RecursionError):
        return None


def _whole(name: str, text: Mapping[str, str], path: str | Path) -> int:
    value = text.get(name, "")
    if not _is_side(value):
        raise _odd(name, f"a whole number from 1 to {LARGEST_SIDE:,}", text, path)
    return int(value)


def _size(text: Mapping[str, str], path: str | Path) -> Size:
    sides = text.get("image_size", "").split("x")
    if len(sides) > 2 or not all(map(_is_side, sides)):
        wanted = f"one or two (512x1024) whole numbers from 1 to {LARGEST_SIDE:,}"
        raise _odd("image_size", wanted, text, path)
    return as_size([int(side) for side in sides])


def _is_side(value: str) -> bool:
    digits = value.isascii() and value.isdigit() and len(value) <= 9
    return digits and 1 <= int(value) <= LARGEST_SIDE


def _odd(name: str, wanted: str, text: Mapping[str, str], path: str | Path) -> ValueError:
    value = repr(text[name][:80]) if name in text else "nothing"
    return ValueError(
        f"Expected {wanted} as {name} in the metadata of {path}, got {value}. Export the student "
        "anew."
    )
