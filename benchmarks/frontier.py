"""What several trained models cost and what they reach: scripts/frontier.py.

Latencies are those of one image on one thread of the CPU, all networks and engines by turns in one
process. Absolute times belong to the machine; the speed relative to the first model, a median over
rounds in which both were measured side by side, hardly does.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.memory import added_mib, in_new_process
from benchmarks.timer import figures_table, ratios, take_turns, timed
from kd_trainer.costs import (
    RawLogits,
    file_mib,
    macs,
    noise_image,
    onnx_bytes,
    onnx_call,
    torch_threads,
)
from kd_trainer.export.exporter import FILES, RESULTS
from kd_trainer.export.onnx_file import require_all
from kd_trainer.fields import check_at_least, check_folder, help_field
from kd_trainer.files import write_json, write_text
from kd_trainer.loading import load_student, network_size
from kd_trainer.models.modeling import check_image_size
from kd_trainer.parsing import Parser
from kd_trainer.reports.charts import Point, line_chart
from kd_trainer.run_folder import EXPORTS_SHAPE, RESULTS_SHAPE, read_object

TORCH, ONNX, INT8 = "torch fp32", "onnxruntime fp32", "onnxruntime int8"
ENGINES = (TORCH, ONNX, INT8)
WORK = ("inference", "training")


@dataclass
class FrontierArguments:
    """Settings of scripts/frontier.py."""

    image_size: int = help_field(640, "Side of the image that is timed, in pixels.")
    repeats: int = help_field(20, "Measured calls of each model on each engine.")
    memory: int = help_field(0, "Processes for the peak memory of each model; 0 measures none.")
    output_dir: str = help_field("runs/frontier", "Gets frontier.json, .md and .svg.")

    def __post_init__(self) -> None:
        check_at_least("image_size", self.image_size, 32)
        check_at_least("repeats", self.repeats, 1)
        check_at_least("memory", self.memory, 0)
        check_folder("output_dir", self.output_dir)
        require_all()


def frontier_main(arguments: Sequence[str] | None = None) -> None:
    """Measure trained models side by side; print the table, write all files."""
    parser = Parser(
        [FrontierArguments],
        "frontier.py",
        "Latency (torch, ONNX Runtime, int8), size, memory and mIoU of trained models, side by "
        "side on the CPU. The first model is what the others are compared with.",
        "A run's folder brings its mIoU (results.json) and what `export.py RUN --output RUN` left "
        "there: the int8 file, and its mIoU.\n\n"
        "Examples:\n  frontier.py teacher=runs/teacher B0=runs/distilled light=runs/light\n"
        "  frontier.py runs/teacher runs/light --image_size 512 --repeats 50",
    )
    parser.add_argument("models", nargs="+", help="Folders, each as FOLDER or NAME=FOLDER.")
    given = parser.given(arguments)
    models = named_folders(given.pop("models"))
    args = FrontierArguments(**given)
    rows = frontier(models, args)
    folder, table = Path(args.output_dir), frontier_table(rows)
    write_json(folder / "frontier.json", {"models": rows})
    write_text(folder / "frontier.md", table + "\n")
    write_text(folder / "frontier.svg", frontier_chart(rows, title="mIoU and latency") + "\n")
    print(f"\n{table}\nWritten to {folder}/frontier.json, .md and .svg")


def named_folders(words: Sequence[str]) -> dict[str, str]:
    """Folder by name; a folder without a name is called by its last part.

    Raises:
        ValueError: if two have the same name.
    """
    folders: dict[str, str] = {}
    for word in words:
        before, sign, after = word.partition("=")
        named = bool(sign) and "/" not in before
        name, folder = (before, after) if named else (Path(word).name, word)
        if not name or not folder:
            raise ValueError(f"Expected models as FOLDER or NAME=FOLDER, got {word!r}.")
        if name in folders:
            raise ValueError(
                f"Expected models of different names, got {name} twice. Write NAME=FOLDER."
            )
        folders[name] = folder
    return folders


def frontier(models: Mapping[str, str | Path], args: FrontierArguments) -> list[dict[str, Any]]:
    """Measure trained models against the first of them, as a rule the teacher.

    Args:
        models: name -> folder of a run or of a saved model.
        args: the mIoU is that of the training, whatever size is timed.

    Returns:
        A row for each model; what is not known is None. `mib` is that of each file, `latency`
        (milliseconds) and `speed` (how many times as fast as the first model) are by engine,
        `memory` is the most MiB of an inference and of a training step, `miou_share` is of the
        first one's mIoU.

    Raises:
        FileNotFoundError: if a model is missing.
        ValueError: if the size does not fit an encoder, or a model is none of ours.
    """
    side, first = args.image_size, next(iter(models))
    networks = {name: load_student(folder).cpu().float().eval() for name, folder in models.items()}
    variants: dict[tuple[str, str], Callable[[int], float]] = {}
    for name, network in networks.items():
        check_image_size(side, network)
        for engine, call in calls_of(Path(models[name]), network, noise_image(side)).items():
            variants[name, engine] = _timed(call)
    with torch_threads(1), torch.inference_mode():
        taken = take_turns(variants, args.repeats, warm_up=2)
    rows = []
    for name, network in networks.items():
        row = {"name": name, "side": side, **_figures(Path(models[name]), network, side)}
        row |= {"latency": {}, "speed": {}, "memory": {}}
        for engine in ENGINES:
            if (name, engine) in taken:
                row["latency"][engine] = {"median": median(taken[name, engine])}
            if (name, engine) in taken and (first, engine) in taken:
                each = ratios(taken[first, engine], taken[name, engine])
                row["speed"][engine] = median(each)
        for work in WORK if args.memory else ():
            mib = (in_new_process(_mib, models[name], side, work) for _ in range(args.memory))
            row["memory"][work] = median(mib)
        rows.append(row)
        known = row["miou"] is not None and rows[0]["miou"]
        row["miou_share"] = row["miou"] / rows[0]["miou"] if known else None
    return rows


def calls_of(folder: Path, network: Any, pixels: Tensor) -> dict[str, Callable[[], Any]]:
    """What runs a model on these pixels (1, 3, H, W), by engine, on one thread.

    A missing fp32 export is made on the way and not kept; int8 needs images to calibrate on, so
    without a file there is none.
    """
    plain = RawLogits(network)
    calls: dict[str, Callable[[], Any]] = {TORCH: lambda: plain(pixels)}
    for engine, file in ((ONNX, folder / FILES["onnx"]), (INT8, folder / FILES["onnx-int8"])):
        model = file.read_bytes() if file.is_file() else None
        if model is None and engine == ONNX:
            model = onnx_bytes(plain, pixels.shape[-1])
        if model is not None:
            calls[engine] = onnx_call(model, pixels, 1)
    return calls


def _timed(call: Callable[[], Any]) -> Callable[[int], float]:
    return timed(lambda _: call(), time.perf_counter)


def _figures(folder: Path, network: Any, side: int) -> dict[str, Any]:
    """What needs no clock."""
    reached = read_object(folder / "results.json", RESULTS_SHAPE)
    exported = read_object(folder / RESULTS, EXPORTS_SHAPE).get("onnx-int8", {})
    files = {"onnx": folder / FILES["onnx"], "int8": folder / FILES["onnx-int8"]}
    return {
        "parameters": network_size(network)[0],
        "gflop": 2 * macs(RawLogits(network), side) / 1e9,
        "encoder_gflop": 2 * macs(network.encoder, side) / 1e9,
        "epochs": reached.get("epochs"),
        "miou": reached.get("student_miou"),
        "boundary_iou": reached.get("student_boundary_iou"),
        "int8_miou": exported.get("miou"),
        "mib": {name: file_mib(f) if f.is_file() else None for name, f in files.items()},
    }


def _mib(folder: str | Path, side: int, work: str) -> float:
    """MiB that a model and its work on one image in fp32 add to the imported libraries."""
    nn.Conv2d(3, 8, 3)(torch.randn(1, 3, 8, 8)).sum().backward()  # torch loads at its first use

    def use() -> None:
        network = RawLogits(load_student(folder)).float().train(work == "training")
        if work == "inference":
            with torch.inference_mode():
                network(noise_image(side))
            return
        optimizer = torch.optim.AdamW(network.parameters())
        for _ in range(2):  # the second has the optimizer's state and every gradient at once
            logits = network(noise_image(side))
            mask = torch.zeros_like(logits)
            nn.functional.binary_cross_entropy_with_logits(logits, mask).backward()
            optimizer.step()
            optimizer.zero_grad()

    return added_mib(use)


def frontier_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Two Markdown tables: quality, size and work; then milliseconds, speed and memory."""
    quality, costs = {}, {}
    for row in rows:
        quality[row["name"]] = {
            "mIoU": row["miou"],
            "of the first's": row["miou_share"],
            "int8 mIoU": row["int8_miou"],
            "M parameters": row["parameters"] / 1e6,
            "GFLOP": row["gflop"],
            "in the encoder": row["encoder_gflop"],
            "MiB onnx": row["mib"]["onnx"],
            "MiB int8": row["mib"]["int8"],
        }
        costs[row["name"]] = {
            f"{engine} ms (times as fast)": f"{own['median']:.0f} ({row['speed'][engine]:.2f})"
            for engine, own in row["latency"].items()
            if engine in row["speed"]
        } | {f"MiB of {work}": mib for work, mib in row["memory"].items()}
    return f"{figures_table(quality)}\n\n{figures_table(costs)}"


def frontier_chart(rows: Sequence[Mapping[str, Any]], *, title: str) -> str:
    """Chart of mIoU against latency, as `<svg>`: a dot for fp32, joined to one for int8.

    Args:
        rows: of `frontier`; those without a mIoU are named as having no data.
        title: heading.
    """
    series: dict[str, list[Point]] = {}
    for row in rows:
        reached = ((ONNX, row["miou"]), (INT8, row["int8_miou"]))
        series[row["name"]] = [
            (row["latency"][engine]["median"], miou)
            for engine, miou in reached
            if engine in row["latency"] and miou is not None
        ]
    longest = max((x for points in series.values() for x, _ in points), default=1.0)
    return line_chart(
        series,
        title=title,
        x_label=f"ONNX Runtime, one thread, {rows[0]['side']} px (ms): int8 below fp32",
        y_label="mIoU",
        x_range=(0.0, longest * 1.05),
        background=True,
    )
