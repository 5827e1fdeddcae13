"""One of two ranks of a training, on whose disk one rank cannot write its part of a checkpoint.

Usage: failing_save.py RANK FLAGS OF TRAIN.PY
"""

from __future__ import annotations

import errno
import os
import sys
from typing import Any

from transformers import Trainer

from kd_trainer.commands.train import run_train
from kd_trainer.config import parse
from kd_trainer.errors import run_script


def full(*args: Any, **options: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


if __name__ == "__main__":
    if os.environ["RANK"] == sys.argv[1]:
        Trainer._save_rng_state = full
    run_script(lambda: run_train(parse(sys.argv[2:])))
