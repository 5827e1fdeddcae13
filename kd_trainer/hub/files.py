"""Names of the files that are published; whatever is not named here stays at home."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from kd_trainer.fields import expanded
from kd_trainer.run_folder import RESULTS_SHAPE, STATE_SHAPE, read_object
from kd_trainer.sources import model_source, run_of

WEIGHTS = "model.safetensors"
STUDENT = ("config.json", WEIGHTS, "preprocessor_config.json")
# Copied only as far as they are there: smp and kd_trainer itself do without.
CODE = (
    "modeling.py",
    "image_processing.py",
    "configuration_smp.py",
    "config_checks.py",
    "encoder_units.py",
    "weights.py",
)
RESULTS = {"results.json": RESULTS_SHAPE, "all_results.json": {}, "trainer_state.json": STATE_SHAPE}
CARD, PANEL = "README.md", "panel.png"
OURS = frozenset({*STUDENT, *CODE, *RESULTS, CARD, PANEL})
# What transformers, huggingface_hub and inference services look for beside a model.
_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".safetensors", ".h5", ".msgpack", ".gguf")
_CODE = (".py", ".pyc", ".so")


def changes_loading(names: Iterable[str]) -> list[str]:
    """Those of the other files in a repository that change what a user of the student loads.

    Code anywhere; weights, configurations and requirements at the top, where loaders look.
    """
    found = []
    for name in sorted(names):
        path = PurePosixPath(name.lower())
        top = len(path.parts) == 1
        settings = path.suffix == ".json" or path.name == "requirements.txt"
        if path.suffix in _CODE or (top and (path.suffix in _WEIGHTS or settings)):
            found.append(name)
    return found


_HUB_ID = re.compile(r"\w[\w.-]{0,95}/\w[\w.-]{0,95}", re.ASCII)
# Paths by their key, however they are written.
_PATHS = frozenset({"best_model_checkpoint", "output_dir"})
_FILES = (".pth", ".pt", ".ckpt", ".bin", ".safetensors", ".onnx", ".json", ".yaml")


@dataclass(frozen=True)
class Source:
    """A student folder and the run that it came from, if that is known."""

    student: Path
    run: Path | None


def find_source(folder: str | Path) -> Source:
    """The student in a run folder, or a student folder and the run around it.

    Raises:
        FileNotFoundError: if there is no complete student.
    """
    given = Path(expanded(str(folder)))
    inside = given / "student"
    student = inside if inside.is_dir() else Path(model_source(str(given)))
    around = run_of(student)
    run = given if student == inside else around if around != student else None
    missing = [name for name in STUDENT if not (student / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"Expected a run folder or a saved student with {', '.join(STUDENT)}, got {folder} "
            f"without {', '.join(missing)}. A training run leaves a complete one in `student`."
        )
    return Source(student, run)


def check_regular(source: Source) -> None:
    """Refuse links among what is read: a stranger's could lead to a private file.

    Raises:
        ValueError: names the first.
    """
    for path in _read(source):
        if path.is_symlink():
            raise ValueError(
                f"Expected regular files to publish, got {path}, which is a link. Put the file "
                "that you mean in its place."
            )


def _read(source: Source) -> Iterator[Path]:
    yield from (source.student / name for name in (*STUDENT, *CODE))
    run = source.run
    if run is None:
        return
    yield source.student
    yield from (run / name for name in ("config.yaml", "export.json", "panels", *RESULTS))
    for pattern in ("panels/*", "checkpoint-*"):
        yield from run.glob(pattern)
    yield from (folder / name for folder in run.glob("checkpoint-*") for name in RESULTS)


def copy_files(
    source: Source, destination: Path, *, finished: bool = True, pictures: bool = False
) -> None:
    """Copy everything that is published but the card.

    The student is copied as it is. Paths of this machine are cut to their last part in the
    results. `check_regular` comes first.

    Args:
        source: the student and its run.
        destination: an empty folder.
        finished: whether the results in the run's folder are those of this student.
        pictures: also the panel, which shows pictures of the evaluation data.
    """
    for name in (*STUDENT, *CODE):
        if (source.student / name).is_file():
            shutil.copyfile(source.student / name, destination / name)
    run = source.run
    if run is None:
        return
    for name, shape in RESULTS.items():
        places = [_newest_checkpoint(run) / name]
        if finished:
            places.insert(0, run / name)
        found = next((place for place in places if place.is_file()), None)
        if found is not None:
            _copy_json(found, destination / name, shape)
    panel = _panel(run, destination / "trainer_state.json" if finished else None)
    if panel is not None and pictures:
        shutil.copyfile(panel, destination / PANEL)


def without_paths(value: Any, key: str = "") -> Any:
    """JSON with every path cut to its last part; an id on the Hub stays."""
    if isinstance(value, dict):
        return {name: without_paths(item, name) for name, item in value.items()}
    if isinstance(value, list):
        return [without_paths(item, key) for item in value]
    if isinstance(value, str) and (key in _PATHS or _is_path(value)):
        return last_part(value)
    return value


def last_part(path: str) -> str:
    """What a path is called: its last part, for the `student` in a run the run's name."""
    parts = [part for part in re.split(r"[/\\]", path) if part not in ("", ".")]
    return next((part for part in reversed(parts) if part != "student"), path)


def _is_path(text: str) -> bool:
    """Whether text names a place on this machine, which it may no longer be on.

    `runs/...`, where trainings go, could be an id on the Hub, but for no teacher that is known.
    """
    if not re.search(r"[/\\]", text):
        return False
    is_id = _HUB_ID.fullmatch(text) and not text.startswith("runs/") and not text.endswith(_FILES)
    return not is_id or Path(text).exists()


def _copy_json(source: Path, destination: Path, shape: dict[str, Any]) -> None:
    values = read_object(source, shape)
    cleaned = without_paths(values)
    if cleaned == values:
        shutil.copyfile(source, destination)
    else:
        text = json.dumps(cleaned, indent=2, ensure_ascii=False) + "\n"
        destination.write_text(text, encoding="utf-8")


def _newest_checkpoint(run: Path) -> Path:
    numbers = {
        int(match[1]): path
        for path in run.glob("checkpoint-*")
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name))
    }
    return numbers[max(numbers)] if numbers else run


def _panel(run: Path, state: Path | None) -> Path | None:
    """The picture of the evaluation that chose the student, else the newest."""
    pictures = sorted((run / "panels").glob("step_*.png"))
    if state is not None and state.is_file():
        best = read_object(state, STATE_SHAPE).get("best_global_step") or 0
        chosen = run / "panels" / f"step_{int(best):06d}.png"
        if chosen in pictures:
            return chosen
    return pictures[-1] if pictures else None
