"""The page of the web demo, in gradio. Loads nothing from elsewhere and reports to nobody."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from kd_trainer.costs import Latency
from kd_trainer.errors import require
from kd_trainer.models.image_sizes import size_text
from kd_trainer.reports.contents import STUDENT, TEACHER
from kd_trainer.reports.page import legend, rgb, table, text
from kd_trainer.reports.panels import (
    ONLY_STUDENT,
    ONLY_TEACHER,
    OTHER_CLASS,
    colours_of,
    label_maps,
)
from kd_trainer.web_demo.models import (
    LONGEST,
    DemoModel,
    Models,
    Result,
    drawings,
    examine,
    milliseconds,
    read_upload,
)

HOUR = 3600
MOST_BYTES = 64 * 2**20  # of an upload; an image of a large camera has some 40 MiB
MOST_WAITING = 20  # images; each takes a second or so, and whoever comes later is told
QUEUE = "models"  # one image at a time: two at once would slow each other's milliseconds down
STYLE = """
.gradio-container{max-width:1360px!important;margin:0 auto!important}
.gradio-container,.gradio-container .main,.gradio-container main{width:100%;min-width:0}
.gradio-container .kd{min-width:0}
#notice:not(:has(.note)),#said:not(:has(p,table)){display:none}
.kd h1{font-size:1.5rem;line-height:1.3;margin:0 0 .2em}
.kd p{margin:.3em 0}
.kd .note{border-left:4px solid #d55e00;background:var(--background-fill-secondary);
padding:8px 12px;overflow-wrap:anywhere}
.kd .scroll{overflow-x:auto;border:1px solid var(--border-color-primary);border-radius:8px;
max-width:100%;width:fit-content;margin:.5em 0}
.kd .scroll table{border:0!important;border-collapse:collapse;margin:0;font-size:.9rem;
font-variant-numeric:tabular-nums}
.kd th,.kd td{padding:6px 12px;text-align:right;border:0;
border-bottom:1px solid var(--border-color-primary)}
.kd th{background:var(--background-fill-secondary);font-weight:600}
.kd td{white-space:nowrap}
.kd th:first-child,.kd td:first-child{text-align:left;white-space:normal}
.kd .scroll tr{border:0}
.kd tr:last-child td{border-bottom:0}
.kd .legend{display:flex;flex-wrap:wrap;gap:4px 18px;padding:0;margin:8px 0;list-style:none}
@media (max-width:480px){.kd th,.kd td{padding:5px 7px}.kd table{font-size:.8rem}}
.kd .legend i{display:inline-block;width:14px;height:14px;border-radius:3px;margin-right:6px;
vertical-align:-2px}
"""


def build_page(
    models: Models, *, threshold: float, repeats: int, examples: Sequence[Path] = ()
) -> Any:
    """The page, ready to be launched.

    Args:
        models: teacher (if any) and student, under these names.
        threshold: with which the page starts; of binary models.
        repeats: measured calls of each network for one image.
        examples: images to click on.

    Returns:
        A `gradio.Blocks`.

    Raises:
        ValueError: if gradio is not installed.
    """
    gr = require("gradio", extra="demo")
    student = models[STUDENT]
    by_threshold = len(student.class_names) == 2 or student.multi_label
    # What visitors send is removed after an hour, and with the process.
    with gr.Blocks(
        title="Teacher and student", analytics_enabled=False, delete_cache=(HOUR, HOUR)
    ) as page:
        gr.HTML(introduction(models), elem_classes="kd")
        with gr.Row():
            with gr.Column(scale=1, min_width=320):
                upload = _upload(gr)
                level = gr.Slider(
                    *(0.05, 0.95),
                    value=threshold,
                    step=0.05,
                    label="threshold",
                    info="Probability from which a pixel counts as found.",
                    visible=by_threshold,
                )
                if examples:
                    gr.Examples([[str(path)] for path in examples], upload, label="examples")
            with gr.Column(scale=2, min_width=320):
                notice = gr.HTML(elem_classes="kd", elem_id="notice")
                slider = _slider(gr, models)
        outputs = [notice, slider, *_results(gr, models)]
        shared: dict[str, Any] = {
            "inputs": [upload, level],
            "outputs": outputs,
            "api_visibility": "private",
        }
        shared |= {"concurrency_id": QUEUE, "concurrency_limit": 1}
        upload.change(_answer(models, repeats, gr.skip), **shared)
        level.release(_answer(models, 0, gr.skip), **shared)
    return page.queue(max_size=MOST_WAITING)


def _upload(gr: Any) -> Any:
    component = gr.Image(
        type="filepath",
        image_mode=None,
        sources=["upload", "clipboard"],
        label="image",
        elem_id="photograph",
        height=320,
        buttons=["fullscreen"],
    )
    # gradio's own reading ignores transparency and answers a file that is no image with a word.
    component.preprocess = lambda payload: payload and payload.path
    return component


def _slider(gr: Any, models: Models) -> Any:
    left, right = ("teacher", "student") if TEACHER in models else ("image", "student")
    return gr.ImageSlider(
        label=f"left: {left}, right: {right}",
        format="png",
        interactive=False,
        elem_id="slider",
        max_height=640,
    )


def _results(gr: Any, models: Models) -> list[Any]:
    """Components for what `_answer` gives behind the slider, in its order."""

    def image(label: str, name: str) -> Any:
        return gr.Image(
            label=label,
            format="png",
            interactive=False,
            elem_id=name,
            height=300,
            min_width=240,
            buttons=["download", "fullscreen"],
        )

    with gr.Row():
        masks = [image(f"mask of the {role}", f"mask-{role}") for role in models]
        difference = image("difference" if TEACHER in models else "cut-out", "difference")
    with gr.Row():
        with gr.Column(min_width=320, elem_id="said"):
            shares = gr.HTML(elem_classes="kd", elem_id="found")
        with gr.Column(min_width=320):
            costs = gr.HTML(figures_table(models, None), elem_classes="kd", elem_id="figures")
    return [*masks, difference, shares, costs]


def _answer(
    models: Models, repeats: int, skip: Callable[[], Any]
) -> Callable[[str | None, float], Iterator[list[Any]]]:
    """What happens when an image or the threshold changes; values of all outputs, in order.

    Args:
        models: teacher (if any) and student.
        repeats: measured calls; 0 leaves the figures on the page as they are.
        skip: gives what stands for an output that stays as it is.
    """
    class_names = models[STUDENT].class_names

    def answer(path: str | None, threshold: float) -> Iterator[list[Any]]:
        empty = [None] * (len(models) + 2)
        unmeasured = figures_table(models, None)
        if path is None:
            yield ["", *empty, "", unmeasured]
            return
        try:
            image, original = read_upload(path)
        except ValueError as error:
            yield [error_note(str(error)), *empty, "", unmeasured]
            return
        result = examine(models, image, threshold)
        drawn = drawings(result, len(class_names))
        yield [
            shrunk_note((image.shape[0], image.shape[1]), original),
            (drawn.left, drawn.right),
            *drawn.masks.values(),
            drawn.difference,
            difference_text(result, class_names) + shares_table(result, class_names),
            unmeasured if repeats else skip(),
        ]
        if repeats:
            times = milliseconds(models, image, repeats)
            yield [*(skip() for _ in range(len(empty) + 2)), figures_table(models, times)]

    return answer


def introduction(models: Models) -> str:
    """Heading of the page, and what the networks are."""
    student, teacher = models[STUDENT].name, models.get(TEACHER)
    if teacher is None:
        return (
            f"<h1>Segmentation</h1><p>By {text(student)}. Drop an image, then move the slider "
            "between it and what was found.</p>"
        )
    return (
        f"<h1>Teacher and student</h1><p>Teacher: {text(teacher.name)}. Student: {text(student)}, "
        "which learned from it. Drop an image, then move the slider between the two.</p>"
    )


def error_note(message: str) -> str:
    """A box that says what is wrong with an upload."""
    return f'<p class="note" role="alert">{text(message)}</p>'


def shrunk_note(shown: tuple[int, int], original: tuple[int, int]) -> str:
    """A box that says that a large image was shrunk; nothing if it was not.

    Args:
        shown: height and width that the models saw.
        original: those of the file.
    """
    if shown == original:
        return ""
    return (
        f'<p class="note">The image of {original[1]} x {original[0]} pixels was shrunk to '
        f"{shown[1]} x {shown[0]} first: this page works with at most {LONGEST} a side.</p>"
    )


def figures_table(models: Models, latencies: Mapping[str, Latency] | None) -> str:
    """Milliseconds and sizes of the networks; None stands for times that are not there yet."""
    times: dict[str, float | None] = dict.fromkeys(models)
    times_of = "Milliseconds are those of the network alone"
    if latencies is not None:
        times = {role: latencies[role].median for role in models}
        times_of += f", the median of {latencies[STUDENT].repeats} calls"
    sizes = [size_text(model.segmenter.image_size) for model in models.values()]
    rows: list[list[object]] = [
        _figures("milliseconds", times, ",.1f"),
        _figures("million parameters", _of(models, _millions), ",.2f"),
        _figures("weight file, MiB", _of(models, lambda model: model.file_mib), ",.1f"),
        ["size of the input", *sizes, *([None] if TEACHER in models else [])],
    ]
    places = {role: model.runs_on for role, model in models.items()}
    same = len(set(places.values())) == 1
    place = (
        places[STUDENT] if same else "; ".join(f"{role} on {one}" for role, one in places.items())
    )
    notes = f"<p>{times_of}: {text(place)}."
    if TEACHER in models:
        notes += " Ratios are teacher / student."
    return table(["", *models, *(["ratio"] if TEACHER in models else [])], rows) + f"{notes}</p>"


def _millions(model: DemoModel) -> float | None:
    return None if model.parameters is None else model.parameters / 1e6


def _of(models: Models, value: Callable[[DemoModel], float | None]) -> dict[str, float | None]:
    return {role: value(model) for role, model in models.items()}


def _figures(name: str, values: Mapping[str, float | None], form: str) -> list[object]:
    """A row of figures and their quotient; `form` is their format."""
    row: list[object] = [name]
    row += [None if value is None else f"{value:{form}}" for value in values.values()]
    if TEACHER in values:
        teacher, student = values[TEACHER], values[STUDENT]
        row.append(f"{teacher / student:.2f}" if teacher and student else None)
    return row


def shares_table(result: Result, class_names: tuple[str, ...]) -> str:
    """Colour and share of the image of each class that a model found."""
    count, several = len(class_names), next(iter(result.masks.values())).ndim == 3
    colours = colours_of(count, multi_label=several)
    found = [label_maps(mask, count) for mask in result.masks.values()]
    present = [index for index in found[0] if any(maps[index].any() for maps in found)]
    if not present:
        return "<p>Nothing was found in this image.</p>"
    shares = [
        [class_names[i], *(_percent(float(maps[i].mean())) for maps in found)] for i in present
    ]
    header = ["share of the image", *result.masks]
    return legend({class_names[i]: rgb(colours[i]) for i in present}) + table(header, shares)


def _percent(share: float) -> str:
    return "< 0.1 %" if 0 < share < 0.001 else f"{100 * share:.1f} %"


def difference_text(result: Result, class_names: tuple[str, ...]) -> str:
    """How far the masks are apart, and the colours of their difference; empty without a teacher."""
    if result.difference is None:
        return ""
    planes = result.masks[STUDENT].ndim == 3
    several = len(class_names) > 2 or planes
    colours = {"only the teacher": rgb(ONLY_TEACHER), "only the student": rgb(ONLY_STUDENT)}
    if several:
        mixed = "each a label that the other has not" if planes else "both, as different classes"
        colours[mixed] = rgb(OTHER_CLASS)
    share, iou = result.difference.pixels, result.difference.iou
    if math.isnan(iou):
        overlap = "neither found anything"
    else:
        overlap = f"IoU of the two{', mean of the classes found' if several else ''}: {iou:.4f}"
    return f"<p>Different on {_percent(share)} of the pixels; {overlap}.</p>{legend(colours)}"
