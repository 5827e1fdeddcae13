"""What of a run is published, its card, and the Hub's answers as one line each.

Files are published by name: whatever is not named here stays at home. The token is that of the
environment.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Set
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    constants,
    hf_hub_download,
)

# HTTPError is httpx's in huggingface_hub 1 and httpx2's in 2; this file of both imports it.
from huggingface_hub.errors import (  # type: ignore[attr-defined]
    HfHubHTTPError,
    HTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)
from huggingface_hub.utils import logging
from huggingface_hub.utils.tqdm import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)
from torch import nn

from kd_trainer.argument_checks import check_license, check_repo_id
from kd_trainer.checkpointing.checkpoints import file_digest
from kd_trainer.checkpointing.fingerprint import DEFAULTS
from kd_trainer.fields import expanded
from kd_trainer.files import MARKER, replacing_folder, write_json
from kd_trainer.loading import load_student
from kd_trainer.model_card import CardFacts, dataset_name, render
from kd_trainer.models.image_sizes import plain_size
from kd_trainer.run_folder import (
    COMPARISON_SHAPE,
    EXPORTS_SHAPE,
    RESULTS_SHAPE,
    STATE_SHAPE,
    checkpoints,
    read_object,
    written_settings,
)
from kd_trainer.sources import CONFIG, WEIGHTS, last_part, model_source, public_name, run_of
from kd_trainer.students import (
    channels_of,
    has_one_logit,
    image_size_of,
    keeps_aspect_ratio,
    labels_of_student,
    parameter_counts,
    statistics_of,
)

STUDENT = (CONFIG, WEIGHTS, "preprocessor_config.json")
# Copied only as far as they are there: smp and kd_trainer itself do without.
CODE = (
    "modeling.py",
    "image_processing.py",
    "configuration_smp.py",
    "config_checks.py",
    "encoder_units.py",
    "image_sizes.py",
    "weights.py",
)
RESULTS = {"results.json": RESULTS_SHAPE, "all_results.json": {}, "trainer_state.json": STATE_SHAPE}
CARD, PANEL = "README.md", "panel.png"
OURS = frozenset({*STUDENT, *CODE, *RESULTS, CARD, PANEL})
# Optional files of a run with further measurements.
EXPORTS = "export.json"  # as export.py leaves it with the run's folder as --output
COMPARISON = "comparison.json"  # beside the folders of the runs that compare.py made
# What transformers, huggingface_hub and inference services look for beside a model.
_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".safetensors", ".h5", ".msgpack", ".gguf")
_CODE = (".py", ".pyc", ".so")
# Settings and figures that are paths, however they are written.
_PATHS = frozenset({"best_model_checkpoint", "output_dir"})
_HEAD = re.compile(r"\A---\n.*?^---\n", re.DOTALL | re.MULTILINE)  # a card's metadata
_LOGIN = "Log in with `hf auth login`, or put a token that may write into HF_TOKEN."


@dataclass(frozen=True)
class Source:
    """A student folder and the run that it came from, if that is known."""

    student: Path
    run: Path | None


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
        pictures: also publish the panel, which shows images of the evaluation data.

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


@dataclass(frozen=True)
class Pushed:
    """Where something was pushed to, its commit, and whether that commit is new.

    `others` are the files of the repository that are not of this push.
    """

    url: str
    commit: str
    changed: bool
    others: tuple[str, ...] = ()


def find_source(folder: str | Path) -> Source:
    """The student in a run folder, or a student folder and the run around it.

    Raises:
        FileNotFoundError: if there is no complete student.
    """
    named = Path(expanded(str(folder)))
    inside = named / "student"
    student = inside if inside.is_dir() else Path(model_source(str(named)))
    around = named if student == inside else run_of(student)
    missing = [name for name in STUDENT if not (student / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"Expected a run folder or a saved student with {', '.join(STUDENT)}, got {folder} "
            f"without {', '.join(missing)}. A training run leaves a complete one in `student`."
        )
    return Source(student, around if around != student else None)


def settings_of(run: Path | None) -> dict[str, Any]:
    """All settings that a run's config.yaml comes to; empty without one."""
    if run is None or not (run / "config.yaml").is_file():
        return {}
    return DEFAULTS | written_settings(run)


