"""Strong views, mixed images and scale jitter: what the student sees, and what the teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from same_run import assert_resumes_exactly
from tiny import SIDE, Squares, arguments, tiny_student, tiny_teacher

from kd_trainer.config import parse
from kd_trainer.data import (
    MaskRule,
    SegmentationTransform,
    TransformedDataset,
    collate,
    load_splits,
    transforms,
)
from kd_trainer.data.views import AREA, MIX_BOX, MIX_CLASSES, RATIO, STRONG, Views, student_batch
from kd_trainer.data_arguments import DataArguments
from kd_trainer.losses import LossWeights, distillation_terms, labelled_images, weighted_sum
from kd_trainer.models.image_processing import PADDING
from kd_trainer.trainer import DistillationTrainer

SIZE = (24, 40)
IGNORE = 255


def row_of(number: int, *, labelled: bool = True) -> dict[str, Any]:
    draw = np.random.default_rng(number)

    def cell(pixels: np.ndarray) -> dict[str, Any]:
        return {"bytes": cv2.imencode(".png", pixels)[1].tobytes(), "path": f"{number}.png"}

    image = cv2.resize(draw.integers(0, 256, (5, 6, 3), dtype=np.uint8), (60, 50))
    mask = np.zeros((50, 60), np.uint8)
    mask[10:40, number % 20 : number % 20 + 30] = 1
    return {"image": cell(image), "mask": cell(mask) if labelled else None}


def transform(augmentation: str = "heavy", **options: Any) -> SegmentationTransform:
    return SegmentationTransform(
        SIZE,
        MaskRule((0, 1), IGNORE),
        augmentation=augmentation,
        seed=3,
        brightness_contrast_probability=0.8,
        **options,
    )


def batch_of(*, boxes: list[list[int]] | None = None, unlabelled: tuple[int, ...] = ()) -> dict:
    """Four images whose pixels all tell which image, row and column they are of."""
    place = torch.arange(4 * 6 * 8).view(4, 6, 8)
    labels = (place % 3).to(torch.uint8)
    labels[:, 0] = IGNORE
    followed = labels != IGNORE
    for image in unlabelled:
        labels[image], followed[image] = IGNORE, True
        followed[image, -1] = False
    batch = {
        "pixel_values": place.unsqueeze(1).repeat(1, 3, 1, 1).to(torch.uint8),
        "labels": labels,
        "distil_mask": followed,
        "teacher_logits": place.float().unsqueeze(1) + torch.tensor([0, 0.25, 0.5]).view(3, 1, 1),
    }
    if boxes is not None:
        batch[MIX_BOX] = torch.tensor(boxes).unsqueeze(1)
    return batch


def test_a_box_of_the_partner_is_pasted_into_image_labels_mask_and_teacher_alike():
    """A teacher's map from another place than the image teaches nonsense without an error."""
    boxes = [[1, 2, 4, 7], [0, 0, 0, 0], [0, 0, 6, 8], [2, 0, 3, 1]]
    batch = batch_of(boxes=boxes, unlabelled=(3,))
    clean = {name: value.clone() for name, value in batch.items()}
    mixed = student_batch(batch, None, ignore_index=IGNORE)
    assert MIX_BOX not in mixed
    for name in ("pixel_values", "labels", "distil_mask", "teacher_logits"):
        assert torch.equal(batch[name], clean[name])  # in place, the teacher's images would change
        for image, (top, left, bottom, right) in enumerate(boxes):
            wanted = clean[name][image].clone()
            area = (..., slice(top, bottom), slice(left, right))
            wanted[area] = clean[name][3 - image][area]
            assert torch.equal(mixed[name][image], wanted), (name, image)


def test_of_a_partner_the_first_half_of_its_classes_is_pasted():
    """Counted by hand: of three classes one, of the ignored pixels none, of one class none."""
    batch = batch_of()
    batch["labels"][1] = 2  # one class: half of it, rounded down, is none
    ranks = torch.tensor([[2, 0, 1], [0, 1, 2], [0, 1, 2], [3, 3, 3]])
    batch[MIX_CLASSES] = ranks.unsqueeze(1)
    mixed = student_batch(batch, None, ignore_index=IGNORE)
    for image, pasted in enumerate((1, 0, None, None)):
        other = batch["labels"][3 - image]
        area = torch.zeros_like(other, dtype=torch.bool) if pasted is None else other == pasted
        for name in ("pixel_values", "labels", "distil_mask", "teacher_logits"):
            here, there = batch[name][image], batch[name][3 - image]
            assert torch.equal(mixed[name][image], torch.where(area, there, here)), (name, image)
    assert not torch.equal(mixed["pixel_values"], batch["pixel_values"])


