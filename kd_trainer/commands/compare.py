"""Whether distillation helped: the same student with and without its teacher, over some seeds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kd_trainer.build import FOUND, RunComponents, build_run, images_an_epoch
from kd_trainer.commands.train import train
from kd_trainer.compare.arguments import Comparison, parse_comparison
from kd_trainer.compare.budget import Budget
from kd_trainer.compare.estimate import finished_speed, measure_speed, seconds_left
from kd_trainer.compare.report import write_report
from kd_trainer.compare.results import FinishedRun, read_runs
from kd_trainer.compare.runs import PlannedRun, plan_runs, written_note, written_results
from kd_trainer.config import RunArguments, build
from kd_trainer.costs import duration, steps_per_epoch, total_steps, without_teacher
from kd_trainer.doctor.checks import check_before_training
from kd_trainer.doctor.finding import several
from kd_trainer.doctor.plan import describe
from kd_trainer.doctor.resources import Speed


def compare_main() -> None:
    """Compare what the command line names."""
    run_compare(parse_comparison())


def run_compare(comparison: Comparison) -> dict[str, Any]:
    """What scripts/compare.py does; returns what comparison.json holds."""
    args, output = comparison.args, comparison.output
    if args.merge is not None:
        return _report(comparison, read_runs([Path(folder) for folder in args.merge]))
    parts, budget = _prepare(comparison)
    planned = plan_runs(
        comparison.settings, budget, seeds=args.chosen_seeds, kinds=args.kinds, folder=output
    )
    baselines = _finished_baselines(comparison, budget)
    print(f"Comparison in {output}: {several(len(planned), 'run')}. {budget.sentence()}")
    if comparison.dry_run:
        _print_plan(planned, parts)
        return {}
    run = build(comparison.settings | {"output_dir": str(output)})
    if not run.training.no_preflight and not all(one.trained for one in planned):
        check_before_training(run, parts["distilled"])  # runs differ in nothing that it looks at
    speeds = _speeds(planned, parts)
    images = len(parts["distilled"].eval_dataset or ())
    _print_estimate(planned, speeds, images)
    parts.clear()  # networks that would count in the memory of the runs
    for number, one in enumerate(planned, start=1):
        _execute(one, f"[{number}/{len(planned)}] {one.name}:")
        speeds[one.kind] = finished_speed(one) or speeds.get(one.kind, Speed(0.0, 0.0))
        rest = [later for later in planned[number:] if not later.complete]
        left = sum(seconds_left(later, speeds[later.kind], images) for later in rest)
        if left:
            print(f"    about {duration(left)} left")
    return _report(comparison, read_runs([output], seeds=args.chosen_seeds, baselines=baselines))


def _report(comparison: Comparison, runs: list[FinishedRun]) -> dict[str, Any]:
    args = comparison.args
    trusted = bool(comparison.settings.get("trust_remote_code"))
    return write_report(
        runs, comparison.output, args.bootstrap, args.latency_repeats, trust_remote_code=trusted
    )


def _prepare(comparison: Comparison) -> tuple[dict[str, RunComponents], Budget]:
    """The objects of one run of each kind, and what both kinds may spend."""
    settings = comparison.settings | {"output_dir": str(comparison.output)}
    distilled = build(settings)
    _check(distilled)
    runs = {"baseline": build(without_teacher(settings)), "distilled": distilled}
    parts = {kind: build_run(run) for kind, run in runs.items()}
    learned, settings = runs["distilled"].resolved(), comparison.settings
    settings |= {name: learned[name] for name in FOUND if settings.get(name) is None}
    images = {kind: len(one.train_dataset) for kind, one in parts.items()}
    args = distilled.training
    drawn = {k: images_an_epoch(parts[k].train_dataset, runs[k].training) for k in parts}
    per_epoch = {kind: steps_per_epoch(count, args) for kind, count in drawn.items()}
    return parts, Budget(total_steps(args, per_epoch["distilled"]), per_epoch, images)


def _check(run: RunArguments) -> None:
    if run.model.teaches_itself:
        raise ValueError(
            "Expected a --teacher that can be measured, got self: there is no gap between a "
            "student and its own average. Train with --teacher self and with none, and use eval.py."
        )
    if not run.model.has_teacher:
        raise ValueError(
            "Expected a --teacher to compare with and without, got none. Name one; train.py "
            "--teacher none makes one."
        )
    if run.model.teacher_maps is not None:
        raise ValueError(
            "Expected a --teacher that can be asked, got --teacher_maps, whose answers compare.py "
            "cannot count yet. Train with and without it, and use eval.py."
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


def _finished_baselines(comparison: Comparison, budget: Budget) -> Path | None:
    """The folder that `--baselines` names, if what it holds is what would be trained here.

    Raises:
        ValueError: if its settings differ, or a seed is missing.
    """
    args = comparison.args
    if args.baselines is None:
        return None
    folder, seeds = Path(args.baselines), args.chosen_seeds
    planned = plan_runs(comparison.settings, budget, seeds=seeds, kinds=["baseline"], folder=folder)
    missing = [str(one.seed) for one in planned if not one.complete]
    if missing:
        raise ValueError(
            f"Expected a finished baseline of each seed in {folder}, got none of "
            f"{' '.join(missing)}. Finish that comparison first, or leave --baselines out."
        )
    return folder


def _print_plan(planned: list[PlannedRun], parts: dict[str, RunComponents]) -> None:
    examples: dict[str, PlannedRun] = {}
    for one in planned:
        print(f"- {one.name}: {_state(one)}")
        examples.setdefault(one.kind, one)
    for kind, example in examples.items():
        print(f"\n{describe(example.run, parts[kind])}")


def _state(one: PlannedRun) -> str:
    if one.complete:
        return "complete, not repeated"
    if one.trained:
        return "trained, its images are to be counted"
    step = one.checkpoint()
    return f"goes on after step {step:,} of {one.budget.steps:,}" if step else "to train"


def _speeds(planned: list[PlannedRun], parts: dict[str, RunComponents]) -> dict[str, Speed]:
    """Speed of each kind that has something left to do."""
    speeds = {}
    for kind in dict.fromkeys(one.kind for one in planned if not one.complete):
        runs = [one for one in planned if one.kind == kind]
        finished = next(filter(None, map(finished_speed, runs)), None)
        speeds[kind] = finished or measure_speed(runs[0].run, parts[kind], parts["distilled"])
    return speeds


def _print_estimate(planned: list[PlannedRun], speeds: dict[str, Speed], images: int) -> None:
    left = [(p, seconds_left(p, speeds[p.kind], images)) for p in planned if not p.complete]
    if not left:
        print("All runs are complete.")
        return
    whole = duration(sum(seconds for _, seconds in left))
    each = {kind: max(s for p, s in left if p.kind == kind) for kind in speeds}
    shown = ", ".join(f"{kind} {duration(seconds)} a run" for kind, seconds in each.items())
    print(f"Estimated time: about {whole} for {several(len(left), 'run')} ({shown}).")


def _execute(one: PlannedRun, prefix: str) -> None:
    print(f"{prefix} {_state(one)}", flush=True)
    if one.complete:
        return
    one.execute(train)
    results = written_results(one.folder)
    starts = written_note(one.folder).get("starts") or 1
    again = f", started {several(starts, 'time')}" if starts > 1 else ""
    took = f"trained in {duration(results['train_seconds'])}{again}"
    print(f"{prefix} mIoU {results['student_miou']:.4f}, {took}", flush=True)
