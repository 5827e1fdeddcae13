"""Masks and overlays of a saved student: `python scripts/predict.py MODEL IMAGE... --help`."""

from kd_trainer.commands.predict import predict_main
from kd_trainer.errors import run_script

if __name__ == "__main__":
    run_script(predict_main)
