"""What a network costs: parameters, multiplications, bytes and milliseconds."""

from __future__ import annotations

import gc
import math
import resource
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.onnx import OnnxExporterError
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from kd_trainer.arguments import DistillationArguments, usable_processors
from kd_trainer.fast_layers import give_back, logits_of
from kd_trainer.loading import network_size
from kd_trainer.losses import SCHEDULED, TEACHER_TERMS
from kd_trainer.models.image_sizes import AnySize, as_size, plain_size
from kd_trainer.schedules import read_weight_schedules, weight_schedule_words
from kd_trainer.students import channels_seen

FINAL_CALLS = 10  # measured calls of each network at the end of a training
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
        return logits_of(self.network(pixel_values))


@torch.no_grad()
def macs(network: nn.Module, size: AnySize) -> int:
    """Multiply-accumulate operations of one image of this size.

    Convolutions, matrix products and attention are counted, two floating-point operations each, as
    torch counts them; normalisation, activations and resizing are not.
    """
    device = next(network.parameters()).device
    was_training = network.training
    network.eval()
    with FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, channels_seen(network), *as_size(size), device=device))
    network.train(was_training)
    return counter.get_total_flops() // 2


def file_mib(*sources: str | Path) -> float | None:
    """Size of weight files, or of those in folders, together; None if one has none here."""
    found = [weight_files(source) for source in sources]
    return sum(f.stat().st_size for files in found for f in files) / 2**20 if all(found) else None


def weight_files(source: str | Path) -> list[Path]:
    """A weight file, or those in a folder."""
    path = Path(source)
    return [path] if path.is_file() else sorted(path.glob("*.safetensors"))


def costs(
    networks: Mapping[str, nn.Module], sizes: Mapping[str, AnySize], repeats: int
) -> dict[str, dict[str, Any]]:
    """Costs of each network, on the CPU, for one image.

    Args:
        networks: by name; they are put into eval mode and on the CPU.
        sizes: of the input of each, in pixels.
        repeats: measured calls for each latency; 0 measures none.

    Returns:
        For each name `parameters`, `never_used`, `macs`, `side` (its size as files hold it) and
        `latency`, a list of
        measurements (empty where nothing was measured).
    """
    plain = {name: RawLogits(net).cpu().eval() for name, net in networks.items()}
    rows: dict[str, dict[str, Any]] = {}
    for name, network in networks.items():
        used, never_used = network_size(network)
        rows[name] = {
            "parameters": used,
            "never_used": never_used,
            "macs": macs(plain[name], sizes[name]),
            "side": plain_size(sizes[name]),
            "latency": [],
        }
    if repeats == 0:
        return rows
    pixels = {name: noise_image(sizes[name], channels_seen(n)) for name, n in networks.items()}
    models = {name: onnx_bytes(net, sizes[name]) for name, net in plain.items()}
    for threads in sorted({1, usable_processors()}):
        engines: dict[str, dict[str, Call]] = {
            "torch": {n: partial(net, pixels[n]) for n, net in plain.items()},
            "onnxruntime": {n: onnx_call(m, pixels[n], threads) for n, m in models.items() if m},
        }
        for engine, calls in engines.items():
            for name, measured in interleaved(calls, repeats, threads).items():
                rows[name]["latency"].append({"engine": engine, **vars(measured)})
    return rows


def image_milliseconds(
    networks: Mapping[str, nn.Module], sizes: Mapping[str, AnySize]
) -> dict[str, float | int]:
    """Median time of one image in torch, each network on its own device, in turn.

    Args:
        networks: by name.
        sizes: of the input of each, in pixels.

    Returns:
        `NAME_ms` of each, and `latency_threads`, those of the CPU that torch might use.
    """
    calls: dict[str, Call] = {}
    for name, network in networks.items():
        weight = next(network.parameters())
        pixels = noise_image(sizes[name], channels_seen(network))
        pixels = pixels.to(weight.device, weight.dtype)
        calls[name] = partial(RawLogits(network).eval(), pixels)
    threads = torch.get_num_threads()
    measured = interleaved(calls, FINAL_CALLS, threads)
    return {f"{n}_ms": one.median for n, one in measured.items()} | {"latency_threads": threads}


def noise_image(size: AnySize, channels: int = 3) -> Tensor:
    """A normalised image (1, channels, H, W) of noise, always the same."""
    return torch.randn(1, channels, *as_size(size), generator=torch.Generator().manual_seed(0))


