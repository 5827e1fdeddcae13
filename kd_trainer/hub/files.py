"""The files of a run that are published, by name: whatever is not named here stays at home.

So neither the teacher nor training arguments, optimizer, scheduler or random state can slip in.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kd_trainer.hub.boards import copy_boards
from kd_trainer.hub.connection import WEIGHTS

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
RESULTS = ("results.json", "all_results.json", "trainer_state.json")
CARD, PANEL, BOARDS = "README.md", "panel.png", "runs"
_OURS = frozenset({*STUDENT, *CODE, *RESULTS, CARD, PANEL, BOARDS})


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
    given = Path(folder)
    student = given / "student" if (given / "student").is_dir() else given
    inside = student.name == "student" and (student.parent / "config.yaml").is_file()
    run = given if student != given else student.parent if inside else None
    missing = [name for name in STUDENT if not (student / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"Expected a run folder or a saved student with {', '.join(STUDENT)}, got {folder} "
            f"without {', '.join(missing)}. A training run leaves a complete one in `student`."
        )
    return Source(student, run)


def clear(destination: Path, source: Source) -> None:
    """Empty the folder of an earlier publication, or make a new one.

    Raises:
        ValueError: if the folder holds anything else, or is the student's own.
    """
    if destination.resolve() in {p.resolve() for p in (source.student, source.run) if p}:
        raise ValueError(
            f"Expected a folder to write a copy into, got {destination}, which is the source. Name "
            "another --output_dir."
        )
    present = {p.name for p in destination.iterdir()} if destination.is_dir() else set()
    foreign = sorted(present - _OURS) or (sorted(present) if CARD not in present else [])
    if (foreign and present) or destination.is_file():
        raise ValueError(
            f"Expected an empty folder or an earlier publication, got {destination}"
            + (f", which holds {foreign[0]}" if foreign else ", which is a file")
            + ". Name another --output_dir."
        )
    shutil.rmtree(destination, ignore_errors=True)
    destination.mkdir(parents=True)


def copy_files(
    source: Source, destination: Path, *, finished: bool = True, pictures: bool = True
) -> None:
    """Copy everything that is published but the card.

    The student is copied as it is. Paths of this machine are cut to their last part in the
    results, and left out of the curves together with the name of the machine.

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
    for name in RESULTS:
        places = [_newest_checkpoint(run) / name]
        if finished:
            places.insert(0, run / name)
        found = next((place for place in places if place.is_file()), None)
        if found is not None:
            _copy_json(found, destination / name)
    panel = _panel(run, destination / "trainer_state.json" if finished else None)
    if panel is not None and pictures:
        shutil.copyfile(panel, destination / PANEL)
    copy_boards(run / BOARDS, destination / BOARDS, pictures=pictures)


def without_paths(value: Any) -> Any:
    """JSON with every absolute path cut to its last part."""
    if isinstance(value, dict):
        return {key: without_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_paths(item) for item in value]
    if isinstance(value, str) and (value.startswith("~") or Path(value).is_absolute()):
        return Path(value).name
    return value


def _copy_json(source: Path, destination: Path) -> None:
    values = json.loads(source.read_text(encoding="utf-8"))
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
        best = json.loads(state.read_text(encoding="utf-8")).get("best_global_step")
        chosen = run / "panels" / f"step_{best or 0:06d}.png"
        if chosen in pictures:
            return chosen
    return pictures[-1] if pictures else None
