"""The runs of a comparison: a folder each, and what is left to do in it."""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import yaml

from kd_trainer.arguments import BALANCED
from kd_trainer.build import build_run, evaluation_dataset
from kd_trainer.checkpointing.checkpoints import checkpoint_folders, fault, step_of
from kd_trainer.checkpointing.fingerprint import WITHOUT_EFFECT, differences
from kd_trainer.compare.budget import Budget, baseline_settings
from kd_trainer.compare.image_counts import count_images
from kd_trainer.compare.variants import BASELINE, Variant, is_baseline
from kd_trainer.config import RunArguments, build
from kd_trainer.costs import reset_peak_memory, weight_files
from kd_trainer.data_arguments import DataArguments
from kd_trainer.files import write_json
from kd_trainer.found_settings import FOUND
from kd_trainer.loading import load_student
from kd_trainer.losses import TERMS
from kd_trainer.model_arguments import ModelArguments
from kd_trainer.parsing import settings_of
from kd_trainer.reports.contents import EMA
from kd_trainer.run_folder import NOTE_SHAPE, RESULTS_SHAPE, read_object, written_settings

COUNTS, FINAL_COUNTS, NOTE = "image_counts.npz", "final_counts.npz", "comparison_run.json"
EMA_COUNTS, FINAL_EMA_COUNTS = "ema_counts.npz", "final_ema_counts.npz"  # with --ema_decay
# Read by the distillation alone: a baseline is the same with any of them.
OF_THE_DISTILLATION = frozenset(
    {"temperature_schedule", "temperature_start", "temperature_end", "temperature_points"}
    | {"feature_pairs", "projection_learning_rate"}
    | {"temperature_per", "teacher_targets", "teacher_shares", "teacher_flip", "class_map"}
    | {"pseudo_labels", "pseudo_confidence", "labelled_share", "adaptive_weight"}
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


@dataclass(frozen=True)
class Final:
    """Data on which the chosen students are measured once more.

    Attributes:
        dataset: a source; None for that of the run.
        split: of it; None for the split that chose them.
    """

    dataset: str | None
    split: str | None

    @property
    def name(self) -> str:
        """What it is called in tables: no path."""
        return " ".join(filter(None, (self.dataset and Path(self.dataset).name, self.split)))

    def settings(self, data: DataArguments) -> DataArguments:
        """Those of a run's data, to read this instead."""
        dataset, split = self.dataset or data.dataset, self.split or data.eval_split
        return replace(data, dataset=dataset, eval_split=split)


@dataclass
class PlannedRun:
    """One run of a comparison.

    Attributes:
        kind: what its row and its folder are called: a baseline's name, or a variant's.
        seed: of weights, data order and augmentation.
        run: its settings.
        reference: the run with the comparison's teacher of this seed, which knows that teacher and
            the evaluation data.
        budget: shared by a variant and its baseline.
        teacher_weights: digest of the teacher's weights, where it can be known.
        variant: what it is, or what it is the first baseline of.
        baseline: name of its baseline's runs.
        final: data to measure its student on as well.
    """

    kind: str
    seed: int
    run: RunArguments
    reference: RunArguments
    budget: Budget
    teacher_weights: str | None
    variant: Variant | None = None
    baseline: str = BASELINE
    final: Final | None = None

    @property
    def folder(self) -> Path:
        """Where it goes."""
        return self.run.output

    @property
    def name(self) -> str:
        """What it is called in the output."""
        return f"{self.kind} seed {self.seed}"

    @property
    def side(self) -> str:
        """Whose budget it has: baseline or distilled."""
        return "baseline" if is_baseline(self.kind) else "distilled"

    @property
    def trained(self) -> bool:
        """Whether the training came to its end."""
        return written_results(self.folder).get("student_miou") is not None

    @property
    def complete(self) -> bool:
        """Whether nothing is left to do."""
        final = self.final is None or written_note(self.folder).get("final") == self.final.name
        files = [NOTE, *(file for counted in self._counted.values() for file in counted)]
        return self.trained and final and all((self.folder / name).is_file() for name in files)

    @property
    def _counted(self) -> dict[str, list[str]]:
        """Files of counts, by the folder of the network that is counted: evaluation, then final."""
        files = {"student": [COUNTS, FINAL_COUNTS]}
        if self.run.training.ema_decay is not None:
            files[EMA] = [EMA_COUNTS, FINAL_EMA_COUNTS]
        return files if self.final else {who: names[:1] for who, names in files.items()}

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
        unread = OF_THE_DISTILLATION if is_baseline(self.kind) else frozenset()
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
        args, ignore = self.run.training, self.run.data.ignore_index
        datasets = parts.eval_dataset, self.final_dataset()
        for who, files in self._counted.items():
            student = load_student(self.folder / who)
            for dataset, file in zip(datasets, files, strict=False):
                counts = count_images(student, parts.teacher, dataset, args, ignore_index=ignore)
                counts.save(self.folder / file)
        if self.final is not None:
            note = written_note(self.folder) | {"final": self.final.name}
            write_json(self.folder / NOTE, note)

    def final_dataset(self) -> Any:
        """The data of `final`; None without."""
        if self.final is None:
            return None
        batch_size = self.run.training.per_device_eval_batch_size
        return evaluation_dataset(self.final.settings(self.reference.data), batch_size=batch_size)

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
            "left_out": self.budget.left_out if is_baseline(self.kind) else 0,
            "baseline": None if is_baseline(self.kind) else self.baseline,
            "flags": self.variant.flags if self.variant and not is_baseline(self.kind) else "",
            "teacher": self.reference.model.teacher_name,
            "teacher_weights": self.teacher_weights,
        }
        write_json(self.folder / NOTE, note)


