"""The card of a student, from what a run has written. It travels with the weights."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from kd_trainer.losses import TERMS
from kd_trainer.models.configuration_smp import uses_timm_loader
from kd_trainer.safe_files import plain

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


def recipe(facts: CardFacts) -> str:
    """Loss, schedules, optimizer and augmentation; nothing of a run whose settings are unknown."""
    settings = facts.settings
    if not settings:
        return ""
    taught = facts.teacher is not None
    lines = {
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
    body = "\n".join(f"- {name}: {text}" for name, text in lines.items() if text)
    title = "Distilled" if taught else "Trained without a teacher"
    return f"## Recipe\n\n{title} with kd_trainer.\n\n{body}"


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


_PIPELINE = """\
```python
from transformers import pipeline

segment = pipeline("image-segmentation", model="{id}", trust_remote_code=True)
for number, part in enumerate(segment("photograph.jpg")):
    name = "".join(c if c.isalnum() else "_" for c in part["label"])
    part["mask"].save(f"{{number}}_{{name[:50]}}.png")
```"""

_AUTO = """\
```python
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation

processor = AutoImageProcessor.from_pretrained("{id}", trust_remote_code=True)
model = AutoModelForSemanticSegmentation.from_pretrained("{id}", trust_remote_code=True)

image = Image.open("photograph.jpg")
with torch.no_grad():
    outputs = model(**processor(image, return_tensors="pt"))
(classes,) = processor.post_process_semantic_segmentation(
    outputs, target_sizes=[(image.height, image.width)]
)
```"""

_SMP = """\
```python
import numpy as np
import segmentation_models_pytorch as smp
import torch
from PIL import Image

network = smp.from_pretrained("{id}").eval()
image = Image.open("photograph.jpg").convert("RGB").resize(({side}, {side}), Image.BILINEAR)
pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
mean = torch.tensor({mean}).view(1, 3, 1, 1)
std = torch.tensor({std}).view(1, 3, 1, 1)
with torch.no_grad():
    logits = network((pixels - mean) / std)
{decision}
```"""

_ONE_LOGIT = "mask = logits[0, 0].sigmoid() > 0.5"
_CLASSES = "mask = logits[0].argmax(dim=0)"


def usage(facts: CardFacts) -> str:
    """How to use the student with a pipeline, with Auto classes and with smp."""
    parts = [
        "## Use",
        "With a pipeline, which gives one mask of the picture's size for each class it finds:",
        _PIPELINE.format(id=facts.repo_id),
        "With the Auto classes; `classes` is a tensor (height, width) of class ids:",
        _AUTO.format(id=facts.repo_id),
        "`trust_remote_code=True` runs the Python files of this repository. Where kd_trainer is "
        "installed, import it and leave the argument out. Either needs transformers 5.4 or newer; "
        "5.4, 5.8, 5.15, 5.23 and 5.24 were tried.",
    ]
    if facts.read_by_smp:
        parts += [
            "With segmentation_models_pytorch alone, which needs no code from here:",
            _smp(facts),
        ]
    else:
        parts.append(
            f"`smp.from_pretrained` does not read this repository: its loader of `{facts.encoder}` "
            "refuses the further keys in config.json that transformers needs."
        )
    return "\n\n".join(parts)


def _smp(facts: CardFacts) -> str:
    return _SMP.format(
        id=facts.repo_id,
        side=facts.side,
        mean=[float(value) for value in facts.config["image_mean"]],
        std=[float(value) for value in facts.config["image_std"]],
        decision=_ONE_LOGIT if facts.config["classes"] == 1 else _CLASSES,
    )


# What would end a cell, or be read as markup or HTML; an underscore within a word is none.
_MARKUP = re.compile(r"[\\`*\[\]<>|~$&]|(?<![^\W_])_|_(?![^\W_])")
_CITATION = """\
```bibtex
@software{kd_trainer,
  title = {kd_trainer: knowledge distillation for image segmentation}
}
@software{segmentation_models_pytorch,
  author = {Iakubovskii, Pavel},
  title = {Segmentation Models PyTorch},
  url = {https://github.com/qubvel-org/segmentation_models.pytorch}
}
@article{hinton2015distilling,
  author = {Hinton, Geoffrey and Vinyals, Oriol and Dean, Jeff},
  title = {Distilling the Knowledge in a Neural Network},
  journal = {arXiv:1503.02531},
  year = {2015}
}
```"""


def render(facts: CardFacts) -> str:
    """The whole README.md."""
    sections = [
        _head(facts),
        usage(facts),
        _figures(facts),
        _sizes(facts),
        *(_measured(heading, rows) for heading, rows in facts.measured.items()),
        _data(facts),
        recipe(facts),
        _limits(facts),
        f"## Licence\n\n{facts.license}, chosen by the owner of this repository.",
        f"## Citation\n\n{_CITATION}",
    ]
    body = "\n\n".join(section for section in sections if section)
    return f"---\n{card_data(facts).to_yaml()}\n---\n\n{body}\n"


def markup(text: str) -> str:
    """A name as Markdown that shows it as it is: it may be a stranger's."""
    return _MARKUP.sub(r"\\\g<0>", plain(text))


def _code(text: str) -> str:
    return "`" + plain(text).replace("`", "'") + "`"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, names to the left and figures to the right."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *rows))


