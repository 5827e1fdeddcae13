"""The card of a published student: README.md with metadata, from files and nothing else."""

from kd_trainer.model_card.card import CardFacts, DatasetName, dataset_name, render

__all__ = ["CardFacts", "DatasetName", "dataset_name", "render"]
