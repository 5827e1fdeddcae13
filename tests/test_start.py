"""What a command line imports before it answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import kd_trainer

ROOT = Path(__file__).parents[1]
# Seconds each: networks, data, metrics, and what transformers needs for its models.
HEAVY = (
    "albumentations",
    "cv2",
    "datasets",
    "evaluate",
    "matplotlib",
    "scipy",
    "segmentation_models_pytorch",
    "sklearn",
    "tensorboard",
    "timm",
    "torch._dynamo",
    "torch._inductor",
    "torchvision",
    "transformers.modeling_utils",
    "transformers.trainer",
)
HELP = """
import json, runpy, sys
sys.argv = ["train.py", *json.loads(sys.argv[1])]
try:
    runpy.run_path(sys.path[0] + "/train.py", run_name="__main__")
except SystemExit as stop:
    code = stop.code
print(json.dumps({"code": code, "modules": sorted(sys.modules)}))
"""


def after(*arguments: str) -> dict:
    """Exit code and imported modules of scripts/train.py in a fresh process."""
    program = HELP.replace("sys.path[0]", repr(str(ROOT / "scripts")))
    done = subprocess.run(
        [sys.executable, "-c", program, json.dumps(arguments)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def test_help_imports_nothing_but_what_the_parser_needs():
    """Each library costs seconds, on a network drive many; somebody only wants to see a flag."""
    found = after("--help")
    assert found["code"] == 0
    assert [name for name in HEAVY if name in found["modules"]] == []


def test_a_mistyped_flag_is_told_without_importing_a_network():
    """An error that takes as long as a start is an error that is made again."""
    found = after("--dataste", "photos")
    assert found["code"] == 1
    assert [name for name in HEAVY if name in found["modules"]] == []


def test_every_public_name_is_there():
    """They are imported on first use: a name without a home would only fail at a user's."""
    for name in kd_trainer.__all__:
        assert getattr(kd_trainer, name) is not None
    assert set(kd_trainer.__all__) <= set(dir(kd_trainer))
    assert not hasattr(kd_trainer, "nobody")
