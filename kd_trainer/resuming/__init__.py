"""Runs that can be interrupted: complete checkpoints, exact resume, an end on request."""

from kd_trainer.checkpointing.stopping import StopRequest, stoppable
from kd_trainer.errors import Stopped
from kd_trainer.processes import together
from kd_trainer.resuming.epochs import EpochCounter
from kd_trainer.resuming.trainer import (
    ResumableTrainer,
    newest_checkpoint,
    settle_all,
)

__all__ = [
    "EpochCounter",
    "ResumableTrainer",
    "StopRequest",
    "Stopped",
    "newest_checkpoint",
    "settle_all",
    "stoppable",
    "together",
]
