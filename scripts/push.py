"""Publish a student with its card: `python scripts/push.py FOLDER OWNER/NAME --help`."""

from kd_trainer.commands.push import push_main
from kd_trainer.errors import run_script

if __name__ == "__main__":
    run_script(push_main)
