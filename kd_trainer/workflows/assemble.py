"""From settings to the objects of a run; what is wrong is found here, before it starts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, set_seed

from kd_trainer.arguments import DataArguments, ModelArguments
from kd_trainer.command_line import RunArguments
from kd_trainer.data import (
    SegmentationTransform,
    StreamedDataset,
    TransformedDataset,
    load_splits,
    transforms,
)
from kd_trainer.evaluation import Measured, input_statistics, labels_of
from kd_trainer.image_processing import SmpImageProcessor
from kd_trainer.losses import LossWeights
from kd_trainer.losses.checks import check_pos_weight
from kd_trainer.modeling import SmpForSemanticSegmentation, check_image_size, parameter_counts
from kd_trainer.teacher import Teacher, load_teacher
from kd_trainer.weights import SUFFIXES


@dataclass
class Parts:
    """The objects of a run."""

    student: SmpForSemanticSegmentation
    teacher: Teacher | None
    train_dataset: TransformedDataset | StreamedDataset
    eval_dataset: TransformedDataset | StreamedDataset | None
    processor: SmpImageProcessor
    loss_weights: LossWeights


# What a saved student has decided already.
_OF_A_NEW_STUDENT = ("student_arch", "student_encoder", "encoder_weights", "decoder_channels")


def make_student(model: ModelArguments, data: DataArguments) -> SmpForSemanticSegmentation:
    """A new student, or a saved one to go on from, for the images and names of this run."""
    if model.student is not None:
        student = load_student(model.student, num_labels=data.num_labels)
        student.config.image_size = data.image_size
        student.config.semantic_loss_ignore_index = data.ignore_index
        if data.class_names is not None:
            student.config.id2label = data.id2label
            student.config.label2id = {name: index for index, name in data.id2label.items()}
        return student
    options = {}
    if model.decoder_channels is not None:
        options["decoder_channels"] = tuple(model.decoder_channels)
    return SmpForSemanticSegmentation.create(
        model.student_arch,
        model.student_encoder,
        encoder_weights=model.encoder_weights,
        id2label=data.id2label,
        image_size=data.image_size,
        semantic_loss_ignore_index=data.ignore_index,
        **options,
    )


def load_student(
    source: str | Path, *, num_labels: int | None = None
) -> SmpForSemanticSegmentation:
    """A saved student, from a folder or the Hub.

    Raises:
        FileNotFoundError: if the folder has no config.json.
        ValueError: if it is another kind of model, or has other classes than `num_labels`.
    """
    folder = Path(source)
    looks_local = folder.exists() or str(source).startswith((".", "/", "~", "runs"))
    if looks_local and not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"Expected a saved model with a config.json, got {source}. A training run leaves it in "
            "the folder `student` of its output folder."
        )
    try:
        config, _ = PreTrainedConfig.get_config_dict(str(source))
        if not isinstance(config, dict):
            raise OSError("its config.json is no JSON object.")
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise FileNotFoundError(
            f"Expected a saved model, a folder here or an id on the Hub, got {source}: {reason}"
        ) from error
    if "_model_class" not in config:
        raise ValueError(
            f"Expected a student of this package or an smp model, got {source} of model_type "
            f"{config.get('model_type')!r}. Other models can be teachers only."
        )
    student: SmpForSemanticSegmentation = SmpForSemanticSegmentation.from_pretrained(str(source))
    labels = labels_of(student)
    if num_labels is not None and len(labels) != num_labels:
        raise ValueError(
            f"Expected a model of {num_labels} classes (--num_labels), got {source} with "
            f"{len(labels)}: {', '.join(labels.values())}."
        )
    return student


def load_measured(
    source: str,
    *,
    arch: str | None = None,
    encoder: str | None = None,
    num_labels: int | None = None,
    trust_remote_code: bool = False,
) -> Measured:
    """Any saved model to measure: a student, else whatever can be a teacher.

    Raises:
        FileNotFoundError: if there is no such model.
        ValueError: if it has other classes than `num_labels`, or is no segmentation model.
    """
    if not source.endswith(SUFFIXES):
        try:
            config, _ = PreTrainedConfig.get_config_dict(source)
        except OSError:
            config = {"_model_class": ""}  # `load_student` says what is missing
        if "_model_class" in config or "model_type" not in config:
            return load_student(source, num_labels=num_labels)
    return load_teacher(
        source,
        num_labels=num_labels,
        arch=arch,
        encoder=encoder,
        trust_remote_code=trust_remote_code,
    )


def make_teacher(model: ModelArguments, student: Measured, *, image_size: int) -> Teacher | None:
    """The teacher the settings name, fed with the student's input of `image_size` pixels."""
    if not model.has_teacher:
        return None
    mean, std = input_statistics(student)
    teacher = load_teacher(
        model.teacher,
        num_labels=len(labels_of(student)),
        arch=model.teacher_arch,
        encoder=model.teacher_encoder,
        image_size=model.teacher_image_size,
        mean=model.teacher_mean,
        std=model.teacher_std,
        input_mean=mean,
        input_std=std,
        id2label=labels_of(student),
        trust_remote_code=model.trust_remote_code,
    )
    if isinstance(teacher.network, SmpForSemanticSegmentation):
        check_image_size(model.teacher_image_size or image_size, teacher.network)
    return teacher


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
    decided = [name for name in _OF_A_NEW_STUDENT if name in run.flags]
    if run.model.student is not None and decided:
        raise ValueError(
            f"Expected --student alone, got it with --{decided[0]}, which only a new student can "
            "follow. Leave one of them out."
        )
    if run.data.streaming and run.training.world_size > 1:
        raise ValueError(
            f"Expected one process with --streaming, got {run.training.world_size}: their "
            "evaluations would end at different batches. Leave --streaming out, or start one."
        )


def _check_channels(student: SmpForSemanticSegmentation) -> None:
    """Refuse a student of two channels beside a teacher, who answers for two classes with one."""
    if student.config.classes == 2:
        raise ValueError(
            "Expected a student with one logit for two classes beside a teacher, got one with two "
            "channels (a softmax) as --student. Take it as --teacher of a new student, or go on "
            "from it with --teacher none."
        )


def _check_enough(dataset: TransformedDataset | StreamedDataset, run: RunArguments) -> None:
    """Refuse a training set of less than one batch: a short batch is dropped."""
    args = run.training
    # The length of a stream is that of this process's share.
    images = sum(dataset.lengths) if isinstance(dataset, StreamedDataset) else len(dataset)
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
    )


def network_name(network: nn.Module) -> str:
    """Architecture and encoder of an smp model, the class name of any other."""
    if isinstance(network, SmpForSemanticSegmentation):
        return f"{network.config._model_class} {network.config.encoder_name}"
    return type(network).__name__


def network_size(network: nn.Module) -> tuple[int, int]:
    """Number of parameters (used, never used by any forward pass)."""
    if isinstance(network, SmpForSemanticSegmentation):
        used, never_used, _ = parameter_counts(network)
        return used, never_used
    return sum(p.numel() for p in network.parameters()), 0
