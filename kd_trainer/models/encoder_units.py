"""The encoder cut into units that are frozen and freed one after the other, and what it never uses.

Travels with a saved model as remote code; imports nothing of the package.
"""

import copy
import itertools
import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .image_sizes import AnySize, as_size, size_text

# Containers whose children are the stages or blocks, and the names under which stages are known.
_CONTAINERS = ("blocks", "_blocks", "stages", "layers", "features")
_STAGE = re.compile(
    r"(?:blocks|stages|layers)[._](\d+)|(?:layer|stage|s|features\.denseblock)([1-9]\d*)"
)
_MIX_TRANSFORMER_STAGE = re.compile(r"(?:patch_embed|block|norm)(\d)")
# Accepted by nearly every encoder of fixed input size; the forward pass costs nothing anyway.
_PROBE_SIZE = 224


@dataclass(frozen=True)
class EncoderUnit:
    """One part of the encoder that is frozen or free as a whole.

    Args:
        name: path of the stage that gives the unit its place, `encoder.blocks.6` for instance.
        modules: everything that goes into eval mode while the unit is frozen.
        named: its parameters with their full names, without those that are never used.
    """

    name: str
    modules: tuple[nn.Module, ...]
    named: tuple[tuple[str, nn.Parameter], ...]

    def parameters(self) -> tuple[tuple[str, nn.Parameter], ...]:
        """(full name, parameter) pairs that this unit trains when it is free."""
        return self.named


def find_never_used(
    network: nn.Module, image_size: AnySize, in_channels: int = 3, device: str = "meta"
) -> frozenset[str]:
    """Names of the parameters that no output depends on, so that they never get a gradient.

    Walks the autograd graph of one forward pass of a copy on the meta device: no arithmetic, no
    random numbers, no change to any buffer, and any image size costs the same. It is the question
    that DistributedDataParallel asks, so the answer is the one it needs.

    Args:
        network: called with (1, in_channels, height, width); returns tensors.
        image_size: that the network accepts, in pixels, as `as_size` reads it.
        in_channels: of the input.
        device: another than meta for networks that read values of their maps.

    Raises:
        ValueError: if the network refuses that size.
    """
    twin = copy.deepcopy(network).to(device).eval().requires_grad_(True)
    dtype = next(twin.parameters()).dtype
    probe = torch.empty(1, in_channels, *as_size(image_size), dtype=dtype, device=device)
    try:
        with torch.enable_grad():
            outputs = twin(probe)
    except (AssertionError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"Expected an image size that {type(network).__name__} accepts, got "
            f"{size_text(image_size)}. Choose another size, or change the option named here: "
            f"{reason}"
        ) from error
    reached = _reached_parameters(_tensors(outputs))
    return frozenset(n for n, p in twin.named_parameters() if id(p) not in reached)


def _tensors(outputs: Any) -> Iterator[torch.Tensor]:
    if isinstance(outputs, torch.Tensor):
        yield outputs
    else:
        for output in outputs:
            yield from _tensors(output)


def _reached_parameters(outputs: Iterable[torch.Tensor]) -> set[int]:
    waiting: list[Any] = [output.grad_fn for output in outputs]
    seen: set[Any] = set()
    reached: set[int] = set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):  # a leaf of the graph: the parameter itself
            reached.add(id(node.variable))
        waiting.extend(following for following, _ in node.next_functions)
    return reached


def encoder_units(model: nn.Module) -> list[EncoderUnit]:
    """Cut an encoder into units; unit 0 is the stem with the first stage, the last the deepest.

    The stages of timm-efficientnet (7), resnet (4), mobilenet, mix transformer (4) and timm's own
    (`tu-*`) encoders are known by name; of any other encoder each direct child that owns
    parameters is a unit. Each parameter that is ever used belongs to exactly one unit; stages
    without any (beyond `encoder_depth`) are left out.

    Args:
        model: a segmentation model with the attribute `encoder`, or an encoder alone.
    """
    is_model = isinstance(getattr(model, "encoder", None), nn.Module)
    encoder: nn.Module = model.encoder if is_model else model  # type: ignore[assignment]
    prefix = "encoder." if is_model else ""
    finder = getattr(model, "never_used_parameters", None)
    never_used = finder() if finder else find_never_used(model, _PROBE_SIZE)
    trunk, path = encoder, prefix
    while isinstance(inner := getattr(trunk, "model", None), nn.Module):  # timm's own, wrapped
        trunk, path = inner, f"{path}model."

    names = {id(p): prefix + n for n, p in encoder.named_parameters()}
    used = {key: name for key, name in names.items() if name not in never_used}
    units = []
    for index, group in enumerate(_stages(trunk)):
        own = [p for _, module in group.members for p in module.parameters()]
        if index == 0:  # class tokens and position embeddings hang on the trunk itself
            own = [*(p for p in trunk.parameters(recurse=False)), *own]
        named = tuple((used.pop(id(p)), p) for p in own if id(p) in used)
        if named:
            modules = tuple(module for _, module in group.members)
            units.append(EncoderUnit(path + group.name, modules, named))
    return units


