"""Pure loss functions on logits and feature maps, the table of terms, their weights and sum."""

from kd_trainer.losses.checks import class_ids
from kd_trainer.losses.features import ComparedMaps, pooled_mask
from kd_trainer.losses.functions import TERMS, Term
from kd_trainer.losses.pseudo import PseudoLabels
from kd_trainer.losses.terms import (
    FEATURE_TERMS,
    SCHEDULED,
    TEACHER_TERMS,
    LossTerms,
    LossWeights,
    distillation_terms,
    feature_terms,
    labelled_images,
    unlabelled_images,
    weight_hint,
    weighted_sum,
)

__all__ = [
    "FEATURE_TERMS",
    "SCHEDULED",
    "TEACHER_TERMS",
    "TERMS",
    "ComparedMaps",
    "LossTerms",
    "LossWeights",
    "PseudoLabels",
    "Term",
    "class_ids",
    "distillation_terms",
    "feature_terms",
    "labelled_images",
    "pooled_mask",
    "unlabelled_images",
    "weight_hint",
    "weighted_sum",
]
