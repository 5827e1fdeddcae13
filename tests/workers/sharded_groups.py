"""Regroups the optimizer of a student that FSDP2 has sharded, after an evaluation."""

from types import SimpleNamespace

import torch
from accelerate import PartialState
from tiny import SIDE, arguments, tiny_student
from torch.distributed.fsdp import fully_shard

from kd_trainer.callbacks import EpochCounter, ProgressiveUnfreezing
from kd_trainer.models.modeling import encoder_units
from kd_trainer.optim import PartLR, parameter_groups
from kd_trainer.processes import leave_process_group


def main() -> None:
    """Train a step, evaluate, free a unit, train a step: the decoder has to move again."""
    PartialState(cpu=True)
    args = arguments("unused", unfreeze_start_epoch=1, unfreeze_every=1)
    student = tiny_student()
    schedule = args.schedule(len(encoder_units(student)), 3)
    fully_shard(student)
    epochs = EpochCounter(schedule)
    callback = ProgressiveUnfreezing(epochs)
    optimizer = torch.optim.AdamW(parameter_groups(student, args, 0))
    scheduler = PartLR(optimizer, lambda part, step: 1.0)
    pixels = torch.rand(2, 3, SIDE, SIDE)

    def step() -> torch.Tensor:
        student(pixel_values=pixels)["raw_logits"].square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        return torch.cat([p.to_local().flatten() for _, p in student.named_parameters()])

    before = step()
    with torch.no_grad():
        student.eval()(pixel_values=pixels)
    epochs.index = 1
    wanted = SimpleNamespace(model=student, optimizer=optimizer, lr_scheduler=scheduler)
    callback.on_epoch_begin(args, None, None, **vars(wanted))
    assert len(optimizer.state) > 0
    assert {group["name"] for group in optimizer.param_groups} >= {"decoder"}
    assert len({group["name"] for group in optimizer.param_groups}) == 2
    assert not torch.equal(before, step())
    leave_process_group()


if __name__ == "__main__":
    main()
