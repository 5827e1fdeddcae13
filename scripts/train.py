"""Distil a teacher into a student: `accelerate launch scripts/train.py --help`."""

from kd_trainer.command_line import parse
from kd_trainer.errors import run_script


def main() -> None:
    """Parse, and only then import what a training needs: help and errors should come at once."""
    run = parse()
    from kd_trainer.commands.train import run_train

    run_train(run)


if __name__ == "__main__":
    run_script(main)
