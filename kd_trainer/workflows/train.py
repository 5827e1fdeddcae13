"""Train a student, with or without a teacher, and leave it measured, saved and loadable."""

from __future__ import annotations

import resource
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml

from kd_trainer.command_line import RunArguments
from kd_trainer.hub import check_access
from kd_trainer.publishing import HUB_FOLDER, publish
from kd_trainer.trainer import DistillationTrainer
from kd_trainer.workflows.assemble import Parts, assemble, load_student, network_size
from kd_trainer.workflows.evaluate import evaluate_model
from kd_trainer.workflows.files import write_json
from kd_trainer.workflows.plan import describe, markdown_table

LIBRARIES = (
    "torch",
    "torchvision",
    "transformers",
    "accelerate",
    "datasets",
    "evaluate",
    "segmentation-models-pytorch",
    "timm",
    "albumentations",
)


def peak_memory_mib() -> float:
    """Most memory used so far: of the GPU if there is one, else resident memory of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def train(run: RunArguments) -> dict[str, Any]:
    """Run the settings; returns what `results.json` holds.

    Leaves in the output folder: `student/` (best student by mIoU, readable by transformers and
    smp), `checkpoint-*/`, `runs/` (TensorBoard), `panels/`, `config.yaml` and `results.json`.
    """
    checkpoint = _checkpoint(run)  # before anything is written or takes long
    if run.training.push_to_hub and run.training.process_index == 0:
        private = bool(run.training.hub_private_repo)
        check_access(str(run.training.hub_model_id), private=private)
    parts = assemble(run)
    output = Path(str(run.training.output_dir))
    trainer = DistillationTrainer(
        parts.student,
        run.training,
        teacher=parts.teacher,
        train_dataset=parts.train_dataset,
        eval_dataset=parts.eval_dataset,
        ignore_index=run.data.ignore_index,
        processing_class=parts.processor,
    )
    if trainer.is_world_process_zero():
        output.mkdir(parents=True, exist_ok=True)
        settings = yaml.safe_dump(run.resolved(), sort_keys=False)
        (output / "config.yaml").write_text(settings, encoding="utf-8")
    trained = trainer.train(resume_from_checkpoint=checkpoint).metrics
    trainer.accelerator.wait_for_everyone()
    if not trainer.is_world_process_zero():
        return {}
    student_folder = output / "student"
    trainer.accelerator.unwrap_model(trainer.model).save_pretrained(student_folder)
    parts.processor.save_pretrained(student_folder)
    results = _results(run, parts, student_folder, trained)
    results["eval_history"] = eval_history(trainer.state.log_history)
    write_json(output / "results.json", results)
    if run.training.push_to_hub:
        pushed = publish(output, output / HUB_FOLDER, trainer.publication())
        print(f"\nPushed: {pushed.url}")
    return results


def eval_history(logs: list[dict[str, Any]]) -> list[dict[str, float]]:
    """Main figures of each evaluation during training, in the training's precision."""
    keys = ("epoch", "eval_miou", "eval_dice", "eval_loss", "eval_agreement")
    return [
        {key.removeprefix("eval_"): log[key] for key in keys if key in log}
        for log in logs
        if "eval_miou" in log
    ]


def _checkpoint(run: RunArguments) -> str | bool | None:
    """What `--resume` names.

    Raises:
        FileNotFoundError: if there is no such checkpoint.
        ValueError: if there are checkpoints of an earlier run that nobody mentioned.
    """
    resume, output = run.training.resume, Path(str(run.training.output_dir))
    if resume is None:
        if any(output.glob("checkpoint-*")):
            raise ValueError(
                f"Expected --resume or an output folder without checkpoints, got {output}, which "
                "has some. Add --resume to go on, name another --output_dir, or delete it."
            )
        return None
    if resume == "latest":
        if not any(output.glob("checkpoint-*")):
            raise FileNotFoundError(
                f"Expected a checkpoint in {output}, got none. Leave --resume out to start anew, "
                "or name the checkpoint's folder."
            )
        return True
    if not (Path(resume) / "trainer_state.json").is_file():
        raise FileNotFoundError(
            f"Expected a checkpoint folder with a trainer_state.json, got {resume}."
        )
    return resume


def _results(
    run: RunArguments, parts: Parts, folder: Path, trained: dict[str, float]
) -> dict[str, Any]:
    """Figures of the student as it was saved: read back from its folder, in fp32."""
    student = load_student(folder)
    results: dict[str, Any] = {
        "student_parameters": network_size(student)[0],
        "student_file_mib": (folder / "model.safetensors").stat().st_size / 2**20,
        "train_seconds": trained["train_runtime"],
        "images_per_second": trained["train_samples_per_second"],
        "peak_memory_mib": peak_memory_mib(),
        "train_images": len(parts.train_dataset),
        "epochs": run.training.num_train_epochs,
        "image_size": run.data.image_size,
        "mixed_precision": run.training.mixed_precision,
        "device": str(run.training.device),
        "teacher": run.model.teacher if parts.teacher is not None else None,
    }
    if parts.teacher is not None:
        results["teacher_parameters"] = network_size(parts.teacher.network)[0]
    if parts.eval_dataset is not None:
        evaluation = evaluate_model(
            student,
            parts.eval_dataset,
            teacher=parts.teacher,
            batch_size=run.training.per_device_eval_batch_size,
            ignore_index=run.data.ignore_index,
            device=run.training.device,
        )
        results = evaluation.results() | results
    return results | {"versions": {name: version(name) for name in LIBRARIES}}


def summary_table(results: dict[str, Any]) -> str:
    """Teacher and student side by side, as a Markdown table."""
    metrics = {
        "miou": "mIoU",
        "iou_foreground": "IoU foreground",
        "dice": "Dice",
        "boundary_iou": "boundary IoU",
        "pixel_accuracy": "pixel accuracy",
    }
    header = ["", *metrics.values(), "agreement", "parameters", "MiB"]
    rows = []
    for who in ("teacher", "student"):
        if f"{who}_miou" not in results:
            continue
        parameters = results.get(f"{who}_parameters", 0)
        size = results.get("student_file_mib", 0.0) if who == "student" else parameters * 4 / 2**20
        agreement = f"{results['agreement']:.4f}" if "agreement" in results else ""
        rows.append(
            [
                who,
                *(f"{results[f'{who}_{key}']:.4f}" for key in metrics),
                agreement if who == "student" else "",
                f"{parameters:,}",
                f"{size:.1f}",
            ]
        )
    return markdown_table(header, rows)


def run_train(run: RunArguments) -> dict[str, Any]:
    """What scripts/train.py does: the plan with `--dry_run`, else the training and its table."""
    if run.dry_run:
        print(describe(run, assemble(run)))
        return {}
    results = train(run)
    if "student_miou" in results:
        print("\n" + summary_table(results))
    if results:
        print(f"\nStudent: {Path(str(run.training.output_dir)) / 'student'}")
    return results
