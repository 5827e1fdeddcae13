"""The card of a published student: README.md with metadata, from what a run has written.

The text is `templates/model_card.md`, where whatever is printed is escaped: names of classes, paths
and settings may be a stranger's.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from kd_trainer.errors import printable
from kd_trainer.losses import SCHEDULED, TERMS
from kd_trainer.models.configuration_smp import MULTI_LABEL, uses_timm_loader
from kd_trainer.models.image_sizes import as_size
from kd_trainer.schedules import read_weight_schedules
from kd_trainer.sources import SELF, is_hub_id, public_name

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
Table = tuple[list[str], list[list[str]]]
# What would end a cell, or be read as markup or HTML; an underscore within a word is none.
_MARKUP = re.compile(r"[\\`*\[\]<>|~$&]|(?<![^\W_])_|_(?![^\W_])")


@dataclass(frozen=True)
class CardFacts:
    """Everything a card says.

    Args:
        repo_id: OWNER/NAME.
        license: as the Hub writes it; the user's choice.
        config: the student's config.json, with `image_size`, `image_mean`, `image_std`, `classes`
            (channels of the raw logits) and `id2label` of any kind of student.
        parameters: (used, never used by any output).
        file_mib: size of the weights.
        dataset: what was trained on, by a name or by its id on the Hub.
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
    dataset: str
    results: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    baseline: dict[str, Any] = field(default_factory=dict)
    measured: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    has_panel: bool = False
    progress: str | None = None

    @property
    def is_smp(self) -> bool:
        """Whether it is a network of smp, else a stock model of transformers."""
        return "_model_class" in self.config

    @property
    def one_logit(self) -> bool:
        """Whether a stock model has one channel, over which every stock argmax is 0."""
        return bool(self.config.get("one_logit"))

    @property
    def several(self) -> bool:
        """Whether a pixel may have several labels."""
        return bool(self.config.get("problem_type") == MULTI_LABEL)

    @property
    def labels(self) -> list[str]:
        """Names of the classes, background first where there is one."""
        names = {int(index): str(name) for index, name in self.config["id2label"].items()}
        return [names[index] for index in sorted(names)]

    @property
    def dataset_id(self) -> str | None:
        """Id of the training data on the Hub; None of data that is not there."""
        return self.dataset if is_hub_id(self.dataset) else None

    @property
    def _teacher(self) -> Any:
        return self.results.get("teacher", self.settings.get("teacher", ""))

    @property
    def taught_itself(self) -> bool:
        """Whether its own moving average was its teacher, which nothing can be compared with."""
        return bool(self._teacher == SELF)

    @property
    def teacher(self) -> str | None:
        """Name of the teacher, None of a student trained without one, "" if it is not known."""
        source = self._teacher
        if source is None or str(source).lower() == "none" or self.taught_itself:
            return None
        names = source if isinstance(source, list) else [str(source)]
        return " + ".join(map(public_name, names))


def dataset_name(settings: dict[str, Any]) -> str:
    """What a run's training data is called: the last part of its path, or its id on the Hub."""
    return public_name(str(settings.get("dataset") or "")) or "unnamed"


def card_data(facts: CardFacts) -> ModelCardData:
    """Metadata of a card; `model-index` only where something was measured.

    A class that never occurs has no figure, and so no entry.
    """
    results = [
        EvalResult(
            task_type=TASK,
            task_name="image segmentation",
            dataset_type=facts.dataset_id or "custom",
            dataset_name=facts.dataset,
            dataset_split=facts.settings.get("eval_split"),
            metric_type=metric,
            metric_name=name,
            metric_value=round(float(facts.results[f"student_{key}"]), 6),
        )
        for key, metric, name in FIGURES
        if facts.results.get(f"student_{key}") is not None
    ]
    return ModelCardData(
        license=facts.license,
        library_name="transformers",
        pipeline_tag=TASK,
        tags=[
            *("semantic-segmentation", "knowledge-distillation"),
            *(["segmentation-models-pytorch"] if facts.is_smp else []),
        ],
        datasets=[facts.dataset_id] if facts.dataset_id else None,
        metrics=[result.metric_type for result in results] or None,
        eval_results=results or None,
        model_name=facts.repo_id.split("/")[1] if results else None,
    )


