"""What scripts/data.py does: how a data set is read, shown before anything is trained."""

from __future__ import annotations

import shlex
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kd_trainer.config import parser_of_saved
from kd_trainer.console import markdown_table
from kd_trainer.data import MaskRule, mask_rule, sample_rows, source_class_names, with_label_count
from kd_trainer.data.channels import channels_shape, decode_channels, visible
from kd_trainer.data.dataset import check_same_size
from kd_trainer.data.folder_layouts import Layout
from kd_trainer.data.images import BadSampleError, decode_image, image_name, image_shape
from kd_trainer.data.layouts import in_pair_folder, split_of
from kd_trainer.data.mask_files import decode_mask
from kd_trainer.data.mask_survey import survey_masks
from kd_trainer.data.masks import value_counts
from kd_trainer.data.pipeline import learned
from kd_trainer.data.planes import PlaneRule
from kd_trainer.data.sources import LoadedSplits, load_source, source_layout
from kd_trainer.data_arguments import DataArguments
from kd_trainer.errors import printable
from kd_trainer.fields import help_field
from kd_trainer.mask_flags import show_color
from kd_trainer.parsing import CONSOLE, Parser, settings_of
from kd_trainer.reports.panels import Pixels, overlay, panel, save_image

Row = Mapping[str, Any]

SAMPLES = 8
# What `class_colours` are called, from class 1 on.
COLOURS = ("green", "orange", "light blue", "yellow", "blue", "red", "pink", "light grey")
_MOST_VALUES = 40  # lines of the table
# Flags that say which files are read, and what the masks hold.
_OF_MASKS = (
    *("group_by", "image_folder", "mask_folder", "category", "class_names", "mask_kind"),
    *("mask_values", "mask_colors", "merge_classes", "mask_threshold", "reduce_labels"),
    *("ignore_values", "in_channels"),
)
# What only a training asks of the data.
_WITHOUT = frozenset(
    {"dataset", "unlabelled", "augmentation", "brightness_contrast_probability", "streaming"}
    | {"on_bad_sample", "max_bad_share"}
)


@dataclass
class LookArguments:
    """Settings of scripts/data.py beside those of the data."""

    output: str = help_field(
        "runs/data/samples.png", "Gets a picture of eight samples, each beside its mask."
    )


def data_parser() -> Parser:
    """The parser of scripts/data.py."""
    parser = parser_of_saved(
        (LookArguments, DataArguments),
        "data.py",
        "Say how a data set is read: layout, splits, what the values of the masks mean and the "
        "flags that say so; and draw eight samples. Nothing is trained.",
        "Examples:\n  data.py photos/\n  data.py VOCdevkit/ --num_labels 21\n"
        "  data.py pairs.csv --image_folder ../photos --output look.png",
        without=_WITHOUT,
    )
    parser.add_argument("dataset", metavar="SOURCE", help="As --dataset of train.py.")
    return parser


def data_main(arguments: Sequence[str] | None = None) -> None:
    """Look at a data set; what the masks are not read by is the error at the end.

    Raises:
        FileNotFoundError: if there is no such data set, or a part of it is missing.
        ValueError: if it can be read in no way, or in several.
    """
    flags = data_parser().given(arguments)
    args = LookArguments(**settings_of(LookArguments, flags))
    data = DataArguments(**settings_of(DataArguments, flags))
    with redirect_stderr(sys.stdout):  # here it is what was asked for
        loaded = load_source(data)
    layout = source_layout(data)
    if layout is None and in_pair_folder(data, data.train_split):
        print(f"{printable(data.dataset)}: a pair folder, SPLIT/images with SPLIT/masks.")
    if data.multi_label:
        _look_at_planes(loaded, data, args)
        return
    fault: ValueError | None = None
    rule: MaskRule | None = None
    try:
        with redirect_stderr(sys.stdout):
            data = with_label_count(loaded.splits, data)
        rule = mask_rule(loaded.splits, data)
        data = learned(rule, data)
    except ValueError as error:
        fault = error
    kind = kind_of(loaded.splits, data) if rule is None else rule.kind
    counts = {name: count_values(rows, kind) for name, rows in loaded.splits.items()}
    print(f"\n{splits_table(loaded, counts)}\n\n{values_table(counts, rule, kind, names_of(data))}")
    if len(set().union(*(some.values for some in counts.values()))) > _MOST_VALUES:
        print(f"and more: the {_MOST_VALUES} values of most pixels are listed.")
    if rule is not None:
        if rule.note:
            print(f"\n{printable(rule.note)}")
        print(f"\nThe same, said by flags:\n  {command(data, rule, layout, loaded)}")
    values = sorted(set().union(*(some.values for some in counts.values())))

    def mask_of(row: Row, index: int, image: Pixels) -> Pixels:
        mask = decode_mask(row["mask"], index, kind)
        check_same_size(row, index, mask=mask.shape, image=image.shape[:2])
        if rule is not None:
            labels = rule.labels(mask, image_name(row["mask"], index)).astype(int)
        else:  # the values in their order
            labels = np.searchsorted(values, mask.astype(int))
        return overlay(image, labels, num_labels=len(values) if rule is None else rule.num_labels)

    _save_picture(loaded.splits, data, mask_of, args.output)
    if fault is not None:
        raise fault


