"""The result files of a run: strict JSON, which has no NaN, and the list of bad samples."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kd_trainer.data import BadSample

BAD_SAMPLES = "bad_samples.txt"


def write_bad_samples(folder: Path, bad: Sequence[BadSample]) -> int:
    """Write `bad_samples.txt`: split, row, file and reason of each, between tabs; how many."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["split\trow\tfile\treason", *(sample.line() for sample in bad)]
    (folder / BAD_SAMPLES).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return len(bad)


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write `values`, a figure that does not exist (a class that never occurs) as null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_plain(values), indent=2, allow_nan=False, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