def onnx_bytes(network: nn.Module, size: AnySize) -> bytes | None:
    """A network as an ONNX model of a fixed size; None if it cannot be one.

    Either the packages for it are not installed, or the exporter does not know an operation.
    """
    if not all(find_spec(name) for name in _ONNX_PACKAGES):
        return None
    example = torch.zeros(1, channels_seen(network), *as_size(size))
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


Call = Callable[[], Any]


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one call: median, 95th percentile, and of how many calls on what."""

    median: float
    percentile_95: float
    repeats: int
    threads: int


def interleaved(
    calls: Mapping[str, Call],
    repeats: int,
    threads: int,
    *,
    warm_up: int = 2,
    progress: bool = True,
) -> dict[str, Latency]:
    """Time several calls, A B A B.

    One after the other, a network that meets a busy or a hot machine would look slow; in turn, they
    share it. The order is turned round at every second pass, so that none always comes first.

    Args:
        calls: by name.
        repeats: measured calls of each, at least 1.
        threads: threads of torch during the calls. Other libraries have their own setting.
        warm_up: calls of each before those that are measured.
        progress: draw a bar where there is a terminal.

    Raises:
        ValueError: if repeats or threads are below 1.
    """
    for name, value in (("repeats", repeats), ("threads", threads)):
        if value < 1:
            raise ValueError(f"Expected {name} of at least 1, got {value}.")
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls.items())
    with torch_threads(threads), torch.inference_mode():
        indices = range(-warm_up, repeats)
        for index in tqdm(indices, desc="latency", unit="pass", disable=None if progress else True):
            for name, call in order if index % 2 else reversed(order):
                elapsed = _timed(call)
                if index >= 0:
                    seconds[name].append(elapsed)
    quantiles = {name: np.percentile(values, [50, 95]) * 1000 for name, values in seconds.items()}
    return {
        name: Latency(float(median), float(high), repeats, threads)
        for name, (median, high) in quantiles.items()
    }


def _timed(call: Call) -> float:
    start = time.perf_counter()
    call()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()  # a call on a GPU only queues its work
    return time.perf_counter() - start


@contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """Let torch compute on so many threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def peak_memory_mib() -> float:
    """Most memory used so far: of the GPU if there is one, else resident memory of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def reset_peak_memory() -> bool:
    """Let the peak memory be counted anew; False where a process cannot do that."""
    gc.collect()
    give_back()  # else what an earlier run has freed would count for the next one
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: resets the high-water mark
    except OSError:
        return False
    return True


def total_steps(args: DistillationArguments, per_epoch: int) -> int:
    """Optimizer steps of a run, as the Trainer counts them."""
    return args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * per_epoch)


def steps_per_epoch(images: int, args: DistillationArguments) -> int:
    """Optimizer steps in one epoch of this many images, as the Trainer counts them."""
    share = images / (args.train_batch_size * args.world_size)
    batches = math.floor(share) if args.dataloader_drop_last else math.ceil(share)
    return max(1, math.ceil(batches / args.gradient_accumulation_steps))


def length_in_epochs(args: DistillationArguments, per_epoch: int) -> float:
    """Epochs of a run with so many steps in one."""
    return args.max_steps / per_epoch if args.max_steps > 0 else args.num_train_epochs


def duration(seconds: float) -> str:
    """A time as people say it: `40 s`, `12 min`, `3 h 05 min`."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


def without_teacher(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings without what only a teacher can use."""
    of_the_teacher = (
        *("teacher_targets", "teacher_cache", "teacher_cache_size", "teacher_maps"),
        *("adaptive_weight", "pseudo_labels", "pseudo_confidence"),
    )
    kept = {name: value for name, value in settings.items() if name not in of_the_teacher}
    if kept.get("unlabelled") is not None:
        kept["labelled_share"] = None  # of what is left all has masks
    schedules = read_weight_schedules(kept.get("weight_schedule"), SCHEDULED)
    taught = {*TEACHER_TERMS, "pseudo"}
    of_labels = {name: s for name, s in schedules.items() if name not in taught}
    if schedules:
        kept["weight_schedule"] = weight_schedule_words(of_labels) or None
    return kept | {"teacher": "none", "unlabelled": None, "pseudo_weight": 0.0}
