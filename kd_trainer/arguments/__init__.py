"""The settings of a run, and the only place with defaults: model, data, distillation.

The defaults are the recipe `rgb_hierarchical_unet_v2_distillation_b0_from_b3_temp_prog`; a YAML
recipe or a flag overrides them (see `config`).
"""

from kd_trainer.arguments.data import DataArguments
from kd_trainer.arguments.model import ModelArguments
from kd_trainer.arguments.training import DistillationArguments

__all__ = ["DataArguments", "DistillationArguments", "ModelArguments"]
