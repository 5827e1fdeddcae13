"""The package's `evaluate.Metric`: where it lies and how to load it, without a network."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import evaluate


def metric_path() -> str:
    """Folder to give to `evaluate.load`."""
    return str(Path(__file__).parent / "segmentation")


def load_metric(
    num_labels: int,
    *,
    id2label: Mapping[int, str] | None = None,
    ignore_index: int = 255,
    **kwargs: Any,
) -> evaluate.EvaluationModule:
    """The segmentation metric for these classes, ready for `add_batch` and `compute`.

    Args:
        num_labels: number of classes, background included.
        id2label: name of every class id; by default "background", "class_1" and so on.
        ignore_index: label of the pixels that do not count.
        **kwargs: what `evaluate.load` takes, for instance num_process, process_id and
            experiment_id where several processes share one evaluation.

    Raises:
        ValueError: if num_labels is below 2.
    """
    return evaluate.load(
        metric_path(), num_labels=num_labels, id2label=id2label, ignore_index=ignore_index, **kwargs
    )
