"""What a comparison found: comparison.json, comparison.md, and the same printed."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from kd_trainer.compare.image_counts import ImageCounts
from kd_trainer.compare.results import FinishedRun
from kd_trainer.compare.tables import markdown
from kd_trainer.compare.variants import is_baseline
from kd_trainer.costs import costs, file_mib
from kd_trainer.files import write_json, write_text
from kd_trainer.loading import load_student, make_teacher, network_name
from kd_trainer.metrics import Mean, bootstrap_difference, gap_closed, mean_of
from kd_trainer.model_arguments import ModelArguments
from kd_trainer.models.image_sizes import AnySize
from kd_trainer.parsing import settings_of
from kd_trainer.sources import SELF
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
    groups = _by_kind(runs)
    students = _quality(groups, resamples)
    for kind, group in groups.items():
        students[kind] |= _training(group)
    first, final = (runs[0] if runs else None), None
    if first and all(run.final_counts is not None for run in runs):
        chosen = _counted_by(runs, "final_counts")
        final = {
            "data": first.note.get("final"),
            "teacher": _teacher(chosen),
            "students": _quality(_by_kind(chosen), resamples),
            "ema": _quality(_by_kind(_counted_by(runs, "final_ema_counts")), resamples),
            "eval_images": len(chosen[0].counts.student),
        }
    return {
        "teacher": {"source": first.note.get("teacher") if first else None, **_teacher(runs)},
        "students": students,
        "ema": _quality(_by_kind(_counted_by(runs, "ema_counts")), resamples),
        "eval_images": len(first.counts.student) if first else None,
        "final": final,
        "runs": [_row(run) for run in runs],
        "versions": _versions(runs),
    }


def _by_kind(runs: Sequence[FinishedRun]) -> dict[str, list[FinishedRun]]:
    """The runs by name, baselines first."""
    names = sorted(dict.fromkeys(run.kind for run in runs), key=lambda k: not is_baseline(k))
    return {name: [run for run in runs if run.kind == name] for name in names}


def _counted_by(runs: Sequence[FinishedRun], counts: str) -> list[FinishedRun]:
    """The runs with other counts, of each name that has them in all of its runs."""
    missing = {run.kind for run in runs if getattr(run, counts) is None}
    return [replace(run, counts=getattr(run, counts)) for run in runs if run.kind not in missing]


def _teacher(runs: Sequence[FinishedRun]) -> dict[str, Any]:
    """Metrics of the teacher as the first variant asks it, or else the first baseline."""
    asked = next((run for run in runs if not is_baseline(run.kind)), runs[0] if runs else None)
    figures = asked.figures["teacher"] if asked else {}
    return {"metrics": {name: _finite(figures.get(name)) for name in METRICS}}


def _quality(groups: dict[str, list[FinishedRun]], resamples: int) -> dict[str, dict[str, Any]]:
    """Figures of each kind, and of a variant beside those of its baseline, if that has runs."""
    found: dict[str, dict[str, Any]] = {}
    for kind, group in groups.items():
        found[kind] = {
            "seeds": [run.seed for run in group],
            "metrics": {n: _mean([run.figures["student"][n] for run in group]) for n in METRICS},
        }
        if not is_baseline(kind):
            alone = groups.get(group[0].baseline, [])
            found[kind] |= {"flags": group[0].note.get("flags") or "", "baseline": None}
            found[kind] |= dict.fromkeys(("difference", "gap_closed", "bootstrap"))
            if alone:
                found[kind] |= {"baseline": alone[0].kind, **_beside(alone, group, resamples)}
    return found


def _beside(
    alone: Sequence[FinishedRun], taught: Sequence[FinishedRun], resamples: int
) -> dict[str, Any]:
    """A variant against its baseline: seed by seed, as a share of the gap, and over images."""
    tables = [np.stack([run.confusion for run in group]) for group in (taught, alone)]
    return {
        "difference": _paired(alone, taught),
        "gap_closed": _gap(taught[0].figures["teacher"]["miou"], alone, taught),
        "bootstrap": asdict(bootstrap_difference(*tables, resamples=resamples)),
    }


def _training(runs: Sequence[FinishedRun]) -> dict[str, Any]:
    return {
        "train_seconds": _mean([run.train_seconds for run in runs]),
        "peak_memory_mib": _mean([run.peak_memory_mib for run in runs]),
        "train_images": runs[0].results.get("train_images"),
        "epochs": runs[0].results.get("epochs"),
        "updates": runs[0].note.get("updates"),
        "left_out": max(run.note.get("left_out") or 0 for run in runs),
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


def _mious(runs: Sequence[FinishedRun]) -> dict[int, float]:
    return {run.seed: run.figures["student"]["miou"] for run in runs}


def _paired(alone: Sequence[FinishedRun], taught: Sequence[FinishedRun]) -> dict[str, Any] | None:
    """Taught − alone in mIoU, seed by seed: what a seed does to both cancels."""
    without, with_ = _mious(alone), _mious(taught)
    return _mean([with_[seed] - without[seed] for seed in sorted(without.keys() & with_.keys())])


def _gap(
    teacher: float, alone: Sequence[FinishedRun], taught: Sequence[FinishedRun]
) -> dict[str, Any]:
    means = (mean_of(list(_mious(runs).values())) for runs in (alone, taught))
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
        "ema_miou": _miou(run, run.ema_counts),
        "final_miou": _miou(run, run.final_counts),
        "final_ema_miou": _miou(run, run.final_ema_counts),
        "train_seconds": run.train_seconds,
        "peak_memory_mib": run.peak_memory_mib,
        "device": run.results.get("device"),
    }


def _miou(run: FinishedRun, counts: ImageCounts | None) -> float | None:
    return None if counts is None else _finite(run.figures_of(counts)["student"]["miou"])


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
    taught = (
        run for run in runs if not is_baseline(run.kind) and run.config.get("teacher") != SELF
    )
    distilled = next(taught, None)
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
