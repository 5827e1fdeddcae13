"""The parts of a report, each from its contents to markup."""

from __future__ import annotations

import math
from typing import Any

from kd_trainer.reports.charts import evaluations, history_charts
from kd_trainer.reports.contents import DIFFERENCE, STUDENT, TEACHER, Contents, Network
from kd_trainer.reports.page import (
    Section,
    details,
    legend,
    pairs,
    picture,
    share_of,
    table,
    text,
    tile,
)
from kd_trainer.reports.panels import (
    FALSE_NEGATIVE,
    FALSE_POSITIVE,
    IGNORED,
    class_colours,
)

SIDE = 320  # of an embedded picture in pixels
ROWS = {
    "miou": "mIoU",
    "iou_foreground": "IoU foreground",
    "dice": "Dice",
    "boundary_iou": "boundary IoU",
    "precision": "precision",
    "recall": "recall",
    "pixel_accuracy": "pixel accuracy",
    "mean_image_iou": "mean image IoU",
}


def summary(contents: Contents) -> Section:
    """The main figures large, then student and teacher side by side."""
    student, teacher = contents.networks[STUDENT], contents.networks.get(TEACHER)
    notes = "".join(f'<p class="note">{text(note)}</p>' for note in contents.notes)
    body = f'{notes}<div class="tiles">{"".join(_tiles(contents))}</div>'
    if student.figures:
        rows = [
            [name, student.figures[key], *(_compared(student, teacher, key) if teacher else [])]
            for key, name in ROWS.items()
            if key in student.figures
        ]
        header = ["metric", STUDENT, *([TEACHER, "student / teacher"] if teacher else [])]
        body += table(header, rows)
    return Section("summary", "Summary", body + f'<p class="faint">{text(contents.measured)}</p>')


def _compared(student: Network, teacher: Network, key: str) -> list[object]:
    own, other = student.figures[key], teacher.figures.get(key, math.nan)
    return [other, share_of(own, other)]


def _tiles(contents: Contents) -> list[str]:
    student, teacher = contents.networks[STUDENT], contents.networks.get(TEACHER)
    results, tiles = contents.results, []
    if student.figures:
        more = ""
        if teacher is not None and "miou" in teacher.figures:
            other = teacher.figures["miou"]
            more = f"{share_of(student.figures['miou'], other)} of the teacher's {other:.4f}"
        tiles.append(tile("mIoU", text(student.figures["miou"]), more))
    if contents.agreement:
        mutual = f"of the pixels; mutual mIoU {text(contents.agreement['agreement_miou'])}"
        share = f"{contents.agreement['agreement']:.2%}"
        tiles.append(tile("agreement with the teacher", share, mutual))
    size = f"{student.parameters / 1e6:.2f} M"
    share = "" if teacher is None else _smaller(student.parameters, teacher.parameters)
    tiles.append(tile("parameters", size, share))
    if (mib := results.get("student_file_mib")) is not None:
        tiles.append(tile("file size", f"{mib:.1f} MiB", "model.safetensors"))
    if (seconds := results.get("train_seconds")) is not None:
        epochs, count = results.get("epochs") or 0, results.get("train_images") or 0
        done = f"{epochs:g} epochs of {count:,} images"
        tiles.append(tile("training time", duration(seconds), done))
    return tiles


def _smaller(student: int, teacher: int) -> str:
    return f"{student / teacher:.0%} of the teacher's {teacher / 1e6:.2f} M" if teacher else ""


def duration(seconds: float) -> str:
    """Seconds as people say them: `42 s`, `3 min 05 s`, `2 h 10 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def curves(contents: Contents) -> Section:
    """All charts of the training and, folded away, the figures of every evaluation."""
    charts = history_charts(contents.logs, contents.class_names)
    if not charts:
        return Section("curves", "Curves", "")
    figures = "".join(f"<figure>{chart}</figure>" for chart in charts)
    body = (
        f'<div class="charts">{figures}</div><p class="faint">Training losses are means since the '
        "log before, at the temperature of the moment; losses of an evaluation are at temperature "
        "1, so the two are not comparable. Shares of the gradient say how much each weighted term "
        "steers the student's logits.</p>"
    )
    header, rows = evaluations(contents.logs)
    if rows:
        body += details(f"All figures of {len(rows)} evaluations", table(header, rows))
    return Section("curves", "Curves", body)


def images(contents: Contents) -> Section:
    """Best, median and worst images with what each network found."""
    if not contents.images:
        return Section("images", "Images", "")
    parts = [_image_legend(contents)]
    group = ""
    for image in contents.images:
        if image.group != group:
            group = image.group
            parts.append(f"<h3>{text(group.capitalize())}</h3>")
        scores = ", ".join(f"{who} {text(score)}" for who, score in image.scores.items())
        cells = "".join(
            picture(pixels, alt=f"{caption} of {image.name}", caption=caption, side=SIDE)
            for caption, pixels in image.cells.items()
        )
        parts.append(f'<p>{text(image.name)} <span class="faint">IoU {scores}</span></p>')
        parts.append(f'<div class="cells">{cells}</div>')
    return Section("images", "Best, median and worst images", "".join(parts))


def _image_legend(contents: Contents) -> str:
    several = len(contents.class_names) > 2
    colours = class_colours(len(contents.class_names))
    classes = {name: rgb(colours[i]) for i, name in enumerate(contents.class_names) if i}
    errors = {
        "error: found where there is none" + (", or the wrong class" if several else ""): rgb(
            FALSE_POSITIVE
        ),
        "error: missed": rgb(FALSE_NEGATIVE),
        "ignored": rgb(IGNORED),
    }
    body = legend(classes) + legend(errors)
    if any(DIFFERENCE in image.cells for image in contents.images):
        if several:
            bar = f"linear-gradient(90deg,rgb(200,200,200),{rgb(FALSE_POSITIVE)})"
            meaning = "difference to the teacher: distance of the two distributions, 0 to 1"
        else:
            ends = rgb(FALSE_NEGATIVE), rgb(FALSE_POSITIVE)
            bar = f"linear-gradient(90deg,{ends[0]},rgb(200,200,200),{ends[1]})"
            meaning = "difference: the student's probability minus the teacher's, -1 to 1"
        body += legend({meaning: bar})
    return body + (
        '<p class="faint">Ordered by the IoU of the student on the single image, the mean over '
        "the classes that occur in it.</p>"
    )


def rgb(colour: Any) -> str:
    """A colour of three numbers in 0..255 as CSS."""
    return "rgb({},{},{})".format(*map(int, colour))


def configuration(contents: Contents) -> Section:
    """Every setting of the run."""
    body = details(f"{len(contents.settings)} settings", pairs(contents.settings))
    return Section("configuration", "Configuration", body if contents.settings else "")


def environment(contents: Contents) -> Section:
    """Versions and device of the training, versions of the report."""
    keys = ("device", "mixed_precision", "peak_memory_mib", "images_per_second")
    facts = {
        key.replace("_", " "): contents.results[key] for key in keys if key in contents.results
    }
    trained = facts | dict(contents.results.get("versions") or {})
    body = "<h3>Training</h3>" + pairs(trained, name="what") if trained else ""
    if contents.versions:
        body += "<h3>This report</h3>" + pairs(contents.versions, name="what")
    return Section("environment", "Environment", body)
