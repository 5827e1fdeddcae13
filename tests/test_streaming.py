"""Streams: each row once, with the samples and draws of the map-style data set."""

from itertools import chain

import datasets
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from kd_trainer.data import StreamedDataset, TransformedDataset, collate, load_splits, transforms
from kd_trainer.data.listing import stream_shards
from kd_trainer.data.streaming import shuffled, stream_lengths, with_lengths
from kd_trainer.data_arguments import DataArguments


class Numbers:
    """A transform that shows which row was drawn in which epoch, without decoding."""

    def __call__(self, row, *, epoch, index):
        return {"row": torch.tensor([int(row["image"]), index, epoch])}


def stream(count=40, shards=4):
    table = datasets.Dataset.from_dict(
        {"image": [str(i) for i in range(count)], "mask": ["x"] * count}
    )
    lengths = [count // shards + (i < count % shards) for i in range(shards)]
    return with_lengths(table.to_iterable_dataset(num_shards=shards), lengths)


def streamed(source=None, **options):
    options = {"shuffle": False, "seed": 0} | options
    return StreamedDataset(source or stream(), Numbers(), **options)


def numbers(dataset, *, workers=0, batch_size=4):
    batches = list(DataLoader(dataset, batch_size, num_workers=workers, collate_fn=collate))
    return [b["row"][:, 0].tolist() for b in batches], torch.cat([b["row"] for b in batches])


def flat(dataset):
    return [int(sample["row"][0]) for sample in dataset]


@pytest.mark.parametrize("shards", [1, 3, 4, 40])
@pytest.mark.parametrize("shuffle", [False, True])
def test_every_row_comes_once_with_its_number(shards, shuffle):
    """A number that counts per shard or worker would give two rows the same draw."""
    seen = torch.stack([s["row"] for s in streamed(stream(shards=shards), shuffle=shuffle)])
    assert torch.equal(seen[:, 0], seen[:, 1])
    assert sorted(seen[:, 0].tolist()) == list(range(40))
    assert (seen[:, 0].tolist() == list(range(40))) != shuffle


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("shuffle", [False, True])
def test_batches_do_not_depend_on_the_workers(workers, shuffle):
    """`datasets` splits by shard: with one shard only one of the workers has anything to do."""
    dataset = streamed(stream(count=41, shards=1), shuffle=shuffle, batch_size=4)
    alone, _ = numbers(dataset)
    several, _ = numbers(dataset, workers=workers)
    assert several == alone
    assert len(alone) == 11


def test_another_batch_size_in_the_loader_loses_nothing():
    rows = DataLoader(streamed(), 3, num_workers=0, collate_fn=collate)
    assert sum(len(b["row"]) for b in rows) == 40
    assert sorted(flat(streamed(batch_size=7))) == list(range(40))


@pytest.mark.parametrize("count", [40, 41, 3])
@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("shuffle", [False, True])
def test_ranks_share_the_rows_without_doubles(count, world, shuffle):
    """Sharded by `datasets` and again by the Trainer, 20 of 40 samples were seen."""
    ranks = [
        streamed(stream(count, 3), shuffle=shuffle, rank=r, world_size=world) for r in range(world)
    ]
    seen = [flat(rank) for rank in ranks]
    assert sorted(chain(*seen)) == list(range(count))
    assert [len(s) for s in seen] == [len(rank) for rank in ranks]
    assert max(map(len, ranks)) - min(map(len, ranks)) <= 1


def test_even_ranks_have_as_many_rows_and_leave_others_out_each_epoch():
    """With DDP a rank that has a batch more waits for ever."""
    left_out = set()
    ranks = [streamed(stream(41), shuffle=True, rank=r, world_size=2, even=True) for r in range(2)]
    for epoch in range(5):
        for rank in ranks:
            rank.set_epoch(epoch)
        seen = [flat(rank) for rank in ranks]
        assert [len(s) for s in seen] == [len(r) for r in ranks] == [20, 20]
        left_out |= set(range(41)) - set(chain(*seen))
    assert len(left_out) > 1


def test_the_order_depends_on_seed_and_epoch_only():
    dataset = streamed(shuffle=True)
    first = flat(dataset)
    assert flat(streamed(shuffle=True)) == first
    assert flat(streamed(shuffle=True, seed=1)) != first
    dataset.set_epoch(1)
    assert flat(dataset) != first
    dataset.set_epoch(0)
    assert flat(dataset) == first


def test_a_small_buffer_still_gives_every_row():
    dataset = streamed(stream(shards=1), shuffle=True, buffer_size=5)
    assert sorted(flat(dataset)) == list(range(40))
    draw = np.random.default_rng(0)
    places = [n for n, _ in shuffled(((i, {}) for i in range(200)), draw, 200)]
    assert np.corrcoef(places, range(200))[0, 1] < 0.3


def test_persistent_workers_see_the_epoch():
    dataset = streamed(batch_size=4)
    loader = DataLoader(dataset, 4, num_workers=2, persistent_workers=True, collate_fn=collate)
    for epoch in (0, 3):
        dataset.set_epoch(epoch)
        assert {int(e) for batch in loader for e in batch["row"][:, 2]} == {epoch}


@pytest.mark.parametrize(("said", "got"), [(12, "only 10"), (8, "more")])
def test_a_stream_of_another_length_is_an_error(said, got):
    """Rows would be lost, or an epoch end early, without a word."""
    source = with_lengths(stream(10, 1), [said])
    with pytest.raises(ValueError, match=f"Expected {said} rows in the stream.* got {got}"):
        flat(streamed(source))


def test_a_stream_without_a_length_asks_for_it():
    source = stream()
    source.info.splits = None
    assert stream_lengths(source) is None
    with pytest.raises(ValueError, match=r"without a length.*--max_train_samples"):
        streamed(source)


def test_a_length_without_shards_is_read_in_one_piece():
    source = stream()
    with_lengths(source, [40])
    assert flat(streamed(source, rank=1, world_size=2)) == list(range(20, 40))


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="0 <= rank < 2"):
        streamed(rank=2, world_size=2)
    with pytest.raises(ValueError, match="batch_size and buffer_size"):
        streamed(batch_size=0)


