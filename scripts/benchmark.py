"""Speed and memory against a plain loop: `python scripts/benchmark.py --help`."""

from kd_trainer.workflows.benchmark.main import benchmark_main
from kd_trainer.workflows.run import run_script

if __name__ == "__main__":
    run_script(benchmark_main)
