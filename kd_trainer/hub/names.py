"""Names of the files that are published; whatever is not named here stays at home."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import PurePosixPath

WEIGHTS = "model.safetensors"
STUDENT = ("config.json", WEIGHTS, "preprocessor_config.json")
# Copied only as far as they are there: smp and kd_trainer itself do without.
CODE = (
    "modeling.py",
    "image_processing.py",
    "configuration_smp.py",
    "config_checks.py",
    "encoder_units.py",
    "weights.py",
)
RESULTS = ("results.json", "all_results.json", "trainer_state.json")
CARD, PANEL, BOARDS = "README.md", "panel.png", "runs"
OURS = frozenset({*STUDENT, *CODE, *RESULTS, CARD, PANEL})
# Of an earlier push; the names that the stock writer of TensorBoard gives hold a host as well.
_BOARD = re.compile(rf"{BOARDS}/(?:[^/]+/)*events\.out\.tfevents\.\d+\.\d+")
# What transformers, huggingface_hub and inference services look for beside a model.
_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".safetensors", ".h5", ".msgpack", ".gguf")
_CODE = (".py", ".pyc", ".so")


def is_board(name: str) -> bool:
    """Whether a file of a repository is a curve that was pushed from here."""
    return bool(_BOARD.fullmatch(name))


def changes_loading(names: Iterable[str]) -> list[str]:
    """Those of the other files in a repository that change what a user of the student loads.

    Code anywhere; weights, configurations and requirements at the top, where loaders look.
    """
    found = []
    for name in sorted(names):
        path = PurePosixPath(name.lower())
        top = len(path.parts) == 1
        settings = path.suffix == ".json" or path.name == "requirements.txt"
        if path.suffix in _CODE or (top and (path.suffix in _WEIGHTS or settings)):
            found.append(name)
    return found
