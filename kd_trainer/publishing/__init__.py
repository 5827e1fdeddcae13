"""From a run to the folder that is pushed, and a Trainer that pushes it."""

from kd_trainer.hub.publication import Publication, publish, write_folder
from kd_trainer.publishing.trainer import HUB_FOLDER, PublishingTrainer

__all__ = ["HUB_FOLDER", "Publication", "PublishingTrainer", "publish", "write_folder"]
