"""Several teachers, or several looks of one, as one teacher: the mean of their probabilities."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_trainer.teacher import Teacher


def mean_logits(logits: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Logits of the weighted mean of probabilities, without a detour over numbers that underflow.

    Args:
        logits: each (B, K, H, W), K = 1 for a sigmoid and otherwise for a softmax.
        weights: above 0, one for each; they are divided by their sum.

    Returns:
        (B, K, H, W): of one channel log(p / (1 - p)), of several log(p).
    """
    shares = [math.log(weight / sum(weights)) for weight in weights]
    if logits[0].shape[1] == 1:
        here, gone = (
            _log_sum([F.logsigmoid(sign * z) + w for z, w in zip(logits, shares, strict=True)])
            for sign in (1, -1)
        )
        return here - gone
    return _log_sum([z.log_softmax(1) + w for z, w in zip(logits, shares, strict=True)])


def _log_sum(terms: list[Tensor]) -> Tensor:
    total = terms[0]
    for term in terms[1:]:
        total = torch.logaddexp(total, term)
    return total


class TeacherEnsemble(nn.Module):
    """A network that answers with the mean of its members.

    Args:
        members: of the same classes, for images that are normalised alike.
        weights: of each; None weighs all alike.
        flip: also ask each for the mirrored image, and mirror its answer back.
    """

    def __init__(
        self,
        members: Sequence[Teacher],
        *,
        weights: Sequence[float] | None = None,
        flip: bool = False,
    ) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self.weights = [1.0] * len(members) if weights is None else list(weights)
        self.flip = flip

    @property
    def teachers(self) -> list[Teacher]:
        """The members."""
        return [member for member in self.members if isinstance(member, Teacher)]

    def extra_repr(self) -> str:
        """What the answer depends on beside the members, which a cache of answers is named by."""
        return f"weights={self.weights}, flip={self.flip}"

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Logits (B, K, H, W) of images (B, 3, H, W)."""
        looks = 2 if self.flip else 1
        weights = [weight for weight in self.weights for _ in range(looks)]
        answers = list(self._answers(pixel_values))
        if self.teachers[0].multi_label:  # a sigmoid for each class
            maps = [logits.reshape(-1, 1, *logits.shape[2:]) for logits in answers]
            return mean_logits(maps, weights).view_as(answers[0])
        return mean_logits(answers, weights)

    def _answers(self, pixel_values: Tensor) -> Iterator[Tensor]:
        for member in self.teachers:
            yield member(pixel_values)
            if self.flip:
                yield member(pixel_values.flip(-1)).flip(-1)


def ensemble_of(
    teachers: Sequence[Teacher], *, weights: Sequence[float] | None = None, flip: bool = False
) -> Teacher:
    """One teacher of several; a single one without a flip stays what it is.

    Args:
        teachers: loaded for the same student.
        weights: see `TeacherEnsemble`.
        flip: likewise.
    """
    first = teachers[0]
    if len(teachers) == 1 and not flip:
        return first
    return Teacher(
        TeacherEnsemble(teachers, weights=weights, flip=flip),
        num_labels=first.num_labels,
        mean=first.input_mean,
        std=first.input_std,
        input_mean=first.input_mean,
        input_std=first.input_std,
        id2label=first.id2label,
        multi_label=first.multi_label,
    )
