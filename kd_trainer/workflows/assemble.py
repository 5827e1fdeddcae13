"""From settings to the objects of a run; what is wrong is found here, before it starts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from transformers import set_seed

from kd_trainer.arguments import DataArguments
from kd_trainer.command_line import RunArguments
from kd_trainer.data import (
    SegmentationTransform,
    StreamedDataset,
    TransformedDataset,
    load_splits,
    transforms,
)
from kd_trainer.image_processing import SmpImageProcessor
from kd_trainer.losses import LossWeights
from kd_trainer.losses.checks import check_pos_weight
from kd_trainer.modeling import SmpForSemanticSegmentation, check_image_size
from kd_trainer.teacher import Teacher
from kd_trainer.workflows.models import make_student, make_teacher


@dataclass
class Parts:
    """The objects of a run."""

    student: SmpForSemanticSegmentation
    teacher: Teacher | None
    train_dataset: TransformedDataset | StreamedDataset
    eval_dataset: TransformedDataset | StreamedDataset | None
    processor: SmpImageProcessor
    loss_weights: LossWeights


def evaluation_dataset(
    data: DataArguments, *, batch_size: int
) -> TransformedDataset | StreamedDataset:
    """The evaluation split, without augmentation."""
    splits = load_splits(data, [data.eval_split])
    _, transform = transforms(splits, data, seed=0, every_class=False)
    rows = splits[data.eval_split]
    if data.streaming:
        return StreamedDataset(rows, transform, shuffle=False, seed=0, batch_size=batch_size)
    return TransformedDataset(rows, transform)


def assemble(run: RunArguments) -> Parts:
    """Everything a training needs, checked."""
    if not run.data.dataset:
        raise ValueError(
            "Expected --dataset (a folder, a json, a parquet file, a Hub id or `synthetic`), got "
            "none."
        )
    args, data = run.training, run.data
    _check_together(run)
    check_pos_weight(args.pos_weight, 1 if data.num_labels == 2 else data.num_labels)
    names = [data.train_split, *([data.eval_split] if args.eval_strategy != "no" else [])]
    splits = load_splits(data, names)
    for_training, for_evaluation = transforms(splits, data, seed=args.seed)
    set_seed(args.seed)  # the student's random weights
    student = make_student(run.model, data)
    check_image_size(data.image_size, student)
    if args.sync_batchnorm:
        student.synchronise_batchnorm()
    teacher = make_teacher(run.model, student, image_size=data.image_size)
    if teacher is not None:
        _check_channels(student)
    train_dataset = _training_dataset(splits[data.train_split], for_training, run)
    _check_enough(train_dataset, run)
    weights = args.loss_weights
    return Parts(
        student=student,
        teacher=teacher,
        train_dataset=train_dataset,
        eval_dataset=_evaluation_dataset(splits.get(data.eval_split), for_evaluation, run),
        processor=SmpImageProcessor.from_model_config(student.config),
        loss_weights=weights if teacher is not None else replace(weights, kl=0.0, mse=0.0),
    )


def _check_together(run: RunArguments) -> None:
    """Refuse settings of model, data and training that do not go together."""
    if not run.model.teacher:
        raise ValueError(
            "Expected --teacher (a folder, a Hub id or a weight file), got nothing. Name one, or "
            "train the student alone with --teacher none."
        )
    if run.data.unlabelled is not None and not run.model.has_teacher:
        raise ValueError(
            "Expected a --teacher with --unlabelled, got none: nothing else says what is on these "
            "photographs. Name a teacher, or leave --unlabelled out."
        )


def _check_channels(student: SmpForSemanticSegmentation) -> None:
    """Refuse a student of two channels beside a teacher, who answers for two classes with one."""
    if student.config.classes == 2:
        raise ValueError(
            "Expected a student with one logit for two classes beside a teacher, got one with two "
            "channels (a softmax) as --student. Take it as --teacher of a new student, or go on "
            "from it with --teacher none."
        )


def image_count(dataset: TransformedDataset | StreamedDataset) -> int:
    """Images of all processes; the length of a stream is that of this process's share."""
    return dataset.rows if isinstance(dataset, StreamedDataset) else len(dataset)


def _check_enough(dataset: TransformedDataset | StreamedDataset, run: RunArguments) -> None:
    """Refuse a training set of less than one batch: a short batch is dropped."""
    args = run.training
    images = image_count(dataset)
    needed = args.train_batch_size * args.world_size
    if args.dataloader_drop_last and images < needed:
        raise ValueError(
            f"Expected at least {needed} training images (one batch), got {images}. Lower "
            "--batch_size or add images."
        )


def _training_dataset(
    rows: Any, transform: SegmentationTransform, run: RunArguments
) -> TransformedDataset | StreamedDataset:
    args = run.training
    if not run.data.streaming:
        return TransformedDataset(rows, transform)
    return StreamedDataset(
        rows,
        transform,
        shuffle=True,
        seed=args.seed,
        batch_size=args.per_device_train_batch_size,
        rank=args.process_index,
        world_size=args.world_size,
        even=True,
    )


def _evaluation_dataset(
    rows: Any, transform: SegmentationTransform, run: RunArguments
) -> TransformedDataset | StreamedDataset | None:
    args = run.training
    if rows is None:
        return None
    if not run.data.streaming:
        return TransformedDataset(rows, transform)
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
    )
