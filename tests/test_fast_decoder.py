"""The decoder's convolution of an enlarged map without the map: the same, and really without it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import SIDE, tiny_student
from torch import Tensor, nn

from kd_trainer import fast_layers
from kd_trainer.fast_layers import FastUnetBlock, enlarged_convolution, use_fast_layers


@pytest.fixture
def enlarged(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the maps that are enlarged."""
    seen: list[tuple[int, ...]] = []
    original = F.interpolate

    def interpolate(pixels: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen.append(tuple(pixels.shape))
        return original(pixels, *args, **kwargs)

    monkeypatch.setattr(F, "interpolate", interpolate)
    return seen


@pytest.mark.parametrize("skip_channels", [0, 3])
@pytest.mark.parametrize("with_bias", [False, True])
def test_values_and_gradients_are_those_of_the_enlarged_map(skip_channels: int, with_bias: bool):
    """Borders included, for maps that are not square."""
    draw = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        values = torch.randn(shape, generator=draw, dtype=torch.float64)
        return values.requires_grad_()

    features, weight = drawn(2, 5, 4, 7), drawn(6, 5 + skip_channels, 3, 3)
    skip = drawn(2, skip_channels, 8, 14) if skip_channels else None
    bias = drawn(6) if with_bias else None
    merged = F.interpolate(features, scale_factor=2, mode="nearest")
    merged = merged if skip is None else torch.cat([merged, skip], 1)
    expected = F.conv2d(merged, weight, bias, padding=1)
    got = enlarged_convolution(features, skip, weight, bias)
    assert torch.allclose(got, expected, rtol=0, atol=1e-12)
    inputs = [x for x in (features, skip, weight, bias) if x is not None]
    slope = torch.randn(expected.shape, generator=draw, dtype=torch.float64)
    for ours, right in zip(
        torch.autograd.grad(got, inputs, slope),
        torch.autograd.grad(expected, inputs, slope),
        strict=True,
    ):
        assert torch.allclose(ours, right, rtol=0, atol=1e-11)


def test_a_skip_without_channels_adds_nothing():
    """Mix transformers and ConvNeXt have no map of half the size: smp passes one of no channels."""
    features, weight = torch.randn(1, 4, 5, 6), torch.randn(3, 4, 3, 3)
    empty = torch.empty(1, 0, 10, 12)
    alone = enlarged_convolution(features, None, weight, None)
    assert torch.equal(enlarged_convolution(features, empty, weight, None), alone)


def test_weights_are_added_before_they_are_rounded():
    """In bf16, 1 + 2**-9 is 1: four of them must be added in fp32, and rounded once."""
    weight = torch.full((1, 1, 3, 3), 1.0)
    weight[..., 1:, 1:] += 2**-9
    pixels = torch.ones(1, 1, 2, 2)
    with torch.autocast("cpu", torch.bfloat16):
        got = enlarged_convolution(pixels, None, weight, None)
    exact = F.conv2d(F.interpolate(pixels, scale_factor=2), weight, padding=1)
    assert torch.equal(got, exact.bfloat16())


def test_only_large_maps_and_eager_calls_go_without_the_enlarged_map(
    enlarged: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
):
    """Exports keep the operations that other programs know, small maps the cheaper way."""
    network = tiny_student("resnet18").eval()
    pixels = torch.randn(1, 3, SIDE, SIDE)
    enlarged.clear()  # a network is tried when it is made
    stock = network(pixels).raw_logits
    blocks = len(enlarged)
    assert blocks == 3
    use_fast_layers(network)
    network(pixels)
    assert len(enlarged) == 2 * blocks  # all maps are small
    monkeypatch.setattr(fast_layers, "_ENOUGH_PIXELS", 0)
    quick = network(pixels).raw_logits
    assert len(enlarged) == 2 * blocks
    assert torch.allclose(quick, stock, rtol=1e-4, atol=1e-5)
    exported = torch.export.export(network, (pixels,)).graph
    kinds = [str(node.target) for node in exported.nodes]
    assert sum("upsample_nearest2d" in kind for kind in kinds) == blocks


@pytest.mark.parametrize("place", ["conv1", "conv1.0", "attention1", "attention1.attention"])
@pytest.mark.parametrize("kind", ["forward_hook", "full_backward_hook"])
def test_what_is_attached_to_a_layer_is_called(
    place: str, kind: str, enlarged: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
):
    """The quick way would never call it."""
    monkeypatch.setattr(fast_layers, "_ENOUGH_PIXELS", 0)
    network = tiny_student("resnet18").eval()
    use_fast_layers(network)
    block = next(m for m in network.modules() if isinstance(m, FastUnetBlock))
    calls: list[nn.Module] = []
    layer = block.get_submodule(place)
    getattr(layer, f"register_{kind}")(lambda module, *_: calls.append(module))
    enlarged.clear()
    network(torch.randn(1, 3, SIDE, SIDE)).raw_logits.sum().backward()
    assert calls == [layer]
    assert len(enlarged) == 1


def test_an_exchanged_layer_and_another_enlargement_are_left_alone(
    enlarged: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
):
    """As an adapter does it: what stands in the convolution's place does more than convolve."""
    monkeypatch.setattr(fast_layers, "_ENOUGH_PIXELS", 0)
    network = tiny_student("resnet18").eval()
    use_fast_layers(network)
    block = next(m for m in network.modules() if isinstance(m, FastUnetBlock))
    block.conv1[0] = nn.Sequential(block.conv1[0], nn.Identity())
    enlarged.clear()
    network(torch.randn(1, 3, SIDE, SIDE))
    assert len(enlarged) == 1
    smooth = tiny_student("resnet18")
    for module in smooth.modules():
        if hasattr(module, "interpolation_mode"):
            module.interpolation_mode = "bilinear"
    use_fast_layers(smooth)
    assert not any(isinstance(module, FastUnetBlock) for module in smooth.modules())
