"""The loss functions on labels, and the table of all terms that everybody reads.

The functions are pure. Those called `binary` are for one logit a pixel (K = 1, read through a
sigmoid), the others for a softmax over K >= 2 channels. Each gives a mean over the pixels that
count, in nats where it is an entropy, without clamps. Logits arrive as fp32 or float64, the
student's with zeros outside the mask, the teacher's without gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_trainer.losses.checks import check_pos_weight
from kd_trainer.losses.features import (
    Alignment,
    MaskedGenerator,
    Projection,
    attention_transfer,
    channel_wise,
    fitnet,
    masked_generation,
)
from kd_trainer.losses.pixels import Labels, Logits, Mask, Scalar, masked_mean
from kd_trainer.losses.teacher_terms import (
    binary_boundary_kl,
    binary_intra,
    binary_kl,
    binary_mse,
    centred_mse,
    channel_kl,
    decoupled_kl,
    softmax_boundary_kl,
    softmax_inter,
    softmax_intra,
    softmax_kl,
)

Probabilities = Tensor  # (B, K, H, W), of each class in the place of one label

# Keeps 0/0 apart: an image without foreground that is predicted empty has loss 0. In pixels, so it
# fades where objects are large.
EPSILON = 1.0
FOCAL_GAMMA = 2.0  # of Lin et al. 2017, who found it best
TVERSKY_ALPHA, TVERSKY_BETA = 0.3, 0.7  # of false alarms and of misses, as in Salehi et al. 2017


def binary_cross_entropy(
    student: Logits, labels: Labels, mask: Mask, pos_weight: float | None
) -> Scalar:
    """Cross entropy of the sigmoid with 0/1 labels, mean over the pixels of the mask.

    Args:
        student: logits (B, 1, H, W).
        labels: 0 or 1 inside the mask.
        mask: the pixels that count.
        pos_weight: factor on the foreground's part; the mean still divides by the pixel count.

    Raises:
        ValueError: if pos_weight is not a finite number above 0.
    """
    check_pos_weight(pos_weight, channels=1)
    target = _binary_target(labels, mask, student.dtype)
    # Filled on the device: a tensor made from a Python list would be copied there at each step.
    weight = None if pos_weight is None else student.new_full((), pos_weight)
    loss = F.binary_cross_entropy_with_logits(
        student.squeeze(1), target, pos_weight=weight, reduction="none"
    )
    return masked_mean(loss, mask)


def softmax_cross_entropy(
    student: Logits, labels: Labels, mask: Mask, pos_weight: Sequence[float] | None
) -> Scalar:
    """Cross entropy of the softmax with class ids, mean over the pixels of the mask.

    Args:
        student: logits (B, K, H, W).
        labels: 0..K-1 inside the mask.
        mask: the pixels that count.
        pos_weight: a factor for the pixels of each class; the mean still divides by their number,
            so that micro-batches add up.

    Raises:
        ValueError: if pos_weight is not one finite number >= 0 a class.
    """
    check_pos_weight(pos_weight, channels=student.shape[1])
    target = torch.where(mask, labels, 0).unsqueeze(1)
    loss = -F.log_softmax(student, dim=1).gather(1, target).squeeze(1)
    if pos_weight is not None:
        factors = _on_device(tuple(pos_weight), student.dtype, student.device)
        loss = loss * factors[target.squeeze(1)]
    return masked_mean(loss, mask)


@cache
def _on_device(numbers: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers as a tensor, copied to the device once: at each step the copy would stop it."""
    return torch.tensor(numbers, dtype=dtype, device=device)


def binary_dice(student: Logits, labels: Labels, mask: Mask, images: Tensor | None) -> Scalar:
    """1 − Dice of the foreground's probability, mean over the images with valid pixels.

    Args:
        student: logits (B, 1, H, W).
        labels: 0 or 1 inside the mask.
        mask: the pixels that count; images without any are left out.
        images: divide by this number instead of that of the images with valid pixels.

    Source: Milletari et al. 2016, arXiv 1606.04797.
    """
    return _image_mean(_one_minus_dice(*_foreground(student, labels, mask)), mask, images)


