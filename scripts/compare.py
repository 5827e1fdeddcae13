"""Whether distillation helped, over several seeds: `python scripts/compare.py --help`."""

from kd_trainer.commands.compare import run_compare
from kd_trainer.compare.arguments import parse_comparison
from kd_trainer.errors import run_script

if __name__ == "__main__":
    run_script(
        lambda: run_compare(parse_comparison()),
        go_on="Go on with the same command: finished runs are not repeated.",
    )
