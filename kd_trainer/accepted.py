"""What `DistillationTrainer` accepts: anything else of the Trainer's would be ignored, or crash."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from kd_trainer.argument_checks import check_alone
from kd_trainer.arguments import DistillationArguments
from kd_trainer.evaluation import Measured, input_statistics, is_multi_label, labels_of
from kd_trainer.models.modeling import SmpForSemanticSegmentation
from kd_trainer.sources import SELF
from kd_trainer.students import as_student, is_student, units_of
from kd_trainer.teacher import Teacher

# Arguments of the Trainer, and why they cannot be followed.
_REFUSED = {
    "compute_loss_func": "the loss is the sum of our terms. Set their weights, or add a term as "
    "docs/losses.md says",
    "preprocess_logits_for_metrics": "an evaluation keeps counts of each image, and no logits. "
    "Leave it out",
}
_OF_THE_GROUPS = {"lr": "learning_rate", "weight_decay": "weight_decay"}


def check_accepted(
    model: Any, model_init: Any, args: Any, teacher: Any, options: Mapping[str, Any]
) -> DistillationArguments:
    """Refuse networks, arguments and options that the trainer could only ignore or trip over.

    Returns:
        The arguments.

    Raises:
        TypeError: for a student, teacher or arguments of another kind.
        ValueError: names the option.
    """
    if not isinstance(args, DistillationArguments):
        raise TypeError(
            f"Expected args as DistillationArguments, got {type(args).__name__}. They take "
            "everything that TrainingArguments do, and the settings of the distillation."
        )
    if (model is None) == (model_init is None):
        given = "neither" if model is None else "both"
        raise TypeError(f"Expected a student as model, or a function as model_init, got {given}.")
    if model_init is not None and options.get("units") is not None:
        raise ValueError(
            "Expected no units with model_init, whose networks are others each time, got some. "
            "Give them inside of it: return as_student(network, units=[...])."
        )
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(
            f"Expected a network as student, got {type(model).__name__}. Make one with "
            "SmpForSemanticSegmentation.create() or from_pretrained(), or give any module that "
            "answers with logits."
        )
    if teacher == SELF:
        check_self_taught(args)
    elif teacher is not None and not isinstance(teacher, Teacher | SmpForSemanticSegmentation):
        raise TypeError(
            f"Expected a kd_trainer.Teacher, got {type(teacher).__name__}. Wrap it: Teacher(network"
            ", num_labels=..., mean=..., std=...), with the mean and std that "
            "it was trained with."
        )
    args.loss_weights.check_teacher(taught=teacher is not None)
    if teacher is None:
        check_alone(args)
    for name, reason in _REFUSED.items():
        if options.get(name) not in (None, (None, None)):
            raise ValueError(f"Expected no {name}, got one: {reason}.")
    _check_optimizers(*(options.get("optimizers") or (None, None)), args=args)
    _, own = options.get("optimizer_cls_and_kwargs") or (None, {})
    for name, setting in _OF_THE_GROUPS.items():
        if name in own:
            raise ValueError(
                f"Expected {name} as {setting} of the arguments, got it in "
                "optimizer_cls_and_kwargs. Each group has its own."
            )
    return args


def _check_optimizers(optimizer: Any, scheduler: Any, *, args: DistillationArguments) -> None:
    """Refuse a scheduler, and an optimizer whose settings its new groups would not have.

    Its groups are replaced by those of the free parts, which have the rates and the weight decay of
    the arguments; everything else of it stays.
    """
    if scheduler is not None:
        raise ValueError(
            f"Expected no scheduler in optimizers, got a {type(scheduler).__name__}: each part has "
            "a rate of its own from when it is freed. Leave it None, and set lr_scheduler_type."
        )
    if optimizer is None:
        return
    if len(optimizer.param_groups) > 1:
        raise ValueError(
            f"Expected an optimizer of one group, got {len(optimizer.param_groups)}: its groups "
            "become those of the units that are free. Make it of network.parameters()."
        )
    for name, setting in _OF_THE_GROUPS.items():
        own = optimizer.defaults.get(name, getattr(args, setting))
        if own != getattr(args, setting):
            raise ValueError(
                f"Expected {name} of the optimizer to be {setting} of the arguments, "
                f"{getattr(args, setting):g}, got {own:g}. Each part has a rate of its own, made "
                "from the arguments: give the same number there."
            )


def check_self_taught(args: DistillationArguments) -> None:
    """Refuse a student that is to be taught by an average that nobody keeps."""
    if args.ema_decay is None:
        raise ValueError(
            "Expected --ema_decay with --teacher self, got none: the average of the student is its "
            "teacher. Set it to 0.996, say."
        )
    if terms := args.loss_weights.feature_terms:
        raise ValueError(
            f"Expected no --{terms[0]}_weight with --teacher self, got it: the average of the "
            "student has the student's own features. Set it to 0, or name a teacher."
        )


def accepted_student(model: nn.Module, units: Any, args: DistillationArguments) -> nn.Module:
    """A student, with the user's units; says so where nothing can be freed by stages."""
    if units is not None or not is_student(model):
        model = as_student(model, units=units)
    if args.push_to_hub and not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"Expected a student of smp or transformers for a push, got a {type(model).__name__}: "
            "nobody could load it by its id. Leave push_to_hub out."
        )
    if not units_of(model) and args.process_index == 0:
        print(
            f"{type(model).__name__} has no units: all of it is trained from the start, at "
            "learning_rate. Units are given as units=[...].",
            file=sys.stderr,
        )
    return model


def as_teacher(
    teacher: Teacher | SmpForSemanticSegmentation | None, student: nn.Module
) -> Teacher | None:
    """A teacher of the student's kind; a network of ours is wrapped, as it says how it is fed.

    Raises:
        ValueError: if one of both has several labels a pixel, and the other one.
    """
    if teacher is not None and is_multi_label(teacher) != is_multi_label(student):
        raise ValueError(
            f"Expected a teacher of the student's kind, got {kind_of(teacher)} beside a student of "
            f"{kind_of(student)}. Their logits mean different things: choose another teacher."
        )
    if teacher is None or isinstance(teacher, Teacher):
        return teacher
    mean, std = input_statistics(teacher)
    labels = labels_of(teacher)
    return Teacher(
        teacher,
        num_labels=len(labels_of(student)),
        mean=mean,
        std=std,
        id2label=labels,
        multi_label=is_multi_label(teacher),
    )


def kind_of(model: Measured) -> str:
    """What the logits of a model mean, in words."""
    return "several labels a pixel (sigmoids)" if is_multi_label(model) else "one class a pixel"


def check_one_set(args: DistillationArguments, sets: Mapping[str, Any]) -> None:
    """Refuse several evaluation sets beside a weight that follows the ratio on one."""
    if sets and args.adaptive_weight:
        raise ValueError(
            f"Expected one evaluation set with adaptive_weight, got {', '.join(sets)}, whose "
            "figures may say different things. Give one, or leave it out."
        )
