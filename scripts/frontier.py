"""Latency, size, memory and mIoU of models: `python scripts/frontier.py MODEL ... --help`."""

import sys
from pathlib import Path

from kd_trainer.errors import run_script

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # benchmarks are not installed
from benchmarks.frontier import frontier_main

if __name__ == "__main__":
    run_script(frontier_main)
