"""Finished runs read back from their small files, and what has to hold before they are compared."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from transformers import AutoConfig

from kd_trainer.checkpointing.fingerprint import DEFAULTS, WITHOUT_EFFECT, Difference, differences
from kd_trainer.compare.image_counts import ImageCounts, load_counts
from kd_trainer.compare.runs import (
    COUNTS,
    EMA_COUNTS,
    FINAL_COUNTS,
    FINAL_EMA_COUNTS,
    NOTE,
    OF_THE_DISTILLATION,
    training_seconds_of,
    written_note,
    written_results,
)
from kd_trainer.compare.variants import BASELINE, is_baseline
from kd_trainer.console import number
from kd_trainer.data_arguments import DataArguments
from kd_trainer.run_folder import written_settings

FILES = ("results.json", "config.yaml", NOTE, COUNTS)
_FOLDER = re.compile(r"(.+)_seed(\d+)")
# Rounding differs between machines and may turn a few pixels; anything above it is something else.
_ROUNDING = 1e-3
# Two machines keep the same things in other places.
_PATHS = ("dataset", "teacher", "unlabelled", "encoder_weights", "student")
_BY_SEED = frozenset({"seed", "use_cpu"}) | WITHOUT_EFFECT
_BY_TEACHER = frozenset({"teacher", "unlabelled", "weight_schedule"}) | OF_THE_DISTILLATION
# Stretched for a baseline without the unlabelled images.
_STRETCHED = frozenset(
    {"max_steps", "num_train_epochs", "warmup_epochs", "unfreeze_warmup_epochs"}
    | {"unfreeze_start_epoch", "unfreeze_every", "plan_epochs", "eval_strategy", "save_strategy"}
    | {"eval_steps", "save_steps"}
)


@dataclass(frozen=True)
class FinishedRun:
    """One run of a comparison, as its files tell."""

    kind: str
    seed: int
    folder: Path
    config: dict[str, Any]
    results: dict[str, Any]
    note: dict[str, Any]
    counts: ImageCounts
    ema_counts: ImageCounts | None = None  # of the student's moving average
    final_counts: ImageCounts | None = None  # on the images that chose nothing
    final_ema_counts: ImageCounts | None = None

    @property
    def baseline(self) -> str:
        """Name of the runs that it is compared with."""
        return str(self.note.get("baseline") or BASELINE)

    @property
    def name(self) -> str:
        """What it is called in messages."""
        return f"{self.kind} seed {self.seed} ({self.folder})"

    @property
    def id2label(self) -> dict[int, str]:
        """Names of the classes: of the student while it is here, else as the settings have them."""
        student = self.folder / "student"
        if (student / "config.json").is_file():
            labels = AutoConfig.from_pretrained(student).id2label or {}
            return {int(index): str(name) for index, name in labels.items()}
        keys = ("num_labels", "class_names", "multi_label")
        names = {key: self.config.get(key) for key in keys}
        return DataArguments(**{k: v for k, v in names.items() if v is not None}).id2label

    @property
    def multi_label(self) -> bool:
        """Whether a pixel may have several labels."""
        return bool(self.config.get("multi_label"))

    @property
    def confusion(self) -> npt.NDArray[np.int64]:
        """The student's pixels of each image, see `ImageCounts.confusion`."""
        return self.counts.confusion(multi_label=self.multi_label)

    @cached_property
    def figures(self) -> dict[str, dict[str, float]]:
        """Metrics of `student` and `teacher` from the counts."""
        return self.figures_of(self.counts)

    def figures_of(self, counts: ImageCounts) -> dict[str, dict[str, float]]:
        """Likewise, from other counts of this run."""
        return counts.figures(self.id2label, multi_label=self.multi_label)

    @property
    def train_seconds(self) -> float | None:
        """Time of the training; None if only its last part was measured."""
        return training_seconds_of(self.results, self.note)

    @property
    def peak_memory_mib(self) -> float | None:
        """Peak memory of the training; None if it may be that of another run."""
        alone = self.note.get("memory_is_its_own") and self.note.get("starts") == 1
        return self.results.get("peak_memory_mib") if alone else None


def read_runs(
    folders: Sequence[Path],
    *,
    seeds: list[int] | None = None,
    kinds: Sequence[str] | None = None,
    baselines: Path | None = None,
) -> list[FinishedRun]:
    """The runs in folders of comparisons, checked to be comparable, by seed and kind.

    Args:
        folders: output folders of comparisons.
        seeds: leave out other seeds, and runs that are not finished; None reads everything.
        kinds: names of the runs to read, in the order of the report; None reads all.
        baselines: take the baselines from this folder, and from the others none.

    Raises:
        FileNotFoundError: if a folder is missing, or has no runs, or a run lacks a file.
        ValueError: if runs do not belong together; says which and why.
    """
    runs: dict[tuple[int, str], FinishedRun] = {}
    for folder in folders if baselines is None else (baselines, *folders):
        for run in _runs_in(folder, seeds, kinds):
            if baselines is not None and is_baseline(run.kind) != (folder == baselines):
                continue
            same = runs.setdefault((run.seed, run.kind), run)
            if not np.array_equal(same.counts.student, run.counts.student):
                raise ValueError(
                    f"Expected one run of {run.kind} seed {run.seed}, got two with other figures, "
                    f"in {same.folder} and {run.folder}. Merge only one of them."
                )
    names = kinds or sorted({kind for _, kind in runs}, key=lambda k: (not is_baseline(k), k))
    ordered = [runs[key] for key in sorted(runs, key=lambda k: (k[0], names.index(k[1])))]
    check_comparable(ordered)
    return ordered


