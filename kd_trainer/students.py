"""What any network must give to be a student: logits, classes, statistics of its input, units.

A model of smp says all of it itself. To a stock model of transformers, or a module from Python, it
is attached by `describe`, as a plain attribute: the model stays of its own class, so it is saved,
loaded and published as what it is. From here on nobody asks which kind a student is.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel, SegformerImageProcessor
from transformers.image_processing_backends import TorchvisionBackend

from kd_trainer.fast_layers import logits_of
from kd_trainer.files import write_json
from kd_trainer.models.config_checks import check_statistics
from kd_trainer.models.configuration_smp import IMAGENET_MEAN, IMAGENET_STD, default_labels
from kd_trainer.models.encoder_units import (
    EncoderUnit,
    encoder_units,
    find_never_used,
    free_deepest,
)
from kd_trainer.models.image_processing import SmpImageProcessor
from kd_trainer.models.image_sizes import AnySize, Size, as_size
from kd_trainer.models.modeling import SmpForSemanticSegmentation, check_image_size
from kd_trainer.models.weights import load_pretrained, load_strictly, read_weights

Units = Sequence[nn.Module | Sequence[nn.Module]]
TRAITS = "student.json"
MOST_UNITS = 7  # a plain ViT of 12 or 24 layers is freed in groups
# Sizes of exports have to be multiples of it: as deep as the encoders of transformers halve.
_USUAL_STRIDE = 32


@dataclass
class Traits:
    """What a network that is no model of smp does not say itself.

    Args:
        id2label: name of each class, background first.
        image_size: of its input, in pixels.
        mean: per channel, of values in 0..1.
        std: likewise.
        channels: of its raw logits; 1 for two classes.
        units: name, modules and parameters of each unit, by their names in the network.
        never_used: parameters that no logit depends on.
        new_head: whether what tells the classes apart was never trained.
    """

    id2label: dict[int, str]
    image_size: Size
    mean: list[float]
    std: list[float]
    channels: int
    units: list[tuple[str, list[str], list[str]]]
    never_used: frozenset[str]
    new_head: bool = False
    free_units: int = 0
    frozen: tuple[nn.Module, ...] = ()


class StudentLogits(nn.Module):
    """A student as one tensor in, one tensor out: see `student_logits`."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Raw logits (B, K, H, W) of normalised floats (B, 3, H, W)."""
        return student_logits(self.network, pixel_values)


def student_logits(network: nn.Module, pixels: Tensor) -> Tensor:
    """Raw logits (B, K, H, W), K = 1 for two classes, of normalised images (B, 3, H, W).

    Args:
        network: a student, or what DDP or torch.compile have wrapped around it.
        pixels: of the size that it takes.
    """
    return raw_logits_of(network(pixels), (pixels.shape[-2], pixels.shape[-1]))


def raw_logits_of(output: Any, size: tuple[int, int]) -> Tensor:
    """Raw logits (B, K, height, width) in what a student gave; those of smp as they are.

    Stock models give a fraction of the size, and a softmax of two classes, whose second one has the
    probability sigmoid(l1 - l0): the losses see that difference, and the argmax says the same.

    Args:
        output: a tensor, or an output with `raw_logits` or `logits`.
        size: of the images and labels.
    """
    logits = logits_of(output)
    if getattr(output, "raw_logits", None) is not None:
        return logits
    if logits.shape[1] == 2:
        logits = logits[:, 1:] - logits[:, :1]
    if logits.shape[-2:] == size:
        return logits
    return F.interpolate(logits, size, mode="bilinear", align_corners=False)


def as_student(
    module: nn.Module,
    *,
    id2label: Mapping[int, str] | None = None,
    image_size: AnySize | None = None,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    units: Units | None = None,
) -> nn.Module:
    """Make any network a student; a model of smp is one.

    Args:
        module: normalised floats (B, 3, H, W) to logits: a tensor, or an output with `.logits`.
        id2label: name of each class, background first; None counts them.
        image_size: of its input in pixels, as `as_size` reads it; None takes that of its
            configuration, or 224.
        mean: with which its images are normalised, of values 0..1.
        std: likewise.
        units: of its encoder, for staged unfreezing, the shallowest first: modules of the network,
            or several for one unit. None finds them in a model of transformers; of any other
            network everything is trained from the start.

    Returns:
        The network itself.

    Raises:
        ValueError: if it takes no such images, or gives other classes.
    """
    if isinstance(module, SmpForSemanticSegmentation):
        if units is not None:
            raise ValueError(
                "Expected no units for a model of smp, which has its own, got some. Leave them out."
            )
        return module
    stock = module if isinstance(module, PreTrainedModel) else None
    size = as_size(image_size or (stock and getattr(stock.config, "image_size", None)) or 224)
    probe, device = StudentLogits(module), "meta" if stock else "cpu"
    wrapped = find_never_used(probe, size, device=device)
    never_used = frozenset(name.removeprefix("network.") for name in wrapped)
    channels = _channels(module, size)
    labels = dict(id2label or _own_labels(module) or default_labels(max(channels, 2)))
    if channels != (1 if len(labels) == 2 else len(labels)):
        raise ValueError(
            f"Expected a network with a logit for each of {len(labels)} classes, got {channels} "
            f"channels from {type(module).__name__}. Give it another head, or name its classes."
        )
    found = _stock_units(stock) if units is None and stock else _named_units(module, units or ())
    vars(module)["student_traits"] = Traits(
        labels,
        size,
        list(mean),
        list(std),
        channels,
        list(_in_names(module, found, never_used)),
        never_used,
    )
    set_free_units(module, None)
    return module


