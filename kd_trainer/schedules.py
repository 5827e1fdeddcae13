"""Temperature, free units, weights and learning rates, pure functions of epoch and step."""

from __future__ import annotations

import bisect
import difflib
import itertools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

RATE_SHAPES: dict[str, dict[str, float]] = {
    "cosine": {},
    "linear": {},
    "polynomial": {"power": 1.0},
    "cosine_with_restarts": {"num_cycles": 1},
    "constant": {},
    "constant_with_warmup": {},
}
"""How a learning rate falls after its warm-up, by transformers' names and with its options."""

TEMPERATURE_KINDS = ("cosine", "linear", "exponential", "constant", "piecewise")


@dataclass(frozen=True)
class TemperatureSchedule:
    """Distillation temperature over a run, from `start` to `end`.

    Attributes:
        kind: cosine (half a period), linear, exponential (constant ratio), constant (stays at
            `start`; `end` has no part in it) or piecewise (linear between `points`).
        start: temperature at progress 0, > 0.
        end: temperature at progress 1, > 0.
        points: for piecewise alone: (position, temperature) pairs, positions rising from 0 in any
            unit (epochs, say); the last one is progress 1. Its ends must be `start` and `end`.

    Raises:
        ValueError: if kind is unknown, a temperature is not above 0, or points do not fit.
    """

    kind: str
    start: float
    end: float
    points: Sequence[tuple[float, float]] = ()

    def __post_init__(self) -> None:
        if self.kind not in TEMPERATURE_KINDS:
            near = difflib.get_close_matches(str(self.kind), TEMPERATURE_KINDS, 1, cutoff=0.65)
            hint = f"Did you mean {near[0]!r}?" if near else "Choose one of them."
            raise ValueError(
                f"Expected a temperature schedule among {', '.join(TEMPERATURE_KINDS)}, "
                f"got {self.kind!r}. {hint}"
            )
        # YAML gives lists of lists; a frozen, hashable schedule holds tuples.
        object.__setattr__(self, "points", tuple((float(x), float(t)) for x, t in self.points))
        temperatures = [("start", self.start), ("end", self.end)]
        temperatures += [(f"at position {x:g}", t) for x, t in self.points]
        for where, value in temperatures:
            if not (math.isfinite(value) and value > 0):
                raise ValueError(
                    f"Expected temperature {where} > 0, got {value}. Use 1.0 for no softening."
                )
        if self.kind == "piecewise":
            self._check_points()
        elif self.points:
            raise ValueError(
                f"Expected no points for the {self.kind} schedule, got {len(self.points)}. "
                "Leave them out (those of a recipe with --temperature_points null) or choose the "
                "kind 'piecewise'."
            )

    def __call__(self, progress: float) -> float:
        """Temperature at `progress` (0 = first epoch or step, 1 = last); held beyond both ends.

        Raises:
            ValueError: if progress is not finite.
        """
        if not math.isfinite(progress):
            raise ValueError(
                f"Expected a finite progress, got {progress}. 0 is the start of a run."
            )
        share = min(max(progress, 0.0), 1.0)
        if self.kind == "cosine":
            return self.end + (self.start - self.end) * (1.0 + math.cos(math.pi * share)) / 2.0
        if self.kind == "linear":
            return self.start + (self.end - self.start) * share
        if self.kind == "exponential":
            return self.start * (self.end / self.start) ** share
        return self.start if self.kind == "constant" else self._between_points(share)

    def _between_points(self, share: float) -> float:
        position = share * self.points[-1][0]
        right = bisect.bisect_right([x for x, _ in self.points], position)
        if right == len(self.points):
            return self.points[-1][1]
        (x0, t0), (x1, t1) = self.points[right - 1], self.points[right]
        return t0 + (t1 - t0) * (position - x0) / (x1 - x0)

    def _check_points(self) -> None:
        positions = [x for x, _ in self.points]
        rising = all(a < b for a, b in itertools.pairwise([*positions, math.inf]))
        if len(positions) < 2 or positions[0] != 0 or not rising:
            raise ValueError(
                f"Expected at least two points at positions rising from 0, got positions "
                f"{positions}. Write them as (position, temperature) pairs."
            )
        ends = (self.points[0][1], self.points[-1][1])
        if ends != (self.start, self.end):
            raise ValueError(
                f"Expected points from start {self.start:g} to end {self.end:g}, got "
                f"{ends[0]:g} to {ends[1]:g}. Set start and end to those of the points."
            )


