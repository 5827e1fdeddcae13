"""Combinations of training settings that cannot work, refused before anything is loaded."""

from __future__ import annotations

from typing import Any

from transformers.integrations.integration_utils import get_available_reporting_integrations

from kd_trainer.fields import check_at_least, check_choice


def check_run(args: Any) -> None:
    """Refuse sizes and strategies that cannot be trained with."""
    for name, bound in (
        ("per_device_train_batch_size", 1),
        ("per_device_eval_batch_size", 1),
        ("gradient_accumulation_steps", 1),
        ("dataloader_num_workers", 0),
        ("panel_images", 0),
    ):
        check_at_least(name, getattr(args, name), bound)
    if not (args.max_steps > 0 or args.num_train_epochs > 0):
        raise ValueError(f"Expected --epochs above 0, got {args.num_train_epochs:g}.")
    check_choice("eval_strategy", args.eval_strategy, ("no", "steps", "epoch"))
    check_choice("save_strategy", args.save_strategy, ("no", "steps", "epoch", "best"))
    strategies = {args.eval_strategy, args.save_strategy} - {"best"}
    if args.load_best_model_at_end and "no" not in strategies and len(strategies) > 1:
        raise ValueError(
            "Expected --save_strategy and --eval_strategy to be the same, as the best student "
            f"is chosen among the saved ones, got {args.save_strategy} and "
            f"{args.eval_strategy}. Set both, or --load_best_model_at_end false."
        )


def check_reports(args: Any) -> None:
    """Refuse a tracker that is not installed."""
    installed = get_available_reporting_integrations()
    missing = [name for name in args.report_to or () if name not in installed]
    if missing:
        raise ValueError(
            f"Expected --report_to to be none or installed ({', '.join(installed)}), got "
            f"{' '.join(missing)}. Install it, or leave it out."
        )


def check_staged(args: Any) -> None:
    """Refuse what staged unfreezing cannot work with."""
    if args.deepspeed is not None:
        raise ValueError(
            "Expected DDP or one process with staged unfreezing, got DeepSpeed, which ignores "
            "parameters that are frozen when it starts. Leave --deepspeed out, or free all "
            "units from the start with --unfreeze_start_epoch 0 --unfreeze_every 0."
        )
    if args.ddp_static_graph or args.ddp_find_unused_parameters is False:
        raise ValueError(
            "Expected --ddp_find_unused_parameters true and no --ddp_static_graph with staged "
            "unfreezing, got otherwise: the graph changes when a unit is freed. Leave both out."
        )
