"""The plan of a run, printed by `--dry_run`: the recipe's timeline with the true figures."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import yaml
from torch import nn

from kd_trainer.arguments import DistillationArguments
from kd_trainer.build import RunComponents, images_an_epoch
from kd_trainer.config import RunArguments
from kd_trainer.console import markdown_table
from kd_trainer.costs import length_in_epochs, steps_per_epoch
from kd_trainer.doctor.finding import Grade
from kd_trainer.doctor.resources import plan_finding
from kd_trainer.errors import printable
from kd_trainer.loading import network_name, network_size
from kd_trainer.models.modeling import SmpForSemanticSegmentation
from kd_trainer.optim import DECODER, unit_parameters
from kd_trainer.schedules import TrainingSchedule, weight_schedule_words
from kd_trainer.students import units_of


def timeline(
    model: nn.Module, args: DistillationArguments, epochs: float
) -> list[dict[str, float]]:
    """One row an epoch: temperature, free units, trainable parameters and learning rates.

    Rates are `base` (the group's own, free of warm-up and cosine; 0 while frozen) and `now`, the
    effective rate in the middle of what is trained of the epoch.
    """
    sizes = {part: sum(p.numel() for _, p in ps) for part, ps in unit_parameters(model).items()}
    units = list(sizes)[1:]
    schedule = args.schedule(len(units), epochs)
    rows = []
    for epoch in range(max(1, math.ceil(epochs))):
        free = schedule.free_units(epoch)
        factor = schedule.rate_at(epoch + min(1.0, epochs - epoch) / 2)
        encoder = args.learning_rate * args.encoder_lr_scale if free else 0.0
        rows.append(
            {
                "epoch": epoch,
                "temperature": schedule.temperature(epoch),
                "free_units": free,
                "trainable": sizes[DECODER] + sum(sizes[unit] for unit in units[:free]),
                "decoder_lr": args.learning_rate,
                "decoder_lr_now": args.learning_rate * factor,
                "encoder_lr": encoder,
                "encoder_lr_now": encoder * factor,
                **{f"weight/{name}": one for name, one in schedule.weights(epoch).items()},
            }
        )
    return rows


_COLUMNS = {  # of the timeline, by key: title and format
    "epoch": ("epoch", ".0f"),
    "temperature": ("temperature", ".2f"),
    "free_units": ("free units", ".0f"),
    "trainable": ("trainable parameters", ",.0f"),
    "decoder_lr": ("decoder lr base", ".2e"),
    "decoder_lr_now": ("now", ".2e"),
    "encoder_lr": ("encoder lr base", ".2e"),
    "encoder_lr_now": ("now", ".2e"),
}


def timeline_table(rows: list[dict[str, float]], *, temperature: bool = True) -> str:
    """The timeline as a Markdown table; without a teacher no temperature is in use."""
    columns = _COLUMNS | {
        key: (key.replace("weight/", "weight of "), ".4g")
        for row in rows[:1]
        for key in row
        if key.startswith("weight/")
    }
    keys = [key for key in columns if temperature or key != "temperature"]
    body = [
        [
            "frozen"
            if key.startswith("encoder") and not row[key]
            else f"{row[key]:{columns[key][1]}}"
            for key in keys
        ]
        for row in rows
    ]
    return markdown_table([columns[key][0] for key in keys], body)


def sizes_table(parts: RunComponents) -> str:
    """True sizes of student and teacher."""
    networks: dict[str, nn.Module] = {"student": parts.student}
    if parts.teacher is not None and not parts.teacher.from_samples:
        networks["teacher"] = parts.teacher.network
    rows = []
    for who, network in networks.items():
        used, never_used = network_size(network)
        mib = f"{4 * used / 2**20:.1f}"
        rows.append([who, network_name(network), f"{used:,}", f"{never_used:,}", mib])
    return markdown_table(["", "network", "parameters", "never used", "MiB in fp32"], rows)


def _average_line(run: RunArguments) -> str:
    """What is kept beside the student, and whether it teaches."""
    decay = run.training.ema_decay
    if decay is None:
        return ""
    role = ", its teacher" if run.model.teaches_itself else ""
    return f"\n\nBeside it the student's moving average{role} (decay {decay:g}), as large again"


def _units_line(student: nn.Module) -> str:
    """The units of a stock model by name, in the order in which they are freed."""
    if isinstance(student, SmpForSemanticSegmentation):
        return ""
    names = ", ".join(unit.name for unit in reversed(units_of(student)))
    return f"\n\nUnits of the student, as they are freed: {names}"


def _timeline(parts: RunComponents, args: DistillationArguments, steps: int) -> str:
    epochs = length_in_epochs(args, steps)
    rows = timeline(parts.student, args, epochs)
    table = timeline_table(rows, temperature=parts.teacher is not None)
    schedule = args.schedule(len(units_of(parts.student)), epochs, steps)
    lines = [table, *warmup_line(schedule, args.learning_rate)]
    finding = plan_finding(schedule)
    if finding.grade != Grade.OK:
        lines.append(f"{finding.text[0].upper()}{finding.text[1:]}. {finding.cure}")
    return "\n\n".join(lines)


def warmup_line(schedule: TrainingSchedule, rate: float) -> list[str]:
    """What the warm-up makes of the decoder's learning rate; nothing where there is none."""
    if not schedule.warmup_epochs:
        return []
    without = replace(schedule, warmup_epochs=0.0)
    with_it, bare = (rate * one.rate_at(0.5) for one in (schedule, without))
    return [
        f"The learning rates warm up for {schedule.warmup_epochs * schedule.scale:.3g} epochs, an "
        "addition to the recipe, which starts with the base rate: in the middle of epoch 0 the "
        f"decoder's is {with_it:.2g}, and {bare:.2g} with --warmup_epochs 0."
    ]


def describe(run: RunArguments, parts: RunComponents) -> str:
    """The whole plan as text."""
    args = run.training
    train = len(parts.train_dataset)
    steps = steps_per_epoch(images_an_epoch(parts.train_dataset, args), args)
    evaluation = len(parts.eval_dataset) if parts.eval_dataset is not None else 0
    data: dict[str, Any] = {
        "source": printable(run.data.dataset),
        "train": f"{train:,} images ({steps:,} steps an epoch)",
        "evaluation": f"{evaluation:,} images{' held out' if parts.held_out else ''}",
        "classes": printable(", ".join(run.data.id2label.values())),
        "input": "{} x {}".format(*run.data.input_size),
    }
    weights = parts.loss_weights.effective()
    loss = " + ".join(f"{value:g}·{name}" for name, value in weights.items() if value)
    scheduled = ", ".join(weight_schedule_words(args.weight_schedules))
    loss += f"\nhighest weights; over the epochs: {scheduled}" if scheduled else ""
    return "\n\n".join(
        [
            "# Plan: " + str(args.output_dir),
            "## Data\n" + "\n".join(f"- {k}: {v}" for k, v in data.items()),
            "## Networks\n" + sizes_table(parts) + _average_line(run) + _units_line(parts.student),
            f"## Loss\ntotal = {loss}",
            "## Timeline\n" + _timeline(parts, args, steps),
            "## Configuration\n" + yaml.safe_dump(run.resolved(), sort_keys=False).strip(),
        ]
    )
