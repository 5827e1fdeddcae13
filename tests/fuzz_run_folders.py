"""Feeds mutated files of a run to report, card and comparison; see `fuzzing` for the arguments."""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from fuzzing import DEEP, mutated, run
from tiny import BINARY, tiny_student

from kd_trainer import hub
from kd_trainer.commands import report
from kd_trainer.commands.export import results_table
from kd_trainer.compare.image_counts import ImageCounts
from kd_trainer.compare.report import summarise
from kd_trainer.compare.results import read_runs
from kd_trainer.compare.tables import markdown
from kd_trainer.hub import Publication, find_source, write_folder
from kd_trainer.losses import TERMS
from kd_trainer.models.image_processing import SmpImageProcessor
from kd_trainer.run_folder import EXPORTS_SHAPE, read_object

# As JSON text, because Python would not write some of them.
VALUES = (
    *("null", "true", "0", "-1", "2", "0.5", "1e999", "NaN", "-Infinity", "9" * 30, "9" * 5000),
    *("1e300", "1e-320", "1e99", "-1e99", '""', '"1"', '"text"', '"../a"', '"\\ud800"', "[]", "{}"),
    *('"\\u0000"', '"\\u001b[2J"', '"' + "x" * 5000 + '"', "[1]", '["a"]', "[[]]", '{"a": 1}'),
    *(DEEP, '{"median": {}}', "[{}]", '[{"epoch": {}}]', '"a/' + "b" * 300 + '"'),
)
NO_COSTS = {"costs": {"student": None, "teacher": None, "load": None}}


def make_run(kind: str) -> dict[Path, Any]:
    """Write a finished run of a comparison; returns what its files hold, by their place."""
    place = ROOT / f"{kind}_seed0"
    STUDENT.save_pretrained(place / "student")
    SmpImageProcessor.from_model_config(STUDENT.config).save_pretrained(place / "student")
    rows = np.tile(np.int32([60, 4, 6, 30, 5, 5, 5, 5]), (3, 1))
    counts = ImageCounts(rows, rows, rows)
    counts.save(place / "image_counts.npz")
    measured = counts.figures(BINARY)
    figures = {f"{who}_{k}": v for who, own in measured.items() for k, v in own.items()}
    results = figures | {
        **{"agreement": 0.9, "agreement_miou": 0.8, "eval_images": 3, "train_images": 8},
        **{"train_seconds": 9.5, "epochs": 1.5, "peak_memory_mib": 900.0, "device": "cpu"},
        **{"student_ms": 4.0, "teacher_ms": 8.0, "latency_threads": 1, "student_file_mib": 2.5},
        **{"teacher": "big", "teacher_parameters": 9_000_000, "teacher_file_mib": 40.0},
        **{"versions": {"torch": "2.9"}, "eval_history": [{"epoch": 1.5, "miou": 0.7}]},
    }
    log = {"loss": 1.5, "grad_norm": 3.0, "lr/decoder": 1e-4, "temperature": 2.0, "free_units": 1}
    log |= {term.name: 0.5 for term in TERMS}
    evaluated = {f"eval_{k}": v for k, v in measured["student"].items()} | {"eval_loss": 0.9}
    logs = [log | evaluated | {"epoch": n / 4, "step": n} for n in range(1, 7)]
    note = {"starts": 1, "updates": 6, "teacher_weights": "1", "left_out": 0}
    config = {"dataset": "photos", "teacher": "big", "image_size": 32, "learning_rate": 1e-3}
    config |= {"class_names": ["background", "person"], "hub_license": "mit", "epochs": 2}
    config |= {"temperature_points": ["0:4", "9:1"], "student": None, "eval_split": "validation"}
    export = {"file": "a.onnx", "mib": 2.0, "images": 4, "mask_iou": 1.0, "miou": 0.7}
    export |= {"latency": {"file": {"median": 3.0}, "torch": {"median": 4.0}}}
    return {
        place / "results.json": results,
        place / "trainer_state.json": {"log_history": logs, "best_global_step": 6},
        place / "export.json": {"onnx": export},
        place / "comparison_run.json": note,
        place / "config.yaml": config,
    }


def make_comparison() -> dict[str, Any]:
    latency = {"engine": "torch", "threads": 1, "median": 4.0, "percentile_95": 5.0}
    mean = {"mean": 0.6, "standard_error": None, "seeds": 1}
    costs = {"student": {"latency": [latency]}, "teacher": None, "load": 0.5}
    students = {"baseline": {"metrics": {"miou": mean, "dice": None}, "baseline": None}}
    return {"students": students, "costs": costs}


def compare() -> None:
    markdown(summarise(read_runs([ROOT]), 10) | NO_COSTS)


def outcome(number: int) -> str:
    """`sample`, `error`, or what should not be; a negative number changes no file."""
    draw = np.random.default_rng([12, abs(number)])
    path = list(FILES)[number % len(FILES)]
    sound = json.dumps(FILES[path])
    text = sound.encode() if number < 0 else mutated(json.loads(sound), VALUES, draw)
    path.write_bytes(text)
    found = {name: met(call, path) for name, call in READERS.items()}
    path.write_text(sound)
    faults = [f"{name}: {one}" for name, one in found.items() if one not in ("sample", "error")]
    return "; ".join(faults) or ("error" if "error" in found.values() else "sample")


def met(call: Callable[[], Any], path: Path) -> str:
    """What a reader made of the changed file."""
    try:
        call()
    except (ValueError, OSError) as error:
        message = str(error)
        flag = path.suffix == ".yaml" and "--" in message  # a setting is named as its flag
        named = str(ROOT) in message or path.name in message or flag
        ours = message.startswith("Expected") and named and "\n" not in message
        return "error" if ours and len(message) < 1500 else f"another message: {message[:500]!r}"
    except Exception as error:
        return f"another exception: {error!r}"[:500]
    return "sample"


ROOT = Path(tempfile.mkdtemp(prefix="fuzz-runs-"))
atexit.register(shutil.rmtree, ROOT, ignore_errors=True)
STUDENT = tiny_student()
FILES = make_run("distilled")
for written, value in (FILES | make_run("baseline")).items():
    written.write_text(json.dumps(value))
FILES[ROOT / "comparison.json"] = make_comparison()
# Read once: the weights are none of the changed files.
report.load_student = lambda *_, **__: STUDENT
hub.load_student = lambda *_, **__: STUDENT
RUN = ROOT / "distilled_seed0"
READERS: dict[str, Callable[[], Any]] = {
    "report": lambda: report.build_report(RUN, changed={"dataset": "none"}),
    "push": lambda: write_folder(find_source(RUN), RUN / "hub", Publication("me/student", "mit")),
    "export": lambda: results_table(read_object(RUN / "export.json", EXPORTS_SHAPE)),
    "compare": compare,
}

if __name__ == "__main__":
    run(outcome)
