"""The runs of a comparison: a folder each, and what is left to do in it."""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import yaml

from kd_trainer.arguments import BALANCED
from kd_trainer.build import FOUND, build_run
from kd_trainer.checkpointing.checkpoints import checkpoint_folders, fault, step_of
from kd_trainer.checkpointing.fingerprint import WITHOUT_EFFECT, differences
from kd_trainer.compare.budget import Budget, baseline_settings
from kd_trainer.compare.image_counts import count_images
from kd_trainer.config import RunArguments, build
from kd_trainer.costs import reset_peak_memory, weight_files
from kd_trainer.files import write_json
from kd_trainer.loading import load_student
from kd_trainer.losses import TERMS
from kd_trainer.model_arguments import ModelArguments
from kd_trainer.parsing import settings_of
from kd_trainer.run_folder import NOTE_SHAPE, RESULTS_SHAPE, read_object, written_settings

COUNTS, NOTE = "image_counts.npz", "comparison_run.json"
# Read by the distillation alone: a baseline is the same with any of them.
OF_THE_DISTILLATION = frozenset(
    {"temperature_schedule", "temperature_start", "temperature_end", "temperature_points"}
    | {"feature_pairs", "projection_learning_rate"}
    | {"temperature_per", "teacher_targets", "teacher_shares", "teacher_flip", "class_map"}
    | {"pseudo_labels", "pseudo_confidence", "labelled_share"}
    | {*(t.flag for t in TERMS if t.needs_teacher)}
)


def weights_digest(*sources: str) -> str | None:
    """SHA-256 of the weights of the teachers here; None if one is on the Hub."""
    found = [weight_files(source) for source in sources]
    if not all(found):
        return None
    digest = hashlib.sha256()
    for file in chain(*found):
        digest.update(file.read_bytes())
    return digest.hexdigest()


@dataclass
class PlannedRun:
    """One run of a comparison.

    Attributes:
        kind: baseline or distilled.
        seed: of weights, data order and augmentation.
        run: its settings.
        reference: the distilled run of this seed, which knows teacher and evaluation data.
        budget: shared by all runs.
        teacher_weights: digest of the teacher's weights, where it can be known.
    """

    kind: str
    seed: int
    run: RunArguments
    reference: RunArguments
    budget: Budget
    teacher_weights: str | None

    @property
    def folder(self) -> Path:
        """Where it goes."""
        return self.run.output

    @property
    def name(self) -> str:
        """What it is called in the output."""
        return f"{self.kind} seed {self.seed}"

    @property
    def trained(self) -> bool:
        """Whether the training came to its end."""
        return written_results(self.folder).get("student_miou") is not None

    @property
    def complete(self) -> bool:
        """Whether nothing is left to do."""
        return self.trained and all((self.folder / name).is_file() for name in (COUNTS, NOTE))

    def checkpoint(self) -> int:
        """Step of the newest complete checkpoint; 0 without one."""
        folders = checkpoint_folders(self.folder)
        return max((step_of(p) for p in folders if fault(p, contents=False) is None), default=0)

    def check(self) -> None:
        """Refuse a folder that holds a run of other settings.

        Raises:
            ValueError: says which settings differ.
        """
        if not (self.folder / "config.yaml").is_file():
            return
        before = written_settings(self.folder)
        now = yaml.safe_load(yaml.safe_dump(self.run.resolved()))
        left_open = (None, [BALANCED])  # which the run has found out by itself, and written down
        now |= {n: before.get(n) for n in FOUND if now.get(n) in left_open}
        unread = OF_THE_DISTILLATION if self.kind == "baseline" else frozenset()
        others = [str(d) for d in differences(before, now, WITHOUT_EFFECT | unread)]
        note, steps = written_note(self.folder), self.budget.steps
        if note.get("teacher_weights", self.teacher_weights) != self.teacher_weights:
            others.append("the weights of the teacher")
        if note.get("updates", steps) != steps:
            others.append(f"updates {note['updates']} → {steps}")
        if others:
            raise ValueError(
                f"Expected the settings of the run in {self.folder}, got others: "
                f"{'; '.join(others)}. Name another --output_dir, give the same settings, or "
                "delete that folder."
            )

    def execute(self, train: Callable[[RunArguments], Any]) -> None:
        """Train what is not trained, resuming if there is a checkpoint, and count its images.

        Args:
            train: the training command, which lies above this package.
        """
        if not self.trained:
            self._train(train)
        elif not (self.folder / NOTE).is_file():
            self._write_note(starts=0, memory_is_its_own=False)  # made by train.py
        gc.collect()
        parts = build_run(self.reference)
        assert parts.eval_dataset is not None
        parts.eval_dataset.transform.eval_size = self.run.data.eval_size
        count_images(
            load_student(self.folder / "student"),
            parts.teacher,
            parts.eval_dataset,
            self.run.training,
            ignore_index=self.run.data.ignore_index,
        ).save(self.folder / COUNTS)

    def _train(self, train: Callable[[RunArguments], Any]) -> None:
        # With nothing but incomplete ones the training says so: that is not to start anew.
        self.run.training.resume = "latest" if checkpoint_folders(self.folder) else None
        self.run.training.no_preflight = True  # the comparison has looked once for all runs
        starts = (written_note(self.folder).get("starts") or 0) + 1
        self._write_note(starts=starts, memory_is_its_own=reset_peak_memory())
        train(self.run)

    def _write_note(self, *, starts: int, memory_is_its_own: bool) -> None:
        """What results.json does not say."""
        note = {
            "kind": self.kind,
            "seed": self.seed,
            "starts": starts,
            "whole_time": starts > 0,  # results.json counts the seconds of all starts
            "memory_is_its_own": memory_is_its_own,
            "updates": self.budget.steps,
            "left_out": self.budget.left_out if self.kind == "baseline" else 0,
            "teacher": self.reference.model.teacher_name,
            "teacher_weights": self.teacher_weights,
        }
        write_json(self.folder / NOTE, note)


def plan_runs(
    settings: dict[str, Any], budget: Budget, *, seeds: list[int], kinds: list[str], folder: Path
) -> list[PlannedRun]:
    """All runs, baseline before distilled, seed by seed, each checked against its folder."""
    weights = weights_digest(*ModelArguments(**settings_of(ModelArguments, settings)).teachers)
    planned = []
    for seed in seeds:
        for kind in kinds:
            output = str(folder / f"{kind}_seed{seed}")
            of_seed = settings | {"seed": seed, "output_dir": output}
            run = reference = build(of_seed)
            if kind == "baseline":
                run = build(baseline_settings(of_seed, reference.training, budget))
            planned.append(PlannedRun(kind, seed, run, reference, budget, weights))
            planned[-1].check()
    return planned


def written_results(folder: Path) -> dict[str, Any]:
    """Figures of a finished run; empty before."""
    return read_object(folder / "results.json", RESULTS_SHAPE)


def written_note(folder: Path) -> dict[str, Any]:
    """What results.json does not say; empty where compare.py made no such note."""
    return read_object(folder / NOTE, NOTE_SHAPE)


def training_seconds_of(results: dict[str, Any], note: dict[str, Any]) -> float | None:
    """Time of the training of a run; None if only its last part was measured."""
    whole = note.get("starts") == 1 or note.get("whole_time", False)
    return results.get("train_seconds") if whole else None
