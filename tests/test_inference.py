"""Pictures of any size to logits of that size: whole, in tiles, mirrored."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from kd_trainer.evaluation import normalise
from kd_trainer.inference import Segmenter, classes_at, tile_starts
from kd_trainer.models.image_processing import resize_image

SIDE = 32
STATISTICS = (torch.full((1, 3, 1, 1), 100.0), torch.full((1, 3, 1, 1), 50.0))


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def pointwise(images: torch.Tensor) -> torch.Tensor:
    """Two logits that look at one pixel alone, so that tiles cannot make a difference."""
    return torch.stack([images[:, 0] - images[:, 2], images[:, 1] * 2], dim=1)


def edges(images: torch.Tensor) -> torch.Tensor:
    """A logit that looks to the right only, so that a mirror makes a difference."""
    return F.pad(images[:, :1, :, 1:], (0, 1)) - images[:, :1]


def segmenter(network=pointwise, **options) -> Segmenter:
    return Segmenter(network, (SIDE, SIDE), STATISTICS, **options)


def channels_first(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(image).permute(2, 0, 1)[None]


@given(length=st.integers(1, 700), side=st.sampled_from([32, 64]), overlap=st.floats(0, 0.95))
def test_tiles_cover_everything_and_overlap_as_asked(length: int, side: int, overlap: float):
    """A row of pixels that no tile sees would be divided by a weight of zero."""
    length += side
    starts = tile_starts(length, side, overlap)
    assert (starts[0], starts[-1]) == (0, length - side)
    steps = np.diff(starts)
    assert (steps > 0).all()
    assert (steps <= max(1, int(side * (1 - overlap))) + 1).all()


@pytest.mark.parametrize(("height", "width"), [(100, 75), (33, 32), (200, 20), (20, 70)])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_tiles_are_put_back_where_they_were_cut(height: int, width: int, batch_size: int):
    """A tile put one pixel off leaves seams that look like errors of the network."""
    image = picture(height, width)
    (found,) = segmenter(tile=True, batch_size=batch_size).logits([image])
    expected = pointwise(normalise(channels_first(image), STATISTICS))[0]
    assert torch.allclose(found, expected, atol=1e-4)


def test_pictures_no_larger_than_the_input_are_not_cut():
    """Small pictures would be padded by most of a tile."""
    small, large = picture(20, 32), picture(64, 64)
    mixed = segmenter(tile=True).logits([large, small, large])
    plain = segmenter().logits([small])
    assert torch.equal(mixed[1], plain[0])
    assert torch.equal(mixed[0], mixed[2])
    assert [tuple(m.shape) for m in mixed] == [(2, 64, 64), (2, 20, 32), (2, 64, 64)]


def test_whole_pictures_are_shrunk_as_in_training_and_their_logits_resized():
    """Any other resize shows the network pixels it was not trained on."""
    image = picture(90, 50)
    (found,) = segmenter().logits([image])
    small = resize_image(channels_first(image), SIDE, SIDE)
    raw = pointwise(normalise(small, STATISTICS))
    expected = F.interpolate(raw, (90, 50), mode="bilinear", align_corners=False)[0]
    assert torch.allclose(found, expected, atol=1e-5)


def test_the_input_that_is_timed_is_the_input_that_is_predicted():
    """Times of another size would be those of another model."""
    seen = []
    looks = segmenter(lambda images: (seen.append(images), pointwise(images))[1])
    looks.logits([picture(90, 50)])
    assert torch.equal(looks.network_input(picture(90, 50)), seen[0])


@pytest.mark.parametrize("tile", [False, True])
def test_flip_gives_a_mirrored_picture_the_mirrored_answer(tile: bool):
    """Without turning the second look back, it would blur the mask with its mirror image."""
    image = picture(64, 64)
    looks = segmenter(edges, flip=True, tile=tile)
    (found,), (mirrored,) = looks.logits([image]), looks.logits([image[:, ::-1].copy()])
    assert torch.allclose(found, mirrored.flip(-1), atol=1e-5)
    (single,) = segmenter(edges, tile=tile).logits([image])
    assert not torch.allclose(found, single, atol=1e-2)


def test_threshold_counts_probabilities_of_one_logit_only():
    """A threshold on the logit itself would be another one than asked for."""
    logit = torch.tensor([[[-1.0, 0.0, 1.0, 3.0]]])
    assert classes_at(logit).tolist() == [[0, 1, 1, 1]]
    assert classes_at(logit, 0.9).tolist() == [[0, 0, 0, 1]]
    softmax = torch.stack([torch.zeros(1, 4), logit[0]])
    assert classes_at(softmax, 0.9).tolist() == [[0, 0, 0, 1]]
    several = torch.tensor([[[1.0, 0.0]], [[0.0, 0.5]], [[0.5, 2.0]]])
    assert classes_at(several, 0.9).tolist() == [[0, 2]]
