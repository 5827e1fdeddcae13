"""Layers that compute the same faster, put in place of those that networks are built of.

What a profile of a U-Net on EfficientNet showed on a CPU in bf16: half of a training step was the
backward pass of depthwise convolutions, as oneDNN has no good bf16 kernels for strided ones and
those larger than 3 x 3; a Swish of two operations took three passes and two saved maps where one
does; the mean of squeeze-and-excitation took ten times an average pooling; the decoder convolved
maps four times as large as what they were made of. Only the class of a layer changes: names,
weights and copies stay as they are, and whatever is traced or exported computes as before.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from segmentation_models_pytorch.decoders.unet.decoder import UnetDecoderBlock
from timm.layers.activations import Swish
from timm.models._efficientnet_blocks import SqueezeExcite
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.utils.parametrize import is_parametrized

# Of a picture, not of a batch: its logits must not depend on the company it is in.
_ENOUGH_PIXELS = 64 * 64


def use_fast_layers(network: nn.Module) -> None:
    """Change the layers of a network in place, and its weights to channels_last.

    Its results change by rounding only.
    """
    for module in network.modules():
        kind = type(module)
        if kind is Swish:
            module.__class__ = FastSwish
        elif kind is SqueezeExcite:
            module.__class__ = FastSqueezeExcite
        elif kind is nn.Conv2d and _is_slow_depthwise(module):
            module.__class__ = FastDepthwise
        elif kind is nn.Conv2d and _corrupts_memory(module):
            module.__class__ = SubsampledPointwise
        elif kind is UnetDecoderBlock and _is_nearest(module):
            module.__class__ = FastUnetBlock
    network.to(memory_format=torch.channels_last)


def is_plain(module: nn.Module) -> bool:
    """Whether nobody has attached anything to a layer that only its own call would do."""
    hooks = (
        *(module._forward_hooks, module._forward_pre_hooks),
        *(module._backward_hooks, module._backward_pre_hooks),
    )
    return not (any(hooks) or "forward" in vars(module) or is_parametrized(module))


def _is_slow_depthwise(module: nn.Module) -> bool:
    """Those of 3 x 3 without a stride have bf16 kernels as good as the fp32 ones."""
    return (
        isinstance(module, nn.Conv2d)
        and module.groups == module.in_channels == module.out_channels > 1
        and (max(module.kernel_size) > 3 or max(module.stride) > 1)
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
    )


def _corrupts_memory(module: nn.Module) -> bool:
    """Those whose weight gradient in channels_last writes outside of its memory on a CPU.

    Found with glibc's checked malloc (torch 2.15, AVX-512): 1 x 1 with a stride on 2 to 15
    channels, in fp32 and bf16. The stem of MobileOne is one; runs crashed later, or went on.
    """
    return (
        isinstance(module, nn.Conv2d)
        and module.kernel_size == (1, 1)
        and max(module.stride) > 1
        and module.in_channels // module.groups < 16
        and module.padding in ((0, 0), "valid")
    )


def _is_nearest(block: UnetDecoderBlock) -> bool:
    convolution = block.conv1[0]
    return (
        block.interpolation_mode == "nearest"
        and type(block.attention1.attention) is nn.Identity
        and type(convolution) is nn.Conv2d
        and convolution.kernel_size == (3, 3)
        and convolution.padding == convolution.stride == convolution.dilation == (1, 1)
        and convolution.groups == 1
        and convolution.padding_mode == "zeros"
    )


def _exported() -> bool:
    """Into a file goes the layer as it was written; torch.compile gets the faster one."""
    return bool(torch.compiler.is_exporting() or torch.jit.is_tracing())  # type: ignore[attr-defined]


class FastSwish(Swish):
    """`x * sigmoid(x)` in one operation, which keeps one map for the backward pass."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape."""
        if _exported():
            return super().forward(x)
        # In place it would save a copy of its input while training.
        return F.silu(x, inplace=self.inplace and not torch.is_grad_enabled())


