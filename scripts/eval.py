"""Measure a saved student, and a teacher beside it: `python scripts/eval.py MODEL --help`."""

from kd_trainer.workflows.entry_points import evaluate_main
from kd_trainer.workflows.run import run_script

if __name__ == "__main__":
    run_script(evaluate_main)