def softmax_dice(student: Logits, labels: Labels, mask: Mask, images: Tensor | None) -> Scalar:
    """1 − Dice, mean over the classes each image shows, then over the images as `binary_dice`.

    A class that an image does not show is left out there: its Dice would only count false alarms,
    at ε's mercy.
    """
    probability, target = _classes(student, labels, mask)
    return _image_mean(_present_mean(_one_minus_dice(probability, target), target), mask, images)


def binary_focal(student: Logits, labels: Labels, mask: Mask) -> Scalar:
    """(1 − p)² times the cross entropy, p the probability of the label; mean over the mask.

    Source: Lin et al. 2017, arXiv 1708.02002, without α; computed by smp.
    """
    target = _binary_target(labels, mask, student.dtype)
    options = {"gamma": FOCAL_GAMMA, "alpha": None, "reduction": "none"}
    return masked_mean(_smp().focal_loss_with_logits(student.squeeze(1), target, **options), mask)


def softmax_focal(student: Logits, labels: Labels, mask: Mask) -> Scalar:
    """The same of the softmax, where smp's `FocalLoss` would take K sigmoids."""
    target = torch.where(mask, labels, 0)
    options = {"gamma": FOCAL_GAMMA, "reduction": "none"}
    return masked_mean(_smp().softmax_focal_loss_with_logits(student, target, **options), mask)


def binary_lovasz(student: Logits, labels: Labels, mask: Mask, images: Tensor | None) -> Scalar:
    """Lovász hinge, the convex surrogate of 1 − IoU of the foreground; mean as `binary_dice`.

    Source: Berman et al. 2018, arXiv 1705.08790; computed by smp.
    """
    target = _binary_target(labels, mask, student.dtype)
    return _lovasz("binary", student, target, mask, images)


def softmax_lovasz(student: Logits, labels: Labels, mask: Mask, images: Tensor | None) -> Scalar:
    """Lovász-Softmax, mean over the classes each image shows, then over images as `binary_dice`."""
    return _lovasz("multiclass", student, labels, mask, images)


def binary_tversky(student: Logits, labels: Labels, mask: Mask, images: Tensor | None) -> Scalar:
    """1 − (TP + ε)/(TP + α·FP + β·FN + ε) of the foreground's probability, mean as `binary_dice`.

    Source: Salehi et al. 2017, arXiv 1706.05721; the ratio is computed by smp.
    """
    return _image_mean(_one_minus_tversky(*_foreground(student, labels, mask)), mask, images)


def softmax_tversky(student: Logits, labels: Labels, mask: Mask, images: Tensor | None) -> Scalar:
    """The same for the classes each image shows, as `softmax_dice`."""
    probability, target = _classes(student, labels, mask)
    return _image_mean(_present_mean(_one_minus_tversky(probability, target), target), mask, images)


def binary_soft_cross_entropy(
    student: Logits, labels: Probabilities, mask: Mask, pos_weight: float | None
) -> Scalar:
    """`binary_cross_entropy` with a probability of the foreground in the place of a label."""
    check_pos_weight(pos_weight, channels=1)
    weight = None if pos_weight is None else student.new_full((), pos_weight)
    loss = F.binary_cross_entropy_with_logits(student, labels, pos_weight=weight, reduction="none")
    return masked_mean(loss.squeeze(1), mask)


def softmax_soft_cross_entropy(
    student: Logits, labels: Probabilities, mask: Mask, pos_weight: Sequence[float] | None
) -> Scalar:
    """`softmax_cross_entropy` with the probabilities of all classes."""
    check_pos_weight(pos_weight, channels=student.shape[1])
    loss = -labels * F.log_softmax(student, dim=1)
    if pos_weight is not None:
        loss = loss * _on_device(tuple(pos_weight), student.dtype, student.device).view(1, -1, 1, 1)
    return masked_mean(loss.sum(dim=1), mask)


