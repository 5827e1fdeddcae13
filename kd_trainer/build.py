"""From settings to the objects of a run; what is wrong is found here, before it starts."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import set_seed
from transformers.image_processing_backends import TorchvisionBackend

from kd_trainer.accepted import check_self_taught
from kd_trainer.arguments import BALANCED, DistillationArguments
from kd_trainer.config import RunArguments
from kd_trainer.data import (
    BadSample,
    MaskRule,
    SegmentationTransform,
    StreamedDataset,
    TransformedDataset,
    learned,
    load_splits,
    sample_rows,
    transforms,
    usable_splits,
)
from kd_trainer.data.channels import measured
from kd_trainer.data.listing import MissingSplitError
from kd_trainer.data.planes import PlaneRule
from kd_trainer.data.quota import has_mask, quota_sampler
from kd_trainer.data.sources import LoadedSplits, load_source
from kd_trainer.data_arguments import DataArguments
from kd_trainer.errors import announce, clipped
from kd_trainer.fast_layers import keep_freed_memory, use_fast_layers
from kd_trainer.feature_maps import check_one_network
from kd_trainer.found_settings import balance_classes, learn_from_sources
from kd_trainer.loading import (
    make_student,
    make_teacher,
    network_name,
    saved_channels,
    student_options,
)
from kd_trainer.losses import LossWeights
from kd_trainer.losses.checks import check_pos_weight
from kd_trainer.models.modeling import SmpForSemanticSegmentation
from kd_trainer.students import (
    channels_of,
    channels_seen,
    check_student_size,
    has_several_labels,
    image_size_of,
    processor_of,
    set_free_units,
    student_logits,
)
from kd_trainer.teacher import Teacher
from kd_trainer.teacher_maps import use_teacher_maps


@dataclass
class RunComponents:
    """The objects of a run.

    `held_out` names the images to evaluate on, where they are a share of those to train on.
    """

    student: nn.Module
    teacher: Teacher | None
    train_dataset: TransformedDataset | StreamedDataset
    eval_dataset: TransformedDataset | StreamedDataset | None
    processor: TorchvisionBackend
    loss_weights: LossWeights
    held_out: tuple[str, ...] = ()

    @property
    def bad_samples(self) -> list[BadSample]:
        """What `--on_bad_sample skip` has left out of both data sets."""
        datasets = (self.train_dataset, self.eval_dataset)
        return [bad for dataset in datasets if dataset is not None for bad in dataset.bad_samples]


def evaluation_dataset(
    data: DataArguments, *, batch_size: int, workers: int = 0, apart_from: str | None = None
) -> TransformedDataset | StreamedDataset:
    """The evaluation split, without augmentation and without what `--on_bad_sample` leaves out.

    Where the split `apart_from` is held out of this one, without its images too.
    Its samples are as large as `--eval_size` says.
    """
    name = data.eval_split
    loaded = {name: load_splits(data, [name, *([apart_from] if apart_from else [])])[name]}
    splits, bad = usable_splits(loaded, data, every_class=False, workers=workers)
    _, transform = transforms(splits, data, seed=0, every_class=False)
    transform.eval_size = data.eval_size
    _announce_rule(transform.rule)
    if data.streaming:
        return StreamedDataset(
            splits[name],
            transform,
            shuffle=False,
            seed=0,
            batch_size=batch_size,
            max_bad_share=_bad_share(data),
            name=name,
        )
    return TransformedDataset(splits[name], transform, bad[name])


def speed_up(student: nn.Module, args: DistillationArguments) -> None:
    """What changes the student's layers and this process, which is why no constructor does it."""
    use_fast_layers(student)
    if args.keep_freed_memory and args.device.type == "cpu":
        keep_freed_memory()


def _bad_share(data: DataArguments) -> float | None:
    return data.max_bad_share if data.on_bad_sample == "skip" else None


def _announce_rule(rule: MaskRule | PlaneRule) -> None:
    """Say how masks are read, in one line, where somebody could want it otherwise."""
    if isinstance(rule, MaskRule) and rule.note:
        announce(rule.note)


