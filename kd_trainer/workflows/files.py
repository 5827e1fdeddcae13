"""The result files of a run: strict JSON, which has no NaN, and the list of bad samples."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kd_trainer.data import BadSample
from kd_trainer.disk import write_text

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
