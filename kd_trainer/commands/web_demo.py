"""The web demo: which models it shows, by flags or by variables of a Space."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kd_trainer.commands.predict import THRESHOLD, check_threshold
from kd_trainer.config import parser_of_saved
from kd_trainer.data.input_files import find_input_files, is_video, read_image
from kd_trainer.errors import require
from kd_trainer.fields import check_at_least, help_field
from kd_trainer.model_arguments import ModelArguments
from kd_trainer.parsing import convert, hints_of
from kd_trainer.reports.contents import STUDENT, TEACHER
from kd_trainer.web_demo.models import Models, load_demo_student, load_demo_teacher
from kd_trainer.web_demo.page import build_page
from kd_trainer.web_demo.server import check_address, prepare_environment, serve

MOST_EXAMPLES = 12
# What a hosted demo, which is started without a command line, is told instead.
SPACE_VARIABLES = {
    "STUDENT": "model",
    "TEACHER": "teacher",
    "TEACHER_IMAGE_SIZE": "teacher_image_size",
    "THRESHOLD": "threshold",
    "EXAMPLES": "examples",
}


@dataclass
class WebDemoArguments:
    """Settings of scripts/demo.py beside those of the teacher."""

    threshold: float = help_field(
        THRESHOLD,
        "Probability from which a pixel of a binary model is found, or has a label of several; a "
        "slider changes it.",
    )
    examples: list[str] | None = help_field(
        None, f"Images, folders or globs to offer under the upload, the first {MOST_EXAMPLES}."
    )
    repeats: int = help_field(5, "Measured calls of each network for an image.")
    host: str | None = help_field(
        None, "Address to listen on (default: 127.0.0.1); 0.0.0.0 lets everybody on the network in."
    )
    port: int | None = help_field(
        None, "Port to listen on (default: the first free one from 7860 on)."
    )
    open: bool = help_field(False, "Open the page in this machine's browser.")

    def __post_init__(self) -> None:
        check_threshold(self.threshold)
        check_at_least("repeats", self.repeats, 1)
        if self.port is not None and not 1 <= self.port <= 65535:
            raise ValueError(f"Expected --port from 1 to 65535, got {self.port}.")


def from_environment(flags: Mapping[str, Any], environment: Mapping[str, str]) -> dict[str, Any]:
    """The flags, completed by variables of the environment.

    They count only where no model is named on the command line: a variable of such a common name
    may mean something else on somebody's own machine.

    Raises:
        ValueError: if neither names a model.
    """
    settings = {name: value for name, value in flags.items() if value is not None}
    if "model" in settings:
        return settings
    variables = {field: environment.get(name) for name, field in SPACE_VARIABLES.items()}
    settings = {name: value for name, value in variables.items() if value} | settings
    if "model" not in settings:
        raise ValueError(
            "Expected a student, got none. Name its folder, Hub id or ONNX file behind demo.py, or "
            "set the variable STUDENT."
        )
    hints = {"model": str} | hints_of([WebDemoArguments, ModelArguments])
    return {name: convert(name, value, hints[name]) for name, value in settings.items()}


def load_models(source: str, model: ModelArguments, args: WebDemoArguments) -> Models:
    """Teacher (if one is named) and student, in the order in which they are shown.

    Raises:
        FileNotFoundError: if there is no such model.
        ValueError: if one cannot be shown, or a threshold is asked of a multi-class model.
    """
    student = load_demo_student(source)
    check_threshold(args.threshold, 2 if student.multi_label else len(student.class_names))
    teacher = load_demo_teacher(model, student)
    return ({} if teacher is None else {TEACHER: teacher}) | {STUDENT: student}


def example_images(sources: Sequence[str]) -> list[Path]:
    """The first images that the sources name.

    Raises:
        FileNotFoundError: if a source names none.
        ValueError: if one is no readable image.
    """
    images = [path for path in find_input_files(sources) if not is_video(path)][:MOST_EXAMPLES]
    for path in images:
        read_image(path)
    return images


def web_demo_main(arguments: Sequence[str] | None = None) -> None:
    """Load the models, then serve the page."""
    parser = parser_of_saved(
        (WebDemoArguments, ModelArguments),
        "demo.py",
        "A page on which a dropped image is segmented by student and teacher, with a slider "
        "between them, their difference, milliseconds and sizes. Needs pip install '.[demo]', and "
        "no network.",
        "Examples:\n  demo.py runs/distilled/student --teacher runs/teacher/student\n"
        "  demo.py runs/distilled/student --examples photos/validation/images --open\n"
        "  demo.py device/student.onnx --teacher runs/teacher/student --port 8000\n\n"
        "Without a command line, as on a Hugging Face Space, the variables STUDENT, TEACHER, "
        "TEACHER_IMAGE_SIZE, THRESHOLD and EXAMPLES say the same.",
    )
    parser.add_argument(
        "model", nargs="?", help="Saved student: a folder, a Hub id or an ONNX file of export.py."
    )
    flags = from_environment(parser.given(arguments), os.environ)
    source = flags.pop("model")
    args, model = parser.parse_dict(flags)
    with tempfile.TemporaryDirectory(prefix="kd_trainer-demo-") as folder:
        prepare_environment(folder)
        require("gradio", extra="demo")
        check_address(args.host or "127.0.0.1", args.port)
        examples = example_images(args.examples or [])
        models = load_models(source, model, args)
        page = build_page(models, threshold=args.threshold, repeats=args.repeats, examples=examples)
        serve(page, host=args.host, port=args.port, open_browser=args.open)
