"""Teacher and student on a web page, here or as `app.py` of a Space: `scripts/demo.py --help`."""

from kd_trainer.commands.web_demo import web_demo_main
from kd_trainer.errors import run_script

if __name__ == "__main__":
    run_script(web_demo_main)
