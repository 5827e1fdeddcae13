"""Runs that can be interrupted: complete checkpoints, exact resume, an end on request."""

from kd_trainer.resuming.epochs import EpochCounter
from kd_trainer.resuming.stopping import Stopped, StopRequest, stoppable
from kd_trainer.resuming.together import together
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
