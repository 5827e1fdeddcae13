"""Masks and overlays of a saved student: `python scripts/predict.py MODEL PICTURE... --help`."""

from kd_trainer.workflows.entry_points import predict_main
from kd_trainer.workflows.run import run_script

if __name__ == "__main__":
    run_script(predict_main)
