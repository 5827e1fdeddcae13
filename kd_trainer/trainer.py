"""`DistillationTrainer`: a transformers Trainer whose loss asks a frozen teacher.

It overrides what distillation needs and nothing else: the loss, the optimizer's groups, the
learning rates, the evaluation step, and what is logged.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import EvalPrediction, TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from kd_trainer.accepted import as_teacher, check_accepted
from kd_trainer.arguments import DistillationArguments
from kd_trainer.callbacks import EvaluationPanels, ProgressiveUnfreezing, tensorboard_of
from kd_trainer.console import ConsoleLines, ConsoleProgress
from kd_trainer.data import collate
from kd_trainer.data.loaders import LoadingTrainer
from kd_trainer.evaluation import (
    EvaluationSettings,
    agreement_of,
    check_best_metric,
    classes_of,
    evaluation_rows,
    figure_names,
    figures_of,
    labels_of,
    normalise,
    pixel_statistics,
    terms_of,
)
from kd_trainer.fast_layers import (
    allow_recompiles,
    forget_earlier_training,
    keep_freed_memory,
    use_fast_layers,
)
from kd_trainer.losses import distillation_terms, labelled_images, weighted_sum
from kd_trainer.models.modeling import SmpForSemanticSegmentation, encoder_units
from kd_trainer.optim import GroupedTrainer
from kd_trainer.processes import together
from kd_trainer.publishing.trainer import PublishingTrainer
from kd_trainer.resuming.epochs import EpochCounter
from kd_trainer.resuming.trainer import ResumableTrainer
from kd_trainer.schedules import RunningEpoch
from kd_trainer.teacher import Teacher, state_of
from kd_trainer.teaching import TaughtTrainer
from kd_trainer.tracking import TermSums, check_finite_weights, schedule_logs

Batch = dict[str, Any]
DICE_IMAGES = "dice_images"


class DistillationTrainer(
    TaughtTrainer, GroupedTrainer, LoadingTrainer, ResumableTrainer, PublishingTrainer
):
    """Trains a student with the terms of `LossWeights`, beside a frozen teacher.

    Args:
        model: the student.
        args: the run's arguments.
        teacher: frozen network whose logits the student follows; None trains without one, and the
            weights of the terms that need one are then 0. A student is wrapped.
        train_dataset: a `TransformedDataset` or `StreamedDataset` (or any data set of the same
            samples: `pixel_values` uint8 (3, H, W), `labels` (H, W), `distil_mask` bool (H, W), and
            with `args.teacher_targets` cached `teacher_logits` float16 (K, H, W)).
        eval_dataset: the same for evaluation, or several by name: figures are then `NAME_miou`.
        ignore_index: label of the pixels that count nowhere.
        callbacks: more callbacks, after ours.
        kwargs: anything else `transformers.Trainer` takes, but for what `accepted` refuses.
            `compute_metrics` adds its figures to ours; it gets the rows of `evaluation_rows`.
    """

    # The loss is a mean per micro-batch: the Trainer divides it by the accumulation steps.
    loss_is_scaled_for_ga = False

    model: SmpForSemanticSegmentation
    args: DistillationArguments

    def __init__(
        self,
        model: SmpForSemanticSegmentation,
        args: DistillationArguments,
        *,
        teacher: Teacher | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        ignore_index: int = 255,
        callbacks: list[TrainerCallback] | None = None,
        **kwargs: Any,
    ) -> None:
        check_accepted(model, args, teacher, kwargs)
        weights = args.loss_weights
        if teacher is not None:
            weights.check_teacher()
        self.loss_weights = weights if teacher is not None else weights.without_teacher()
        self.loss_weights.check_channels(model.config.classes)
        self.id2label = labels_of(model)
        self.own_metrics = kwargs.pop("compute_metrics", None)
        sets = eval_dataset if isinstance(eval_dataset, dict) else {}
        self.settings = EvaluationSettings(
            len(self.id2label), ignore_index, self.loss_weights, args.pos_weight
        )
        if args.load_best_model_at_end or args.save_strategy == "best":
            names = figure_names(self.id2label, self.loss_weights, teacher=teacher is not None)
            several = [f"{one}_{name}" for one in sets for name in names]
            if self.own_metrics is None:  # whose figures nobody knows yet
                check_best_metric(args.metric_for_best_model, several or names)
        self.tracked = TermSums(self.loss_weights)
        self._teacher_figures: tuple[Any, Any, dict[str, float]] | None = None
        self.schedule = args.schedule(len(encoder_units(model)), args.num_train_epochs)
        self.running = RunningEpoch()
        unfreezing = ProgressiveUnfreezing(lambda e: self.schedule.free_units(e), self.running)
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            data_collator=kwargs.pop("data_collator", collate),
            compute_metrics=self._figures,
            callbacks=[EpochCounter(self), unfreezing, *(callbacks or [])],
            **kwargs,
        )
        forget_earlier_training(model)
        use_fast_layers(model)
        if args.keep_freed_memory and args.device.type == "cpu":
            keep_freed_memory()
        self.teacher = self.placed(as_teacher(teacher, len(self.id2label)))
        if args.torch_compile:
            allow_recompiles(self.schedule.unfreezing.units)
        self._statistics = pixel_statistics(model, args.device)
        self.remove_callback(PrinterCallback if args.disable_tqdm else ProgressCallback)
        self.add_callback(ConsoleLines() if args.disable_tqdm else ConsoleProgress())
        if args.panel_images > 0 and eval_dataset is not None:
            self.add_callback(self._panels(next(iter(sets.values()), eval_dataset)))

    def _panels(self, dataset: Any) -> EvaluationPanels:
        return EvaluationPanels(
            self.found_classes,
            dataset,
            collator=self.data_collator,
            statistics=self._statistics,
            settings=self.settings,
            tensorboard=tensorboard_of(self.callback_handler.callbacks),
        )

    def _prepare_inputs(self, inputs: Batch) -> Batch:
        """Move to the device and normalise there: as uint8, pictures are a quarter of the bytes."""
        inputs = super()._prepare_inputs(inputs)
        if inputs["pixel_values"].dtype == torch.uint8:
            inputs["pixel_values"] = normalise(inputs["pixel_values"], self._statistics)
        return inputs

    def get_batch_samples(self, *args: Any) -> tuple[list[Batch], Any]:
        """The batches of an update, each with the number of images its Dice is divided by."""
        batches, items = super().get_batch_samples(*args)
        if batches and all("labels" in batch for batch in batches):
            images = labelled_images(batches, self.settings.ignore_index).to(self.args.device)
            images = self.accelerator.reduce(images, reduction="mean")
            batches = [{**batch, DICE_IMAGES: images} for batch in batches]
        return batches, items

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """Weighted sum of the loss terms; the single terms are kept for the next log."""
        pixels = inputs["pixel_values"]
        asks_teacher = self.loss_weights.ask_teacher
        teacher = self.teacher_logits(inputs) if asks_teacher else None
        outputs = model(pixel_values=pixels)
        terms = distillation_terms(
            outputs["raw_logits"],
            teacher,
            inputs["labels"],
            temperature=self.schedule.temperature(self.state.global_step),
            ignore_index=self.settings.ignore_index,
            distil_mask=inputs.get("distil_mask"),
            weights=self.loss_weights,
            pos_weight=self.args.pos_weight,
            dice_images=inputs.get(DICE_IMAGES),
        )
        loss = weighted_sum(terms, self.loss_weights)
        self.tracked.add(terms, outputs["raw_logits"])
        return (loss, dict(outputs)) if return_outputs else loss

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate as the Trainer does, and leave the random state as it was found.

        Without that, a run that is evaluated would see other DropPath draws than one that is not.
        All processes measure the student that the first one saves: each has BatchNorm statistics
        of its own, which DDP takes from the first one at the next update anyway.
        """
        if self.accelerator.num_processes > 1:
            for buffer in self.model.buffers():
                torch.distributed.broadcast(buffer, src=0)
        with torch.random.fork_rng():
            return super().evaluate(*args, **kwargs)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: Batch,
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[None, Any, Tensor]:
        """Counts and terms of each image instead of logits: memory independent of the set."""
        inputs = self._prepare_inputs(inputs)
        if "labels" not in inputs:
            raise ValueError(
                f"Expected labels in every sample, got {', '.join(inputs)}: figures are counts "
                "against them. For class maps of images without, use scripts/predict.py."
            )
        pixels, labels = inputs["pixel_values"], inputs["labels"]
        with torch.no_grad(), self.accelerator.autocast():
            student = model(pixel_values=pixels)["raw_logits"].float()
            teacher = self.teacher_logits(inputs)
            rows = evaluation_rows(
                student,
                teacher,
                labels,
                self.settings,
                teacher_figures=not self._knows_teacher(),
            )
        return None, rows, torch.zeros(len(labels), device=labels.device)

    def _knows_teacher(self) -> bool:
        known = self._teacher_figures
        if known is None or self.teacher is None:
            return False
        return known[0] is self._evaluated and known[1] == state_of(self.teacher)

    @property
    def _evaluated(self) -> Any:
        """The data set of the running evaluation."""
        loader: Any = self.callback_handler.eval_dataloader
        return loader.dataset

    def _figures(self, prediction: EvalPrediction) -> dict[str, float]:
        """Our metrics of the data set, and those of the user's `compute_metrics`."""
        figures = self._own_figures(prediction)
        more = self.own_metrics(prediction) if self.own_metrics is not None else {}
        twice = sorted(figures.keys() & more.keys())
        if twice:
            raise ValueError(
                f"Expected other names from compute_metrics than ours, got {', '.join(twice)}. "
                "Rename them."
            )
        return figures | more

    def _own_figures(self, prediction: EvalPrediction) -> dict[str, float]:
        """Metrics of the data set from the rows of all processes."""
        student, terms, *rest = (np.asarray(rows) for rows in prediction.predictions)
        figures = figures_of(student, self.id2label) | terms_of(terms, student, self.loss_weights)
        if not rest:
            return figures
        if len(rest) == 2:
            assert self.teacher is not None
            own = figures_of(rest[1], self.id2label)
            self._teacher_figures = (self._evaluated, state_of(self.teacher), own)
        assert self._teacher_figures is not None
        figures |= agreement_of(rest[0], self.id2label)
        return figures | {f"teacher_{k}": v for k, v in self._teacher_figures[2].items()}

    def found_classes(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Classes (B, H, W) that student and teacher (if any) find in a batch of the collator."""
        inputs = self._prepare_inputs(batch)
        self.model.eval()
        with torch.no_grad(), self.accelerator.autocast():
            student = self.model(pixel_values=inputs["pixel_values"])["raw_logits"]
            teacher = self.teacher_logits(inputs)
        return classes_of(student), None if teacher is None else classes_of(teacher)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the terms, their gradient shares, temperature, free units and learning rates."""
        if "loss" in logs and self.tracked.count:
            together(self.args, lambda: self.tracked.check_finite(self.state.global_step))
            logs |= self.tracked.drain(self.accelerator)
            done = max(self.state.global_step - 1, 0)  # the update that is logged, not the next
            logs |= schedule_logs(
                self.model,
                self.schedule,
                self.create_optimizer().param_groups,
                done,
                compiled=self.args.torch_compile or self.args.compile_teacher,
            )
        super().log(logs, start_time)

    def check_finite(self) -> None:
        """Raise FloatingPointError if a loss term since the last log, or a weight, went bad."""
        self.tracked.check_finite(self.state.global_step)
        check_finite_weights(self.model, f"after update {self.state.global_step}")

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Save, unless something went bad: nothing non-finite is ever kept."""
        together(self.args, self.check_finite)
        super()._save_checkpoint(*args, **kwargs)
