"""What lies in the output folder of a training: settings, figures and logs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kd_trainer.command_line import load_recipe


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
    return load_recipe(str(folder / "config.yaml"))


def written_figures(results: dict[str, Any], who: str) -> dict[str, float]:
    """Metrics of a network as the training wrote them down."""
    own = {k.removeprefix(f"{who}_"): v for k, v in results.items() if k.startswith(f"{who}_")}
    return {k: float("nan") if v is None else v for k, v in own.items()} if "miou" in own else {}


def log_history(folder: Path) -> list[dict[str, Any]]:
    """The Trainer's logs of a run: from its folder, else from its newest checkpoint, else none."""
    checkpoints = [p for p in folder.glob("checkpoint-*") if p.name.rpartition("-")[2].isdigit()]
    checkpoints.sort(key=lambda p: int(p.name.rpartition("-")[2]), reverse=True)
    for place in (folder, *checkpoints):
        state = read_json(place / "trainer_state.json")
        if state is not None:
            return list(state.get("log_history", []))
    return []


def written_evaluations(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The main figures of each evaluation in results.json, under the names of the logs."""
    return [
        {key if key == "epoch" else f"eval_{key}": value for key, value in entry.items()}
        for entry in results.get("eval_history", [])
    ]


def read_json(path: Path) -> Any:
    """What a JSON file holds; None without the file.

    Raises:
        ValueError: if it is no JSON.
    """
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(
            f"Expected JSON in {path}, got: {error}. Delete the file, or write it again."
        ) from None
