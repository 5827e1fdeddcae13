"""The loss: what each term does to the student, and which parameters it reaches."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kd_trainer.build import RunComponents
from kd_trainer.config import RunArguments
from kd_trainer.data import collate
from kd_trainer.doctor.finding import Finding, fault, listed, note, ok, several
from kd_trainer.evaluation import normalise, pixel_statistics
from kd_trainer.losses import (
    TEACHER_TERMS,
    TERMS,
    LossTerms,
    distillation_terms,
    weight_hint,
    weighted_sum,
)
from kd_trainer.losses.terms import ALL_TERMS
from kd_trainer.students import never_used, set_free_units, student_logits, units_of
from kd_trainer.tracking import TermSums

Loss = Callable[[Tensor, Tensor | None, Mapping[str, Tensor]], LossTerms]
"""Terms of student logits, teacher logits and a batch with `labels`."""

GRADIENT_IMAGES = 2  # of one backward pass: BatchNorm needs two where it pools to one pixel
_PSEUDO = frozenset(term.name for term in TERMS if term.pseudo_of)
_FLAGS = {term.name: term.flag for term in TERMS}
_NOTHING = 1e-6  # of the whole gradient
_ALMOST_ALL = 0.9


def loss_of(run: RunArguments, parts: RunComponents) -> Loss:
    """The loss terms as at the first step of a run; with pseudo labels for all images but one."""
    args = run.training
    schedule = args.schedule(len(units_of(parts.student)), args.num_train_epochs)

    def loss(student: Tensor, teacher: Tensor | None, batch: Mapping[str, Tensor]) -> LossTerms:
        on_device = {
            name: batch[name].to(student.device)
            for name in ("labels", "distil_mask")
            if name in batch
        }
        labels = on_device["labels"]
        if parts.loss_weights.pseudo > 0 and "distil_mask" in batch:
            labels = labels.clone()
            labels[1:] = run.data.ignore_index  # as if they had no mask
        return distillation_terms(
            student,
            teacher,
            labels,
            temperature=schedule.temperature(0),
            ignore_index=run.data.ignore_index,
            distil_mask=on_device.get("distil_mask"),
            weights=parts.loss_weights,
            pos_weight=args.class_factors,
            pseudo=args.pseudo,
        )

    return loss


def degenerate_finding(
    channels: int, loss: Loss, *, teacher: bool = True, multi_label: bool = False
) -> Finding:
    """Whether every term that has a weight can teach a student of so many logits a pixel.

    A term cannot, whatever the data say, if for random logits and labels it is not finite, or has
    no gradient beside the largest: the softmax KL of one channel, for instance, is always zero.

    Args:
        channels: logits of the student at each pixel.
        loss: its terms.
        teacher: whether there is one.
        multi_label: whether a pixel may have several labels.
    """
    check, logits = "loss", several(channels, "logit")
    random = torch.Generator().manual_seed(0)
    shape = (2, channels, 16, 16)
    student = (2 * torch.randn(shape, generator=random)).requires_grad_()
    guide = 4 * torch.randn(shape, generator=random)
    labels = torch.randint(0, max(channels, 2), (2, 16, 16), generator=random)
    if multi_label:
        labels = torch.randint(0, 2, shape, generator=random)
    tracked = TermSums(ALL_TERMS)
    tracked.add(loss(student, guide if teacher else None, {"labels": labels}), student)
    if not tracked.sums:
        return fault(
            check,
            "Expected a loss term with a weight above 0, got none",
            weight_hint(),
        )
    norms = {
        name: float(tracked.shares[name]) if bool(value.isfinite()) else math.nan
        for name, value in tracked.sums.items()
    }
    largest = max((n for n in norms.values() if math.isfinite(n)), default=0.0)
    degenerate = [n for n, norm in norms.items() if not norm > _NOTHING * max(largest, _NOTHING)]
    if degenerate:
        return fault(
            check,
            f"Expected loss terms that can teach a student of {logits}, got "
            f"{', '.join(degenerate)}, degenerate there",
            f"Set --{_FLAGS[degenerate[0]]} 0.",
        )
    return ok(check, f"no term is degenerate for {logits} a pixel")


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
    missing: Sequence[str]
    bad: Sequence[str]
    sizes: Mapping[str, int]


def first_gradients(
    student: nn.Module,
    samples: Sequence[dict[str, Tensor]],
    teacher_logits: Sequence[Tensor],
    loss: Loss,
    parts: RunComponents,
) -> Gradients:
    """Gradients of the first images, with every encoder unit free.

    Args:
        student: a copy that may be changed.
        samples: of the data.
        teacher_logits: of the first samples, (1, K, S, S) each; empty without a teacher.
        loss: its terms.
        parts: the weights of the loss.
    """
    set_free_units(student, None)
    student.train()
    for module in student.modules():
        if isinstance(module, nn.SyncBatchNorm):
            module.eval()  # it would wait for the other processes, which do not look
    # A single image is taken twice.
    batch = collate([*samples, *samples][:GRADIENT_IMAGES])
    device = next(student.parameters()).device
    pixels = normalise(batch["pixel_values"].to(device), pixel_statistics(student, device))
    logits = student_logits(student, pixels)
    guide = [*teacher_logits, *teacher_logits][:GRADIENT_IMAGES]
    terms = loss(logits, torch.cat(guide) if guide else None, batch)
    tracked = TermSums(parts.loss_weights)
    tracked.add(terms, logits)
    weighted_sum(terms, parts.loss_weights).backward()
    idle = never_used(student)
    used = {n: p for n, p in student.named_parameters() if n not in idle}
    gradients = {name: p.grad for name, p in used.items() if p.grad is not None}
    return Gradients(
        terms={name: float(value) for name, value in tracked.sums.items()},
        norms={name: float(norm) for name, norm in tracked.shares.items()},
        missing=[name for name in used if name not in gradients],
        bad=[n for n, g in gradients.items() if not bool(torch.isfinite(g).all())],
        sizes={name: p.numel() for name, p in used.items()},
    )


def share_finding(gradients: Gradients) -> Finding:
    """The share of each term in the gradient at the logits, and whether one has none or all."""
    check, norms = "loss terms", gradients.norms
    broken = [name for name, value in gradients.terms.items() if not math.isfinite(value)]
    broken += [name for name, norm in norms.items() if not math.isfinite(norm)]
    if broken:
        return fault(
            check,
            f"Expected finite loss terms, got {broken[0]} = {gradients.terms[broken[0]]:g} or a "
            "gradient that is not",
            f"Look for extreme logits of the teacher, or set --{_FLAGS[broken[0]]} 0.",
        )
    whole = sum(norms.values())
    shares = {name: norm / whole if whole else 0.0 for name, norm in norms.items()}
    text = ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
    idle = [name for name, share in shares.items() if share < _NOTHING]
    if idle and all(name in _PSEUDO for name in idle):
        return note(
            check,
            f"no pseudo label of the image that was tried is sure enough ({text})",
            "Lower --pseudo_confidence if that is so of most images.",
        )
    if idle:
        return fault(
            check,
            f"Expected a gradient from every loss term, got none from {' and '.join(idle)} "
            f"({text})",
            f"Check the teacher and the masks, or set --{_FLAGS[idle[0]]} 0.",
        )
    top = max(shares, key=lambda name: shares[name])
    if len(shares) > 1 and top in TEACHER_TERMS and shares[top] > _ALMOST_ALL:
        return note(
            check,
            f"{top} makes up {shares[top]:.0%} of the gradient at the student's first logits "
            f"({text})",
            f"Lower --{_FLAGS[top]} if the other terms are to count.",
        )
    return ok(check, f"share of the gradient: {text}")


def parameter_finding(gradients: Gradients) -> Finding:
    """Whether every parameter of the student is reached, its encoder wholly free."""
    check, missing = "gradients", gradients.missing
    total = sum(gradients.sizes.values())
    if gradients.bad:
        return fault(
            check,
            f"Expected finite gradients, got NaN or infinity in {listed(gradients.bad)}",
            "Look for extreme logits or weights of the student.",
        )
    if len(missing) == len(gradients.sizes):
        return fault(
            check, "Expected gradients in the student, got none in any parameter", weight_hint()
        )
    if missing:
        lost = sum(gradients.sizes[name] for name in missing)
        return note(
            check,
            f"{several(len(missing), 'parameter')} ({lost / total:.1%} of the values) got no "
            f"gradient: {listed(missing)}",
            "They stay as they are: dead weight in the student's file. Take another architecture "
            "or depth.",
        )
    return ok(check, f"reach all {total:,} used parameters with every unit free")
