"""Layers that compute the same faster, put in place of those that networks are built of.

What a profile of a U-Net on EfficientNet showed on a CPU in bf16: half of a training step was the
backward pass of depthwise convolutions, which oneDNN has no good bf16 kernels for; a Swish of two
operations took three passes and two saved maps where one does; the mean of squeeze-and-excitation
took ten times an average pooling. Only the class of a layer changes: names, weights and copies
stay as they are, and whatever is traced, exported or compiled computes as before.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.activations import Swish
from timm.models._efficientnet_blocks import SqueezeExcite
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def use_fast_layers(network: nn.Module) -> None:
    """Change the layers of a network in place; its results change by rounding only."""
    for module in network.modules():
        kind = type(module)
        if kind is Swish:
            module.__class__ = FastSwish
        elif kind is SqueezeExcite:
            module.__class__ = FastSqueezeExcite
        elif kind is nn.Conv2d and _is_depthwise(module):
            module.__class__ = FastDepthwise


def _is_depthwise(module: nn.Module) -> bool:
    return (
        isinstance(module, nn.Conv2d)
        and module.groups == module.in_channels == module.out_channels > 1
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
    )


def _traced() -> bool:
    return bool(torch.compiler.is_compiling() or torch.jit.is_tracing())  # type: ignore[attr-defined]


class FastSwish(Swish):
    """`x * sigmoid(x)` in one operation, which keeps one map for the backward pass."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape."""
        if _traced():
            return super().forward(x)
        # In place it would save a copy of its input while training.
        return F.silu(x, inplace=self.inplace and not torch.is_grad_enabled())


class FastSqueezeExcite(SqueezeExcite):
    """timm's squeeze-and-excitation, whose mean in bf16 on a CPU is an average pooling."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W)."""
        if _traced() or x.device.type != "cpu" or x.dtype != torch.bfloat16:
            return super().forward(x)
        squeezed = F.avg_pool2d(x, x.shape[-2:])
        excited = self.conv_expand(self.act1(self.conv_reduce(squeezed)))
        return x * self.gate(excited)


class FastDepthwise(nn.Conv2d):
    """A depthwise convolution that under bf16 autocast on a CPU goes back in fp32."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if (
            _traced()
            or input.device.type != "cpu"
            or not torch.is_grad_enabled()
            or not torch.is_autocast_enabled("cpu")
            or torch.get_autocast_dtype("cpu") != torch.bfloat16
        ):
            return super()._conv_forward(input, weight, bias)
        settings = (self.stride, self.padding, self.dilation, self.groups)
        result: Tensor = _Depthwise.apply(input.to(torch.bfloat16), weight, bias, settings)
        return result


class _Depthwise(torch.autograd.Function):
    """Forward in bf16, as autocast does it; gradients from fp32 copies of the saved maps."""

    @staticmethod
    def forward(
        ctx: Any, pixels: Tensor, weight: Tensor, bias: Tensor | None, settings: Any
    ) -> Tensor:
        """Convolve."""
        rounded = weight.to(torch.bfloat16)
        ctx.save_for_backward(pixels, rounded)
        ctx.settings, ctx.with_bias, ctx.types = settings, bias is not None, weight.dtype
        with torch.autocast("cpu", enabled=False):
            own_bias = None if bias is None else bias.to(torch.bfloat16)
            return F.conv2d(pixels, rounded, own_bias, *settings)

    @staticmethod
    @once_differentiable  # a second derivative would miss what was rounded: an error instead
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of pixels (bf16), weight and bias (their own type)."""
        (gradient,) = gradients
        pixels, weight = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.settings
        wanted = [bool(needed) for needed in ctx.needs_input_grad[:3]]
        by_pixels, by_weight, by_bias = torch.ops.aten.convolution_backward(
            gradient.float(),
            pixels.float(),
            weight.float(),
            [weight.shape[0]] if ctx.with_bias else None,
            stride,
            padding,
            dilation,
            False,
            [0, 0],
            groups,
            wanted,
        )
        return (
            by_pixels.to(pixels.dtype) if wanted[0] else None,
            by_weight.to(ctx.types) if wanted[1] else None,
            by_bias.to(ctx.types) if wanted[2] else None,
            None,
        )
