"""`evaluate.Metric` for semantic segmentation, fed with class maps of any size.

Maps become counts as they are added: memory and the cache file do not grow with the set, where
the stock mean_iou keeps every map. Load it with `evaluate.load(path to this folder)`; the library
reads the imports below line by line, and takes no two modules on one line.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import datasets
import evaluate
import numpy as np
import torch

from kd_trainer.metrics import SegmentationCounts, image_counts

DESCRIPTION = """\
Figures of a semantic segmentation from confusion counts summed over the data set: mIoU, Dice,
precision and recall of the foreground, pixel accuracy, the mean of per-image IoU, boundary IoU
(2 % of the diagonal), and IoU and Dice of each class.
"""

INPUTS = """\
Args:
    predictions: class maps, each integer (H, W); sizes may differ from image to image.
    references: class maps of the same sizes, `ignore_index` where a pixel does not count.
Set with `evaluate.load(path, num_labels=..., id2label=..., ignore_index=...)`:
    num_labels: number of classes, background included (2 by default).
    id2label: name of each class; by default "background", then "class_1" and so on.
    ignore_index: label of the pixels that do not count (255 by default).
Returns:
    A dictionary of floats; NaN where there was nothing to measure.
"""

CITATION = """\
@inproceedings{cheng2021boundary,
  title={Boundary {IoU}: Improving Object-Centric Image Segmentation Evaluation},
  author={Cheng, Bowen and Girshick, Ross and Doll{\\'a}r, Piotr and Berg, Alexander C.
          and Kirillov, Alexander},
  booktitle={CVPR},
  year={2021}
}
"""

# What one process writes for the others: its integer totals, and its one real number.
TOTALS = datasets.Features(
    {
        "predictions": datasets.Sequence(datasets.Value("int64")),
        "references": datasets.Sequence(datasets.Value("float64")),
    }
)


class Segmentation(evaluate.Metric):
    """Counts in `add_batch`, one row of totals on disk, ratios in `compute`."""

    def __init__(
        self,
        *args: Any,
        num_labels: int = 2,
        id2label: Mapping[int, str] | None = None,
        ignore_index: int = 255,
        **kwargs: Any,
    ) -> None:
        if num_labels < 2:
            raise ValueError(
                f"Expected num_labels >= 2, got {num_labels}. Count the background too."
            )
        self.num_labels = num_labels
        self.ignore_index = ignore_index
        self.id2label = dict(id2label or _default_names(num_labels))
        self.totals = SegmentationCounts.zero(num_labels)
        self.added = 0
        super().__init__(*args, **kwargs)

    def __len__(self) -> int:
        """Images added since the last `compute`."""
        return self.added

    def _info(self) -> evaluate.MetricInfo:
        maps = datasets.Sequence(datasets.Sequence(datasets.Value("int64")))
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features({"predictions": maps, "references": maps}),
            reference_urls=["https://arxiv.org/abs/2103.16562"],
        )

    def add(self, *, prediction: Any = None, reference: Any = None, **kwargs: Any) -> None:
        """Count one image: two class maps (H, W)."""
        self.add_batch(predictions=[prediction], references=[reference], **kwargs)

    def add_batch(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> None:
        """Count the images of a batch: class maps (B, H, W), or lists of maps of any sizes.

        Raises:
            ValueError: if the numbers or sizes of maps differ, or a map holds unknown class ids.
            TypeError: if a map is not of integers.
        """
        if kwargs:
            raise ValueError(
                f"Expected predictions and references alone, got {sorted(kwargs)} too. "
                "Give num_labels, id2label and ignore_index to evaluate.load."
            )
        pairs = list(_pairs(predictions, references))
        totals = self.totals
        for prediction, reference in pairs:
            totals = totals.add(self._row(prediction, reference))
        if self.writer is None:
            # The library's processes meet here, at their first batch.
            self.selected_feature_format = TOTALS
            self._init_writer()
        # Only now: a batch that was refused leaves nothing behind.
        self.totals, self.added = totals, self.added + len(pairs)

    def _row(self, prediction: Any, reference: Any) -> Any:
        guess, truth = _map("prediction", prediction), _map("reference", reference)
        if guess.shape != truth.shape:
            raise ValueError(
                f"Expected prediction and reference of one size, got {tuple(guess.shape)} and "
                f"{tuple(truth.shape)}. Resize the prediction to the reference."
            )
        valid = truth != self.ignore_index
        for what, ids in (("prediction", guess[valid]), ("reference", truth[valid])):
            unknown = ids[(ids < 0) | (ids >= self.num_labels)].unique().tolist()
            if unknown:
                raise ValueError(
                    f"Expected class ids 0..{self.num_labels - 1} in the {what}, got {unknown}. "
                    f"Map the classes first, or give ignore_index (now {self.ignore_index})."
                )
        counts = image_counts(
            guess[None], truth[None], self.num_labels, ignore_index=self.ignore_index
        )
        return counts.numpy()

    def _finalize(self) -> None:
        if self.writer is not None:
            totals = self.totals
            integers = [*totals.confusion.flat, *totals.boundary.flat, totals.images]
            self.writer.write(
                {"predictions": [int(n) for n in integers], "references": [totals.image_iou_sum]}
            )
        self.totals, self.added = SegmentationCounts.zero(self.num_labels), 0
        super()._finalize()

    def _compute(
        self, *, predictions: list[list[int]], references: list[list[float]]
    ) -> dict[str, float]:
        totals = SegmentationCounts.zero(self.num_labels)
        classes = self.num_labels
        for integers, (image_iou_sum,) in zip(predictions, references, strict=True):
            numbers = np.asarray(integers, dtype=np.int64)
            totals += SegmentationCounts(
                numbers[: classes * classes].reshape(classes, classes),
                numbers[classes * classes : -1].reshape(2, classes),
                image_iou_sum,
                int(numbers[-1]),
            )
        return totals.metrics(self.id2label)


def _default_names(num_labels: int) -> dict[int, str]:
    return {0: "background"} | {index: f"class_{index}" for index in range(1, num_labels)}


def _pairs(predictions: Any, references: Any) -> Iterable[tuple[Any, Any]]:
    if predictions is None or references is None or len(predictions) != len(references):
        sizes = [None if maps is None else len(maps) for maps in (predictions, references)]
        raise ValueError(
            f"Expected as many references as predictions, got {sizes[1]} for {sizes[0]}. "
            "Give one reference map for each prediction."
        )
    return zip(predictions, references, strict=True)


def _map(what: str, values: Any) -> torch.Tensor:
    """A class map as int64 (H, W) on the host, from a tensor, an array, an image or nested lists.

    Class ids that came back as floats are refused: rounding them could hide probabilities.
    """
    tensor = values if isinstance(values, torch.Tensor) else torch.from_numpy(np.array(values))
    if tensor.is_floating_point() or tensor.is_complex():
        raise TypeError(
            f"Expected an integer {what}, got {tensor.dtype}. Take the classes of the logits first."
        )
    if tensor.ndim != 2:
        raise ValueError(
            f"Expected a {what} (H, W), got shape {tuple(tensor.shape)}. "
            "Pass class maps in batches or lists, without a channel dimension."
        )
    return tensor.cpu().long()
