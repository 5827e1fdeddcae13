"""How a data set is read, and a picture of it: `python scripts/data.py --help`."""

from kd_trainer.commands.data import data_main
from kd_trainer.errors import run_script

if __name__ == "__main__":
    run_script(data_main)
