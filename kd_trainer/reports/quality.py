"""The parts of a report on how good the networks are: reliability, and figures of each class."""

from __future__ import annotations

import numpy as np

from kd_trainer.reports.charts import line_chart
from kd_trainer.reports.contents import STUDENT, Contents
from kd_trainer.reports.page import Section, share_of, table


def calibration(contents: Contents) -> Section:
    """Reliability diagram and where the confidences lie."""
    measured = {w: n.reliability for w, n in contents.networks.items() if n.reliability.points()}
    if not measured:
        return Section("calibration", "Reliability", "")
    lowest = min(r.points()[0][0] for r in measured.values())
    start = 0.5 if lowest >= 0.5 else 0.0
    ideal = {"perfect": [(start, start), (1.0, 1.0)]}
    diagram = line_chart(
        {w: r.points() for w, r in measured.items()} | ideal,
        title="Reliability",
        x_label="confidence",
        y_label="share that is right",
        x_range=(start, 1.0),
    )
    shares = line_chart(
        {w: r.shares() for w, r in measured.items()},
        title="How sure the networks are",
        x_label="confidence",
        y_label="share of pixels",
        log_y=True,
        x_range=(start, 1.0),
    )
    rows = [[who, f"{r.error:.4f}", f"{r.gap:+.4f}"] for who, r in measured.items()]
    bins = next(iter(measured.values())).counts.shape[1]
    return Section(
        "calibration",
        "Reliability",
        f'<div class="charts"><figure>{diagram}</figure><figure>{shares}</figure></div>'
        + "<br>"
        + table(["", "expected calibration error", "confidence minus accuracy"], rows)
        + f'<p class="faint">Over all valid pixels, in {bins} equal bins of the confidence, which '
        "is the probability of the class that a pixel is given. Below the diagonal a network is "
        "too sure of itself.</p>",
    )


def classes(contents: Contents) -> Section:
    """IoU, Dice, precision and recall of every class."""
    networks = {who: n for who, n in contents.networks.items() if n.confusion is not None}
    if not networks:
        return Section("classes", "Classes", "")
    metrics = ("IoU", "Dice", "precision", "recall")
    header = ["class", "share of pixels", *(f"{m} {who}" for m in metrics for who in networks)]
    columns = {who: class_figures(np.asarray(n.confusion)) for who, n in networks.items()}
    truth = np.asarray(networks[STUDENT].confusion).sum(axis=1)
    rows = [
        [
            name,
            share_of(float(truth[i]), float(truth.sum())),
            *(float(columns[who][metric][i]) for metric in metrics for who in networks),
        ]
        for i, name in enumerate(contents.class_names)
    ]
    return Section("classes", "Classes", table(header, rows))


def class_figures(confusion: np.ndarray) -> dict[str, np.ndarray]:
    """IoU, Dice, precision and recall of every class (K,), NaN where there is nothing to divide by.

    Args:
        confusion: counts (K, K) by [truth, prediction].
    """
    hit = np.diag(confusion).astype(float)
    truth, found = confusion.sum(axis=1), confusion.sum(axis=0)
    wholes = {
        "IoU": (hit, truth + found - hit),
        "Dice": (2 * hit, truth + found),
        "precision": (hit, found),
        "recall": (hit, truth),
    }
    return {
        name: np.divide(part, whole, out=np.full(len(hit), np.nan), where=whole > 0)
        for name, (part, whole) in wholes.items()
    }
