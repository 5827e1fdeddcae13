"""The folder that is pushed: the files of a run by name, and their card."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kd_trainer.argument_checks import check_license, check_repo_id
from kd_trainer.checkpointing.fingerprint import DEFAULTS
from kd_trainer.config import load_recipe
from kd_trainer.hub import (
    PANEL,
    Pushed,
    Source,
    check_regular,
    copy_files,
    find_source,
    upload,
    without_paths,
)
from kd_trainer.model_card import CardFacts, dataset_name, render
from kd_trainer.models.modeling import SmpForSemanticSegmentation, parameter_counts
from kd_trainer.replacing import replacing
from kd_trainer.run_files import COMPARISON_SHAPE, EXPORTS_SHAPE, RESULTS_SHAPE, read_object
from kd_trainer.tracking import check_finite_weights

# Optional files of a run with further measurements: a list of rows, each a mapping.
EXPORTS = "export.json"  # as export.py leaves it with the run's folder as --output
COMPARISON = "comparison.json"  # beside the folders of the runs that compare.py made


@dataclass(frozen=True)
class Publication:
    """What the user decides about a publication.

    Args:
        repo_id: OWNER/NAME.
        license: as the Hub writes it.
        dataset_name: how the training data is called; None takes it from the run.
        baseline: results.json of the same student trained without a teacher.
        results: figures to put on the card instead of those of the run.
        progress: of a student that is still being trained, how far it is.
        pictures: also publish the panel, which shows pictures of the evaluation data.

    Raises:
        ValueError: if the id or the licence is none.
    """

    repo_id: str
    license: str
    dataset_name: str | None = None
    baseline: Path | None = None
    results: dict[str, Any] | None = None
    progress: str | None = None
    pictures: bool = False

    def __post_init__(self) -> None:
        check_repo_id(self.repo_id)
        check_license(self.license, "license")


def write_folder(source: Source, destination: Path, about: Publication) -> Path:
    """Write everything that a push of `source` sends; returns the folder.

    Raises:
        FileNotFoundError: if the student or the baseline is not there.
        ValueError: if weights and configuration do not belong together, or the folder is not ours.
    """
    sources = [path for path in (source.student, source.run) if path is not None]
    with replacing(destination, "output_dir", sources=sources) as folder:
        check_regular(source)
        facts = _facts(source, about)  # what is wrong shows before anything is replaced
        finished = about.progress is None
        copy_files(source, folder, finished=finished, pictures=about.pictures)
        has_panel = (folder / PANEL).is_file()
        card = render(CardFacts(**(vars(facts) | {"has_panel": has_panel})))
        (folder / "README.md").write_text(card, encoding="utf-8")
    return destination


def publish(
    folder: str | Path, destination: Path, about: Publication, *, message: str = "Push a student"
) -> Pushed:
    """Write the folder of a run (or of a student) and push it."""
    write_folder(find_source(folder), destination, about)
    return upload(destination, about.repo_id, message=message)


def settings_of(run: Path | None) -> dict[str, Any]:
    """All settings that a run's config.yaml comes to; empty without one."""
    if run is None or not (run / "config.yaml").is_file():
        return {}
    return DEFAULTS | load_recipe(str(run / "config.yaml"))


def _facts(source: Source, about: Publication) -> CardFacts:
    student = SmpForSemanticSegmentation.from_pretrained(str(source.student))
    check_finite_weights(student, str(source.student))
    used, never_used, _ = parameter_counts(student)
    run, settings = source.run, settings_of(source.run)
    results = about.results
    if results is None:
        results = _read(run / "results.json", RESULTS_SHAPE) if run is not None else {}
    return CardFacts(
        repo_id=about.repo_id,
        license=about.license,
        config=student.config.to_dict(),
        parameters=(used, never_used),
        file_mib=(source.student / "model.safetensors").stat().st_size / 2**20,
        dataset=dataset_name(settings, about.dataset_name),
        results=results,
        settings=settings,
        baseline=_baseline(run, about.baseline),
        measured=_measured(run),
        progress=about.progress,
    )


def _read(path: Path, shape: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = without_paths(read_object(path, shape))
    return found


def _baseline(run: Path | None, given: Path | None) -> dict[str, Any]:
    """Figures of the undistilled student: the user's file, else the means of a comparison.

    compare.py writes `comparison.json` beside the folders of its runs.
    """
    if given is None:
        metrics = _compared(run).get("baseline", {}).get("metrics", {})
        return {f"student_{name}": mean.get("mean") for name, mean in metrics.items()}
    if not given.is_file():
        raise FileNotFoundError(
            f"Expected --baseline to be the results.json of a run without a teacher, got {given}."
        )
    results = _read(given.resolve(), RESULTS_SHAPE)
    if results.get("student_miou") is None or results.get("teacher"):
        found = f"one taught by {results['teacher']}" if results.get("teacher") else "another file"
        raise ValueError(
            f"Expected --baseline to be the results.json of a run without a teacher, got {found}: "
            f"{given}. Train the same student with --teacher none."
        )
    return results


def _compared(run: Path | None) -> dict[str, Any]:
    """What a comparison found that the run was a part of; empty without one."""
    if run is None:
        return {}
    return _read(run.resolve().parent / COMPARISON, COMPARISON_SHAPE)


def _measured(run: Path | None) -> dict[str, list[dict[str, Any]]]:
    """Checked exports and measured latencies, one row each, with what can stand in a cell."""
    exports = _read(run / EXPORTS, EXPORTS_SHAPE) if run is not None else {}
    columns = {"file MiB": "mib", "mask IoU": "mask_iou", "points lost": "miou_drop_points"}
    rows = []
    for name, figures in exports.items():
        row = {"format": name} | {title: figures.get(key) for title, key in columns.items()}
        for call in ("file", "torch"):
            row[f"ms {call}"] = figures.get("latency", {}).get(call, {}).get("median")
        rows.append(row)
    costs = _compared(run).get("costs", {})
    latencies = [
        {"network": who, "engine": one.get("engine"), "threads": one.get("threads")}
        | {"median ms": one.get("median"), "95th percentile ms": one.get("percentile_95")}
        for who in ("teacher", "student")
        for one in costs.get(who, {}).get("latency", [])
    ]
    tables = {
        "Exports (one picture on one thread of a CPU)": rows,
        "Latency (one picture on a CPU)": latencies,
    }
    return {heading: found for heading, found in tables.items() if found}
