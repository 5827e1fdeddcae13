"""One of two ranks that train a stock model of transformers by stages.

Usage: two_stock.py FOLDER; writes `rank_<rank>.json` and, from the first rank, weights.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from stock_models import stock_model
from tiny import SIDE, Squares, arguments, tiny_teacher

from kd_trainer.processes import leave_process_group
from kd_trainer.students import as_student, free_units
from kd_trainer.trainer import DistillationTrainer
from workers.two_ranks import STAGED, Digest


class StockDigest(Digest):
    """Of a student whose free units are no attribute of its own."""

    def on_step_end(self, args, state, control, **kwargs):
        kwargs["model"].free_units = free_units(kwargs["model"])
        super().on_step_end(args, state, control, **kwargs)


def trainer_of(folder: Path, callback: Digest) -> DistillationTrainer:
    student = as_student(stock_model("segformer"), image_size=SIDE)
    return DistillationTrainer(
        student,
        arguments(folder, **STAGED),
        teacher=tiny_teacher(),
        train_dataset=Squares(8),
        eval_dataset=Squares(3, offset=50),
        callbacks=[callback],
    )


def main() -> None:
    folder = Path(sys.argv[1])
    digest = StockDigest()
    trainer = trainer_of(folder / "run", digest)
    trainer.train()
    told = {"world": trainer.args.world_size, "digests": digest.digests, "free": digest.free}
    told["figures"] = trainer.evaluate()
    rank = trainer.args.process_index
    (folder / f"rank_{rank}.json").write_text(json.dumps(told))
    if rank == 0:
        torch.save(trainer.model.state_dict(), folder / "weights.pt")
    leave_process_group()


if __name__ == "__main__":
    main()
