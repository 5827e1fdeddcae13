"""`make demo`: draw people, train a teacher, distil a student, and say whether it worked."""

from __future__ import annotations

import time
from fnmatch import fnmatch
from pathlib import Path, PurePath
from typing import Any

import torch

from kd_trainer.build import build_run
from kd_trainer.commands.train import train
from kd_trainer.config import build, load_recipe
from kd_trainer.console import summary_table
from kd_trainer.doctor.teacher import Predictions
from kd_trainer.errors import run_script
from kd_trainer.files import file_names, marked_files, write_json, write_marker

OUTPUT = Path("runs/demo")
# What a demo writes, and what would be taken for its figures.
MADE = (
    *("student", "teacher", "checkpoint-*", "panels", "runs", "config.yaml", "report.html"),
    *("results.json", "trainer_state.json", "export.json"),
)
# What the demo has to reach; below it nothing was learned and it fails.
TEACHER_MIOU = 0.80
STUDENT_SHARE = 0.95
# And what makes that worth something: the images are hard for a constant and for one epoch.
CONSTANT_MIOU = 0.50
FIRST_EPOCH_MIOU = 0.70


def check(results: dict[str, Any]) -> None:
    """Refuse to call it a success if nothing was learned, or nothing had to be.

    Raises:
        ValueError: if teacher or student stayed below what the demo has to reach, or a constant
            prediction or the first epoch came near it.
    """
    teacher, student = results["teacher_miou"], results["student_miou"]
    constant, first = results["constant_miou"], results["eval_history"][0]["miou"]
    faults = {
        f"its teacher to reach mIoU {TEACHER_MIOU:.2f}, got {teacher:.4f}": teacher < TEACHER_MIOU,
        f"its student to reach {STUDENT_SHARE:.0%} of its teacher's mIoU {teacher:.4f}, got "
        f"{student:.4f}": student < STUDENT_SHARE * teacher,
        f"a constant prediction below mIoU {CONSTANT_MIOU:.2f}, got {constant:.4f}": (
            constant >= CONSTANT_MIOU
        ),
        f"its student after one epoch below mIoU {FIRST_EPOCH_MIOU:.2f}, got {first:.4f}": (
            first >= FIRST_EPOCH_MIOU
        ),
    }
    for fault, is_so in faults.items():
        if is_so:
            raise ValueError(
                f"Expected of the demo {fault}. This is a defect: please report it with the output "
                "above."
            )


def clear(output: Path) -> None:
    """Remove the files that an earlier demo has written and named, and no other.

    Raises:
        ValueError: if something of another origin is in the demo's way.
    """
    present = _made(output)
    foreign = sorted(present - marked_files(output))
    if foreign:
        raise ValueError(
            f"Expected {output} to be left by an earlier demo, got {foreign[0]}, which none has "
            "written. Move it to another place, or delete it."
        )
    for name in present:
        (output / name).unlink()
    folders = {folder for name in present for folder in (output / name).parents}
    for folder in sorted(folders - {output, *output.parents}, reverse=True):
        folder.rmdir()  # what was inside is gone, of links nothing was


def _made(output: Path) -> set[str]:
    """Names of the files where a demo writes."""
    tops = {name: PurePath(name).parts[0] for name in file_names(output)}
    return {name for name, top in tops.items() if any(fnmatch(top, made) for made in MADE)}


def demo(output: Path = OUTPUT) -> dict[str, Any]:
    """Train both networks from their recipes; returns what `results.json` holds."""
    start = time.perf_counter()
    clear(output)
    try:
        results = _train_both(output)
        results["demo_seconds"] = time.perf_counter() - start
        write_json(output / "results.json", results)
    finally:  # also where it was stopped
        write_marker(output, _made(output))
    return results


def _train_both(output: Path) -> dict[str, Any]:
    print("1/2 teacher: draws the images and trains a large network without a teacher")
    teacher_settings = load_recipe("demo_teacher") | {"output_dir": str(output / "teacher")}
    train(build(teacher_settings), stops=False)  # Ctrl-C ends a demo at once
    print("\n2/2 student: distils the teacher into a small network, unit by unit")
    settings = load_recipe("demo") | {"output_dir": str(output)}
    run = build(settings)
    results = train(run, stops=False)
    images = build_run(run).eval_dataset
    assert images is not None
    labels = torch.stack([images[index]["labels"].long() for index in range(len(images))])
    guess = Predictions(torch.zeros_like(labels), labels, run.data.id2label)
    results["constant_miou"] = guess.constant_miou
    return results


def main() -> None:
    """Run, print the table and where everything lies, and fail if nothing was learned."""
    results = demo()
    first = results["eval_history"][0]["miou"]
    print(f"\n{summary_table(results)}\n")
    print(f"The same class everywhere would score mIoU {results['constant_miou']:.4f}, the student")
    print(f"after one epoch {first:.4f}. All of it took {results['demo_seconds']:.0f} s.\n")
    print(f"Student:  {OUTPUT}/student   (transformers and smp read it)")
    print(f"Teacher:  {OUTPUT}/teacher/student")
    print(f"Images:   {OUTPUT}/panels    Figures: {OUTPUT}/results.json")
    print(f"Report:   {OUTPUT}/report.html   (open it in a browser)")
    print(f"Curves:   tensorboard --logdir {OUTPUT}")
    print(f"Try it:   python scripts/predict.py {OUTPUT}/student YOUR_IMAGE.jpg")
    check(results)


if __name__ == "__main__":
    run_script(main)
