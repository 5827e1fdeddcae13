"""The card's text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from kd_trainer.model_card.facts import CardFacts
from kd_trainer.model_card.metadata import FIGURES, card_data
from kd_trainer.model_card.recipe import recipe
from kd_trainer.model_card.snippets import usage
from kd_trainer.safe_files import plain

# What would end a cell, or be read as markup or HTML; an underscore within a word is none.
_MARKUP = re.compile(r"[\\`*\[\]<>|~$&]|(?<![^\W_])_|_(?![^\W_])")
_CITATION = """\
```bibtex
@software{kd_trainer,
  title = {kd_trainer: knowledge distillation for image segmentation},
  url = {https://github.com/kd-trainer/kd_trainer}
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
