"""The page of the web demo, in gradio. Loads nothing from elsewhere and reports to nobody."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from kd_trainer.errors import require
from kd_trainer.reports.contents import STUDENT, TEACHER
from kd_trainer.web_demo import words
from kd_trainer.web_demo.result import (
    Models,
    drawings,
    examine,
    milliseconds,
    read_upload,
)

HOUR = 3600
MOST_BYTES = 64 * 2**20  # of an upload; a photograph of a large camera has some 40 MiB
MOST_WAITING = 20  # pictures; each takes a second or so, and whoever comes later is told
QUEUE = "models"  # one picture at a time: two at once would slow each other's milliseconds down
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
        repeats: measured calls of each network for one picture.
        examples: pictures to click on.

    Returns:
        A `gradio.Blocks`.

    Raises:
        ValueError: if gradio is not installed.
    """
    gr = require("gradio", extra="demo")
    binary = len(models[STUDENT].class_names) == 2
    # What visitors send is removed after an hour, and with the process.
    with gr.Blocks(
        title="Teacher and student", analytics_enabled=False, delete_cache=(HOUR, HOUR)
    ) as page:
        gr.HTML(words.introduction(models), elem_classes="kd")
        with gr.Row():
            with gr.Column(scale=1, min_width=320):
                photograph = _photograph(gr)
                level = gr.Slider(
                    *(0.05, 0.95),
                    value=threshold,
                    step=0.05,
                    label="threshold",
                    info="Probability from which a pixel counts as found.",
                    visible=binary,
                )
                if examples:
                    gr.Examples([[str(path)] for path in examples], photograph, label="examples")
            with gr.Column(scale=2, min_width=320):
                notice = gr.HTML(elem_classes="kd", elem_id="notice")
                slider = _slider(gr, models)
        outputs = [notice, slider, *_results(gr, models)]
        shared: dict[str, Any] = {
            "inputs": [photograph, level],
            "outputs": outputs,
            "api_visibility": "private",
        }
        shared |= {"concurrency_id": QUEUE, "concurrency_limit": 1}
        photograph.change(_answer(models, repeats, gr.skip), **shared)
        level.release(_answer(models, 0, gr.skip), **shared)
    return page.queue(max_size=MOST_WAITING)


def _photograph(gr: Any) -> Any:
    made = gr.Image(
        type="filepath",
        image_mode=None,
        sources=["upload", "clipboard"],
        label="photograph",
        elem_id="photograph",
        height=320,
        buttons=["fullscreen"],
    )
    # gradio's own reading ignores transparency and answers a file that is no picture with a word.
    made.preprocess = lambda payload: payload and payload.path
    return made


def _slider(gr: Any, models: Models) -> Any:
    left, right = ("teacher", "student") if TEACHER in models else ("photograph", "student")
    return gr.ImageSlider(
        label=f"left: {left}, right: {right}",
        format="png",
        interactive=False,
        elem_id="slider",
        max_height=640,
    )


def _results(gr: Any, models: Models) -> list[Any]:
    """Components for what `_answer` gives behind the slider, in its order."""

    def picture(label: str, name: str) -> Any:
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
        masks = [picture(f"mask of the {role}", f"mask-{role}") for role in models]
        difference = picture("difference" if TEACHER in models else "cut-out", "difference")
    with gr.Row():
        with gr.Column(min_width=320, elem_id="said"):
            said = gr.HTML(elem_classes="kd", elem_id="found")
        with gr.Column(min_width=320):
            costs = gr.HTML(words.figures(models, None), elem_classes="kd", elem_id="figures")
    return [*masks, difference, said, costs]


def _answer(
    models: Models, repeats: int, skip: Callable[[], Any]
) -> Callable[[str | None, float], Iterator[list[Any]]]:
    """What happens when a picture or the threshold changes; values of all outputs, in order.

    Args:
        models: teacher (if any) and student.
        repeats: measured calls; 0 leaves the figures on the page as they are.
        skip: gives what stands for an output that stays as it is.
    """
    class_names = models[STUDENT].class_names

    def answer(path: str | None, threshold: float) -> Iterator[list[Any]]:
        empty = [None] * (len(models) + 2)
        unmeasured = words.figures(models, None)
        if path is None:
            yield ["", *empty, "", unmeasured]
            return
        try:
            picture, original = read_upload(path)
        except ValueError as error:
            yield [words.error_note(str(error)), *empty, "", unmeasured]
            return
        result = examine(models, picture, threshold)
        drawn = drawings(result, len(class_names))
        yield [
            words.shrunk_note((picture.shape[0], picture.shape[1]), original),
            (drawn.left, drawn.right),
            *drawn.masks.values(),
            drawn.difference,
            words.differences(result, class_names) + words.found(result, class_names),
            unmeasured if repeats else skip(),
        ]
        if repeats:
            times = milliseconds(models, picture, repeats)
            yield [*(skip() for _ in range(len(empty) + 2)), words.figures(models, times)]

    return answer
