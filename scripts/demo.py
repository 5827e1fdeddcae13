"""Teacher and student on a web page, here or as `app.py` of a Space: `scripts/demo.py --help`."""

from kd_trainer.workflows.run import run_script
from kd_trainer.workflows.web_demo.main import web_demo_main

if __name__ == "__main__":
    run_script(web_demo_main)
