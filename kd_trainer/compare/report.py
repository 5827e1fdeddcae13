"""What a comparison found: comparison.json, comparison.md, and the same printed."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from kd_trainer.compare.budget import KINDS
from kd_trainer.compare.results import FinishedRun
from kd_trainer.compare.tables import markdown
from kd_trainer.costs import costs, file_mib
from kd_trainer.files import write_json, write_text
from kd_trainer.loading import load_student, make_teacher, network_name
from kd_trainer.metrics import Mean, bootstrap_difference, gap_closed, mean_of
from kd_trainer.model_arguments import ModelArguments
from kd_trainer.models.image_sizes import AnySize
from kd_trainer.parsing import settings_of
from kd_trainer.students import image_size_of

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
    first = runs[0] if runs else None
    teacher = first.figures["teacher"] if first else {}
    gap = interval = None
    if all(by_kind.values()):
        gap = _gap(teacher["miou"], by_kind)
        tables = {k: np.stack([r.confusion for r in by_kind[k]]) for k in KINDS}
        interval = asdict(
            bootstrap_difference(tables["distilled"], tables["baseline"], resamples=resamples)
        )
    return {
        "teacher": {
            "source": first.note.get("teacher") if first else None,
            "metrics": {name: _finite(teacher.get(name)) for name in METRICS},
        },
        **{kind: _of_kind(group) for kind, group in by_kind.items()},
        "updates": first.note.get("updates") if first else None,
        "left_out_by_baseline": max((run.note.get("left_out") or 0 for run in runs), default=0),
        "difference": _paired(by_kind),
        "gap_closed": gap,
        "bootstrap": interval,
        "eval_images": len(first.counts.student) if first else None,
        "runs": [_row(run) for run in runs],
        "versions": _versions(runs),
    }


def _of_kind(runs: Sequence[FinishedRun]) -> dict[str, Any]:
    return {
        "seeds": [run.seed for run in runs],
        "metrics": {n: _mean([run.figures["student"][n] for run in runs]) for n in METRICS},
        "train_seconds": _mean([run.train_seconds for run in runs]),
        "peak_memory_mib": _mean([run.peak_memory_mib for run in runs]),
        "train_images": runs[0].results.get("train_images") if runs else None,
        "epochs": runs[0].results.get("epochs") if runs else None,
    }


def _finite(value: float | None) -> float | None:
    """The figure, or None for one that does not exist, such as of a class that never occurs."""
    return value if value is not None and math.isfinite(value) else None


def _mean(values: Sequence[float | None]) -> dict[str, Any] | None:
    """Mean over the runs; None if it is not known of all of them."""
    finite = [v for v in values if v is not None and math.isfinite(v)]
    if not finite or len(finite) < len(values):
        return None
    mean = mean_of(finite)
    return {"mean": mean.value, "standard_error": mean.error, "seeds": mean.count}


def _paired(by_kind: dict[str, list[FinishedRun]]) -> dict[str, Any] | None:
    """Distilled − baseline in mIoU, seed by seed: what a seed does to both cancels."""
    baseline, distilled = (
        {run.seed: run.figures["student"]["miou"] for run in by_kind[kind]} for kind in KINDS
    )
    return _mean([distilled[s] - baseline[s] for s in sorted(baseline.keys() & distilled.keys())])


def _gap(teacher: float, by_kind: dict[str, list[FinishedRun]]) -> dict[str, Any]:
    scores = {k: [r.figures["student"]["miou"] for r in runs] for k, runs in by_kind.items()}
    means = (mean_of(scores[kind]) for kind in KINDS)
    gap = gap_closed(Mean(teacher, None, 1), *means)
    return {
        "value": gap.closed,
        "standard_error": gap.error,
        "gap": gap.gap,
        "needed": gap.needed,
        "too_small_to_judge": gap.too_small,
        "conditional_on_the_teacher": gap.conditional,
        "sentence": gap.sentence(),
    }


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
    versions: dict[str, dict[str, None]] = {}
    for run in runs:
        for name, version in run.results.get("versions", {}).items():
            versions.setdefault(name, {})[version] = None
    return {name: ", ".join(several) for name, several in versions.items()}


def measured_costs(
    runs: Sequence[FinishedRun], repeats: int, trust_remote_code: bool = False
) -> dict[str, Any]:
    """Costs of student and teacher, where their weights are here; what is missing is None."""
    result: dict[str, Any] = {"student": None, "teacher": None, "load": None}
    folders = [run.folder / "student" for run in runs]
    folder = next((f for f in folders if (f / "model.safetensors").is_file()), None)
    if folder is None:
        return result
    student = load_student(folder)
    networks: dict[str, nn.Module] = {"student": student}
    sizes: dict[str, AnySize] = {"student": image_size_of(student)}
    files = {"student": [str(folder)]}
    distilled = next((run for run in runs if run.kind == "distilled"), None)
    if distilled is not None:
        model = settings_of(ModelArguments, distilled.config)
        model["trust_remote_code"] = trust_remote_code
        with suppress(FileNotFoundError):  # a machine that does not have it
            settings = ModelArguments(**model)
            teacher = make_teacher(settings, student, image_size=distilled.config["image_size"])
            assert teacher is not None
            networks["teacher"], files["teacher"] = teacher.network, settings.teachers
            sizes["teacher"] = teacher.image_size or sizes["student"]
    if repeats:
        result["load"] = os.getloadavg()[0]
    for name, measured in costs(networks, sizes, repeats).items():
        of_files = {"network": network_name(networks[name]), "file_mib": file_mib(*files[name])}
        result[name] = of_files | measured
    return result