def test_classes_of_an_image_without_labels_are_those_that_the_teacher_finds():
    """Else nothing of such an image would ever be pasted, nor anything of its padding kept out."""
    batch = batch_of(unlabelled=(3,))
    found = torch.zeros(4, 6, 8, dtype=torch.long)
    found[3, :, 4:] = 1
    batch[MIX_CLASSES] = torch.tensor([[1, 0, 2]] + [[3, 3, 3]] * 3).unsqueeze(1)
    mixed = student_batch(batch, found, ignore_index=IGNORE)
    area = torch.zeros(6, 8, dtype=torch.bool)
    area[:-1, 4:] = True  # the last row is from outside of the image
    wanted = torch.where(area, batch["pixel_values"][3], batch["pixel_values"][0])
    assert torch.equal(mixed["pixel_values"][0], wanted)
    assert (mixed["labels"][0][area] == IGNORE).all()
    assert mixed["distil_mask"][0][area].all()


def test_two_views_are_one_batch_twice_as_large_whose_targets_are_repeated():
    """View by view, so that the reversed batch pairs each view with another image."""
    batch = batch_of()
    strong = torch.randint(0, 256, (4, 2, 3, 6, 8), dtype=torch.uint8)
    batch[STRONG] = strong
    batch[MIX_BOX] = torch.tensor([[0, 0, 2, 2]] * 8).view(4, 2, 4)
    seen = student_batch(batch, None, ignore_index=IGNORE)
    views = torch.cat([strong[:, 0], strong[:, 1]])
    targets = torch.cat([batch["labels"]] * 2)
    for name, whole in (("pixel_values", views), ("labels", targets)):
        wanted = whole.clone()
        wanted[..., :2, :2] = whole.flip(0)[..., :2, :2]
        assert torch.equal(seen[name], wanted)
    assert len(seen["teacher_logits"]) == len(seen["distil_mask"]) == 8


def test_labels_pasted_into_an_image_without_any_make_it_count_in_the_mean_of_the_dice():
    """Their number divides the sum of their Dice: without the pasted ones it is too large."""
    whole, nothing = [0, 0, 6, 8], [0, 0, 0, 0]
    into = batch_of(boxes=[nothing, nothing, [2, 2, 4, 4], whole], unlabelled=(0, 2))
    seen = student_batch(into, None, ignore_index=IGNORE)
    assert (seen["labels"][3] == IGNORE).all()  # its partner, image 0, has none
    assert labelled_images([into], IGNORE) == 2
    assert labelled_images([seen], IGNORE) == 2  # 1 and 2 now
    options = {"temperature": 1.0, "weights": LossWeights(dice=1.0, bce=1.0)}
    logits = torch.randn(4, 3, 6, 8)
    terms = distillation_terms(logits, None, seen["labels"], **options)
    alone = [
        distillation_terms(logits[i : i + 1], None, seen["labels"][i : i + 1], **options)
        for i in (1, 2)
    ]
    torch.testing.assert_close(terms.dice, (alone[0].dice + alone[1].dice) / 2)
    pixels = [(seen["labels"][i] != IGNORE).sum() for i in (1, 2)]
    mean = sum(n * one.bce for n, one in zip(pixels, alone, strict=True)) / sum(pixels)
    torch.testing.assert_close(terms.bce, mean)


