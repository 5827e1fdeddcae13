"""Combinations of training settings that cannot work, refused before anything is loaded."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import re
from collections.abc import Collection, Mapping
from typing import Any

from transformers import SchedulerType

from kd_trainer.fields import check_at_least, check_choice, check_folder, parse_size
from kd_trainer.losses import FEATURE_TERMS, TERMS, LossWeights
from kd_trainer.models.image_sizes import as_size, plain_size
from kd_trainer.schedules import RATE_SHAPES, WeightSchedule

_NO_RECOMPUTING = (
    "networks of smp cannot recompute their activations. To save memory, lower --batch_size and "
    "raise --gradient_accumulation_steps"
)
# Fields of TrainingArguments that would fail in the Trainer, or be taken and do nothing.
UNUSABLE = {
    "gradient_checkpointing": _NO_RECOMPUTING,
    "activation_checkpointing": _NO_RECOMPUTING,
    "batch_eval_metrics": "an evaluation keeps counts instead of logits already. Leave it out",
    "eval_do_concat_batches": "the counts of all batches are added up. Leave it out",
    "prediction_loss_only": "the best student is found by its metrics. Leave it out",
    "fsdp": "units are frozen and freed during the run, which is tested with DDP only. Leave it "
    "out; accelerate_configs/multi_gpu.yaml is for several GPUs",
    "use_liger_kernel": "its kernels are for language models. Leave it out",
    "neftune_noise_alpha": "it is noise for the embeddings of words. Leave it out",
    "label_smoothing_factor": "the loss is a sum of our own terms on hard labels. Leave it out; "
    "the soft labels are those of the teacher (--kl_weight)",
    "optim_target_modules": "the groups of the optimizer are the encoder's units. Leave it out",
    "save_only_model": "no run could go on from such a checkpoint. Leave it out; fewer of them are "
    "kept with --save_total_limit",
    "ignore_data_skip": "a resumed run would see the first images of its epoch again. Leave it out",
    "restore_callback_states_from_checkpoint": "what our callbacks do follows from the epoch. "
    "Leave it out",
    "enable_jit_checkpoint": "SIGTERM and Ctrl-C save a checkpoint here anyway. Leave it out",
    "auto_find_batch_size": "another batch size is another run, which could not be resumed. Say "
    "how many images fit with --batch_size",
    "bf16_full_eval": "a student is measured in the precision it is trained in. Set "
    "--mixed_precision, and leave it out",
    "fp16_full_eval": "a student is measured in the precision it is trained in. Set "
    "--mixed_precision, and leave it out",
    "do_train": "scripts/train.py always trains. Leave it out",
    "do_predict": "a training predicts nothing. Leave it out, and use scripts/predict.py",
    "resume_from_checkpoint": "it has another name here. Use --resume",
}
_UNSAID = (
    "config.yaml would not say that the student is compiled. Leave it out of the accelerate "
    "configuration"
)
# What `accelerate launch` would change in a run behind its flags.
LAUNCHER = {
    "ACCELERATE_DYNAMO_BACKEND": f"{_UNSAID}, and use --torch_compile_backend",
    "ACCELERATE_DYNAMO_MODE": f"{_UNSAID}, and use --torch_compile_mode",
    "ACCELERATE_DYNAMO_USE_FULLGRAPH": _UNSAID,
    "ACCELERATE_DYNAMO_USE_DYNAMIC": _UNSAID,
    "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION": _UNSAID,
    "FSDP_ACTIVATION_CHECKPOINTING": _NO_RECOMPUTING,
}
_UNSET = ("", "no", "default", "false", "0")  # the launcher sets each of them, if to nothing


FlagSize = int | str | list[int] | list[str]
"""Type of a field that holds the size of an image; its parser wants `str` second."""
SMALLEST_SIDE = 32


def image_size(flag: str, value: FlagSize) -> int | list[int]:
    """The size that a flag or a recipe names, as files hold it.

    Raises:
        ValueError: if it is none, or a side has less than `SMALLEST_SIDE` pixels.
    """
    try:
        size = as_size(value)
    except ValueError as error:
        raise ValueError(str(error).replace("Expected", f"Expected --{flag} to be", 1)) from None
    for side in size:
        check_at_least(flag, side, SMALLEST_SIDE)
    return plain_size(size)


def check_launcher() -> None:
    """Refuse settings of the accelerate configuration that are no flags of ours."""
    for name, reason in LAUNCHER.items():
        value = os.environ.get(name, "")
        if value.lower() not in _UNSET:
            raise ValueError(f"Expected no {name}, got {value}: {reason}.")
    sharded = os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
    if sharded and os.environ.get("FSDP_VERSION", "1") != "2":
        raise ValueError(
            "Expected version 2 of FSDP, got version 1, which renames parameters: the parts of the "
            "network are told apart by them. Set fsdp_version: 2 (accelerate_configs/fsdp2.yaml)."
        )


def check_run(args: Any) -> None:
    """Refuse sizes and strategies that cannot be trained with."""
    check_launcher()
    for field in dataclasses.fields(args):
        value = getattr(args, field.name)
        if field.name in UNUSABLE and bool(value) != bool(field.default):
            raise ValueError(f"Expected no --{field.name}, got {value}: {UNUSABLE[field.name]}.")
    if args.label_names not in (None, ["labels"]):
        raise ValueError(
            f"Expected no --label_names, got {args.label_names}: the loss reads `labels` and "
            "`distil_mask` of a sample. Leave it out."
        )
    check_folder("output_dir", str(args.output_dir))
    if args.torch_compile_backend is not None:
        from accelerate.utils import DynamoBackend  # not above: `--help` needs none of it

        known = tuple(str(name).lower() for name in DynamoBackend.list() if name != "NO")
        check_choice("torch_compile_backend", args.torch_compile_backend.lower(), known)
    _check_numbers(args)
    if args.dataloader_persistent_workers and not args.dataloader_num_workers:
        raise ValueError(
            "Expected --dataloader_num_workers above 0 with --dataloader_persistent_workers, got "
            "0. Say how many, or leave the other out."
        )
    check_choice("train_sampling_strategy", args.train_sampling_strategy, ("random", "sequential"))
    check_choice("eval_strategy", args.eval_strategy, ("no", "steps", "epoch"))
    check_choice("save_strategy", args.save_strategy, ("no", "steps", "epoch", "best"))
    strategies = {args.eval_strategy, args.save_strategy} - {"best"}
    if args.load_best_model_at_end and "no" not in strategies and len(strategies) > 1:
        raise ValueError(
            "Expected --save_strategy and --eval_strategy to be the same, as the best student "
            f"is chosen among the saved ones, got {args.save_strategy} and "
            f"{args.eval_strategy}. Set both, or --load_best_model_at_end false."
        )


def _check_numbers(args: Any) -> None:
    batches = ("per_device_train_batch_size", "per_device_eval_batch_size")
    for name in (*batches, "gradient_accumulation_steps"):
        check_at_least(name, getattr(args, name), 1)
    optimizer = ("weight_decay", "max_grad_norm", "adam_beta1", "adam_beta2", "adam_epsilon")
    for name in (*optimizer, "dataloader_num_workers", "panel_images", "panel_limit"):
        check_at_least(name, getattr(args, name), 0)
    if not (args.learning_rate > 0 and math.isfinite(args.learning_rate)):
        raise ValueError(f"Expected --learning_rate above 0, got {args.learning_rate:g}.")
    for name in ("adam_beta1", "adam_beta2"):
        if getattr(args, name) >= 1:
            raise ValueError(f"Expected --{name} below 1, got {getattr(args, name):g}.")
    if not (args.max_steps > 0 or args.num_train_epochs > 0):
        raise ValueError(f"Expected --epochs above 0, got {args.num_train_epochs:g}.")


def check_ends(args: Any, given: Collection[str] = ()) -> None:
    """Refuse a first or last temperature that is not that of a piecewise schedule's points.

    It would do nothing. A default is not meant, unless it is among the fields that were `given`.
    """
    if args.temperature_schedule != "piecewise":
        return
    used = {"temperature_start": args.temperature.start, "temperature_end": args.temperature.end}
    for name, value in used.items():
        own = getattr(args, name)
        if own != value and (name in given or own != _default(args, name)):
            raise ValueError(
                f"Expected --{name} {value:g} as in --temperature_points, got {own:g}. Leave it "
                "out, or change the points."
            )


def check_rate_shape(args: Any) -> None:
    """Refuse a shape of the learning rate that is no function of the step alone."""
    kind = SchedulerType(args.lr_scheduler_type).value
    check_choice("lr_scheduler_type", kind, tuple(RATE_SHAPES))
    rate_options(args)


def rate_options(args: Any) -> tuple[tuple[str, float], ...]:
    """The options of that shape, an object or its JSON.

    Raises:
        ValueError: if it has no such options, or none of such a value.
    """
    kind = SchedulerType(args.lr_scheduler_type).value
    given, known = args.lr_scheduler_kwargs or {}, RATE_SHAPES[kind]
    if isinstance(given, str):
        with contextlib.suppress(ValueError):
            given = json.loads(given)
    if not isinstance(given, dict) or given.keys() - known.keys():
        takes = f"an object of {', '.join(known)}" if known else "none"
        raise ValueError(
            f"Expected --lr_scheduler_kwargs of {kind} as {takes}, got {str(given)[:80]}. Write "
            """'{"power": 0.9}', say, with polynomial."""
        )
    for name, value in given.items():
        whole = name == "num_cycles"
        if type(value) not in ((int,) if whole else (int, float)) or not 0 < value < math.inf:
            raise ValueError(
                f"Expected {name} in --lr_scheduler_kwargs as a {'whole ' * whole}number above 0, "
                f"got {str(value)[:80]}."
            )
    return tuple(given.items())


def check_weight_schedule(args: Any, given: Collection[str] = ()) -> None:
    """Refuse weights that cannot be, and schedules that leave a stretch without any term.

    Also a weight beside the schedule that takes its place, if it is among the fields `given`.
    """
    weights, schedules = args.loss_weights, args.weight_schedules  # each raises on wrong ones
    for name, schedule in schedules.items():
        flag = f"{name}_weight"
        if flag in given and getattr(args, flag) != schedule.peak:
            raise ValueError(
                f"Expected --{flag} or a --weight_schedule for {name}, got both, of which the "
                "schedule alone would count. Leave one out."
            )
    epoch = epoch_without_terms(weights, schedules)
    if schedules and epoch is not None:
        raise ValueError(
            "Expected a loss term with a weight above 0 at any time, got a --weight_schedule "
            f"that leaves none at epoch {epoch:g}. Let terms overlap, or jump: "
            "kl=0:1,20:1,20:0 bce=0:0,20:0,20:1."
        )
    epoch = epoch_without_terms(weights.without_teacher(), schedules)
    if args.adaptive_weight and epoch is not None:
        raise ValueError(
            "Expected a loss term that compares with labels beside --adaptive_weight, which "
            f"may switch the others off, got none at epoch {epoch:g}. Give one a weight."
        )
    if args.adaptive_weight and args.eval_strategy == "no":
        raise ValueError(
            "Expected --eval_strategy epoch or steps with --adaptive_weight, got no: it follows "
            "the evaluations. Set one, or leave it out."
        )


def epoch_without_terms(
    weights: LossWeights, schedules: Mapping[str, WeightSchedule]
) -> float | None:
    """The first epoch at which no term has a weight; None if one has at any time."""
    # Linear between points, so that a stretch without terms begins at one of them.
    for epoch in sorted({0.0, *(e for s in schedules.values() for e, _ in s.points)}):
        now = weights.following({name: schedule(epoch) for name, schedule in schedules.items()})
        if not any(now.effective().values()):
            return epoch
    return None


def check_alone(args: Any) -> None:
    """Refuse a schedule that leaves a stretch without any term where there is no teacher."""
    schedules = args.weight_schedules
    epoch = epoch_without_terms(args.loss_weights.without_teacher(), schedules)
    if schedules and epoch is not None:
        raise ValueError(
            "Expected a loss term that compares with labels at any time without a teacher, got a "
            f"--weight_schedule that leaves none at epoch {epoch:g}. Leave it out, or name a "
            "--teacher."
        )


def _default(args: Any, name: str) -> Any:
    return type(args).__dataclass_fields__[name].default


def check_reports(args: Any) -> None:
    """Refuse a tracker that is not installed."""
    # Not above: it imports most of transformers, and the command line should answer at once.
    from transformers.integrations.integration_utils import get_available_reporting_integrations

    installed = get_available_reporting_integrations()
    missing = [name for name in args.report_to or () if name not in installed]
    if missing:
        raise ValueError(
            f"Expected --report_to to be none or installed ({', '.join(installed)}), got "
            f"{' '.join(missing)}. Install it, or leave it out."
        )


def check_features(args: Any) -> None:
    """Refuse what terms on feature maps cannot be trained with, and their settings without them."""
    terms = args.loss_weights.feature_terms
    learned = [term.name for term in TERMS if term.head is not None]
    needed = {"feature_pairs": FEATURE_TERMS, "projection_learning_rate": learned}
    for name, some in needed.items():
        if getattr(args, name) is not None and not set(terms) & set(some):
            flags = " or ".join(f"--{term}_weight" for term in some)
            raise ValueError(f"Expected {flags} above 0 with --{name}, got none. Leave it out.")
    if not terms:
        return
    flag = f"--{terms[0]}_weight"
    sharded = [f"ACCELERATE_USE_{kind}" for kind in ("FSDP", "DEEPSPEED")]
    wrong = {
        "--torch_compile": args.torch_compile,
        "--compile_teacher": args.compile_teacher,
        "DeepSpeed": args.deepspeed is not None or os.environ.get(sharded[1], "false") == "true",
        "FSDP": os.environ.get(sharded[0], "false") == "true",
        "several GPUs in one process": args.n_gpu > 1,
    }
    for name in (name for name, is_asked in wrong.items() if is_asked):
        raise ValueError(
            f"Expected one process, or DDP, and networks that are not compiled with {flag}, whose "
            f"feature maps are taken out of their forward passes, got {name}. Leave one out."
        )
    if not any(args.loss_weights.without_features().effective().values()):
        raise ValueError(
            f"Expected a term on logits beside {flag}, got none: nothing would train the head. "
            "Give --kl_weight or --bce_weight a value."
        )
    for pair in args.feature_pairs or ():
        if pair.count("=") != 1 or not all(pair.split("=")):
            raise ValueError(
                "Expected --feature_pairs as STUDENT=TEACHER by names of modules, got "
                f"{pair!r}. Write encoder.layer2=encoder.blocks.2, say."
            )


def check_sync_batchnorm(args: Any, on_gpu: bool) -> None:
    """Refuse synchronised BatchNorm where there is nothing to synchronise, or no way to do it."""
    if args.sync_batchnorm and not (on_gpu and args.world_size > 1):
        where = "the CPU, where PyTorch cannot" if not on_gpu else "one process"
        raise ValueError(
            f"Expected several GPUs with --sync_batchnorm, got {where}. Leave it out, or start "
            "with accelerate_configs/multi_gpu.yaml."
        )


def check_class_weights(args: Any) -> None:
    """Refuse class weights that are neither `balanced` nor numbers, or beside a pos_weight."""
    words = args.class_weights
    if words is None:
        return
    if args.pos_weight is not None:
        raise ValueError(
            "Expected either --pos_weight or --class_weights, got both, which say two things of "
            "the classes. Leave one out."
        )
    if list(words) == ["balanced"]:
        return
    numbers = [_number(word) for word in words]
    if not all(0 <= number < math.inf for number in numbers) or numbers[0] == len(words) - 2 == 0:
        raise ValueError(
            "Expected --class_weights as `balanced` or one number >= 0 a class (of two classes: "
            f"above 0), got {' '.join(map(str, words))}. Write 0.5 4.0, say."
        )


def _number(word: Any) -> float:
    try:
        return float(word)
    except ValueError:
        return math.nan


def check_pseudo(args: Any) -> None:
    """Refuse settings of pseudo labels that nobody follows."""
    for name in ("pseudo_labels", "pseudo_confidence"):
        if args.loss_weights.pseudo == 0 and getattr(args, name) != _default(args, name):
            raise ValueError(
                f"Expected --pseudo_weight above 0 with --{name} {getattr(args, name)}, got 0, "
                "which follows no pseudo labels. Set it to 1, or leave the other out."
            )


def check_labelled_share(args: Any) -> None:
    """Refuse a share of images with masks that is none, or an order that it cannot keep."""
    if args.labelled_schedule is not None and args.train_sampling_strategy != "random":
        raise ValueError(
            "Expected --train_sampling_strategy random with --labelled_share, got "
            f"{args.train_sampling_strategy}: its batches are drawn. Leave one of them out."
        )


TARGETS = ("online", "cached")


def check_targets(args: Any) -> None:
    """Refuse a folder of the teacher's logits that cannot be written, or that nobody would read."""
    check_choice("teacher_targets", args.teacher_targets, TARGETS)
    parse_size(args.teacher_cache_size, "teacher_cache_size")
    if args.teacher_cache is not None:
        check_folder("teacher_cache", args.teacher_cache)
    for name in ("teacher_cache", "teacher_cache_size"):
        if args.teacher_targets == "online" and getattr(args, name) != _default(args, name):
            raise ValueError(
                f"Expected --teacher_targets cached with --{name} {getattr(args, name)}, got "
                "online, which keeps nothing. Add it, or leave the other out."
            )
    if args.teacher_targets == "cached" and args.compile_teacher:
        raise ValueError(
            "Expected --teacher_targets online with --compile_teacher, got cached, which asks no "
            "teacher while it trains. Leave one of them out."
        )


