"""What of a run is published, and the Hub's answers as errors of the house."""

from kd_trainer.hub.connection import Pushed, check_access, upload
from kd_trainer.hub.files import PANEL, Source, clear, copy_files, find_source, without_paths

__all__ = [
    "PANEL",
    "Pushed",
    "Source",
    "check_access",
    "clear",
    "copy_files",
    "find_source",
    "upload",
    "without_paths",
]
