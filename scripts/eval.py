"""Measure a saved student, and a teacher beside it: `python scripts/eval.py MODEL --help`."""

from kd_trainer.commands.evaluate import evaluate_main
from kd_trainer.errors import run_script

if __name__ == "__main__":
    run_script(evaluate_main)
