"""A Trainer that reads its data as we need it: streams once, evaluations to their last image."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer, TrainingArguments

from kd_trainer.arguments import DistillationArguments

LOSS_COLUMNS = ("distil_mask", "teacher_logits")


class LoadingTrainer(Trainer):
    """Makes the loaders of map-style data sets and of streams."""

    args: DistillationArguments

    def _set_signature_columns_if_needed(self) -> None:
        """Keep what the loss needs, which is more than the student's forward pass takes."""
        super()._set_signature_columns_if_needed()
        known: list[str] = vars(self)["_signature_columns"]  # the base class declares it as None
        vars(self)["_signature_columns"] = [*known, *(c for c in LOSS_COLUMNS if c not in known)]

    def _get_dataloader(  # type: ignore[override] # the options are handed on as they come
        self, dataset: Any, description: str, batch_size: int, **options: Any
    ) -> Any:
        """The Trainer's loader, but for two of its habits.

        It would drop the last short batch of an evaluation too, and give the rows of a stream,
        which has split itself among ranks and workers already, to the ranks once more.
        """
        args, is_training = self.args, options.get("is_training", False)
        if isinstance(dataset, IterableDataset):
            workers = args.dataloader_num_workers
            loader = DataLoader(
                dataset,
                batch_size=batch_size,
                collate_fn=self.data_collator,
                num_workers=workers,
                persistent_workers=args.dataloader_persistent_workers and workers > 0,
                pin_memory=args.dataloader_pin_memory,
                prefetch_factor=args.dataloader_prefetch_factor,
                multiprocessing_context=args.dataloader_multiprocessing_context,
                in_order=args.dataloader_in_order,
                drop_last=args.dataloader_drop_last and is_training,
            )
            return own_generator(loader, args)
        drop_last = args.dataloader_drop_last
        args.dataloader_drop_last = drop_last and is_training
        try:
            return super()._get_dataloader(dataset, description, batch_size, **options)
        finally:
            args.dataloader_drop_last = drop_last


def own_generator(loader: Any, args: TrainingArguments) -> Any:
    """Let a DataLoader draw the seeds of its workers elsewhere than DropPath draws on a CPU.

    With persistent workers it draws once in a run, else once in an epoch; a resumed run draws once
    more, and would see other DropPath draws.
    """
    base: DataLoader[Any] = getattr(loader, "base_dataloader", loader)  # accelerate's wrapper
    base.generator = torch.Generator().manual_seed(args.seed)
    return loader
