"""What happens between epochs: units are freed, and panels are drawn.

The callbacks hold no state of their own. What is free follows from the epoch alone, which the
trainer counts and saves, so a resumed run frees the same units as one that was never interrupted.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import IterableDataset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import TensorBoardCallback

from kd_trainer.evaluation import EvaluationSettings, Statistics, bytes_of
from kd_trainer.reports.panels import comparison_panel, save_picture
from kd_trainer.schedules import RunningEpoch

# TensorBoard's files only grow, and its page shows ten pictures of a run.
_SHOWN_PARTS = 10


class ProgressiveUnfreezing(TrainerCallback):
    """Frees the student's encoder units at epoch begin, deepest first.

    At `on_train_begin` too, so that a run resumed in the middle of an epoch starts with the right
    units, and so that freezing happens after the DDP wrap: a parameter that is frozen before the
    wrap would never be reduced between processes.

    Args:
        schedule: number of free units as a function of the epoch.
        running: the epoch, counted by the trainer: `state.epoch` lags behind after a short one.
    """

    def __init__(self, schedule: Callable[[int], int], running: RunningEpoch) -> None:
        self.schedule = schedule
        self.running = running

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Set the free units of the epoch that the run starts (or goes on) in."""
        kwargs["model"].set_free_units(self.schedule(self.running.index))

    def on_epoch_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Set the free units of the epoch that begins."""
        kwargs["model"].set_free_units(self.schedule(self.running.index))


def tensorboard_of(callbacks: Iterable[Any]) -> TensorBoardCallback | None:
    """The callback among these that writes to TensorBoard, if there is one."""
    return next((c for c in callbacks if isinstance(c, TensorBoardCallback)), None)


class EvaluationPanels(TrainerCallback):
    """Saves a picture of a few evaluation images at each evaluation, and shows some in TensorBoard.

    Of the files, the newest `args.panel_limit` stay, that of the best evaluation among them.
    TensorBoard gets the first of each tenth of the run.

    Args:
        find: gives the classes that student and teacher find in a batch.
        dataset: the evaluation data; its first `args.panel_images` samples are drawn.
        collator: makes a batch of such samples, as the trainer's own loaders do.
        statistics: mean and std of the student's input, for pictures that come normalised.
        settings: number of classes and the ignored label.
        tensorboard: the callback whose writer shows the picture, or None.
    """

    def __init__(
        self,
        find: Callable[[dict[str, Any]], tuple[Tensor, Tensor | None]],
        dataset: Any,
        *,
        collator: Callable[[list[Any]], Any],
        statistics: Statistics,
        settings: EvaluationSettings,
        tensorboard: TensorBoardCallback | None,
    ) -> None:
        self.find = find
        self.dataset = dataset
        self.collator = collator
        self.statistics = statistics
        self.settings = settings
        self.tensorboard = tensorboard

    def draw(self, count: int) -> np.ndarray:
        """The panel of the first samples, uint8 (H, W, 3)."""
        samples = self.dataset
        if not isinstance(samples, IterableDataset):
            samples = (self.dataset[i] for i in range(len(self.dataset)))
        batch = self.collator(list(itertools.islice(samples, count)))
        student, teacher = self.find(batch)
        return comparison_panel(
            bytes_of(batch["pixel_values"], self.statistics).permute(0, 2, 3, 1).cpu().numpy(),
            batch["labels"].cpu().numpy(),
            None if teacher is None else teacher.cpu().numpy(),
            student.cpu().numpy(),
            num_labels=self.settings.num_labels,
            ignore_index=self.settings.ignore_index,
        )

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Draw, save as `panels/step_<update>.png`, delete old ones, and send to TensorBoard."""
        if not state.is_world_process_zero:
            return
        picture = self.draw(args.panel_images)  # type: ignore[attr-defined]
        folder = Path(str(args.output_dir)) / "panels"
        save_picture(picture, folder / f"step_{state.global_step:06d}.png")
        if args.panel_limit > 0:  # type: ignore[attr-defined]
            _delete_old_panels(folder, args.panel_limit, state)  # type: ignore[attr-defined]
        writer = self.tensorboard.tb_writer if self.tensorboard is not None else None
        if writer is not None and _is_first_of_its_part(state):
            writer.add_image("panel", picture, state.global_step, dataformats="HWC")


def _delete_old_panels(folder: Path, limit: int, state: TrainerState) -> None:
    """Leave `limit` pictures; this evaluation's and the best one's stay in any case.

    First go those beyond this update, which an interrupted or earlier run left, then the oldest.
    """
    now = state.global_step
    found = ((path, re.fullmatch(r"step_(\d+)\.png", path.name)) for path in folder.iterdir())
    steps = {int(match[1]): path for path, match in found if match}
    # The best until now: whether this evaluation is better is decided after it.
    old = sorted(steps.keys() - {now, state.best_global_step}, key=lambda s: (s <= now, s))
    for step in old[: max(0, len(steps) - limit)]:
        steps[step].unlink()


def _is_first_of_its_part(state: TrainerState) -> bool:
    """Whether this evaluation, which is the last log, is the first in its tenth of the run."""

    def part(step: int) -> int:
        return step * _SHOWN_PARTS // max(state.max_steps, 1)

    earlier = (log for log in state.log_history[:-1] if any(n.startswith("eval_") for n in log))
    return part(state.global_step) not in {part(int(log["step"])) for log in earlier}
