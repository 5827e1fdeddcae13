"""What a log holds: sums of the loss terms, on the device (one transfer a log, not one a step)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from kd_trainer.arguments import DistillationArguments
from kd_trainer.fast_layers import compiled_graphs
from kd_trainer.losses import LossTerms, LossWeights
from kd_trainer.optim import PROJECTIONS, NamedParameters, base_rate, unit_parameters
from kd_trainer.schedules import TrainingSchedule
from kd_trainer.students import free_units, parameter_counts


def schedule_logs(
    model: nn.Module,
    schedule: TrainingSchedule,
    args: DistillationArguments,
    step: int,
    projections: NamedParameters | None = None,
) -> dict[str, float]:
    """What the schedules do at a step: temperature, free units, learning rate of each part.

    Also, where something is compiled, how often it was: each unit that is freed means once more.
    """
    rates = {
        f"lr/{part}": base_rate(part, args) * schedule.rate(part)(step)
        for part, parameters in (unit_parameters(model) | {PROJECTIONS: projections}).items()
        if parameters
    }
    compiled = args.torch_compile or args.compile_teacher
    _, _, trainable = parameter_counts(model)
    return {
        **({"compiled_graphs": float(compiled_graphs())} if compiled else {}),
        "temperature": schedule.temperature(step),
        **{f"weight/{name}": weight for name, weight in schedule.weights(step).items()},
        "free_units": float(free_units(model)),
        "trainable_parameters": float(trainable),
        **rates,
    }


class TermSums:
    """Running sums of the named terms, and each term's share of the gradient at the logits.

    The share of term i is `|w_i g_i| / sum_j |w_j g_j|`, with g_i the gradient of the term at the
    student's logits. It is measured once between two logs and says which term steers: a term may
    be a small part of the loss and most of its gradient, or the other way round.
    """

    def __init__(self, weights: LossWeights) -> None:
        self.weights = weights.effective()
        self.sums: dict[str, Tensor] = {}
        self.shares: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}  # of the micro-batches that had the term
        self.count = 0

    def add(self, terms: LossTerms, logits: Tensor, weights: LossWeights | None = None) -> None:
        """Add the terms of one micro-batch, with the weights of its step; no host sync.

        With terms on features, `logits` are a map that all terms have a gradient at.
        """
        if weights is not None:
            self.weights = weights.effective()
        named = terms.named()
        if not self.shares and logits.requires_grad:
            self.shares = self._gradient_norms(named, logits)
        for name, value in named.items():
            self.sums[name] = self.sums.get(name, torch.zeros_like(value)) + value.detach()
            self.counts[name] = self.counts.get(name, 0) + 1
        self.count += 1

    def _gradient_norms(self, named: dict[str, Tensor], logits: Tensor) -> dict[str, Tensor]:
        norms = {}
        for name, value in named.items():
            if value.requires_grad:
                (gradient,) = torch.autograd.grad(
                    value, logits, retain_graph=True, materialize_grads=True
                )
                norms[name] = self.weights[name] * gradient.float().norm()
        return norms

    def check_finite(self, step: int) -> None:
        """Raise if a sum is not finite.

        Raises:
            FloatingPointError: naming the term.
        """
        for name, value in zip(self.sums, self._host(list(self.sums.values())), strict=True):
            if not math.isfinite(value):
                raise FloatingPointError(
                    f"Expected finite loss terms, got {name} = {value} at step {step}. Nothing "
                    "was saved after it. Look for extreme logits of the teacher or student, or "
                    "lower the learning rate or the weight of this term."
                )

    def drain(self, accelerator: Accelerator) -> dict[str, float]:
        """Means over micro-batches and processes since the last call, and the gradient shares."""
        if not self.count:
            return {}
        names = list(self.sums)
        counts = torch.tensor([float(self.counts[n]) for n in names], device=accelerator.device)
        flat = torch.cat([torch.stack([self.sums[n].float() for n in names]), counts])
        totals = self._host_list(accelerator.reduce(flat, reduction="sum"))
        result = {n: s / c for n, s, c in zip(names, totals, totals[len(names) :], strict=False)}
        norms = self._host(list(self.shares.values()))
        whole = sum(norms)
        if whole > 0:
            result |= {
                f"grad_share/{name}": norm / whole
                for name, norm in zip(self.shares, norms, strict=True)
            }
        self.sums, self.shares, self.counts, self.count = {}, {}, {}, 0
        return result

    def saved(self) -> dict[str, Any]:
        """The sums as they stand, for a checkpoint between two logs; no host sync."""
        return {name: getattr(self, name) for name in ("sums", "shares", "counts", "count")}

    def restore(self, saved: Mapping[str, Any], device: torch.device) -> None:
        """Go on summing on a device where `saved` left off."""
        self.sums = {name: value.to(device) for name, value in saved["sums"].items()}
        self.shares = {name: value.to(device) for name, value in saved["shares"].items()}
        self.counts, self.count = dict(saved["counts"]), saved["count"]

    @staticmethod
    def _host(values: list[Tensor]) -> list[float]:
        return TermSums._host_list(torch.stack(values)) if values else []

    @staticmethod
    def _host_list(values: Tensor) -> list[float]:
        return [float(v) for v in values.tolist()]
