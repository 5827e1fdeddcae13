"""Pure loss functions on logits: the recipe's four terms, for binary and multi-class models."""

from kd_trainer.losses.dice import labelled_images
from kd_trainer.losses.terms import LossTerms, LossWeights, distillation_terms, weighted_sum

__all__ = ["LossTerms", "LossWeights", "distillation_terms", "labelled_images", "weighted_sum"]
