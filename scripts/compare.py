"""Whether distillation helped, over several seeds: `python scripts/compare.py --help`."""

from kd_trainer.commands.compare import compare_main
from kd_trainer.commands.main import COMPARISON_GO_ON
from kd_trainer.errors import run_script

if __name__ == "__main__":
    run_script(compare_main, go_on=COMPARISON_GO_ON)