def write_folder(source: Source, destination: Path, about: Publication) -> Path:
    """Write everything that a push of `source` sends; returns the folder.

    Raises:
        FileNotFoundError: if the student or the baseline is not there.
        ValueError: if weights and configuration do not belong together, or the folder is not ours.
    """
    sources = [path for path in (source.student, source.run) if path is not None]
    with replacing_folder(destination, "output_dir", sources=sources) as folder:
        check_no_links(source)
        facts = _facts(source, about)  # what is wrong shows before anything is replaced
        finished = about.progress is None
        copy_files(source, folder, finished=finished, pictures=about.pictures)
        card = render(replace(facts, has_panel=(folder / PANEL).is_file()))
        (folder / CARD).write_text(card, encoding="utf-8")
    return destination


def publish(
    folder: str | Path, destination: Path, about: Publication, *, message: str = "Push a student"
) -> Pushed:
    """Write the folder of a run (or of a student) and push it."""
    write_folder(find_source(folder), destination, about)
    return upload(destination, about.repo_id, message=message)


def check_no_links(source: Source) -> None:
    """Refuse links among what is read: a stranger's could lead to a private file.

    Raises:
        ValueError: names the first.
    """
    paths = [source.student / name for name in (*STUDENT, *CODE)]
    if source.run is not None:
        saves = list(source.run.glob("checkpoint-*"))
        paths += [source.student, *saves, *source.run.glob("panels/*")]
        paths += [source.run / name for name in ("config.yaml", EXPORTS, "panels", *RESULTS)]
        paths += [folder / name for folder in saves for name in RESULTS]
    link = next((path for path in paths if path.is_symlink()), None)
    if link is not None:
        raise ValueError(
            f"Expected regular files to publish, got {link}, which is a link. Put the file that "
            "you mean in its place."
        )


def copy_files(
    source: Source, destination: Path, *, finished: bool = True, pictures: bool = False
) -> None:
    """Copy everything that is published but the card.

    The student is copied as it is. Paths of this machine are cut to their last part in the
    results. `check_no_links` comes first.

    Args:
        source: the student and its run.
        destination: an empty folder.
        finished: whether the results in the run's folder are those of this student.
        pictures: also the panel, which shows images of the evaluation data.
    """
    for name in (*STUDENT, *CODE):
        if (source.student / name).is_file():
            shutil.copyfile(source.student / name, destination / name)
    if source.run is None:
        return
    places = [*([source.run] if finished else []), *checkpoints(source.run)[:1]]
    for name, shape in RESULTS.items():
        file = next((place / name for place in places if (place / name).is_file()), None)
        if file is not None:
            write_json(destination / name, without_paths(read_object(file, shape)))
    panel = _panel(source.run, destination / "trainer_state.json" if finished else None)
    if panel is not None and pictures:
        shutil.copyfile(panel, destination / PANEL)


def without_paths(value: Any, key: str = "") -> Any:
    """JSON with every path cut to its last part; an id on the Hub stays."""
    if isinstance(value, dict):
        return {name: without_paths(item, name) for name, item in value.items()}
    if isinstance(value, list):
        return [without_paths(item, key) for item in value]
    if isinstance(value, str):
        return last_part(value) if key in _PATHS else public_name(value)
    return value


def _panel(run: Path, state: Path | None) -> Path | None:
    """The panel of the evaluation that chose the student, else the newest."""
    panels = sorted((run / "panels").glob("step_*.png"))
    best = read_object(state, STATE_SHAPE).get("best_global_step") if state is not None else None
    chosen = run / "panels" / f"step_{int(best or 0):06d}.png"
    return chosen if chosen in panels else panels[-1] if panels else None


