"""The packages that only an export needs: imported late, and named when they are missing."""

from __future__ import annotations

import importlib
from typing import Any


def require(name: str) -> Any:
    """A module of the extra `export`.

    Raises:
        ValueError: if it is not installed; says how to install it.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        missing = name.partition(".")[0]
        raise ValueError(
            f"Expected the packages of the extra 'export' (onnx, onnxruntime, onnxscript), got no "
            f"{missing}. pip install 'kd_trainer[export]'."
        ) from error


def require_all() -> None:
    """Refuse to start an ONNX export that could not be finished.

    Raises:
        ValueError: if one of the packages is not installed.
    """
    for name in ("onnx", "onnxscript", "onnxruntime"):
        require(name)
