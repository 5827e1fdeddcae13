"""How long runs will take: from finished runs where there are some, else from a few updates."""

from __future__ import annotations

import time

from kd_trainer.build import Parts
from kd_trainer.compare.image_counts import count_images
from kd_trainer.compare.runs import PlannedRun, written_note, written_results
from kd_trainer.config import RunArguments
from kd_trainer.doctor.resources import Speed, measure_update, training_seconds


def measure_speed(run: RunArguments, parts: Parts, guide: Parts) -> Speed:
    """Time a few updates and evaluation images of a run.

    Args:
        run: its settings; nothing is written to its folder.
        parts: its objects, used up.
        guide: objects with a teacher and evaluation data.
    """
    return Speed(measure_update(run, parts), _seconds_an_image(run, parts, guide))


def _seconds_an_image(run: RunArguments, parts: Parts, guide: Parts) -> float:
    assert guide.teacher is not None
    assert guide.eval_dataset is not None
    size = min(run.training.per_device_eval_batch_size, len(guide.eval_dataset))
    for _ in range(2):
        start = time.perf_counter()
        count_images(
            parts.student,
            guide.teacher,
            guide.eval_dataset,
            run.training,
            ignore_index=run.data.ignore_index,
            batches=1,
        )
        elapsed = time.perf_counter() - start
    return elapsed / size


def seconds_left(planned: PlannedRun, speed: Speed, eval_images: int) -> float:
    """Seconds a run still needs: updates, evaluations, and two (three with a report) at the end."""
    evaluation = speed.image * eval_images
    if planned.trained:
        return 0.0 if planned.complete else evaluation
    updates = planned.budget.updates
    share = 1 - min(planned.checkpoint(), updates) / updates
    args, per_epoch = planned.run.training, planned.budget.per_epoch[planned.kind]
    return (
        share * training_seconds(args, updates, per_epoch, speed, eval_images)
        + (2 + args.report) * evaluation
    )


def finished_speed(planned: PlannedRun) -> Speed | None:
    """Speed of a run whose whole training was measured, evaluations spread over it."""
    seconds = written_results(planned.folder).get("train_seconds")
    note = written_note(planned.folder)
    whole = note.get("starts") == 1 or note.get("whole_time", False)
    if seconds is None or not (planned.trained and whole):
        return None
    return Speed(seconds / planned.budget.updates, 0.0)