def _look_at_planes(loaded: LoadedSplits, data: DataArguments, args: LookArguments) -> None:
    """The same of several labels a pixel, whose masks need no reading of values."""
    rule = PlaneRule(data.label_count, data.ignore_index)
    shape_of = image_shape if data.in_channels is None else channels_shape

    def planes_of(row: Row, index: int) -> Pixels:
        return rule.planes(row["mask"], index, shape_of(row["image"], index)) == 1

    counts, rows = {}, []
    for name, split in loaded.splits.items():
        shares = [planes_of(row, i).mean(axis=(0, 1)) for i, row in enumerate(sample_rows(split))]
        counts[name] = ValueCounts(len(shares), Counter(), Counter())
        rows += shares
    table = np.stack(rows)
    labels = [
        [name, f"{table[:, i].mean():.2%}", f"{(table[:, i] > 0).sum():,}", _colour(i + 1)]
        for i, name in names_of(data).items()
    ]
    print(f"\n{splits_table(loaded, counts)}")
    print(f"\n{markdown_table(['label', 'pixels', 'in masks', 'colour'], labels)}")

    def mask_of(row: Row, index: int, image: Pixels) -> Pixels:
        planes = np.moveaxis(planes_of(row, index), 2, 0)
        return overlay(image, planes, num_labels=len(planes))

    _save_picture(loaded.splits, data, mask_of, args.output)


@dataclass(frozen=True)
class ValueCounts:
    """What the masks of a split hold that were looked at.

    Attributes:
        masks: how many.
        values: pixels of each value.
        within: masks that hold each value.
    """

    masks: int
    values: Counter[int]
    within: Counter[int]


def kind_of(splits: Mapping[str, Any], data: DataArguments) -> str:
    """What the numbers of masks are that no rule was found for.

    Raises:
        BadSampleError: if they are of no kind.
    """
    masks = [row["mask"] for rows in splits.values() for row in sample_rows(rows)]
    return survey_masks(masks, data.ignore_index, data.mask_kind).kind


def count_values(rows: Any, kind: str) -> ValueCounts:
    """Count the values in up to 200 masks, spread over a split."""
    values: Counter[int] = Counter()
    within: Counter[int] = Counter()
    masks = 0
    for index, row in enumerate(sample_rows(rows)):
        masks += 1
        found = value_counts(decode_mask(row["mask"], index, kind))
        values.update(found)
        within.update(found.keys())
    return ValueCounts(masks, values, within)


def splits_table(loaded: LoadedSplits, counts: Mapping[str, ValueCounts]) -> str:
    """Images of each split, and how many of their masks were looked at."""
    rows = [
        [name, f"{len(rows):,}", f"{counts[name].masks:,}", "", ""]
        for name, rows in loaded.splits.items()
    ]
    for row, split in zip(rows, loaded.splits.values(), strict=True):
        first = split[0]
        row[3:] = [printable(_file(first[column], 0)) for column in ("image", "mask")]
    return markdown_table(["split", "images", "masks looked at", "first image", "its mask"], rows)


def _file(cell: Mapping[str, Any], index: int) -> str:
    return Path(image_name(cell, index)).name


def names_of(data: DataArguments) -> dict[int, str]:
    """Names of the classes as a training would have them; none where nobody knows how many."""
    if data.num_labels is None:
        return {}
    names = source_class_names(data) if data.class_names is None else None
    fits = names is not None and len(names) == data.num_labels
    return dict(enumerate(names)) if names is not None and fits else data.id2label


