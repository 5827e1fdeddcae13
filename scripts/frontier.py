"""Latency, size and mIoU of trained models: `python scripts/frontier.py MODEL ... --help`."""

from kd_trainer.workflows.benchmark.frontier_main import frontier_main
from kd_trainer.workflows.run import run_script

if __name__ == "__main__":
    run_script(frontier_main)