def epoch_progress(epoch: int, epochs: int) -> float:
    """Progress of an epoch index in a run: 0 for the first, 1 for the last, 0 for the only one.

    Raises:
        ValueError: if epoch is negative or epochs below 1.
    """
    if epochs < 1 or epoch < 0:
        raise ValueError(
            f"Expected epoch >= 0 of at least 1 epoch, got epoch {epoch} of {epochs}. "
            "Epochs are counted from 0."
        )
    return 0.0 if epochs == 1 else epoch / (epochs - 1)


@dataclass(frozen=True)
class UnfreezeSchedule:
    """How many encoder units are free at an epoch: one more every few epochs, deepest first.

    Attributes:
        start_epoch: epoch index (from 0) at which the deepest unit becomes free.
        every: epochs between one unit and the next; 0 frees all at `start_epoch`.
        units: number of units of the encoder.

    Raises:
        ValueError: if one of them is negative.
        TypeError: if one of them is no integer.
    """

    start_epoch: int
    every: int
    units: int

    def __post_init__(self) -> None:
        for name in ("start_epoch", "every", "units"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"Expected integer {name}, got {value!r}. Count whole epochs.")
            if value < 0:
                raise ValueError(f"Expected {name} >= 0, got {value}. Use 0 for none.")

    def __call__(self, epoch: int) -> int:
        """Number of free units at this epoch index, 0..units."""
        if epoch < self.start_epoch:
            return 0
        if self.every == 0:
            return self.units
        return min(self.units, (epoch - self.start_epoch) // self.every + 1)

    def first_free_epoch(self, unit_rank: int) -> int:
        """Epoch index at which a unit becomes free; rank 0 is the deepest unit.

        Raises:
            ValueError: if there is no such unit.
        """
        if not 0 <= unit_rank < self.units:
            raise ValueError(
                f"Expected a unit rank from 0 to {self.units - 1}, got {unit_rank}. "
                "Ranks count from the deepest unit."
            )
        return self.start_epoch + unit_rank * self.every


@dataclass(frozen=True)
class LabelledShare:
    """Share of the images of a batch that have masks, constant from each point to the next.

    Attributes:
        points: (epoch, share) pairs, whole epochs rising from 0, shares from 0 to 1.

    Raises:
        ValueError: if they are not.
    """

    points: Sequence[tuple[float, float]]

    def __post_init__(self) -> None:
        object.__setattr__(self, "points", tuple((float(x), float(s)) for x, s in self.points))
        epochs, shares = ([point[i] for point in self.points] for i in (0, 1))
        rising = all(a < b for a, b in itertools.pairwise([*epochs, math.inf]))
        if not epochs or epochs[0] != 0 or not rising or not all(x.is_integer() for x in epochs):
            raise ValueError(
                f"Expected --labelled_share at whole epochs rising from 0, got epochs {epochs}. "
                "Write one share, or EPOCH:SHARE pairs such as 0:0.5 36:1."
            )
        if not all(0 <= share <= 1 for share in shares):
            raise ValueError(
                f"Expected --labelled_share from 0 to 1, got {shares}. 0.5 gives masks to half the "
                "images of each batch."
            )

    def __call__(self, epoch: float) -> float:
        """The share in an epoch, counted from 0."""
        return self.points[bisect.bisect_right([x for x, _ in self.points], epoch) - 1][1]

    def images(self, epoch: float, batch: int) -> int:
        """Images with masks in a batch of an epoch: of both kinds one at least, between 0 and 1.

        Raises:
            ValueError: if there is no place for both.
        """
        share = self(epoch)
        if share in (0, 1):
            return int(share) * batch
        if batch < 2:
            raise ValueError(
                f"Expected --batch_size 2 or more with --labelled_share {share:g}, got {batch}: a "
                "batch holds both kinds of images. Raise it, or leave the share out."
            )
        return min(max(round(share * batch), 1), batch - 1)


@dataclass(frozen=True)
class WeightSchedule:
    """Weight of a loss term over the epochs of a run: linear between points, held beyond the ends.

    Two points of one epoch are a jump: from that epoch on the second weight holds.

    Attributes:
        points: (epoch, weight) pairs, epochs from 0 in order.

    Raises:
        ValueError: if an epoch or a weight is negative or not finite, or the order is another.
    """

    points: tuple[tuple[float, float], ...]

    def __post_init__(self) -> None:
        epochs = [epoch for epoch, _ in self.points]
        sound = all(math.isfinite(x) and x >= 0 for point in self.points for x in point)
        jumps = all(epochs.count(epoch) <= 2 for epoch in epochs)
        if not self.points or not sound or epochs != sorted(epochs) or not jumps:
            raise ValueError(
                "Expected EPOCH:WEIGHT points of epochs in order, none of them more than twice, "
                f"and weights from 0, got {self.text() or 'none'}. Write 0:1,20:0.5, say."
            )

    def __call__(self, epoch: float) -> float:
        """Weight at a fractional epoch."""
        right = bisect.bisect_right([x for x, _ in self.points], epoch)
        if right in (0, len(self.points)):
            return self.points[max(right - 1, 0)][1]
        (x0, w0), (x1, w1) = self.points[right - 1], self.points[right]
        return w0 + (w1 - w0) * (epoch - x0) / (x1 - x0)

    @property
    def peak(self) -> float:
        """The highest weight."""
        return max(weight for _, weight in self.points)

    def text(self) -> str:
        """The points as a flag has them."""
        return ",".join(f"{epoch:.10g}:{weight:.10g}" for epoch, weight in self.points)

    def stretched(self, factor: float) -> WeightSchedule:
        """The same over epochs that are longer by this factor."""
        return WeightSchedule(tuple((epoch * factor, weight) for epoch, weight in self.points))


def read_weight_schedules(
    words: Sequence[str] | None, names: Collection[str]
) -> dict[str, WeightSchedule]:
    """The schedules that `--weight_schedule` names, NAME=EPOCH:WEIGHT,... each.

    Args:
        words: as the flag or a recipe has them; commas and spaces separate alike.
        names: that may have one.

    Raises:
        ValueError: if one is none, or of another name.
    """
    points: dict[str, list[tuple[float, float]]] = {}
    name = ""
    for word in " ".join(map(str, words or ())).replace(",", " ").split():
        before, equals, point = word.rpartition("=")
        name = before if equals else name
        epoch, colon, weight = point.partition(":")
        try:
            if not name or not colon or (equals and name in points):
                raise ValueError
            points.setdefault(name, []).append((float(epoch), float(weight)))
        except ValueError:
            raise ValueError(
                "Expected --weight_schedule like kl=0:1,20:0.5 mse=0:0.5,10:0 (EPOCH:WEIGHT, each "
                f"term once), got {word!r}."
            ) from None
    unknown = next((name for name in points if name not in names), None)
    if unknown is not None:
        near = difflib.get_close_matches(unknown, names, 1, cutoff=0.65)
        raise ValueError(
            f"Expected --weight_schedule for {', '.join(names)}, got one for {unknown}."
            + (f" Did you mean {near[0]}?" if near else "")
        )
    return {name: WeightSchedule(tuple(found)) for name, found in points.items()}


def weight_schedule_words(schedules: Mapping[str, WeightSchedule]) -> list[str]:
    """The words of `--weight_schedule` that mean these schedules."""
    return [f"{name}={schedule.text()}" for name, schedule in schedules.items()]


_ROUNDING = 1e-6  # of an epoch that is scaled to another length


@dataclass(frozen=True)
class TrainingSchedule:
    """When what happens: a resumed run derives the same values again.

    Attributes:
        unfreezing: number of free units as a function of the epoch, before it is scaled to the run.
        temperatures: temperature of the loss as a function of the run's progress.
        epochs: length of the run (a fraction with `--max_steps`).
        steps_per_epoch: optimizer steps in one epoch.
        missed: steps that the epochs so far were short of: rows of a stream that could not be
            used, or a callback that ended an epoch.
        temperature_per: move the temperature each `epoch` or each `step`.
        warmup_epochs: of the learning rate, at the start of the run.
        unfreeze_warmup_epochs: of the learning rate of a part that becomes free later.
        min_rate: learning rate at the end of the run, as a share of the base rate.
        rate_shape: of the learning rate after its warm-up, one of `RATE_SHAPES`.
        rate_options: of that shape.
        plan_epochs: length that warm-up, unfreezing, weights and the share of masks are written
            for; None means this run's.
        weight_schedules: of the loss terms that have one, by name.
    """

    unfreezing: UnfreezeSchedule
    temperatures: TemperatureSchedule
    epochs: float
    steps_per_epoch: int = 1
    missed: int = 0
    temperature_per: str = "epoch"
    warmup_epochs: float = 0.0
    unfreeze_warmup_epochs: float = 0.0
    min_rate: float = 0.0
    rate_shape: str = "cosine"
    rate_options: tuple[tuple[str, float], ...] = ()
    plan_epochs: float | None = None
    weight_schedules: Mapping[str, WeightSchedule] = field(default_factory=dict)

    @property
    def scale(self) -> float:
        """Epochs of this run for one of the plan, by which all but the temperature is scaled."""
        return self.epochs / self.plan_epochs if self.plan_epochs else 1.0

    def planned_epoch(self, epoch: int) -> float:
        """The epoch of the plan at the start of an epoch of the run."""
        return epoch / self.scale + _ROUNDING

    def free_units(self, epoch: int) -> int:
        """Number of free units at an epoch of the run."""
        return self.unfreezing(math.floor(self.planned_epoch(epoch)))

    def weights(self, step: int) -> dict[str, float]:
        """Weight of each loss term that has a schedule at a step, counted from 0."""
        epoch = (step + self.missed) / self.steps_per_epoch / self.scale + _ROUNDING
        return {name: schedule(epoch) for name, schedule in self.weight_schedules.items()}

    def temperature(self, step: int) -> float:
        """Temperature of the loss at a step, counted from 0; held after the last one."""
        if self.temperature_per == "step":
            last = max(1, round(self.epochs * self.steps_per_epoch))
            return self.temperatures(min(epoch_progress(step + self.missed, last), 1.0))
        last = max(1, math.ceil(self.epochs))
        epoch = min((step + self.missed) // self.steps_per_epoch, last - 1)
        return self.temperatures(epoch_progress(epoch, last))

    def free_from(self, part: str) -> int:
        """Epoch from which a part of the network (`decoder`, `unit_6`, ...) is trained."""
        if not part.startswith("unit_"):
            return 0
        rank = self.unfreezing.units - 1 - int(part.removeprefix("unit_"))
        return math.ceil(self.unfreezing.first_free_epoch(rank) * self.scale - _ROUNDING)

    def rate(self, part: str) -> Callable[[int], float]:
        """Learning rate of a part as a share of its base rate, as a function of the step."""
        start = self.free_from(part)
        return lambda step: self.rate_at((step + self.missed) / self.steps_per_epoch, start)

    def rate_at(self, epoch: float, free_from: float = 0.0) -> float:
        """Learning rate as a share of the base rate at a fractional epoch.

        Linear warm-up over `warmup_epochs`, then down to `min_learning_rate` at the end, but for
        the constant shapes. A part that is
        freed at `free_from` has 0 before it, and ramps up over `unfreeze_warmup_epochs` after it.
        """
        if epoch < free_from:
            return 0.0
        factor = self._curve(epoch)
        if self.unfreeze_warmup_epochs > 0 and free_from > 0:
            ramp = self.unfreeze_warmup_epochs * self.scale
            factor *= min(1.0, (epoch - free_from) / ramp)
        return factor

    def _curve(self, epoch: float) -> float:
        warmup = min(self.warmup_epochs * self.scale, self.epochs)
        if epoch < warmup:
            return epoch / warmup
        rest = self.epochs - warmup
        progress = min((epoch - warmup) / rest, 1.0) if rest > 0 else 1.0
        return self.min_rate + (1 - self.min_rate) * self._fallen(progress)

    def _fallen(self, progress: float) -> float:
        """What is left at a progress from 0 to 1, as a share: 1 at first, and 0 at the end."""
        options = RATE_SHAPES[self.rate_shape] | dict(self.rate_options)
        if self.rate_shape.startswith("constant"):
            return 1.0
        if self.rate_shape in ("linear", "polynomial"):
            return (1 - progress) ** options.get("power", 1.0)
        if self.rate_shape == "cosine_with_restarts" and progress < 1:
            progress = options["num_cycles"] * progress % 1
        return 0.5 * (1 + math.cos(math.pi * progress))