def _facts(source: Source, about: Publication) -> CardFacts:
    student: Any = load_student(source.student)
    used, never_used, _ = parameter_counts(student)
    run, settings = source.run, settings_of(source.run)
    results = about.results
    if results is None:
        results = _read(run, "results.json", RESULTS_SHAPE)
    comparison = _read(run and run.resolve().parent, COMPARISON, COMPARISON_SHAPE)
    return CardFacts(
        repo_id=about.repo_id,
        license=about.license,
        config=student.config.to_dict() | _description(student),
        parameters=(used, never_used),
        file_mib=(source.student / WEIGHTS).stat().st_size / 2**20,
        dataset=about.dataset_name or dataset_name(settings),
        results=results,
        settings=settings,
        baseline=_baseline(comparison, run, about.baseline),
        measured=_measured(_read(run, EXPORTS, EXPORTS_SHAPE), comparison),
        progress=about.progress,
    )


def _description(student: nn.Module) -> dict[str, Any]:
    """What a card says of any student, under the names that the configuration of smp's has."""
    mean, std = statistics_of(student)
    return {
        "id2label": labels_of_student(student),
        "classes": channels_of(student),
        "one_logit": has_one_logit(student),
        "image_size": plain_size(image_size_of(student)),
        "keep_aspect_ratio": keeps_aspect_ratio(student),
        "image_mean": mean,
        "image_std": std,
    }


def _read(folder: Path | None, name: str, shape: dict[str, Any]) -> dict[str, Any]:
    """What a file of measurements holds, without paths; empty without the file."""
    values: dict[str, Any] = {} if folder is None else read_object(folder / name, shape)
    cleaned: dict[str, Any] = without_paths(values)
    return cleaned


def _baseline(comparison: dict[str, Any], run: Path | None, file: Path | None) -> dict[str, Any]:
    """Figures of the undistilled student: the user's file, else the means of a comparison."""
    if file is None:
        students = comparison.get("students", {})
        name = run.resolve().name.rpartition("_seed")[0] if run else ""
        alone = students.get(name, {}).get("baseline") or "baseline"
        metrics = students.get(alone, {}).get("metrics", {})
        return {f"student_{name}": mean.get("mean") for name, mean in metrics.items()}
    wanted = "Expected --baseline to be the results.json of a run without a teacher, got"
    if not file.is_file():
        raise FileNotFoundError(f"{wanted} {file}.")
    results = _read(file.resolve().parent, file.resolve().name, RESULTS_SHAPE)
    if results.get("student_miou") is None or results.get("teacher"):
        kind = f"one taught by {results['teacher']}" if results.get("teacher") else "another file"
        raise ValueError(f"{wanted} {kind}: {file}. Train the same student with --teacher none.")
    return results


def _measured(
    exports: dict[str, Any], comparison: dict[str, Any]
) -> dict[str, list[dict[str, Any]]]:
    """Checked exports and measured latencies, one row each, with what can stand in a cell."""
    columns = {"file MiB": "mib", "mask IoU": "mask_iou", "points lost": "miou_drop_points"}
    rows = []
    for name, figures in exports.items():
        row = {"format": name} | {title: figures.get(key) for title, key in columns.items()}
        for call in ("file", "torch"):
            row[f"ms {call}"] = figures.get("latency", {}).get(call, {}).get("median")
        rows.append(row)
    costs = comparison.get("costs", {})
    latencies = [
        {"network": who, "engine": one.get("engine"), "threads": one.get("threads")}
        | {"median ms": one.get("median"), "95th percentile ms": one.get("percentile_95")}
        for who in ("teacher", "student")
        for one in costs.get(who, {}).get("latency", [])
    ]
    tables = {
        "Exports (one image on one thread of a CPU)": rows,
        "Latency (one image on a CPU)": latencies,
    }
    return {heading: table for heading, table in tables.items() if table}


