"""The checks of a run before it starts: quickly before each training, at length in doctor.py.

Nothing of the run is changed: the student is copied, no data set is told an epoch, and the random
state is put back, so that a training goes the same way with and without its preflight.
"""

from __future__ import annotations

import copy
import random
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from tqdm import tqdm

from kd_trainer.build import RunComponents, images_an_epoch
from kd_trainer.config import RunArguments
from kd_trainer.costs import length_in_epochs, steps_per_epoch
from kd_trainer.data import TransformedDataset
from kd_trainer.data.quota import has_mask
from kd_trainer.doctor.data import (
    SplitMasks,
    choose_samples,
    inverted_finding,
    label_finding,
    mask_finding,
    occurrence_finding,
    read_masks,
    shared_images,
    sharing_finding,
    within,
)
from kd_trainer.doctor.finding import Finding, Grade, error_message, ok, summary, worst
from kd_trainer.doctor.input_convention import normalisation_finding, try_conventions
from kd_trainer.doctor.loss import (
    GRADIENT_IMAGES,
    degenerate_finding,
    first_gradients,
    loss_of,
    parameter_finding,
    share_finding,
)
from kd_trainer.doctor.resources import disk_finding, disk_need, plan_finding
from kd_trainer.doctor.teacher import (
    ENOUGH,
    OutputRange,
    Predictions,
    classes_finding,
    input_size_finding,
    output_finding,
    position_finding,
    quality_finding,
    student_finding,
)
from kd_trainer.evaluation import (
    EvaluatedBatch,
    Evaluator,
    is_multi_label,
    labels_of,
    masks_of,
)
from kd_trainer.fast_layers import keep_freed_memory, logits_of, use_fast_layers
from kd_trainer.feature_maps import feature_pairs, paired
from kd_trainer.models.config_checks import read_config
from kd_trainer.models.modeling import SmpForSemanticSegmentation
from kd_trainer.reports.contents import STUDENT, TEACHER
from kd_trainer.students import channels_of, has_new_head, reads_own_depth, units_of
from kd_trainer.teacher_ensemble import TeacherEnsemble

Sample = dict[str, Tensor]


@dataclass(frozen=True)
class Limits:
    """Images of each split, and seconds for each of the longer stages."""

    images: int
    masks: float
    networks: float
    normalisation: float
    hashing: float


QUICK = Limits(images=8, masks=0.5, networks=4.0, normalisation=2.5, hashing=1.0)
THOROUGH = Limits(images=16, masks=2.0, networks=12.0, normalisation=12.0, hashing=5.0)


class _InTime(IterableDataset[Sample]):
    """Samples until time is up, but enough for a backward pass."""

    def __init__(self, samples: Sequence[Sample], seconds: float) -> None:
        self.samples, self.seconds = samples, seconds

    def __iter__(self) -> Iterator[Sample]:
        return within(self.seconds, self.samples, least=GRADIENT_IMAGES)


class _NetworkOutputs:
    """What the networks give for each image of a pass.

    Attributes:
        classes: of `student` and `teacher`, masks of `masks_of`, one an image.
        teacher_logits: of the first `GRADIENT_IMAGES`.
        range: of what the teacher's network gives, before logits of the student's kind are made
            of it.
    """

    def __init__(self, *, multi_label: bool) -> None:
        self.multi_label = multi_label
        self.classes: dict[str, list[Tensor]] = {STUDENT: [], TEACHER: []}
        self.teacher_logits: list[Tensor] = []
        self.range = OutputRange()

    def __call__(self, batch: EvaluatedBatch) -> None:
        for name, logits in batch.logits.items():
            self.classes[name].append(masks_of(logits, multi_label=self.multi_label).cpu())
        if TEACHER in batch.logits and len(self.teacher_logits) < GRADIENT_IMAGES:
            self.teacher_logits.append(batch.logits[TEACHER])

    def add_range(self, _: nn.Module, __: Any, output: Any) -> None:
        """Forward hook of the teacher's network."""
        self.range = self.range.add(logits_of(output))


