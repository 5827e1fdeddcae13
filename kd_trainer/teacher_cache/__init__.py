"""A teacher's logits on the disk: it sees each clean image once instead of once an epoch."""

from kd_trainer.teacher_cache.cache import TargetCache
from kd_trainer.teacher_cache.coding import as_half
from kd_trainer.teacher_cache.filling import Work, describe, fill
from kd_trainer.teacher_cache.key import about, folder_name
from kd_trainer.teacher_cache.room import Room, show_size
from kd_trainer.teacher_cache.shards import image_digest

__all__ = [
    "Room",
    "TargetCache",
    "Work",
    "about",
    "as_half",
    "describe",
    "fill",
    "folder_name",
    "image_digest",
    "show_size",
]
