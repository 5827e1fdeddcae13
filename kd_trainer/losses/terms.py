"""The loss of a run: the terms of the table, their weights and their sum.

    total = kl·KL(T) + mse·MSE + task·(bce·BCE + dice·Dice + focal·Focal + ...)
            + pseudo·task·(bce·pseudo_BCE + dice·pseudo_Dice + ...)

Each term is a mean over valid pixels (Dice: over images that have any), in fp32, without clamps,
and stays on the device. At high temperature T²·KL tends to (s − t)²/8, so there KL and MSE are
nearly one term.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from kd_trainer.losses.checks import check_inputs, check_temperature, class_ids
from kd_trainer.losses.features import ComparedMaps
from kd_trainer.losses.functions import TERMS
from kd_trainer.losses.pseudo import PseudoLabels

NAMES = tuple(term.name for term in TERMS)
WEIGHTED = tuple(term.name for term in TERMS if not term.pseudo_of)  # with a weight of their own
TEACHER_TERMS = frozenset(term.name for term in TERMS if term.needs_teacher)
FEATURE_TERMS = tuple(term.name for term in TERMS if term.on_features)


class LossTerms(SimpleNamespace):
    """Unweighted scalar terms, an attribute for each row of `TERMS`; None where not computed."""

    def __init__(self, **terms: Tensor) -> None:
        super().__init__(**dict.fromkeys(NAMES) | terms)

    def named(self) -> dict[str, Tensor]:
        """The computed terms by name, in the order of `TERMS`."""
        return {name: value for name, value in vars(self).items() if value is not None}


class LossWeights(SimpleNamespace):
    """Factors of the terms, an attribute for each of them; 0 where not given.

    The recipe's are in arguments/training.py.

    Args:
        task: multiplies the terms that compare with labels.
        pseudo: multiplies these once more where the teacher's answers stand for labels.
        weights: by the names of the terms.

    Raises:
        TypeError: if there is no term of a name.
        ValueError: if a weight is negative or not finite.
    """

    def __init__(self, *, task: float = 1.0, pseudo: float = 0.0, **weights: float) -> None:
        unknown = sorted(weights.keys() - set(WEIGHTED))
        if unknown:
            raise TypeError(
                f"Expected loss weights for {', '.join(WEIGHTED)}, task or pseudo, got one for "
                f"{unknown[0]}. Name a term of the table, or add a row to it."
            )
        super().__init__(**dict.fromkeys(WEIGHTED, 0.0) | weights, task=task, pseudo=pseudo)
        for name, value in vars(self).items():
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(
                    f"Expected loss weight {name} >= 0, got {value}. Use 0 to leave it out."
                )

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> LossWeights:
        """Those of the settings of a run, by their flags; a missing one has no part in the loss."""
        weights = {name: settings.get(f"{name}_weight", 0.0) for name in (*WEIGHTED, "pseudo")}
        return cls(**weights, task=settings.get("task_weight", 1.0))

    def effective(self) -> dict[str, float]:
        """The factor of each term in the total, in the order of `TERMS`."""
        factors = {}
        for term in TERMS:
            factor: float = getattr(self, term.pseudo_of or term.name)
            if term.pseudo_of or not term.needs_teacher:
                factor *= self.task
            factors[term.name] = factor * self.pseudo if term.pseudo_of else factor
        return factors

    def following(self, weights: Mapping[str, float]) -> LossWeights:
        """The same with the weights of schedules at one time.

        A weight of 0 here stays 0: without a teacher its terms have none, whatever a schedule says.
        """
        if not weights:
            return self
        own = vars(self)
        return LossWeights(**own | {n: w for n, w in weights.items() if own[n] > 0})

    def scaled(self, teacher: float, task: float) -> LossWeights:
        """With this factor on each term that needs a teacher, and another `task`."""
        names = ("pseudo", *(name for name in WEIGHTED if name in TEACHER_TERMS))
        taught = {name: teacher * getattr(self, name) for name in names}
        return LossWeights(**vars(self) | taught | {"task": task})

    @property
    def ask_teacher(self) -> bool:
        """Whether a term that counts needs the teacher."""
        return any(factor > 0 for name, factor in self.effective().items() if name in TEACHER_TERMS)

    def without_teacher(self) -> LossWeights:
        """The same without the terms that need one."""
        taught = [name for name in WEIGHTED if name in TEACHER_TERMS]
        return LossWeights(**vars(self.without_pseudo()) | dict.fromkeys(taught, 0.0))

    def without_pseudo(self) -> LossWeights:
        """The same for images that all have masks."""
        return LossWeights(**vars(self) | {"pseudo": 0.0})

    @property
    def feature_terms(self) -> list[str]:
        """Names of the terms on features that count."""
        return [name for name in FEATURE_TERMS if getattr(self, name) > 0]

    def without_features(self) -> LossWeights:
        """The same without the terms on features, which an evaluation does not compute."""
        return LossWeights(**vars(self) | dict.fromkeys(FEATURE_TERMS, 0.0))

    def check_teacher(self, *, taught: bool = True) -> None:
        """Refuse a teacher that would be loaded and never be asked, and pseudo labels of nobody.

        Args:
            taught: whether there is one.

        Raises:
            ValueError: if no term that needs a teacher has a weight, or pseudo labels without one.
        """
        if not taught and self.pseudo > 0:
            raise ValueError(
                f"Expected a --teacher with --pseudo_weight {self.pseudo:g}, got none: its answers "
                "are the pseudo labels. Name one, or set --pseudo_weight 0."
            )
        if taught and not self.ask_teacher:
            flags = dict.fromkeys(f"--{term.flag}" for term in TERMS if term.needs_teacher)
            raise ValueError(
                f"Expected a loss term that follows the teacher, got a weight of 0 for each of "
                f"them ({', '.join(flags)}). Give one a weight, or train without the teacher."
            )

    def check_channels(self, channels: int) -> None:
        """Refuse a term that teaches nothing to a student of so many logits a pixel.

        Raises:
            ValueError: with the reason.
        """
        factors = self.effective()
        for term in TERMS:
            if factors[term.name] > 0 and term.function(channels) is None:
                raise ValueError(
                    f"Expected a weight of 0 for the term {term.name}, which teaches nothing to a "
                    f"student of {channels} logit{'s' * (channels > 1)} a pixel, got "
                    f"{factors[term.name]:g}: {term.degenerate}. Set --{term.flag} 0."
                )


SCHEDULED = (*WEIGHTED, "pseudo", "task")
"""Names of the weights that may follow a schedule."""

ALL_TERMS = LossWeights(**dict.fromkeys(WEIGHTED, 1.0), pseudo=1.0)
UNWEIGHTED = LossWeights(**{term.name: 1.0 for term in TERMS if not term.extra})


def distillation_terms(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    labels: Tensor,
    *,
    temperature: float,
    ignore_index: int = 255,
    distil_mask: Tensor | None = None,
    weights: LossWeights | None = None,
    pos_weight: float | Sequence[float] | None = None,
    dice_images: Tensor | None = None,
    pseudo: PseudoLabels | None = None,
    pseudo_images: Tensor | None = None,
) -> LossTerms:
    """Compute the terms on logits; one channel is a binary model, more are a softmax model.

    What logits, labels and mask hold at pixels that do not count has no influence, NaN included.
    Labels that count must be class ids; others fail in an index operation.

    Args:
        student_logits: (B, K, H, W), any floating type; computed in fp32 (float64 stays).
        teacher_logits: the same shape, or None; no gradient flows into them.
        labels: integer (B, H, W), class ids or `ignore_index`; or `binary_maps` (B, K, H, W).
        temperature: > 0, softens both sides of the KL and nothing else.
        ignore_index: label of the pixels that count in no task term.
        distil_mask: bool (B, H, W), the pixels of the teacher terms; by default the labelled ones.
        weights: terms of weight 0 are not computed; None computes all but the `extra` ones.
        pos_weight: factor of the foreground in the bce of one logit, or one of each class.
        dice_images: what `labelled_images` says of a step; None counts those of this batch.
        pseudo: what stands for labels where this mask has none; by default the teacher's classes.
        pseudo_images: the same of `unlabelled_images`.

    Returns:
        Terms as scalars on the student's device, None without the teacher or mask they need.

    Raises:
        TypeError: if a tensor has the wrong kind of type, or temperature is no number.
        ValueError: if shapes or numbers do not fit, or a weighted term is degenerate for K logits.
    """
    check_temperature(temperature)
    if labels.ndim == 4 and student_logits.shape[1] > 1:
        maps = binary_maps(student_logits, teacher_logits, labels, distil_mask)
        student_logits, teacher_logits, labels, distil_mask = maps
    check_inputs(student_logits, teacher_logits, labels, distil_mask)
    if weights is not None:
        weights.check_channels(student_logits.shape[1])
    factors = (weights or UNWEIGHTED).effective()
    student, labels = _working_precision(student_logits), class_ids(labels)
    valid = labels != ignore_index
    options = {"temperature": temperature, "pos_weight": pos_weight, "images": dice_images}
    inputs: dict[str, Any] = {"labels": labels, "valid": valid, **options}
    sides = [(False, valid)]
    if teacher_logits is not None:
        inputs["teacher"] = teacher_logits.detach().to(student.dtype)
        sides.append((True, valid if distil_mask is None else distil_mask))
    terms = _terms_of_sides(student, sides, inputs, factors)
    if distil_mask is not None and "teacher" in inputs:
        inputs |= {"student": student, "mask": distil_mask, "images": pseudo_images}
        terms |= (pseudo or PseudoLabels()).terms(inputs, valid, factors)
    return LossTerms(**terms)


def _terms_of_sides(
    student: Tensor,
    sides: Iterable[tuple[bool, Tensor]],
    inputs: Mapping[str, Any],
    factors: Mapping[str, float],
) -> dict[str, Tensor]:
    """The terms that have a factor, of each side: whether it follows the teacher, and its mask."""
    terms = {}
    for needs_teacher, mask in sides:
        # One tensor for all terms of a side, whose gradients then meet in it.
        given = {**inputs, "student": _keep_pixels(student, mask), "mask": mask}
        for term in TERMS:
            function = term.function(student.shape[1])
            if term.pseudo_of or term.on_features or not function:
                continue
            if term.needs_teacher == needs_teacher and factors[term.name] > 0:
                terms[term.name] = function(**{name: given[name] for name in term.takes})
    return terms


def feature_terms(compared: Mapping[str, Sequence[ComparedMaps]]) -> dict[str, Tensor]:
    """The terms on features, by name, of the maps that each of them compares."""
    functions = {term.name: term.binary for term in TERMS if term.on_features}
    return {
        name: function(maps) for name, maps in compared.items() if (function := functions[name])
    }


def binary_maps(
    student: Tensor, teacher: Tensor | None, planes: Tensor, distil_mask: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """Several labels a pixel as B·K images of one logit: each term is then a mean over classes.

    Args:
        student: logits (B, K, H, W).
        teacher: the same shape, or None.
        planes: integer (B, K, H, W).
        distil_mask: (B, H, W), or None.

    Raises:
        ValueError: if the planes are not those of the logits.
    """
    if planes.shape != student.shape:
        raise ValueError(
            f"Expected a plane of labels for each logit, {tuple(student.shape)}, got "
            f"{tuple(planes.shape)}. Give labels (B, K, H, W), or class ids (B, H, W)."
        )
    one = (planes.shape[0] * planes.shape[1], 1, *planes.shape[2:])
    if distil_mask is not None:
        distil_mask = distil_mask.unsqueeze(1).expand_as(planes).flatten(0, 1)
    # A teacher of other classes keeps its shape, which `check_inputs` refuses.
    fits = teacher is not None and teacher.shape == student.shape
    teacher = teacher.reshape(one) if teacher is not None and fits else teacher
    return student.reshape(one), teacher, planes.flatten(0, 1), distil_mask


def _working_precision(logits: Tensor) -> Tensor:
    """Logits as fp32, whatever the network ran in; float64 stays, so that gradients can be checked.

    Half precision holds neither the sum over a 640x640 image nor the T² that follows it.
    """
    return logits if logits.dtype == torch.float64 else logits.float()


def _keep_pixels(logits: Tensor, mask: Tensor) -> Tensor:
    """Logits (B, K, H, W) with zeros outside the mask (B, H, W).

    Multiplying the loss by the mask would not do: 0 times an infinite or NaN gradient is NaN.
    """
    return torch.where(mask.unsqueeze(1), logits, 0.0)


def labelled_images(batches: Iterable[Mapping[str, Any]], ignore_index: int) -> Tensor:
    """Mean number of images with a pixel that counts in these micro-batches, fp32, on their device.

    As `dice_images` of each of the micro-batches it makes the mean of their Dice terms the mean
    over all labelled images. Averaged over processes, it does so for what DDP averages.
    """
    # Of several labels a pixel each class is an image of its own.
    labels = [batch["labels"].flatten(0, -3) for batch in batches]
    counts = [(ids != ignore_index).flatten(1).any(dim=1).sum() for ids in labels]
    return torch.stack(counts).float().mean()


def unlabelled_images(batches: Iterable[Mapping[str, Any]], ignore_index: int) -> Tensor:
    """The same of the images with a pixel that is followed and has no label: `pseudo_images`."""
    counts = []
    for batch in batches:
        labels, followed = batch["labels"], batch["distil_mask"]
        followed = followed if labels.ndim == followed.ndim else followed.unsqueeze(1)
        missing = (followed & (labels == ignore_index)).flatten(0, -3)
        counts.append(missing.flatten(1).any(dim=1).sum())
    return torch.stack(counts).float().mean()


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
    return sum(parts[1:], start=parts[0])


def weight_hint() -> str:
    """Cure of a loss without any term."""
    task, taught = (
        [name for name in WEIGHTED if (name in TEACHER_TERMS) == needs] for needs in (False, True)
    )
    return f"Give {' or '.join(task)} a weight; {' and '.join(taught)} need a teacher."
