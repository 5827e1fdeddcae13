"""The recipe's loss: named terms, their weights and their sum.

    total = kl·KL(T) + mse·MSE + task·(bce·BCE + dice·Dice)

Each term is a mean over valid pixels (Dice: over pictures that have any), in fp32, without clamps,
and stays on the device. At high temperature T²·KL tends to (s − t)²/8, so there KL and MSE are
nearly one term.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Self

from torch import Tensor

from kd_trainer.losses.functions import (
    binary_cross_entropy,
    binary_dice,
    binary_kl,
    binary_mse,
    centred_mse,
    check_inputs,
    check_pos_weight,
    check_temperature,
    class_ids,
    keep_pixels,
    softmax_cross_entropy,
    softmax_dice,
    softmax_kl,
    working_precision,
)


@dataclass(frozen=True)
class Term:
    """What the package knows of a loss term; everything that shows or weighs terms reads this.

    Attributes:
        name: of its field in `LossTerms` and `LossWeights`; its flag is `--NAME_weight`.
        needs_teacher: it compares with the teacher's logits, the others with labels.
        title: in a model card, for a student of one logit.
        title_of_many: the same for a student of several, where it differs.
        softened: the temperature of the run is one of its inputs.
    """

    name: str
    needs_teacher: bool
    title: str
    title_of_many: str | None = None
    softened: bool = False

    @property
    def flag(self) -> str:
        """Name of its weight on the command line and in a configuration."""
        return f"{self.name}_weight"


TERMS = (
    Term("kl", needs_teacher=True, title="KL(T)", softened=True),
    Term("mse", needs_teacher=True, title="MSE"),
    Term("bce", needs_teacher=False, title="BCE", title_of_many="cross entropy"),
    Term("dice", needs_teacher=False, title="Dice"),
)
TEACHER_TERMS = frozenset(term.name for term in TERMS if term.needs_teacher)


@dataclass(frozen=True)
class LossTerms:
    """Unweighted scalar terms; None where a term was not computed.

    Attributes:
        kl: divergence of the softened student from the softened teacher, times T².
        mse: squared difference of the logits.
        bce: cross entropy with the labels (of the softmax, where there are several channels).
        dice: one minus the soft Dice.
    """

    kl: Tensor | None = None
    mse: Tensor | None = None
    bce: Tensor | None = None
    dice: Tensor | None = None

    def named(self) -> dict[str, Tensor]:
        """The computed terms by name, in the order of the fields."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True)
class LossWeights:
    """Factors of the terms; `task` multiplies those that compare with labels.

    The neutral defaults switch everything off; the recipe's are in arguments.py.

    Raises:
        ValueError: if a weight is negative or not finite.
    """

    kl: float = 0.0
    mse: float = 0.0
    bce: float = 0.0
    dice: float = 0.0
    task: float = 1.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(
                    f"Expected loss weight {field.name} >= 0, got {value}. Use 0 to leave it out."
                )

    def effective(self) -> dict[str, float]:
        """The factor of each term in the total, in the order of `TERMS`."""
        return {
            term.name: getattr(self, term.name) * (1.0 if term.needs_teacher else self.task)
            for term in TERMS
        }

    @property
    def ask_teacher(self) -> bool:
        """Whether a term that counts needs the teacher's logits."""
        return any(factor > 0 for name, factor in self.effective().items() if name in TEACHER_TERMS)

    def without_teacher(self) -> Self:
        """The same without the terms that need one."""
        return dataclasses.replace(self, **dict.fromkeys(TEACHER_TERMS, 0.0))

    def check_teacher(self) -> None:
        """Refuse a teacher that would be loaded, and never be asked.

        Raises:
            ValueError: if no term that needs a teacher has a weight.
        """
        if not self.ask_teacher:
            flags = [f"--{term.flag}" for term in TERMS if term.needs_teacher]
            raise ValueError(
                f"Expected a loss term that follows the teacher, got a weight of 0 for each of "
                f"them ({', '.join(flags)}). Give one a weight, or train without the teacher."
            )


ALL_TERMS = LossWeights(**{term.name: 1.0 for term in TERMS})


