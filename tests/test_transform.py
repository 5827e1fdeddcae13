"""The transform of a row, the map-style data set around it, and the loaders that read it."""

import cv2
import datasets
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from kd_trainer.data import (
    MaskRule,
    SegmentationTransform,
    TransformedDataset,
    collate,
    load_splits,
    mask_rule,
    transforms,
)
from kd_trainer.data.listing import FEATURES
from kd_trainer.data_arguments import DataArguments
from kd_trainer.models.image_processing import resize_image

SIZE = 32


def png(array):
    array = array[..., ::-1] if array.ndim == 3 else array
    return cv2.imencode(".png", np.ascontiguousarray(array))[1].tobytes()


def row(image, mask, name="a"):
    cell = None if mask is None else {"bytes": png(mask), "path": f"{name}.mask"}
    return {"image": {"bytes": png(image), "path": f"{name}.image"}, "mask": cell}


def pair(seed=0, height=48, width=40):
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    mask = np.zeros((height, width), np.uint8)
    mask[rng.integers(20) :, : rng.integers(5, width)] = 1
    return image, mask


def transform(augmentation="none", *, rule=None, seed=0, size=SIZE):
    return SegmentationTransform(
        size,
        rule or MaskRule((0, 1)),
        augmentation=augmentation,
        seed=seed,
        brightness_contrast_probability=0.8,
    )


def rows(count=10):
    return [row(*pair(i)) for i in range(count)]


def test_a_sample_has_bytes_of_the_network_size():
    sample = transform()(row(*pair()), epoch=0, index=0)
    assert {k: (v.dtype, tuple(v.shape)) for k, v in sample.items()} == {
        "pixel_values": (torch.uint8, (3, SIZE, SIZE)),
        "labels": (torch.uint8, (SIZE, SIZE)),
        "distil_mask": (torch.bool, (SIZE, SIZE)),
    }
    assert sample["pixel_values"].is_contiguous()
    assert sample["distil_mask"].all()


def test_pixels_are_those_of_the_image_processor():
    """Another resize than in deployment shifts what the student sees by 0.7 grey levels."""
    image, mask = pair()
    sample = transform()(row(image, mask), epoch=0, index=0)
    expected = resize_image(torch.from_numpy(image).permute(2, 0, 1), SIZE, SIZE)
    assert torch.equal(sample["pixel_values"], expected)


def test_masks_are_resized_without_new_values_and_without_a_shift():
    """An interpolated mask has classes that nobody labelled; a shifted one has wrong edges."""
    values = np.kron(np.array([[0, 5], [2, 255]], np.uint8), np.ones((32, 32), np.uint8))
    image = np.zeros((64, 64, 3), np.uint8)
    rule = MaskRule(tuple(range(6)))
    labels = transform(rule=rule)(row(image, values), epoch=0, index=0)["labels"]
    expected = np.kron(np.array([[0, 5], [2, 255]], np.uint8), np.ones((16, 16), np.uint8))
    np.testing.assert_array_equal(labels.numpy(), expected)
    large = transform(rule=rule, size=128)(row(image, values), epoch=0, index=0)["labels"]
    np.testing.assert_array_equal(large, np.kron(expected, np.ones((4, 4), np.uint8)))


def test_an_image_without_mask_is_ignored_by_the_task_and_kept_for_distillation():
    image, _ = pair()
    sample = transform(rule=MaskRule((0, 1), 200))(row(image, None), epoch=0, index=0)
    assert (sample["labels"] == 200).all()
    assert sample["distil_mask"].all()


def test_pixels_from_outside_are_neither_labelled_nor_distilled():
    """Else the student learns that grey wedges are background, as the teacher guesses there."""
    make = transform("light")
    outside = 0
    for index in range(30):
        sample = make(row(*pair(index)), epoch=0, index=index)
        assert torch.equal(sample["labels"] == 255, ~sample["distil_mask"])
        outside += int((~sample["distil_mask"]).any())
        bare = make(row(pair(index)[0], None), epoch=0, index=index)
        assert torch.equal(bare["distil_mask"], sample["distil_mask"])
        assert torch.equal(bare["pixel_values"], sample["pixel_values"])
    assert outside > 5