def values_table(
    counts: Mapping[str, ValueCounts], rule: MaskRule | None, kind: str, names: Mapping[int, str]
) -> str:
    """Each value in the masks, the class it means and the colour that the picture gives it."""
    values = sum((some.values for some in counts.values()), Counter[int]())
    within = sum((some.within for some in counts.values()), Counter[int]())
    rows = []
    for place, value in enumerate(sorted(v for v, _ in values.most_common(_MOST_VALUES))):
        label = place if rule is None else class_of(value, rule)
        meaning = "not known" if rule is None or label is None else names.get(label, "ignored")
        colour = "grey" if meaning == "ignored" else _colour(label)
        share = f"{values[value] / values.total():.2%}"
        shown = show_color(value) if kind == "colors" else str(value)
        rows.append([shown, meaning, share, f"{within[value]:,}", colour])
    return markdown_table(["value", "class", "pixels", "in masks", "colour"], rows)


def _colour(label: int | None) -> str:
    """What the colour of a class is called; of the background, or of none, nothing."""
    return COLOURS[(label - 1) % len(COLOURS)] if label else ""


def class_of(value: int, rule: MaskRule) -> int | None:
    """The class that a value means, or `ignore_index`; None if the rule does not know it."""
    small = np.uint8 if value < 256 else np.uint16
    mask = np.full((1, 1), value, np.uint32 if rule.kind == "colors" else small)
    try:
        return int(rule.labels(mask, "a mask")[0, 0])
    except BadSampleError:  # such as 255 alone where 1 may stand beside it
        return rule.ignore_index if value == rule.ignore_index else None


def command(
    data: DataArguments, rule: MaskRule, layout: Layout | None, loaded: LoadedSplits
) -> str:
    """The training of this data with all that was found said by flags."""
    flags: dict[str, Any] = {"dataset": data.dataset}
    splits = {"train_split": data.train_split, "eval_split": data.eval_split}
    if layout is not None:
        flags |= {"layout": layout.name, **layout.flags}
        held = "eval_split" if loaded.held_out else None
        splits = {f: split_of(layout, s, data) for f, s in splits.items() if f != held}
    flags |= splits
    if loaded.held_out:
        flags["eval_fraction"] = data.eval_fraction
    flags["num_labels"] = data.num_labels
    flags |= {name: value for name in _OF_MASKS if (value := getattr(data, name)) is not None}
    named = data.class_members or data.mask_threshold or data.category or data.reduce_labels
    own_values = rule.num_labels == 2 or rule.values != tuple(range(rule.num_labels))
    if own_values and not (named or rule.also_ignored):
        flags["mask_values"] = list(rule.values)
    words = (f"--{name} {_words(value)}" for name, value in flags.items())
    return f"{CONSOLE} train {' '.join(words)} --dry_run"


def _words(value: Any) -> str:
    words = value if isinstance(value, list) else [value]
    return shlex.join(str(word).lower() if word is True else str(word) for word in words)


def picture(
    splits: Mapping[str, Any], data: DataArguments, mask_of: Callable[[Row, int, Pixels], Pixels]
) -> Pixels:
    """Samples spread over the splits, each image beside its mask, two in a row."""
    cells: list[Pixels] = []
    numbers = {name: min(len(rows), SAMPLES // len(splits)) for name, rows in splits.items()}
    first = next(iter(splits))
    numbers[first] += SAMPLES - sum(numbers.values())  # where the others are smaller
    for name, rows in splits.items():
        for index, row in enumerate(sample_rows(rows, numbers[name])):
            if data.in_channels is None:
                image = decode_image(row["image"], index)
            else:
                image = visible(decode_channels(row["image"], index, data.in_channels))
            cells += [image, mask_of(row, index, image)]
    blank = np.full_like(cells[0], 255)
    cells += [blank] * (-len(cells) % 4)
    grid = [cells[i : i + 4] for i in range(0, len(cells), 4)]
    return panel(grid, ["image", "mask"] * 2, side=240)


def _save_picture(
    splits: Mapping[str, Any],
    data: DataArguments,
    mask_of: Callable[[Row, int, Pixels], Pixels],
    output: str,
) -> None:
    save_image(picture(splits, data, mask_of), Path(output))
    print(f"\nSamples, those of {' before those of '.join(splits)}: {output}")