class FastSqueezeExcite(SqueezeExcite):
    """timm's squeeze-and-excitation, whose mean in bf16 on a CPU is an average pooling."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W)."""
        if _exported() or x.device.type != "cpu" or x.dtype != torch.bfloat16:
            return super().forward(x)
        squeezed = F.avg_pool2d(x, x.shape[-2:])
        gates = self.gate(self.conv_expand(self.act1(self.conv_reduce(squeezed))))
        # The map is that of the activation before, which nobody else reads (timm calls that one
        # in place too): 74 to 70 ms for a B3 teacher, measured alone.
        return x * gates if torch.is_grad_enabled() else x.mul_(gates)


class FastDepthwise(nn.Conv2d):
    """A depthwise convolution that under bf16 autocast on a CPU goes back in fp32."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if (
            _exported()
            or input.device.type != "cpu"
            or not torch.is_grad_enabled()
            or not torch.is_autocast_enabled("cpu")
            or torch.get_autocast_dtype("cpu") != torch.bfloat16
        ):
            return super()._conv_forward(input, weight, bias)
        settings = (self.stride, self.padding, self.dilation, self.groups)
        result: Tensor = _Depthwise.apply(input.to(torch.bfloat16), weight, bias, settings)
        return result


class SubsampledPointwise(nn.Conv2d):
    """A 1 x 1 convolution with a stride, as one without of every second pixel."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if _exported() or input.device.type != "cpu" or not torch.is_grad_enabled():
            return super()._conv_forward(input, weight, bias)
        rows, columns = self.stride
        return F.conv2d(input[..., ::rows, ::columns], weight, bias, groups=self.groups)


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


class FastUnetBlock(UnetDecoderBlock):
    """A decoder block of smp's U-Net that never makes the enlarged map on a CPU."""

    def forward(
        self,
        feature_map: Tensor,
        target_height: int,
        target_width: int,
        skip_connection: Tensor | None = None,
    ) -> Tensor:
        """(B, C, H, W) to (B, C', 2 H, 2 W)."""
        height, width = feature_map.shape[-2:]
        convolution, *rest = self.conv1
        passed = (self.conv1, self.attention1, self.attention1.attention)
        if (
            _exported()
            or feature_map.device.type != "cpu"
            or (target_height, target_width) != (2 * height, 2 * width)
            or target_height * target_width < _ENOUGH_PIXELS  # adding the weights would cost more
            # Something may have been attached or exchanged since.
            or not (_is_nearest(self) and all(map(is_plain, (convolution, *passed))))
        ):
            return super().forward(feature_map, target_height, target_width, skip_connection)
        merged = enlarged_convolution(
            feature_map, skip_connection, convolution.weight, convolution.bias
        )
        for layer in rest:
            merged = layer(merged)
        return self.attention2(self.conv2(merged))


def enlarged_convolution(
    features: Tensor, skip: Tensor | None, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """Convolve a map, enlarged twice by its nearest neighbours, beside one of the larger size.

    Of the nine weights that meet the enlarged map at a pixel those on equal neighbours can be added
    first. What is left is a transposed convolution of the small map: 4 products a pixel, not 9.

    Args:
        features: (B, C, H, W).
        skip: (B, S, 2 H, 2 W), S may be 0, or None.
        weight: (K, C + S, 3, 3) of a convolution with a padding of 1.
        bias: (K), or None.

    Returns:
        (B, K, 2 H, 2 W).
    """
    channels = features.shape[1]
    with torch.autocast("cpu", enabled=False):  # sums in fp32, to be rounded once
        own = weight[:, :channels].to(torch.promote_types(weight.dtype, torch.float32))
        sums = own.new_tensor([[0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]])
        kernel = torch.einsum("ak,oikl,bl->ioab", sums, own, sums).to(weight.dtype)
    result = F.conv_transpose2d(features, kernel, bias, stride=2, padding=1)
    if skip is None or skip.shape[1] == 0:  # an encoder that starts at a quarter of the size
        return result
    return result + F.conv2d(skip, weight[:, channels:], padding=1)
