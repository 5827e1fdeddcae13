"""Checks of the loss: what each term does to the student, and which parameters it reaches."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kd_trainer.build import Parts
from kd_trainer.config import RunArguments
from kd_trainer.data import collate
from kd_trainer.doctor.finding import Finding, fault, note, ok, several
from kd_trainer.doctor.images import GRADIENT_IMAGES, Seen
from kd_trainer.evaluation import normalise
from kd_trainer.losses import (
    TEACHER_TERMS,
    LossTerms,
    distillation_terms,
    weight_hint,
    weighted_sum,
)
from kd_trainer.models.modeling import SmpForSemanticSegmentation, encoder_units
from kd_trainer.tracking import TermSums

Compute = Callable[[Tensor, Tensor, Tensor], LossTerms]

_NOTHING = 1e-6  # of the whole gradient
_ALMOST_ALL = 0.9
_SHOWN = 3


@dataclass(frozen=True)
class Gradients:
    """What one backward pass gave.

    Attributes:
        terms: value of each term.
        norms: norm of each term's weighted gradient at the student's logits.
        missing: parameters that got no gradient. One of zeros is a gradient: networks that start
            with a scale of 0 have some.
        bad: parameters whose gradient is not finite.
        sizes: number of values of each parameter that was looked at.
    """

    terms: Mapping[str, float]
    norms: Mapping[str, float]
    missing: list[str]
    bad: list[str]
    sizes: Mapping[str, int]


def share_finding(gradients: Gradients) -> Finding:
    """The share of each term in the gradient at the logits, and whether one has none or all."""
    check = "loss terms"
    broken = [name for name, value in gradients.terms.items() if not math.isfinite(value)]
    broken += [name for name, norm in gradients.norms.items() if not math.isfinite(norm)]
    if broken:
        return fault(
            check,
            f"Expected finite loss terms, got {broken[0]} = {gradients.terms[broken[0]]:g} or a "
            "gradient that is not",
            f"Look for extreme logits of the teacher, or set --{broken[0]}_weight 0.",
        )
    whole = sum(gradients.norms.values())
    shares = {name: norm / whole if whole else 0.0 for name, norm in gradients.norms.items()}
    shown = ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
    idle = [name for name, share in shares.items() if share < _NOTHING]
    if idle:
        return fault(
            check,
            f"Expected a gradient from every loss term, got none from {' and '.join(idle)} "
            f"({shown})",
            f"Check the teacher and the masks, or set --{idle[0]}_weight 0.",
        )
    top = max(shares, key=lambda name: shares[name])
    if len(shares) > 1 and top in TEACHER_TERMS and shares[top] > _ALMOST_ALL:
        return note(
            check,
            f"{top} makes up {shares[top]:.0%} of the gradient at the student's first logits "
            f"({shown})",
            f"Lower --{top}_weight if the other terms are to count.",
        )
    return ok(check, f"share of the gradient: {shown}")


def parameter_finding(gradients: Gradients) -> Finding:
    """Whether every parameter of the student is reached, its encoder wholly free."""
    check = "gradients"
    total = sum(gradients.sizes.values())
    if gradients.bad:
        return fault(
            check,
            f"Expected finite gradients, got NaN or infinity in {_names(gradients.bad)}",
            "Look for extreme logits or weights of the student.",
        )
    if len(gradients.missing) == len(gradients.sizes):
        return fault(
            check,
            "Expected gradients in the student, got none in any parameter",
            weight_hint(),
        )
    if gradients.missing:
        lost = sum(gradients.sizes[name] for name in gradients.missing)
        return note(
            check,
            f"{several(len(gradients.missing), 'parameter')} ({lost / total:.1%} of the values) "
            f"got no gradient: {_names(gradients.missing)}",
            "They stay as they are: dead weight in the student's file. Take another architecture "
            "or depth.",
        )
    return ok(check, f"reach all {total:,} used parameters with every unit free")


def _names(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")


def term_norms(channels: int, compute: Compute) -> dict[str, float]:
    """Norm of each term's gradient for random logits and labels, NaN where it is not finite.

    Args:
        channels: logits of the student at each pixel.
        compute: terms of (student logits, teacher logits, labels).
    """
    random = torch.Generator().manual_seed(0)
    shape = (2, channels, 16, 16)
    student = (2 * torch.randn(shape, generator=random)).requires_grad_()
    teacher = 4 * torch.randn(shape, generator=random)
    labels = torch.randint(0, max(channels, 2), (2, 16, 16), generator=random)
    norms = {}
    for name, value in compute(student, teacher, labels).named().items():
        (gradient,) = torch.autograd.grad(value, student, retain_graph=True)
        norms[name] = float(gradient.norm()) if bool(torch.isfinite(value)) else math.nan
    return norms


def degenerate(norms: Mapping[str, float]) -> list[str]:
    """Terms that cannot teach, whatever teacher and data say.

    Not finite, or without a gradient beside the largest: the softmax KL of a single channel, for
    instance, is identically zero.
    """
    largest = max((n for n in norms.values() if math.isfinite(n)), default=0.0)
    return [n for n, norm in norms.items() if not norm > _NOTHING * max(largest, _NOTHING)]


def degenerate_finding(channels: int, compute: Compute) -> Finding:
    """Whether every term that has a weight can do something for this number of logits."""
    check = "loss"
    logits = several(channels, "logit")
    norms = term_norms(channels, compute)
    if not norms:
        return fault(
            check,
            "Expected a loss term with a weight above 0, got none",
            weight_hint(),
        )
    found = degenerate(norms)
    if found:
        return fault(
            check,
            f"Expected loss terms that can teach a student of {logits}, got {', '.join(found)}, "
            "degenerate there",
            f"Set --{found[0]}_weight 0.",
        )
    return ok(check, f"no term is degenerate for {logits} a pixel")


def terms_of_run(
    run: RunArguments,
    parts: Parts,
    student: Tensor,
    teacher: Tensor | None,
    batch: Mapping[str, Tensor],
) -> LossTerms:
    """The loss terms of a batch as at the first update of the run."""
    args = run.training
    schedule = args.schedule(len(encoder_units(parts.student)), args.num_train_epochs)
    return distillation_terms(
        student,
        teacher,
        batch["labels"].to(student.device),
        temperature=schedule.temperature(0),
        ignore_index=run.data.ignore_index,
        distil_mask=batch["distil_mask"].to(student.device) if "distil_mask" in batch else None,
        weights=parts.loss_weights,
        pos_weight=args.pos_weight,
    )


def backward(
    run: RunArguments,
    parts: Parts,
    student: SmpForSemanticSegmentation,
    seen: Seen,
    *,
    statistics: tuple[Tensor, Tensor],
) -> Gradients:
    """Gradients of the first images that were looked at, with every encoder unit free.

    Args:
        run: settings of the loss.
        parts: weights of the loss.
        student: a copy that may be changed, on the device of the statistics.
        seen: the images.
        statistics: mean and std of the input.
    """
    student.set_free_units(None)
    student.train()
    for module in student.modules():
        if isinstance(module, nn.SyncBatchNorm):
            module.eval()  # it would wait for the other processes, which do not look
    # A single image is taken twice.
    batch = collate((seen.samples * GRADIENT_IMAGES)[:GRADIENT_IMAGES])
    pixels = normalise(batch["pixel_values"].to(statistics[0].device), statistics)
    logits = student(pixel_values=pixels)["raw_logits"]
    guide = torch.cat((seen.logits * GRADIENT_IMAGES)[:GRADIENT_IMAGES]) if seen.logits else None
    terms = terms_of_run(run, parts, logits, guide, batch)
    tracked = TermSums(parts.loss_weights)
    tracked.add(terms, logits)
    weighted_sum(terms, parts.loss_weights).backward()
    never_used = student.never_used_parameters()
    used = {n: p for n, p in student.named_parameters() if n not in never_used}
    gradients = {name: p.grad for name, p in used.items() if p.grad is not None}
    return Gradients(
        terms={name: float(value.detach()) for name, value in terms.named().items()},
        norms={name: float(norm) for name, norm in tracked.shares.items()},
        missing=[name for name in used if name not in gradients],
        bad=[n for n, g in gradients.items() if not bool(torch.isfinite(g).all())],
        sizes={name: p.numel() for name, p in used.items()},
    )
