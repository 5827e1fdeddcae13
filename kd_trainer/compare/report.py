"""What a comparison found: comparison.json, comparison.md, and the same printed."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from kd_trainer.arguments import DataArguments, ModelArguments
from kd_trainer.compare.budget import KINDS
from kd_trainer.compare.results import FinishedRun
from kd_trainer.compare.tables import markdown
from kd_trainer.costs import costs, file_mib
from kd_trainer.files import write_json, write_text
from kd_trainer.loading import load_student, make_teacher, network_name
from kd_trainer.metrics import (
    GapClosed,
    Interval,
    Mean,
    bootstrap_difference,
    gap_closed,
    mean_of,
)
from kd_trainer.models.modeling import SmpForSemanticSegmentation
from kd_trainer.teacher import Teacher

METRICS = ("miou", "iou_foreground", "dice", "boundary_iou", "agreement")


def write_report(
    runs: Sequence[FinishedRun],
    output: Path,
    resamples: int,
    repeats: int,
    *,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Compare finished runs, measure the costs of their networks, write and print all of it.

    Args:
        runs: as `read_runs` gives them.
        output: gets comparison.json and comparison.md.
        resamples: of the bootstrap.
        repeats: measured calls for each latency; 0 measures none.
        trust_remote_code: run code that comes with the teacher, to measure it.

    Returns:
        What comparison.json holds.
    """
    summary = summarise(runs, resamples) | {
        "costs": measured_costs(runs, repeats, trust_remote_code)
    }
    write_json(output / "comparison.json", summary)
    text = markdown(summary)
    write_text(output / "comparison.md", text)
    print(f"\n{text}\nWritten to {output}/comparison.json and comparison.md")
    return summary


def summarise(runs: Sequence[FinishedRun], resamples: int) -> dict[str, Any]:
    """Everything that follows from the files of the runs alone; None is what is not known."""
    by_kind = {kind: [run for run in runs if run.kind == kind] for kind in KINDS}
    means = {kind: _metric_means(own) for kind, own in by_kind.items()}
    teacher = runs[0].figures["teacher"] if runs else {}
    both = all(by_kind.values())
    gap = None
    if both:
        one = Mean(teacher["miou"], None, 1)
        gap = gap_closed(one, *(_known(means[kind]["miou"]) for kind in KINDS))
    return {
        "teacher": {
            "source": runs[0].note.get("teacher") if runs else None,
            "metrics": {name: _finite(teacher.get(name)) for name in METRICS},
        },
        **{
            kind: {
                "seeds": [run.seed for run in own],
                "metrics": means[kind],
                "train_seconds": _mean([run.train_seconds for run in own]),
                "peak_memory_mib": _mean([run.peak_memory_mib for run in own]),
                "train_images": own[0].results.get("train_images") if own else None,
                "epochs": own[0].results.get("epochs") if own else None,
            }
            for kind, own in by_kind.items()
        },
        "updates": runs[0].note.get("updates") if runs else None,
        "left_out_by_baseline": max((run.note.get("left_out") or 0 for run in runs), default=0),
        "difference": _paired(by_kind),
        "gap_closed": None if gap is None else _gap(gap),
        "bootstrap": _interval(by_kind, resamples) if both else None,
        "eval_images": len(runs[0].counts.student) if runs else None,
        "runs": [_row(run) for run in runs],
        "versions": _versions(runs),
    }


def _known(mean: dict[str, Any] | None) -> Mean:
    assert mean is not None  # an mIoU exists wherever a pixel was labelled
    return Mean(mean["mean"], mean["standard_error"], mean["seeds"])


def _metric_means(runs: Sequence[FinishedRun]) -> dict[str, dict[str, Any] | None]:
    return {name: _mean([run.figures["student"][name] for run in runs]) for name in METRICS}


def _finite(value: float | None) -> float | None:
    """The figure, or None for one that does not exist, such as of a class that never occurs."""
    return value if value is not None and math.isfinite(value) else None


