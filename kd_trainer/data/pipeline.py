"""From `DataArguments` and loaded splits to the transforms of training and evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import datasets
import numpy as np

from kd_trainer.arguments import DataArguments
from kd_trainer.data.cells import cell_name
from kd_trainer.data.decoding import decode_mask, image_shape
from kd_trainer.data.masks import MaskRule, find_mask_rule
from kd_trainer.data.transform import SegmentationTransform, size_error

SAMPLE = 200
"""Masks of each split in which the rule is looked for: about a second at 640 px."""


def mask_rule(
    splits: Mapping[str, Any], data: DataArguments, *, every_class: bool = True
) -> MaskRule:
    """Say how the masks of a data set are read: as `data.mask_values` has it, else as found.

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
    rows = [row for split in splits.values() for row in _sample(split)]
    for index, row in enumerate(rows):
        check_sizes(row, index)
    masks = [row["mask"] for row in rows]
    if data.mask_values is None:
        return find_mask_rule(
            masks,
            num_labels=data.num_labels,
            ignore_index=data.ignore_index,
            every_class=every_class,
        )
    if len(data.mask_values) != data.num_labels:
        raise ValueError(
            f"Expected {data.num_labels} --mask_values (--num_labels, background first), got "
            f"{len(data.mask_values)}: {' '.join(map(str, data.mask_values))}."
        )
    rule = MaskRule(tuple(data.mask_values), data.ignore_index)
    for index, cell in enumerate(masks):
        rule.labels(decode_mask(cell, index), cell_name(cell, index))
    return rule


def transforms(
    splits: Mapping[str, Any], data: DataArguments, *, seed: int, every_class: bool = True
) -> tuple[SegmentationTransform, SegmentationTransform]:
    """The transforms for training (augmented) and for evaluation (not).

    Args:
        splits: what `load_splits` gave.
        data: image size, augmentation, and how masks are read.
        seed: of the augmentation.
        every_class: as for `mask_rule`.

    Returns:
        (training, evaluation), with the same rule for masks.
    """
    rule = mask_rule(splits, data, every_class=every_class)
    training, evaluation = (
        SegmentationTransform(
            data.image_size,
            rule,
            augmentation=kind,
            seed=seed,
            brightness_contrast_probability=data.brightness_contrast_probability,
        )
        for kind in (data.augmentation, "none")
    )
    return training, evaluation


def check_sizes(row: Mapping[str, Any], index: int) -> None:
    """Compare the sizes of a photograph and its mask from the first bytes of the files.

    Raises:
        ValueError: if they differ, or a file is no image; names the file.
    """
    shapes = [image_shape(row[column], index) for column in ("image", "mask")]
    if shapes[0] != shapes[1]:
        names = [cell_name(row[column], index) for column in ("image", "mask")]
        raise size_error(shapes[1], shapes[0], names[1], names[0])


def _sample(rows: Any) -> Iterator[dict[str, Any]]:
    """Up to `SAMPLE` rows with masks, evenly spread over a data set, the first ones of a stream."""
    if not isinstance(rows, datasets.Dataset):
        return (row for row in islice(rows, SAMPLE) if row["mask"] is not None)
    # As an arrow column: 100,000 rows are looked through without reading any picture.
    known = rows.select_columns("mask").with_format("arrow")[:]["mask"].is_valid()
    labelled = np.flatnonzero(known.to_numpy())
    count = min(SAMPLE, len(labelled))
    return (rows[int(labelled[len(labelled) * i // count])] for i in range(count))