def build_run(run: RunArguments) -> RunComponents:
    """Everything a training needs, checked; `run` learns the class names of its source."""
    if not run.data.dataset:
        raise ValueError(
            "Expected --dataset (a folder, a json, a parquet file, a Hub id or `synthetic`), got "
            "none."
        )
    args, data = run.training, run.data
    if run.model.teacher_maps is not None:  # they are read as cached targets are
        args.teacher_targets = "cached"
    _check_together(run)
    loaded = _load(run)
    data = learn_from_sources(run, loaded.splits)
    channels = 1 if data.label_count == 2 or data.multi_label else data.label_count
    if args.class_weights != BALANCED:
        check_pos_weight(args.class_factors, channels)
    weights = args.loss_weights if run.model.is_taught else args.loss_weights.without_teacher()
    weights.check_channels(channels)
    if data.multi_label:
        _check_several(run)
    workers, several = args.dataloader_num_workers, args.world_size > 1
    splits, bad = usable_splits(loaded.splits, data, workers=workers, shared=several)
    data = _measure_channels(run, splits[data.train_split])
    for_training, for_evaluation = transforms(splits, data, seed=args.seed)
    if isinstance(for_training.rule, MaskRule):
        data = run.data = learned(for_training.rule, data)
        _announce_rule(for_training.rule)
        if args.class_weights == BALANCED:
            balance_classes(run, splits[data.train_split], for_training.rule)
    set_seed(args.seed)  # the student's random weights
    student = make_student(run.model, data)
    check_student_size(data.image_size, student)
    if args.sync_batchnorm:
        if not isinstance(student, SmpForSemanticSegmentation):
            raise ValueError(
                "Expected a student of smp with --sync_batchnorm, got a "
                f"{type(student).__name__}. Leave it out."
            )
        student.synchronise_batchnorm()
    teacher = make_teacher(run.model, student, image_size=data.image_size)
    if run.model.has_teacher:
        _check_channels(student)
    train, evaluation = data.train_split, data.eval_split
    train_dataset = _training_dataset(splits[train], for_training, run, bad[train])
    eval_dataset = None
    if evaluation in splits:
        eval_dataset = _evaluation_dataset(splits[evaluation], for_evaluation, run, bad[evaluation])
    _check_enough(train_dataset, run, student)
    if run.model.teacher_maps is not None:
        datasets, names = (train_dataset, eval_dataset), list(data.id2label.values())
        teacher = use_teacher_maps(run.model.teacher_maps, datasets, names)
    return RunComponents(
        student=student,
        teacher=teacher,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processor=_processor(student, data),
        loss_weights=weights,
        held_out=loaded.held_out,
    )


def _load(run: RunArguments) -> LoadedSplits:
    """The splits of the run; says how to train where there is none to evaluate on."""
    data, evaluates = run.data, run.training.eval_strategy != "no"
    try:
        loaded = load_source(data, [data.train_split, *([data.eval_split] if evaluates else [])])
    except MissingSplitError as error:
        if error.split != data.eval_split:
            raise
        raise MissingSplitError(
            error.split,
            f"{error} A set that has none is trained on by train.py with --eval_strategy no.",
        ) from None
    _check_some_unlabelled(run, loaded.splits[data.train_split])
    return loaded


def _processor(student: nn.Module, data: DataArguments) -> TorchvisionBackend:
    """The student's image processor, which also says how the masks it learned from were read."""
    return processor_of(student, **({"do_reduce_labels": True} if data.reduce_labels else {}))


def _check_several(run: RunArguments) -> None:
    """Say what several labels a pixel mean, and refuse what knows one only."""
    given = {name: getattr(run.training, name) for name in ("class_weights", "pos_weight")}
    if wrong := [f"--{name} {value}" for name, value in given.items() if value is not None]:
        raise ValueError(
            f"Expected no {wrong[0]} with --multi_label, got it: that knows one class a pixel "
            "only, so far. Leave it out."
        )
    names = clipped(", ".join(run.data.id2label.values()), 200)
    announce(f"Several labels a pixel: a sigmoid for each of {names}, no background.")


def _measure_channels(run: RunArguments, rows: Any) -> DataArguments:
    """Mean and std of the channels, as the configuration then has them.

    A saved student goes on with its own: its weights expect them.
    """
    data = run.data
    if data.in_channels is None or data.channel_mean is not None:
        return data
    if run.model.student and (saved := saved_channels(run.model.student, data.in_channels)):
        announce("Channels are normalised as those of the saved student were.")
        run.data = replace(data, channel_mean=saved[0], channel_std=saved[1])
        return run.data
    mean, std, images = measured(sample_rows(rows), data.in_channels)
    told = ", ".join(f"{m:g} ± {s:g}" for m, s in zip(mean, std, strict=True))
    announce(
        f"Channels of {images:,} training images, bytes / 255, 16 bits / 65535, floats as they "
        f"are: {told} (--channel_mean, --channel_std). No augmentation of colours: only geometry."
    )
    run.data = replace(data, channel_mean=mean, channel_std=std)
    return run.data


