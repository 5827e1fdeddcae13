"""Pure loss functions on logits: the recipe's four terms, for binary and multi-class models."""

from kd_trainer.losses.functions import class_ids, labelled_images
from kd_trainer.losses.terms import (
    TEACHER_TERMS,
    TERMS,
    LossTerms,
    LossWeights,
    Term,
    distillation_terms,
    weight_hint,
    weighted_sum,
)

__all__ = [
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
