"""What a run prints: one bar, and one line an evaluation instead of every logged value."""

from __future__ import annotations

from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from kd_trainer.losses import TERMS


def console_line(logs: dict[str, Any]) -> str | None:
    """One readable line of a training log or an evaluation; None for anything else."""
    if "loss" in logs:
        logged = [term for term in TERMS if term.name in logs]
        terms = " ".join(f"{term.name} {logs[term.name]:.3f}" for term in logged)
        rate = logs.get("learning_rate", 0.0)
        line = f"loss {logs['loss']:.3f} ({terms}) lr {rate:.1e} free units"
        line += f" {logs.get('free_units', 0):.0f}"
        softened = any(term.softened for term in logged)
        return f"{line} T {logs['temperature']:.2f}" if softened else line
    if "eval_miou" in logs:
        shown = {
            "mIoU": "eval_miou",
            "EMA mIoU": "eval_ema_miou",
            "Dice": "eval_dice",
            "teacher mIoU": "eval_teacher_miou",
            "agreement": "eval_agreement",
            "loss": "eval_loss",
        }
        values = "  ".join(f"{k} {logs[key]:.4f}" for k, key in shown.items() if key in logs)
        return f"epoch {logs.get('epoch', 0):5.2f}  {values}"
    return None


class ConsoleProgress(ProgressCallback):
    """The Trainer's bar with the newest losses behind it, and a line an evaluation."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show the line of this log."""
        line = console_line(logs or {})
        bar: Any = self.training_bar  # the Trainer's, while a training runs
        if line is None or not state.is_world_process_zero or bar is None:
            return
        if "loss" in (logs or {}):
            bar.set_postfix_str(line)
        else:
            bar.write(line)


class ConsoleLines(PrinterCallback):
    """The same lines without a bar (`--disable_tqdm`), for log files."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Print the line of this log."""
        line = console_line(logs or {})
        if line is not None and state.is_world_process_zero:
            print(line, flush=True)


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table whose columns line up in a terminal too."""
    widths = [max(len(r[i]) for r in [header, *rows]) for i in range(len(header))]

    def line(cells: list[str]) -> str:
        return "| " + " | ".join(c.rjust(w) for c, w in zip(cells, widths, strict=True)) + " |"

    rule = "|" + "|".join("-" * (w + 1) + ":" for w in widths) + "|"
    return "\n".join([line(header), rule, *(line(row) for row in rows)])


def number(value: float | None, form: str, missing: str = "") -> str:
    """A figure for a cell of a table, or what stands for one that is not known."""
    return missing if value is None else format(value, form)


def summary_table(results: dict[str, Any]) -> str:
    """Teacher and student side by side, as a Markdown table."""
    metrics = {
        "miou": "mIoU",
        "iou_foreground": "IoU foreground",
        "dice": "Dice",
        "boundary_iou": "boundary IoU",
        "pixel_accuracy": "pixel accuracy",
    }
    header = ["", *metrics.values(), "agreement", "parameters", "file MiB", "ms an image"]
    rows = [
        [
            who,
            *(f"{results[f'{who}_{key}']:.4f}" for key in metrics),
            number(results.get("agreement") if who == "student" else None, ".4f"),
            number(results.get(f"{who}_parameters"), ","),
            number(results.get(f"{who}_file_mib"), ".1f"),
            number(results.get(f"{who}_ms"), ".1f"),
        ]
        for who in ("teacher", "student", "ema")
        if f"{who}_miou" in results
    ]
    return markdown_table(header, rows)
