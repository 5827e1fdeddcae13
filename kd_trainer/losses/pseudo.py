"""The teacher's answers in the place of labels, at pixels that are followed and carry none.

Each term that compares with labels then has a second form, `pseudo_NAME`, against these answers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kd_trainer.losses.functions import PSEUDO, Logits, Mask

KINDS = ("hard", "soft")


@dataclass(frozen=True)
class PseudoLabels:
    """What stands for a label where there is none, and at which pixels.

    Attributes:
        kind: `hard`, the class that the teacher finds; or `soft`, its probabilities at T = 1.
        confidence: from 0 to 1; pixels at which its most probable class has less are left out.

    Raises:
        ValueError: if one of them is something else.

    Source: FixMatch, arXiv 2001.07685; for segmentation UniMatch, arXiv 2208.09910.
    """

    kind: str = "hard"
    confidence: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(
                f"Expected --pseudo_labels to be one of {', '.join(KINDS)}, got {self.kind!r}."
            )
        if not 0 <= self.confidence <= 1:
            raise ValueError(
                f"Expected --pseudo_confidence from 0 to 1, got {self.confidence}. It is the least "
                "probability of the teacher's class: 0.95, say, or 0 for every pixel."
            )

    def check(self, factors: Mapping[str, float]) -> None:
        """Refuse soft labels for a term that has no form for them.

        Args:
            factors: `LossWeights.effective()`.

        Raises:
            ValueError: names the term.
        """
        for term in PSEUDO if self.kind == "soft" else ():
            if factors[term.name] > 0 and term.soft_softmax is None:
                raise ValueError(
                    f"Expected --pseudo_labels hard with the term {term.pseudo_of}, got soft: it "
                    "is defined for class ids alone. Set it to hard, or "
                    f"--{term.pseudo_of}_weight 0."
                )

    def terms(
        self, inputs: Mapping[str, Any], labelled: Mask, factors: Mapping[str, float]
    ) -> dict[str, Tensor]:
        """The pseudo terms that have a factor, by name.

        The sum of a mean over pixels is divided by all unlabelled pixels, not by the confident
        ones: a few of them would else weigh as much as a whole batch. A mean over images is one
        over those with unlabelled pixels, each measured where the teacher is confident.

        Args:
            inputs: of the terms of the table; `mask` (B, H, W) are the pixels that are followed,
                and `images` may be what `unlabelled_images` says of a step.
            labelled: the pixels that carry a label.
            factors: `LossWeights.effective()`.

        Raises:
            ValueError: if a term has no form for soft labels.
        """
        wanted = [term for term in PSEUDO if factors[term.name] > 0]
        if not wanted:
            return {}
        self.check(factors)
        student, images = inputs["student"], inputs["images"]
        unlabelled = inputs["mask"] & ~labelled
        labels, sure = self._answers(inputs["teacher"], unlabelled)
        share = sure.sum().to(student.dtype) / unlabelled.sum().clamp(min=1)
        if images is None:
            images = unlabelled.flatten(1).any(dim=1).sum()
        student = torch.where(sure.unsqueeze(1), student, 0.0)
        own = {"student": student, "labels": labels, "mask": sure, "images": images}
        given, terms = {**inputs, **own}, {}
        for term in wanted:
            channels = student.shape[1]
            soft = self.kind == "soft"
            function = term.soft_function(channels) if soft else term.function(channels)
            assert function is not None  # `check`, and `LossWeights.check_channels`
            value = function(**{name: given[name] for name in term.takes})
            terms[term.name] = value if "images" in term.takes else value * share
        return terms

    def _answers(self, teacher: Logits, unlabelled: Mask) -> tuple[Tensor, Mask]:
        """Class ids (B, H, W) or probabilities (B, K, H, W), and the pixels that are confident."""
        teacher = torch.where(unlabelled.unsqueeze(1), teacher, 0.0)  # 0 times NaN would be NaN
        if teacher.shape[1] == 1:
            probabilities = torch.sigmoid(teacher)
            ids, highest = (teacher > 0).long(), torch.sigmoid(teacher.abs())
        else:
            probabilities = torch.softmax(teacher, dim=1)
            highest, ids = probabilities.max(dim=1, keepdim=True)
        sure = unlabelled & (highest.squeeze(1) >= self.confidence)
        return ids.squeeze(1) if self.kind == "hard" else probabilities, sure
