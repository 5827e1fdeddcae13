"""The command line of the frontier: models in, table, chart and figures out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.frontier import frontier
from benchmarks.frontier_page import frontier_chart, frontier_table
from kd_trainer.export.files import require_all
from kd_trainer.fields import check_at_least, check_folder, help_field
from kd_trainer.parsing import Parser
from kd_trainer.run_folder import write_json
from kd_trainer.safe_files import write_text


@dataclass
class FrontierArguments:
    """Settings of scripts/frontier.py."""

    image_size: int = help_field(640, "Side of the picture that is timed, in pixels.")
    repeats: int = help_field(20, "Measured calls of each model on each engine.")
    output_dir: str = help_field("runs/frontier", "Gets frontier.json, .md and .svg.")

    def __post_init__(self) -> None:
        check_at_least("image_size", self.image_size, 32)
        check_at_least("repeats", self.repeats, 1)
        check_folder("output_dir", self.output_dir)
        require_all()


def frontier_main(arguments: Sequence[str] | None = None) -> None:
    """Measure trained models side by side; print the table, write all files."""
    parser = Parser(
        [FrontierArguments],
        "frontier.py",
        "Latency (torch, ONNX Runtime, int8), size and mIoU of trained models, side by side on one "
        "thread of the CPU. The first model is what the others are compared with.",
        "A run's folder brings its mIoU (results.json) and what `export.py RUN --output RUN` left "
        "there: the int8 file, and its mIoU.\n\n"
        "Examples:\n  frontier.py teacher=runs/teacher B0=runs/distilled light=runs/light\n"
        "  frontier.py runs/teacher runs/light --image_size 512 --repeats 50",
    )
    parser.add_argument("models", nargs="+", help="Folders, each as FOLDER or NAME=FOLDER.")
    given = parser.given(arguments)
    models = named_folders(given.pop("models"))
    args = FrontierArguments(**given)
    rows = frontier(models, side=args.image_size, repeats=args.repeats)
    folder, table = Path(args.output_dir), frontier_table(rows)
    write_json(folder / "frontier.json", {"models": rows})
    write_text(folder / "frontier.md", table + "\n")
    chart = frontier_chart(rows, title="mIoU and latency")
    write_text(folder / "frontier.svg", chart + "\n")
    print(f"\n{table}\nWritten to {folder}/frontier.json, .md and .svg")


def named_folders(words: Sequence[str]) -> dict[str, str]:
    """Folder by name; a folder without a name is called by its last part.

    Raises:
        ValueError: if two have the same name.
    """
    found: dict[str, str] = {}
    for word in words:
        before, sign, after = word.partition("=")
        named = bool(sign) and "/" not in before
        name, folder = (before, after) if named else (Path(word).name, word)
        if not name or not folder:
            raise ValueError(f"Expected models as FOLDER or NAME=FOLDER, got {word!r}.")
        if name in found:
            raise ValueError(
                f"Expected models of different names, got {name} twice. Write NAME=FOLDER."
            )
        found[name] = folder
    return found
