"""The recipe of a run in words, from its config.yaml."""

from __future__ import annotations

from typing import Any

from kd_trainer.losses import TERMS
from kd_trainer.model_card.facts import CardFacts


def recipe(facts: CardFacts) -> str:
    """Loss, schedules, optimizer and augmentation; nothing of a run whose settings are unknown."""
    settings = facts.settings
    if not settings:
        return ""
    taught = facts.teacher is not None
    lines = {
        "Loss": _loss(settings, taught=taught),
        "Temperature": _temperature(settings) if taught else "",
        "Encoder": _unfreezing(settings),
        "Learning rate": _rates(settings),
        "Length": _length(settings, facts.results.get("epochs")),
        "Input": f"{facts.side} x {facts.side} pixels, aspect ratio not kept",
        "Augmentation": str(settings.get("augmentation", "")),
        "Precision": str(settings.get("mixed_precision") or ""),
        "Seed": str(settings.get("seed", 42)),
    }
    body = "\n".join(f"- {name}: {text}" for name, text in lines.items() if text)
    title = "Distilled" if taught else "Trained without a teacher"
    return f"## Recipe\n\n{title} with kd_trainer.\n\n{body}"


def _loss(settings: dict[str, Any], *, taught: bool) -> str:
    task = settings.get("task_weight", 1.0)
    several = settings.get("num_labels", 2) > 2
    terms = []
    for term in TERMS:
        factor = settings.get(term.flag, 0.0) * (float(taught) if term.needs_teacher else task)
        if factor:
            title = (several and term.title_of_many) or term.title
            terms.append(f"{factor:g} {title}")
    return " + ".join(terms)


def _temperature(settings: dict[str, Any]) -> str:
    if not any(term.softened and settings.get(term.flag) for term in TERMS):
        return ""
    kind, per = settings.get("temperature_schedule"), settings.get("temperature_per", "epoch")
    start, end = settings.get("temperature_start"), settings.get("temperature_end")
    if kind == "constant":
        return f"{start:g} throughout"
    if kind == "piecewise":
        points = ", ".join(str(point) for point in settings.get("temperature_points") or ())
        return f"linear between the points {points} (epoch:temperature), moved each {per}"
    return f"{kind} from {start:g} to {end:g}, moved each {per}"


def _unfreezing(settings: dict[str, Any]) -> str:
    start, every = settings.get("unfreeze_start_epoch", 0), settings.get("unfreeze_every", 0)
    weights = settings.get("encoder_weights", "imagenet")
    first = {"imagenet": "ImageNet weights", "none": "random weights"}.get(
        str(weights), "weights from a file"
    )
    if settings.get("student"):
        first = "the weights of an earlier student"
    if every == 0:
        when = "free from the start" if start == 0 else f"frozen until epoch {start}"
        return f"from {first}, {when}"
    return (
        f"from {first}; its deepest unit is freed at epoch {start} (counted from 0), one more "
        f"every {every} epochs"
    )


def _rates(settings: dict[str, Any]) -> str:
    rate, scale = settings.get("learning_rate"), settings.get("encoder_lr_scale")
    if rate is None or scale is None:
        return ""
    return (
        f"AdamW, {rate:g} for decoder and head, {rate * scale:g} for the encoder; "
        f"{settings.get('warmup_epochs', 0):g} epochs of warm-up, then a cosine to "
        f"{settings.get('min_learning_rate', 0):g}; weight decay "
        f"{settings.get('weight_decay', 0):g}, gradients clipped at "
        f"{settings.get('max_grad_norm', 0):g}"
    )


def _length(settings: dict[str, Any], ran: Any) -> str:
    """How long the run was, as far as it is known (`ran`, in epochs), and what its limit was."""
    batch = settings.get("per_device_train_batch_size", 1)
    batch *= settings.get("gradient_accumulation_steps", 1)
    steps, epochs = settings.get("max_steps", -1), settings.get("num_train_epochs")
    limit = f"{steps} updates" if steps > 0 else f"{epochs:g} epochs"
    length = limit
    if isinstance(ran, int | float) and f"{ran:g} epochs" != limit:
        length = f"{ran:g} epochs (of at most {limit})"
    return f"{length}, {batch} images an update and device"