def check_access(repo_id: str, *, private: bool = True, force: bool = False) -> str:
    """Make sure of everything a push needs: a token, its permission, a repository fit for it.

    Args:
        repo_id: OWNER/NAME; the repository is made if there is none.
        private: make it private, and refuse one that is public; else the other way round.
        force: take a repository with other files that change how the student loads, or with a
            model or a card that was not pushed from here.

    Returns:
        Its address.

    Raises:
        PermissionError: if there is no token, or it may not write there.
        ConnectionError: if the Hub cannot be reached.
        ValueError: if the repository is public and should be private or the other way round, or
            holds such files, or another model.
    """
    with hub_errors(repo_id):
        api = HfApi()
        api.whoami()
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        # An existing repository counts as created, whoever may write to it.
        api.auth_check(repo_id, write=True)
        info = api.model_info(repo_id)
        names = {s.rfilename for s in info.siblings or ()}
        replaced = sorted(names & {CARD, *STUDENT})
        if replaced and _is_ours(repo_id, info.sha, names):
            replaced = []
    if private and not info.private:
        raise ValueError(
            f"Expected {repo_id} to be private, got a public repository. Say that you mean it with "
            "--public (in a training --hub_private_repo false), or push to another id."
        )
    if info.private and not private:
        raise ValueError(
            f"Expected {repo_id} to be public, got a private repository. Leave --public out (in a "
            "training --hub_private_repo false), or change it in its settings on the Hub."
        )
    if not force:
        _check_others(repo_id, names - OURS)
    if replaced and not force:
        raise ValueError(
            f"Expected {repo_id} to be new or of an earlier push, got another {replaced[0]}, which "
            "would be written over. Push to another id, or with push.py --force."
        )
    return str(url)


def _check_others(repo_id: str, names: Set[str]) -> None:
    """Refuse files beside the student that would be loaded with it or in its place.

    Code anywhere; weights, configurations and requirements at the top, where loaders look.
    """
    loaded = []
    for name in sorted(names):
        path = PurePosixPath(name.lower())
        settings = path.suffix == ".json" or path.name == "requirements.txt"
        top = len(path.parts) == 1
        if path.suffix in _CODE or (top and (path.suffix in _WEIGHTS or settings)):
            loaded.append(name)
    if loaded:
        raise ValueError(
            f"Expected nothing in {repo_id} that changes how the student loads, got "
            f"{', '.join(loaded)}. Delete it there, push to another id, or with push.py --force."
        )


def upload(
    folder: Path, repo_id: str, *, message: str, progress: bool = True, force: bool = False
) -> Pushed:
    """Push a folder as one commit; none is made if the repository holds these files already.

    What earlier pushes put there and this one does not is removed: curves, panel, results.
    Whatever else the repository holds stays. A repeated upload goes on with the large files that
    had not arrived.

    Args:
        folder: what is pushed, all of it.
        repo_id: OWNER/NAME of a repository that exists.
        message: of the commit.
        progress: show a bar for each large file.
        force: also beside files that change how the student loads.

    Raises:
        PermissionError: if the token may not write there.
        FileNotFoundError: if there is no such repository.
        ConnectionError: if the Hub cannot be reached or breaks off.
        ValueError: if it holds such files.
    """
    files = {str(p.relative_to(folder)): p for p in sorted(folder.rglob("*")) if p.is_file()}
    files.pop(MARKER, None)
    with hub_errors(repo_id):
        api = HfApi()
        before = api.model_info(repo_id, files_metadata=True)
        stored = {s.rfilename: s.lfs.sha256 if s.lfs else None for s in before.siblings or ()}
        others = stored.keys() - files.keys()
        earlier = others & {PANEL, *RESULTS}
        if not force:
            _check_others(repo_id, others - earlier)
        stale = earlier if earlier and _is_ours(repo_id, before.sha, stored.keys()) else set()
        operations: list[CommitOperationDelete | CommitOperationAdd] = [
            *(CommitOperationDelete(name) for name in sorted(stale)),
            *(CommitOperationAdd(name, path) for name, path in files.items()),
        ]
        # Where no large file is new, huggingface_hub would show a bar of nothing.
        news = WEIGHTS in files and file_digest(files[WEIGHTS]) != stored.get(WEIGHTS)
        with _bars(shown=progress and news):
            # A commit of its own, because upload_folder may spread one push over several.
            commit = api.create_commit(repo_id, operations, commit_message=message)
    shown = tuple(sorted(others - stale - {".gitattributes"}))
    url = f"{api.endpoint}/{repo_id}"
    return Pushed(url, commit.oid, commit.oid != before.sha, shown)


