"""Distil a teacher into a student: `accelerate launch scripts/train.py --help`."""

from kd_trainer.command_line import parse
from kd_trainer.workflows.run import run_script
from kd_trainer.workflows.train import run_train

if __name__ == "__main__":
    run_script(lambda: run_train(parse()))