def distillation_terms(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    labels: Tensor,
    *,
    temperature: float,
    ignore_index: int = 255,
    distil_mask: Tensor | None = None,
    weights: LossWeights | None = None,
    pos_weight: float | None = None,
    dice_images: Tensor | None = None,
) -> LossTerms:
    """Compute the recipe's terms; one channel is a binary model, more are a softmax model.

    What logits, labels and mask hold at pixels that do not count has no influence, NaN included.
    Labels that count must be class ids: others fail in an index operation, as reading them
    here would stall the device.

    Args:
        student_logits: (B, K, H, W), any floating type; computed in fp32 (float64 stays).
        teacher_logits: the same shape, or None; no gradient flows into them.
        labels: integer (B, H, W), class ids or `ignore_index`.
        temperature: > 0, softens both sides of the KL and nothing else.
        ignore_index: label of the pixels that count in no task term.
        distil_mask: bool (B, H, W), the pixels of the teacher terms; by default the labelled ones.
        weights: terms of weight 0 are not computed; None computes all.
        pos_weight: factor of the foreground in the bce of a one-logit model.
        dice_images: what `labelled_images` says of the micro-batches and processes of an update;
            None takes the mean over the labelled images of this batch.

    Returns:
        Terms as scalars on the student's device; those of a teacher are None without one.

    Raises:
        TypeError: if a tensor has the wrong kind of type, or temperature is no number.
        ValueError: if shapes do not fit, or temperature or pos_weight is out of range.
    """
    check_inputs(student_logits, teacher_logits, labels, distil_mask)
    check_temperature(temperature)
    check_pos_weight(pos_weight, student_logits.shape[1])
    factors = (weights or ALL_TERMS).effective()
    wanted = {name for name, factor in factors.items() if factor > 0}
    student, labels = working_precision(student_logits), class_ids(labels)
    valid = labels != ignore_index
    terms: dict[str, Tensor] = {}
    if teacher_logits is not None and wanted & TEACHER_TERMS:
        teacher = teacher_logits.detach().to(student.dtype)
        mask = valid if distil_mask is None else distil_mask
        terms |= _teacher_terms(student, teacher, mask, wanted, temperature)
    if wanted - TEACHER_TERMS:
        terms |= _task_terms(student, labels, valid, wanted, pos_weight)
    if "dice" in wanted:
        dice = binary_dice if student.shape[1] == 1 else softmax_dice
        terms["dice"] = dice(keep_pixels(student, valid), labels, valid, dice_images)
    if teacher_logits is None:
        wanted -= TEACHER_TERMS
    _check_computed(wanted, terms)
    return LossTerms(**terms)


def _check_computed(wanted: set[str], terms: dict[str, Tensor]) -> None:
    """A term that was added and is not computed would leave the total without a word."""
    missing = sorted(wanted - terms.keys())
    if missing:
        raise NotImplementedError(
            f"Expected the terms {sorted(wanted)}, got none of {missing}. Compute them in "
            "losses/terms.py."
        )


def weighted_sum(terms: LossTerms, weights: LossWeights) -> Tensor:
    """The total to minimise: each computed term times its effective weight.

    Raises:
        ValueError: if nothing is left to sum, or a task term that has a weight was not computed.
    """
    named, factors = terms.named(), weights.effective()
    for name, factor in factors.items():
        if name not in TEACHER_TERMS and factor > 0 and name not in named:
            raise ValueError(
                f"Expected the term {name}, whose weight is {factor}, got None. "
                "Compute the terms with the weights they are summed with."
            )
    # A weight of 0 leaves its term out altogether: 0 times a non-finite term would be NaN.
    parts = [factors[name] * term for name, term in named.items() if factors[name] > 0]
    if not parts:
        raise ValueError(
            f"Expected at least one term with a weight above 0, got {factors} for the computed "
            f"terms {sorted(named)}. {weight_hint()}"
        )
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def weight_hint() -> str:
    """Cure of a loss without any term."""
    task, taught = (
        [term.name for term in TERMS if term.needs_teacher == needs] for needs in (False, True)
    )
    return f"Give {' or '.join(task)} a weight; {' and '.join(taught)} need a teacher."


def _teacher_terms(
    student: Tensor, teacher: Tensor, mask: Tensor, wanted: set[str], temperature: float
) -> dict[str, Tensor]:
    kl, mse = (binary_kl, binary_mse) if student.shape[1] == 1 else (softmax_kl, centred_mse)
    # The teacher gets no gradient, so that the masked mean alone keeps its other pixels out.
    student = keep_pixels(student, mask)
    terms = {}
    if "kl" in wanted:
        terms["kl"] = kl(student, teacher, mask, temperature)
    if "mse" in wanted:
        terms["mse"] = mse(student, teacher, mask)
    return terms


def _task_terms(
    student: Tensor, labels: Tensor, valid: Tensor, wanted: set[str], pos_weight: float | None
) -> dict[str, Tensor]:
    binary = student.shape[1] == 1
    student = keep_pixels(student, valid)
    terms = {}
    if "bce" in wanted:
        terms["bce"] = (
            binary_cross_entropy(student, labels, valid, pos_weight)
            if binary
            else softmax_cross_entropy(student, labels, valid)
        )
    return terms
