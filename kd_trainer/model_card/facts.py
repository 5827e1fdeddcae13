"""What a card is made of."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kd_trainer.configuration_smp import uses_timm_loader

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


@dataclass(frozen=True)
class DatasetName:
    """How the training data is called, and its id if it lies on the Hub."""

    name: str
    hub_id: str | None = None


@dataclass(frozen=True)
class CardFacts:
    """Everything a card says.

    Args:
        repo_id: OWNER/NAME.
        license: as the Hub writes it; the user's choice.
        config: the student's config.json.
        parameters: (used, never used by any output).
        file_mib: size of the weights.
        dataset: what was trained on.
        results: the run's results.json; empty if unknown.
        settings: the run's config.yaml; empty if unknown.
        baseline: results.json of the same student trained without a teacher; empty if unknown.
        measured: further tables by heading, each a list of rows with the same keys.
        has_panel: whether panel.png lies beside the card.
        progress: of a student that is still being trained, how far it is.
    """

    repo_id: str
    license: str
    config: dict[str, Any]
    parameters: tuple[int, int]
    file_mib: float
    dataset: DatasetName
    results: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    baseline: dict[str, Any] = field(default_factory=dict)
    measured: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    has_panel: bool = False
    progress: str | None = None

    @property
    def labels(self) -> list[str]:
        """Names of the classes, background first."""
        named = {int(index): str(name) for index, name in self.config["id2label"].items()}
        return [named[index] for index in sorted(named)]

    @property
    def architecture(self) -> str:
        """Class name of the smp architecture."""
        return str(self.config["_model_class"])

    @property
    def encoder(self) -> str:
        """Encoder as smp names it."""
        return str(self.config["encoder_name"])

    @property
    def side(self) -> int:
        """Side of the square input in pixels."""
        return int(self.config["image_size"])

    @property
    def read_by_smp(self) -> bool:
        """Whether smp reads the same folder; it refuses our keys for encoders of timm."""
        return not uses_timm_loader(self.encoder)

    @property
    def teacher(self) -> str | None:
        """Name of the teacher, None of a student trained without one, "" if it is not known."""
        source = self.results.get("teacher", self.settings.get("teacher", ""))
        if source is None or str(source).lower() == "none":
            return None
        text = str(source)
        if _is_hub_id(text) or not text:
            return text
        parts = [part for part in Path(text).parts if part != "student"]
        return parts[-1] if parts else ""


def dataset_name(settings: dict[str, Any], given: str | None = None) -> DatasetName:
    """The user's name of the training data, else the last part of its path or its id on the Hub.

    Args:
        settings: of the run, as in its config.yaml.
        given: the user's choice; OWNER/NAME is taken as an id on the Hub.
    """
    if given:
        return DatasetName(given, given if _HUB_ID.fullmatch(given) else None)
    source = str(settings.get("dataset") or "")
    if source == "synthetic":
        return DatasetName("synthetic")
    if _is_hub_id(source):
        return DatasetName(source, source)
    return DatasetName(Path(source).name or "unnamed")


def _is_hub_id(text: str) -> bool:
    """Whether a source is an id; like everywhere, a folder of that name comes first."""
    return bool(_HUB_ID.fullmatch(text)) and not Path(text).exists()