def binary_soft_dice(
    student: Logits, labels: Probabilities, mask: Mask, images: Tensor | None
) -> Scalar:
    """`binary_dice` with probabilities, the overlap of a pixel being the smaller of both.

    Of class ids that is the product too; of probabilities the product is largest at 0 and 1, and
    would teach a student to be surer than its teacher.

    Source: Wang et al. 2023, arXiv 2303.16296.
    """
    values = _one_minus_soft_dice(torch.sigmoid(student), labels, mask)
    return _image_mean(values.squeeze(1), mask, images)


def softmax_soft_dice(
    student: Logits, labels: Probabilities, mask: Mask, images: Tensor | None
) -> Scalar:
    """The same, mean over the classes that are the most probable one somewhere in the image."""
    values = _one_minus_soft_dice(torch.softmax(student, dim=1), labels, mask)
    _, shown = _classes(student, labels.argmax(dim=1), mask)
    return _image_mean(_present_mean(values, shown), mask, images)


def _one_minus_soft_dice(probability: Tensor, target: Probabilities, mask: Mask) -> Tensor:
    """1 − (2·Σmin + ε)/(both areas + ε) of each class over the pixels of the mask: (B, K)."""
    p, q = (torch.where(mask.unsqueeze(1), one, 0.0) for one in (probability, target))
    overlap, areas = (one.sum(dim=(-2, -1)) for one in (torch.minimum(p, q), p + q))
    return 1.0 - (2.0 * overlap + EPSILON) / (areas + EPSILON)


def _smp() -> Any:
    """The functions behind smp's losses, imported on use: `--help` needs none of it.

    Its classes pick the valid pixels by an index, for which the host waits, and give NaN for none.
    """
    from segmentation_models_pytorch.losses import _functional

    return _functional


def _lovasz(
    mode: str, student: Logits, target: Tensor, mask: Mask, images: Tensor | None
) -> Scalar:
    """Image by image: over a batch it would not add up. smp sorts in fp32, and the host waits."""
    from segmentation_models_pytorch.losses import LovaszLoss

    loss = LovaszLoss(mode, ignore_index=-1)
    target = torch.where(mask, target, -1)
    # The sum of one number; of an image without valid pixels smp gives an empty tensor.
    parts = [
        loss(logits.float(), ids).sum()
        for logits, ids in zip(student.split(1), target.split(1), strict=True)
    ]
    return _image_mean(torch.stack(parts).to(student.dtype), mask, images)


def _foreground(student: Logits, labels: Labels, mask: Mask) -> tuple[Tensor, Tensor]:
    """Probability and target (B, H, W) of the foreground, both 0 outside the mask."""
    target = _binary_target(labels, mask, student.dtype)
    return torch.where(mask, torch.sigmoid(student.squeeze(1)), 0.0), target


def _classes(student: Logits, labels: Labels, mask: Mask) -> tuple[Tensor, Tensor]:
    """Probability and one-hot target (B, K, H, W) of each class, both 0 outside the mask."""
    inside = mask.unsqueeze(1)
    probability = torch.where(inside, torch.softmax(student, dim=1), 0.0)
    ids = torch.where(mask, labels, 0).unsqueeze(1)
    return probability, torch.zeros_like(probability).scatter(1, ids, inside.to(probability.dtype))


def _present_mean(values: Tensor, target: Tensor) -> Tensor:
    """Mean of values (B, K) over the classes that each target (B, K, H, W) shows: (B,)."""
    present = target.flatten(2).any(dim=2)
    return torch.where(present, values, 0.0).sum(dim=1) / present.sum(dim=1).clamp(min=1)


def _binary_target(labels: Labels, mask: Mask, dtype: torch.dtype) -> Tensor:
    """Labels as 0.0 and 1.0, with 0.0 outside the mask.

    Looked up rather than cast: a class id of 2 then fails on every device, without a host sync,
    where a cast would train towards a probability of two.
    """
    table = torch.arange(2, dtype=dtype, device=labels.device)
    return table.gather(0, torch.where(mask, labels, 0).flatten()).view(labels.shape)


