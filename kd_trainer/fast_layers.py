"""Layers that compute the same faster, put in place of those that networks are built of.

What a profile of a U-Net on EfficientNet showed on a CPU in bf16: half of a training step was the
backward pass of depthwise convolutions, as oneDNN has no good bf16 kernels for strided ones and
those larger than 3 x 3; a Swish of two operations took three passes and two saved maps where one
does; the mean of squeeze-and-excitation took ten times an average pooling; the decoder convolved
maps four times as large as what they were made of. Only the class of a layer changes: names,
weights and copies stay as they are, and whatever is traced or exported computes as before.
"""

from __future__ import annotations

import copy
import ctypes
import math
import platform
from collections import Counter
from typing import Any, cast

import torch
import torch.nn.functional as F
from segmentation_models_pytorch.decoders.unet.decoder import UnetDecoderBlock
from timm.layers.activations import Swish
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.norm_act import BatchNormAct2d
from timm.models._efficientnet_blocks import SqueezeExcite
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.nn.utils.parametrize import is_parametrized
from torch.utils._python_dispatch import TorchDispatchMode

# Of an image, not of a batch: its logits must not depend on the company it is in.
_ENOUGH_PIXELS = 64 * 64


def use_fast_layers(network: nn.Module) -> None:
    """Change the layers of a network in place, and its weights to channels_last.

    Its results change by rounding only.
    """
    for module in network.modules():
        if type(module) is Swish:
            module.__class__ = FastSwish
        elif type(module) is SqueezeExcite:
            module.__class__ = FastSqueezeExcite
        elif type(module) is nn.Conv2d and _is_slow_depthwise(module):
            module.__class__ = FastDepthwise
        elif type(module) is UnetDecoderBlock and _is_nearest(module):
            module.__class__ = FastUnetBlock
    use_safe_layers(network)
    network.to(memory_format=torch.channels_last)


def use_safe_layers(network: nn.Module) -> None:
    """Change those layers in place whose training would write outside of its memory."""
    for module in network.modules():
        if type(module) is nn.Conv2d and _corrupts_memory(module):
            module.__class__ = SubsampledPointwise


def _is_plain(module: nn.Module) -> bool:
    """Whether nobody has attached anything to a layer that only its own call would do."""
    hooks = (
        *(module._forward_hooks, module._forward_pre_hooks),
        *(module._backward_hooks, module._backward_pre_hooks),
    )
    return not (any(hooks) or "forward" in vars(module) or is_parametrized(module))


def _is_slow_depthwise(module: nn.Conv2d) -> bool:
    """Those of 3 x 3 without a stride have bf16 kernels as good as the fp32 ones."""
    return (
        module.groups == module.in_channels == module.out_channels > 1
        and (max(module.kernel_size) > 3 or max(module.stride) > 1)
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
    )


def _corrupts_memory(module: nn.Conv2d) -> bool:
    """Those whose weight gradient in channels_last writes outside of its memory on a CPU.

    Found with glibc's checked malloc (torch 2.15, AVX-512): 1 x 1 with a stride on 2 to 15
    channels, in fp32 and bf16. The stem of MobileOne is one; runs crashed later, or went on.
    """
    return (
        module.kernel_size == (1, 1)
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
    # What `is_exporting` returns; of itself torch.compile says in 2.10 that it were an export.
    return bool(torch.compiler._is_exporting_flag or torch.jit.is_tracing())  # type: ignore[attr-defined]


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
            rounded_bias = None if bias is None else bias.to(torch.bfloat16)
            return F.conv2d(pixels, rounded, rounded_bias, *settings)

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
            or not (_is_nearest(self) and all(map(_is_plain, (convolution, *passed))))
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
        exact = weight[:, :channels].to(torch.promote_types(weight.dtype, torch.float32))
        sums = exact.new_tensor([[0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]])
        kernel = torch.einsum("ak,oikl,bl->ioab", sums, exact, sums).to(weight.dtype)
    result = F.conv_transpose2d(features, kernel, bias, stride=2, padding=1)
    if skip is None or skip.shape[1] == 0:  # an encoder that starts at a quarter of the size
        return result
    return result + F.conv2d(skip, weight[:, channels:], padding=1)


_ROUNDING = 1e-3  # beside the largest logit: far above rounding, far below a wrong scale
_CONVOLUTIONS = (nn.Conv2d, Conv2dSame, FastDepthwise, SubsampledPointwise)
_NORMS = (nn.BatchNorm2d, BatchNormAct2d)
# Under autocast these would cast their weights at each call; nothing else is cast beforehand, so
# that every other operation runs in the precision that autocast chooses for it.
_CAST = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)


