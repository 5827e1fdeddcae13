"""What is wrong with a run before it starts: `python scripts/doctor.py --help`."""

from kd_trainer.commands.doctor import doctor_main
from kd_trainer.errors import run_script

if __name__ == "__main__":
    run_script(doctor_main)
