"""The size of a network's input: how it is read, how it is saved and how it is shown.

Everywhere it is a `Size`, (height, width) in pixels. People and files also write a square as one
number. Travels with a saved model as remote code; imports nothing of the package.
"""

from collections.abc import Sequence

Size = tuple[int, int]
"""(height, width) in pixels."""
AnySize = int | str | Sequence[int] | Sequence[str]
"""What `as_size` reads."""


def as_size(value: AnySize) -> Size:
    """(height, width) of 640 or [640] (a square), [512, 1024], "640", "512x1024" or ["512x1024"].

    Raises:
        ValueError: if it is none of these.
    """
    text = " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    sides = text.lower().replace("x", " ").split()
    if len(sides) not in (1, 2) or not all(side.isascii() and side.isdigit() for side in sides):
        raise ValueError(
            "Expected height and width in pixels, such as 512x1024, or for a square one whole "
            f"number, got {text[:80]!r}."
        )
    return int(sides[0]), int(sides[-1])


def plain_size(size: AnySize) -> int | list[int]:
    """A size as files hold it: one number for a square, else [height, width]."""
    height, width = as_size(size)
    return height if height == width else [height, width]


def size_text(size: AnySize) -> str:
    """A size as it is shown, and as `as_size` reads it: `640`, or `512x1024` (height x width)."""
    height, width = as_size(size)
    return str(height) if height == width else f"{height}x{width}"
