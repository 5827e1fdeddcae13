"""What a run finds in its data, annotations and teacher, where its settings do not say it.

Each finding is said in a line and taken over by the settings, so that the configuration which is
written has it, and a run that goes on need not find it again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from kd_trainer.config import RunArguments
from kd_trainer.data import MaskRule, source_class_names, with_label_count
from kd_trainer.data.class_balance import balanced_weights, class_pixels
from kd_trainer.data.sources import is_coco
from kd_trainer.data_arguments import DataArguments
from kd_trainer.errors import announce, clipped
from kd_trainer.teacher import reduces_labels, saved_class_names

FOUND = (
    *("num_labels", "class_names", "reduce_labels", "class_weights"),
    *("mask_kind", "mask_values", "mask_colors", "mask_threshold"),
    *("channel_mean", "channel_std"),
)
"""Settings that a run finds in the data where they are not given."""
REDUCED = (
    "trained with do_reduce_labels: mask value 0 counts nowhere, and value i is class i - 1. "
    "--reduce_labels false reads the values as class ids."
)


def learn_from_sources(run: RunArguments, splits: Mapping[str, Any]) -> DataArguments:
    """The settings with what data, annotations and teacher say of it, which `run` takes over.

    So the configuration that is written has them too.
    """
    given = run.data.num_labels
    run.data = with_label_count(splits, run.data)
    if run.data.reduce_labels is None and (count := _reduced_labels(run, found=given is None)):
        run.data = replace(run.data, reduce_labels=True, num_labels=count)
    if given is None and run.data.label_count > 2 and run.data.mask_colors is None:
        announce(_found_labels(run.data))
    names = source_class_names(run.data) if run.data.class_names is None else None
    if run.data.reduce_labels and names is None and run.data.class_names is None:
        names = _names_without_background(run)
    if names is not None and len(names) == run.data.num_labels:  # others are refused when loaded
        run.data = replace(run.data, class_names=names)
    return run.data


def _found_labels(data: DataArguments) -> str:
    names = source_class_names(data)
    named = f": {clipped(', '.join(names), 100)}" if names else ""
    cure = " --category makes one of them the foreground." if is_coco(data) else ""
    return f"Classes: {data.label_count}{named}. --num_labels overrules.{cure}"


def balance_classes(run: RunArguments, rows: Any, rule: MaskRule) -> None:
    """Put numbers in the place of `--class_weights balanced`, as the configuration then has them.

    Raises:
        ValueError: if a class is in none of the masks.
    """
    names = list(run.data.id2label.values())
    skip = run.data.on_bad_sample == "skip"
    pixels, masks = class_pixels(rows, rule, skip_bad=skip)
    weights = balanced_weights(pixels, names, masks)
    run.training.class_weights = [f"{weight:.4g}" for weight in weights]
    shares = pixels / pixels.sum()
    told = [f"{n} {s:.3%} x {w:.4g}" for n, s, w in zip(names, shares, weights, strict=True)]
    announce(
        f"Class weights, balanced by the pixels of {masks:,} training masks: {', '.join(told)}. "
        "Numbers after --class_weights overrule them."
    )


def _names_without_background(run: RunArguments) -> list[str]:
    """Those of the teacher, if it has as many classes: value 0, the background, is none of them."""
    count = run.data.label_count
    for source in run.model.teachers:
        named = saved_class_names(source)
        if named is not None and len(named) == count:
            return named
    return [f"class_{index}" for index in range(count)]


def counts_from_one(source: str, data: DataArguments) -> bool:
    """Whether masks are read as those of a saved model were, from value 1 on."""
    classes = (data.mask_values, data.mask_colors, data.merge_classes, data.mask_kind)
    if (
        any((*classes, data.mask_threshold, data.category))
        or data.dataset == "synthetic"
        or (data.dataset and is_coco(data))
    ):
        return False
    return reduces_labels(source)


def _reduced_labels(run: RunArguments, *, found: bool) -> int | None:
    """The number of classes, if the masks are read as a teacher's that leaves value 0 out.

    A class map translates the teacher's classes: then it is the student's masks that are read.

    Args:
        run: its settings, with the number of labels.
        found: whether that number is one of values in masks, of which 0 would be no class.
    """
    reduced = [source for source in run.model.teachers if counts_from_one(source, run.data)]
    if not reduced:
        return None
    count = run.data.label_count
    sizes = [len(saved_class_names(source) or range(count)) for source in reduced]
    alike = [size for size in sizes if size in (count, count - found)]
    if run.model.class_map is not None or not alike:
        announce(
            "The teacher was trained with do_reduce_labels (mask value 0 counts nowhere), but its "
            "classes are translated: the masks here are read as they are. --reduce_labels true "
            "reads them as its own were."
        )
        return None
    announce(f"The teacher was {REDUCED}")
    return alike[0]
