"""The checks of a run before it starts: quickly before each training, at length in doctor.py.

Nothing of the run is changed: the student is copied, no data set is told an epoch, and the random
state is put back, so that a training goes the same way with and without its preflight.
"""

from __future__ import annotations

import copy
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from tqdm import tqdm

from kd_trainer.build import Parts, image_count
from kd_trainer.config import RunArguments
from kd_trainer.costs import length_in_epochs, steps_per_epoch
from kd_trainer.doctor.data import (
    inverted_finding,
    mask_finding,
    occurrence_finding,
    sharing_finding,
)
from kd_trainer.doctor.finding import (
    QUICK,
    Finding,
    Grade,
    Limits,
    error_message,
    ok,
    summary,
    untouched_random_state,
)
from kd_trainer.doctor.images import (
    GRADIENT_IMAGES,
    Seen,
    SplitMasks,
    choose,
    look,
    shared_images,
    split_masks,
)
from kd_trainer.doctor.input_convention import (
    PRESENT,
    Trials,
    alternatives,
    fed_otherwise,
    misfits,
    normalisation_finding,
    position_finding,
    present_feeding,
)
from kd_trainer.doctor.loss import (
    backward,
    degenerate_finding,
    parameter_finding,
    share_finding,
    terms_of_run,
)
from kd_trainer.doctor.resources import disk_finding, disk_need, plan_finding
from kd_trainer.doctor.teacher import (
    ENOUGH,
    MARGIN,
    classes_finding,
    constant_miou,
    input_size_finding,
    miou,
    output_finding,
    quality_finding,
    student_finding,
)
from kd_trainer.evaluation import labels_of, pixel_statistics
from kd_trainer.fast_layers import keep_freed_memory, use_fast_layers
from kd_trainer.models.config_checks import read_config
from kd_trainer.models.modeling import SmpForSemanticSegmentation, encoder_units

_BACKWARD = 3  # a training step is about three forward passes


