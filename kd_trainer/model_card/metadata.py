"""The block of metadata that the Hub reads: licence, task, data and measured figures."""

from __future__ import annotations

from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from kd_trainer.model_card.facts import CardFacts

TASK = "image-segmentation"
# Key in results.json, metric as the Hub lists it, name to show.
FIGURES = (
    ("miou", "mean_iou", "mIoU"),
    ("dice", "dice", "Dice"),
    ("iou_foreground", "iou_foreground", "IoU of the foreground"),
    ("boundary_iou", "boundary_iou", "boundary IoU"),
    ("pixel_accuracy", "accuracy", "pixel accuracy"),
    ("mean_image_iou", "mean_image_iou", "mean of the images' IoU"),
)


def card_data(facts: CardFacts) -> ModelCardData:
    """Metadata of a card; `model-index` only where something was measured."""
    results = evaluation_results(facts)
    return ModelCardData(
        license=facts.license,
        library_name="transformers",
        pipeline_tag=TASK,
        tags=["semantic-segmentation", "knowledge-distillation", "segmentation-models-pytorch"],
        datasets=[facts.dataset.hub_id] if facts.dataset.hub_id else None,
        metrics=[result.metric_type for result in results] or None,
        eval_results=results or None,
        model_name=facts.repo_id.split("/")[1] if results else None,
    )


def evaluation_results(facts: CardFacts) -> list[EvalResult]:
    """One result a figure of the student that exists; a class that never occurs has none."""
    found = []
    for key, metric, name in FIGURES:
        value: Any = facts.results.get(f"student_{key}")
        if value is not None:
            found.append(
                EvalResult(
                    task_type=TASK,
                    task_name="image segmentation",
                    dataset_type=facts.dataset.hub_id or "custom",
                    dataset_name=facts.dataset.name,
                    dataset_split=facts.settings.get("eval_split"),
                    metric_type=metric,
                    metric_name=name,
                    metric_value=round(float(value), 6),
                )
            )
    return found
