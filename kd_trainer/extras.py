"""Packages that only one part needs: imported late; a missing one is named with its cure."""

from __future__ import annotations

import importlib
from typing import Any

# As in pyproject.toml.
EXTRAS = {"export": ("onnx", "onnxruntime", "onnxscript"), "demo": ("gradio",)}


def require(name: str, *, extra: str) -> Any:
    """A module of an extra.

    Args:
        name: dotted name of the module.
        extra: a key of EXTRAS.

    Raises:
        ValueError: if it is not installed; says how to install it.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        missing = name.partition(".")[0]
        raise ValueError(
            f"Expected the packages of the extra '{extra}' ({', '.join(EXTRAS[extra])}), got no "
            f"{missing}. pip install 'kd_trainer[{extra}]'."
        ) from error