def folded(network: nn.Module, dtype: torch.dtype, image: Tensor) -> nn.Module:
    """Copy a network for inference: BatchNorms folded, weights cast once, channels last.

    Only networks with an smp encoder are searched for BatchNorms. Weights of convolutions and
    linear layers are kept in `dtype` for calls under autocast of that type.

    Args:
        network: in eval mode; is not changed.
        dtype: of the calls; float32 and float64 leave the weights as they are.
        image: (1, 3, H, W) as the network gets it, with which it is run to see what is called
            in which order, and whether the copy answers alike.

    Returns:
        The copy. Its logits are those of `network` but for rounding.

    Raises:
        ValueError: if they are not.
    """
    copied = copy.deepcopy(network)
    if hasattr(copied, "encoder"):
        names = {module: name for name, module in copied.named_modules()}
        pairs = _pairs(copied, image)
        for convolution, norm in pairs:
            copied.set_submodule(names[convolution], fuse_conv_bn_eval(convolution, norm))
            copied.set_submodule(names[norm], _rest_of(norm))
        if pairs:
            _check_alike(network, copied, image)
    if dtype in (torch.bfloat16, torch.float16):
        for module in copied.modules():
            if isinstance(module, _CAST):
                module.to(dtype)
    use_fast_layers(copied)
    return copied.requires_grad_(False)


@torch.no_grad()
def _check_alike(network: nn.Module, copied: nn.Module, image: Tensor) -> None:
    """Refuse a copy of a network that does more with its layers than to call them."""
    with torch.autocast(image.device.type, enabled=False):
        expected = logits_of(network(image)).float()
        if not torch.isfinite(expected).all():
            return  # the loss terms find that, and name it
        try:
            off = float((logits_of(copied(image)).float() - expected).abs().max())
            reason = f"logits that differ by {off:.2g}"
        except Exception as error:  # whatever its code finds missing in the copy
            off, reason = math.inf, f"{type(error).__name__}: {error}"
    if not off <= _ROUNDING * (1 + float(expected.abs().max())):
        raise ValueError(
            "Expected a teacher that answers alike with its BatchNorms folded into its "
            f"convolutions, got {reason}. Use --fold_teacher false."
        )


def _is_norm(module: nn.Module) -> bool:
    return type(module) in _NORMS and module.running_mean is not None and _is_plain(module)


def _is_convolution(module: nn.Module) -> bool:
    """Whether it does nothing with its weights but convolve."""
    return type(module) in _CONVOLUTIONS and _is_plain(module)


def _rest_of(norm: nn.Module) -> nn.Module:
    """What timm's BatchNormAct2d does behind the normalisation, else nothing."""
    layers = [getattr(norm, name, None) for name in ("drop", "act")]
    return nn.Sequential(*(layer for layer in layers if isinstance(layer, nn.Module)))