def check_staged(args: Any) -> None:
    """Refuse what staged unfreezing cannot work with."""
    # `accelerate launch --use_deepspeed` says so through the environment.
    launched = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() in ("true", "1", "yes")
    if args.deepspeed is not None or launched:
        raise ValueError(
            "Expected DDP or one process with staged unfreezing, got DeepSpeed, which ignores "
            "parameters that are frozen when it starts. Leave DeepSpeed out, or free all "
            "units from the start with --unfreeze_start_epoch 0 --unfreeze_every 0."
        )
    if args.ddp_static_graph or args.ddp_find_unused_parameters is False:
        raise ValueError(
            "Expected --ddp_find_unused_parameters true and no --ddp_static_graph with staged "
            "unfreezing, got otherwise: the graph changes when a unit is freed. Leave both out."
        )


def check_ema(args: Any) -> None:
    """Refuse a decay that averages nothing, and weights of which each process holds a part."""
    decay = args.ema_decay
    if decay is None:
        return
    if not 0 < decay < 1:
        raise ValueError(
            f"Expected --ema_decay between 0 and 1, got {decay:g}. 0.999 is an average over about "
            "1,000 steps."
        )
    for name, flag in (("FSDP", "ACCELERATE_USE_FSDP"), ("DeepSpeed", "ACCELERATE_USE_DEEPSPEED")):
        if os.environ.get(flag, "").lower() in ("true", "1", "yes"):
            raise ValueError(
                f"Expected DDP or one process with --ema_decay, got {name}, where each process "
                "holds a part of the weights alone. Leave one of them out."
            )


