"""What a report is made of: plain figures and images, gathered by `commands.report`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy.typing as npt

from kd_trainer.reports.calibration import Reliability
from kd_trainer.reports.panels import Pixels

STUDENT, TEACHER, EMA = "student", "teacher", "ema"
DIFFERENCE = "difference to the teacher"
"""Caption of the image that is there only with a teacher."""


@dataclass(frozen=True)
class Network:
    """A network as it was measured.

    Attributes:
        name: architecture and encoder.
        parameters: those that some output depends on.
        figures: metrics by name; empty if nothing was evaluated.
        confusion: int64 (K, K), pixels by [truth, prediction]; of several labels a pixel
            (K, 2, 2), a table for each.
        reliability: pixels by confidence.
    """

    name: str
    parameters: int
    figures: Mapping[str, float] = field(default_factory=dict)
    confusion: npt.NDArray[Any] | None = None
    reliability: Reliability = field(default_factory=Reliability.zero)


@dataclass(frozen=True)
class ShownImage:
    """One image of the evaluation set.

    Attributes:
        group: `worst`, `median` or `best`.
        name: its number and file.
        scores: IoU of each network on it.
        views: what to look at by caption, in order.
    """

    group: str
    name: str
    scores: Mapping[str, float]
    views: Mapping[str, Pixels]


@dataclass(frozen=True)
class Contents:
    """Everything on the page.

    Attributes:
        title: name of the run.
        class_names: names of the classes, background first where there is one.
        networks: `student`, and `teacher` and `ema`, its moving average, if there are such.
        measured: on what the figures were measured, as a sentence.
        notes: what is missing, and why.
        agreement: `agreement` and `agreement_miou`, or empty.
        images: the shown images.
        results: what results.json holds.
        settings: what config.yaml holds.
        logs: the Trainer's log history.
        comparison: what comparison.json holds, or None.
        versions: of the libraries that made the report.
        multi_label: whether a pixel may have several of the classes.
    """

    title: str
    class_names: Sequence[str]
    networks: Mapping[str, Network]
    measured: str
    notes: Sequence[str] = ()
    agreement: Mapping[str, float] = field(default_factory=dict)
    images: Sequence[ShownImage] = ()
    results: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    logs: Sequence[Mapping[str, Any]] = ()
    comparison: Any = None
    versions: Mapping[str, str] = field(default_factory=dict)
    multi_label: bool = False
