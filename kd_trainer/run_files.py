"""The JSON files that lie in a run's folder, read as what they have to be.

Anybody may have written or edited them. What is read here holds numbers where numbers are
formatted, and mappings where keys are looked up; null is as good as a missing entry.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kd_trainer.losses import TERMS
from kd_trainer.safe_files import clipped, read_json

_MOST = 1e100  # of a figure: sums and logarithms of such numbers exist

# A shape is float, str, [shape of each], or {key: shape}, where `name_*` stands for all keys that
# begin so; keys without a shape may hold anything.
RESULTS_SHAPE = {
    "student_*": float,
    "teacher_*": float,
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
    "baseline": {"metrics": {"*": {"mean": float}}},
    "costs": {"student": {"latency": [_LATENCY]}, "teacher": {"latency": [_LATENCY]}},
}
NOTE_SHAPE = {"starts": float, "updates": float, "left_out": float, "teacher_weights": str}


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
