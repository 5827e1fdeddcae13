"""One backward pass of a preflight: what each loss term does, and which parameters it reaches."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from kd_trainer.command_line import RunArguments
from kd_trainer.data import collate
from kd_trainer.evaluation import normalise
from kd_trainer.losses import LossTerms, distillation_terms, weighted_sum
from kd_trainer.models.modeling import SmpForSemanticSegmentation, encoder_units
from kd_trainer.preflight.loss import Gradients
from kd_trainer.tracking import TermSums
from kd_trainer.workflows.assemble import Parts
from kd_trainer.workflows.preflight.images import GRADIENT_IMAGES, Seen


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
