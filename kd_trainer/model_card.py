"""The card of a published student: README.md with metadata, from what a run has written.

The text is `templates/model_card.md`, where whatever is printed is escaped: names of classes, paths
and settings may be a stranger's.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from kd_trainer.errors import printable
from kd_trainer.losses import TERMS
from kd_trainer.models.configuration_smp import uses_timm_loader

_HUB_ID = re.compile(r"[\w-][\w.-]{0,95}/[\w-][\w.-]{0,95}", re.ASCII)


@dataclass(frozen=True)
class DatasetName:
    """How the training data is called, and its id if it lies on the Hub."""

    name: str
    hub_id: str | None = None


@dataclass(frozen=True)
class CardFacts:
    """Everything a card says.

    Args:
        repo_id: OWNER/NAME.
        license: as the Hub writes it; the user's choice.
        config: the student's config.json.
        parameters: (used, never used by any output).
        file_mib: size of the weights.
        dataset: what was trained on.
        results: the run's results.json; empty if unknown.
        settings: the run's config.yaml; empty if unknown.
        baseline: results.json of the same student trained without a teacher; empty if unknown.
        measured: further tables by heading, each a list of rows with the same keys.
        has_panel: whether panel.png lies beside the card.
        progress: of a student that is still being trained, how far it is.
    """

    repo_id: str
    license: str
    config: dict[str, Any]
    parameters: tuple[int, int]
    file_mib: float
    dataset: DatasetName
    results: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    baseline: dict[str, Any] = field(default_factory=dict)
    measured: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    has_panel: bool = False
    progress: str | None = None

    @property
    def labels(self) -> list[str]:
        """Names of the classes, background first."""
        named = {int(index): str(name) for index, name in self.config["id2label"].items()}
        return [named[index] for index in sorted(named)]

    @property
    def architecture(self) -> str:
        """Class name of the smp architecture."""
        return str(self.config["_model_class"])

    @property
    def encoder(self) -> str:
        """Encoder as smp names it."""
        return str(self.config["encoder_name"])

    @property
    def side(self) -> int:
        """Side of the square input in pixels."""
        return int(self.config["image_size"])

    @property
    def read_by_smp(self) -> bool:
        """Whether smp reads the same folder; it refuses our keys for encoders of timm."""
        return not uses_timm_loader(self.encoder)

    @property
    def teacher(self) -> str | None:
        """Name of the teacher, None of a student trained without one, "" if it is not known."""
        source = self.results.get("teacher", self.settings.get("teacher", ""))
        if source is None or str(source).lower() == "none":
            return None
        text = str(source)
        if _is_hub_id(text) or not text:
            return text
        parts = [part for part in Path(text).parts if part != "student"]
        return parts[-1] if parts else ""


def dataset_name(settings: dict[str, Any], given: str | None = None) -> DatasetName:
    """The user's name of the training data, else the last part of its path or its id on the Hub.

    Args:
        settings: of the run, as in its config.yaml.
        given: the user's choice; OWNER/NAME is taken as an id on the Hub.
    """
    if given:
        return DatasetName(given, given if _HUB_ID.fullmatch(given) else None)
    source = str(settings.get("dataset") or "")
    if source == "synthetic":
        return DatasetName("synthetic")
    if _is_hub_id(source):
        return DatasetName(source, source)
    return DatasetName(Path(source).name or "unnamed")


def _is_hub_id(text: str) -> bool:
    """Whether a source is an id; like everywhere, a folder of that name comes first."""
    return bool(_HUB_ID.fullmatch(text)) and not Path(text).exists()


TASK = "image-segmentation"
# Key in results.json, metric as the Hub lists it, name to show.
FIGURES = (
    ("miou", "mean_iou", "mIoU"),
    ("dice", "dice", "Dice"),
    ("iou_foreground", "iou_foreground", "IoU of the foreground"),
    ("boundary_iou", "boundary_iou", "boundary IoU"),
    ("pixel_accuracy", "accuracy", "pixel accuracy"),
    ("mean_image_iou", "mean_image_iou", "mean of the images' IoU"),
)


def card_data(facts: CardFacts) -> ModelCardData:
    """Metadata of a card; `model-index` only where something was measured."""
    results = evaluation_results(facts)
    return ModelCardData(
        license=facts.license,
        library_name="transformers",
        pipeline_tag=TASK,
        tags=["semantic-segmentation", "knowledge-distillation", "segmentation-models-pytorch"],
        datasets=[facts.dataset.hub_id] if facts.dataset.hub_id else None,
        metrics=[result.metric_type for result in results] or None,
        eval_results=results or None,
        model_name=facts.repo_id.split("/")[1] if results else None,
    )


def evaluation_results(facts: CardFacts) -> list[EvalResult]:
    """One result a figure of the student that exists; a class that never occurs has none."""
    found = []
    for key, metric, name in FIGURES:
        value: Any = facts.results.get(f"student_{key}")
        if value is not None:
            found.append(
                EvalResult(
                    task_type=TASK,
                    task_name="image segmentation",
                    dataset_type=facts.dataset.hub_id or "custom",
                    dataset_name=facts.dataset.name,
                    dataset_split=facts.settings.get("eval_split"),
                    metric_type=metric,
                    metric_name=name,
                    metric_value=round(float(value), 6),
                )
            )
    return found


def recipe(facts: CardFacts) -> dict[str, str]:
    """Loss, schedules, optimizer and augmentation; nothing of a run whose settings are unknown."""
    settings = facts.settings
    if not settings:
        return {}
    taught = facts.teacher is not None
    return {
        "Loss": _loss(settings, taught=taught),
        "Temperature": _temperature(settings) if taught else "",
        "Encoder": _unfreezing(settings),
        "Learning rate": _rates(settings),
        "Length": _length(settings, facts.results.get("epochs")),
        "Input": f"{facts.side} x {facts.side} pixels, aspect ratio not kept",
        "Augmentation": str(settings.get("augmentation", "")),
        "Precision": str(settings.get("mixed_precision") or ""),
        "Seed": str(settings.get("seed", 42)),
    }


def _loss(settings: dict[str, Any], *, taught: bool) -> str:
    task = settings.get("task_weight", 1.0)
    several = settings.get("num_labels", 2) > 2
    terms = []
    for term in TERMS:
        factor = settings.get(term.flag, 0.0) * (float(taught) if term.needs_teacher else task)
        if factor:
            title = (several and term.title_of_many) or term.title
            terms.append(f"{factor:g} {title}")
    return " + ".join(terms)


def _temperature(settings: dict[str, Any]) -> str:
    if not any(term.softened and settings.get(term.flag) for term in TERMS):
        return ""
    kind, per = settings.get("temperature_schedule"), settings.get("temperature_per", "epoch")
    start, end = settings.get("temperature_start"), settings.get("temperature_end")
    if kind == "constant":
        return f"{start:g} throughout"
    if kind == "piecewise":
        points = ", ".join(str(point) for point in settings.get("temperature_points") or ())
        return f"linear between the points {points} (epoch:temperature), moved each {per}"
    return f"{kind} from {start:g} to {end:g}, moved each {per}"


def _unfreezing(settings: dict[str, Any]) -> str:
    start, every = settings.get("unfreeze_start_epoch", 0), settings.get("unfreeze_every", 0)
    weights = settings.get("encoder_weights", "imagenet")
    first = {"imagenet": "ImageNet weights", "none": "random weights"}.get(
        str(weights), "weights from a file"
    )
    if settings.get("student"):
        first = "the weights of an earlier student"
    if every == 0:
        when = "free from the start" if start == 0 else f"frozen until epoch {start}"
        return f"from {first}, {when}"
    return (
        f"from {first}; its deepest unit is freed at epoch {start} (counted from 0), one more "
        f"every {every} epochs"
    )


def _rates(settings: dict[str, Any]) -> str:
    rate, scale = settings.get("learning_rate"), settings.get("encoder_lr_scale")
    if rate is None or scale is None:
        return ""
    return (
        f"AdamW, {rate:g} for decoder and head, {rate * scale:g} for the encoder; "
        f"{settings.get('warmup_epochs', 0):g} epochs of warm-up, then a cosine to "
        f"{settings.get('min_learning_rate', 0):g}; weight decay "
        f"{settings.get('weight_decay', 0):g}, gradients clipped at "
        f"{settings.get('max_grad_norm', 0):g}"
    )


def _length(settings: dict[str, Any], ran: Any) -> str:
    """How long the run was, as far as it is known (`ran`, in epochs), and what its limit was."""
    batch = settings.get("per_device_train_batch_size", 1)
    batch *= settings.get("gradient_accumulation_steps", 1)
    steps, epochs = settings.get("max_steps", -1), settings.get("num_train_epochs")
    limit = f"{steps} updates" if steps > 0 else f"{epochs:g} epochs"
    length = limit
    if isinstance(ran, int | float) and f"{ran:g} epochs" != limit:
        length = f"{ran:g} epochs (of at most {limit})"
    return f"{length}, {batch} images an update and device"


Table = tuple[list[str], list[list[Any]]]
# What would end a cell, or be read as markup or HTML; an underscore within a word is none.
_MARKUP = re.compile(r"[\\`*\[\]<>|~$&]|(?<![^\W_])_|_(?![^\W_])")


def markup(value: object) -> Markup:
    """A value as Markdown that shows it as it is; what is Markdown already stays."""
    return value if isinstance(value, Markup) else Markup(_MARKUP.sub(r"\\\g<0>", printable(value)))


def code(value: object) -> Markup:
    """A value in backticks, inside of which Markdown knows no escape."""
    return Markup("`" + printable(value).replace("`", "'") + "`")


# jinja2 escapes what is not Markup, so that whatever `markup` made passes.
_TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=True,
    finalize=markup,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
_TEMPLATES.filters["code"] = code


def render(facts: CardFacts) -> str:
    """The whole README.md."""
    card = _TEMPLATES.get_template("model_card.md").render(
        facts=facts,
        results=defaultdict(lambda: None, facts.results),
        metadata=card_data(facts).to_yaml(),
        taught=facts.teacher is not None,
        split=facts.settings.get("eval_split"),
        figures=_figures(facts),
        sizes=_sizes(facts),
        device=str(facts.results.get("device", "cpu")).split(":")[0],
        measured={heading: _measured(rows) for heading, rows in facts.measured.items()},
        recipe=recipe(facts),
        percent="{:.1%}".format,
    )
    return re.sub(r"\n{3,}", "\n\n", card).lstrip()  # where a part was left out


def _figures(facts: CardFacts) -> Table | None:
    """Student, teacher and baseline, as far as they were measured, metric by metric."""
    columns = {
        "student": (facts.results, "student"),
        "teacher": (facts.results, "teacher"),
        "same student without a teacher": (facts.baseline, "student"),
    }
    known = {
        title: (values, who)
        for title, (values, who) in columns.items()
        if values.get(f"{who}_miou") is not None
    }
    if "student" not in known:
        return None
    binary = len(facts.labels) == 2  # whose foreground is the one class
    wanted = [(key, name) for key, _, name in FIGURES if not (binary and key == "iou_foreground")]
    wanted += [(f"iou_{label}", f"IoU of {label}") for label in facts.labels]
    rows = []
    for key, name in wanted:
        values = [values.get(f"{who}_{key}") for values, who in known.values()]
        if any(value is not None for value in values):
            rows.append([name, *("" if v is None else f"{v:.4f}" for v in values)])
    return ["", *known], rows


def _sizes(facts: CardFacts) -> Table:
    """Parameters, bytes and, where they were measured, milliseconds of student and teacher."""
    used, never_used = facts.parameters
    results = facts.results
    header = ["", "parameters used", "never used", "file, MiB"]
    rows = [["student", f"{used:,}", f"{never_used:,}", f"{facts.file_mib:.1f}"]]
    if results.get("teacher_parameters"):
        mib = results.get("teacher_file_mib")
        parameters = f"{results['teacher_parameters']:,}"
        rows.append(["teacher", parameters, "", f"{mib:.1f}" if mib else ""])
    if results.get("student_ms"):
        header.append("ms a picture")
        for row in rows:
            milliseconds = results.get(f"{row[0]}_ms")
            row.append(f"{milliseconds:.1f}" if milliseconds else "")
    return header, rows


def _measured(rows: list[dict[str, Any]]) -> Table:
    """A table of whatever was measured beside the training."""
    header = list(rows[0])
    cells = [[_cell(row.get(name)) for name in header] for row in rows]
    return [name.replace("_", " ") for name in header], cells


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value)
