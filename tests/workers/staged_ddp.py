"""One rank of a staged training: writes a digest of its weights at the end of each epoch."""

import hashlib
import json
import sys
from pathlib import Path

from tiny import Squares, arguments, tiny_student, tiny_teacher
from transformers import TrainerCallback

from kd_trainer.trainer import DistillationTrainer


class Digest(TrainerCallback):
    def __init__(self) -> None:
        self.digests: list[str] = []
        self.free: list[int] = []

    def on_epoch_end(self, args, state, control, **kwargs):
        model = kwargs["model"]
        together = hashlib.sha256()
        for parameter in model.parameters():
            together.update(parameter.detach().numpy().tobytes())
        self.digests.append(together.hexdigest())
        self.free.append(model.free_units)


def main(folder: Path) -> None:
    spy = Digest()
    student = tiny_student("timm-efficientnet-b0")
    args = arguments(folder, num_train_epochs=3, unfreeze_start_epoch=1, unfreeze_every=1)
    trainer = DistillationTrainer(
        student, args, teacher=tiny_teacher(), train_dataset=Squares(16), callbacks=[spy]
    )
    trainer.train()
    result = {"world": args.world_size, "digests": spy.digests, "free": spy.free}
    path = folder / f"rank_{args.process_index}.json"
    path.write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
