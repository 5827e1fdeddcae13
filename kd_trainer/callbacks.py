"""What happens between epochs: units are freed, the data learns the epoch, panels are drawn.

The callbacks hold no state of their own. What is free follows from the epoch alone, so a resumed
run frees the same units as one that was never interrupted.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import IterableDataset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import TensorBoardCallback

from kd_trainer.data import collate
from kd_trainer.evaluation import EvaluationSettings
from kd_trainer.reports.panels import comparison_panel, save_picture
from kd_trainer.schedules import UnfreezeSchedule


def current_epoch(state: TrainerState) -> int:
    """Index of the running epoch; at the boundary that of the epoch that begins."""
    return int((state.epoch or 0.0) + 1e-6)


class ProgressiveUnfreezing(TrainerCallback):
    """Frees the student's encoder units at epoch begin, deepest first.

    At `on_train_begin` too, so that a run resumed in the middle of an epoch starts with the right
    units, and so that freezing happens after the DDP wrap: a parameter that is frozen before the
    wrap would never be reduced between processes.

    Args:
        schedule: number of free units as a function of the epoch.
    """

    def __init__(self, schedule: UnfreezeSchedule) -> None:
        self.schedule = schedule

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Set the free units of the epoch that the run starts (or goes on) in."""
        kwargs["model"].set_free_units(self.schedule(current_epoch(state)))

    def on_epoch_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Set the free units of the epoch that begins."""
        kwargs["model"].set_free_units(self.schedule(current_epoch(state)))


class DatasetEpoch(TrainerCallback):
    """Tells the training data the epoch, from which the augmentation is drawn.

    accelerate forwards `set_epoch` neither in runs of several processes nor in a resumed epoch.
    """

    def on_epoch_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Call `set_epoch` of the training data set, if it has one."""
        set_epoch = getattr(kwargs["train_dataloader"].dataset, "set_epoch", None)
        if set_epoch is not None:
            set_epoch(current_epoch(state))


def tensorboard_of(callbacks: Iterable[Any]) -> TensorBoardCallback | None:
    """The callback among these that writes to TensorBoard, if there is one."""
    return next((c for c in callbacks if isinstance(c, TensorBoardCallback)), None)


class EvaluationPanels(TrainerCallback):
    """Saves a picture of a few evaluation images at each evaluation, and shows it in TensorBoard.

    Args:
        find: gives the classes that student and teacher find in a batch.
        dataset: the evaluation data; its first `args.panel_images` samples are drawn.
        settings: number of classes and the ignored label.
        tensorboard: the callback whose writer shows the picture, or None.
    """

    def __init__(
        self,
        find: Callable[[dict[str, Any]], tuple[Tensor, Tensor | None]],
        dataset: Any,
        settings: EvaluationSettings,
        tensorboard: TensorBoardCallback | None,
    ) -> None:
        self.find = find
        self.dataset = dataset
        self.settings = settings
        self.tensorboard = tensorboard

    def draw(self, count: int) -> np.ndarray:
        """The panel of the first samples, uint8 (H, W, 3)."""
        samples = self.dataset
        if not isinstance(samples, IterableDataset):
            samples = (self.dataset[i] for i in range(len(self.dataset)))
        batch = collate(list(itertools.islice(samples, count)))
        student, teacher = self.find(batch)
        return comparison_panel(
            batch["pixel_values"].permute(0, 2, 3, 1).numpy(),
            batch["labels"].numpy(),
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
        """Draw, save as `panels/step_<update>.png`, and send to TensorBoard."""
        if not state.is_world_process_zero:
            return
        picture = self.draw(args.panel_images)  # type: ignore[attr-defined]
        save_picture(
            picture, Path(str(args.output_dir)) / "panels" / f"step_{state.global_step:06d}.png"
        )
        writer = self.tensorboard.tb_writer if self.tensorboard is not None else None
        if writer is not None:
            writer.add_image("panel", picture, state.global_step, dataformats="HWC")