class Preflight:
    """The checks of one run.

    Args:
        run: its settings.
        parts: its objects; they stay as they are, but for the teacher's device.
        limits: how much to look at.

    Attributes:
        step_seconds: about what a training image took with its backward pass; 0 if there was none.
        eval_seconds: about what an evaluation image takes.
    """

    def __init__(self, run: RunArguments, parts: RunComponents, limits: Limits) -> None:
        self.run, self.parts, self.limits = run, parts, limits
        self.names = labels_of(parts.student)
        self.device = run.training.device
        self.student = copy.deepcopy(parts.student)
        self.masks: dict[str, SplitMasks] = {}
        self.samples: list[Sample] = []
        self.splits: list[str] = []  # that the samples are of
        self.several = is_multi_label(parts.student)
        self.outputs = _NetworkOutputs(multi_label=self.several)
        self.judged = False  # whether the networks can be compared with the masks
        self.step_seconds = self.eval_seconds = 0.0

    def findings(self) -> Iterator[Finding]:
        """All of them, stage by stage; the random state is left as it was."""
        stages = {
            "masks": self._masks,
            "networks": self._networks,
            "normalisation": self._normalisation,
            "shared images": self._shared,
            "loss": self._loss,
            "plan": self._plan,
            "disk": self._disk,
        }
        quiet = True if self.run.training.disable_tqdm else None
        bar = tqdm(stages.items(), "preflight", unit="stage", leave=False, disable=quiet)
        with untouched_random_state(self.device):
            for name, stage in bar:
                bar.set_postfix_str(name)
                yield from stage()

    def _masks(self) -> Iterator[Finding]:
        data, parts = self.run.data, self.parts
        datasets = {data.train_split: parts.train_dataset, data.eval_split: parts.eval_dataset}
        skip_bad, chosen = data.on_bad_sample == "skip", {}
        for split, dataset in datasets.items():
            if dataset is not None:
                masks = read_masks(dataset, self.limits.masks, skip_bad=skip_bad)
                yield mask_finding(split, masks)
                samples = choose_samples(dataset, masks, self.limits.images, skip_bad=skip_bad)
                self.masks[split] = masks
                chosen[split] = [(split, sample) for sample in samples]
        # In turn, so that few images are of both splits too.
        pairs = [pair for turn in zip_longest(*chosen.values()) for pair in turn if pair]
        self.splits, self.samples = [split for split, _ in pairs], [s for _, s in pairs]
        every = [mask for split in self.masks.values() for mask in split.masks]
        if self.several:
            labels = {index + 1: name for index, name in self.names.items()}
            yield occurrence_finding(every, labels)
        elif len(self.names) > 2:
            yield occurrence_finding(every, self.names)
        elif self._reference() is None:
            apart = {split: inverted_finding(m.masks) for split, m in self.masks.items()}
            yield worst(_of_split(finding, split) for split, finding in apart.items())
        yield from self._labels()

    def _labels(self) -> Iterator[Finding]:
        dataset, args = self.parts.train_dataset, self.run.training
        if args.labelled_share is None and isinstance(dataset, TransformedDataset):
            labelled, batch = has_mask(dataset.dataset), args.train_batch_size
            if not labelled.all() and batch <= len(labelled):
                yield label_finding(int(labelled.sum()), len(labelled), batch)

    def _reference(self) -> str | None:
        """The network that has seen such images: the teacher or a saved student, if any."""
        if self.parts.teacher is not None:
            return TEACHER
        return STUDENT if self._knows_classes() else None

    def _knows_classes(self) -> bool:
        """Whether the student was trained before, with these classes."""
        return self.run.model.student is not None and not has_new_head(self.parts.student)

    def _networks(self) -> Iterator[Finding]:
        if not self.samples:
            return
        self._ask_networks()
        if self.parts.teacher is not None and not self.parts.teacher.from_samples:
            yield output_finding(self.outputs.range)
            yield from self._sizes()
        reference = self._reference()
        if reference is None:
            return
        predictions = self._predictions(reference)
        # Where masks hold one class, nothing is better than a constant.
        self.judged = predictions.constant_miou < 1
        if not self.judged:
            return
        classes = self._in_each_split(classes_finding, predictions)
        yield classes
        if classes.grade == Grade.FAULT:
            self.judged = False  # what else could be said is but its consequence
        else:
            yield self._in_each_split(position_finding, predictions)
        if reference == TEACHER and self.judged:
            yield quality_finding(predictions)
            if self._knows_classes():
                yield student_finding(predictions.miou, self._predictions(STUDENT).miou)

    def _ask_networks(self) -> None:
        teacher, network = self.parts.teacher, self.student
        use_fast_layers(network.eval())
        evaluator = Evaluator(network, teacher, self.run.data.ignore_index, self.device)
        hook = teacher and teacher.network.register_forward_hook(self.outputs.add_range)
        start = time.monotonic()
        try:
            timed = _InTime(self.samples, self.limits.networks)
            evaluator.run(timed, self.outputs, batch_size=1, batches=len(self.samples))
        finally:
            if hook:
                hook.remove()
        count = len(self.outputs.classes[STUDENT])
        self.samples, self.splits = self.samples[:count], self.splits[:count]
        self.eval_seconds = (time.monotonic() - start) / count

    def _predictions(self, network: str) -> Predictions:
        classes = torch.cat(self.outputs.classes[network])
        labels = torch.stack([sample["labels"] for sample in self.samples])
        ignore_index, whose = self.run.data.ignore_index, f"the {network}"
        return Predictions(classes, labels, self.names, ignore_index, whose)

    def _in_each_split(
        self, check: Callable[[Predictions], Finding], predictions: Predictions
    ) -> Finding:
        """A check of all images, and if they pass of each split: half of them cannot outvote it."""
        findings = [check(predictions)]
        if findings[0].grade == Grade.OK:
            for split in sorted(set(self.splits)):
                images = [i for i, name in enumerate(self.splits) if name == split]
                if len(images) >= ENOUGH:
                    findings.append(_of_split(check(predictions.of(images)), split))
        return worst(findings)

    def _sizes(self) -> Iterator[Finding]:
        teacher = self.parts.teacher
        assert teacher is not None
        network, folder = teacher.network, Path(self.run.model.teachers[0])
        file = folder / "config.json"
        if not isinstance(network, SmpForSemanticSegmentation) or not file.is_file():
            return  # a bare state dict does not say what it was trained with
        # A folder of smp's own does not say so either.
        if "image_size" in read_config(folder):
            used = teacher.image_size or self.run.data.image_size
            yield input_size_finding(network.config.image_size, used)

    def _normalisation(self) -> Iterator[Finding]:
        teacher = self.parts.teacher
        # The input of several is that of the student, and each has its own statistics behind it.
        if teacher is None or teacher.from_samples or isinstance(teacher.network, TeacherEnsemble):
            return
        if reads_own_depth(self.parts.student):
            yield ok("normalisation", "not tried in other ways: that of --in_channels was measured")
        elif self.judged:
            now, seconds = self._predictions(TEACHER), self.limits.normalisation
            yield normalisation_finding(try_conventions(teacher, self.samples, now, seconds))

    def _shared(self) -> Iterator[Finding]:
        training, evaluation = self.parts.train_dataset, self.parts.eval_dataset
        if evaluation is None:
            return
        shared = shared_images(training, evaluation, self.limits.hashing)
        if shared is None:
            yield ok("shared images", "not looked for in streams and remote files")
        else:
            yield sharing_finding(shared)

    def _loss(self) -> Iterator[Finding]:
        parts, loss = self.parts, loss_of(self.run, self.parts)
        channels = channels_of(parts.student)
        taught = parts.teacher is not None
        yield degenerate_finding(channels, loss, teacher=taught, multi_label=self.several)
        if not self.samples or not any(parts.loss_weights.effective().values()):
            return
        if parts.teacher is not None and parts.loss_weights.feature_terms:
            named = self.run.training.feature_pairs
            yield ok("feature maps", paired(feature_pairs(self.student, parts.teacher, named)))
        start = time.monotonic()
        logits = self.outputs.teacher_logits
        gradients = first_gradients(self.student, self.samples, logits, loss, parts)
        backward = (time.monotonic() - start) / min(GRADIENT_IMAGES, len(self.samples))
        self.step_seconds = self.eval_seconds + backward
        yield share_finding(gradients)
        yield parameter_finding(gradients)

    def _plan(self) -> Iterator[Finding]:
        args, units = self.run.training, len(units_of(self.parts.student))
        steps = steps_per_epoch(images_an_epoch(self.parts.train_dataset, args), args)
        yield plan_finding(args.schedule(units, length_in_epochs(args, steps), steps))

    def _disk(self) -> Iterator[Finding]:
        folder = Path(str(self.run.training.output_dir)).absolute()
        there = next(place for place in (folder, *folder.parents) if place.exists())
        free = shutil.disk_usage(there).free
        yield disk_finding(disk_need(self.run, self.parts), free, str(there))


def _of_split(finding: Finding, split: str) -> Finding:
    """The finding with the name of the split in which something is wrong."""
    if finding.grade == Grade.OK:
        return finding
    return replace(finding, text=f"{finding.text} (in the split {split})")


@contextmanager
def untouched_random_state(device: torch.device) -> Iterator[None]:
    """Put the generators of Python, numpy and torch back afterwards."""
    python, numbers = random.getstate(), np.random.get_state()
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numbers)


def check_before_training(run: RunArguments, parts: RunComponents) -> None:
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