def markup(value: object) -> Markup:
    """A value as Markdown that shows it as it is; what is Markdown already stays."""
    if isinstance(value, Markup):
        return value
    return Markup(_MARKUP.sub(r"\\\g<0>", printable(value)))


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
    height, width = as_size(facts.config["image_size"])
    card = _TEMPLATES.get_template("model_card.md").render(
        facts=facts,
        results=defaultdict(lambda: None, facts.results),
        settings=defaultdict(lambda: None, facts.settings),
        metadata=card_data(facts).to_yaml(),
        read_by_smp=facts.is_smp and not uses_timm_loader(facts.config["encoder_name"]),
        start=public_name(str(facts.settings.get("student") or "")),
        trust="trust_remote_code=True" if facts.is_smp else "",
        height=height,
        width=width,
        fitted=facts.config.get("keep_aspect_ratio", False),
        several=facts.several,
        channels=len(facts.config["image_mean"]) if facts.config.get("own_depth") else 0,
        taught=facts.teacher is not None,
        loss=_loss(facts),
        softened=any(term.softened and _weights(facts.settings, term.name) for term in TERMS),
        figures=_figures(facts),
        sizes=_sizes(facts),
        device=str(facts.results.get("device", "cpu")).split(":")[0],
        measured={heading: _measured(rows) for heading, rows in facts.measured.items()},
        percent="{:.1%}".format,
    )
    return re.sub(r"\n{3,}", "\n\n", card).lstrip()  # where a part was left out


def _loss(facts: CardFacts) -> str:
    """The sum of terms that was minimised; of a student without a teacher those that need none."""
    settings, taught = facts.settings, facts.teacher is not None or facts.taught_itself
    softmax = (settings.get("num_labels") or 2) > 2 and not facts.several
    terms = []
    for term in TERMS:
        names = [term.pseudo_of or term.name, *(["pseudo"] if term.pseudo_of else [])]
        names += ["task"] if term.pseudo_of or not term.needs_teacher else []
        factors = [_weights(settings, name, float(name == "task")) for name in names]
        if all(factors) and (taught or not term.needs_teacher):
            terms.append(f"{_product(factors)} {(softmax and term.softmax_title) or term.title}")
    return " + ".join(terms)


def _product(factors: list[list[float]]) -> str:
    """A product of weights as text, those that change with an arrow."""
    constant = math.prod(weights[0] for weights in factors if len(weights) == 1)
    changing = [weights for weights in factors if len(weights) > 1] or [[1.0]]
    first = " → ".join(f"{constant * weight:g}" for weight in changing[0])
    if len(changing) == 1:
        return first
    rest = [" → ".join(f"{weight:g}" for weight in weights) for weights in changing[1:]]
    return "·".join(f"({text})" for text in [*reversed(rest), first])


def _weights(settings: dict[str, Any], name: str, default: float = 0.0) -> list[float]:
    """Weights of a term in turn: one, or those of its schedule; none where it is never above 0."""
    schedule = read_weight_schedules(settings.get("weight_schedule"), SCHEDULED).get(name)
    if schedule is not None:
        return [weight for weight, _ in groupby(w for _, w in schedule.points)]
    weight = settings.get(f"{name}_weight", default)
    return [weight] if weight else []


def _figures(facts: CardFacts) -> Table | None:
    """Student, teacher and baseline, as far as they were measured, metric by metric."""
    columns = {
        "student": (facts.results, "student"),
        "teacher": (facts.results, "teacher"),
        "same student without a teacher": (facts.baseline, "student"),
    }
    measured = {
        title: (values, who)
        for title, (values, who) in columns.items()
        if values.get(f"{who}_miou") is not None
    }
    if "student" not in measured:
        return None
    # Of a binary model it is the one class, without a background the mIoU.
    twice = ["iou_foreground"] if len(facts.labels) == 2 or facts.several else []
    wanted = [(key, name) for key, _, name in FIGURES if key not in twice]
    wanted += [(f"iou_{label}", f"IoU of {label}") for label in facts.labels]
    rows = []
    for key, name in wanted:
        values = [values.get(f"{who}_{key}") for values, who in measured.values()]
        if any(value is not None for value in values):
            rows.append([name, *("" if v is None else f"{v:.4f}" for v in values)])
    return ["", *measured], rows


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
        header.append("ms an image")
        for row in rows:
            milliseconds = results.get(f"{row[0]}_ms")
            row.append(f"{milliseconds:.1f}" if milliseconds else "")
    return header, rows


def _measured(rows: list[dict[str, Any]]) -> Table:
    """A table of whatever was measured beside the training."""
    cells = [[_cell(row.get(name)) for name in rows[0]] for row in rows]
    return [name.replace("_", " ") for name in rows[0]], cells


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value)