def plan_runs(
    variants: Sequence[tuple[Variant, Budget]],
    *,
    seeds: list[int],
    folder: Path,
    wants: Callable[[str], bool] = lambda _: True,
    final: Final | None = None,
) -> list[PlannedRun]:
    """All runs seed by seed, baselines before variants, each checked against its folder.

    Args:
        variants: with what each may spend.
        seeds: of each.
        folder: gets a folder a run.
        wants: whether runs of a name are planned.
        final: data to measure the students on as well.
    """
    settings = variants[0][0].reference
    weights = weights_digest(*ModelArguments(**settings_of(ModelArguments, settings)).teachers)
    names = baseline_names(variants, folder)
    kinds: dict[str, tuple[Variant, Budget, str]] = {}
    for (variant, budget), baseline in zip(variants, names, strict=True):
        kinds.setdefault(baseline, (variant, budget, baseline))
    for (variant, budget), baseline in zip(variants, names, strict=True):
        kinds[variant.name] = (variant, budget, baseline)
    planned = []
    for seed in seeds:
        for kind in filter(wants, kinds):
            variant, budget, baseline = kinds[kind]
            output = str(folder / f"{kind}_seed{seed}")
            of_seed = {"seed": seed, "output_dir": output}
            reference = build(variant.reference | of_seed)
            settings = variant.settings | of_seed
            if is_baseline(kind):
                settings = baseline_settings(settings, reference.training, budget)
            run = build(settings)
            about = (run, reference, budget, weights, variant, baseline, final)
            planned.append(PlannedRun(kind, seed, *about))
            planned[-1].check()
    return planned


def baseline_names(variants: Sequence[tuple[Variant, Budget]], folder: Path) -> list[str]:
    """What the baseline of each variant is called: one name where without a teacher all is equal.

    The first variant's is `baseline`, another one `baseline_of_` a variant that it belongs to, of
    those the one that has such runs already: a variant that comes later trains nothing again.
    """
    alone = []
    for variant, budget in variants:
        settings = variant.settings | {"output_dir": str(folder)}
        run = build(baseline_settings(settings, build(settings).training, budget))
        alone.append(run.resolved() | {"steps": budget.steps})
    ignored = WITHOUT_EFFECT | OF_THE_DISTILLATION
    names: list[str] = []
    for one in alone:
        same = [
            variant.name
            for (variant, _), other in zip(variants, alone, strict=True)
            if not differences(one, other, ignored)
        ]
        trained = (name for name in same if any(folder.glob(f"{BASELINE}_of_{name}_seed*")))
        first = variants[0][0].name in same
        names.append(BASELINE if first else f"{BASELINE}_of_{next(trained, same[0])}")
    return names


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
