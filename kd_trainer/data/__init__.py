"""From images and masks to batches: sources, rule of the mask values, transform, streams."""

from kd_trainer.data.dataset import (
    SegmentationTransform,
    TeacherTargets,
    TransformedDataset,
    collate,
)
from kd_trainer.data.images import BadSample
from kd_trainer.data.mask_survey import find_mask_rule
from kd_trainer.data.masks import MaskRule
from kd_trainer.data.pipeline import learned, mask_rule, sample_rows, transforms, usable_splits
from kd_trainer.data.sources import load_splits, source_class_names
from kd_trainer.data.streaming import StreamedDataset

__all__ = [
    "BadSample",
    "MaskRule",
    "SegmentationTransform",
    "StreamedDataset",
    "TeacherTargets",
    "TransformedDataset",
    "collate",
    "find_mask_rule",
    "learned",
    "load_splits",
    "mask_rule",
    "sample_rows",
    "source_class_names",
    "transforms",
    "usable_splits",
]
