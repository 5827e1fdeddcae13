"""What of a run is published, and the Hub's answers as errors of the house."""

from kd_trainer.hub.connection import Pushed, check_access, upload
from kd_trainer.hub.files import (
    PANEL,
    Source,
    check_regular,
    copy_files,
    find_source,
    last_part,
    without_paths,
)

__all__ = [
    "PANEL",
    "Pushed",
    "Source",
    "check_access",
    "check_regular",
    "copy_files",
    "find_source",
    "last_part",
    "upload",
    "without_paths",
]
