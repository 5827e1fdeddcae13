"""`DistillationTrainer`: a transformers Trainer whose loss asks a frozen teacher.

Read from top to bottom: the loss, the optimizer, the epochs, the evaluation, the log, the Hub; what
is about checkpoints stands in `resumable`. Where it overrides a private method of the Trainer, a
comment says what would go wrong without.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import EvalPrediction, TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import PredictionOutput, has_length

from kd_trainer.accepted import accepted_student, as_teacher, check_accepted
from kd_trainer.arguments import DistillationArguments
from kd_trainer.callbacks import (
    EpochCounter,
    EvaluationPanels,
    ProgressiveUnfreezing,
    steps_of,
)
from kd_trainer.console import ConsoleLines, ConsoleProgress
from kd_trainer.data import collate
from kd_trainer.data.streaming import seed_loader, stream_loader
from kd_trainer.evaluation import (
    DataSetFigures,
    check_best_metric,
    classes_of,
    evaluation_rows,
    figure_names,
    input_statistics,
    labels_of,
    normalise,
    pixel_statistics,
    settings_for,
)
from kd_trainer.fast_layers import use_safe_layers
from kd_trainer.hub import Pushed
from kd_trainer.losses import distillation_terms, labelled_images, weighted_sum
from kd_trainer.optim import PartLR, parameter_groups, regroup
from kd_trainer.processes import run_on_all_ranks
from kd_trainer.push_callback import PushCallback, check_only_message, check_push, push_student
from kd_trainer.resumable import ResumableTrainer
from kd_trainer.schedules import TrainingSchedule
from kd_trainer.students import (
    hold_frozen,
    raw_logits_of,
    reads_own_depth,
    student_logits,
    units_of,
)
from kd_trainer.teacher import Teacher, TeacherInference
from kd_trainer.tracking import TermSums, schedule_logs

Batch = dict[str, Any]
DICE_IMAGES = "dice_images"
COLUMNS = ("pixel_values", "labels", "distil_mask", "teacher_logits")


class DistillationTrainer(ResumableTrainer):
    """Trains a student with the terms of `LossWeights`, beside a frozen teacher.

    Args:
        model: the student: a model of smp or transformers, or any module that answers normalised
            images (B, 3, H, W) with logits, see `students.as_student`.
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
            `units` of a module are freed one after the other, the last of them first.

    Attributes:
        teacher: a plain attribute: inside the student it would be saved, trained and counted.
    """

    # The loss is a mean per micro-batch: the Trainer divides it by the accumulation steps.
    loss_is_scaled_for_ga = False

    _inference: TeacherInference | None = None
    _keeps_logits = False
    _trial: Any = None

    def __init__(
        self,
        model: nn.Module | None = None,
        args: DistillationArguments | None = None,
        *,
        teacher: Teacher | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        ignore_index: int = 255,
        callbacks: list[TrainerCallback] | None = None,
        **kwargs: Any,
    ) -> None:
        model_init = kwargs.pop("model_init", None)
        args = check_accepted(model, model_init, args, teacher, kwargs)
        if model is None:
            self.model_init = model_init
            model = super().call_model_init()
        model = accepted_student(model, kwargs.pop("units", None), args)
        self.id2label = labels_of(model)
        self.own_metrics = kwargs.pop("compute_metrics", None)
        sets = eval_dataset if isinstance(eval_dataset, dict) else {}
        self._follow(args, model, teacher, ignore_index)
        if self.own_metrics is None:  # whose figures nobody knows yet
            names = figure_names(self.id2label, self.loss_weights, teacher=teacher is not None)
            check_best_metric(args, names, sets)
        self.epochs = EpochCounter(args.schedule(len(units_of(model)), args.num_train_epochs))
        self.pushes = PushCallback(self)
        ours = [self.epochs, ProgressiveUnfreezing(self.epochs)]
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            data_collator=kwargs.pop("data_collator", collate),
            compute_metrics=self._compute_metrics,
            callbacks=[*ours, *([self.pushes] if args.push_to_hub else []), *(callbacks or [])],
            **kwargs,
        )
        self.model_init = model_init  # the Trainer takes this or a model, and asks it in `train`
        # With `remove_unused_columns` the Trainer keeps what forward takes, and these.
        self.label_names = list(dict.fromkeys([*self.label_names, *COLUMNS]))
        self.teacher = as_teacher(teacher, model)
        self.statistics = pixel_statistics(model, args.device)
        self.remove_callback(PrinterCallback if args.disable_tqdm else ProgressCallback)
        self.add_callback(ConsoleLines() if args.disable_tqdm else ConsoleProgress())
        # A panel shows one class a pixel, on an RGB image.
        shown = not self.settings.multi_label and not reads_own_depth(model)
        if args.panel_images > 0 and eval_dataset is not None and shown:
            self.add_callback(EvaluationPanels(self, next(iter(sets.values()), eval_dataset)))

    def _follow(
        self, args: DistillationArguments, model: nn.Module, teacher: Any, ignore_index: int
    ) -> None:
        """Set what is derived from the arguments, which a search changes for each trial."""
        weights = args.loss_weights
        self.loss_weights = weights if teacher is not None else weights.without_teacher()
        self.settings = settings_for(model, ignore_index, self.loss_weights, args.class_factors)
        self.figures = DataSetFigures(self.id2label, self.settings)
        self.tracked = TermSums(self.loss_weights)

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """A student of the user's `model_init`."""
        return accepted_student(super().call_model_init(trial), None, self.args)

    def hyperparameter_search(  # type: ignore[override] # the direction follows from the metric
        self,
        hp_space: Callable[[Any], dict[str, float]] | None = None,
        compute_objective: Callable[[dict[str, float]], float] | None = None,
        n_trials: int = 20,
        direction: str | list[str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Search as the Trainer does: for the best `metric_for_best_model` unless told otherwise.

        Its own default is the sum of all metrics, losses and times among them.
        """
        if direction is None:
            direction = "maximize" if self.args.greater_is_better else "minimize"
        if compute_objective is None:
            name = f"eval_{str(self.args.metric_for_best_model).removeprefix('eval_')}"
            compute_objective = itemgetter(name)
        return super().hyperparameter_search(
            hp_space, compute_objective, n_trials, direction, **kwargs
        )

    @property
    def schedule(self) -> TrainingSchedule:
        """What happens when, for the length that the running epoch has."""
        return self.epochs.schedule

    # ---- The loss ----

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """Weighted sum of the loss terms; the single terms are kept for the next log."""
        inputs = self._normalised(inputs)
        teacher = self.teacher_logits(inputs) if self.loss_weights.ask_teacher else None
        hold_frozen(self.model)
        labels = inputs["labels"]
        outputs = model(inputs["pixel_values"])
        logits = raw_logits_of(outputs, (labels.shape[-2], labels.shape[-1]))
        terms = distillation_terms(
            logits,
            teacher,
            labels,
            temperature=self.schedule.temperature(self.state.global_step),
            ignore_index=self.settings.ignore_index,
            distil_mask=inputs.get("distil_mask"),
            weights=self.loss_weights,
            pos_weight=self.settings.pos_weight,
            dice_images=inputs.get(DICE_IMAGES),
        )
        loss = weighted_sum(terms, self.loss_weights)
        self.tracked.add(terms, logits)
        return (loss, {"logits": logits}) if return_outputs else loss

    def teacher_logits(self, inputs: Batch) -> Tensor | None:
        """The teacher's raw logits, fp32 (B, K, H, W), without gradient; None without a teacher.

        Args:
            inputs: a batch on the device, with images that are normalised for the student, and with
                `teacher_logits` where they are cached.

        Raises:
            ValueError: if they should be cached and are not there.
        """
        if self.teacher is None:
            return None
        if self.args.teacher_targets == "cached":
            if "teacher_logits" not in inputs:
                raise ValueError(
                    "Expected teacher_logits in every sample with --teacher_targets cached, got "
                    f"{', '.join(inputs)}. Give them with the data, or use online."
                )
            return inputs["teacher_logits"].float()
        if self._inference is None or self._inference.teacher is not self.teacher:
            self._inference = self._make_inference(self.teacher)  # a callback may put another here
        # Without autocast the teacher would run in fp32 beside a bf16 student.
        with torch.no_grad(), self.accelerator.autocast():
            return self._inference(inputs["pixel_values"])

    def _make_inference(self, teacher: Teacher) -> TeacherInference:
        teacher.expect_input(*input_statistics(self.model))
        return TeacherInference(
            teacher.to(self.args.device),
            precision=str(self.accelerator.mixed_precision),
            fold=self.args.fold_teacher,
            backend=self.args.teacher_backend,
        )

    def _normalised(self, inputs: Batch) -> Batch:
        """With images as the student expects them; as bytes they are a quarter of the transfer."""
        pixels: Tensor = inputs["pixel_values"]
        if pixels.dtype != torch.uint8:
            return inputs
        return {**inputs, "pixel_values": normalise(pixels, self.statistics)}

    def get_batch_samples(self, *args: Any) -> tuple[list[Batch], Any]:
        """The batches of a step, each with the number of images its Dice is divided by."""
        batches, items = super().get_batch_samples(*args)
        if batches and all("labels" in batch for batch in batches):
            images = labelled_images(batches, self.settings.ignore_index).to(self.args.device)
            images = self.accelerator.reduce(images, reduction="mean")
            batches = [{**batch, DICE_IMAGES: images} for batch in batches]
        return batches, items

    def _get_dataloader(  # type: ignore[override] # the options are handed on as they come
        self, dataset: Any, description: str, batch_size: int, **options: Any
    ) -> Any:
        """The Trainer's loader, but for three of its habits.

        It would give the rows of a stream, which has split itself among ranks and workers already,
        to the ranks once more; drop the last short batch of an evaluation too; and let the workers'
        seeds be drawn from the generator that DropPath draws from.
        """
        args = self.args
        drop_last = args.dataloader_drop_last and options.get("is_training", False)
        if isinstance(dataset, IterableDataset):
            options = {"batch_size": batch_size, "drop_last": drop_last}
            return seed_loader(
                stream_loader(dataset, args, self.data_collator, **options), args.seed
            )
        before, args.dataloader_drop_last = args.dataloader_drop_last, drop_last
        try:
            loader = super()._get_dataloader(dataset, description, batch_size, **options)
        finally:
            args.dataloader_drop_last = before
        return seed_loader(loader, args.seed)

    # ---- The optimizer ----

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Its groups are those of the free parts; `ProgressiveUnfreezing` adds the others."""
        if self.optimizer is not None and self.lr_scheduler is not None:
            return self.optimizer  # of the running training
        free = self.schedule.free_units(self.epochs.index)
        if self._resumed is not None:  # the state that is loaded next has the groups of its save
            free = self._saved_progress()["free_units"]
        groups = parameter_groups(self.model, self.args, free)
        if self.optimizer is None:
            wanted = self.optimizer_cls_and_kwargs
            kind, options = wanted or self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = kind(groups, **options)
        else:  # of an earlier call of `train`
            regroup(self.optimizer, groups)
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """Each part at the rate that the schedules have for it in the running epoch."""
        if self.lr_scheduler is None:
            optimizer = self.create_optimizer() if optimizer is None else optimizer
            rates = PartLR(optimizer, lambda part, step: self.schedule.rate(part)(step))
            vars(self)["lr_scheduler"] = rates  # the base class declares a LambdaLR
            self._created_lr_scheduler = True  # else another call of `train` would go on with it
        return self.lr_scheduler  # type: ignore[return-value]

    # ---- The epochs ----

    def set_initial_training_values(self, args: Any, dataloader: DataLoader) -> tuple[Any, ...]:
        """As many epochs as `--max_steps` can need: one may be as short as a single step."""
        values = super().set_initial_training_values(args, dataloader)
        use_safe_layers(self.model)  # no constructor changes a network, and this may be a new one
        if self._trial is not None:
            self._follow(args, self.model, self.teacher, self.settings.ignore_index)
            units = len(units_of(self.model))
            self.epochs.schedule = args.schedule(units, args.num_train_epochs)
        self.epochs.start(args, self.state, steps=values[1])
        return (max(values[0], args.max_steps), *values[1:])

    def _run_epoch(self, **options: Any) -> None:  # type: ignore[override] # all have names
        """With the length that the loader has now.

        The Trainer asks once, before the first epoch: where a stream has left rows out since, it
        would wait for batches that never come.
        """
        loader = options["train_dataloader"]
        if has_length(loader):
            options["steps_in_epoch"] = len(loader)
            options["num_update_steps_per_epoch"] = steps_of(loader, self.args)
        super()._run_epoch(**options)

    # ---- The evaluation ----

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate as the Trainer does, and leave the random state as it was found.

        Without that, a run that is evaluated would see other DropPath draws than one that is not.
        All processes measure the student that the first one saves: each has BatchNorm statistics
        of its own, which DDP takes from the first one at the next step anyway.
        """
        if self.accelerator.num_processes > 1:
            for buffer in self.model.buffers():
                torch.distributed.broadcast(buffer, src=0)
        with torch.random.fork_rng():
            return super().evaluate(*args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """In the precision of this trainer, also for `predict`."""
        self._take_model()
        return super().evaluation_loop(*args, **kwargs)

    def predict(self, *args: Any, **kwargs: Any) -> PredictionOutput:
        """Raw logits (N, K, H, W), labels and, where there are labels, metrics.

        K is 1 for two classes: foreground above 0. All logits are kept in memory; for class maps of
        images of any size use scripts/predict.py.
        """
        self._keeps_logits = True
        try:
            output = super().predict(*args, **kwargs)
        finally:
            self._keeps_logits = False
        if isinstance(output.predictions, tuple):  # counts, and then the logits
            output = output._replace(predictions=output.predictions[-1])
        return output

    def prediction_step(
        self,
        model: nn.Module,
        inputs: Batch,
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[None, Any, Tensor | None]:
        """Counts and terms of each image instead of logits: memory independent of the set."""
        inputs = self._prepare_inputs(inputs)
        if "labels" not in inputs and self._keeps_logits:
            return None, self._logits(model, inputs)[0], None
        if "labels" not in inputs:
            raise ValueError(
                f"Expected labels in every sample, got {', '.join(inputs)}: figures are counts "
                "against them. Images without are for predict(), or for scripts/predict.py."
            )
        labels = inputs["labels"]
        student, teacher = self._logits(model, inputs)
        rows = evaluation_rows(
            student,
            teacher,
            labels,
            self.settings,
            teacher_figures=not self.figures.knows(
                self.teacher, self.callback_handler.eval_dataloader
            ),
        )
        if self._keeps_logits:
            return None, (*rows, student), labels
        return None, rows, torch.zeros(len(labels), device=labels.device)

    def predict_classes(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Classes (B, H, W) that student and teacher (if any) find in a batch of the collator."""
        self._take_model()
        student, teacher = self._logits(self.model.eval(), self._prepare_inputs(batch))
        return classes_of(student), None if teacher is None else classes_of(teacher)

    @torch.no_grad()
    def _logits(self, model: nn.Module, inputs: Batch) -> tuple[Tensor, Tensor | None]:
        """Raw logits of student and teacher for a batch on the device."""
        inputs = self._normalised(inputs)
        with self.accelerator.autocast():
            student = student_logits(model, inputs["pixel_values"])
            return student.float(), self.teacher_logits(inputs)

    def _compute_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """Our metrics of the data set, and those of the user's `compute_metrics`."""
        rows: tuple[Any, ...] = tuple(prediction.predictions)
        if self._keeps_logits:
            rows = rows[:-1]
            prediction = EvalPrediction(predictions=rows, label_ids=prediction.label_ids)
        figures = self.figures(rows, self.teacher, self.callback_handler.eval_dataloader)
        more = self.own_metrics(prediction) if self.own_metrics is not None else {}
        twice = sorted(figures.keys() & more.keys())
        if twice:
            raise ValueError(
                f"Expected other names from compute_metrics than ours, got {', '.join(twice)}. "
                "Rename them."
            )
        return figures | more

    # ---- The log ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the terms, their gradient shares, temperature, free units and learning rates."""
        if "loss" in logs and self.tracked.count:
            run_on_all_ranks(self.args, lambda: self.tracked.check_finite(self.state.global_step))
            logs |= self.tracked.drain(self.accelerator)
            logs |= schedule_logs(
                self.model,
                self.schedule,
                self.args,
                max(self.state.global_step - 1, 0),  # the step that is logged, not the next
            )
        super().log(logs, start_time)

    # ---- The Hub ----

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Find out before the training whether a push will be possible."""
        check_push(self.args, self.processing_class, token=token, private=private)
        vars(self)["hub_model_id"] = self.args.hub_model_id  # the base class declares it as None

    def push_to_hub(  # type: ignore[override] # what is pushed is not the caller's choice
        self, commit_message: str = "Push a student", **kwargs: Any
    ) -> Pushed | None:
        """Save the student into the output folder and push it with its card.

        Raises:
            TypeError: for any other argument of the stock method.
        """
        check_only_message(kwargs)
        if self.hub_model_id is None:
            self.init_hf_repo()
        self.pushes.finish()
        if not self.is_world_process_zero():
            return None
        student = self.accelerator.unwrap_model(self.model)
        return push_student(student, self.processing_class, self.args, commit_message)