def free_deepest(
    model: nn.Module, units: Sequence[EncoderUnit], never_used: Iterable[str], count: int
) -> tuple[nn.Module, ...]:
    """Let the `count` deepest units get gradients, and the others and what is never used none.

    Returns:
        The modules of the frozen units, which are to stay in eval mode.

    Raises:
        ValueError: if there are not so many units.
    """
    if not 0 <= count <= len(units):
        raise ValueError(
            f"Expected 0 to {len(units)} free units, got {count}. The encoder has {len(units)}."
        )
    for depth, unit in enumerate(reversed(units)):
        for _, parameter in unit.parameters():
            parameter.requires_grad_(depth < count)
    for name in never_used:
        model.get_parameter(name).requires_grad_(False)
    return tuple(module for unit in units[: len(units) - count] for module in unit.modules)


@dataclass
class _Stage:
    name: str
    members: list[tuple[str, nn.Module]]


def _stages(trunk: nn.Module) -> list[_Stage]:
    """Group the trunk's parts: the stem with the first stage, the rest with the stage before."""
    parts = list(_parts(trunk))
    numbers = _stage_numbers(trunk, parts)
    if len({number for number in numbers if number is not None}) < 2:
        numbers = _one_stage_a_child(parts)
    first = next(number for number in numbers if number is not None)
    stages: dict[int, _Stage] = {}
    current = first
    for (name, module), number in zip(parts, numbers, strict=True):
        current = current if number is None else number
        stage = stages.setdefault(current, _Stage(name, []))
        stage.members.append((name, module))
        if number is not None:
            stage.name = name
    return [stages[number] for number in sorted(stages)]


def _parts(trunk: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, child in trunk.named_children():
        if name in _CONTAINERS and isinstance(child, nn.Sequential | nn.ModuleList):
            yield from ((f"{name}.{inner}", module) for inner, module in child.named_children())
        else:
            yield name, child


def _stage_numbers(trunk: nn.Module, parts: list[tuple[str, nn.Module]]) -> list[int | None]:
    """The stage each part belongs to, None where its name does not tell."""
    names = [name for name, _ in parts]
    if "_blocks.0" in names:
        return _numbers_by_width(parts)
    bounds = getattr(trunk, "_out_indexes", None)
    if bounds and names[0] == "features.0":  # mobilenet: a stage ends where a feature is taken
        indices = [name.removeprefix("features.") for name in names]
        return [bisect_left(bounds, int(i)) if i.isdecimal() else None for i in indices]
    pattern = _MIX_TRANSFORMER_STAGE if "block1" in names else _STAGE
    matches = [pattern.fullmatch(name) for name in names]
    return [int(next(filter(None, m.groups()))) if m else None for m in matches]


def _numbers_by_width(parts: list[tuple[str, nn.Module]]) -> list[int | None]:
    """Of `efficientnet-*`, whose blocks are one flat list: a stage ends where the width changes."""
    widths = [
        module._bn2.num_features if name.startswith("_blocks.") else None  # type: ignore[union-attr]
        for name, module in parts
    ]
    order = [width for width, _ in itertools.groupby(w for w in widths if w)]
    return [None if width is None else order.index(width) for width in widths]


def _one_stage_a_child(parts: list[tuple[str, nn.Module]]) -> list[int | None]:
    owners = itertools.count()
    return [next(owners) if any(True for _ in part.parameters()) else None for _, part in parts]
