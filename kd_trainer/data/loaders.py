"""A Trainer that reads its data as we need it: streams once, evaluations to their last image."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer, TrainingArguments

LOSS_COLUMNS = ("distil_mask", "teacher_logits")


class LoadingTrainer(Trainer):
    """Makes the loaders of map-style data sets and of streams."""

    def _set_signature_columns_if_needed(self) -> None:
        """Keep what the loss needs, which is more than the student's forward pass takes."""
        super()._set_signature_columns_if_needed()
        columns: list[str] = vars(self)["_signature_columns"]  # declared as None in the base class
        columns += [column for column in LOSS_COLUMNS if column not in columns]

    def _get_dataloader(  # type: ignore[override] # the options are handed on as they come
        self, dataset: Any, description: str, batch_size: int, **options: Any
    ) -> Any:
        """The Trainer's loader, but for two of its habits.

        It would drop the last short batch of an evaluation too, and give the rows of a stream,
        which has split itself among ranks and workers already, to the ranks once more.
        """
        drop_last = self.args.dataloader_drop_last and options.get("is_training", False)
        if isinstance(dataset, IterableDataset):
            return stream_loader(
                dataset, self.args, self.data_collator, batch_size=batch_size, drop_last=drop_last
            )
        before, self.args.dataloader_drop_last = self.args.dataloader_drop_last, drop_last
        try:
            return super()._get_dataloader(dataset, description, batch_size, **options)
        finally:
            self.args.dataloader_drop_last = before


def stream_loader(
    dataset: Any, args: TrainingArguments, collator: Any, *, batch_size: int, drop_last: bool
) -> DataLoader[Any]:
    """A loader of a stream, with the settings of a run; its batches are of one rank already."""
    workers = args.dataloader_num_workers
    loader: DataLoader[Any] = DataLoader(
        dataset,
        batch_size=batch_size,
        collate_fn=collator,
        num_workers=workers,
        persistent_workers=args.dataloader_persistent_workers and workers > 0,
        pin_memory=args.dataloader_pin_memory,
        prefetch_factor=args.dataloader_prefetch_factor,
        # These two fields came with transformers 5.15; the defaults are torch's.
        multiprocessing_context=getattr(args, "dataloader_multiprocessing_context", None),
        in_order=getattr(args, "dataloader_in_order", True),
        drop_last=drop_last,
    )
    return seed_loader(loader, args.seed)


def seed_loader(loader: Any, seed: int) -> Any:
    """Let a DataLoader draw the seeds of its workers elsewhere than DropPath draws on a CPU.

    With persistent workers it draws once in a run, else once in an epoch; a resumed run draws once
    more, and would see other DropPath draws.
    """
    base: DataLoader[Any] = getattr(loader, "base_dataloader", loader)  # accelerate's wrapper
    base.generator = torch.Generator().manual_seed(seed)
    return loader
