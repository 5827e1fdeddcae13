"""`DistillationTrainer`: a transformers Trainer whose loss asks a frozen teacher.

Read from top to bottom: the loss, the optimizer, the epochs, the checkpoints, the evaluation, the
log, the Hub. Where it overrides a private method of the Trainer, a comment says what would go wrong
without.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import EvalPrediction, Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import PredictionOutput, TrainOutput, has_length

from kd_trainer.accepted import accepted_student, as_teacher, check_accepted, check_one_set
from kd_trainer.adaptive_weight import AdaptiveWeight
from kd_trainer.arguments import DistillationArguments
from kd_trainer.callbacks import (
    EpochCounter,
    EvaluationPanels,
    ProgressiveUnfreezing,
    ResumeCallback,
    steps_of,
)
from kd_trainer.checkpointing.fingerprint import fingerprint_of
from kd_trainer.checkpointing.resume import (
    best_checkpoint,
    check_resumable,
    loading_safely,
    newest_checkpoint,
    no_stock_rotation,
    progress_file,
    read_progress,
    save_checkpoint,
    without_warnings,
)
from kd_trainer.checkpointing.stopping import StopRequest
from kd_trainer.console import ConsoleLines, ConsoleProgress
from kd_trainer.data import BadSample, StreamedDataset, collate
from kd_trainer.data.quota import quota_sampler
from kd_trainer.data.streaming import seed_loader, stream_loader
from kd_trainer.data.views import MIX_BOX, MIX_CLASSES, STRONG, has_views, student_batch
from kd_trainer.ema import StudentEma
from kd_trainer.errors import Stopped
from kd_trainer.evaluation import (
    DataSetFigures,
    check_best_metric,
    classes_of,
    evaluation_rows,
    figure_names,
    input_statistics,
    labels_of,
    masks_of,
    normalise,
    pixel_statistics,
    settings_for,
    student_rows,
)
from kd_trainer.fast_layers import allow_recompiles, reset_accelerate_prepare, use_safe_layers
from kd_trainer.feature_maps import FeatureMatching, first_trained, recorded
from kd_trainer.hub import Pushed
from kd_trainer.losses import (
    LossWeights,
    distillation_terms,
    feature_terms,
    labelled_images,
    unlabelled_images,
    weighted_sum,
)
from kd_trainer.models.weights import check_finite_weights
from kd_trainer.optim import NamedParameters, PartLR, parameter_groups, regroup
from kd_trainer.processes import (
    Peer,
    naming_dead_processes,
    processes_of_run,
    run_on_all_ranks,
    share_buffers,
)
from kd_trainer.push_callback import PushCallback, check_only_message, check_push, push_student
from kd_trainer.schedules import TrainingSchedule
from kd_trainer.sources import SELF
from kd_trainer.students import (
    free_units,
    hold_frozen,
    load_renamed,
    raw_logits_of,
    save_traits,
    student_logits,
    units_of,
)
from kd_trainer.teacher import Teacher, TeacherInference
from kd_trainer.tracking import TermSums, schedule_logs

Batch = dict[str, Any]
DICE_IMAGES, PSEUDO_IMAGES, ASKED = "dice_images", "pseudo_images", "asked"
COLUMNS = (
    *("pixel_values", "labels", "distil_mask", "teacher_logits"),
    *(STRONG, MIX_BOX, MIX_CLASSES),
)


class DistillationTrainer(Trainer):
    """Trains a student with the terms of `LossWeights`, beside a frozen teacher.

    Args:
        model: the student: a model of smp or transformers, or any module that answers normalised
            images (B, 3, H, W) with logits, see `students.as_student`.
        args: the run's arguments.
        teacher: frozen network whose logits the student follows; None trains without one, and the
            weights of the terms that need one are then 0. A student is wrapped. "self" asks the
            student's moving average (`args.ema_decay`).
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
        epochs: counts them, and knows the schedules.
        tracked: sums of the loss terms since the last log.
        ema: the moving average of the student, as `args.ema_decay` asks for; None without one.
        facts: what is compared on resume beside the arguments, the networks and the number of
            images: set by who knows more, such as the content of the data.
        peers: the processes of the training, by rank.
        stop: a request to stop, looked at after each step; None without one.
        adaptive: how far the evaluations let the teacher have its say, with `args.adaptive_weight`.
    """

    model: Any  # a network: of smp, of transformers, or a module of the user's
    args: DistillationArguments
    facts: Mapping[str, Any] = {}
    peers: Sequence[Peer] = ()
    stop: StopRequest | None = None

    # The loss is a mean per micro-batch: the Trainer divides it by the accumulation steps.
    loss_is_scaled_for_ga = False

    _inference: TeacherInference | None = None
    _keeps_logits = False
    _trial: Any = None
    _took_model = _has_trained = False
    _earlier_seconds = 0.0  # of training, before this process
    _began = 0.0
    _resumed: Path | None = None
    _checked: Path | None = None
    _fingerprint: dict[str, Any] | None = None

    def __init__(
        self,
        model: nn.Module | None = None,
        args: DistillationArguments | None = None,
        *,
        teacher: Teacher | str | None = None,
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
        self.teaches_itself = teacher == SELF
        teacher = None if isinstance(teacher, str) else teacher
        self.own_metrics = kwargs.pop("compute_metrics", None)
        sets = eval_dataset if isinstance(eval_dataset, dict) else {}
        check_one_set(args, sets)
        self._follow(args, model, teacher, ignore_index)
        self.ema = None if args.ema_decay is None else StudentEma(args.ema_decay)
        if self.own_metrics is None:  # whose figures nobody knows yet
            beside = {"teacher": teacher is not None, "ema": self.ema is not None}
            names = figure_names(self.id2label, self.settings.weights, **beside)
            check_best_metric(args, names, sets)
        self.epochs = EpochCounter(args.schedule(len(units_of(model)), args.num_train_epochs))
        self.pushes = PushCallback(self)
        freed = ProgressiveUnfreezing(self.epochs, self._projections)
        ours = [self.epochs, freed, *filter(None, [self.ema])]
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
        self.matching = FeatureMatching(args, self.loss_weights, model, self.teacher)
        self.statistics = pixel_statistics(model, args.device)
        self.remove_callback(PrinterCallback if args.disable_tqdm else ProgressCallback)
        self.add_callback(ConsoleLines() if args.disable_tqdm else ConsoleProgress())
        if args.panel_images > 0 and eval_dataset is not None:
            self.add_callback(EvaluationPanels(self, next(iter(sets.values()), eval_dataset)))

    def _follow(
        self, args: DistillationArguments, model: nn.Module, teacher: Any, ignore_index: int
    ) -> None:
        """Set what is derived from the arguments, which a search changes for each trial."""
        weights = args.loss_weights
        alone = weights if teacher is not None else weights.without_teacher()
        self.loss_weights = weights if self.teaches_itself else alone
        # An evaluation has nobody to compare with but a teacher of its own.
        evaluated = alone.without_features()
        self.settings = settings_for(model, ignore_index, evaluated, args.class_factors)
        self.figures = DataSetFigures(self.id2label, self.settings)
        self.tracked = TermSums(self.loss_weights)
        adapts = args.adaptive_weight and teacher is not None
        self.adaptive = AdaptiveWeight() if adapts else None

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

    @property
    def current_weights(self) -> LossWeights:
        """Weights of the loss terms at the running step."""
        weights = self.loss_weights.following(self.schedule.weights(self.state.global_step))
        if self.adaptive is None:
            return weights
        return weights.scaled(self.adaptive.distillation, self.adaptive.task(weights.task))

    # ---- The loss ----

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """Weighted sum of the loss terms; the single terms are kept for the next log."""
        inputs, weights = self._normalised(inputs), self.current_weights
        student_features: dict[str, Tensor] = {}
        teacher_features: dict[str, Tensor] = {}
        if ASKED in inputs:
            teacher = inputs["teacher_logits"]
            if weights.feature_terms:
                self._ask_for_features(inputs, teacher_features)
        else:
            teacher = self._targets(inputs, teacher_features if weights.feature_terms else None)
        hold_frozen(self.model)
        labels, followed = inputs["labels"], inputs.get("distil_mask")
        if followed is None and self.loss_weights.pseudo > 0:
            raise ValueError(
                "Expected distil_mask in every sample with pseudo_weight above 0, got "
                f"{', '.join(inputs)}: it says which pixels without a label are followed. Give it "
                "with the data, bool (H, W)."
            )
        with recorded(self.model, self.matching.of_student, student_features):
            outputs = model(inputs["pixel_values"])
        logits = raw_logits_of(outputs, (labels.shape[-2], labels.shape[-1]))
        terms = distillation_terms(
            logits,
            teacher,
            labels,
            temperature=self.schedule.temperature(self.state.global_step),
            ignore_index=self.settings.ignore_index,
            distil_mask=followed,
            weights=weights,
            pos_weight=self.settings.pos_weight,
            dice_images=inputs.get(DICE_IMAGES),
            pseudo=self.args.pseudo,
            pseudo_images=inputs.get(PSEUDO_IMAGES),
        )
        features = weights.feature_terms
        compared = self.matching.compared(
            student_features, teacher_features, self._distilled(inputs), features
        )
        vars(terms).update(feature_terms(compared))
        loss = weighted_sum(terms, weights)
        if features and not any(weights.without_features().effective().values()):
            # DDP waits for a gradient of each parameter that the output depends on.
            loss = loss + 0.0 * logits.sum()
        self.tracked.add(terms, first_trained(student_features, logits), weights)
        return (loss, {"logits": logits}) if return_outputs else loss

    def _targets(self, inputs: Batch, maps: dict[str, Tensor] | None = None) -> Tensor | None:
        """What the student follows on a batch, as `teacher_logits` gives it; None if nothing."""
        if not self.current_weights.ask_teacher:
            return None
        if self.teaches_itself:
            return self._averaged(inputs)
        # A subclass may have a teacher_logits of its own that knows no maps.
        return self.teacher_logits(inputs) if maps is None else self.teacher_logits(inputs, maps)

    def _ask_for_features(self, inputs: Batch, maps: dict[str, Tensor]) -> None:
        """Ask the teacher for its feature maps alone, of the images as the student sees them."""
        if self.teacher is not None and self.matching.of_teacher:
            self._ask_teacher(self.teacher, inputs["pixel_values"], maps)

    def _distilled(self, inputs: Batch) -> Tensor:
        """The pixels on which student and teacher are compared, bool (B, H, W)."""
        if "distil_mask" in inputs:
            return inputs["distil_mask"]
        valid: Tensor = inputs["labels"] != self.settings.ignore_index
        return valid.flatten(1, -3).any(dim=1) if valid.ndim == 4 else valid

    def teacher_logits(self, inputs: Batch, maps: dict[str, Tensor] | None = None) -> Tensor | None:
        """The teacher's raw logits, fp32 (B, K, H, W), without gradient; None without a teacher.

        Args:
            inputs: a batch on the device, with images that are normalised for the student, and with
                `teacher_logits` where they are cached.
            maps: gets the feature maps that the terms compare, for which the teacher is asked also
                where its logits are cached.

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
            if maps is not None:
                self._ask_for_features(inputs, maps)
            return inputs["teacher_logits"].float()
        return self._ask_teacher(self.teacher, inputs["pixel_values"], maps)

    def _ask_teacher(
        self, teacher: Teacher, pixels: Tensor, maps: dict[str, Tensor] | None
    ) -> Tensor:
        if self._inference is None or self._inference.teacher is not teacher:
            self._inference = self._make_inference(teacher)  # a callback may put another here
        # Without autocast the teacher would run in fp32 beside a bf16 student.
        with torch.no_grad(), self.accelerator.autocast():
            ready = self._inference.ready(pixels)
            places = () if maps is None else self.matching.of_teacher
            with recorded(ready.network, places, {} if maps is None else maps):
                logits: Tensor = ready(pixels)
                return logits

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
        batches = [self._as_seen(batch) if has_views(batch) else batch for batch in batches]
        self.matching.heads.zero_grad()  # the Trainer knows the student's gradients alone
        if batches and all("labels" in batch for batch in batches):
            counts = {DICE_IMAGES: labelled_images}
            if self.loss_weights.pseudo > 0 and all("distil_mask" in batch for batch in batches):
                counts[PSEUDO_IMAGES] = unlabelled_images
            for name, count in counts.items():
                images = count(batches, self.settings.ignore_index).to(self.args.device)
                images = self.accelerator.reduce(images, reduction="mean")
                batches = [{**batch, name: images} for batch in batches]
        return batches, items

    def _as_seen(self, batch: Batch) -> Batch:
        """The batch as the student sees it, with what the teacher says of the images as they are.

        Before the step and not in its loss, because mixing decides which images have labels.
        """
        batch = self._prepare_inputs(batch)
        teacher = self._targets(self._normalised(batch))
        classes = None if teacher is None or self.settings.multi_label else classes_of(teacher)
        batch = {**batch, "teacher_logits": teacher, ASKED: True}
        return student_batch(batch, classes, ignore_index=self.settings.ignore_index)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """With `--labelled_share` one of ours: each batch then has its share of masks."""
        if self.args.labelled_share is None:
            return super()._get_train_sampler(train_dataset)
        dataset = self.train_dataset if train_dataset is None else train_dataset
        # Asked in each epoch: how long the run is follows from how long the sampler is.
        return quota_sampler(dataset, self.args, lambda e: self.schedule.planned_epoch(e))

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

    def _projections(self) -> NamedParameters:
        """What the terms on features train beside the student.

        Clipping leaves them alone: it would hold the student back while they are still random.
        """
        return self.matching.parameters()

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Its groups are those of the free parts; `ProgressiveUnfreezing` adds the others."""
        self.matching.prepare(self.accelerator)
        if self.optimizer is not None and self.lr_scheduler is not None:
            return self.optimizer  # of the running training
        free = self.schedule.free_units(self.epochs.index)
        if self._resumed is not None:  # the state that is loaded next has the groups of its save
            free = self._saved_progress()["free_units"]
        groups = parameter_groups(self.model, self.args, free, self._projections())
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

    # ---- The training and its epochs ----

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Train as the Trainer does; a checkpoint is checked first.

        Raises:
            FileNotFoundError: if there is no checkpoint to go on from.
            ValueError: if it is damaged, or that of another run.
            Stopped: after a request to stop, once a checkpoint is saved.
        """
        if not self._has_trained:  # an evaluation before it would pass for DDP's preparation
            reset_accelerate_prepare(self.model)
            self.model_wrapped, self._took_model, self._has_trained = self.model, True, True
        if self.args.torch_compile:
            allow_recompiles(self.epochs.schedule.unfreezing.units)
        if resume_from_checkpoint is True:
            resume_from_checkpoint = str(newest_checkpoint(self.args).folder)
        self._resumed = Path(resume_from_checkpoint) if resume_from_checkpoint else None
        if self._resumed is not None:
            self.check_resume(self._resumed)
        elif trial is None:
            self._fingerprint = self.fingerprint()
        resuming = ResumeCallback(self)
        self.add_callback(resuming)
        try:
            with naming_dead_processes(self), loading_safely(self._resumed):
                resumed = str(self._resumed) if self._resumed else None
                return super().train(resumed, trial, ignore_keys_for_eval)
        except Stopped:
            self.callback_handler.on_train_end(self.args, self.state, self.control)  # boards, bars
            raise
        finally:
            self.remove_callback(resuming)

    def _take_model(self) -> None:
        """Forget, once, that another Trainer of this process has trained the same student."""
        if not self._took_model:
            reset_accelerate_prepare(self.model)
            self._took_model = True

    def set_initial_training_values(self, args: Any, dataloader: DataLoader) -> tuple[Any, ...]:
        """As many epochs as `--max_steps` can need: one may be as short as a single step."""
        values = super().set_initial_training_values(args, dataloader)
        use_safe_layers(self.model)  # no constructor changes a network, and this may be a new one
        if self._trial is not None:
            self._follow(args, self.model, self.teacher, self.settings.ignore_index)
            self.matching = FeatureMatching(args, self.loss_weights, self.model, self.teacher)
            units = len(units_of(self.model))
            self.epochs.schedule = args.schedule(units, args.num_train_epochs)
        self.epochs.start(args, self.state, steps=values[1])
        if self.ema is not None:
            self.ema.start(self.model)
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

    # ---- The checkpoints: complete or not there, and gone on from bit for bit ----

    def fingerprint(self) -> dict[str, Any]:
        """What makes this run the one it is, as plain values."""
        student = self.accelerator.unwrap_model(self.model)
        data = {"train": self.train_dataset, "eval": self.eval_dataset}
        run = fingerprint_of(self.args, student, self.teacher, data, self.facts)
        return run | ({"teacher_weights": SELF} if self.teaches_itself else {})

    def check_resume(self, checkpoint: Path) -> None:
        """Refuse a checkpoint that this run cannot go on from: see `check_resumable`."""
        if self._checked == checkpoint:
            return
        self._fingerprint = self.fingerprint()
        check_resumable(checkpoint, self._fingerprint, self.args)
        self._checked = checkpoint

    def check_finite(self) -> None:
        """Raise FloatingPointError if a loss term since the last log, or a weight, went bad."""
        self.tracked.check_finite(self.state.global_step)
        check_finite_weights(self.model, f"after step {self.state.global_step}")

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save as the Trainer does; beside the weights of a module what it has to be told."""
        super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            folder = Path(output_dir or str(self.args.output_dir))
            save_traits(self.accelerator.unwrap_model(self.model), folder)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save, declare it complete, and only then let older ones go.

        The Trainer writes in place and deletes before it is done: a kill would leave half a
        checkpoint, or none. Nothing non-finite is ever kept.
        """
        run_on_all_ranks(self.args, self.check_finite)
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"

        def write() -> None:
            folder.mkdir(parents=True, exist_ok=True)
            self._save_progress(folder)  # first: without it a folder is no half save of ours
            if self.ema is not None and self.args.should_save:
                self.ema.save(folder)
            if self.args.process_index == 0:
                self.matching.save(folder)
            with no_stock_rotation(self.args):
                super(DistillationTrainer, self)._save_checkpoint(model, trial)

        save_checkpoint(
            folder,
            write,
            self.args,
            run=lambda: self._fingerprint or self.fingerprint(),
            best=lambda: self.state.best_model_checkpoint,
        )

    def _save_progress(self, folder: Path) -> None:
        """What this process has summed up, and where in its epochs the run is."""
        progress = {
            "seconds": self._seconds(),
            "loss": self._tr_loss,
            "total_loss": self._total_loss_scalar,
            "last_logged": self._globalstep_last_logged,
            "terms": self.tracked.saved(),
            "position": self.epochs.position(self.state, self.control, self.train_dataset),
            "free_units": free_units(self.model),
            "adaptive": asdict(self.adaptive) if self.adaptive is not None else {},
        }
        torch.save(progress, progress_file(folder, self.args))

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """With `save_strategy best` this alone decides on a save: a stop needs one in any case."""
        best = super()._determine_best_metric(metrics, trial)
        return best or (self.stop is not None and self.stop.agreed)

    def restore(self) -> None:
        """Set what the Trainer starts at zero, private fields too, to what it was at the save."""
        self.peers = processes_of_run()
        self._began, self._earlier_seconds = time.monotonic(), 0.0
        if self.adaptive is not None:
            self.adaptive = AdaptiveWeight(**self._saved_progress().get("adaptive", {}))
        if self._resumed is None:
            return
        # Steps between logs and evaluations are the old run's in the file; a new logging counts.
        self.state.compute_steps(self.args, self.state.max_steps)
        best = best_checkpoint(self._resumed)
        self.state.best_model_checkpoint = None if best is None else str(best)
        self.args.eval_on_start = False  # the log of it is in the checkpoint
        saved = self._saved_progress()
        self._earlier_seconds = saved["seconds"]
        self._tr_loss = saved["loss"].to(self.args.device)
        self._total_loss_scalar = saved["total_loss"]
        self._globalstep_last_logged = saved["last_logged"]
        self._initial_global_step = 0  # so that means and speeds are those of the whole run
        self.tracked.restore(saved["terms"], self.args.device)
        if self.ema is not None:
            self.ema.restore(self._resumed)

    def _saved_progress(self) -> dict[str, Any]:
        return read_progress(self._resumed, self.args) if self._resumed else {}

    def _seconds(self) -> float:
        """Seconds of training so far: the clock on the wall may be set meanwhile."""
        return self._earlier_seconds + time.monotonic() - self._began

    def _init_training_state(
        self, max_steps: int, steps_per_epoch: int, epochs: int, *rest: Any
    ) -> tuple[int, int]:
        """Start in the counted epoch, after the batches of it that were trained on.

        The Trainer divides by the length of an epoch: after a short one a resumed run would start
        in an earlier one. It also warns of a best checkpoint that moved, which `restore` finds.
        """
        with without_warnings():
            index, _ = super()._init_training_state(max_steps, steps_per_epoch, epochs, *rest)
        batches = 0
        if self._resumed is not None:
            saved = self._saved_progress()["position"]
            index, first_step = saved["epoch"], saved["first_step"]
            self.epochs.go_on(index, first_step)
            if not self.args.ignore_data_skip:
                steps = self.state.global_step - first_step
                batches = steps * self.args.gradient_accumulation_steps
            if isinstance(self.train_dataset, StreamedDataset):
                self.train_dataset.restore([BadSample(**bad) for bad in saved["bad_samples"]])
        if 0 < self.args.max_steps <= self.state.global_step:
            index = epochs  # nothing is left to do
        return index, batches

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        """Under the names that a stock model has now.

        transformers saves some models under the names of their first release, and the Trainer only
        warns of names that it does not know: the run would go on from other weights.
        """
        self.matching.load(resume_from_checkpoint)
        if not load_renamed(self.model, resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        """Likewise, and the average that was saved with it."""
        best = str(self.state.best_model_checkpoint)
        if not load_renamed(self.model, best):
            super()._load_best_model()
        if self.ema is not None:
            self.ema.restore(Path(best))

    def _finalize_training(self, trial: Any, num_train_samples: Any, start_time: float) -> Any:
        """Count the seconds of the parts before as well, by a clock that nobody can set.

        The Trainer knows those of this process alone, and with a limit of 1 it would delete the
        newest checkpoint here.
        """
        with no_stock_rotation(self.args):
            start = time.time() - self._seconds()  # which is subtracted from time.time()
            return super()._finalize_training(trial, num_train_samples, start)

    # ---- The evaluation ----

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate as the Trainer does, and leave the random state as it was found.

        Without that, a run that is evaluated would see other DropPath draws than one that is not.
        All processes measure the student that the first one saves: each has BatchNorm statistics
        of its own, which DDP takes from the first one at the next step anyway.
        """
        share_buffers(self.model)
        with torch.random.fork_rng():
            figures = super().evaluate(*args, **kwargs)
        if self.adaptive is not None and self.is_in_train:
            self.adaptive.update(figures["eval_miou"], figures["eval_teacher_miou"])
        return figures

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
        if (average := self._averaged(inputs)) is not None:
            rows = (*rows, student_rows(average, labels, self.settings))
        return None, rows, torch.zeros(len(labels), device=labels.device)

    @property
    def _has_average(self) -> bool:
        return self.ema is not None and self.ema.network is not None

    def _averaged(self, inputs: Batch) -> Tensor | None:
        """Raw logits of the moving average for a batch on the device; None without one."""
        if self.ema is None or self.ema.network is None:
            return None
        with self.accelerator.autocast():
            return self.ema(self._normalised(inputs)["pixel_values"])

    def predict_masks(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """What student and teacher (if any) find in a batch of the collator, see `masks_of`."""
        self._take_model()
        student, teacher = self._logits(self.model.eval(), self._prepare_inputs(batch))
        found = partial(masks_of, multi_label=self.settings.multi_label)
        return found(student), None if teacher is None else found(teacher)

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
        last = rows[-1]  # of the average, or all logits
        if self._keeps_logits or self._has_average:
            rows = rows[:-1]
            prediction = EvalPrediction(predictions=rows, label_ids=prediction.label_ids)
        figures = self.figures(rows, self.teacher, self.callback_handler.eval_dataloader)
        if self._has_average and not self._keeps_logits:
            figures |= self.figures.of_average(last)
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
                self._projections(),
            )
            logs |= self.adaptive.logs() if self.adaptive is not None else {}
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
