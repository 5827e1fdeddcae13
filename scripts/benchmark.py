"""Speed and memory against a plain loop: `python scripts/benchmark.py --help`."""

import sys
from pathlib import Path

from kd_trainer.errors import run_script

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # benchmarks are not installed
from benchmarks.main import benchmark_main

if __name__ == "__main__":
    run_script(benchmark_main)
