"""A copy of a frozen network that computes the same with less work.

In eval mode a BatchNorm is a fixed scale and shift of each channel. Behind a convolution it can be
multiplied into that one's weights, and a pass over the feature map is saved.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils._python_dispatch import TorchDispatchMode

from kd_trainer.fast_layers import (
    FastDepthwise,
    SubsampledPointwise,
    is_plain,
    use_fast_layers,
)
from kd_trainer.teacher.network import logits_of

_ROUNDING = 1e-3  # beside the largest logit: far above rounding, far below a wrong scale
_CONVOLUTIONS = (nn.Conv2d, Conv2dSame, FastDepthwise, SubsampledPointwise)
_NORMS = (nn.BatchNorm2d, BatchNormAct2d)
# Under autocast these would cast their weights at each call; nothing else is cast beforehand, so
# that every other operation runs in the precision that autocast chooses for it.
_CAST = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)


def folded(network: nn.Module, dtype: torch.dtype, picture: Tensor) -> nn.Module:
    """Copy a network for inference: BatchNorms folded, weights cast once, channels last.

    Only networks with an smp encoder are searched for BatchNorms. Weights of convolutions and
    linear layers are kept in `dtype` for calls under autocast of that type.

    Args:
        network: in eval mode; is not changed.
        dtype: of the calls; float32 and float64 leave the weights as they are.
        picture: (1, 3, H, W) as the network gets it, with which it is run to see what is called
            in which order, and whether the copy answers alike.

    Returns:
        The copy. Its logits are those of `network` but for rounding.

    Raises:
        ValueError: if they are not.
    """
    copied = copy.deepcopy(network)
    if hasattr(copied, "encoder") and any(_is_norm(m) for m in copied.modules()):
        pairs = _pairs(copied, picture)
        names = {module: name for name, module in copied.named_modules()}
        for convolution, norm in pairs:
            fused = fuse_conv_bn_eval(convolution, norm)
            _replace(copied, names[convolution], fused)
            _replace(copied, names[norm], _rest_of(norm))
        _check_alike(network, copied, picture)
    if dtype in (torch.bfloat16, torch.float16):
        for module in copied.modules():
            if isinstance(module, _CAST):
                module.to(dtype)
    use_fast_layers(copied)
    return copied.requires_grad_(False)


@torch.no_grad()
def _check_alike(network: nn.Module, copied: nn.Module, picture: Tensor) -> None:
    """Refuse a copy of a network that does more with its layers than to call them."""
    with torch.autocast(picture.device.type, enabled=False):
        expected = logits_of(network(picture)).float()
        if not torch.isfinite(expected).all():
            return  # the loss terms find that, and name it
        try:
            off = float((logits_of(copied(picture)).float() - expected).abs().max())
            reason = f"logits that differ by {off:.2g}"
        except Exception as error:  # whatever its code finds missing in the copy
            off, reason = math.inf, f"{type(error).__name__}: {error}"
    if not off <= _ROUNDING * (1 + float(expected.abs().max())):
        raise ValueError(
            "Expected a teacher that answers alike with its BatchNorms folded into its "
            f"convolutions, got {reason}. Use --fold_teacher false."
        )


def _is_norm(module: nn.Module) -> bool:
    known = type(module) in _NORMS and getattr(module, "track_running_stats", False)
    return known and is_plain(module)


def _is_convolution(module: nn.Module) -> bool:
    """Whether it does nothing with its weights but convolve."""
    return type(module) in _CONVOLUTIONS and is_plain(module)


def _rest_of(norm: nn.Module) -> nn.Module:
    """What timm's BatchNormAct2d does behind the normalisation, else nothing."""
    layers = [getattr(norm, name, None) for name in ("drop", "act")]
    return nn.Sequential(*(layer for layer in layers if isinstance(layer, nn.Module)))


def _replace(root: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(root.get_submodule(parent), child, module)


class _Uses(TorchDispatchMode):
    """Counts the operations that read each of the tensors in `watched`."""

    def __init__(self) -> None:
        super().__init__()
        self.watched: dict[int, Tensor] = {}  # kept, so that no later tensor gets the same id
        self.uses: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run the operation, and count what it was given."""
        del types
        for value in torch.utils._pytree.tree_leaves((args, kwargs)):
            if id(value) in self.watched:
                self.uses[id(value)] = self.uses.get(id(value), 0) + 1
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def _pairs(network: nn.Module, picture: Tensor) -> list[tuple[nn.Conv2d, nn.BatchNorm2d]]:
    """Convolutions whose result goes into one BatchNorm and nowhere else.

    Found by running the network once: the names of layers do not say in which order they are
    called. A layer that is called twice is left alone.
    """
    uses = _Uses()
    made_by: dict[int, nn.Conv2d] = {}
    calls: dict[nn.Module, int] = {}
    found: list[tuple[nn.Conv2d, nn.BatchNorm2d, int]] = []

    def after(module: nn.Module, inputs: Any, output: Any) -> None:
        calls[module] = calls.get(module, 0) + 1
        if isinstance(module, nn.Conv2d):
            uses.watched[id(output)] = output
            made_by[id(output)] = module
        elif id(inputs[0]) in made_by:
            assert isinstance(module, nn.BatchNorm2d)
            found.append((made_by[id(inputs[0])], module, id(inputs[0])))

    layers = [m for m in network.modules() if _is_convolution(m) or _is_norm(m)]
    hooks = [module.register_forward_hook(after) for module in layers]
    try:
        with uses, torch.autocast(picture.device.type, enabled=False):
            network(picture)
    finally:
        for hook in hooks:
            hook.remove()
    return [
        (convolution, norm)
        for convolution, norm, result in found
        if calls[convolution] == calls[norm] == 1 and uses.uses.get(result) == 1
    ]
