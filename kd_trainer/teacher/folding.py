"""A copy of a frozen network that computes the same with less work.

In eval mode a BatchNorm is a fixed scale and shift of each channel. Behind a convolution it can be
multiplied into that one's weights, and a pass over the feature map is saved.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils._python_dispatch import TorchDispatchMode

from kd_trainer.fast_layers import use_fast_layers

_SIDE = 64
"""Pixels of the picture with which the pairs are looked for."""
# Under autocast these would cast their weights at each call; nothing else is cast beforehand, so
# that every other operation runs in the precision that autocast chooses for it.
_CAST = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)


def folded(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Copy a network for inference: BatchNorms folded, weights cast once, channels last.

    Only networks with an smp encoder are searched for BatchNorms. Weights of convolutions and
    linear layers are kept in `dtype` for calls under autocast of that type.

    Args:
        network: in eval mode; is not changed.
        dtype: of the calls; float32 and float64 leave the weights as they are.

    Returns:
        The copy. Its logits are those of `network` but for rounding.
    """
    copied = copy.deepcopy(network)
    if hasattr(copied, "encoder") and any(_is_norm(m) for m in copied.modules()):
        pairs = _pairs(copied)
        names = {module: name for name, module in copied.named_modules()}
        for convolution, norm in pairs:
            fused = fuse_conv_bn_eval(convolution, norm)
            _replace(copied, names[convolution], fused)
            _replace(copied, names[norm], _rest_of(norm))
    if dtype in (torch.bfloat16, torch.float16):
        for module in copied.modules():
            if isinstance(module, _CAST):
                module.to(dtype)
    use_fast_layers(copied)
    copied.requires_grad_(False)
    return copied.to(memory_format=torch.channels_last)


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.BatchNorm2d) and module.track_running_stats


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
def _pairs(network: nn.Module) -> list[tuple[nn.Conv2d, nn.BatchNorm2d]]:
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

    layers = [m for m in network.modules() if isinstance(m, nn.Conv2d) or _is_norm(m)]
    hooks = [module.register_forward_hook(after) for module in layers]
    weight = next(network.parameters())
    picture = torch.zeros(1, 3, _SIDE, _SIDE, dtype=weight.dtype, device=weight.device)
    try:
        with uses, torch.autocast(weight.device.type, enabled=False):
            network(picture)
    finally:
        for hook in hooks:
            hook.remove()
    return [
        (convolution, norm)
        for convolution, norm, result in found
        if calls[convolution] == calls[norm] == 1 and uses.uses.get(result) == 1
    ]