def _one_minus_dice(probability: Tensor, target: Tensor) -> Tensor:
    """1 − (2·overlap + ε)/(both areas + ε), summed over the last two dimensions."""
    overlap = (probability * target).sum(dim=(-2, -1))
    areas = probability.sum(dim=(-2, -1)) + target.sum(dim=(-2, -1))
    return 1.0 - (2.0 * overlap + EPSILON) / (areas + EPSILON)


def _one_minus_tversky(probability: Tensor, target: Tensor) -> Tensor:
    """One minus the Tversky index over the last two dimensions."""
    score: Tensor = _smp().soft_tversky_score(
        probability, target, TVERSKY_ALPHA, TVERSKY_BETA, smooth=EPSILON, dims=(-2, -1)
    )
    return 1.0 - score


def _image_mean(values: Tensor, mask: Mask, images: Tensor | None) -> Scalar:
    """Mean of values (B,) over the images with valid pixels; 0 without any. No host sync."""
    counted = mask.flatten(1).any(dim=1)
    images = counted.sum() if images is None else images
    # Below one where most micro-batches have no labelled image: only 0 is to be avoided.
    return torch.where(counted, values, 0.0).sum() / images.to(values.dtype).clamp(min=1e-6)


# `mask` is of the pixels that count for the term's side, `valid` of those with a label.
Input = Literal[
    "student",
    "teacher",
    "labels",
    "mask",
    "valid",
    "temperature",
    "pos_weight",
    "images",
    "features",
]


@dataclass(frozen=True)
class Term:
    """A row of the table; whatever computes, weighs, logs or shows terms reads these.

    Attributes:
        name: of its value in `LossTerms` and its weight in `LossWeights`.
        takes: what its functions are given, by the names of their parameters.
        binary: its function for one logit a pixel; None where it would teach nothing.
        softmax: the same for several logits.
        softmax_from: fewest logits for which `softmax` teaches.
        degenerate: why there is no function for some numbers of logits.
        title: in a model card, for a student of one logit.
        softmax_title: the same for a student of several, where it differs.
        also_metric: a metric has its name too, so that an evaluation calls it `NAME_loss`.
        extra: computed only where it has a weight, not where no weights are given.
        soft_binary: `binary` with probabilities for labels; None where that makes no sense.
        soft_softmax: the same of `softmax`.
        pseudo_of: name of the term of which it is the form against the teacher's answers.
        head: of a term on features: what is learned to make a map of so many channels (student's,
            teacher's) comparable; None compares the maps themselves.
    """

    name: str
    takes: tuple[Input, ...]
    binary: Callable[..., Scalar] | None
    softmax: Callable[..., Scalar] | None
    title: str
    softmax_title: str = ""
    softmax_from: int = 2
    degenerate: str = ""
    also_metric: bool = False
    extra: bool = False
    soft_binary: Callable[..., Scalar] | None = None
    soft_softmax: Callable[..., Scalar] | None = None
    pseudo_of: str = ""
    head: Callable[[int, int], nn.Module] | None = None

    @property
    def flag(self) -> str:
        """Name of its weight on the command line and in a configuration."""
        return "pseudo_weight" if self.pseudo_of else f"{self.name}_weight"

    @property
    def needs_teacher(self) -> bool:
        """Whether it follows the teacher; the others follow the labels."""
        return (
            bool(self.pseudo_of)
            or self.on_features
            or any(name.startswith("teacher") for name in self.takes)
        )

    @property
    def on_features(self) -> bool:
        """Whether it compares maps inside of both networks, while they are trained only."""
        return "features" in self.takes

    @property
    def softened(self) -> bool:
        """Whether the temperature of the run has a part in it."""
        return "temperature" in self.takes

    @property
    def evaluated_as(self) -> str:
        """Its name among the figures of an evaluation."""
        return f"{self.name}_loss" if self.also_metric else self.name

    def function(self, channels: int) -> Callable[..., Scalar] | None:
        """What computes it for so many logits a pixel; None where it is degenerate."""
        if channels == 1:
            return self.binary
        return self.softmax if channels >= self.softmax_from else None

    def soft_function(self, channels: int) -> Callable[..., Scalar] | None:
        """The same for probabilities in the place of labels."""
        return self.soft_binary if channels == 1 else self.soft_softmax

    def pseudo(self) -> Term:
        """Its form against the teacher's answers, at pixels without a label."""
        return replace(
            self,
            name=f"pseudo_{self.name}",
            title=f"pseudo {self.title}",
            softmax_title=self.softmax_title and f"pseudo {self.softmax_title}",
            also_metric=False,
            extra=True,
            pseudo_of=self.name,
        )


