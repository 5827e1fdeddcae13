"""The frozen teacher, and how it is loaded."""

from kd_trainer.teacher.answers import Answers, state_of
from kd_trainer.teacher.loading import class_order, load_teacher, reduces_labels, saved_class_names
from kd_trainer.teacher.network import Teacher

__all__ = [
    "Answers",
    "Teacher",
    "class_order",
    "load_teacher",
    "reduces_labels",
    "saved_class_names",
    "state_of",
]