def test_draws_of_a_mix_are_functions_of_seed_epoch_and_row():
    """A resumed run would see other images, and each view has a draw of its own."""
    views = Views(strong=2, mix=0.5)
    shown = [
        views.draw_mix([1, epoch, row], SIZE)[MIX_BOX] for epoch in range(20) for row in range(20)
    ]
    again = [
        views.draw_mix([1, epoch, row], SIZE)[MIX_BOX] for epoch in range(20) for row in range(20)
    ]
    assert all(map(torch.equal, shown, again))
    boxes = torch.stack(shown).flatten(0, 1)
    sides = boxes[:, 2:] - boxes[:, :2]
    mixed = (sides > 0).all(dim=1)
    assert 0.44 < mixed.float().mean() < 0.56
    assert (boxes[~mixed] == 0).all()
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 2:] <= torch.tensor(SIZE)).all()
    shares = (sides[mixed] / torch.tensor(SIZE)).prod(dim=1)
    assert AREA[0] * 0.6 < shares.min() < 0.05  # rounded to whole pixels
    assert 0.35 < shares.max() < AREA[1] * 1.1
    ratios = (sides[mixed, 0] / SIZE[0]) / (sides[mixed, 1] / SIZE[1])
    assert ratios.min() > RATIO[0] * 0.8
    assert ratios.max() < RATIO[1] * 1.25
    assert 0.9 < ratios.log().mean().exp() < 1.1  # as often upright as lying
    assert not torch.equal(shown[0], shown[1])
    both = torch.stack(shown)
    assert not torch.equal(both[:, 0], both[:, 1])
    ranks = Views(mix=1, classes=5).draw_mix([1, 0, 0], SIZE)[MIX_CLASSES]
    assert sorted(ranks[0].tolist()) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("augmentation", ["heavy", "light", "none"])
def test_strong_views_change_colours_and_nothing_else(augmentation: str):
    """Geometry in a view would leave its labels, and the teacher's answers, behind."""
    make, plain = transform(augmentation, views=Views(strong=2)), transform(augmentation)
    differences = []
    for epoch in range(8):
        one, again = (make(row_of(1), epoch=epoch, index=1) for _ in range(2))
        assert all(torch.equal(one[name], again[name]) for name in one)
        assert one[STRONG].shape == (2, 3, *SIZE)
        assert one[STRONG].dtype == torch.uint8
        weak = one["pixel_values"].float()
        for view in one[STRONG].float():
            # Of the same place: the same pixels are dark, whatever their colour is.
            pair = torch.stack([weak.mean(0).flatten(), view.mean(0).flatten()])
            assert torch.corrcoef(pair)[0, 1] > 0.6
            differences.append((view - weak).abs().mean())
        assert not torch.equal(one[STRONG][0], one[STRONG][1])
    assert torch.stack(differences).mean() > 10
    if augmentation == "none":
        assert torch.equal(one["pixel_values"], plain(row_of(1), epoch=0, index=1)["pixel_values"])


def test_the_weak_view_has_the_geometry_of_the_augmentation_without_its_colours():
    """Else the teacher is asked about rain and fog, and the student about a view of them."""
    make = transform("heavy", views=Views(strong=1))
    clean = transform("none")(row_of(1), epoch=0, index=1)["pixel_values"]
    seen = {make(row_of(1), epoch=e, index=1)["pixel_values"].numpy().tobytes() for e in range(12)}
    assert seen == {clean.numpy().tobytes(), clean.flip(-1).numpy().tobytes()}


def test_padding_of_a_strong_view_is_padding():
    """Coloured padding would tell the views of small images from all others."""
    make = transform("none", views=Views(strong=1), resize="fit")
    strong = make(row_of(1), epoch=0, index=1)[STRONG][0]
    inside = round(60 * SIZE[0] / 50)
    assert (strong[..., inside:] == torch.tensor(PADDING).view(3, 1, 1)).all()


def test_scale_jitter_shows_parts_of_the_stretched_image_at_other_sizes():
    """The factor 1 is the stretched image of every evaluation; smaller ones are padded."""
    plain = transform("none")(row_of(1), epoch=0, index=1)
    same = transform("none", scales=(1.0, 1.0))(row_of(1), epoch=0, index=1)
    assert all(torch.equal(same[name], plain[name]) for name in plain)
    small = transform("none", scales=(0.5, 0.5))(row_of(1), epoch=0, index=1)
    height, width = SIZE[0] // 2, SIZE[1] // 2
    assert small["distil_mask"][:height, :width].all()
    assert int(small["distil_mask"].sum()) == height * width
    assert (small["labels"][height:] == IGNORE).all()
    large = [transform("none", scales=(2.0, 2.0))(row_of(1), epoch=e, index=1) for e in range(6)]
    assert all(one["distil_mask"].all() for one in large)
    assert len({one["pixel_values"].numpy().tobytes() for one in large}) > 3


