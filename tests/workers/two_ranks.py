"""One of several ranks, or the only one: trainings and evaluations whose results are compared.

Usage: two_ranks.py FOLDER; writes `rank_<rank>.json` and, from the first rank, weights.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import torch
from tiny import Squares, arguments, tiny_student, tiny_teacher
from transformers import TrainerCallback

from kd_trainer.data import StreamedDataset
from kd_trainer.data.streaming import with_lengths
from kd_trainer.processes import leave_process_group
from kd_trainer.trainer import DistillationTrainer

STAGED = {"num_train_epochs": 3, "unfreeze_start_epoch": 1, "unfreeze_every": 1}
UNEVEN = 7  # images of the evaluations: four for one of two ranks, three for the other


class Digest(TrainerCallback):
    """Notes a digest of all parameters after each update, and how many units are free."""

    def __init__(self) -> None:
        self.digests: list[str] = []
        self.free: list[int] = []

    def on_step_end(self, args, state, control, **kwargs):
        model = kwargs["model"]
        together = hashlib.sha256()
        for parameter in model.parameters():
            together.update(parameter.detach().numpy().tobytes())
        self.digests.append(together.hexdigest())
        self.free.append(model.free_units)


class Gradients(TrainerCallback):
    """Keeps the gradients of each step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        named = kwargs["model"].named_parameters()
        self.steps.append({name: p.grad.clone() for name, p in named if p.grad is not None})


class PartlyLabelled(Squares):
    """Squares of which one rank sees one labelled image, then none, the other two and two."""

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        sample = super().__getitem__(index)
        if index in (0, 4, 5):
            sample["labels"] = torch.full_like(sample["labels"], 255)
        return sample


def streamed_squares(count: int, rank: int, world: int) -> StreamedDataset:
    """The samples of `Squares(count, offset=50)` as a stream."""
    squares = Squares(count, offset=50)

    def sample(row: Mapping[str, Any], *, epoch: int, index: int) -> dict[str, torch.Tensor]:
        assert int(row["image"]) == index
        return squares[index]

    columns = {"image": [str(i) for i in range(count)], "mask": ["x"] * count}
    table = datasets.Dataset.from_dict(columns)
    stream = with_lengths(table.to_iterable_dataset(num_shards=1), [count])
    return StreamedDataset(
        stream,
        sample,
        shuffle=False,
        seed=0,
        batch_size=2,
        rank=rank,
        world_size=world,
        padded=True,
    )


def staged(folder: Path) -> dict[str, Any]:
    """The real student with BatchNorm and DropPath, units freed on the way, measured at the end."""
    spy = Digest()
    args = arguments(folder, per_device_eval_batch_size=2, **STAGED)
    student = tiny_student("timm-efficientnet-b0")
    trainer = DistillationTrainer(
        student,
        args,
        teacher=tiny_teacher(),
        train_dataset=Squares(16),
        eval_dataset=Squares(UNEVEN, offset=50),
        callbacks=[spy],
    )
    trainer.train()
    figures = trainer.evaluate()
    if args.process_index == 0:
        torch.save(student.state_dict(), folder / "staged.pt")
    return {
        "world": args.world_size,
        "digests": spy.digests,
        "free": spy.free,
        "figures": figures,
    }


def plain(folder: Path, batch: int) -> dict[str, Any]:
    """A net in which the images of a batch know nothing of each other: equal to one process."""
    student = tiny_student(norm=False)
    args = arguments(folder, per_device_train_batch_size=batch, **STAGED)
    trainer = DistillationTrainer(student, args, teacher=tiny_teacher(), train_dataset=Squares(16))
    trainer.train()
    if args.process_index == 0:
        torch.save(student.state_dict(), folder / "plain.pt")
    return {"world": args.world_size, "logs": trainer.state.log_history}


