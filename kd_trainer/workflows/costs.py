"""What a network costs: parameters, multiplications, bytes and milliseconds."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.onnx import OnnxExporterError
from torch.utils.flop_counter import FlopCounterMode

from kd_trainer.arguments.loading import usable_processors
from kd_trainer.workflows.latency import Call, Latency, interleaved
from kd_trainer.workflows.models import network_size

PICTURES = 10  # measured calls of each network at the end of a training
_ONNX_PACKAGES = ("onnxruntime", "onnx", "onnxscript")


class RawLogits(nn.Module):
    """A network as one tensor in, one tensor out.

    Args:
        network: gives a tensor, or an output with `raw_logits` or `logits`.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Raw logits (B, K, H, W) of normalised floats (B, 3, H, W)."""
        output = self.network(pixel_values)
        if isinstance(output, Tensor):
            return output
        raw: Tensor | None = getattr(output, "raw_logits", None)
        return output.logits if raw is None else raw


@torch.no_grad()
def macs(network: nn.Module, side: int) -> int:
    """Multiply-accumulate operations of one picture of `side` x `side`.

    Convolutions, matrix products and attention are counted, two floating-point operations each, as
    torch counts them; normalisation, activations and resizing are not.
    """
    device = next(network.parameters()).device
    was_training = network.training
    network.eval()
    with FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, 3, side, side, device=device))
    network.train(was_training)
    return counter.get_total_flops() // 2


def file_mib(source: str | Path) -> float | None:
    """Size of a weight file, or of the weight files in a folder; None if there are none here."""
    path = Path(source)
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    return sum(f.stat().st_size for f in files) / 2**20 if files else None


def costs(
    networks: Mapping[str, nn.Module], sides: Mapping[str, int], repeats: int
) -> dict[str, dict[str, Any]]:
    """Costs of each network, on the CPU, for one picture.

    Args:
        networks: by name; they are put into eval mode and on the CPU.
        sides: pixels of the square input of each.
        repeats: measured calls for each latency; 0 measures none.

    Returns:
        For each name `parameters`, `never_used`, `macs`, `side` and `latency`, a list of
        measurements (empty where nothing was measured).
    """
    plain = {name: RawLogits(net).cpu().eval() for name, net in networks.items()}
    found: dict[str, dict[str, Any]] = {}
    for name, network in networks.items():
        used, never_used = network_size(network)
        found[name] = {
            "parameters": used,
            "never_used": never_used,
            "macs": macs(plain[name], sides[name]),
            "side": sides[name],
            "latency": [],
        }
    if repeats > 0:
        pixels = {name: picture(sides[name]) for name in networks}
        models = {name: onnx_bytes(net, sides[name]) for name, net in plain.items()}
        for threads in sorted({1, usable_processors()}):
            calls: dict[str, Call] = {n: partial(net, pixels[n]) for n, net in plain.items()}
            _add(found, "torch", interleaved(calls, [], repeats, threads))
            sessions = {n: onnx_call(m, pixels[n], threads) for n, m in models.items() if m}
            _add(found, "onnxruntime", interleaved(sessions, [], repeats, threads))
    return found


def picture_milliseconds(
    networks: Mapping[str, nn.Module], sides: Mapping[str, int]
) -> dict[str, float | int]:
    """Median time of one picture in torch, each network on its own device, in turn.

    Args:
        networks: by name.
        sides: pixels of the square input of each.

    Returns:
        `NAME_ms` of each, and `latency_threads`, those of the CPU that torch might use.
    """
    calls: dict[str, Call] = {}
    for name, network in networks.items():
        weight = next(network.parameters())
        pixels = picture(sides[name]).to(weight.device, weight.dtype)
        calls[name] = partial(RawLogits(network).eval(), pixels)
    threads = torch.get_num_threads()
    found = interleaved(calls, [], PICTURES, threads)
    return {f"{n}_ms": one.median for n, one in found.items()} | {"latency_threads": threads}


def picture(side: int) -> Tensor:
    """A normalised picture (1, 3, side, side) of noise, always the same."""
    return torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))


def _add(found: dict[str, dict[str, Any]], engine: str, measured: dict[str, Latency]) -> None:
    for name, one in measured.items():
        found[name]["latency"].append({"engine": engine, **vars(one)})


def onnx_bytes(network: nn.Module, side: int) -> bytes | None:
    """A network as an ONNX model of a fixed size; None if it cannot be one.

    Either the packages for it are not installed, or the exporter does not know an operation.
    """
    if not all(find_spec(name) for name in _ONNX_PACKAGES):
        return None
    example = torch.zeros(1, 3, side, side)
    # What exporters warn about is no business of somebody who only wants to know the time.
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = Path(folder) / "network.onnx"
        try:
            torch.onnx.export(
                network, (example,), path, dynamo=True, external_data=False, verbose=False
            )
        except OnnxExporterError:
            return None
        return path.read_bytes()


def onnx_call(model: bytes, pixels: Tensor, threads: int) -> Call:
    """A call of ONNX Runtime on the CPU with these pixels; gives the logits."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = onnxruntime.InferenceSession(model, options, ["CPUExecutionProvider"])
    inputs = {session.get_inputs()[0].name: pixels.numpy()}
    return lambda: session.run(None, inputs)[0]
