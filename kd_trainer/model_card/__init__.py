"""The card of a published student: README.md with metadata, from files and nothing else."""

from kd_trainer.model_card.card import render
from kd_trainer.model_card.facts import CardFacts, DatasetName, dataset_name

__all__ = ["CardFacts", "DatasetName", "dataset_name", "render"]