def _head(facts: CardFacts) -> str:
    labels, name = [markup(label) for label in facts.labels], facts.repo_id.split("/")[1]
    named = "the foreground" if labels[-1] == "foreground" else labels[-1]
    what = f"finds {named} in photographs" if len(labels) == 2 else "labels photographs"
    text = (
        f"# {name}\n\nThis {facts.architecture} on `{facts.encoder}` {what}: "
        f"one class a pixel, out of {', '.join(labels)}."
    )
    if facts.teacher:
        text += f" It was distilled from {_code(facts.teacher)}."
    if facts.progress:
        text += f"\n\n**In training, {facts.progress}.** Figures are those of this moment."
    if facts.has_panel:
        shown = (
            "image, truth, teacher, student, errors"
            if facts.teacher is not None
            else ("image, truth, student, errors")
        )
        text += f"\n\n![{shown}](panel.png)\n\n*From left to right: {shown}.*"
    return text


def _figures(facts: CardFacts) -> str:
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
        return ""
    binary = len(facts.labels) == 2  # whose foreground is the one class
    wanted = [(key, name) for key, _, name in FIGURES if not (binary and key == "iou_foreground")]
    wanted += [(f"iou_{label}", f"IoU of {markup(label)}") for label in facts.labels]
    rows = []
    for key, name in wanted:
        values = [values.get(f"{who}_{key}") for values, who in known.values()]
        if any(value is not None for value in values):
            rows.append([name, *("" if v is None else f"{v:.4f}" for v in values)])
    text = f"## Figures\n\n{_measured_on(facts)}\n\n{table(['', *known], rows)}"
    teacher, student = facts.results.get("teacher_miou"), facts.results["student_miou"]
    if teacher:
        text += f"\n\nThe student reaches {student / teacher:.1%} of its teacher's mIoU"
        agreement = facts.results.get("agreement")
        text += f" and gives {agreement:.1%} of the pixels the same class." if agreement else "."
    return text


def _measured_on(facts: CardFacts) -> str:
    images = facts.results.get("eval_images")
    split = facts.settings.get("eval_split")
    name = markup(facts.dataset.name)
    where = f"the split {_code(split)} of {name}" if split else name
    count = f" ({images:,} images)" if images else ""
    return (
        f"On {where}{count}. mIoU, IoU and Dice are those of the whole set, from summed counts of "
        "pixels."
    )


def _sizes(facts: CardFacts) -> str:
    """Parameters, bytes and, where they were measured, milliseconds of student and teacher."""
    used, never_used = facts.parameters
    results = facts.results
    rows = [["student", f"{used:,}", f"{never_used:,}", f"{facts.file_mib:.1f}"]]
    if results.get("teacher_parameters"):
        mib = results.get("teacher_file_mib")
        rows.append(
            ["teacher", f"{results['teacher_parameters']:,}", "", f"{mib:.1f}" if mib else ""]
        )
    header, notes = ["", "parameters used", "never used", "file, MiB"], []
    if results.get("student_ms"):
        header.append("ms a picture")
        for row in rows:
            milliseconds = results.get(f"{row[0]}_ms")
            row.append(f"{milliseconds:.1f}" if milliseconds else "")
        threads = results.get("latency_threads")
        device = str(results.get("device", "cpu")).split(":")[0]
        where = f"a CPU (threads: {threads})" if device == "cpu" else f"a device of kind {device}"
        notes.append(
            f"Milliseconds are the median of single pictures of {facts.side} x {facts.side} in "
            f"torch, in fp32, on {where}, measured by turns at the end of the training."
        )
    if never_used:
        notes.append(
            "Never used are parameters that no output depends on; smp's strict loader wants them "
            "in the file."
        )
    return "\n\n".join(["## Size and speed", table(header, rows), *notes])


def _measured(heading: str, rows: list[dict[str, Any]]) -> str:
    """A table of whatever was measured beside the training."""
    header = list(rows[0])
    cells = [[_cell(row.get(name)) for name in header] for row in rows]
    titles = [markup(name.replace("_", " ")) for name in header]
    return f"## {markup(heading)}\n\n{table(titles, cells)}"


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else markup(str(value))


def _data(facts: CardFacts) -> str:
    name = markup(facts.dataset.name)
    if facts.dataset.hub_id:
        name = f"[{name}](https://huggingface.co/datasets/{facts.dataset.hub_id})"
    elif name == "synthetic":
        name = "synthetic pictures that kd_trainer draws"
    images = facts.results.get("train_images")
    text = f"## Training data\n\n{name}"
    text += f", {images:,} images." if images else "."
    if facts.settings.get("unlabelled"):
        text += " Some of them had no mask: there the teacher alone said what they show."
    return text


def _limits(facts: CardFacts) -> str:
    lines = [
        f"Pictures are resized to {facts.side} x {facts.side} without keeping their aspect ratio; "
        "what is a few pixels large then is lost.",
        "Measured on the data named above. On other cameras, scenes or people figures may be "
        "lower: measure on your own pictures first.",
        "It learned from its training data and teacher, and repeats what they get wrong."
        if facts.teacher is not None
        else "It learned from its training data, and repeats what the masks get wrong.",
    ]
    if facts.config["classes"] == 1:
        lines.append("A pixel counts as foreground from a probability of 0.5.")
    return "## Limits\n\n" + "\n".join(f"- {line}" for line in lines)
