"""Which folder or file is meant by the name of a model: a run is its student."""

from __future__ import annotations

import json
from pathlib import Path

from kd_trainer.fields import expanded

WEIGHTS = "model.safetensors"
CONFIG = "config.json"


def model_source(source: str) -> str:
    """What to load where a model is named: a path in full, an id on the Hub as it is.

    The output folder of a training means the student in it, and `model.safetensors` beside the
    config.json of a model the folder of both: as a bare state dict it would need its architecture.
    """
    source = expanded(source)
    path = Path(source)
    if path.name == WEIGHTS and path.is_file() and _describes_model(path.with_name(CONFIG)):
        return str(path.parent)
    if not (path / CONFIG).exists() and (path / "student" / CONFIG).is_file():
        return str(path / "student")
    return source


def run_of(source: str | Path) -> Path:
    """The folder of a run where its student is named; anything else as it is."""
    path = Path(expanded(str(source)))
    inside = path.name == "student" and (path.parent / "config.yaml").is_file()
    return path.parent if inside else path


def not_here(source: str) -> str:
    """A sentence on a path that is not there, " " before it; nothing where it is no path of here.

    Relative paths fail wherever they are not used from the folder they were written in.
    """
    path = Path(source)
    if path.exists() or path.is_absolute():
        return ""
    return (
        f" There is no {source} in the working folder {Path.cwd()}: name its place in full, or go "
        "to the folder that it is relative to."
    )


def _describes_model(file: Path) -> bool:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(config, dict) and not config.keys().isdisjoint({"_model_class", "model_type"})
