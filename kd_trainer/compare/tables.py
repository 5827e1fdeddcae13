"""comparison.md: the figures of a comparison as tables and sentences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kd_trainer.console import markdown_table, number
from kd_trainer.costs import duration
from kd_trainer.models.image_sizes import size_text

UNKNOWN = "not measured"
_METRICS = {
    "miou": "mIoU",
    "iou_foreground": "IoU foreground",
    "dice": "Dice",
    "boundary_iou": "boundary IoU",
    "agreement": "agreement with the teacher",
}


def markdown(summary: dict[str, Any]) -> str:
    """The whole comparison as Markdown, from what comparison.json holds."""
    parts = [
        "# Comparison",
        _budget(summary),
        "## Quality\n\n" + _quality(summary),
        _findings(summary),
        "## Cost of the networks\n\n" + _costs(summary["costs"]),
        "## Latency\n\n" + _latency(summary["costs"]),
        "## Training\n\n" + _training(summary),
        "## Runs\n\n" + _runs(summary["runs"]),
        "## Versions\n\n"
        + (", ".join(f"{k} {v}" for k, v in summary["versions"].items()) or UNKNOWN),
    ]
    return "\n\n".join(parts) + "\n"


def _budget(summary: dict[str, Any]) -> str:
    seeds = {k: " ".join(map(str, summary[k]["seeds"])) for k in ("baseline", "distilled")}
    text = (
        f"The same student without a teacher (baseline, seeds {seeds['baseline'] or 'none'}) and "
        f"with one (distilled, seeds {seeds['distilled'] or 'none'})"
    )
    if summary["updates"] is not None:
        text += f", {summary['updates']:,} steps each"
    if summary["left_out_by_baseline"]:
        text += (
            f". The baseline leaves out {summary['left_out_by_baseline']:,} images without "
            "masks and sees the others more often instead"
        )
    return text + "."


def _quality(summary: dict[str, Any]) -> str:
    rows = []
    for key, name in _METRICS.items():
        teacher = summary["teacher"]["metrics"][key]
        cells = ["—" if key == "agreement" else number(teacher, ",.4f", UNKNOWN)]
        cells += [_with_error(summary[kind]["metrics"][key]) for kind in ("baseline", "distilled")]
        rows.append([name, *cells])
    table = markdown_table(["", "teacher", "baseline", "distilled"], rows)
    images = summary["eval_images"]
    about = f"{images:,} evaluation images; " if images is not None else ""
    return f"{table}\n\n{about}± is the standard error of the mean over seeds."


def _with_error(mean: dict[str, Any] | None, digits: int = 4) -> str:
    if mean is None:
        return UNKNOWN
    text = f"{mean['mean']:.{digits}f}"
    if mean["standard_error"] is None:
        return f"{text} (one seed)"
    return f"{text} ± {mean['standard_error']:.{digits}f}"


def _findings(summary: dict[str, Any]) -> str:
    difference, interval = summary["difference"], summary["bootstrap"]
    if summary["gap_closed"] is None:
        return "There are no runs of both kinds yet, so nothing is compared."
    lines = [f"- {summary['gap_closed']['sentence']}"]
    if difference is not None:
        error = difference["standard_error"]
        spread = "one seed, no standard error" if error is None else f"± {error:.4f}"
        mean = f"{difference['mean']:+.4f} ({spread})"
        lines.append(f"- Distilled minus baseline in mIoU, seed by seed: {mean}.")
    lines.append(
        f"- Distilled minus baseline in mIoU, bootstrap over {interval['images']:,} images: "
        f"{interval['estimate']:+.4f}, {interval['level']:.0%} interval {interval['low']:+.4f} to "
        f"{interval['high']:+.4f} ({interval['resamples']:,} resamples of the images, these "
        "students)."
    )
    return "\n".join(lines)


def _costs(costs: dict[str, Any]) -> str:
    rows = []
    for who in ("teacher", "student"):
        one = costs[who] or {}
        multiplications = one.get("macs")
        rows.append(
            [
                who,
                one.get("network", UNKNOWN),
                number(one.get("parameters"), ",.0f", UNKNOWN),
                number(None if multiplications is None else multiplications / 1e9, ",.2f", UNKNOWN),
                number(one.get("file_mib"), ",.1f", UNKNOWN),
                size_text(one["side"]) if "side" in one else UNKNOWN,
            ]
        )
    header = ["", "network", "parameters", "GMAC", "file MiB", "side"]
    return markdown_table(header, rows)


def _latency(costs: dict[str, Any]) -> str:
    rows = [
        [
            who,
            row["engine"],
            str(row["threads"]),
            *(number(row[key], ",.2f", UNKNOWN) for key in ("median", "percentile_95")),
            str(row["repeats"]),
        ]
        for who in ("teacher", "student")
        for row in (costs[who] or {}).get("latency", [])
    ]
    if not rows:
        return UNKNOWN.capitalize() + "."
    header = ["", "engine", "threads", "median ms", "95th percentile ms", "calls"]
    table = markdown_table(header, rows)
    load = costs["load"]
    busy = "" if load is None else f" Load of the machine at the start: {load:.1f}."
    return f"{table}\n\nOne image on the CPU, networks called in turn.{busy}"


def _training(summary: dict[str, Any]) -> str:
    rows = []
    for kind in ("baseline", "distilled"):
        one = summary[kind]
        seconds = one["train_seconds"]
        rows.append(
            [
                kind,
                number(one["train_images"], ",.0f", UNKNOWN),
                UNKNOWN if one["epochs"] is None else f"{one['epochs']:.4g}",
                UNKNOWN if seconds is None else duration(seconds["mean"]),
                number((one["peak_memory_mib"] or {}).get("mean"), ",.0f", UNKNOWN),
            ]
        )
    header = ["", "images", "epochs", "time a run", "peak memory MiB"]
    return markdown_table(header, rows)


def _runs(runs: Sequence[dict[str, Any]]) -> str:
    rows = [
        [run["kind"], str(run["seed"])]
        + [number(run[key], ",.4f", UNKNOWN) for key in _METRICS]
        + [UNKNOWN if run["train_seconds"] is None else duration(run["train_seconds"])]
        for run in runs
    ]
    if not rows:
        return "None is finished."
    return markdown_table(["", "seed", *_METRICS.values(), "training"], rows)