HUB_STRATEGIES = ("end", "every_save")
_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.-]*")


def check_hub(args: Any) -> None:
    """Refuse what a push would fail on, hours later, or what it must not hold."""
    if args.hub_token is not None:
        raise ValueError(
            "Expected no --hub_token, got one: it would be written in clear into training_args.bin "
            "of every checkpoint. Log in with `hf auth login`, or put it into HF_TOKEN."
        )
    strategy = getattr(args.hub_strategy, "value", args.hub_strategy)
    if strategy in ("checkpoint", "all_checkpoints"):
        raise ValueError(
            f"Expected --hub_strategy end or every_save, got {strategy}: checkpoints hold the "
            "optimizer, random state and settings of this machine, and only the student is "
            "published. Keep checkpoints in the output folder."
        )
    check_choice("hub_strategy", strategy, HUB_STRATEGIES)
    if args.hub_revision is not None:
        raise ValueError(
            f"Expected no --hub_revision, got {args.hub_revision}. Students are pushed to the main "
            "branch; use another --hub_model_id."
        )
    if args.hub_license is not None:
        check_license(args.hub_license, "hub_license")
    if not args.push_to_hub:
        if args.hub_model_id is not None:
            raise ValueError(
                f"Expected --push_to_hub with --hub_model_id {args.hub_model_id}, got none. Add "
                "it, or leave the id out."
            )
        return
    if args.hub_model_id is None:
        raise ValueError(
            "Expected --hub_model_id OWNER/NAME with --push_to_hub, got none. Name the repository."
        )
    check_repo_id(args.hub_model_id)
    if args.hub_license is None:
        raise ValueError(missing_license("hub_license"))


def missing_license(flag: str) -> str:
    """What to say where the licence is missing: nobody but the user can choose it."""
    return (
        f"Expected --{flag} for a push, got none. Name the licence you give the student under, as "
        "the Hub writes it: apache-2.0, mit, cc-by-4.0, ..., or other."
    )


def check_repo_id(repo_id: str) -> None:
    """Refuse what is no id on the Hub."""
    if not _REPO_ID.fullmatch(repo_id) or len(repo_id) > 96 or "--" in repo_id or ".." in repo_id:
        raise ValueError(
            f"Expected OWNER/NAME as the id on the Hub, of letters, digits and single - _ ., got "
            f"{repo_id!r}. Write it like me/student."
        )


def check_license(license_id: str, flag: str) -> None:
    """Refuse what is no identifier of a licence on the Hub."""
    if not _LICENSE.fullmatch(license_id):
        near = license_id.strip().lower().replace(" ", "-")
        raise ValueError(
            f"Expected --{flag} as the Hub writes licences, in lower case without spaces, got "
            f"{license_id!r}. Try {near if _LICENSE.fullmatch(near) else 'apache-2.0'}."
        )