def test_ignored_pixels_stay_ignored_through_augmentation_and_are_not_distilled():
    """Training would else follow the teacher on pixels that no evaluation looks at."""
    image, mask = pair()
    mask[:] = 255
    for index in range(10):
        sample = transform("heavy")(row(image, mask), epoch=0, index=index)
        assert (sample["labels"] == 255).all()
        assert not sample["distil_mask"].any()


@pytest.mark.parametrize("kind", ["heavy", "light"])
def test_the_mask_can_be_read_off_the_augmented_image(kind):
    make = transform(kind)
    for index in range(40):
        _, mask = pair(index)
        image = np.where(mask[..., None] == 1, 220, 40).astype(np.uint8).repeat(3, axis=2)
        sample = make(row(image, mask), epoch=0, index=index)
        bright = sample["pixel_values"].float().mean(0)
        labels = sample["labels"]
        assert bright[labels == 1].mean() > bright[labels == 0].mean() + 50, index


def test_a_mask_of_another_size_is_an_error_that_names_both_files():
    image, mask = pair()
    with pytest.raises(
        ValueError, match=r"40x48 pixels like its image row.image \(row 5\), got 40x47"
    ):
        transform()(row(image, mask[1:], "row"), epoch=0, index=5)
    with pytest.raises(ValueError, match="EXIF orientation"):
        transform()(row(image, mask.T), epoch=0, index=0)


def test_wrong_class_ids_are_named_with_their_file():
    image, mask = pair()
    with pytest.raises(ValueError, match=r"got 0, 3 in bad.mask \(row 2\).*--mask_values"):
        transform()(row(image, mask * 3, "bad"), epoch=0, index=2)


def loader(dataset, **options):
    return DataLoader(dataset, batch_size=2, collate_fn=collate, **options)


def images(batches):
    return torch.cat([batch["pixel_values"] for batch in batches])


@pytest.mark.parametrize("options", [{"num_workers": 1}, {"num_workers": 2}])
def test_samples_do_not_depend_on_the_workers(options):
    """The library's streams are the same in each worker: 2 workers see every draw twice."""
    dataset = TransformedDataset(rows(), transform("heavy"))
    dataset.set_epoch(3)
    alone = images(loader(dataset))
    assert torch.equal(alone, images(loader(dataset, **options)))


def test_persistent_workers_see_the_epoch():
    """A plain attribute stays at the first epoch in workers that live on."""
    dataset = TransformedDataset(rows(), transform("heavy"))
    batches = loader(dataset, num_workers=1, persistent_workers=True)
    seen = []
    for epoch in range(2):
        dataset.set_epoch(epoch)
        seen.append(images(batches))
        assert torch.equal(seen[-1], images([collate([dataset[i] for i in range(10)])]))
    assert not torch.equal(*seen)


def test_a_row_gives_the_same_sample_in_any_order():
    dataset = TransformedDataset(rows(), transform("heavy"))
    first = [dataset[i]["pixel_values"] for i in range(10)]
    again = [dataset[i]["pixel_values"] for i in reversed(range(10))][::-1]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert torch.equal(dataset[-1]["pixel_values"], first[-1])
    with pytest.raises(IndexError):
        dataset[10]
    with pytest.raises(ValueError, match="epoch >= 0, got -1"):
        dataset.set_epoch(-1)


def test_a_batch_stacks_bytes():
    batch = collate([transform()(r, epoch=0, index=0) for r in rows(3)])
    assert batch["pixel_values"].shape == (3, 3, SIZE, SIZE)
    assert batch["pixel_values"].dtype == batch["labels"].dtype == torch.uint8
    assert batch["distil_mask"].shape == (3, SIZE, SIZE)


# --- from the arguments --------------------------------------------------------------------------


def splits(*masks, images=None):
    made = images or [np.zeros((*m.shape, 3), np.uint8) for m in masks]
    table = [row(image, mask) for image, mask in zip(made, masks, strict=True)]
    return {"train": datasets.Dataset.from_list(table, features=FEATURES)}


