"""What a name of a model or of data means here, and what it is called where others read it."""

from __future__ import annotations

import json
import re
from pathlib import Path

from kd_trainer.fields import expanded

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
SELF = "self"
"""In the place of a teacher's name: the student's own moving average teaches it."""
_HUB_ID = re.compile(r"\w[\w.-]{0,95}/\w[\w.-]{0,95}", re.ASCII)
_FILES = (".pth", ".pt", ".ckpt", ".bin", ".safetensors", ".onnx", ".json", ".yaml")


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


def is_hub_id(text: str) -> bool:
    """Whether text could be the id of a model or a data set, OWNER/NAME."""
    return _HUB_ID.fullmatch(text) is not None


def public_name(source: str) -> str:
    """What a model or data set is called in what is published: a path by its last part.

    `runs/...`, where trainings go, could be an id on the Hub, but for no teacher that is known.
    """
    file_of_ours = source.startswith("runs/") or source.endswith(_FILES)
    if not re.search(r"[/\\]", source):
        return source
    if is_hub_id(source) and not file_of_ours and not Path(source).exists():
        return source
    return last_part(source)


def last_part(path: str) -> str:
    """What a path is called: its last part, for the `student` in a run the run's name."""
    parts = [part for part in re.split(r"[/\\]", path) if part not in ("", ".")]
    return next((part for part in reversed(parts) if part != "student"), path)


def _describes_model(file: Path) -> bool:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(config, dict) and not config.keys().isdisjoint({"_model_class", "model_type"})