class _Uses(TorchDispatchMode):
    """Counts the operations that read each of the tensors in `watched`."""

    def __init__(self) -> None:
        super().__init__()
        self.watched: dict[int, Tensor] = {}  # kept, so that no later tensor gets the same id
        self.uses: Counter[int] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run the operation, and count what it was given."""
        del types
        for value in torch.utils._pytree.tree_leaves((args, kwargs)):
            if id(value) in self.watched:
                self.uses[id(value)] += 1
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def _pairs(network: nn.Module, image: Tensor) -> list[tuple[nn.Conv2d, nn.BatchNorm2d]]:
    """Convolutions whose result goes into one BatchNorm and nowhere else.

    Found by running the network once: the names of layers do not say in which order they are
    called. A layer that is called twice is left alone.
    """
    uses = _Uses()
    made_by: dict[int, nn.Conv2d] = {}
    calls: Counter[nn.Module] = Counter()
    pairs: list[tuple[nn.Conv2d, nn.BatchNorm2d, int]] = []

    def after(module: nn.Module, inputs: Any, output: Any) -> None:
        calls[module] += 1
        if isinstance(module, nn.Conv2d):
            uses.watched[id(output)] = output
            made_by[id(output)] = module
        elif id(inputs[0]) in made_by:
            pairs.append((made_by[id(inputs[0])], cast(nn.BatchNorm2d, module), id(inputs[0])))

    layers = [m for m in network.modules() if _is_convolution(m) or _is_norm(m)]
    hooks = [module.register_forward_hook(after) for module in layers]
    try:
        with uses, torch.autocast(image.device.type, enabled=False):
            network(image)
    finally:
        for hook in hooks:
            hook.remove()
    return [
        (convolution, norm)
        for convolution, norm, result in pairs
        if calls[convolution] == calls[norm] == uses.uses[result] == 1
    ]


# Parameters of mallopt(3), and what a process that never called it ends up with once it has freed
# a block of 32 MiB: glibc moves its thresholds up to there by itself, and stops to when it is told.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -2, -3, -4
_NEVER = -1
_KEEP = {_MMAP_MAX: 0, _TRIM_THRESHOLD: _NEVER, _TOP_PAD: 64 * 2**20}
_USUAL = {
    _MMAP_MAX: 2**16,
    _MMAP_THRESHOLD: 32 * 2**20,
    _TRIM_THRESHOLD: 64 * 2**20,
    _TOP_PAD: 128 * 2**10,
}


def keep_freed_memory() -> bool:
    """Let this process keep what it frees, for its own next allocation.

    Returns:
        Whether glibc accepted it; False without glibc, where nothing changes.
    """
    return _set(_KEEP)


def usual_memory() -> bool:
    """Undo `keep_freed_memory`, and give back what is free: for those who measure both.

    Returns:
        As `keep_freed_memory`.
    """
    return _set(_USUAL) and give_back()


def give_back() -> bool:
    """Give the system what is free now, whatever is kept later: for those who measure memory.

    Returns:
        As `keep_freed_memory`.
    """
    glibc = _glibc()
    if glibc is not None:
        glibc.malloc_trim(0)
    return glibc is not None


def _set(parameters: dict[int, int]) -> bool:
    glibc = _glibc()
    if glibc is None:
        return False
    return all(glibc.mallopt(number, value) == 1 for number, value in parameters.items())


def _glibc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None


def allow_recompiles(units: int) -> None:
    """Let a network be compiled for each unit that is freed, in both modes, and for a last batch.

    torch gives up at its own limit of 8 and goes on without, which nobody would notice. What an
    earlier run of this process compiled would count too, and is dropped.

    Args:
        units: encoder units that may be freed one after another.
    """
    import torch._dynamo.config as config  # takes seconds: only for those who compile

    torch.compiler.reset()
    settings: Any = config
    settings.recompile_limit = max(settings.recompile_limit, 4 * (units + 2))


def reset_accelerate_prepare(model: nn.Module) -> None:
    """Take off what accelerate put on a model for another Trainer of this process.

    It prepares a model once and passes it on after that: a second Trainer with another
    mixed_precision would train in that of the first, and one with torch_compile uncompiled, both
    without a word. The other Trainer must not be used any more.
    """
    vars(model).pop("_is_accelerate_prepared", None)
    forward = vars(model).pop("_original_forward", None)
    if forward is not None:
        model.forward = forward


def compiled_graphs() -> int:
    """Graphs that torch.compile has made in this process so far; each one takes a while."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def logits_of(output: Any) -> Tensor:
    """The raw logits in what a network returns: a tensor, or an output that names them.

    Of a universal segmentation model those of its masks.
    """
    if isinstance(output, Tensor):
        return output
    masks: Tensor | None = getattr(output, "masks_queries_logits", None)
    if masks is not None:
        return masks
    raw = getattr(output, "raw_logits", None)
    return output.logits if raw is None else raw