def test_transforms_share_the_rule_and_only_training_is_augmented(pair_folder):
    data = DataArguments(dataset=str(pair_folder), image_size=32)
    training, evaluation = transforms(load_splits(data), data, seed=7)
    assert training.rule is evaluation.rule
    assert training.rule.values == (0, 255)
    assert (training.augment.kind, training.augment.seed) == ("heavy", 7)
    assert evaluation.augment.kind == "none"


def test_given_mask_values_win_and_are_checked():
    mask = np.array([[0, 9], [9, 0]], np.uint8)
    data = DataArguments(mask_values=[9, 0])
    assert mask_rule(splits(mask), data) == MaskRule((9, 0))
    with pytest.raises(ValueError, match=r"got 0, 9 in a.mask"):
        mask_rule(splits(mask), DataArguments(mask_values=[0, 8]))
    with pytest.raises(ValueError, match=r"Expected 2 --mask_values .* got 3: 0 1 2"):
        mask_rule(splits(mask), DataArguments(mask_values=[0, 1, 2]))


def test_given_values_of_which_only_the_background_counts_are_refused():
    """Masks of 0 and 255, read as 0, 1 and ignored, gave an IoU of 0 without a word."""
    mask = np.array([[0, 255], [255, 0]], np.uint8)
    for every_class in (False, True):
        with pytest.raises(ValueError, match=r"a class that counts, got only background and 255 "):
            mask_rule(splits(mask), DataArguments(mask_values=[0, 1]), every_class=every_class)
    with pytest.raises(ValueError, match=r"got only 255 \(--ignore_index and 0, by --reduce"):
        mask_rule(splits(np.zeros_like(mask)), DataArguments(reduce_labels=True))
    one = np.array([[0, 1], [1, 255]], np.uint8)
    mask_rule(splits(one), DataArguments(mask_values=[0, 1]))
    mask_rule(splits(one), DataArguments(reduce_labels=True))


def test_a_wrong_size_is_found_before_the_first_epoch():
    mask = np.array([[0, 1], [1, 0]], np.uint8)
    wrong = splits(mask, images=[np.zeros((2, 3, 3), np.uint8)])
    with pytest.raises(ValueError, match="3x2 pixels like its image"):
        mask_rule(wrong, DataArguments())


def test_a_few_labelled_rows_are_found_among_many_unlabelled():
    """A sample spread over all rows would look at one mask in forty, or at none."""
    image = np.zeros((2, 2, 3), np.uint8)
    empty, full = np.zeros((2, 2), np.uint8), np.ones((2, 2), np.uint8)
    table = [row(image, mask) for mask in (empty, empty, full)] + [row(image, None)] * 600
    made = {"train": datasets.Dataset.from_list(table, features=FEATURES)}
    assert mask_rule(made, DataArguments()).values == (0, 1)


def test_a_model_is_evaluated_on_a_split_that_shows_fewer_classes():
    """The doubts that help to set up a training would refuse a split without any foreground."""
    image, mask = np.zeros((2, 2, 3), np.uint8), np.array([[0, 1], [1, 0]], np.uint8)

    def rule(mask: np.ndarray, **options) -> tuple[int, ...]:
        made = {"test": datasets.Dataset.from_list([row(image, mask)], features=FEATURES)}
        return mask_rule(made, DataArguments(**options), every_class=False).values

    assert rule(mask, num_labels=4) == (0, 1, 2, 3)
    assert rule(mask * 0) == (0, 1)
    assert rule(mask * 255) == (0, 255)
    with pytest.raises(ValueError, match="got 0, 7"):
        rule(mask * 7, num_labels=4)


def test_unlabelled_rows_do_not_decide_the_rule():
    mask = np.array([[0, 1], [1, 0]], np.uint8)
    image = np.zeros((2, 2, 3), np.uint8)
    table = [row(image, None), row(image, mask)]
    made = {"train": datasets.Dataset.from_list(table, features=FEATURES)}
    assert mask_rule(made, DataArguments()).values == (0, 1)