def _is_ours(repo_id: str, revision: str | None, stored: Set[str]) -> bool:
    """Whether the card in a repository is one of an earlier push, or as good as none.

    The Hub's page for new repositories writes a card that holds the licence and nothing else.
    """
    if CARD not in stored:
        return False
    path = Path(hf_hub_download(repo_id, CARD, revision=revision))
    card = path.read_text(encoding="utf-8", errors="replace")
    alone = stored <= {CARD, ".gitattributes"}
    return "kd_trainer" in card or (alone and not _HEAD.sub("", card).strip())


@contextmanager
def _bars(*, shown: bool) -> Iterator[None]:
    """Show huggingface_hub's bars or not, whatever a script has set for its small files."""
    before = not are_progress_bars_disabled()
    if shown == before or constants.HF_HUB_DISABLE_PROGRESS_BARS is not None:
        yield  # as it is, or as the user's environment has it
        return
    (enable_progress_bars if shown else disable_progress_bars)()
    try:
        yield
    finally:
        (enable_progress_bars if before else disable_progress_bars)()


@contextmanager
def hub_errors(repo_id: str) -> Iterator[None]:
    """Turn what huggingface_hub raises into one line, and keep its log lines off the screen."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    except LocalTokenNotFoundError as error:
        raise PermissionError(f"Expected a token for the Hub, got none. {_LOGIN}") from error
    except RuntimeError as error:
        if not isinstance(error.__cause__, HTTPError):
            raise
        raise _own_error(error.__cause__, repo_id) from error  # an upload in a thread of its own
    except (HTTPError, OfflineModeIsEnabled) as error:  # before ValueError: some are both
        raise _own_error(error, repo_id) from error
    except ValueError as error:
        if not str(error).startswith("Invalid metadata"):
            raise
        raise ValueError(
            f"Expected a card that the Hub accepts, got: {_one_line(error)}. Name a licence that "
            "the Hub knows."
        ) from error
    finally:
        logging.set_verbosity(level)


def _own_error(error: BaseException, repo_id: str) -> Exception:
    if isinstance(error, OfflineModeIsEnabled):
        return ConnectionError(
            f"Expected to reach the Hub for {repo_id}, got offline mode. Unset HF_HUB_OFFLINE."
        )
    if not isinstance(error, HfHubHTTPError):
        return ConnectionError(
            f"Expected the Hub to answer, got {type(error).__name__} ({_one_line(error)}). "
            "Check the network and push again: what has arrived is not sent twice."
        )
    reason = error.server_message or error.response.headers.get("X-Error-Message")
    got = f"got HTTP {error.response.status_code}" + (f" ({_one_line(reason)})" if reason else "")
    if error.response.status_code == 401:
        return PermissionError(f"Expected a valid token for {repo_id}, {got}. {_LOGIN}")
    if error.response.status_code == 403:
        return PermissionError(
            f"Expected a token that may write to {repo_id}, {got}. Give the token write access, "
            "or push to an owner that is you or an organisation of yours."
        )
    if error.response.status_code == 404:
        return FileNotFoundError(
            f"Expected the repository {repo_id} on the Hub, {got}. Check the id, and that the "
            "token may see it."
        )
    return ConnectionError(f"Expected the Hub to accept {repo_id}, {got}. Try again later.")


def _one_line(text: object) -> str:
    return " ".join(str(text).split()).rstrip(".")
