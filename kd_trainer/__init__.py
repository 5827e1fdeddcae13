"""Knowledge distillation for image segmentation on the Hugging Face stack."""

from kd_trainer.arguments import DataArguments, DistillationArguments, ModelArguments
from kd_trainer.callbacks import ProgressiveUnfreezing
from kd_trainer.configuration_smp import SmpConfig
from kd_trainer.data import load_splits
from kd_trainer.image_processing import SmpImageProcessor
from kd_trainer.losses import LossTerms, LossWeights, distillation_terms, weighted_sum
from kd_trainer.metrics import SegmentationCounts
from kd_trainer.modeling import SmpForSemanticSegmentation
from kd_trainer.schedules import TemperatureSchedule, UnfreezeSchedule
from kd_trainer.teacher import Teacher, load_teacher
from kd_trainer.trainer import DistillationTrainer

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
    "distillation_terms",
    "load_splits",
    "load_teacher",
    "weighted_sum",
]
