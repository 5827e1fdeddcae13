"""Training steps of several contenders in turn: `benchmark.py train`."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from benchmarks.arguments import TrainArguments
from benchmarks.contenders import (
    Contender,
    Turn,
    make_contender,
    make_networks,
    units_of,
)
from benchmarks.machine import machine
from benchmarks.memory import measure_memory
from benchmarks.pictures import pair_folder
from kd_trainer.console import markdown_table
from kd_trainer.files import replacing_file, write_json, write_text

TITLES = {
    "plain": "plain loop",
    "student": "student alone",
    "ours": "ours",
    "cached": "ours, cached targets",
}
RATIOS = (
    *(("plain", "ours"), ("ours", "student"), ("plain", "cached"), ("cached", "student")),
    ("plain", "student"),
)
PARTS = (
    "data",
    "teacher",
    "student forward",
    "student backward",
    "loss",
    "optimizer",
    "log",
    "other",
)


def run_steps(args: TrainArguments) -> dict[str, Any]:
    """Measure, print, write; returns what `--json` holds."""
    networks = make_networks(args)
    work = {**vars(args), "units": units_of(args, networks)}
    with pair_folder(args) as folder, TemporaryDirectory() as cache:
        contenders = {
            name: make_contender(name, args, folder, networks, cache=Path(cache))
            for name in args.contenders
        }
        turns = take_turns(contenders, args.steps, args.pairs)
        result = {"what": "train", "machine": machine(args.torch_device), "work": work}
        result |= summary(turns)
        if args.memory:
            result["memory"] = {n: measure_memory(n, args, folder) for n in args.contenders}
        if args.profile is not None and "ours" in contenders:
            save_trace(contenders["ours"], Path(args.profile))
    print(text_of(result))
    if args.json is not None:
        write_json(Path(args.json), result)
    return result


def take_turns(contenders: dict[str, Contender], steps: int, pairs: int) -> dict[str, list[Turn]]:
    """A B A B, so that all meet the same busy machine; every second round in reverse."""
    turns: dict[str, list[Turn]] = {name: [] for name in contenders}
    order = list(contenders.items())
    for contender in contenders.values():
        contender(1)  # allocations and kernels that are made once
    for index in tqdm(range(pairs), desc="measuring", unit="pair", disable=None):
        for name, contender in order if index % 2 == 0 else reversed(order):
            turns[name].append(contender(steps))
    return turns


def summary(turns: dict[str, list[Turn]]) -> dict[str, Any]:
    """Medians, ratios within each round, and the share of each part of a step."""
    rounds = {
        name: {
            "seconds": [turn.seconds for turn in own],
            "cpu_seconds": [turn.cpu_seconds for turn in own],
        }
        for name, own in turns.items()
    }
    medians = {name: {k: median(v) for k, v in own.items()} for name, own in rounds.items()}
    ratios = {}
    for above, below in RATIOS:
        if above in turns and below in turns:
            ratios[f"{above} / {below}"] = {
                key: median(
                    a / b for a, b in zip(rounds[above][key], rounds[below][key], strict=True)
                )
                for key in ("seconds", "cpu_seconds")
            }
    breakdown = {name: _parts(own) for name, own in turns.items()}
    found: dict[str, Any] = {"rounds": rounds, "median": medians, "ratios": ratios}
    return found | {"breakdown": breakdown, "bottleneck": bottleneck(breakdown)}


def _parts(turns: list[Turn]) -> dict[str, float]:
    """Median seconds a step of each part."""
    names = {name for turn in turns for name in turn.parts}
    return {n: median(t.parts.get(n, 0.0) for t in turns) for n in PARTS if n in names}


def bottleneck(breakdown: dict[str, dict[str, float]]) -> str | None:
    """What costs ours most beyond the student alone; None without the two."""
    if not {"ours", "student"} <= breakdown.keys():
        return None
    ours, limit = breakdown["ours"], breakdown["student"]
    excess = {name: value - limit.get(name, 0.0) for name, value in ours.items()}
    largest = max(ours, key=lambda n: ours[n])
    beyond = max(excess, key=lambda n: excess[n])
    total = sum(ours.values())
    return (
        f"Next bottleneck: beyond the student alone the most goes into {beyond} "
        f"({1000 * excess[beyond]:.1f} ms a step); of the whole step {largest} is the largest part "
        f"({ours[largest] / total:.0%})."
    )


def save_trace(contender: Contender, folder: Path) -> None:
    """Write a trace of two steps for chrome://tracing or Perfetto, and the dearest operations."""
    folder.mkdir(parents=True, exist_ok=True)
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities, profile_memory=False) as profiler:
        contender(1)
    with replacing_file(folder / "ours.json") as partial:
        profiler.export_chrome_trace(str(partial))
    table = profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=40)
    write_text(folder / "operations.txt", table)
    print(f"Trace: {folder / 'ours.json'}; dearest operations: {folder / 'operations.txt'}")


def text_of(result: dict[str, Any]) -> str:
    """Tables of a measurement for the terminal."""
    work = result["work"]
    lines = [
        f"\n{work['image_size']} px, batch {work['batch_size']}, {work['units']}, "
        f"{work['mixed_precision']} (plain loop: fp32), {result['machine']['about']}",
        "",
        _step_table(result),
        "",
        "Ratios, medians over rounds (of processor seconds in brackets):",
    ]
    for name, ratio in result["ratios"].items():
        lines.append(f"  {name}: {ratio['seconds']:.2f} ({ratio['cpu_seconds']:.2f})")
    header = ["ms a step", *PARTS]
    rows = [
        [TITLES[name], *(f"{1000 * own.get(part, 0.0):.0f}" for part in PARTS)]
        for name, own in result["breakdown"].items()
    ]
    lines += ["", markdown_table(header, rows)]
    if result["bottleneck"]:
        lines += ["", result["bottleneck"]]
    return "\n".join(lines)


def _step_table(result: dict[str, Any]) -> str:
    batch, memory = result["work"]["batch_size"], result.get("memory", {})
    rows = []
    for name, own in result["median"].items():
        mib = memory.get(name, {}).get("training_mib")
        rows.append(
            [
                TITLES[name],
                f"{own['seconds']:.3f}",
                f"{own['cpu_seconds']:.3f}",
                f"{batch / own['seconds']:.2f}",
                "" if mib is None else f"{mib:.0f}",
            ]
        )
    return markdown_table(["", "s a step", "CPU s", "images/s", "memory MiB"], rows)
