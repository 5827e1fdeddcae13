"""TensorBoard files for publication: every curve and picture, nothing about the machine.

The Trainer writes the host's name into file names and all settings, with their paths, as text.
"""

from __future__ import annotations

import re
from pathlib import Path

from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

_STARTED = re.compile(r"[A-Z][a-z]{2}\d\d_\d\d-\d\d-\d\d")
_SETTINGS = {"args/text_summary", "model_config/text_summary"}


def copy_boards(source: Path, destination: Path, *, pictures: bool = False) -> None:
    """Copy the event files under `source`, named by their time alone and without settings.

    Args:
        source: folder of TensorBoard; there may be none.
        destination: gets a file for each.
        pictures: also pictures, whoever logged them.
    """
    for number, path in enumerate(sorted(source.rglob("events.out.tfevents.*"))):
        parts = []
        for part in path.parent.relative_to(source).parts:
            match = _STARTED.match(part)
            parts.append(match[0] if match else part)
        second = path.name.split(".")[3]
        copy = destination.joinpath(*parts, f"events.out.tfevents.{second}.{number}")
        copy.parent.mkdir(parents=True, exist_ok=True)
        _copy_board(path, copy, pictures=pictures)


def _copy_board(source: Path, destination: Path, *, pictures: bool) -> None:
    with destination.open("wb") as file:
        writer = RecordWriter(file)
        for record in RawEventFileLoader(str(source)).Load():
            event = Event.FromString(record)
            values = event.summary.value
            hidden = any(value.tag in _SETTINGS for value in values)
            if not hidden and (pictures or not any(map(_shows, values))):
                writer.write(record)


def _shows(value: Summary.Value) -> bool:
    """Whether a logged value is a picture, in either way of TensorBoard."""
    return value.HasField("image") or value.metadata.plugin_data.plugin_name == "images"
