"""What lies in the output folder of a training: settings, figures and logs."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kd_trainer.config import load_recipe
from kd_trainer.data import BadSample
from kd_trainer.run_files import STATE_SHAPE, read_object
from kd_trainer.safe_files import check_regular, write_text


def run_settings(folder: Path) -> dict[str, Any]:
    """What `config.yaml` holds.

    Only data and networks are built from it: its training part may ask for a device that this
    machine does not have.
    """
    for name in ("config.yaml", "student/config.json"):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"Expected the output folder of a finished training, got {folder}, which has no "
                f"{name}. Name the folder that holds config.yaml and student/."
            )
    return written_settings(folder)


def written_settings(folder: Path) -> dict[str, Any]:
    """What `config.yaml` holds, without what only a command line can set."""
    path = folder / "config.yaml"
    check_regular(path)
    return load_recipe(str(path))


def written_figures(results: dict[str, Any], who: str) -> dict[str, float]:
    """Metrics of a network as the training wrote them down."""
    own = {k.removeprefix(f"{who}_"): v for k, v in results.items() if k.startswith(f"{who}_")}
    return (
        {k: float("nan") if v is None else v for k, v in own.items()}
        if own.get("miou") is not None
        else {}
    )


def written_agreement(results: dict[str, Any]) -> dict[str, float]:
    """Agreement of student and teacher as the training wrote it down; empty without."""
    keys = ("agreement", "agreement_miou")
    found = {key: results[key] for key in keys if results.get(key) is not None}
    return found if len(found) == len(keys) else {}


def log_history(folder: Path) -> list[dict[str, Any]]:
    """The Trainer's logs of a run: from its folder, else from its newest checkpoint, else none."""
    checkpoints = [p for p in folder.glob("checkpoint-*") if p.name.rpartition("-")[2].isdigit()]
    checkpoints.sort(key=lambda p: int(p.name.rpartition("-")[2]), reverse=True)
    for place in (folder, *checkpoints):
        file = place / "trainer_state.json"
        if file.is_file():
            logs: list[dict[str, Any]] = read_object(file, STATE_SHAPE).get("log_history", [])
            return logs
    return []


def written_evaluations(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The main figures of each evaluation in results.json, under the names of the logs."""
    return [
        {key if key == "epoch" else f"eval_{key}": value for key, value in entry.items()}
        for entry in results.get("eval_history", [])
    ]


BAD_SAMPLES = "bad_samples.txt"


def write_bad_samples(folder: Path, bad: Sequence[BadSample]) -> int:
    """Write `bad_samples.txt`: split, row, file and reason of each, between tabs; how many."""
    lines = ["split\trow\tfile\treason", *(sample.line() for sample in bad)]
    write_text(folder / BAD_SAMPLES, "\n".join(lines) + "\n")
    return len(bad)


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write `values`, a figure that does not exist (a class that never occurs) as null."""
    text = json.dumps(_plain(values), indent=2, allow_nan=False, ensure_ascii=False)
    write_text(path, text + "\n")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
