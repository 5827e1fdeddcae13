"""From `DataArguments` and loaded splits to the transforms of training and evaluation."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from kd_trainer.data.bad_samples import (
    announce,
    check_sample,
    check_share,
    check_split,
    readable_values,
)
from kd_trainer.data.channels import channels_of_data, channels_shape
from kd_trainer.data.class_tables import color_flags_of, find_class_table
from kd_trainer.data.dataset import SegmentationTransform, check_same_size
from kd_trainer.data.images import BadSample, BadSampleError, image_name, image_shape
from kd_trainer.data.layouts import say
from kd_trainer.data.mask_colors import MOST_COLORS, color_flags, named_color_rule
from kd_trainer.data.mask_files import mask_shape
from kd_trainer.data.mask_survey import LabelCount, count_labels, find_mask_rule, survey_masks
from kd_trainer.data.masks import MaskRule, merged_rule, present_values, show_values
from kd_trainer.data.planes import PlaneRule, check_planes
from kd_trainer.data.quota import has_mask
from kd_trainer.data.sources import class_layout, is_coco, known_label_count, names_of_values
from kd_trainer.data.views import Views
from kd_trainer.data_arguments import DataArguments
from kd_trainer.errors import clipped
from kd_trainer.mask_flags import REST, color_members, merged_members, numbered, show_color

SAMPLE = 200
"""Masks of each split in which the rule is looked for: about a second at 640 px."""
MANY = 1000
"""Masks of each split in which class ids are counted."""
_SHOWN = 20  # class ids that somebody would copy


def mask_rule(
    splits: Mapping[str, Any], data: DataArguments, *, every_class: bool = True
) -> MaskRule:
    """Say how the masks of a data set are read: as the settings have it, else as seen in them.

    Args:
        splits: what `load_splits` gave.
        data: number of labels, mask values and ignore index.
        every_class: whether masks without any foreground, or with too few classes, are taken for
            a wrong `num_labels`; to evaluate a model, whose classes are known, they need not be.

    Returns:
        One rule for all splits; the same for the same files.

    Raises:
        ValueError: if the masks looked at do not fit the rule, or fit none.
    """
    data = with_label_count(splits, data)
    rows = [row for split in splits.values() for row in sample_rows(split)]
    if data.on_bad_sample == "skip" and data.streaming:  # others have lost their bad rows already
        data = _learned_despite_bad(rows, data, every_class=every_class)
        readable = readable_values(data)
        rows = [row for i, row in enumerate(rows) if check_sample(row, i, readable).reason is None]
    for index, row in enumerate(rows):  # the heads of the files are enough
        shape_of = image_shape if data.in_channels is None else channels_shape
        image = shape_of(row["image"], index)
        check_same_size(row, index, mask=mask_shape(row["mask"], index), image=image)
    masks = [row["mask"] for row in rows]
    rule = _named_rule(data)
    if rule is None:
        return _find_rule(masks, data, every_class=every_class)
    classes: set[int] = set()
    for index, cell in enumerate(masks):
        labels = rule.labels(rule.decode(cell, index), image_name(cell, index))
        classes |= set(present_values(labels))
    if data.mask_threshold is None:
        _check_counted(classes, data, len(masks))
    elif every_class and not {0, 1} <= classes:
        missing = "background" if 1 in classes else "foreground"
        raise ValueError(
            f"Expected foreground and background in the masks, got no {missing} in the "
            f"{len(masks)} that were looked at with --mask_threshold {data.mask_threshold}. "
            "Choose a value between theirs."
        )
    return rule


def with_label_count(splits: Mapping[str, Any], data: DataArguments) -> DataArguments:
    """The settings with the number of classes that the data has, where nobody has named it.

    Two where its masks do not show it: `mask_rule` says what does not fit.

    Raises:
        ValueError: if there may be several labels a pixel, which only the user knows.
    """
    data = with_class_table(splits, data)
    if data.num_labels is not None:
        return data
    count = known_label_count(data)
    if count is None and data.multi_label:
        count = data.label_count  # an error: planes are not looked at to count them
    if count is not None:
        return replace(data, num_labels=count)
    found = _counted(splits, data, SAMPLE)
    of_ids = found.classes > 2 and data.mask_kind in (None, "values")
    if of_ids and not all(isinstance(s, Sized) and len(s) <= SAMPLE for s in splits.values()):
        # A class may be rare.
        many = _counted(splits, replace(data, mask_kind="values"), MANY)
        found = many if many.classes >= found.classes else found
    if found.ids and (unseen := {*range(found.classes)} - {*found.ids}):
        values = " ".join(map(str, found.ids)) if len(found.ids) <= _SHOWN else "..."
        say(
            f"Masks: ids up to {found.classes - 1}, but none of those looked at holds "
            f"{show_values(unseen)}: classes all the same. Without them: --mask_values "
            f"{values} and --class_names; --merge_classes merges."
        )
    return replace(data, num_labels=found.classes)


def with_class_table(splits: Mapping[str, Any], data: DataArguments) -> DataArguments:
    """The settings with the colours and names of a table beside the masks, if they have them.

    Raises:
        ValueError: if the table cannot be read, or has another number of classes.
    """
    said = (data.mask_values, data.mask_colors, data.merge_classes, data.mask_threshold)
    path = Path(data.dataset)
    if (
        any(said)
        or (data.reduce_labels or data.multi_label or data.mask_kind not in (None, "colors"))
        or (data.dataset in ("", "synthetic") or not path.exists() or is_coco(data))
    ):
        return data
    first = next((row for rows in splits.values() for row in sample_rows(rows, 1)), None)
    table = None if first is None else find_class_table(path, first["mask"]["path"])
    if table is None:
        return data
    masks = [row["mask"] for rows in splits.values() for row in sample_rows(rows)]
    with suppress(BadSampleError):  # what cannot be read is said where the rule is found
        colors = _colors_by(table.names, masks, data)
        if colors:
            flags = color_flags_of(table, colors, data.num_labels, data.class_names)
            members = color_members(flags)
            named = clipped(", ".join(members.names or ()), 200)
            nowhere = f"; {', '.join(map(show_color, map(int, members.ignored)))} counts nowhere"
            say(
                f"Masks: the {len(members.members)} colours and names of {table.file}: {named}"
                f"{nowhere if members.ignored else ''}. --mask_colors overrules."
            )
            return replace(data, mask_colors=flags, num_labels=len(members.members))
    return data


def _colors_by(names: Collection[int], masks: Sequence[Any], data: DataArguments) -> set[int]:
    """The colours in masks, if a table of these may be theirs; grey ones and indices may be ids."""
    survey = partial(survey_masks, masks, data.ignore_index, skip_bad=data.on_bad_sample == "skip")
    if (found := survey(data.mask_kind)).kind == "colors":
        return set() if len(found.seen) > MOST_COLORS else {*found.seen}
    colors = {*survey("colors").seen} if found.kind == "values" else set()
    return colors if colors <= {*names} else set()


def _counted(splits: Mapping[str, Any], data: DataArguments, most: int) -> LabelCount:
    """Classes in up to so many masks of each split; 2 where they do not show it."""
    with suppress(ValueError):
        return count_labels(
            [row["mask"] for split in splits.values() for row in sample_rows(split, most)],
            ignore_index=data.ignore_index,
            reduced=bool(data.reduce_labels),
            ignored=data.ignore_values or (),
            kind=data.mask_kind,
            skip_bad=data.on_bad_sample == "skip",
        )
    return LabelCount(2)


def learned(rule: MaskRule, data: DataArguments) -> DataArguments:
    """The settings with a rule that was found, where it is not one of those without a name.

    With them the rule is the same for other masks of the data set, and in a run that goes on.
    """
    if not rule.note or _named_rule(data) is not None:
        return data
    settings: dict[str, Any] = {} if rule.kind == "values" else {"mask_kind": rule.kind}
    if rule.kind == "colors":
        settings["mask_colors"] = color_flags(rule)
    elif rule.threshold is not None:
        settings["mask_threshold"] = rule.threshold
    else:
        settings["mask_values"] = list(rule.values)
        if rule.values[0] and data.label_count > 2 and data.class_names is None:
            settings["class_names"] = [f"class_{value}" for value in rule.values]
    return replace(data, **settings)


def _find_rule(
    masks: Sequence[Any], data: DataArguments, *, every_class: bool, skip_bad: bool = False
) -> MaskRule:
    return find_mask_rule(
        masks,
        num_labels=data.label_count,
        ignore_index=data.ignore_index,
        every_class=every_class,
        class_ids=is_coco(data),
        ignored=data.ignore_values or (),
        kind=data.mask_kind,
        skip_bad=skip_bad,
    )


def _learned_despite_bad(
    rows: Iterable[Mapping[str, Any]], data: DataArguments, *, every_class: bool
) -> DataArguments:
    """The settings with the rule of a sample in which some cannot be read."""
    masks = [row["mask"] for row in rows]
    with suppress(ValueError):  # what is bad is said row by row, by the settings as they are
        if _named_rule(data) is None:
            rule = _find_rule(masks, data, every_class=every_class, skip_bad=True)
            return learned(rule, data)
    return data


def _named_rule(data: DataArguments) -> MaskRule | None:
    """The rule that the settings name; None where it is to be found."""
    ignored, kind = tuple(data.ignore_values or ()), data.mask_kind or "values"
    options: dict[str, Any] = {"ignore_index": data.ignore_index, "kind": kind}
    if data.mask_colors is not None:
        return named_color_rule(color_members(data.mask_colors), data.ignore_index)
    if data.mask_threshold is not None:
        return MaskRule((0, 1), threshold=data.mask_threshold, also_ignored=ignored, **options)
    if data.merge_classes is not None and not is_coco(data):
        members = merged_members(data.merge_classes)
        if any(isinstance(m, str) and m != REST for one in members.members for m in one):
            members = numbered(members, names_of_values(data) or ())
        return merged_rule(members, ignored, options)
    if data.mask_values is None and not data.reduce_labels:
        return _rule_of_layout(data, ignored, options)
    reduced = range(1, data.label_count + 1)
    values = reduced if data.mask_values is None else data.mask_values
    if len(values) != data.label_count:
        raise ValueError(
            f"Expected {data.label_count} --mask_values (--num_labels, background first), got "
            f"{len(values)}: {' '.join(map(str, values))}."
        )
    if data.reduce_labels:
        ignored = tuple(sorted({*ignored, 0}))
    return MaskRule(tuple(values), also_ignored=ignored, **options)


def _rule_of_layout(
    data: DataArguments, ignored: tuple[int, ...], options: dict[str, Any]
) -> MaskRule | None:
    """The rule of a data set whose layout says which value is which class; None if it does not."""
    layout = class_layout(data)
    if layout is None or layout.mask_values is None or len(layout.mask_values) != data.label_count:
        return None
    ignored = tuple(sorted({*ignored, *layout.ignored_values}))
    return MaskRule(layout.mask_values, also_ignored=ignored, **options)


def _check_counted(classes: set[int], data: DataArguments, masks: int) -> None:
    """Refuse masks of nothing but ignored pixels and background."""
    background = set() if data.reduce_labels else {0}
    if {data.ignore_index} <= classes <= {data.ignore_index} | background:
        only = "background and " if 0 in classes else ""
        raise ValueError(
            f"Expected masks with a class that counts, got only {only}{data.ignore_index} "
            f"(--ignore_index{' and 0, by --reduce_labels' if data.reduce_labels else ''}) in all "
            f"{masks} that were looked at. Check the masks, or --mask_values."
        )


def usable_splits(
    splits: Mapping[str, Any],
    data: DataArguments,
    *,
    every_class: bool = True,
    workers: int = 0,
    shared: bool = False,
) -> tuple[dict[str, Any], dict[str, list[BadSample]]]:
    """Leave out the rows that cannot be used, as `--on_bad_sample skip` asks for.

    Args:
        splits: what `load_splits` gave. Streams, and everything with `error`, stay as they are.
        data: the settings.
        every_class: as for `mask_rule`.
        workers: processes that look through the files.
        shared: divide the files among the processes of a run, each of which calls this.

    Returns:
        The splits, and for each what was left out, in the order of its rows.

    Raises:
        ValueError: if more than `data.max_bad_share` of a split is bad, or the rest has no rule.
    """
    bad: dict[str, list[BadSample]] = {name: [] for name in splits}
    if data.on_bad_sample == "error" or data.streaming:
        return dict(splits), bad
    data = with_label_count(splits, data)
    sample = [row for split in splits.values() for row in sample_rows(split)]
    data = _learned_despite_bad(sample, data, every_class=every_class)
    readable = readable_values(data)
    checks = {
        name: check_split(rows, readable, name=name, workers=workers, shared=shared)
        for name, rows in splits.items()
    }
    reasons = {
        name: {i: x.reason for i, x in enumerate(checks[name]) if x.reason} for name in checks
    }
    kept = _without(splits, reasons, data)
    rule = mask_rule(kept, data, every_class=every_class)
    for name in splits:
        for index, check in enumerate(checks[name]):
            try:
                rule.check(check.values, check.mask, bits=check.bits)
            except BadSampleError as error:  # readable alone, but not beside the other masks
                reasons[name][index] = str(error)
    return _without(splits, reasons, data), {n: _samples(splits[n], n, reasons[n]) for n in splits}


def _samples(rows: Any, name: str, reasons: Mapping[int, str]) -> list[BadSample]:
    return [
        BadSample(name, index, image_name(rows[index]["image"], index), reason)
        for index, reason in sorted(reasons.items())
    ]


def _without(
    splits: Mapping[str, Any], reasons: Mapping[str, Mapping[int, str]], data: DataArguments
) -> dict[str, Any]:
    kept = {}
    for name, rows in splits.items():
        bad = _samples(rows, name, reasons[name])
        announce(bad)
        check_share(bad, len(rows), data.max_bad_share)
        good = [index for index in range(len(rows)) if index not in reasons[name]]
        kept[name] = rows if len(good) == len(rows) else rows.select(good)
    return kept


def transforms(
    splits: Mapping[str, Any], data: DataArguments, *, seed: int, every_class: bool = True
) -> tuple[SegmentationTransform, SegmentationTransform]:
    """The transforms for training (augmented) and for evaluation (not).

    Args:
        splits: what `load_splits` gave.
        data: image size, resize, augmentation, and how masks are read.
        seed: of the augmentation.
        every_class: as for `mask_rule`.

    Returns:
        (training, evaluation), with the same rule for masks.
    """
    rule: MaskRule | PlaneRule
    data = with_label_count(splits, data)
    if data.multi_label:
        rule = PlaneRule(data.label_count, data.ignore_index)
        rows = [row for split in splits.values() for row in sample_rows(split)]
        check_planes(rows, rule, image_shape if data.in_channels is None else channels_shape)
    else:
        rule = mask_rule(splits, data, every_class=every_class)
    whole = "fit" if data.resize == "crop" else data.resize
    only_training: dict[str, Any] = {
        "scales": None if data.scale_jitter is None else tuple(data.scale_jitter),
        "views": Views(
            strong=data.strong_views,
            mix=data.cutmix,
            classes=data.label_count if data.cutmix_mode == "class" else 0,
        ),
    }
    training, evaluation = (
        SegmentationTransform(
            data.input_size,
            rule,
            resize=resize,
            augmentation=kind,
            seed=seed,
            brightness_contrast_probability=data.brightness_contrast_probability,
            channels=channels_of_data(data),
            **more,
        )
        for kind, resize, more in (
            (data.augmentation, data.resize, only_training),
            ("none", whole, {}),
        )
    )
    return training, evaluation


def sample_rows(rows: Any, most: int | None = None) -> Iterator[dict[str, Any]]:
    """Up to `most` rows with masks, evenly spread over a data set, the first ones of a stream."""
    most = SAMPLE if most is None else most
    if not isinstance(rows, datasets.Dataset):
        return (row for row in islice(rows, most) if row["mask"] is not None)
    labelled = np.flatnonzero(has_mask(rows))
    count = min(most, len(labelled))
    return (rows[int(labelled[len(labelled) * i // count])] for i in range(count))
