"""What a run writes to the disk."""

from __future__ import annotations

from kd_trainer.command_line import RunArguments
from kd_trainer.optim import unit_parameters
from kd_trainer.preflight.resources import DiskNeed
from kd_trainer.workflows.assemble import Parts, image_count
from kd_trainer.workflows.compare.budget import total_updates
from kd_trainer.workflows.plan import updates_per_epoch


def disk_need(run: RunArguments, parts: Parts) -> DiskNeed:
    """What the run writes: one checkpoint more than it keeps, while the next one is saved."""
    args = run.training
    per_epoch = updates_per_epoch(image_count(parts.train_dataset), args)
    updates = total_updates(args, per_epoch)
    every = per_epoch if args.save_strategy in ("epoch", "best") else args.save_steps
    every = every if every >= 1 else every * updates
    saves = 0 if args.save_strategy == "no" else max(1, round(updates / every))
    if args.save_total_limit is not None:
        kept = max(args.save_total_limit, 1 + bool(args.load_best_model_at_end))
        saves = min(saves, kept + 1)
    trainable = sum(p.numel() for own in unit_parameters(parts.student).values() for _, p in own)
    return DiskNeed(sum(p.numel() for p in parts.student.parameters()), trainable, saves)
