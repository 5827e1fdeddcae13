"""Distil a teacher into a student: `accelerate launch scripts/train.py --help`."""

from kd_trainer.commands.main import train_main
from kd_trainer.errors import run_script

if __name__ == "__main__":
    run_script(train_main)