@pytest.mark.parametrize("workers", [0, 2])
def test_streaming_sees_the_samples_of_map_style(pair_folder, tmp_path, workers):
    """The same files, the same epoch: the same tensors, augmentation included."""
    bare = pair_folder / "train" / "images"
    fields = {"dataset": str(pair_folder), "image_size": 32, "unlabelled": str(bare)}
    fixed, moving = DataArguments(**fields), DataArguments(**fields, streaming=True)
    rows, flow = load_splits(fixed), load_splits(moving)
    made, _ = transforms(rows, fixed, seed=3)
    made_again, _ = transforms(flow, moving, seed=3)
    assert made.rule == made_again.rule
    dataset = TransformedDataset(rows["train"], made)
    source = StreamedDataset(flow["train"], made_again, shuffle=False, seed=0, batch_size=4)
    assert len(source) == len(dataset) == 16
    for epoch in range(2):
        dataset.set_epoch(epoch)
        source.set_epoch(epoch)
        expected = collate([dataset[i] for i in range(16)])
        batches = list(DataLoader(source, 4, num_workers=workers, collate_fn=collate))
        for name, tensor in expected.items():
            assert torch.equal(torch.cat([batch[name] for batch in batches]), tensor)


@pytest.mark.parametrize(("count", "world"), [(7, 2), (8, 2), (11, 3), (3, 3)])
def test_ranks_of_an_evaluation_have_equally_many_samples(count, world):
    """With a batch less than the others, a rank would leave them waiting for its figures."""

    class Labelled(Numbers):
        def __call__(self, row, *, epoch, index):
            ones = torch.ones(2, 2, dtype=torch.uint8)
            return super().__call__(row, epoch=epoch, index=index) | {
                "labels": ones,
                "distil_mask": ones.bool(),
            }

    shares = [
        StreamedDataset(
            stream(count, 1), Labelled(), shuffle=False, seed=0, rank=rank, world_size=world,
            padded=True, ignore_index=9,
        )
        for rank in range(world)
    ]  # fmt: skip
    samples = [list(share) for share in shares]
    assert {len(own) for own in samples} == {len(share) for share in shares}
    assert len({len(own) for own in samples}) == 1
    real = [s for own in samples for s in own if s["distil_mask"].any()]
    assert [int(s["row"][0]) for s in real] == list(range(count))
    padding = [s for own in samples for s in own if not s["distil_mask"].any()]
    assert all((s["labels"] == 9).all() for s in padding)
    assert len(padding) == -count % world


def test_fewer_evaluation_images_than_processes_is_an_error():
    """A process without an image has nothing to fill up with."""
    with pytest.raises(ValueError, match="image for each of 3 processes, got 2"):
        streamed(stream(2, 1), world_size=3, padded=True)


@pytest.mark.parametrize(
    ("rows", "shards"), [(1, 1), (127, 1), (128, 2), (1000, 15), (4096, 64), (10**5, 64)]
)
def test_small_streams_have_few_shards(rows: int, shards: int):
    """With shards of one or two rows, a stream of 100 took twice as long."""
    assert stream_shards(rows) == shards
