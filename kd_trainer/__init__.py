"""Knowledge distillation for image segmentation on the Hugging Face stack.

The public names are imported when they are first used: whoever only wants the command line should
not wait for everything that a training needs.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kd_trainer.arguments import DistillationArguments
    from kd_trainer.callbacks import ProgressiveUnfreezing
    from kd_trainer.data import load_splits
    from kd_trainer.data_arguments import DataArguments
    from kd_trainer.losses import LossTerms, LossWeights, distillation_terms, weighted_sum
    from kd_trainer.metrics import SegmentationCounts
    from kd_trainer.model_arguments import ModelArguments
    from kd_trainer.models.configuration_smp import SmpConfig
    from kd_trainer.models.image_processing import SmpImageProcessor
    from kd_trainer.models.modeling import SmpForSemanticSegmentation
    from kd_trainer.schedules import TemperatureSchedule, UnfreezeSchedule
    from kd_trainer.students import as_student, load_module
    from kd_trainer.teacher import Teacher, load_teacher
    from kd_trainer.trainer import DistillationTrainer

_HOMES = {
    "DataArguments": "data_arguments",
    "DistillationArguments": "arguments",
    "DistillationTrainer": "trainer",
    "LossTerms": "losses",
    "LossWeights": "losses",
    "ModelArguments": "model_arguments",
    "ProgressiveUnfreezing": "callbacks",
    "SegmentationCounts": "metrics",
    "SmpConfig": "models.configuration_smp",
    "SmpForSemanticSegmentation": "models.modeling",
    "SmpImageProcessor": "models.image_processing",
    "Teacher": "teacher",
    "TemperatureSchedule": "schedules",
    "UnfreezeSchedule": "schedules",
    "as_student": "students",
    "distillation_terms": "losses",
    "load_module": "students",
    "load_splits": "data",
    "load_teacher": "teacher",
    "weighted_sum": "losses",
}

__all__ = [
    "DataArguments",
    "DistillationArguments",
    "DistillationTrainer",
    "LossTerms",
    "LossWeights",
    "ModelArguments",
    "ProgressiveUnfreezing",
    "SegmentationCounts",
    "SmpConfig",
    "SmpForSemanticSegmentation",
    "SmpImageProcessor",
    "Teacher",
    "TemperatureSchedule",
    "UnfreezeSchedule",
    "as_student",
    "distillation_terms",
    "load_module",
    "load_splits",
    "load_teacher",
    "weighted_sum",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
