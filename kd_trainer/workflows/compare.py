"""Whether distillation helped: the same student with and without its teacher, over some seeds."""

from __future__ import annotations

import dataclasses
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kd_trainer.command_line import RunArguments, build, given_flags, merged, parser
from kd_trainer.fields import (
    add_fields,
    check_at_least,
    check_choice,
    convert,
    help_field,
    hints_of,
)
from kd_trainer.workflows.assemble import Parts, assemble
from kd_trainer.workflows.compare_report import write_report
from kd_trainer.workflows.compare_results import read_runs
from kd_trainer.workflows.compare_runs import (
    KINDS,
    Budget,
    PlannedRun,
    alone,
    plan_runs,
    read_json,
    total_updates,
)
from kd_trainer.workflows.estimate import (
    Speed,
    duration,
    finished_speed,
    measure_speed,
    seconds_left,
)
from kd_trainer.workflows.plan import describe, updates_per_epoch

DEFAULT_OUTPUT = "runs/compare"
DESCRIPTION = """Train the same student with and without its teacher and compare them.

For each seed two runs of equal budget: `baseline` (no teacher) and `distilled`. All flags of
train.py are taken, and mean the same. Runs that are complete are not repeated, interrupted ones go
on from their newest checkpoint. comparison.md and comparison.json hold the figures."""
EPILOG = """Examples:
  compare.py --dataset photos/ --teacher teacher/ --epochs 12
  compare.py --dataset photos/ --teacher teacher/ --epochs 12 --seed_list 3 4 --output_dir runs/b
  compare.py --merge runs/compare runs/b --output_dir runs/both"""
# What the comparison itself decides.
_NOT_TAKEN = {
    "seed": "Expected --seeds or --seed_list, got --seed. Name all seeds at once.",
    "resume": "Expected no --resume, got one. Runs go on by themselves: leave it out.",
}


@dataclasses.dataclass
class CompareArguments:
    """Settings of scripts/compare.py beside those of a training."""

    seeds: int = help_field(3, "Number of seeds: 0, 1, 2, ...")
    seed_list: list[int] | None = help_field(None, "The seeds themselves, instead of their number.")
    only: str = help_field(
        "", "Train `baseline` or `distilled` only, to share the work among machines."
    )
    merge: list[str] | None = help_field(
        None, "Train nothing: report the runs in these folders of comparisons together."
    )
    bootstrap: int = help_field(2000, "Resamples of the images for the interval.")
    latency_repeats: int = help_field(
        30, "Measured calls for each latency; 0 leaves latencies out."
    )

    def __post_init__(self) -> None:
        check_at_least("seeds", self.seeds, 1)
        check_at_least("bootstrap", self.bootstrap, 1)
        check_at_least("latency_repeats", self.latency_repeats, 0)
        if self.only:
            check_choice("only", self.only, KINDS)
        seeds = self.seed_list if self.seed_list is not None else [0]
        if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
            raise ValueError(
                f"Expected --seed_list of different seeds from 0, got "
                f"{' '.join(map(str, seeds)) or 'none'}."
            )

    @property
    def chosen_seeds(self) -> list[int]:
        """The seeds that are compared."""
        return list(range(self.seeds)) if self.seed_list is None else self.seed_list

    @property
    def kinds(self) -> list[str]:
        """The kinds of run that are trained."""
        return [self.only] if self.only else list(KINDS)


@dataclasses.dataclass
class Comparison:
    """A command line: what to compare, and the settings of a distillation."""

    args: CompareArguments
    settings: dict[str, Any]
    output: Path
    dry_run: bool = False


def compare_parser() -> ArgumentParser:
    """The parser of scripts/compare.py: that of train.py and a few flags."""
    result = parser()
    result.prog, result.description, result.epilog = "compare.py", DESCRIPTION, EPILOG
    add_fields(result, CompareArguments, title="comparison")
    return result


def parse_comparison(arguments: Sequence[str] | None = None) -> Comparison:
    """Recipe, then flags, as train.py reads them.

    Raises:
        ValueError: on unknown flags, wrong values, or flags that cannot go together.
    """
    given = given_flags(compare_parser(), arguments)
    hints = hints_of([CompareArguments])
    own = {name: convert(name, given.pop(name), hints[name]) for name in hints if name in given}
    config, dry_run = given.pop("config"), given.pop("dry_run")
    output = Path(given.pop("output_dir", DEFAULT_OUTPUT))
    for name, message in _NOT_TAKEN.items():
        if name in given:
            raise ValueError(message)
    if "seeds" in own and "seed_list" in own:
        raise ValueError("Expected --seeds or --seed_list, got both. Leave one out.")
    args = CompareArguments(**own)
    if args.merge is not None:
        unused = [*given, *(n for n in ("seeds", "seed_list", "only") if n in own)]
        if unused or dry_run:
            raise ValueError(
                f"Expected --merge with --output_dir, --bootstrap and --latency_repeats only, got "
                f"--{unused[0] if unused else 'dry_run'}. It trains nothing: leave that out."
            )
        return Comparison(args, {}, output)
    settings = {k: v for k, v in merged(config, given).items() if k != "resume"}
    return Comparison(args, settings, output, dry_run)


