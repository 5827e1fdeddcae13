"""The console command: `kd-trainer train ...` is `scripts/train.py ...`, and so on."""

from __future__ import annotations

import sys
from importlib import import_module

from kd_trainer.config import parse
from kd_trainer.errors import GO_ON, run_script
from kd_trainer.fields import closest
from kd_trainer.parsing import CONSOLE

COMPARISON_GO_ON = "Go on with the same command: finished runs are not repeated."
# Sub-command -> module, function and what it does. Imported when called: help comes at once.
COMMANDS = {
    "train": ("main", "train_main", "distil a teacher into a student, or train without one"),
    "data": ("data", "data_main", "how a data set is read, and a picture of it"),
    "doctor": ("doctor", "doctor_main", "say what is wrong with a training before it starts"),
    "compare": ("compare", "compare_main", "whether distillation helps, over several seeds"),
    "eval": ("evaluate", "evaluate_main", "measure a saved student, and a teacher beside it"),
    "predict": ("predict", "predict_main", "masks, overlays and cut-outs of images and videos"),
    "report": ("report", "report_main", "the page of a finished run"),
    "export": ("export", "export_main", "ONNX and other files for devices, checked"),
    "push": ("push", "push_main", "publish a student with its card"),
    "demo": ("web_demo", "web_demo_main", "student and teacher on a web page"),
}


def usage() -> str:
    """All sub-commands, a line each."""
    lines = [f"  {name:8} {about}" for name, (_, _, about) in COMMANDS.items()]
    return "\n".join(
        [
            f"usage: {CONSOLE} COMMAND ...",
            "",
            *lines,
            "",
            f"{CONSOLE} COMMAND --help shows the flags of one. `python -m kd_trainer COMMAND` is "
            "the same.",
            "With several GPUs: accelerate launch -m kd_trainer train ...",
        ]
    )


def train_main() -> None:
    """Parse, and only then import what a training needs: help and errors should come at once."""
    run = parse()
    from kd_trainer.commands.train import run_train
    from kd_trainer.processes import leave_process_group

    run_train(run)
    leave_process_group()


def main() -> None:
    """Call the sub-command that the command line names, with the rest of it."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print(usage())
        return
    run_script(lambda: _call(name), go_on=COMPARISON_GO_ON if name == "compare" else GO_ON)


def _call(name: str) -> None:
    if name not in COMMANDS:
        raise ValueError(
            f"Expected a command among {', '.join(COMMANDS)}, got {name!r}."
            f"{closest(name, COMMANDS)}"
        )
    module, function, _ = COMMANDS[name]
    sys.argv[:2] = [f"{CONSOLE} {name}"]  # by which the parsers call themselves
    getattr(import_module(f"kd_trainer.commands.{module}"), function)()


if __name__ == "__main__":
    main()
