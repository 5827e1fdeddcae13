"""Whether masks lie where a network sees the objects, or moved, mirrored or turned."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from kd_trainer.preflight.counts import (
    ENOUGH,
    Rows,
    clearly_better,
    knows_something,
    miou,
    rows_of,
)
from kd_trainer.preflight.finding import Finding, fault, note, ok, several

SIDE = 96  # pixels that are enough to see a shift of a thirty-second of a picture
STEPS = 4  # each way, of a thirty-second
_PARTS = 32

TURNED: Mapping[str, Callable[[Tensor], Tensor]] = {
    "mirrored left to right": lambda maps: maps.flip(-1),
    "mirrored top to bottom": lambda maps: maps.flip(-2),
    "turned by half": lambda maps: maps.flip((-2, -1)),
    "with rows and columns exchanged": lambda maps: maps.transpose(-2, -1),
}


def thinned(maps: Tensor) -> Tensor:
    """Integer maps (N, S, S) at every so many pixels, at most twice `SIDE` wide."""
    step = max(1, maps.shape[-1] // SIDE)
    return maps[:, ::step, ::step]


def position_finding(
    classes: Tensor,
    labels: Tensor,
    num_labels: int,
    *,
    ignore_index: int,
    constant: float,
    whose: str = "the teacher",
) -> Finding:
    """Compare predicted classes with the masks as they are, turned, and moved.

    Args:
        classes: that a network finds, integer (N, S, S).
        labels: of the masks, likewise.
        num_labels: classes.
        ignore_index: label that counts nowhere.
        constant: mIoU of a constant prediction: a network near it says nothing.
        whose: prediction it is.
    """
    check = "mask position"
    classes, labels = thinned(classes), thinned(labels)

    def count(maps: Tensor, truth: Tensor) -> Rows:
        return rows_of(maps, truth, num_labels, ignore_index)

    now = count(classes, labels)
    turned = {name: count(turn(classes), labels) for name, turn in TURNED.items()}
    found = _best(turned, now, num_labels, constant)
    if found is not None:
        return _wrong(found, turned[found], now, num_labels, whose)
    inner, windows = _windows(classes, labels)
    moved = {name: count(window, inner) for name, window in windows.items()}
    still = moved.pop("")
    found = _best(moved, still, num_labels, constant)
    if found is not None:
        return _wrong(found, moved[found], still, num_labels, whose)
    return ok(check, f"neither turned nor moved masks fit {whose} clearly better")


def _best(others: Mapping[str, Rows], now: Rows, num_labels: int, constant: float) -> str | None:
    figures = {name: miou(rows, num_labels) for name, rows in others.items()}
    best = max(figures, key=lambda name: figures[name])
    trusted = knows_something(figures[best], constant)
    return best if trusted and clearly_better(others[best], now, num_labels) else None


def _wrong(how: str, best: Rows, now: Rows, num_labels: int, whose: str) -> Finding:
    grade = fault if len(now) >= ENOUGH else note
    return grade(
        "mask position",
        f"Expected masks that lie on the objects {whose} finds (mIoU {miou(now, num_labels):.3f}), "
        f"got masks that lie {how} (mIoU {miou(best, num_labels):.3f}, "
        f"{several(len(now), 'image')})",
        "Compare some masks with their pictures: padding, crops, EXIF orientation, the order of "
        "rows and columns.",
    )


def _windows(classes: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The inner part of the labels, and predictions as if the masks lay elsewhere by a few steps.

    All are compared on the same pixels of truth, so that none has an easier border.
    """
    side = labels.shape[-1]
    step = max(1, round(side / _PARTS))
    rim = min(STEPS * step, (side - 1) // 4 // step * step)
    inside = slice(rim, side - rim)
    windows = {}
    for down in range(-rim, rim + 1, step):
        for right in range(-rim, rim + 1, step):
            rows = slice(rim - down, side - rim - down)
            columns = slice(rim - right, side - rim - right)
            windows[_direction(down / side, right / side)] = classes[:, rows, columns]
    return labels[:, inside, inside], windows


def _direction(down: float, right: float) -> str:
    """`too far right by 6 % of the width`; nothing for no shift."""
    ways = (("down", "up", down, "height"), ("right", "left", right, "width"))
    words = [
        f"too far {plus if share > 0 else minus} by {abs(share):.1%} of the {side}"
        for plus, minus, share, side in ways
        if share
    ]
    return " and ".join(words)


def as_maps(maps: list[Tensor]) -> Tensor:
    """Stack maps (S, S) of single images as int64 (N, S, S)."""
    return torch.stack(maps).long()