def _mean(values: Sequence[float | None]) -> dict[str, Any] | None:
    """Mean over the runs; None if it is not known of all of them."""
    known = [v for v in values if v is not None and math.isfinite(v)]
    if not known or len(known) < len(values):
        return None
    mean = mean_of(known)
    return {"mean": mean.value, "standard_error": mean.error, "seeds": mean.count}


def _paired(by_kind: dict[str, list[FinishedRun]]) -> dict[str, Any] | None:
    """Distilled − baseline in mIoU, seed by seed: what a seed does to both cancels."""
    scores = {k: {r.seed: r.figures["student"]["miou"] for r in own} for k, own in by_kind.items()}
    seeds = sorted(scores["baseline"].keys() & scores["distilled"].keys())
    return _mean([scores["distilled"][s] - scores["baseline"][s] for s in seeds])


def _gap(gap: GapClosed) -> dict[str, Any]:
    return {
        "value": gap.closed,
        "standard_error": gap.error,
        "gap": gap.gap,
        "needed": gap.needed,
        "too_small_to_judge": gap.too_small,
        "conditional_on_the_teacher": gap.conditional,
        "sentence": gap.sentence(),
    }


def _interval(by_kind: dict[str, list[FinishedRun]], resamples: int) -> dict[str, Any]:
    tables = {k: np.stack([run.counts.confusion() for run in own]) for k, own in by_kind.items()}
    found: Interval = bootstrap_difference(
        tables["distilled"], tables["baseline"], resamples=resamples
    )
    return asdict(found)


def _row(run: FinishedRun) -> dict[str, Any]:
    return {
        "kind": run.kind,
        "seed": run.seed,
        **{name: _finite(run.figures["student"][name]) for name in METRICS},
        "train_seconds": run.train_seconds,
        "peak_memory_mib": run.peak_memory_mib,
        "device": run.results.get("device"),
    }


def _versions(runs: Sequence[FinishedRun]) -> dict[str, str]:
    """Version of each library; all of them where runs used different ones."""
    found: dict[str, dict[str, None]] = {}
    for run in runs:
        for name, version in run.results.get("versions", {}).items():
            found.setdefault(name, {})[version] = None
    return {name: ", ".join(versions) for name, versions in found.items()}


def measured_costs(
    runs: Sequence[FinishedRun], repeats: int, trust_remote_code: bool = False
) -> dict[str, Any]:
    """Costs of student and teacher, where their weights are here; what is missing is None."""
    networks: dict[str, nn.Module] = {}
    sides: dict[str, int] = {}
    files: dict[str, float | None] = {}
    run = next((r for r in runs if (r.folder / "student" / "model.safetensors").is_file()), None)
    if run is not None:
        student = load_student(run.folder / "student")
        networks["student"], sides["student"] = student, int(run.config["image_size"])
        files["student"] = file_mib(run.folder / "student")
        distilled = next((r for r in runs if r.kind == "distilled"), None)
        teacher = None if distilled is None else _teacher(distilled, student, trust_remote_code)
        if teacher is not None:
            networks["teacher"] = teacher.network
            sides["teacher"] = teacher.image_size or sides["student"]
            files["teacher"] = file_mib(str(distilled.config["teacher"]))  # type: ignore[union-attr]
    load = os.getloadavg()[0] if networks and repeats else None
    measured = costs(networks, sides, repeats)
    found: dict[str, Any] = {"student": None, "teacher": None, "load": load}
    for name, network in networks.items():
        found[name] = {"network": network_name(network), "file_mib": files[name]} | measured[name]
    return found


def _teacher(
    run: FinishedRun, student: SmpForSemanticSegmentation, trust_remote_code: bool
) -> Teacher | None:
    """The teacher of a distilled run; None on a machine that does not have it."""
    model, data = (
        {k: v for k, v in run.config.items() if k in cls.__dataclass_fields__}
        for cls in (ModelArguments, DataArguments)
    )
    arguments = ModelArguments(**(model | {"trust_remote_code": trust_remote_code}))
    size = DataArguments(**data).image_size
    try:
        return make_teacher(arguments, student, image_size=size)
    except FileNotFoundError:
        return None
