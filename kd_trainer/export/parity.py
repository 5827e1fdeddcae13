"""An exported student against the one it came from: the same images, the same masks?"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from kd_trainer.evaluation import figures_of, labels_of, masks_of
from kd_trainer.export.graph import uses_sigmoid
from kd_trainer.metrics import image_counts, plane_counts
from kd_trainer.students import has_several_labels, processor_of, student_logits

# uint8 images (B, 3, H, W), or normalised floats (B, C, H, W) of images of another depth, and,
# where they are known, class ids (B, H, W), or planes (B, K, H, W) of several labels a pixel.
CheckBatch = tuple[Tensor, Tensor | None]
# Raw logits (or probabilities) of such images.
Network = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Parity:
    """How an export compares with the student.

    Args:
        images: on which both ran.
        largest_difference: of any output value, absolute.
        value_range: largest minus smallest output value of the student.
        mask_iou: mIoU of the export's masks with the student's.
        miou: of the export with the true masks; None if they are unknown.
        torch_miou: of the student.
    """

    images: int
    largest_difference: float
    value_range: float
    mask_iou: float
    miou: float | None = None
    torch_miou: float | None = None

    @property
    def relative_difference(self) -> float:
        """Largest difference as a share of the range of the student's values."""
        return self.largest_difference / max(self.value_range, 1e-12)

    @property
    def drop(self) -> float | None:
        """How many points (hundredths) of mIoU the export lost; None without true masks."""
        if self.miou is None or self.torch_miou is None:
            return None
        return 100 * (self.torch_miou - self.miou)


class Reference:
    """The student in torch, fed by the image processor that is saved beside it.

    Args:
        student: on the CPU, in eval mode.
        probabilities: give what a graph with preprocessing gives.
    """

    def __init__(self, student: nn.Module, *, probabilities: bool) -> None:
        self.student = student
        self.probabilities = probabilities
        self.multi_label, self.sigmoid = has_several_labels(student), uses_sigmoid(student)
        self.processor = processor_of(student)

    def prepare(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) as normalised floats of the same size; floats are so already."""
        if images.is_floating_point():
            return images
        made = self.processor(list(images), do_resize=False, return_tensors="pt")
        pixels: Tensor = made["pixel_values"]
        return pixels

    def __call__(self, images: Tensor) -> Tensor:
        """Raw logits, or probabilities, (B, K, H, W), of uint8 (B, 3, H, W)."""
        return self.output(self.prepare(images))

    @torch.no_grad()
    def output(self, pixels: Tensor) -> Tensor:
        """The same of normalised floats (B, 3, H, W)."""
        raw = student_logits(self.student, pixels)
        if not self.probabilities:
            return raw
        return raw.sigmoid() if self.sigmoid else raw.softmax(dim=1)

    def classes(self, output: Tensor) -> Tensor:
        """Masks of an output, see `masks_of`."""
        if self.sigmoid and self.probabilities:
            output = output - 0.5
        return masks_of(output, multi_label=self.multi_label)


@torch.no_grad()
def compare(
    reference: Reference,
    exported: Network,
    batches: Iterable[CheckBatch],
    *,
    ignore_index: int = 255,
    title: str = "check",
) -> Parity:
    """Run both on the same images."""
    labels, several = labels_of(reference.student), reference.multi_label
    counts_of = plane_counts if several else partial(image_counts, num_labels=len(labels))
    lowest, highest, difference, count = np.inf, -np.inf, 0.0, 0
    rows: dict[str, list[np.ndarray]] = {"agreement": [], "torch": [], "export": []}
    for images, truth in tqdm(batches, desc=title, unit="batch", disable=None):
        wanted, found = reference(images), exported(images)
        if wanted.shape != found.shape:
            raise ValueError(
                f"Expected an output of shape {tuple(wanted.shape)}, got {tuple(found.shape)} from "
                "the export. This is a defect: please report it with the model's name."
            )
        error = (wanted - found).abs().max().item()
        difference = max(difference, error if np.isfinite(error) else np.inf)
        lowest = min(lowest, wanted.min().item())
        highest = max(highest, wanted.max().item())
        classes = {"torch": reference.classes(wanted), "export": reference.classes(found)}
        pairs = [("agreement", classes["export"], classes["torch"], -1)]
        if truth is not None:
            pairs += [(who, guess, truth, ignore_index) for who, guess in classes.items()]
        for name, guess, target, ignored in pairs:
            counts = counts_of(guess, target.long(), ignore_index=ignored, boundary=False)
            rows[name].append(counts.numpy())
        count += len(images)
    miou = {
        name: figures_of(np.concatenate(parts), labels, multi_label=several)["miou"]
        for name, parts in rows.items()
        if parts
    }
    return Parity(
        images=count,
        largest_difference=difference,
        value_range=highest - lowest,
        mask_iou=miou["agreement"],
        miou=miou.get("export"),
        torch_miou=miou.get("torch"),
    )