class Preflight:
    """The checks of one run.

    Args:
        run: its settings.
        parts: its objects; they stay as they are, but for the teacher's device.
        limits: how much to look at.

    Attributes:
        step_seconds: about what a training image took with its backward pass.
        eval_seconds: about what an evaluation image takes.
        judged: whether the networks can be compared with the masks.
    """

    def __init__(self, run: RunArguments, parts: Parts, limits: Limits) -> None:
        self.run, self.parts, self.limits = run, parts, limits
        self.names = labels_of(parts.student)
        self.device = run.training.device
        self.statistics = pixel_statistics(parts.student, self.device)
        self.seen = Seen(len(self.names), run.data.ignore_index)
        self.masks: dict[str, SplitMasks] = {}
        self.samples: list[dict[str, Tensor]] = []
        self.splits: list[str] = []  # that the samples are of
        self.student = self._copy()
        self.constant = 0.0
        self.judged = False
        self.step_seconds = self.eval_seconds = 0.0

    @property
    def stages(self) -> dict[str, Callable[[], Iterator[Finding]]]:
        """What is done one after the other, by what a progress bar calls it."""
        return {
            "masks": self._masks,
            "networks": self._networks,
            "normalisation": self._normalisation,
            "shared images": self._shared,
            "loss": self._loss,
            "plan": self._plan,
            "disk": self._disk,
        }

    def findings(self) -> Iterator[Finding]:
        """All of them, stage by stage; the random state is left as it was found."""
        bar = tqdm(self.stages.items(), "preflight", unit="stage", leave=False, disable=self._quiet)
        with untouched_random_state(self.device):
            for name, stage in bar:
                bar.set_postfix_str(name)
                yield from stage()

    @property
    def _quiet(self) -> bool | None:
        return True if self.run.training.disable_tqdm else None

    def _masks(self) -> Iterator[Finding]:
        data, parts = self.run.data, self.parts
        named = {data.train_split: parts.train_dataset, data.eval_split: parts.eval_dataset}
        skip, chosen = data.on_bad_sample == "skip", dict[str, list[dict[str, Tensor]]]()
        for split, dataset in named.items():
            if dataset is None:
                continue
            found = self.masks[split] = split_masks(dataset, self.limits.masks, skip_bad=skip)
            yield mask_finding(split, found.facts, complete=found.complete, lost=found.lost)
            chosen[split] = choose(dataset, found, self.limits.images, skip_bad=skip)
        # In turn, so that few images are of both splits too.
        longest = max(map(len, chosen.values()))
        turns = [(s, own[i]) for i in range(longest) for s, own in chosen.items() if i < len(own)]
        self.splits, self.samples = [s for s, _ in turns], [sample for _, sample in turns]
        if len(self.names) == 2 and not self._has_guide:
            yield _worst(_of_split(inverted_finding(m.facts), s) for s, m in self.masks.items())
        if len(self.names) > 2:
            facts = [f for found in self.masks.values() for f in found.facts]
            yield occurrence_finding(facts, self.names)

    @property
    def _has_guide(self) -> bool:
        """Whether there is a network that has seen such pictures: a teacher or a saved student."""
        return self.parts.teacher is not None or self.run.model.student is not None

    def _networks(self) -> Iterator[Finding]:
        teacher = None if self.parts.teacher is None else self.parts.teacher.to(self.device)
        student = self.student if self.run.model.student is not None else None
        if not self.samples:
            return
        look(
            self.seen,
            self.samples,
            teacher,
            student,
            statistics=self.statistics,
            seconds=self.limits.networks,
        )
        self.constant, label = constant_miou(
            self.seen.labels(), self.seen.num_labels, self.seen.ignore_index
        )
        if teacher is not None:
            yield output_finding(self.seen.output)
            yield from self._sizes()
        # Where masks hold one class, nothing is better than a constant.
        self.judged = self.constant < 1
        if self._has_guide and self.judged:
            yield from self._against_masks()
        if teacher is not None and self.judged:
            figure, images = self._miou(self.seen.teacher), len(self.seen.teacher)
            yield quality_finding(figure, self.constant, self.names[label], images)
            if student is not None:
                yield student_finding(figure, self._miou(self.seen.student))

    def _copy(self) -> SmpForSemanticSegmentation:
        student = copy.deepcopy(self.parts.student)
        network: nn.Module = student
        use_fast_layers(network.to(self.device).eval())
        return student

    def _miou(self, classes: list[Tensor]) -> float:
        return miou(self.seen.rows(classes), self.seen.num_labels)

    def _against_masks(self) -> Iterator[Finding]:
        """Masks that are inverted, mixed up or elsewhere, as a network sees it."""
        classes = self._in_each_split(self._classes)
        yield classes
        if classes.grade == Grade.FAULT:
            self.judged = False  # what else could be said is but its consequence
            return
        yield self._in_each_split(self._position)

    def _in_each_split(self, check: Callable[[list[int]], Finding]) -> Finding:
        """A check of all images, and if they pass of each split: half of them cannot outvote it."""
        together = list(range(len(self.seen.samples)))
        found = check(together)
        if found.grade != Grade.OK:
            return found
        own = {s: [i for i in together if self.splits[i] == s] for s in set(self.splits)}
        apart = [_of_split(check(o), s) for s, o in sorted(own.items()) if len(o) >= ENOUGH]
        return _worst([found, *apart])

    def _guide(self) -> tuple[list[Tensor], str]:
        seen = self.seen
        return (seen.teacher, "the teacher") if seen.teacher else (seen.student, "the student")

    def _classes(self, images: list[int]) -> Finding:
        guide, whose = self._guide()
        rows = self.seen.rows(guide)[images]
        return classes_finding(rows, self.names, constant=self._constant(images), whose=whose)

    def _position(self, images: list[int]) -> Finding:
        guide, whose = self._guide()
        return position_finding(
            torch.stack(guide)[images],
            self.seen.labels()[images],
            self.seen.num_labels,
            ignore_index=self.seen.ignore_index,
            constant=self._constant(images),
            whose=whose,
        )

    def _constant(self, images: list[int]) -> float:
        labels = self.seen.labels()[images]
        return constant_miou(labels, self.seen.num_labels, self.seen.ignore_index)[0]

    def _sizes(self) -> Iterator[Finding]:
        teacher, folder = self.parts.teacher, Path(self.run.model.teacher)
        assert teacher is not None
        network, file = teacher.network, folder / "config.json"
        if not isinstance(network, SmpForSemanticSegmentation) or not file.is_file():
            return  # a bare state dict does not say what it was trained with
        # A folder of smp's own does not say so either.
        if "image_size" in read_config(folder):
            given = teacher.image_size or self.run.data.image_size
            yield input_size_finding(int(network.config.image_size), given)

    def _normalisation(self) -> Iterator[Finding]:
        teacher, seen, limit = self.parts.teacher, self.seen, self.limits.normalisation
        if teacher is None or not self.judged:
            return
        present = present_feeding(teacher)
        ways = alternatives(present)
        straight = {name: way for name, way in ways.items() if not way.bgr}
        fits = misfits(seen, teacher, straight | {PRESENT: present}, limit / 4)
        others = {}
        if self._miou(seen.teacher) <= 1 - MARGIN:  # else none can be clearly better
            others = fed_otherwise(seen, teacher, ways, limit)
        images = len(next(iter(others.values()), seen.teacher))
        trials = Trials(ways, seen.rows(seen.teacher[:images]), others, fits)
        yield normalisation_finding(trials, seen.num_labels, constant=self.constant)

    def _shared(self) -> Iterator[Finding]:
        if self.parts.eval_dataset is None:
            return
        shared = shared_images(
            self.parts.train_dataset, self.parts.eval_dataset, self.limits.hashing
        )
        if shared is None:
            yield ok("shared images", "not looked for in streams and remote files")
        else:
            yield sharing_finding(shared)

    def _loss(self) -> Iterator[Finding]:
        taught = self.parts.teacher is not None

        def compute(student: Tensor, teacher: Tensor, labels: Tensor) -> Any:
            guide = teacher if taught else None
            return terms_of_run(self.run, self.parts, student, guide, {"labels": labels})

        config = self.parts.student.config
        yield degenerate_finding(int(config.classes), compute)
        if not self.seen.samples or not any(self.parts.loss_weights.effective().values()):
            return
        start = time.monotonic()
        gradients = backward(
            self.run, self.parts, self.student, self.seen, statistics=self.statistics
        )
        own = (time.monotonic() - start) / min(GRADIENT_IMAGES, len(self.seen.samples))
        self.step_seconds = self.seen.seconds + own
        self.eval_seconds = self.seen.seconds + own / _BACKWARD
        yield share_finding(gradients)
        yield parameter_finding(gradients)

    def _plan(self) -> Iterator[Finding]:
        args, units = self.run.training, len(encoder_units(self.parts.student))
        steps = steps_per_epoch(image_count(self.parts.train_dataset), args)
        yield plan_finding(args.schedule(units, length_in_epochs(args, steps), steps))

    def _disk(self) -> Iterator[Finding]:
        folder = Path(str(self.run.training.output_dir)).absolute()
        there = next(place for place in (folder, *folder.parents) if place.exists())
        yield disk_finding(
            disk_need(self.run, self.parts), shutil.disk_usage(there).free, str(there)
        )


def _of_split(finding: Finding, split: str) -> Finding:
    """The finding with the name of the split in which something is wrong."""
    if finding.grade == Grade.OK:
        return finding
    return replace(finding, text=f"{finding.text} (in the split {split})")


def _worst(findings: Iterable[Finding]) -> Finding:
    """The first fault, else the first note, else the first finding."""
    order = [Grade.FAULT, Grade.NOTE, Grade.OK]
    return min(findings, key=lambda finding: order.index(finding.grade))


def check_before_training(run: RunArguments, parts: Parts) -> None:
    """The quick preflight of a training; prints what it found.

    The first process looks, and tells the others what it has found at fault.

    Raises:
        ValueError: if the training would be pointless; says why, and what to do.
    """
    message: list[str | None] = [None]
    if run.training.process_index == 0:
        start = time.monotonic()
        if run.training.keep_freed_memory and run.training.device.type == "cpu":
            keep_freed_memory()  # as the training will: its networks run here first
        findings = list(Preflight(run, parts, QUICK).findings())
        message = [error_message(findings)]
        if message[0] is None:
            print(summary(findings, time.monotonic() - start), flush=True)
    if run.training.world_size > 1:
        broadcast_object_list(message)
    if message[0] is not None:
        raise ValueError(message[0])
