"""Write report.html of a training run: `python scripts/report.py RUN_FOLDER --help`."""

from kd_trainer.commands.report import report_main
from kd_trainer.errors import run_script

if __name__ == "__main__":
    run_script(report_main)
