"""comparison.md: the figures of a comparison as tables and sentences."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
        "## Training\n\n" + _training(summary["students"]),
        "## Runs\n\n" + _runs(summary["runs"]),
        "## Versions\n\n"
        + (", ".join(f"{k} {v}" for k, v in summary["versions"].items()) or UNKNOWN),
    ]
    return "\n\n".join(parts) + "\n"


def _budget(summary: dict[str, Any]) -> str:
    """What was trained, on what budget, and by which flags a variant differs."""
    lines = []
    for name, one in summary["students"].items():
        line = f"- {name}: seeds {' '.join(map(str, one['seeds']))}"
        if one["updates"] is not None:
            line += f", {one['updates']:,} steps each"
        if one.get("flags"):
            line += f", with `{one['flags']}`"
        if one.get("baseline"):
            line += f", beside {one['baseline']}"
        if one["left_out"]:
            line += (
                f". It leaves out {one['left_out']:,} images without masks and sees the others "
                "more often instead"
            )
        lines.append(f"{line}.")
    about = "The same student without a teacher (baseline) and with one, and nothing else changed."
    return "\n".join([f"{about}\n", *lines]) if lines else about


def _quality(summary: dict[str, Any]) -> str:
    """The one table: a row a student, with both sets of figures where there are two."""
    final = summary["final"]
    header = ["", "seeds"]
    rows = [["teacher", ""], *([k, str(len(v["seeds"]))] for k, v in summary["students"].items())]
    for prefix, figures, students in _measured(summary):
        header += [f"{prefix}mIoU", f"{prefix}gap closed"]
        of_teacher = figures["teacher"]["metrics"]["miou"]
        rows[0] += [number(of_teacher, ",.4f", UNKNOWN), "—"]
        for row in rows[1:]:
            one = students.get(row[0])
            row += [_with_error(one["metrics"]["miou"]), _gap(one)] if one else ["—", "—"]
    others = [key for key in _METRICS if key != "miou"]
    header += [_METRICS[key] for key in others]
    for key in others:
        of_teacher = summary["teacher"]["metrics"][key]
        rows[0].append("—" if key == "agreement" else number(of_teacher, ",.4f", UNKNOWN))
        for row, one in zip(rows[1:], summary["students"].values(), strict=True):
            row.append(_with_error(one["metrics"][key]))
    images = summary["eval_images"]
    about = f"{images:,} evaluation images; " if images is not None else ""
    text = (
        f"{markdown_table(header, rows)}\n\n{about}± is the standard error of the mean over seeds."
    )
    if final:
        text += (
            f" They chose each run's best evaluation; the {final['eval_images']:,} images of "
            f"{final['data']} chose nothing."
        )
    if summary["ema"]:
        text += (
            " EMA is the student's moving average (`--ema_decay`) at its best evaluation, and is "
            "compared with that of the baseline."
        )
    return text


def _measured(
    summary: dict[str, Any],
) -> Iterator[tuple[str, dict[str, Any], dict[str, dict[str, Any]]]]:
    """What was measured: a prefix, figures with the teacher's, and those of each student."""
    final = summary["final"]
    for prefix, figures in [("", summary)] + ([(f"{final['data']} ", final)] if final else []):
        yield prefix, figures, figures["students"]
        if figures["ema"]:
            yield f"{prefix}EMA ", figures, figures["ema"]


def _gap(one: dict[str, Any]) -> str:
    gap = one.get("gap_closed")
    if gap is None:
        return "—"
    if gap["value"] is None:
        return "too small to judge"
    error = gap["standard_error"]
    return f"{gap['value']:.3f}" + (" (one seed)" if error is None else f" ± {error:.3f}")


def _with_error(mean: dict[str, Any] | None, digits: int = 4) -> str:
    if mean is None:
        return UNKNOWN
    text = f"{mean['mean']:.{digits}f}"
    if mean["standard_error"] is None:
        return f"{text} (one seed)"
    return f"{text} ± {mean['standard_error']:.{digits}f}"


def _findings(summary: dict[str, Any]) -> str:
    """Of each variant, of all sets of figures, what can be said of it."""
    parts = [
        _finding(f"{name} ({prefix.strip()})" if prefix else name, one)
        for prefix, _, students in _measured(summary)
        for name, one in students.items()
    ]
    return "\n\n".join(filter(None, parts)) or (
        "There are no runs of both kinds yet, so nothing is compared."
    )


def _finding(name: str, one: dict[str, Any]) -> str:
    if one.get("gap_closed") is None:
        return ""
    difference, interval = one["difference"], one["bootstrap"]
    beside = f"{name} minus {one['baseline']} in mIoU"
    lines = [f"{name}:\n", f"- {one['gap_closed']['sentence']}"]
    if difference is not None:
        error = difference["standard_error"]
        spread = "one seed, no standard error" if error is None else f"± {error:.4f}"
        lines.append(f"- {beside}, seed by seed: {difference['mean']:+.4f} ({spread}).")
    lines.append(
        f"- {beside}, bootstrap over {interval['images']:,} images: "
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


def _training(students: dict[str, dict[str, Any]]) -> str:
    rows = []
    for kind, one in students.items():
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
    names = {"ema_miou": "EMA mIoU", "final_miou": "final mIoU", "final_ema_miou": "final EMA mIoU"}
    more = {k: name for k, name in names.items() if any(run[k] is not None for run in runs)}
    rows = [
        [run["kind"], str(run["seed"])]
        + [number(run[key], ",.4f", UNKNOWN) for key in _METRICS]
        + [number(run[key], ",.4f", "—") for key in more]
        + [UNKNOWN if run["train_seconds"] is None else duration(run["train_seconds"])]
        for run in runs
    ]
    if not rows:
        return "None is finished."
    return markdown_table(["", "seed", *_METRICS.values(), *more.values(), "training"], rows)
