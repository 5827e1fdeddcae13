"""Where an axis gets its ticks, and how their numbers are written."""

from __future__ import annotations

import math

STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)


def linear_ticks(low: float, high: float, count: int) -> list[float]:
    """Round numbers that lie evenly between two bounds.

    Args:
        low: lower bound.
        high: upper bound, above `low`.
        count: about how many; there are at most `count + 1`.
    """
    rough = (high - low) / max(count, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * s for s in STEPS if power * s >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def log_ticks(low: float, high: float, count: int) -> list[float]:
    """Powers of ten between two positive bounds, and their doubles and halves where there is room.

    Over less than a decade the ticks are those of a linear axis.
    """
    decades = math.log10(high / low)
    if decades < 1:
        return [tick for tick in linear_ticks(low, high, count) if tick > 0]
    every = max(1, math.ceil(decades / count))
    first = math.floor(math.log10(low) / every) * every
    powers = range(first, math.ceil(math.log10(high)) + 1, every)
    for factors in ((1, 2, 5), (1, 3), (1,)) if every == 1 else ((1,),):
        ticks = [factor * 10.0**power for power in powers for factor in factors]
        ticks = [tick for tick in ticks if low * (1 - 1e-9) <= tick <= high * (1 + 1e-9)]
        if len(ticks) <= count + 2:
            break
    return ticks


def tick_labels(ticks: list[float]) -> list[str]:
    """The ticks as text, all with as many decimals as the finest of them needs."""
    largest = max((abs(tick) for tick in ticks), default=0.0)
    smallest = min((abs(tick) for tick in ticks if tick), default=1.0)
    if largest >= 1e5 or largest < 1e-2 or largest / smallest > 1e4:
        return [_power(tick) for tick in ticks]
    decimals = max((_decimals(tick) for tick in ticks), default=0)
    if largest / smallest >= 100:  # a logarithmic axis: each number as it is, if short enough
        plain = [f"{tick:.{_decimals(tick)}f}" for tick in ticks]
        return plain if max(map(len, plain)) < 6 else [_power(tick) for tick in ticks]
    return [f"{tick:.{decimals}f}" for tick in ticks]


def _decimals(value: float) -> int:
    return next((d for d in range(6) if math.isclose(round(value, d), value, abs_tol=1e-9)), 6)


def _power(value: float) -> str:
    """2e-4 and not 2e-04."""
    if value == 0:
        return "0"
    mantissa, exponent = f"{value:.2e}".split("e")
    short = mantissa.rstrip("0").rstrip(".")
    return f"{short}e{int(exponent)}" if int(exponent) else short