def _check_together(run: RunArguments) -> None:
    """Refuse settings of model, data and training that do not go together."""
    if run.model.student is None:
        student_options(run.model)
    if not run.model.teacher and not run.model.is_taught:
        raise ValueError(
            "Expected --teacher (a folder, a Hub id or a weight file), got nothing. Name one, or "
            "train the student alone with --teacher none."
        )
    run.training.loss_weights.check_teacher(taught=run.model.is_taught)
    if run.model.has_teacher:
        several = len(run.model.teachers) > 1 or run.model.teacher_flip
        maps = run.model.teacher_maps is not None
        check_one_network(run.training.loss_weights, several=several, maps=maps)
    if run.training.adaptive_weight and not run.model.has_teacher:
        raise ValueError(
            "Expected a --teacher with --adaptive_weight, got none. Name a teacher, or leave it "
            "out."
        )
    if run.data.unlabelled is not None and not run.model.is_taught:
        raise ValueError(
            "Expected a --teacher with --unlabelled, got none: nothing else says what is on these "
            "photographs. Name a teacher, let the student teach itself with --teacher self, or "
            "leave --unlabelled out."
        )
    if run.model.teaches_itself:
        _check_self_taught(run)
    shown = run.training.per_device_train_batch_size * max(1, run.data.strong_views)
    if run.data.cutmix > 0 and shown < 2:
        raise ValueError(
            "Expected --batch_size of at least 2 with --cutmix, got 1: an image is mixed with "
            "another one of its batch. Raise it, or leave --cutmix out."
        )
    if run.data.streaming and run.training.labelled_share is not None:
        raise ValueError(
            "Expected indexed data with --labelled_share, got --streaming, which reads the rows as "
            "they come. Leave one of them out."
        )
    if run.training.teacher_targets == "cached":
        if not run.model.has_teacher:
            raise ValueError(
                "Expected a --teacher with --teacher_targets cached, got none. Name a teacher, or "
                "leave it out."
            )
        if run.data.streaming:
            raise ValueError(
                "Expected indexed data with --teacher_targets cached, got --streaming, which does "
                "not read the data before the training. Leave one of them out."
            )


def _check_self_taught(run: RunArguments) -> None:
    """Refuse what only a teacher with a file has, and say what teaches the student."""
    args = run.training
    cached = args.teacher_targets == "cached"
    for name in ["teacher_targets"] * cached + ["compile_teacher"] * args.compile_teacher:
        raise ValueError(
            f"Expected no --{name} with --teacher self, got {getattr(args, name)}: the average of "
            "the student changes in each step. Leave one of them out."
        )
    check_self_taught(args)
    announce(
        "The student teaches itself: its moving average answers on images without masks "
        f"(ema_decay {args.ema_decay:g}, pseudo_confidence {args.pseudo_confidence:g}, "
        f"strong_views {run.data.strong_views}, labelled_share "
        f"{' '.join(args.labelled_share or ['none'])}; weights: {_told(args.loss_weights)})."
    )


def _check_some_unlabelled(run: RunArguments, rows: Any) -> None:
    """Refuse a student that would teach itself on no image; of a stream nobody knows."""
    if run.model.teaches_itself and not run.data.streaming and has_mask(rows).all():
        raise ValueError(
            "Expected images without masks with --teacher self, got masks of all "
            f"{len(rows):,}: it is on the others that the student teaches itself. Name a folder "
            "with --unlabelled, or train with --teacher none."
        )


def _told(weights: LossWeights) -> str:
    factors = weights.effective().items()
    return ", ".join(f"{name} {factor:g}" for name, factor in factors if factor)


def _check_channels(student: nn.Module) -> None:
    """Refuse a student of two channels beside a teacher, who answers for two classes with one."""
    if channels_of(student) == 2 and not has_several_labels(student):
        raise ValueError(
            "Expected a student with one logit for two classes beside a teacher, got one with two "
            "channels (a softmax) as --student. Take it as --teacher of a new student, or go on "
            "from it with --teacher none."
        )


def image_count(dataset: TransformedDataset | StreamedDataset) -> int:
    """Images of all processes; the length of a stream is that of this process's share."""
    return dataset.rows if isinstance(dataset, StreamedDataset) else len(dataset)


def images_an_epoch(
    dataset: TransformedDataset | StreamedDataset, args: DistillationArguments
) -> int:
    """Images that all processes draw in an epoch: with `--labelled_share` some come repeatedly."""
    if args.labelled_share is None:
        return image_count(dataset)
    return len(quota_sampler(dataset, args))


def _check_unlabelled(dataset: TransformedDataset | StreamedDataset, run: RunArguments) -> None:
    """Refuse pseudo labels where each image has a mask; a stream does not say whether it has."""
    weight = run.training.loss_weights.pseudo
    if weight == 0 or isinstance(dataset, StreamedDataset):
        return
    if has_mask(dataset.dataset).all():
        raise ValueError(
            f"Expected images without masks with --pseudo_weight {weight:g}, got a mask for each "
            f"of the {len(dataset):,} training images. Name a folder of images without masks "
            "(--unlabelled), or leave it out."
        )