def features(folder: Path, batch: int) -> dict[str, Any]:
    """Terms on features whose projections know nothing of the batch; then all, at first alone."""
    student = tiny_student(norm=False)
    weights = {"at_weight": 2.0, "feature_cwd_weight": 20.0}
    # Adam would make steps of what is rounding in gradients near 0.
    options = {"optim": "sgd", "learning_rate": 0.01, "per_device_train_batch_size": batch}
    args = arguments(folder, **weights, **STAGED, **options)
    trainer = DistillationTrainer(student, args, teacher=tiny_teacher(), train_dataset=Squares(16))
    trainer.train()
    heads = trainer.matching.heads.state_dict()
    if args.process_index == 0:
        torch.save(student.state_dict() | heads, folder / "features.pt")
    weights |= {"fitnet_weight": 2.0, "mgd_weight": 2.0, "gradient_accumulation_steps": 2}
    weights["weight_schedule"] = [f"{name}=0:0,0.5:0,0.5:1" for name in ("kl", "mse", "task")]
    args = arguments(folder, max_steps=3, **weights)
    every = DistillationTrainer(
        tiny_student(), args, teacher=tiny_teacher(), train_dataset=Squares(16)
    )
    every.train()
    together = hashlib.sha256()
    for _, parameter in every.matching.parameters():
        together.update(parameter.detach().numpy().tobytes())
    logs = trainer.state.log_history
    return {"world": args.world_size, "logs": logs, "digest": together.hexdigest()}


def dice(folder: Path, batch: int) -> dict[str, Any]:
    """Two steps of both kinds of Dice, on images of which three of eight have no label."""
    spy = Gradients()
    args = arguments(
        folder,
        per_device_train_batch_size=batch,
        num_train_epochs=1,
        train_sampling_strategy="sequential",
        max_grad_norm=0.0,
        bce_weight=0.0,
        kl_weight=0.0,
        mse_weight=0.0,
        pseudo_weight=1.0,
    )
    student, teacher = tiny_student(norm=False), tiny_teacher()
    data = PartlyLabelled(8)
    trainer = DistillationTrainer(
        student, args, teacher=teacher, train_dataset=data, callbacks=[spy]
    )
    trainer.train()
    if args.process_index == 0:
        torch.save(spy.steps, folder / "gradients.pt")
    return {"world": args.world_size, "logs": trainer.state.log_history}


def averaged(folder: Path) -> dict[str, Any]:
    """Digests of the student's moving average, with the statistics of its BatchNorms."""
    args = arguments(folder, ema_decay=0.7)
    trainer = DistillationTrainer(tiny_student(), args, train_dataset=Squares(16))
    trainer.train()
    tensors = trainer.ema.network.state_dict().values()
    together = hashlib.sha256(b"".join(value.numpy().tobytes() for value in tensors))
    return {"world": args.world_size, "digest": together.hexdigest()}


def measured(folder: Path) -> dict[str, Any]:
    """Figures of an untrained student, of a map-style data set and of a stream."""
    args = arguments(folder, per_device_eval_batch_size=2)
    trainer = DistillationTrainer(tiny_student(), args, teacher=tiny_teacher())
    stream = streamed_squares(UNEVEN, args.process_index, args.world_size)
    return {
        "world": args.world_size,
        "fixed": trainer.evaluate(Squares(UNEVEN, offset=50)),
        "stream": trainer.evaluate(stream),
    }


def main(folder: Path, global_batch: int = 4) -> None:
    """All of them, one after the other."""
    args = arguments(folder)
    results = {
        "staged": staged(folder),
        "plain": plain(folder, global_batch // args.world_size),
        "features": features(folder, global_batch // args.world_size),
        "dice": dice(folder, global_batch // args.world_size),
        "measured": measured(folder),
        "averaged": averaged(folder),
    }
    (folder / f"rank_{args.process_index}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave_process_group()
    threads = [task.read_text().strip() for task in Path("/proc/self/task").glob("*/comm")]
    assert not any("gloo" in name for name in threads), threads  # they abort some ends of Python
