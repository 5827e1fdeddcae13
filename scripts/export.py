"""A student as ONNX, torch.export or smp, checked: `python scripts/export.py MODEL --help`."""

from kd_trainer.commands.export import export_main
from kd_trainer.errors import run_script

if __name__ == "__main__":
    run_script(export_main)