def _check_enough(
    dataset: TransformedDataset | StreamedDataset,
    run: RunArguments,
    student: nn.Module,
) -> None:
    """Refuse a training set of less than one batch: a short batch is dropped.

    Also one with batches too small for the student, or without what the settings need.
    """
    _check_unlabelled(dataset, run)
    args = run.training
    images = images_an_epoch(dataset, args)
    needed = args.train_batch_size * args.world_size
    if args.dataloader_drop_last and images < needed:
        raise ValueError(
            f"Expected at least {needed} training images (one batch), got {images}. Lower "
            "--batch_size or add images."
        )
    streamed = isinstance(dataset, StreamedDataset)
    check_smallest_batch(student, images, args, streamed=streamed)


def _training_dataset(
    rows: Any, transform: SegmentationTransform, run: RunArguments, bad: list[BadSample]
) -> TransformedDataset | StreamedDataset:
    args = run.training
    if not run.data.streaming:
        return TransformedDataset(rows, transform, bad)
    return StreamedDataset(
        rows,
        transform,
        shuffle=args.train_sampling_strategy == "random",
        seed=args.seed if args.data_seed is None else args.data_seed,
        batch_size=args.per_device_train_batch_size,
        rank=args.process_index,
        world_size=args.world_size,
        even=True,
        max_bad_share=_bad_share(run.data),
        name=run.data.train_split,
    )


def _evaluation_dataset(
    rows: Any, transform: SegmentationTransform, run: RunArguments, bad: list[BadSample]
) -> TransformedDataset | StreamedDataset:
    args = run.training
    if not run.data.streaming:
        return TransformedDataset(rows, transform, bad)
    return StreamedDataset(
        rows,
        transform,
        shuffle=False,
        seed=args.seed,
        batch_size=args.per_device_eval_batch_size,
        rank=args.process_index,
        world_size=args.world_size,
        padded=True,
        ignore_index=run.data.ignore_index,
        max_bad_share=_bad_share(run.data),
        name=run.data.eval_split,
    )


class _OneValueError(Exception):
    """A BatchNorm would have to normalise by the variance of a single value."""


def smallest_batch(images: int, args: DistillationArguments, *, streamed: bool) -> int:
    """Images of the smallest training batch of a process that will occur.

    Only the last batch of an epoch is short, and a run may end before it.

    Args:
        images: of all processes.
        args: batch size, whether a last short batch is dropped, and the length of the run.
        streamed: whether each process reads a share of its own; else accelerate fills up the last
            batch where there are several processes.
    """
    batch, processes = args.per_device_train_batch_size, args.world_size
    if args.dataloader_drop_last or (processes > 1 and not streamed):
        return batch
    share = images // processes
    updates = math.ceil(math.ceil(share / batch) / args.gradient_accumulation_steps)
    first_epoch = math.ceil(min(1.0, args.num_train_epochs) * updates)
    if (args.max_steps if args.max_steps > 0 else first_epoch) < updates:
        return batch
    return share % batch or batch


def check_smallest_batch(
    student: nn.Module, images: int, args: DistillationArguments, *, streamed: bool
) -> None:
    """Refuse batches of one image for a network with a BatchNorm behind a pooling to one pixel.

    Raises:
        ValueError: if there will be such a batch; torch says so at the end of the first epoch only.
    """
    alone = smallest_batch(images, args, streamed=streamed) == 1
    if not alone or args.sync_batchnorm or not _needs_two(student):
        return
    if args.per_device_train_batch_size == 1:
        got, cure = "--batch_size 1", "Set --batch_size 2 or more"
    else:
        got = f"a last batch of one ({images:,} images, --dataloader_drop_last false)"
        cure = "Set --dataloader_drop_last true, or another --batch_size"
    name = network_name(student).split()[0]
    raise ValueError(
        f"Expected batches of at least 2 images for {name}, a BatchNorm of "
        f"which sees one value of each channel in one image, got {got}. {cure}."
    )


@torch.no_grad()
def _needs_two(student: nn.Module) -> bool:
    network = copy.deepcopy(student)
    set_free_units(network, None)
    network.train()

    def look(_: nn.Module, given: Any) -> None:
        if given[0].numel() == given[0].shape[1]:
            raise _OneValueError

    for module in network.modules():
        if isinstance(module, _BatchNorm):
            module.register_forward_pre_hook(look)
    pixels = torch.zeros(1, channels_seen(student), *image_size_of(student))
    try:
        with torch.random.fork_rng(devices=[]):
            student_logits(network, pixels)
    except _OneValueError:
        return True
    return False
