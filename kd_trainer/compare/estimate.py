"""How long runs will take: from finished runs where there are some, else from a few steps."""

from __future__ import annotations

import time

from kd_trainer.build import RunComponents
from kd_trainer.compare.image_counts import count_images
from kd_trainer.compare.runs import PlannedRun, training_seconds_of, written_note, written_results
from kd_trainer.config import RunArguments
from kd_trainer.doctor.resources import Speed, measure_update, training_seconds


def measure_speed(run: RunArguments, parts: RunComponents, distilled: RunComponents) -> Speed:
    """Time a few steps and evaluation images of a run.

    Args:
        run: its settings; nothing is written to its folder.
        parts: its objects, used up.
        distilled: objects with a teacher and evaluation data.
    """
    assert distilled.eval_dataset is not None
    step = measure_update(run, parts)
    size = min(run.training.per_device_eval_batch_size, len(distilled.eval_dataset))
    for _ in range(2):  # the first batch also warms up
        start = time.perf_counter()
        count_images(
            parts.student,
            distilled.teacher,
            distilled.eval_dataset,
            run.training,
            ignore_index=run.data.ignore_index,
            batches=1,
        )
        elapsed = time.perf_counter() - start
    return Speed(step, elapsed / size)


def seconds_left(planned: PlannedRun, speed: Speed, eval_images: int) -> float:
    """Seconds a run still needs: steps, evaluations, and two (three with a report) at the end."""
    if planned.complete:
        return 0.0
    evaluation = speed.image * eval_images
    if planned.trained:
        return evaluation
    steps, args = planned.budget.steps, planned.run.training
    share = 1 - min(planned.checkpoint(), steps) / steps
    per_epoch = planned.budget.per_epoch[planned.side]
    training = training_seconds(args, steps, per_epoch, speed, eval_images)
    return share * training + (2 + args.report) * evaluation


def finished_speed(planned: PlannedRun) -> Speed | None:
    """Speed of a run whose whole training was measured, evaluations spread over it."""
    seconds = training_seconds_of(written_results(planned.folder), written_note(planned.folder))
    if seconds is None or not planned.trained:
        return None
    return Speed(seconds / planned.budget.steps, 0.0)
