"""The packages that only an export needs."""

from __future__ import annotations

from typing import Any

from kd_trainer import extras


def require(name: str) -> Any:
    """A module of the extra `export`.

    Raises:
        ValueError: if it is not installed; says how to install it.
    """
    return extras.require(name, extra="export")


def require_all() -> None:
    """Refuse to start an ONNX export that could not be finished.

    Raises:
        ValueError: if one of the packages is not installed.
    """
    for name in extras.EXTRAS["export"]:
        require(name)
