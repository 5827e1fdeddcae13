"""Whether distillation helped, and which one: a student with and without its teacher, by seeds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from kd_trainer.build import RunComponents, build_run, evaluation_dataset, images_an_epoch
from kd_trainer.commands.train import train
from kd_trainer.compare.arguments import Comparison, parse_comparison
from kd_trainer.compare.budget import Budget
from kd_trainer.compare.estimate import finished_speed, measure_speed, seconds_left
from kd_trainer.compare.report import write_report
from kd_trainer.compare.results import FinishedRun, read_runs
from kd_trainer.compare.runs import (
    Final,
    PlannedRun,
    baseline_names,
    plan_runs,
    written_note,
    written_results,
)
from kd_trainer.compare.variants import Variant, is_baseline
from kd_trainer.config import RunArguments, build
from kd_trainer.costs import duration, steps_per_epoch, total_steps, without_teacher
from kd_trainer.data.images import content_digest
from kd_trainer.doctor.checks import check_before_training
from kd_trainer.doctor.finding import several
from kd_trainer.doctor.plan import describe
from kd_trainer.doctor.resources import Speed
from kd_trainer.found_settings import FOUND


def compare_main() -> None:
    """Compare what the command line names."""
    run_compare(parse_comparison())


def run_compare(comparison: Comparison) -> dict[str, Any]:
    """What scripts/compare.py does; returns what comparison.json holds."""
    args, output = comparison.args, comparison.output
    if args.merge is not None:
        return _report(comparison, read_runs([Path(folder) for folder in args.merge]))
    parts, budgets = _prepare(comparison)
    final = _final(comparison, parts)
    options: dict[str, Any] = {"seeds": args.chosen_seeds, "final": final}
    planned = plan_runs(budgets, folder=output, wants=args.wants, **options)
    baselines = _finished_baselines(comparison, budgets, options)
    print(f"Comparison in {output}: {several(len(planned), 'run')}. {_budgets(budgets)}")
    if comparison.dry_run:
        _print_plan(planned, parts)
        return {}
    _look(planned, parts)
    speeds = _speeds(planned, parts)
    images = max(len(one.eval_dataset or ()) for one in parts.values())
    _print_estimate(planned, speeds, images)
    parts.clear()  # networks that would count in the memory of the runs
    for number, one in enumerate(planned, start=1):
        _execute(one, f"[{number}/{len(planned)}] {one.name}:")
        speeds[one.kind] = finished_speed(one) or speeds.get(one.kind, Speed(0.0, 0.0))
        rest = [later for later in planned[number:] if not later.complete]
        left = sum(seconds_left(later, speeds[later.kind], images) for later in rest)
        if left:
            print(f"    about {duration(left)} left")
    names = baseline_names(budgets, baselines or output)
    kinds = list(dict.fromkeys([*names, *(variant.name for variant, _ in budgets)]))
    runs = read_runs([output], seeds=args.chosen_seeds, kinds=kinds, baselines=baselines)
    return _report(comparison, runs)


def _report(comparison: Comparison, runs: list[FinishedRun]) -> dict[str, Any]:
    args = comparison.args
    trusted = comparison.trust_remote_code
    return write_report(
        runs, comparison.output, args.bootstrap, args.latency_repeats, trust_remote_code=trusted
    )


def _prepare(
    comparison: Comparison,
) -> tuple[dict[str, RunComponents], list[tuple[Variant, Budget]]]:
    """The objects of one run of each variant by its name, and what it and its baseline may spend.

    So what is wrong with the last variant is found before the first one is trained.
    """
    parts, budgets = {}, []
    for variant in comparison.variants:
        settings = variant.settings | {"output_dir": str(comparison.output)}
        run = build(settings)
        _check(build(settings | variant.beside))
        parts[variant.name] = distilled = build_run(run)
        learned = run.resolved()
        found = {name: learned[name] for name in FOUND if settings.get(name) is None}
        sides = dict.fromkeys(("baseline", "distilled"), (run, distilled))
        if run.data.unlabelled is not None:
            alone = build(without_teacher(settings))
            sides["baseline"] = alone, build_run(alone)
        images = {side: len(built.train_dataset) for side, (_, built) in sides.items()}
        per_epoch = {
            side: steps_per_epoch(images_an_epoch(built.train_dataset, one.training), run.training)
            for side, (one, built) in sides.items()
        }
        steps = total_steps(run.training, per_epoch["distilled"])
        variant = replace(variant, settings=variant.settings | found)
        budgets.append((variant, Budget(steps, per_epoch, images)))
    return parts, budgets


def _budgets(budgets: list[tuple[Variant, Budget]]) -> str:
    """What each may spend: one sentence where it is the same for all."""
    sentences: dict[str, list[str]] = {}
    for variant, budget in budgets:
        sentences.setdefault(budget.sentence(), []).append(variant.name)
    if len(sentences) == 1:
        return next(iter(sentences))
    return "".join(f"\n{', '.join(names)}: {text}" for text, names in sentences.items())


def _final(comparison: Comparison, parts: dict[str, RunComponents]) -> Final | None:
    """The data to report on, read once, before anything is trained.

    Raises:
        ValueError: if they are the images that train the students, or choose.
    """
    args = comparison.args
    if args.final_dataset is None and args.final_split is None:
        return None
    final = Final(args.final_dataset, args.final_split)
    first = comparison.variants[0]
    run = build(first.settings | {"output_dir": str(comparison.output)})
    data, choosing = final.settings(run.data), parts[first.name].eval_dataset
    if (data.dataset, data.eval_split) == (run.data.dataset, run.data.train_split):
        raise ValueError(
            "Expected images that nobody has trained on as --final_split, got "
            f"{data.eval_split}, the split to train on. Name another one."
        )
    there = evaluation_dataset(data, batch_size=1)
    if choosing is not None and content_digest(there.dataset) == content_digest(choosing.dataset):
        raise ValueError(
            f"Expected other images as --final_dataset or --final_split than those that choose "
            f"each run's best evaluation, got {run.data.eval_split} for both. Name another split."
        )
    return final


def _look(planned: list[PlannedRun], parts: dict[str, RunComponents]) -> None:
    """The preflight of each variant that has something to train; seeds differ in nothing of it."""
    seen = set()
    for one in planned:
        assert one.variant is not None
        name = one.variant.name
        if not one.trained and name not in seen and not one.run.training.no_preflight:
            seen.add(name)
            of_seed = {"seed": one.seed, "output_dir": str(one.folder)}
            check_before_training(build(one.variant.settings | of_seed), parts[name])


def _check(run: RunArguments) -> None:
    if run.model.teaches_itself:
        raise ValueError(
            "Expected a --teacher that can be measured, got self: there is no gap between a "
            "student and its own average. Name a teacher, and let a variant teach itself: "
            "--variants own='--teacher self'."
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


def _finished_baselines(
    comparison: Comparison, budgets: list[tuple[Variant, Budget]], options: dict[str, Any]
) -> Path | None:
    """The folder that `--baselines` names, if what it holds is what would be trained here.

    Raises:
        ValueError: if its settings differ, or a seed is missing.
    """
    if comparison.args.baselines is None:
        return None
    folder = Path(comparison.args.baselines)
    planned = plan_runs(budgets, folder=folder, wants=is_baseline, **options)
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
        print(f"\n{describe(example.run, parts.get(kind) or build_run(example.run))}")


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
        one = runs[0]
        assert one.variant is not None
        own = parts.get(kind) or build_run(one.run)
        taught = build_run(one.reference) if one.variant.beside else parts[one.variant.name]
        speeds[kind] = finished or measure_speed(one.run, own, taught)
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
