"""The settings of a distillation, and the only place with their defaults.

The defaults are the recipe `rgb_hierarchical_unet_v2_distillation_b0_from_b3_temp_prog`; a YAML
recipe or a flag overrides them (see `config`).
"""

from __future__ import annotations

import math
import os
import sys
from dataclasses import dataclass
from typing import Any

import torch
from transformers import SchedulerType, TrainingArguments

from kd_trainer.argument_checks import (
    check_class_weights,
    check_ema,
    check_ends,
    check_features,
    check_hub,
    check_labelled_share,
    check_pseudo,
    check_rate_shape,
    check_reports,
    check_run,
    check_staged,
    check_sync_batchnorm,
    check_targets,
    check_weight_schedule,
    rate_options,
)
from kd_trainer.fields import check_at_least, check_choice, expanded, help_field, parse_point
from kd_trainer.losses import SCHEDULED, TERMS, LossWeights, PseudoLabels
from kd_trainer.schedules import (
    LabelledShare,
    TemperatureSchedule,
    TrainingSchedule,
    UnfreezeSchedule,
    WeightSchedule,
    read_weight_schedules,
)

BALANCED = ["balanced"]
PRECISIONS = ("auto", "bf16", "fp16", "no")
MOST_WORKERS = 8


@dataclass
class DistillationArguments(TrainingArguments):
    """`transformers.TrainingArguments` with the recipe's defaults and the distillation's fields."""

    # The loss.
    kl_weight: float = help_field(0.3, "Weight of the temperature-scaled KL.")
    mse_weight: float = help_field(0.5, "Weight of the MSE between logits.")
    bce_weight: float = help_field(0.5, "Weight of the BCE (cross entropy for several classes).")
    dice_weight: float = help_field(1.0, "Weight of the Dice loss.")
    focal_weight: float = help_field(0.0, "Weight of the focal loss (gamma 2).")
    lovasz_weight: float = help_field(0.0, "Weight of the Lovász loss, a surrogate of 1 - IoU.")
    tversky_weight: float = help_field(
        0.0, "Weight of the Tversky loss, a Dice in which a miss costs more than a false alarm."
    )
    cwd_weight: float = help_field(0.0, "Weight of the channel-wise KL of the logits (3, say).")
    dist_intra_weight: float = help_field(
        0.0, "Weight of 1 - correlation with the teacher over the pixels of a class (1, say)."
    )
    dist_inter_weight: float = help_field(
        0.0, "Weight of 1 - correlation with the teacher over the classes, from 3 on (1, say)."
    )
    dkd_weight: float = help_field(
        0.0, "Weight of the decoupled KL, from 3 classes on (1, say, with a warm-up)."
    )
    boundary_kl_weight: float = help_field(
        0.0, "Weight of the KL that counts more near boundaries (0.3, say)."
    )
    fitnet_weight: float = help_field(
        0.0,
        "Weight of FitNet: the student's feature maps, projected, follow the teacher's (try 2). "
        "A stage counts from when the encoder's unit is free.",
    )
    at_weight: float = help_field(
        0.0, "Weight of attention transfer: where feature maps are large (try 2)."
    )
    feature_cwd_weight: float = help_field(
        0.0, "Weight of the channel-wise distillation of feature maps, T = 4 (try 50)."
    )
    mgd_weight: float = help_field(
        0.0, "Weight of MGD: the teacher's feature maps from a quarter of the student's (try 2)."
    )
    feature_pairs: list[str] | None = help_field(
        None,
        "Feature maps to compare, STUDENT=TEACHER by names of modules (default: the encoders' "
        "stages of stride 8, 16 and 32, and what the decoders end with).",
        metavar="STUDENT=TEACHER",
    )
    task_weight: float = help_field(1.0, "Common factor of the terms that compare with labels.")
    pos_weight: float | None = help_field(None, "Weight of the foreground in a binary BCE.")
    class_weights: list[str] | None = help_field(
        None,
        "Weights of the classes in the BCE (cross entropy): one number a class, background first, "
        "or `balanced`, which measures their shares in the training masks.",
    )
    # Images without masks.
    pseudo_weight: float = help_field(
        0.0,
        "Factor of the terms that compare with labels where the teacher's answers stand for them, "
        "on images without a mask; 0 leaves these to the KL and the MSE.",
    )
    pseudo_labels: str = help_field(
        "hard", "What stands for a label there: the teacher's class (`hard`) or its probabilities."
    )
    pseudo_confidence: float = help_field(
        0.0, "Leave pixels out at which the teacher's class has less than this probability."
    )
    labelled_share: list[str] | None = help_field(
        None,
        "Share of the images of each batch that have masks, repeated as often as the others need: "
        "a number, or EPOCH:SHARE points (0:0.5 36:1 ends with masks alone); default: as it comes.",
    )
    weight_schedule: list[str] | None = help_field(
        None,
        "Weights that change over the run, in place of those above: NAME=EPOCH:WEIGHT,... for a "
        "term or `task`, linear between the points; two points of one epoch are a jump.",
        metavar="NAME=POINTS",
    )
    adaptive_weight: bool = help_field(
        False,
        "Fade the terms that need the teacher, and switch them off, where the student's mIoU is "
        "above the teacher's at two evaluations in a row; below it they are back.",
    )
    # The teacher's answers.
    teacher_targets: str = help_field(
        "online",
        "Ask the teacher in each step (`online`), or once for each clean image, before the "
        "training (`cached`): its logits are kept on the disk and follow flips and affine changes, "
        "while colour and noise change only what the student sees.",
    )
    teacher_cache: str | None = help_field(
        None, "Folder of cached logits, shared by runs (default: kd_trainer in the user's cache)."
    )
    teacher_cache_size: str = help_field(
        "20GB", "Most that the logits of all teachers in that folder may take."
    )
    fold_teacher: bool = help_field(
        True,
        "Ask a copy of the teacher whose BatchNorms are folded into its convolutions and whose "
        "weights are cast once; its logits differ by rounding.",
    )
    compile_teacher: bool = help_field(
        False, "torch.compile the teacher (the student: --torch_compile)."
    )
    # Temperature.
    temperature_schedule: str = help_field(
        "cosine", "cosine, linear, exponential, constant or piecewise."
    )
    temperature_start: float = help_field(4.0, "Temperature of the first epoch.")
    temperature_end: float = help_field(1.0, "Temperature of the last epoch.")
    temperature_points: list[str] | None = help_field(
        None, "Piecewise schedule: EPOCH:TEMPERATURE pairs, epochs from 0 to the last one."
    )
    temperature_per: str = help_field("epoch", "Move the temperature each `epoch` or each `step`.")
    unfreeze_start_epoch: int = help_field(
        5, "Epoch index at which the deepest encoder unit is freed."
    )
    unfreeze_every: int = help_field(
        3, "Epochs from one encoder unit to the next; 0 frees all at the start epoch."
    )
    unfreeze_warmup_epochs: float = help_field(
        0.0, "Linear ramp of a unit's learning rate after it is freed, in epochs."
    )
    plan_epochs: float | None = help_field(
        None,
        "Epochs that warm-up, unfreezing, weights and --labelled_share are written for (the "
        "recipes: 50): scale them to those of the run, or to --max_steps.",
    )
    # Optimisation.
    learning_rate: float = help_field(1e-4, "Base learning rate of decoder and head.")
    encoder_lr_scale: float = help_field(0.3, "Encoder learning rate as a share of the decoder's.")
    projection_learning_rate: float | None = help_field(
        None, "Learning rate of the projections of feature maps (default: the decoder's)."
    )
    min_learning_rate: float = help_field(1e-6, "Where the rates end (encoder: its share of it).")
    warmup_epochs: float = help_field(5.0, "Linear warm-up in epochs.")
    weight_decay: float = help_field(1e-4, "AdamW weight decay (none on one-dimensional weights).")
    max_grad_norm: float = help_field(5.0, "Gradient clipping over all trainable parameters.")
    lr_scheduler_type: str = help_field(
        "cosine",
        "How the learning rates fall after the warm-up: cosine, linear, polynomial, "
        "cosine_with_restarts, constant or constant_with_warmup.",
    )
    lr_scheduler_kwargs: dict[str, Any] | str | None = help_field(
        None, 'Options of it as JSON: {"power": 0.9} of polynomial, {"num_cycles": 3} of restarts.'
    )
    ema_decay: float | None = help_field(
        None,
        "Keep a moving average of the student too, with this decay a step (0.999, say): measured "
        "beside it as ema_miou, ..., and saved beside it in ema/.",
    )
    # The run.
    output_dir: str = help_field("", "Where everything goes (default: runs/<recipe>).")
    num_train_epochs: float = help_field(50, "Epochs.", aliases=["--epochs"])
    per_device_train_batch_size: int = help_field(
        4, "Images per step and device.", aliases=["--batch_size"]
    )
    mixed_precision: str = help_field(
        "",
        "bf16, fp16 or no; without a value (auto) bf16 where it runs, else fp16.",
        nargs="?",
        const="auto",
    )
    resume: str | None = help_field(
        None,
        "Go on after an interruption: without a value from the newest complete checkpoint in the "
        "output folder, with `auto` likewise or from the start if there is none, else from this "
        "checkpoint-N folder. Give the settings of the run again "
        "(--config OUTPUT/config.yaml); other ones that change what is learned are refused.",
        nargs="?",
        const="latest",
    )
    no_preflight: bool = help_field(
        False, "Start without the checks of scripts/doctor.py, which take seconds."
    )
    save_strategy: str = help_field("epoch", "Save each epoch, every --save_steps, or no.")
    save_total_limit: int | None = help_field(2, "Checkpoints kept (the best is among them).")
    dataloader_num_workers: int = help_field(
        None, "Processes that read the data (default: none on a CPU, up to 8 for a GPU)."
    )
    dataloader_persistent_workers: bool = help_field(
        None, "Keep them between epochs (default: yes, where there are any)."
    )
    keep_freed_memory: bool = help_field(
        True,
        "On a CPU, keep the memory that a step frees for the next one instead of giving it back "
        "to the system (glibc only; it holds for the whole process).",
    )
    sync_batchnorm: bool = help_field(
        False, "One BatchNorm statistic over all GPUs, for small batches on each."
    )
    # Evaluation and report.
    eval_strategy: str = help_field("epoch", "Evaluate each epoch, every --eval_steps, or no.")
    logging_steps: float = help_field(10, "Log every so many steps.")
    per_device_eval_batch_size: int = help_field(
        4, "Images per evaluation step and device.", aliases=["--eval_batch_size"]
    )
    load_best_model_at_end: bool = help_field(True, "Keep the student of the best evaluation.")
    metric_for_best_model: str | None = help_field("miou", "What `best` means.")
    greater_is_better: bool | None = help_field(
        None, "Whether more of it is better (default: unless it is a loss or a term of the loss)."
    )
    report_to: None | str | list[str] = help_field(  # noqa: RUF036  (as HfArgumentParser needs it)
        "tensorboard", "tensorboard, none, wandb, ..."
    )
    panel_images: int = help_field(4, "Pictures in the panel drawn at each evaluation; 0 = none.")
    panel_limit: int = help_field(
        2, "Panels kept in the output folder (that of the best student is among them); 0 = all."
    )
    report: bool = help_field(True, "Write report.html at the end: curves, images, reliability.")
    # Publishing.
    push_to_hub: bool = help_field(False, "Push the student with its card to the Hub.")
    hub_model_id: str | None = help_field(None, "Where to push it: OWNER/NAME.")
    hub_license: str | None = help_field(
        None, "Licence of the student, as the Hub writes it (needed to push): apache-2.0, mit, ..."
    )
    hub_strategy: str = help_field(
        "end", "Push at the `end` only, or the student of `every_save` during training too."
    )
    hub_private_repo: bool | None = help_field(
        True, "Push to a private repository; `false`: to a public one."
    )
    hub_pictures: bool = help_field(
        False,
        "Also publish the panel, which shows images of the evaluation data.",
        aliases=["--pictures"],
    )
    # What the Trainer must not do behind our back: each stock default is a silent trap.
    logging_nan_inf_filter: bool = help_field(False, "Off: it hides NaN and syncs every step.")
    remove_unused_columns: bool = help_field(False, "Off: the data set gives what is needed.")
    dataloader_drop_last: bool = help_field(True, "A short last batch would shift the mean loss.")
    label_names: list[str] | None = help_field(None, "Set to `labels`.")
    # Units are frozen after the DDP wrap.
    ddp_find_unused_parameters: bool | None = help_field(True, "Needed by staged unfreezing.")

    def __post_init__(self) -> None:
        self.output_dir = expanded(self.output_dir or "runs/distillation")
        self.teacher_cache, self.resume = expanded(self.teacher_cache), expanded(self.resume)
        self._check_schedules()
        set_loading(self, on_gpu=torch.cuda.is_available() and not self.use_cpu)
        check_run(self)
        check_targets(self)
        check_ema(self)
        check_hub(self)
        self._set_precision()
        if self.data_seed is None:
            self.data_seed = self.seed  # else the order of the data depends on torch's global RNG
        if self.label_names is None:
            self.label_names = ["labels"]
        if self.eval_strategy == "no" or self.save_strategy == "no":
            self.load_best_model_at_end = False
        if self.use_cpu or not torch.cuda.is_available():
            self.dataloader_pin_memory = False  # there is nothing to pin for
        if self.unfreeze_start_epoch > 0 or self.unfreeze_every > 0:
            check_staged(self)  # before transformers looks for a DeepSpeed that is not installed
        if self.greater_is_better is None and self.metric_for_best_model is not None:
            self.greater_is_better = not self._best_is_a_loss
        wanted = self.mixed_precision
        super().__post_init__()
        check_reports(self)
        check_features(self)
        on_gpu = torch.cuda.is_available() and not self.use_cpu
        check_sync_batchnorm(self, on_gpu=on_gpu)
        # The flag wins over the accelerate configuration, which arrives through the environment.
        self.mixed_precision = wanted or self.mixed_precision
        self._check_precision()

    def _check_schedules(self) -> None:
        check_weight_schedule(self)
        check_pseudo(self)
        self.pseudo.check(self.loss_weights.effective())
        self.temperature  # noqa: B018
        check_labelled_share(self)
        check_class_weights(self)
        check_ends(self)
        check_choice("temperature_per", self.temperature_per, ("epoch", "step"))
        rates = ("encoder_lr_scale", "min_learning_rate", "warmup_epochs")
        staged = ("unfreeze_warmup_epochs", "unfreeze_start_epoch", "unfreeze_every")
        for name in (*rates, *staged):
            check_at_least(name, getattr(self, name), 0)
        if self.plan_epochs is not None and not 0 < self.plan_epochs < math.inf:
            raise ValueError(
                f"Expected --plan_epochs above 0, got {self.plan_epochs:g}. Name the epochs that "
                "warm-up and unfreezing are written for, or leave it out."
            )
        if self.projection_learning_rate is not None:
            check_at_least("projection_learning_rate", self.projection_learning_rate, 0)
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(
                f"Expected --min_learning_rate of at most the learning rate {self.learning_rate:g},"
                f" got {self.min_learning_rate:g}."
            )
        check_rate_shape(self)
        if self.warmup_steps:
            raise ValueError(
                f"Expected a warm-up as --warmup_epochs, got --warmup_steps {self.warmup_steps}. "
                "The learning rates are set by --learning_rate, --min_learning_rate and "
                "--warmup_epochs."
            )

    def _set_precision(self) -> None:
        asked = [name for name in ("bf16", "fp16") if getattr(self, name)]
        told = [f"--{name}" for name in asked]
        told += [f"--mixed_precision {self.mixed_precision}"] if self.mixed_precision else []
        if len({*asked, self.mixed_precision} - {""}) > 1:
            raise ValueError(f"Expected one precision, got {' and '.join(told)}. Leave one out.")
        self.mixed_precision = self.mixed_precision or "".join(asked)  # what is saved
        if not self.mixed_precision:
            return  # what the accelerate configuration says
        on_cpu = self.use_cpu or not torch.cuda.is_available()
        if self.mixed_precision == "auto":
            # A CPU always computes bf16, if not always faster; its fp16 would silently be fp32.
            bf16 = on_cpu or torch.cuda.is_bf16_supported(including_emulation=False)
            self.mixed_precision = "bf16" if bf16 else "fp16"
        self._check_precision()
        self.use_cpu = on_cpu  # the Trainer refuses bf16 on a CPU that was not asked for
        self.bf16 = self.mixed_precision == "bf16"
        self.fp16 = self.mixed_precision == "fp16"

    def _check_precision(self) -> None:
        check_choice("mixed_precision", self.mixed_precision, PRECISIONS)
        on_cpu = self.use_cpu or not torch.cuda.is_available()
        if on_cpu and (self.fp16 or self.mixed_precision == "fp16"):
            raise ValueError(
                "Expected --mixed_precision bf16 or no on a CPU, got fp16, which would run in "
                "fp32. Use bf16, here or in the accelerate configuration."
            )

    @property
    def _best_is_a_loss(self) -> bool:
        """Whether the best student is the one with least of its metric."""
        name = str(self.metric_for_best_model).removeprefix("eval_")
        # Of several evaluation sets each figure begins with the name of its set.
        terms = [term.evaluated_as for term in TERMS]
        return name.endswith("loss") or any(f"_{name}".endswith(f"_{term}") for term in terms)

    @property
    def teacher_backend(self) -> str | None:
        """Backend of torch.compile for the teacher; None leaves it as it is."""
        return (self.torch_compile_backend or "inductor") if self.compile_teacher else None

    @property
    def loss_weights(self) -> LossWeights:
        """Weights of the loss terms; of those that follow a schedule the highest."""
        weights = vars(LossWeights.of(vars(self)))
        return LossWeights(**weights | {n: s.peak for n, s in self.weight_schedules.items()})

    @property
    def weight_schedules(self) -> dict[str, WeightSchedule]:
        """Schedules of the weights that have one, by the name of the term."""
        return read_weight_schedules(self.weight_schedule, SCHEDULED)

    @property
    def pseudo(self) -> PseudoLabels:
        """What stands for labels on images without a mask."""
        return PseudoLabels(self.pseudo_labels, self.pseudo_confidence)

    @property
    def class_factors(self) -> float | tuple[float, ...] | None:
        """What the cross entropy multiplies: the foreground of one logit, or each of the classes.

        Raises:
            ValueError: if they are still to be measured, which `build_run` does.
        """
        if self.class_weights is None:
            return self.pos_weight
        if self.class_weights == BALANCED:
            raise ValueError(
                "Expected numbers as class_weights, got balanced, which scripts/train.py measures. "
                "Give one number a class."
            )
        factors = tuple(map(float, self.class_weights))
        return factors[1] / factors[0] if len(factors) == 2 else factors  # two: one logit

    @property
    def labelled_schedule(self) -> LabelledShare | None:
        """Share of the images of a batch that have masks, by epoch; None takes them as they come.

        Raises:
            ValueError: if it is none.
        """
        if self.labelled_share is None:
            return None
        points, like = self.labelled_share, "--labelled_share like 0.5, or 0:0.5 36:1"
        points = [f"0:{points[0]}"] if len(points) == 1 and ":" not in points[0] else points
        return LabelledShare([parse_point(point, like) for point in points])

    @property
    def temperature(self) -> TemperatureSchedule:
        """Temperature as a function of the run's progress."""
        points = tuple(parse_point(p) for p in self.temperature_points or ())
        start, end = self.temperature_start, self.temperature_end
        if self.temperature_schedule == "piecewise" and points:
            start, end = points[0][1], points[-1][1]
        return TemperatureSchedule(self.temperature_schedule, start, end, points)

    def unfreezing(self, units: int) -> UnfreezeSchedule:
        """When each of `units` encoder units is freed."""
        return UnfreezeSchedule(self.unfreeze_start_epoch, self.unfreeze_every, units)

    def schedule(self, units: int, epochs: float, steps_per_epoch: int = 1) -> TrainingSchedule:
        """When what happens in a run of this length, whose student has `units` encoder units."""
        return TrainingSchedule(
            unfreezing=self.unfreezing(units),
            temperatures=self.temperature,
            epochs=epochs,
            steps_per_epoch=steps_per_epoch,
            temperature_per=self.temperature_per,
            warmup_epochs=self.warmup_epochs,
            unfreeze_warmup_epochs=self.unfreeze_warmup_epochs,
            min_rate=self.min_learning_rate / self.learning_rate,
            rate_shape=SchedulerType(self.lr_scheduler_type).value,
            rate_options=rate_options(self),
            plan_epochs=self.plan_epochs,
            weight_schedules=self.weight_schedules,
        )


def usable_processors() -> int:
    """Processors this process may use, which may be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def set_loading(args: Any, on_gpu: bool) -> None:
    """Fill in processes that read, whether they stay, and copies that do not wait.

    On a CPU a reading process only takes a core from the training. A GPU would wait for a single
    one: an image of the heavy augmentation takes about 10 ms at 640 px. Draws do not depend on any
    of this.

    Args:
        args: gets `dataloader_num_workers`, `dataloader_persistent_workers`, `accelerator_config`.
        on_gpu: whether the training runs on one.
    """
    if args.dataloader_num_workers is None:
        here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        cores = usable_processors() // max(here, 1)
        args.dataloader_num_workers = min(MOST_WORKERS, max(1, cores - 1)) if on_gpu else 0
    if args.dataloader_persistent_workers is None:
        args.dataloader_persistent_workers = args.dataloader_num_workers > 0
    if on_gpu and args.accelerator_config is None:
        args.accelerator_config = {"non_blocking": True}  # from pinned memory
