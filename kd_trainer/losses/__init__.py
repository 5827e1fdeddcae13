"""Pure loss functions on logits, the table of terms, their weights and their sum."""

from kd_trainer.losses.checks import class_ids
from kd_trainer.losses.functions import TERMS, Term
from kd_trainer.losses.terms import (
    SCHEDULED,
    TEACHER_TERMS,
    LossTerms,
    LossWeights,
    distillation_terms,
    labelled_images,
    weight_hint,
    weighted_sum,
)

__all__ = [
    "SCHEDULED",
    "TEACHER_TERMS",
    "TERMS",
    "LossTerms",
    "LossWeights",
    "Term",
    "class_ids",
    "distillation_terms",
    "labelled_images",
    "weight_hint",
    "weighted_sum",
]
