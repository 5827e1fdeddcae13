"""The web demo: which models, where it listens, and how it ends."""

from __future__ import annotations

import errno
import os
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kd_trainer.arguments import ModelArguments
from kd_trainer.command_line import TEACHER as TEACHER_FLAGS
from kd_trainer.command_line import command_parser, given_flags, given_settings
from kd_trainer.commands.predict import THRESHOLD, check_threshold
from kd_trainer.data.folder_images import find_pictures, is_video, read_picture
from kd_trainer.errors import require
from kd_trainer.fields import add_fields, check_at_least, help_field
from kd_trainer.reports.contents import STUDENT, TEACHER
from kd_trainer.web_demo.models import Models, load_demo_student, load_demo_teacher
from kd_trainer.web_demo.page import MOST_BYTES, STYLE, build_page

FIRST_PORT, PORTS = 7860, 100
MOST_EXAMPLES = 12
# What a hosted demo, which is started without a command line, is told instead. The last two are
# gradio's own and count on a command line too, behind its flags.
SPACE_VARIABLES = {
    "STUDENT": "model",
    "TEACHER": "teacher",
    "TEACHER_IMAGE_SIZE": "teacher_image_size",
    "THRESHOLD": "threshold",
    "EXAMPLES": "examples",
}
SERVER_VARIABLES = {"GRADIO_SERVER_NAME": "host", "GRADIO_SERVER_PORT": "port"}


@dataclass
class WebDemoArguments:
    """Settings of scripts/demo.py beside those of the teacher."""

    threshold: float = help_field(
        THRESHOLD, "Probability from which a pixel of a binary model is found; a slider changes it."
    )
    examples: list[str] | None = help_field(
        None, f"Pictures, folders or globs to offer under the upload, the first {MOST_EXAMPLES}."
    )
    repeats: int = help_field(5, "Measured calls of each network for a picture.")
    host: str = help_field(
        "127.0.0.1", "Address to listen on; 0.0.0.0 lets everybody on the network in."
    )
    port: int | None = help_field(
        None, f"Port to listen on; the first free one from {FIRST_PORT} on unless given."
    )
    open: bool = help_field(False, "Open the page in this machine's browser.")

    def __post_init__(self) -> None:
        check_threshold(self.threshold)
        check_at_least("repeats", self.repeats, 1)
        if self.port is not None and not 1 <= self.port <= 65535:
            raise ValueError(f"Expected --port from 1 to 65535, got {self.port}.")


def from_environment(given: Mapping[str, Any], environment: Mapping[str, str]) -> dict[str, Any]:
    """The flags, completed by variables of the environment.

    Those of a hosted demo count only where no model is named on the command line: a variable of
    such a common name may mean something else on somebody's own machine.

    Raises:
        ValueError: if neither names a model.
    """
    variables = dict(SERVER_VARIABLES)
    if given.get("model") is None:
        variables |= SPACE_VARIABLES
    told = {field: environment[name] for name, field in variables.items() if environment.get(name)}
    settings = told | {name: value for name, value in given.items() if value is not None}
    if "model" not in settings:
        raise ValueError(
            "Expected a student, got none. Name its folder, Hub id or ONNX file behind demo.py, or "
            "set the variable STUDENT."
        )
    return settings


def load_models(source: str, model: ModelArguments, args: WebDemoArguments) -> Models:
    """Teacher (if one is named) and student, in the order in which they are shown.

    Raises:
        FileNotFoundError: if there is no such model.
        ValueError: if one cannot be shown, or a threshold is asked of a multi-class model.
    """
    student = load_demo_student(source)
    check_threshold(args.threshold, len(student.class_names))
    teacher = load_demo_teacher(model, student)
    return ({} if teacher is None else {TEACHER: teacher}) | {STUDENT: student}


def example_pictures(sources: Sequence[str]) -> list[Path]:
    """The first pictures that the sources name.

    Raises:
        FileNotFoundError: if a source names none.
        ValueError: if one is no readable picture.
    """
    found = [path for path in find_pictures(sources) if not is_video(path)][:MOST_EXAMPLES]
    for path in found:
        read_picture(path)
    return found


