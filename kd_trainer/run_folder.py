"""What lies in the output folder of a training, read as what it has to be.

Anybody may have written or edited these files. What is read here holds numbers where numbers are
formatted, and mappings where keys are looked up; null is as good as a missing entry.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kd_trainer.config import RUN_CONFIG, load_recipe
from kd_trainer.data import BadSample
from kd_trainer.errors import clipped, printable
from kd_trainer.files import check_regular, read_json, write_text
from kd_trainer.losses import TERMS

BAD_SAMPLES = "bad_samples.txt"
HELD_OUT = "held_out.txt"
_MOST = 1e100  # of a figure: sums and logarithms of such numbers exist

# A shape is float, str, [shape of each], or {key: shape}, where `name_*` stands for all keys that
# begin so; keys without a shape may hold anything.
RESULTS_SHAPE = {
    "student_*": float,
    "teacher_*": float,
    "ema_*": float,
    "teacher": str,
    "agreement": float,
    "agreement_miou": float,
    "eval_images": float,
    "train_images": float,
    "train_seconds": float,
    "epochs": float,
    "latency_threads": float,
    "device": str,
    "versions": {"*": str},
    "eval_history": [{"*": float}],
}
STATE_SHAPE = {
    "best_global_step": float,
    "log_history": [
        dict.fromkeys(("epoch", "step", "loss", "temperature", "free_units"), float)
        | dict.fromkeys((term.name for term in TERMS), float)
        | dict.fromkeys(("eval_*", "lr/*", "grad_*"), float)
    ],
}
EXPORTS_SHAPE = {
    "*": dict.fromkeys(("mib", "images", "mask_iou", "largest_difference"), float)
    | dict.fromkeys(("torch_miou", "miou", "miou_drop_points"), float)
    | {"file": str, "latency": {"*": {"median": float}}}
}
_LATENCY = {"engine": str, "threads": float, "median": float, "percentile_95": float}
COMPARISON_SHAPE = {
    "students": {"*": {"metrics": {"*": {"mean": float}}, "baseline": str}},
    "costs": {"student": {"latency": [_LATENCY]}, "teacher": {"latency": [_LATENCY]}},
}
NOTE_SHAPE = {"starts": float, "updates": float, "left_out": float, "teacher_weights": str}
NOTE_SHAPE |= dict.fromkeys(("baseline", "flags", "final"), str)

# What a training writes into its output folder, or reads there when it goes on.
_OF_A_RUN = re.compile(
    r"config\.yaml|.*results\.json|trainer_state\.json|report\.html|bad_samples\.txt|held_out\.txt|"
    r"student|ema|panels|runs|hub|\.?checkpoint-.*|\.training"
)


def read_object(path: Path, shape: dict[str, Any]) -> dict[str, Any]:
    """The JSON object in a file; empty without the file.

    Args:
        path: of the file.
        shape: what its entries have to be, as above.

    Raises:
        ValueError: if the file holds something else; names the entry.
    """
    checked: dict[str, Any] = _checked(read_json(path), shape, path, "")
    return checked


def _checked(value: Any, shape: Any, path: Path, name: str) -> Any:
    """The value if it has the shape, with nothing in place of a null mapping or list."""
    kind = shape if isinstance(shape, type) else type(shape)
    if value is None:
        return kind() if kind in (list, dict) else None
    if not _is(value, kind):
        words = {float: "a finite number", str: "text", list: "a list", dict: "a JSON object"}
        entry = f" as {clipped(name)}" if name else ""
        raise ValueError(
            f"Expected {words[kind]}{entry} in {path}, got {clipped(repr(value))}. Delete it, or "
            "correct it."
        )
    if kind is list:
        return [_checked(item, shape[0], path, f"{name}[{i}]") for i, item in enumerate(value)]
    if kind is dict:
        inside = f"{name}." if name else ""
        return {k: _checked(v, _shape_of(k, shape), path, inside + k) for k, v in value.items()}
    return value


def _is(value: Any, kind: type) -> bool:
    if kind is float:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and abs(value) < _MOST
    return isinstance(value, kind)


def _shape_of(key: str, shapes: dict[str, Any]) -> Any:
    """The shape of an entry; `object`, which everything is, where there is none."""
    if key in shapes:
        return shapes[key]
    names = (name for name in shapes if name.endswith("*") and key.startswith(name[:-1]))
    return shapes.get(next(names, ""), object)


def run_settings(folder: Path) -> dict[str, Any]:
    """What `config.yaml` holds.

    Only data and networks are built from it: its training part may ask for a device that this
    machine does not have.
    """
    for name in (RUN_CONFIG, "student/config.json"):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"Expected the output folder of a finished training, got {folder}, which has no "
                f"{name}. Name the folder that holds config.yaml and student/."
            )
    return written_settings(folder)


def written_settings(folder: Path) -> dict[str, Any]:
    """What `config.yaml` holds, without what only a command line can set."""
    path = folder / RUN_CONFIG
    check_regular(path)
    return load_recipe(str(path))


def written_figures(results: dict[str, Any], who: str) -> dict[str, float]:
    """Metrics of a network as the training wrote them down; empty without its mIoU."""
    if results.get(f"{who}_miou") is None:
        return {}
    return {
        key.removeprefix(f"{who}_"): float("nan") if value is None else value
        for key, value in results.items()
        if key.startswith(f"{who}_")
    }


def written_agreement(results: dict[str, Any]) -> dict[str, float]:
    """Agreement of student and teacher as the training wrote it down; empty without."""
    figures = {k: results[k] for k in ("agreement", "agreement_miou") if results.get(k) is not None}
    return figures if len(figures) == 2 else {}


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoint folders of a run, the newest first."""
    named = [p for p in folder.glob("checkpoint-*") if p.name.rpartition("-")[2].isdigit()]
    return sorted(named, key=lambda path: -int(path.name.rpartition("-")[2]))


def log_history(folder: Path) -> list[dict[str, Any]]:
    """The Trainer's logs of a run: from its folder, else from its newest checkpoint, else none."""
    for place in (folder, *checkpoints(folder)):
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


def write_bad_samples(folder: Path, bad: Sequence[BadSample]) -> int:
    """Write `bad_samples.txt`: split, row, file and reason of each, between tabs; how many."""
    lines = ["split\trow\tfile\treason", *(sample.line() for sample in bad)]
    write_text(folder / BAD_SAMPLES, "\n".join(lines) + "\n")
    return len(bad)


def write_held_out(folder: Path, names: Sequence[str]) -> None:
    """Write `held_out.txt`: the images that were held out of the training, one a line."""
    write_text(folder / HELD_OUT, "".join(f"{printable(name)}\n" for name in names))


def check_no_links(folder: Path) -> None:
    """Refuse links among what a training writes over, in a folder that was there already.

    Raises:
        ValueError: names the link.
    """
    for path in folder.glob("*"):
        if _OF_A_RUN.fullmatch(path.name):
            inside = [] if path.is_symlink() or not path.is_dir() else path.rglob("*")
            for link in (p for p in (path, *inside) if p.is_symlink()):
                check_regular(link)