@torch.no_grad()
def _channels(module: nn.Module, size: Size) -> int:
    """Of the raw logits."""
    parameter = next(module.parameters())
    pixels = torch.zeros(1, 3, *size, device=parameter.device)
    was_training = module.training
    channels = student_logits(module.eval(), pixels).shape[1]
    module.train(was_training)
    return channels


def _own_labels(module: nn.Module) -> dict[int, str] | None:
    if not isinstance(module, PreTrainedModel):
        return None
    labels = {int(index): str(name) for index, name in (module.config.id2label or {}).items()}
    return labels if len(labels) > 1 else {0: "background", 1: labels[0]}  # one logit


def _stock_units(model: PreTrainedModel) -> list[tuple[str, list[nn.Module]]]:
    """Stages of the encoder of a stock model, the shallowest first, as names and modules.

    They are the elements of the outermost list of modules in it (of several of one length side by
    side, in older SegFormers), in at most `MOST_UNITS` groups. What is built before them belongs to
    the first unit, what comes after to the last.
    """
    backbone = getattr(model, "backbone", None)
    encoder: nn.Module = backbone if isinstance(backbone, nn.Module) else model.base_model
    if encoder is model:
        return []
    lists = list(_outermost_lists(encoder))
    length = max((len(one) for one in lists), default=0)
    if length == 0:
        return []
    lists = [one for one in lists if len(one) == length]
    count = min(length, MOST_UNITS)
    names = {module: name for name, module in model.named_modules()}
    units: list[tuple[str, list[nn.Module]]] = []
    for index in range(count):
        part = slice(index * length // count, (index + 1) * length // count)
        modules = [module for one in lists for module in one[part]]
        units.append((names[modules[0]], modules))
    stages = {module for _, modules in units for module in modules}
    unit = 0
    for module in _pieces(encoder, stages):
        if module in stages:
            unit = count - 1
        else:
            units[unit][1].append(module)
    return units


def _outermost_lists(module: nn.Module) -> Iterator[nn.ModuleList]:
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield child
        else:
            yield from _outermost_lists(child)


def _pieces(module: nn.Module, stages: set[nn.Module]) -> Iterator[nn.Module]:
    """The stages, and between them the largest modules that hold none, in the order of building."""
    for child in module.children():
        if child in stages or stages.isdisjoint(child.modules()):
            yield child
        else:
            yield from _pieces(child, stages)


def _named_units(module: nn.Module, units: Units) -> list[tuple[str, list[nn.Module]]]:
    """The user's units with a name each.

    Raises:
        ValueError: if one is no part of the network, or part of two units.
    """
    names = {one: name for name, one in module.named_modules()}
    found = [[unit] if isinstance(unit, nn.Module) else list(unit) for unit in units]
    inside = [one for unit in found for module in unit for one in module.modules()]
    if any(one not in names or one is module for one in inside) or len(set(inside)) < len(inside):
        raise ValueError(
            "Expected units that are parts of the network, each once, got others. Give modules of "
            "the network itself, the shallowest first, as in [net.stem, net.layer1, net.layer2]."
        )
    return [(names[unit[0]], unit) for unit in found]


def _in_names(
    network: nn.Module, units: list[tuple[str, list[nn.Module]]], never_used: frozenset[str]
) -> Iterator[tuple[str, list[str], list[str]]]:
    """Units by the names of what they hold: modules may be replaced (by SyncBatchNorm, say)."""
    names = {module: name for name, module in network.named_modules()}
    parameters = {id(p): name for name, p in network.named_parameters()}
    for name, modules in units:
        own = [parameters[id(p)] for module in modules for p in module.parameters()]
        used = [one for one in own if one not in never_used]
        if used:
            yield name, [names[module] for module in modules], used


def is_student(network: nn.Module) -> bool:
    """Whether it says what `Traits` do, itself or by `as_student`."""
    return isinstance(network, SmpForSemanticSegmentation) or "student_traits" in vars(network)


def traits_of(student: nn.Module) -> Traits:
    """What `as_student` has found.

    Raises:
        TypeError: if nobody has called it.
    """
    traits = vars(student).get("student_traits")
    if traits is None:
        raise TypeError(
            f"Expected a student, got {type(student).__name__}. Make one of it with "
            "kd_trainer.as_student(network, id2label=..., units=...)."
        )
    found: Traits = traits
    return found


def labels_of_student(student: nn.Module) -> dict[int, str]:
    """Name of each class, background first."""
    if isinstance(student, SmpForSemanticSegmentation):
        return {int(index): str(name) for index, name in (student.config.id2label or {}).items()}
    return traits_of(student).id2label


def name_classes(student: nn.Module, id2label: dict[int, str]) -> None:
    """Call the classes so, in what is saved too; there are as many as before."""
    config: Any = getattr(student, "config", None)
    if is_student(student) and not isinstance(student, SmpForSemanticSegmentation):
        traits_of(student).id2label = dict(id2label)
        if config is not None and len(config.id2label) == 1:
            id2label = {0: id2label[1]}
    if config is not None:
        config.id2label = dict(id2label)
        config.label2id = {name: index for index, name in id2label.items()}


def image_size_of(student: nn.Module) -> Size:
    """Height and width of the input that a student is meant for."""
    if isinstance(student, SmpForSemanticSegmentation):
        return as_size(student.config.image_size)
    return traits_of(student).image_size


def keeps_aspect_ratio(network: nn.Module) -> bool:
    """Whether images are fitted into its input and padded, instead of stretched to it."""
    return bool(getattr(getattr(network, "config", None), "keep_aspect_ratio", False))


def channels_of(student: nn.Module) -> int:
    """Of the raw logits: 1 for two classes, but for a softmax of smp's."""
    if isinstance(student, SmpForSemanticSegmentation):
        return student.config.classes
    return traits_of(student).channels


def has_one_logit(student: nn.Module) -> bool:
    """Whether a stock model has one channel, so that every stock argmax over it is 0."""
    if isinstance(student, SmpForSemanticSegmentation) or not isinstance(student, PreTrainedModel):
        return False
    return bool(student.config.num_labels == 1)


def channels_seen(network: nn.Module) -> int:
    """Channels of its images: 3 but for a network of smp (or around one) that says otherwise."""
    of_smp = (one for one in network.modules() if isinstance(one, SmpForSemanticSegmentation))
    return next((int(one.config.in_channels) for one in of_smp), 3)


def reads_own_depth(student: nn.Module) -> bool:
    """Whether its images are other than 8-bit RGB, see `SmpConfig.own_depth`."""
    return isinstance(student, SmpForSemanticSegmentation) and student.config.own_depth


def has_several_labels(student: nn.Module) -> bool:
    """Whether a pixel may have several of its labels; no stock model is one."""
    return isinstance(student, SmpForSemanticSegmentation) and student.config.multi_label


def statistics_of(student: nn.Module) -> tuple[list[float], list[float]]:
    """Mean and std with which its images are normalised, of values 0..1."""
    if isinstance(student, SmpForSemanticSegmentation):
        return list(student.config.image_mean), list(student.config.image_std)
    return traits_of(student).mean, traits_of(student).std


def processor_of(student: nn.Module, **options: Any) -> TorchvisionBackend:
    """The image processor that feeds a student; `options` are saved with it.

    One class of transformers for all stock models: it resizes and normalises and does nothing else,
    where those of some families crop, keep the aspect ratio or turn channels, as no training here.
    """
    if isinstance(student, SmpForSemanticSegmentation):
        return SmpImageProcessor.from_model_config(student.config, **options)
    (mean, std), (height, width) = statistics_of(student), image_size_of(student)
    size = {"height": height, "width": width}
    return SegformerImageProcessor(size=size, image_mean=mean, image_std=std, **options)


def size_multiple(student: nn.Module) -> int:
    """What each side of its input has to be a multiple of; of stock models, what always fits."""
    if isinstance(student, SmpForSemanticSegmentation):
        return int(student.encoder.output_stride)  # type: ignore[arg-type]
    return _USUAL_STRIDE


def check_student_size(size: AnySize, student: nn.Module) -> None:
    """Refuse an image size that a student cannot take.

    Raises:
        ValueError: names the reason.
    """
    if isinstance(student, SmpForSemanticSegmentation):
        check_image_size(size, student)
    elif as_size(size) != image_size_of(student):  # which was tried
        find_never_used(StudentLogits(student), size)


def units_of(student: nn.Module) -> list[EncoderUnit]:
    """Units of the encoder, the shallowest first; empty where all of it is trained at once."""
    if isinstance(student, SmpForSemanticSegmentation):
        return encoder_units(student)
    return [
        EncoderUnit(
            name,
            tuple(student.get_submodule(module) for module in modules),
            tuple((one, student.get_parameter(one)) for one in parameters),
        )
        for name, modules, parameters in traits_of(student).units
    ]


def never_used(student: nn.Module) -> frozenset[str]:
    """Names of the parameters that no logit depends on; they are always frozen."""
    if isinstance(student, SmpForSemanticSegmentation):
        return student.never_used_parameters()
    return traits_of(student).never_used


def free_units(student: nn.Module) -> int:
    """How many units are free, counted from the deepest."""
    if isinstance(student, SmpForSemanticSegmentation):
        return student.free_units
    return traits_of(student).free_units


def set_free_units(student: nn.Module, count: int | None) -> None:
    """Free the `count` deepest units and freeze the others; None frees them all.

    Raises:
        ValueError: if there are not so many units.
    """
    if isinstance(student, SmpForSemanticSegmentation):
        student.set_free_units(count)
        return
    traits, units = traits_of(student), units_of(student)
    traits.free_units = len(units) if count is None else count
    traits.frozen = free_deepest(student, units, traits.never_used, traits.free_units)
    hold_frozen(student)


def has_new_head(student: nn.Module) -> bool:
    """Whether its head was made for classes that the saved model did not have."""
    return not isinstance(student, SmpForSemanticSegmentation) and traits_of(student).new_head


def hold_frozen(student: nn.Module) -> None:
    """Put frozen units back into eval mode: `train()` of a stock model knows nothing of them."""
    if not isinstance(student, SmpForSemanticSegmentation):
        for module in traits_of(student).frozen:
            module.eval()


def save_traits(module: nn.Module, folder: Path) -> None:
    """Write what `load_module` needs beside the weights; models of smp and transformers say it."""
    if isinstance(module, PreTrainedModel):
        return
    traits = traits_of(module)
    told = {name: getattr(traits, name) for name in ("image_size", "mean", "std")}
    labels = [traits.id2label[index] for index in sorted(traits.id2label)]
    write_json(folder / TRAITS, {"class": type(module).__name__, "class_names": labels, **told})


def load_module(module: nn.Module, folder: str | Path) -> nn.Module:
    """Fill a module of the user's with the weights that were saved of it, and make it a student.

    Args:
        module: a new one of the class that was trained.
        folder: of a checkpoint, or where `save_model` wrote to.

    Raises:
        FileNotFoundError: if there are no weights.
        ValueError: if they are not those of this module.
    """
    file = Path(folder) / "model.safetensors"
    load_strictly(module, read_weights(file), source=str(file))
    told = json.loads((Path(folder) / TRAITS).read_text(encoding="utf-8"))
    check_statistics(told["mean"], told["std"], TRAITS)
    labels = dict(enumerate(told["class_names"]))
    return as_student(
        module,
        id2label=labels,
        image_size=told["image_size"],
        mean=told["mean"],
        std=told["std"],
    )


def resumed_with(student: nn.Module) -> dict[str, Any]:
    """What makes two runs differ beside the tensors; smp's models derive it from their names."""
    if isinstance(student, SmpForSemanticSegmentation):
        return {}
    traits = traits_of(student)
    told = [*traits.mean, *traits.std, *(name for name, *_ in traits.units)]
    return {"student_traits": " ".join(map(str, told))}


def load_renamed(student: nn.Module, folder: str) -> bool:
    """Copy the weights of a saved stock model, whose file may have other names for them.

    Returns:
        False where nothing was done, as the names are those of the student.

    Raises:
        ValueError: if they do not fit.
    """
    if isinstance(student, SmpForSemanticSegmentation) or not isinstance(student, PreTrainedModel):
        return False
    load = type(student).from_pretrained
    saved, _ = load_pretrained(load, folder, config=student.config, dtype=student.dtype)
    student.load_state_dict(saved.state_dict())
    return True


def parameter_counts(student: nn.Module) -> tuple[int, int, int]:
    """Number of parameters (used, never used, trainable at this moment)."""
    dead = never_used(student)
    sizes = {name: p.numel() for name, p in student.named_parameters()}
    idle = sum(size for name, size in sizes.items() if name in dead)
    trainable = sum(p.numel() for p in student.parameters() if p.requires_grad)
    return sum(sizes.values()) - idle, idle, trainable