def free_port(host: str, port: int | None) -> int:
    """A port on which nobody listens yet: the one asked for, else the first free one.

    Raises:
        ValueError: if there is none, or the address is not one of this machine's.
    """
    reason: OSError | None = None
    for number in (port,) if port else range(FIRST_PORT, FIRST_PORT + PORTS):
        try:
            family, *_, address = socket.getaddrinfo(host, number, type=socket.SOCK_STREAM)[0]
            with socket.socket(family) as tried:
                tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                tried.bind(address)
            return number
        except OSError as error:
            reason = error
            if error.errno != errno.EADDRINUSE:
                break
    raise ValueError(
        f"Expected an address of this machine (--host) and a free --port, got {host} and "
        f"{port or FIRST_PORT}: {reason and reason.strerror}. Name others, or leave both out."
    )


def serve(page: Any, args: WebDemoArguments, port: int) -> None:
    """Show the page until the process is interrupted."""
    # The reader's own fonts: gradio's half-bold one lacks most letters.
    themes = require("gradio", extra="demo").themes
    page.launch(
        theme=themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
        server_name=args.host,
        server_port=port,
        inbrowser=args.open,
        css=STYLE,
        max_file_size=MOST_BYTES,
        share=False,
        quiet=True,
        pwa=False,
        ssr_mode=False,
        run_history=False,
        enable_monitoring=False,
        footer_links=[],
        prevent_thread_lock=True,
    )
    everywhere = " (and at every other address of this machine)" if args.host == "0.0.0.0" else ""
    shown = "127.0.0.1" if everywhere else args.host
    print(f"Demo: http://{shown}:{port}{everywhere}. Ctrl+C ends it.", flush=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # how services and containers end it
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        print("ended")
    finally:
        page.close(verbose=False)


def prepare_environment(folder: str) -> None:
    """What gradio reads when it is imported: nobody is told, and uploads go to `folder`."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["GRADIO_TEMP_DIR"] = folder
    # It asks itself whether it answers; a proxy cannot know.
    for name in ("no_proxy", "NO_PROXY"):
        os.environ[name] = ",".join(filter(None, [os.environ.get(name), "127.0.0.1,localhost"]))


def web_demo_main(arguments: Sequence[str] | None = None) -> None:
    """Load the models, then serve the page."""
    parser = command_parser(
        "demo.py",
        "A page on which a dropped photograph is segmented by student and teacher, with a slider "
        "between them, their difference, milliseconds and sizes. Needs pip install '.[demo]', and "
        "no network.",
        "Examples:\n  demo.py runs/distilled/student --teacher runs/teacher/student\n"
        "  demo.py runs/distilled/student --examples photos/validation/images --open\n"
        "  demo.py device/student.onnx --teacher runs/teacher/student --port 8000\n\n"
        "Without a command line, as on a Hugging Face Space, the variables STUDENT, TEACHER, "
        "TEACHER_IMAGE_SIZE,\nTHRESHOLD and EXAMPLES say the same.",
    )
    parser.add_argument(
        "model", nargs="?", help="Saved student: a folder, a Hub id or an ONNX file of export.py."
    )
    add_fields(parser, WebDemoArguments, title="page")
    add_fields(parser, ModelArguments, title="teacher", only=TEACHER_FLAGS)
    given = from_environment(given_flags(parser, arguments), os.environ)
    source = given.pop("model")
    own, model_settings = given_settings((WebDemoArguments, ModelArguments), given)
    args, model = WebDemoArguments(**own), ModelArguments(**model_settings)
    with tempfile.TemporaryDirectory(prefix="kd_trainer-demo-") as folder:
        prepare_environment(folder)
        require("gradio", extra="demo")
        port = free_port(args.host, args.port)
        examples = example_pictures(args.examples or [])
        models = load_models(source, model, args)
        page = build_page(models, threshold=args.threshold, repeats=args.repeats, examples=examples)
        serve(page, args, port)