_TERMS = (
    Term(
        "kl",
        takes=("student", "teacher", "mask", "temperature"),
        binary=binary_kl,
        softmax=softmax_kl,
        title="KL(T)",
    ),
    Term(
        "mse",
        takes=("student", "teacher", "mask"),
        binary=binary_mse,
        softmax=centred_mse,
        title="MSE",
    ),
    Term(
        "bce",
        takes=("student", "labels", "mask", "pos_weight"),
        binary=binary_cross_entropy,
        softmax=softmax_cross_entropy,
        title="BCE",
        softmax_title="cross entropy",
        soft_binary=binary_soft_cross_entropy,
        soft_softmax=softmax_soft_cross_entropy,
    ),
    Term(
        "dice",
        takes=("student", "labels", "mask", "images"),
        binary=binary_dice,
        softmax=softmax_dice,
        title="Dice",
        also_metric=True,
        soft_binary=binary_soft_dice,
        soft_softmax=softmax_soft_dice,
    ),
    Term(
        "focal",
        takes=("student", "labels", "mask"),
        binary=binary_focal,
        softmax=softmax_focal,
        title="focal",
        extra=True,
    ),
    Term(
        "lovasz",
        takes=("student", "labels", "mask", "images"),
        binary=binary_lovasz,
        softmax=softmax_lovasz,
        title="Lovász",
        extra=True,
    ),
    Term(
        "tversky",
        takes=("student", "labels", "mask", "images"),
        binary=binary_tversky,
        softmax=softmax_tversky,
        title="Tversky",
        extra=True,
    ),
    Term(
        "cwd",
        takes=("student", "teacher", "mask"),
        binary=channel_kl,
        softmax=channel_kl,
        title="CWD",
        extra=True,
    ),
    Term(
        "dist_intra",
        takes=("student", "teacher", "mask"),
        binary=binary_intra,
        softmax=softmax_intra,
        title="DIST intra",
        extra=True,
    ),
    Term(
        "dist_inter",
        takes=("student", "teacher", "mask"),
        binary=None,
        softmax=softmax_inter,
        softmax_from=3,
        degenerate="the probabilities of two classes always correlate by 1 or -1, those of one "
        "by nothing, so that it has no gradient",
        title="DIST inter",
        extra=True,
    ),
    Term(
        "dkd",
        takes=("student", "teacher", "labels", "mask", "valid", "temperature"),
        binary=None,
        softmax=decoupled_kl,
        softmax_from=3,
        degenerate="there is one class beside the label, so that the part of the others is 0 and "
        "the rest is the KL",
        title="DKD",
        extra=True,
    ),
    Term(
        "boundary_kl",
        takes=("student", "teacher", "labels", "mask", "valid", "temperature"),
        binary=binary_boundary_kl,
        softmax=softmax_boundary_kl,
        title="boundary KL(T)",
        extra=True,
    ),
    *(
        Term(name, ("features",), function, function, title, extra=True, head=head)
        for name, function, title, head in (
            ("fitnet", fitnet, "FitNet", Projection),
            ("at", attention_transfer, "attention transfer", None),
            ("feature_cwd", channel_wise, "CWD of features", Alignment),
            ("mgd", masked_generation, "MGD", MaskedGenerator),
        )
    ),
)
PSEUDO = tuple(term.pseudo() for term in _TERMS if not term.needs_teacher)
TERMS = (*_TERMS, *PSEUDO)