def _runs_in(
    folder: Path, seeds: list[int] | None, kinds: Sequence[str] | None
) -> list[FinishedRun]:
    names = {p: _FOLDER.fullmatch(p.name) for p in sorted(folder.glob("*_seed*"))}
    matches = [
        (path, match)
        for path, match in names.items()
        if match and (kinds is None or match[1] in kinds)
    ]
    if seeds is None and not matches:
        there = "a folder without one" if folder.is_dir() else "no such folder"
        raise FileNotFoundError(
            f"Expected runs of compare.py (baseline_seed0, ...) in {folder}, got {there}. Name the "
            "output folder of a comparison."
        )
    runs = []
    for path, match in matches:
        seed, missing = int(match[2]), [f for f in FILES if not (path / f).is_file()]
        if seeds is not None and (missing or seed not in seeds):
            continue
        results = {} if missing else written_results(path)
        if results.get("student_miou") is None:
            raise FileNotFoundError(
                f"Expected a finished run in {path}, got one without {missing or 'its figures'}. "
                "Finish it with compare.py, bring the files, or take the folder away."
            )
        config, note = DEFAULTS | written_settings(path), written_note(path)
        more = [EMA_COUNTS, *([FINAL_COUNTS, FINAL_EMA_COUNTS] if note.get("final") else [])]
        others = [load_counts(path / f) if (path / f).is_file() else None for f in more]
        counts = load_counts(path / COUNTS)
        runs.append(FinishedRun(match[1], seed, path, config, results, note, counts, *others))
    return runs


def check_comparable(runs: Sequence[FinishedRun]) -> None:
    """Refuse runs that differ in more than their seed and their teacher.

    Raises:
        ValueError: says which two runs, and in what.
    """
    for run in runs:
        _check_counts(run, COUNTS, run.counts, run.results["student_miou"])
        if run.ema_counts is not None:
            _check_counts(run, EMA_COUNTS, run.ema_counts, run.results.get("ema_miou"))
        first = next(r for r in runs if r.kind == run.kind)
        unread = OF_THE_DISTILLATION if is_baseline(run.kind) else frozenset()
        _check_settings(first, run, _BY_SEED | unread)
        _check_labels(runs[0], run)
        _check_teacher(first, run)
    first_of = {run.kind: run for run in reversed(runs)}
    for distilled in first_of.values():
        baseline = first_of.get(distilled.baseline)
        if baseline is not None and not is_baseline(distilled.kind):
            stretched = _STRETCHED if baseline.note.get("left_out") else frozenset()
            _check_settings(baseline, distilled, _BY_SEED | _BY_TEACHER | stretched)


def _check_counts(run: FinishedRun, file: str, counts: ImageCounts, written: float | None) -> None:
    counted = run.figures_of(counts)["student"]["miou"]
    if written is None or abs(counted - written) > _ROUNDING:
        raise ValueError(
            f"Expected results.json and {file} of one student in {run.folder}, got mIoU "
            f"{number(written, '.4f', 'none')} and {counted:.4f}. Delete {file} and run compare.py "
            "again."
        )


def _check_settings(one: FinishedRun, other: FinishedRun, ignored: frozenset[str]) -> None:
    others = differences(_portable(one.config), _portable(other.config), ignored)
    for key in ("updates", "teacher_weights"):
        values = one.note.get(key), other.note.get(key)
        if values[0] != values[1]:
            others.append(Difference(key, *values))
    if others:
        raise ValueError(
            f"Expected runs of the same settings, got {one.name} and {other.name} with other: "
            f"{'; '.join(map(str, others))}. Compare runs that differ in the seed and the teacher "
            "only."
        )


def _portable(config: dict[str, Any]) -> dict[str, Any]:
    return config | {k: Path(str(config[k])).name for k in _PATHS if config.get(k) is not None}


def _check_labels(one: FinishedRun, other: FinishedRun) -> None:
    truths = [run.confusion.sum(axis=-1) for run in (one, other)]
    if not np.array_equal(*truths):
        raise ValueError(
            f"Expected runs measured on the same images, got {one.name} and {other.name} with "
            "other labels. Measure both on the same data."
        )


def _check_teacher(one: FinishedRun, other: FinishedRun) -> None:
    teachers = [run.figures["teacher"]["miou"] for run in (one, other)]
    if abs(teachers[0] - teachers[1]) > _ROUNDING:
        raise ValueError(
            f"Expected one teacher for all runs, got mIoU {teachers[0]:.4f} for {one.name} and "
            f"{teachers[1]:.4f} for {other.name}. Compare with one teacher."
        )