def views_of(*flags: str) -> DataArguments:
    return parse(["--dataset", "synthetic", "--teacher", "none", *flags]).data


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--cutmix", "1.5"), "--cutmix between 0 and 1"),
        (("--cutmix_mode", "class"), "--cutmix above 0"),
        (("--cutmix", "0.5", "--cutmix_mode", "stripe"), "--cutmix_mode"),
        (("--strong_views", "3"), "--strong_views 1 or 2"),
        (("--scale_jitter", "2", "0.5"), "the smaller one first"),
        (("--scale_jitter", "0.5"), "two factors"),
    ],
)
def test_views_that_cannot_be_drawn_are_refused(flags: tuple[str, ...], message: str):
    """Each would train on something else than was asked for."""
    with pytest.raises(ValueError, match=message):
        views_of(*flags)


class Mixed(Squares):
    """Squares, every second one without labels, with the draws of views."""

    def __init__(self, length: int, views: Views) -> None:
        super().__init__(length)
        self.views, self.epoch = views, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        sample = super().__getitem__(index)
        if index % 2:
            sample["labels"] = torch.full_like(sample["labels"], IGNORE)
        if self.views.strong:
            image = sample["pixel_values"]
            sample[STRONG] = torch.stack([image // (2 + n) for n in range(self.views.strong)])
        return sample | self.views.draw_mix([0, self.epoch, index], (SIDE, SIDE))


@pytest.mark.parametrize("classes", [0, 2])
@pytest.mark.parametrize("targets", ["online", "cached"])
def test_the_trainer_mixes_after_the_teacher_has_answered(
    tmp_path: Path, targets: str, classes: int
):
    """Asked about the mixed image, the teacher would answer for a seam that no photograph has."""
    data = Mixed(4, Views(strong=2, mix=1.0, classes=classes))
    args = arguments(tmp_path, per_device_train_batch_size=4)
    teacher = tiny_teacher()
    trainer = DistillationTrainer(tiny_student(), args, teacher=teacher, train_dataset=data)
    batch = collate([data[i] for i in range(4)])
    answers = trainer.teacher_logits(trainer._normalised(batch))
    assert answers is not None
    if targets == "cached":
        batch["teacher_logits"], args.teacher_targets = answers, "cached"
    (seen,), _ = trainer.get_batch_samples(iter([batch]), 1, args.device)
    loss = trainer.compute_loss(trainer.model, seen)
    found = (answers[:, 0] > 0).long()
    by_hand = student_batch({**batch, "teacher_logits": answers}, found, ignore_index=IGNORE)
    weights = args.loss_weights
    logits = trainer.model(trainer._normalised(by_hand)["pixel_values"]).raw_logits
    terms = distillation_terms(
        logits,
        by_hand["teacher_logits"],
        by_hand["labels"],
        temperature=4.0,
        distil_mask=by_hand["distil_mask"],
        weights=weights,
    )
    assert not torch.equal(by_hand["labels"], batch["labels"].repeat(2, 1, 1))
    torch.testing.assert_close(loss, weighted_sum(terms, weights))


def test_an_evaluation_shows_whole_images_once():
    """Figures would be those of collages."""
    data = DataArguments(
        dataset="synthetic",
        image_size=SIDE,
        synthetic_train=2,
        synthetic_eval=2,
        cutmix=1.0,
        strong_views=1,
        scale_jitter=[0.5, 2.0],
    )
    splits = load_splits(data)
    training, evaluation = transforms(splits, data, seed=0)
    trained = TransformedDataset(splits["train"], training)[0]
    assert {STRONG, MIX_BOX} < trained.keys()
    assert TransformedDataset(splits["validation"], evaluation)[0].keys() == (
        trained.keys() - {STRONG, MIX_BOX}
    )


def test_a_run_with_views_goes_on_as_if_it_had_not_stopped(tmp_path: Path):
    """In the middle of an epoch, under accumulation; the average of the student too."""
    data = Mixed(8, Views(strong=2, mix=0.7, classes=2))

    def make(folder: Path, *, blank: bool = False, **options: Any) -> DistillationTrainer:
        student = tiny_student()
        if blank:
            student.load_state_dict({k: v * 0 for k, v in student.state_dict().items()})
        settings = {"gradient_accumulation_steps": 2, "ema_decay": 0.8, "eval_strategy": "epoch"}
        return DistillationTrainer(
            student,
            arguments(folder, **(settings | {"load_best_model_at_end": False} | options)),
            teacher=tiny_teacher(),
            train_dataset=data,
            eval_dataset=Squares(2, offset=50),
        )

    assert_resumes_exactly(make, tmp_path, [1, 3])