def run_compare(comparison: Comparison) -> dict[str, Any]:
    """What scripts/compare.py does; returns what comparison.json holds."""
    args, output = comparison.args, comparison.output
    if args.merge is not None:
        runs = read_runs([Path(folder) for folder in args.merge])
        return write_report(runs, output, args.bootstrap, args.latency_repeats)
    parts, budget = _prepare(comparison)
    planned = plan_runs(
        comparison.settings, budget, seeds=args.chosen_seeds, kinds=args.kinds, folder=output
    )
    print(f"Comparison in {output}: {len(planned)} runs. {budget.sentence()}")
    if comparison.dry_run:
        _print_plan(planned, parts)
        return {}
    guide = parts["distilled"]
    assert guide.eval_dataset is not None
    images = len(guide.eval_dataset)
    speeds = _speeds(planned, parts)
    _print_estimate(planned, speeds, images)
    parts.clear()  # networks that would count in the memory of the runs
    del guide
    for number, one in enumerate(planned, start=1):
        _execute(one, f"[{number}/{len(planned)}] {one.name}:")
        speeds[one.kind] = finished_speed(one) or speeds.get(one.kind, Speed(0.0, 0.0))
        left = sum(seconds_left(p, speeds[p.kind], images) for p in planned[number:])
        if left:
            print(f"    about {duration(left)} left")
    runs = read_runs([output], seeds=args.chosen_seeds)
    return write_report(runs, output, args.bootstrap, args.latency_repeats)


def _prepare(comparison: Comparison) -> tuple[dict[str, Parts], Budget]:
    """The objects of one run of each kind, and what both kinds may spend."""
    settings = comparison.settings | {"output_dir": str(comparison.output)}
    distilled = build(settings)
    _check(distilled)
    runs = {"baseline": build(alone(settings)), "distilled": distilled}
    parts = {kind: assemble(run) for kind, run in runs.items()}
    images = {kind: len(found.train_dataset) for kind, found in parts.items()}
    args = distilled.training
    per_epoch = {kind: updates_per_epoch(count, args) for kind, count in images.items()}
    return parts, Budget(total_updates(args, per_epoch["distilled"]), per_epoch, images)


def _check(run: RunArguments) -> None:
    if not run.model.has_teacher:
        raise ValueError(
            "Expected a --teacher to compare with and without, got none. Name one; train.py "
            "--teacher none makes one."
        )
    if run.training.eval_strategy == "no":
        raise ValueError(
            "Expected --eval_strategy epoch or steps, got no: a comparison needs figures."
        )
    if run.training.world_size > 1:
        raise ValueError(
            f"Expected one process, got {run.training.world_size}. Give each device seeds of its "
            "own (--seed_list) and put the results together with --merge."
        )


def _print_plan(planned: list[PlannedRun], parts: dict[str, Parts]) -> None:
    for one in planned:
        print(f"- {one.name}: {_state(one)}")
    for kind in KINDS:
        example = next((p for p in planned if p.kind == kind), None)
        if example is not None:
            print(f"\n{describe(example.run, parts[kind])}")


def _state(one: PlannedRun) -> str:
    if one.complete:
        return "complete, not repeated"
    if one.trained:
        return "trained, its images are to be counted"
    update = one.checkpoint()
    return f"goes on after update {update:,} of {one.budget.updates:,}" if update else "to train"


def _speeds(planned: list[PlannedRun], parts: dict[str, Parts]) -> dict[str, Speed]:
    """Speed of each kind that has something left to do."""
    speeds = {}
    for kind in dict.fromkeys(p.kind for p in planned if not p.complete):
        own = [p for p in planned if p.kind == kind]
        known = next(filter(None, map(finished_speed, own)), None)
        speeds[kind] = known or measure_speed(own[0].run, parts[kind], parts["distilled"])
    return speeds


def _print_estimate(planned: list[PlannedRun], speeds: dict[str, Speed], images: int) -> None:
    left = [(p, seconds_left(p, speeds[p.kind], images)) for p in planned if not p.complete]
    if not left:
        print("All runs are complete.")
        return
    whole = duration(sum(seconds for _, seconds in left))
    each = {kind: max(s for p, s in left if p.kind == kind) for kind in speeds}
    shown = ", ".join(f"{kind} {duration(seconds)} a run" for kind, seconds in each.items())
    print(f"Estimated time: about {whole} for {len(left)} runs ({shown}).")


def _execute(one: PlannedRun, prefix: str) -> None:
    print(f"{prefix} {_state(one)}", flush=True)
    if one.complete:
        return
    one.execute()
    results = read_json(one.folder / "results.json")
    seconds = duration(results["train_seconds"])
    print(f"{prefix} mIoU {results['student_miou']:.4f}, trained in {seconds}", flush=True)
