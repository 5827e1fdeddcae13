"""Flags that people bring from other programs, and what they are called here."""

from __future__ import annotations

from collections.abc import Collection

from kd_trainer.fields import closest

# Our flag, and what others call it. Of two the first counts that a script has.
RENAMED = {
    "learning_rate": "lr base_lr max_lr",
    "min_learning_rate": "min_lr lr_min eta_min",
    "weight_decay": "wd",
    "batch_size": "bs b train_batch_size",
    "epochs": "num_epochs max_epochs n_epochs",
    "dataloader_num_workers": "workers num_workers j",
    "workers": "num_workers j",
    "image_size": "imgsz img_size input_size resolution",
    "dataset": "data data_dir data_path dataset_name",
    "output_dir": "out out_dir save_dir work_dir o",
    "num_labels": "num_classes n_classes nc",
    "student_arch": "arch architecture",
    "student_encoder": "encoder encoder_name backbone",
    "teacher": "teacher_model teacher_path teachers",
    "student": "student_model model model_name_or_path",
    "mixed_precision": "amp precision half",
    "optim": "optimizer opt",
    "gradient_accumulation_steps": "grad_accum accumulate_grad_batches",
    "max_grad_norm": "clip_grad grad_clip gradient_clip_val",
    "temperature_start": "temperature temp tau t",
    "kl_weight": "alpha kd_weight distill_weight",
    "opset": "opset_version",
    "encoder_weights": "weights pretrained",
    "lr_scheduler_type": "scheduler lr_schedule",
    "teacher_cache": "cache cache_dir",
    "use_cpu": "no_cuda cpu",
}
# What means nothing here, or not in this script, and what to do instead.
ABSENT = {
    "early_stopping_patience early_stopping_threshold early_stopping patience": "A run is not "
    "stopped early, and keeps its best student; shorten it with --epochs.",
    "image_size imgsz img_size input_size resolution": "The size is the student's own, with which "
    "it was trained.",
    "freeze_encoder freeze_backbone": "An encoder that stays frozen has --unfreeze_start_epoch at "
    "or after the last epoch.",
    "overwrite_output_dir overwrite logging_dir log_dir": "Each run has a folder of its own, with "
    "its logs: --output_dir.",
    "train_images train_masks train_dir": "Images and masks are found below --dataset, in "
    "train/images and train/masks.",
    "model model_name_or_path checkpoint ckpt": "Saved models are named as words without a flag: "
    "eval.py MODEL, export.py MODEL.",
    "repo_id hub_model_id": "It is a word without a flag: push.py FOLDER OWNER/NAME.",
    "teacher_stream": "It is gone, as it never ran on a GPU. Take the line out.",
    "opset opset_version": "It is a flag of scripts/export.py, which writes ONNX files.",
    "device gpu gpus gpu_id cuda": "No flag chooses it; the variable CUDA_VISIBLE_DEVICES says "
    "which GPUs can be used.",
    "nproc_per_node num_processes world_size": "Several processes are started with accelerate "
    "launch or torchrun.",
}


def flag_hint(flag: str, known: Collection[str]) -> str:
    """What to write instead of an unknown flag (or field of a recipe), or why there is none."""
    dashes = "--" if flag.startswith("-") else ""
    name = flag.lstrip("-").replace("-", "_").lower()
    for ours, theirs in RENAMED.items():
        if name in theirs.split() and dashes + ours in known:
            return f" It is called {dashes}{ours} here."
    for theirs, advice in ABSENT.items():
        if name in theirs.split():
            return f" {advice}"
    return closest(name, known)
