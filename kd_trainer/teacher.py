"""The frozen teacher: any segmentation network behind the student's own input and classes.

A teacher may want other normalisation, another input size or a two-class softmax; this module
hides all of it, so the losses see fp32 logits of the student's shape.
Re-normalising the student's input follows the idea of timm's distillation task.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_trainer.class_map import Groups, check_several_labels, merge_logits, translate
from kd_trainer.errors import announce
from kd_trainer.fast_layers import folded, logits_of
from kd_trainer.models.config_checks import check_whole, read_config
from kd_trainer.models.configuration_smp import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    MULTI_LABEL,
    SmpConfig,
    default_labels,
)
from kd_trainer.models.image_sizes import AnySize, as_size
from kd_trainer.models.modeling import SmpForSemanticSegmentation
from kd_trainer.models.weights import (
    SUFFIXES,
)
from kd_trainer.sources import model_source, not_here, public_name
from kd_trainer.stock_models import (
    Statistics,
    image_channels,
    load_stock,
    saved_preprocessing,
    saved_statistics,
    take_rgb,
    with_task,
)
from kd_trainer.teacher_files import network_from_file, without_statistics
from kd_trainer.universal import (
    fixed_side,
    is_universal,
    mask_size,
    semantic_logits,
)

_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as PIL and cv2 turn RGB to grey


class Teacher(nn.Module):
    """A frozen segmentation network that answers with the student's classes and size.

    It stays in eval mode and without gradient, whatever it is told.

    Args:
        network: (B, C, h, w) to a tensor of logits, an output with `raw_logits` or `logits`, or
            that of a universal model.
        num_labels: of the student, background included; 2 gives one logit.
        image_size: that the network wants; None takes the images as they come.
        mean: per channel in 0..1, that the network was trained with; it says how many channels it
            takes. One of grey images sees the brightness of RGB ones, one of RGB images sees a
            single channel three times.
        std: likewise.
        input_mean: with which the images arrive (the student's).
        input_std: likewise.
        id2label: names of the teacher's classes.
        class_map: the network's classes of each of the student's, where it counts otherwise.
        multi_label: each of its logits is read through a sigmoid, also where there are two.
    """

    scale: Tensor
    shift: Tensor
    from_samples = False
    """Whether its logits come with the samples: no network is asked."""

    def __init__(
        self,
        network: nn.Module,
        *,
        num_labels: int,
        image_size: AnySize | None = None,
        mean: Statistics = IMAGENET_MEAN,
        std: Statistics = IMAGENET_STD,
        input_mean: Statistics = IMAGENET_MEAN,
        input_std: Statistics = IMAGENET_STD,
        id2label: dict[int, str] | None = None,
        class_map: Groups | None = None,
        multi_label: bool = False,
    ) -> None:
        super().__init__()
        self.multi_label = multi_label
        self.network = network
        self.num_labels = num_labels
        self.image_size = None if image_size is None else as_size(image_size)
        self.id2label = id2label or default_labels(num_labels)
        self.class_map = class_map
        self.mask_size = mask_size(getattr(network, "config", None))
        self.mean, self.std = list(mean), list(std)
        self.register_buffer("scale", torch.ones(1, 3, 1, 1), persistent=False)
        self.register_buffer("shift", torch.zeros(1, 3, 1, 1), persistent=False)
        self.expect_input(input_mean, input_std)
        self.requires_grad_(False)
        super().train(False)

    def expect_input(self, mean: Statistics, std: Statistics) -> Self:
        """Take images that are normalised so: those of a student that is trained or measured."""
        network: Any = self.network
        smp = isinstance(network, SmpForSemanticSegmentation)
        own, given = (network.config.in_channels if smp else len(self.mean)), len(mean)
        if own != given and {own, given} != {1, 3}:
            raise ValueError(
                f"Expected a teacher of {given} channels, as the student's images have, got one of "
                f"{own}. Take a teacher of the student's channels."
            )
        wanted_mean, wanted_std = _column(self.mean, "mean", own), _column(self.std, "std", own)
        input_mean, input_std = _column(mean, "input_mean", given), _column(std, "input_std", given)
        self.input_mean, self.input_std = list(mean), list(std)
        self.sees_brightness = own < given
        if self.sees_brightness:
            luma = torch.tensor(_LUMA).view(1, 3, 1, 1)
            input_mean, input_std = (luma * input_mean).sum(1, keepdim=True), luma * input_std
        self.same_statistics = torch.equal(wanted_mean, input_mean) and torch.equal(
            wanted_std, input_std
        )
        self.scale = (input_std / wanted_std).to(self.scale.device)
        self.shift = ((input_mean - wanted_mean) / wanted_std).to(self.shift.device)
        return self

    def train(self, mode: bool = True) -> Self:  # noqa: ARG002 (the name nn.Module gives it)
        """Do nothing: a teacher in train mode would drift with every batch."""
        return self

    @torch.no_grad()
    def forward(self, pixel_values: Tensor) -> Tensor:
        """Logits of a batch.

        Args:
            pixel_values: floats (B, C, H, W), normalised with the student's statistics.

        Returns:
            float32 (B, K, H, W), K = 1 for two labels, otherwise num_labels.

        Raises:
            ValueError: if the network gives another number of channels.
        """
        if any(module.training for module in self.network.modules()):
            self.network.eval()  # somebody has called train() on what is in here
        height, width = pixel_values.shape[-2:]
        images = pixel_values
        if not self.same_statistics:
            images = images * self.scale
            if self.sees_brightness:
                images = images.sum(1, keepdim=True)
            images = images + self.shift
        if self.image_size is not None:
            wanted_height, wanted_width = self.image_size
            shrinks = wanted_height < height or wanted_width < width
            images = _resize(images, self.image_size, antialias=shrinks)
        output = self.network(images.to(next(self.network.parameters()).dtype))
        if is_universal(output):
            return self._student_classes(
                semantic_logits(
                    output, (height, width), masks_at=self.mask_size, groups=self.class_map
                )
            )
        logits = logits_of(output).float()
        if self.class_map is not None:
            logits = merge_logits(logits, self.class_map)
        return _resize(self._student_classes(logits), (height, width))

    def _student_classes(self, logits: Tensor) -> Tensor:
        channels = logits.shape[1]
        one_logit = self.num_labels == 2 and not self.multi_label
        if one_logit and channels == 2:
            return logits[:, 1:] - logits[:, :1]  # sigmoid of it is the softmax's second class
        if channels != (1 if one_logit else self.num_labels):
            raise ValueError(
                f"Expected a teacher of {self.num_labels} classes, got {channels} channels. "
                "Choose a teacher of the student's classes."
            )
        return logits


def _column(values: Statistics, name: str, count: int) -> Tensor:
    finite = len(values) == count and all(map(math.isfinite, values))
    if not finite or (name.endswith("std") and min(values) <= 0):
        wanted = {1: "one finite number", 3: "three finite numbers"}
        raise ValueError(
            f"Expected {wanted.get(count, f'{count} finite numbers')} (positive ones for std) "
            f"as {name} of images of {count} channels, got {list(values)}. Give one a channel, of "
            "values in 0..1."
        )
    return torch.tensor(values, dtype=torch.float32).view(1, -1, 1, 1)


def _resize(maps: Tensor, size: tuple[int, int], *, antialias: bool = False) -> Tensor:
    if maps.shape[-2:] == size:
        return maps
    return F.interpolate(maps, size, mode="bilinear", align_corners=False, antialias=antialias)


def load_teacher(
    source: str,
    *,
    num_labels: int | None,
    arch: str | None = None,
    encoder: str | None = None,
    options: Mapping[str, Any] | None = None,
    image_size: AnySize | None = None,
    mean: Statistics | None = None,
    std: Statistics | None = None,
    input_mean: Statistics = IMAGENET_MEAN,
    input_std: Statistics = IMAGENET_STD,
    id2label: Mapping[int, str] | None = None,
    class_map: str | None = None,
    multi_label: bool | None = None,
    trust_remote_code: bool = False,
    **hub: Any,
) -> Teacher:
    """Load a teacher from a folder, the Hub, or a bare state dict.

    Args:
        source: folder or Hub id of an smp model, a student of ours (or its run), or any semantic or
            universal (see `universal`) one of transformers; or a `.safetensors` or `.pth` file.
        num_labels: of the student, background included; None takes the teacher's own.
        arch: smp architecture of a bare state dict.
        encoder: smp encoder of a bare state dict.
        options: further arguments of its architecture, where its shapes do not say them.
        image_size: of the input that the teacher wants; None takes the student's.
        mean: None takes that of its preprocessor_config.json, else config.json, else ImageNet's.
        std: likewise.
        input_mean: the student's.
        input_std: the student's.
        id2label: names of the student's classes, by which those of the teacher are found.
        class_map: which of its classes are which of the student's, as in `class_map.py`.
        multi_label: whether the student has several labels a pixel; None takes what the teacher is.
        trust_remote_code: run code that comes with the teacher.
        **hub: `revision`, `token`, `cache_dir`, `local_files_only`.

    Raises:
        FileNotFoundError: if there is no such file, folder or repository.
        ValueError: if its classes are not the student's, or weights are missing or left over.
    """
    source = model_source(source)
    network, config = _load_network(source, (arch, encoder, options or {}), trust_remote_code, hub)
    mean, std = _statistics(network, (mean, std), (input_mean, input_std), (source, config), hub)
    names, groups = _classes(network.config.id2label, num_labels, id2label, class_map, source)
    several = _several_labels(network.config, multi_label, groups, source)
    teacher = Teacher(
        network,
        num_labels=len(names),
        image_size=_input_side(network.config, image_size, source),
        mean=mean,
        std=std,
        input_mean=input_mean,
        input_std=input_std,
        id2label=names,
        class_map=groups,
        multi_label=several,
    )
    return _announced(teacher, source)


def _announced(teacher: Teacher, source: str) -> Teacher:
    """Say what a teacher sees, where it or the student takes other images than RGB."""
    if (channels := len(teacher.mean)) == len(teacher.input_mean) == 3:
        return teacher
    seen = "the brightness of RGB" if teacher.sees_brightness else "the student's"
    shown = (" ".join(f"{value:.4g}" for value in one) for one in (teacher.mean, teacher.std))
    announce(
        f"{public_name(source)}: made for images of {channels} channel{'s'[: channels > 1]}, it "
        f"sees {seen}, with {' and '.join(shown)} as --teacher_mean and --teacher_std."
    )
    return teacher


def _statistics(
    network: Any,
    given: tuple[Statistics | None, Statistics | None],
    students: tuple[Statistics, Statistics],
    saved: tuple[str, dict[str, Any] | None],
    hub: dict[str, Any],
) -> tuple[Statistics, Statistics]:
    """Mean and std of a teacher: as given, what its files say, ImageNet's, or the student's."""
    (mean, std), (source, config) = given, saved
    if mean is not None and std is not None:
        return mean, std
    usual: tuple[Statistics, Statistics] = (IMAGENET_MEAN, IMAGENET_STD)
    channels = image_channels(network.config)
    if channels == len(students[0]) != 3:
        usual = students
    elif channels == 1:
        grey = [[sum(w * v for w, v in zip(_LUMA, one, strict=True))] for one in usual]
        usual = (grey[0], grey[1])
    if config is not None:
        usual = saved_statistics(source, config, usual, **hub)
    return mean or usual[0], std or usual[1]


def _several_labels(config: Any, wanted: bool | None, groups: Groups | None, source: str) -> bool:
    bare = source.endswith(SUFFIXES)  # weights alone do not say
    several = (bare and bool(wanted)) or getattr(config, "problem_type", None) == MULTI_LABEL
    check_several_labels(several, wanted, groups, source)
    return several


def _load_network(
    source: str,
    described: tuple[str | None, str | None, Mapping[str, Any]],
    trust_remote_code: bool,
    hub: dict[str, Any],
) -> tuple[Any, dict[str, Any] | None]:
    """A network with a `config`, and what its config.json holds; None of a bare file."""
    if source.endswith(SUFFIXES):
        return _from_file(source, *described), None
    config = _read_config(source, hub)
    return _from_folder(source, config, trust_remote_code, hub), config


def _input_side(config: Any, image_size: AnySize | None, source: str) -> AnySize | None:
    """The input side of a network: what is asked for, or the only one that it takes."""
    side = fixed_side(config)
    if side is not None and image_size is not None and as_size(image_size) != (side, side):
        raise ValueError(
            f"Expected --teacher_image_size {side} for {source}, got {image_size}: a "
            f"{config.model_type} takes that size only. Leave it out."
        )
    return image_size if side is None else side


def _classes(
    own: Mapping[int, str],
    num_labels: int | None,
    id2label: Mapping[int, str] | None,
    class_map: str | None,
    source: str,
) -> tuple[dict[int, str], Groups | None]:
    """Names of the classes that a teacher answers for, and how its own make them; says how."""
    labels = {int(i): str(name) for i, name in own.items()}
    num_labels = num_labels or max(len(labels), 2)
    if len(labels) == num_labels and id2label is None and class_map is None:
        return labels, None
    names = dict(id2label or default_labels(num_labels))
    groups, note = translate(class_map, labels, names, source)
    if note:
        announce(f"{public_name(source)}: {note}")
    return labels if groups is None and len(labels) == num_labels else names, groups


def _from_file(
    source: str, arch: str | None, encoder: str | None, options: Mapping[str, Any]
) -> SmpForSemanticSegmentation:
    if elsewhere := not_here(source):
        raise FileNotFoundError(f"Expected a weight file, got {source!r}.{elsewhere}")
    if arch is None or encoder is None:
        raise ValueError(
            f"Expected the architecture and encoder of {source!r}, got arch={arch} and "
            f"encoder={encoder}. A bare state dict does not name them: give both."
        )
    return network_from_file(source, arch, encoder, options)


def _read_config(source: str, hub: dict[str, Any]) -> dict[str, Any]:
    problem = None
    try:
        config = read_config(source, **hub)
    except OSError as error:
        config, problem = {}, error
    if not config:
        if (Path(source) / "config.json").is_file():
            fault = "one that is no JSON object"
        else:
            fault = "a folder without it" if Path(source).is_dir() else "no folder and no Hub model"
        raise FileNotFoundError(
            f"Expected a teacher's config.json, got {fault} at {source!r}. Give a folder, a Hub id "
            "that can be reached, or a weight file with its architecture and encoder."
            f"{not_here(source)}"
        ) from problem
    return config


def _from_folder(
    source: str, config: dict[str, Any], trust_remote_code: bool, hub: dict[str, Any]
) -> Any:
    if "_model_class" in config:
        channels = config.get("in_channels", 3)
        if channels != 3 and "image_mean" not in config:  # smp itself writes none
            check_whole("in_channels", channels, 1, 64)
            told = {"model_type": SmpConfig.model_type, **without_statistics(channels)}
            hub = {**hub, "config": SmpConfig.from_dict(config | told)}
        return SmpForSemanticSegmentation.from_pretrained(source, **hub)
    model, _ = load_stock(source, config, trust_remote_code=trust_remote_code, **hub)
    take_rgb(model, source, **hub)
    return with_task(model, source, **hub)


def reduces_labels(source: str, **hub: Any) -> bool:
    """Whether a saved model counts classes from mask value 1 on, as its preprocessing says.

    `do_reduce_labels` is the convention of ADE20K: mask value 0 is not labelled.
    """
    source = model_source(source)
    if source.endswith(SUFFIXES):
        return False
    try:
        settings = saved_preprocessing(source, **hub)
    except (OSError, ValueError):  # what is wrong with it is said where the model is loaded
        return False
    return bool(settings.get("do_reduce_labels"))


def saved_class_names(source: str, **hub: Any) -> list[str] | None:
    """Names of a saved model's classes; None if it has none of its own."""
    source = model_source(source)
    if source.endswith(SUFFIXES):
        return None
    try:
        labels = read_config(source, **hub).get("id2label")
        names = [str(labels[key]) for key in sorted(labels, key=int)] if labels else None
    except (LookupError, OSError, TypeError, ValueError):  # said where the model is loaded
        return None
    return None if names and any(name.startswith("LABEL_") for name in names) else names


HALF_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def state_of(teacher: Teacher) -> tuple[tuple[int, int], ...]:
    """What changes when somebody writes into a teacher's tensors; reads no value."""
    tensors = (*teacher.network.parameters(), *teacher.network.buffers())
    return tuple((t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors)


class TeacherInference:
    """Runs a copy of the teacher that was made for this training, and leaves the teacher alone.

    The copy is made at the first call, and again when the teacher has changed; a run without a call
    has none. It is no part of the teacher, whose weights a run is recognised by.

    Args:
        teacher: on the device where it is to run.
        precision: of the autocast under which it will be called: bf16, fp16, or else fp32.
        fold: multiply BatchNorms into convolutions and cast weights once.
        backend: of torch.compile, or None.

    Attributes:
        prepared: the teacher that runs; None before the first call.
    """

    def __init__(
        self,
        teacher: Teacher,
        *,
        precision: str,
        fold: bool = True,
        backend: str | None = None,
    ) -> None:
        self.teacher = teacher
        self.fold = fold
        self.backend = backend
        self._type = HALF_TYPES.get(precision, torch.float32)
        self.prepared: Teacher | None = None
        self._prepared_from: tuple[tuple[int, int], ...] = ()

    def _prepare(self, pixel_values: Tensor) -> Teacher:
        if not self.fold and self.backend is None:
            return self.teacher
        prepared = copy.copy(self.teacher)
        prepared._modules = dict(self.teacher._modules)
        network: Any = self.teacher.network
        if self.fold:
            network = folded(network, self._type, self._network_input(pixel_values))
        if self.backend is not None:
            network = torch.compile(network, backend=self.backend)
        prepared.network = network
        return prepared

    def _network_input(self, pixel_values: Tensor) -> Tensor:
        """What the network gets of the first image: of its own size and normalisation."""
        inputs: list[Tensor] = []
        handle = self.teacher.network.register_forward_pre_hook(
            lambda _, args: inputs.append(args[0])
        )
        try:
            with torch.autocast(pixel_values.device.type, enabled=False):
                self.teacher(pixel_values[:1])
        finally:
            handle.remove()
        return inputs[0]

    @torch.no_grad()
    def __call__(self, pixel_values: Tensor) -> Tensor:
        """Logits fp32 (B, K, H, W) of normalised images (B, 3, H, W).

        Call it under the autocast that was named.
        """
        logits: Tensor = self.ready(pixel_values)(pixel_values)
        return logits

    @torch.no_grad()
    def ready(self, pixel_values: Tensor) -> Teacher:
        """The teacher that runs for such images, prepared if it is not yet."""
        state = state_of(self.teacher)
        if self.prepared is None or state != self._prepared_from:
            self.prepared, self._prepared_from = self._prepare(pixel_values), state
        return self.prepared
