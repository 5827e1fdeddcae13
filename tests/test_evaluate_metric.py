"""The package's `evaluate.Metric`: the same figures, offline, however the set is split."""

import json
import math
import socket
import subprocess
import sys
import tracemalloc

import evaluate
import numpy as np
import pytest
import torch
from PIL import Image

from kd_trainer.metrics import SegmentationCounts, image_counts
from kd_trainer.reports.metric import load_metric, metric_path

NAMES = {0: "background", 1: "coat", 2: "shoe"}


def draw(batch=6, size=(20, 24), seed=0):
    rng = np.random.default_rng(seed)
    references = rng.integers(0, 3, (batch, *size)).astype(np.uint8)
    predictions = np.where(rng.random(references.shape) < 0.7, references, 2).astype(np.uint8)
    references[rng.random(references.shape) < 0.1] = 255
    return predictions, references


def expected(predictions, references):
    rows = image_counts(torch.from_numpy(predictions), torch.from_numpy(references), 3)
    return SegmentationCounts.zero(3).add(rows.numpy()).metrics(NAMES)


@pytest.fixture
def metric(tmp_path):
    return load_metric(3, id2label=NAMES, cache_dir=str(tmp_path))


def test_it_loads_by_path_alone_and_without_a_network(tmp_path, monkeypatch):
    """An import the library cannot read, or a call to the Hub, fails for users only."""

    def refuse(*_, **__):
        pytest.fail("the network was asked for")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    metric = evaluate.load(metric_path(), cache_dir=str(tmp_path))
    assert metric.compute(predictions=[[[0, 1]]], references=[[[0, 1]]])["miou"] == 1.0


def test_figures_equal_the_trainer_s(metric):
    """Two implementations of one figure drift apart; the report would contradict the log."""
    predictions, references = draw()
    got = metric.compute(predictions=predictions, references=references)
    assert got == pytest.approx(expected(predictions, references), abs=1e-9)
    assert list(got) == list(expected(predictions, references))


@pytest.mark.parametrize("sizes", [[6], [1] * 6, [4, 2], [1, 5]])
def test_figures_do_not_depend_on_the_batches(metric, sizes):
    """A mean over batches would weigh the pictures of a small last batch more."""
    predictions, references = draw()
    start = 0
    for size in sizes:
        part = slice(start, start + size)
        metric.add_batch(predictions=predictions[part], references=references[part])
        start += size
    assert len(metric) == 6
    assert metric.compute() == pytest.approx(expected(predictions, references), abs=1e-12)


def test_maps_may_be_tensors_arrays_pictures_or_lists_of_several_sizes(metric):
    """Photographs differ in size, and evaluation at their own size is what users report."""
    first, second = draw(1, (8, 9), 1), draw(1, (16, 5), 2)
    metric.add(prediction=Image.fromarray(first[0][0]), reference=torch.from_numpy(first[1][0]))
    metric.add_batch(predictions=second[0].tolist(), references=[second[1][0]])
    totals = SegmentationCounts.zero(3)
    for pair in (first, second):
        totals = totals.add(image_counts(*map(torch.from_numpy, pair), 3).numpy())
    assert metric.compute() == pytest.approx(totals.metrics(NAMES), abs=1e-12)


def test_compute_starts_afresh(metric):
    """The second epoch's figures would contain the first's pictures."""
    predictions, references = draw()
    metric.compute(predictions=predictions, references=references)
    assert len(metric) == 0
    got = metric.compute(predictions=predictions[:2], references=references[:2])
    assert got == pytest.approx(expected(predictions[:2], references[:2]), abs=1e-12)


def test_memory_and_disk_do_not_grow_with_the_set(metric, tmp_path):
    """The stock metric keeps every map: 437 MiB for 50 masks of 640x640."""
    predictions, references = draw(8, (64, 64))

    def feed(times):
        for _ in range(times):
            metric.add_batch(predictions=predictions, references=references)

    feed(2)
    tracemalloc.start()
    try:
        feed(1)
        after_one, _ = tracemalloc.get_traced_memory()
        feed(20)
        after_many, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    held = [x for x in vars(metric).values() if isinstance(x, list | tuple | torch.Tensor)]
    on_disk = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    assert after_many - after_one < 2 * predictions[0].nbytes, "less than two maps for 160 images"
    assert all(len(x) == 0 for x in held)
    assert on_disk < predictions[0].nbytes
    assert metric.compute() == pytest.approx(
        metric.compute(predictions=predictions, references=references), abs=1e-12
    )


def test_it_combines_with_others_and_can_be_saved(metric, tmp_path):
    """`combine` hands inputs over by name; `save` needs plain floats."""
    predictions, references = draw()
    other = load_metric(3, id2label=NAMES, cache_dir=str(tmp_path / "other"))
    both = evaluate.combine({"small": metric, "large": other}, force_prefix=True)
    both.add_batch(predictions=predictions[:1], references=references[:1])
    got = both.compute(predictions=predictions[1:], references=references[1:])
    figures = expected(predictions, references)
    for name, value in figures.items():
        assert got[f"small_{name}"] == got[f"large_{name}"] == pytest.approx(value, abs=1e-12)
    path = evaluate.save(tmp_path / "results.json", **got)
    assert json.loads(path.read_text())["small_miou"] == got["small_miou"]


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_share_one_evaluation(tmp_path):
    """Each process counts its own pictures; the first one must see both totals."""
    predictions, references = draw()
    np.savez(tmp_path / "maps.npz", predictions=predictions, references=references)
    code = (
        "import json, sys, numpy as np\n"
        "from kd_trainer.reports.metric import load_metric\n"
        "folder, rank = sys.argv[1], int(sys.argv[2])\n"
        "maps = np.load(folder + '/maps.npz')\n"
        "part = slice(0, 2) if rank == 0 else slice(2, 6)\n"
        "metric = load_metric(3, id2label={0: 'background', 1: 'coat', 2: 'shoe'}, num_process=2,\n"
        "                     process_id=rank, experiment_id='two', cache_dir=folder)\n"
        "figures = metric.compute(predictions=maps['predictions'][part],\n"
        "                         references=maps['references'][part])\n"
        "print(json.dumps(figures))\n"
    )
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path), str(rank)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    (first, errors), (second, other_errors) = (rank.communicate(timeout=200) for rank in ranks)
    assert [rank.returncode for rank in ranks] == [0, 0], errors + other_errors
    assert json.loads(first) == pytest.approx(expected(predictions, references), abs=1e-12)
    assert json.loads(second) is None


def test_without_names_the_classes_get_numbers(tmp_path):
    """Figures need keys also where nobody named the classes."""
    got = load_metric(3, cache_dir=str(tmp_path)).compute(
        predictions=[[[0, 1]]], references=[[[0, 0]]]
    )
    assert got["iou_background"] == 0.5
    assert got["iou_class_1"] == 0.0
    assert math.isnan(got["iou_class_2"])


def test_an_own_ignore_index_is_honoured(tmp_path):
    """Data sets that ignore 9 would have an unknown class."""
    metric = load_metric(2, ignore_index=9, cache_dir=str(tmp_path))
    assert metric.compute(predictions=[[[0, 1, 1]]], references=[[[0, 1, 9]]])["miou"] == 1.0


@pytest.mark.parametrize(
    ("predictions", "references", "error", "match"),
    [
        ([[[0, 1]]], [[[0, 7]]], ValueError, r"ids 0..2 in the reference, got \[7\]"),
        ([[[0, 5]]], [[[0, 1]]], ValueError, r"ids 0..2 in the prediction, got \[5\]"),
        ([[[0, 1]]], [[[0], [1]]], ValueError, "of one size"),
        ([[[0, 1]], [[0, 1]]], [[[0, 1]]], ValueError, "got 1 for 2"),
        ([[[0.2, 0.9]]], [[[0, 1]]], TypeError, "integer prediction, got torch.float64"),
        ([[0, 1]], [[0, 1]], ValueError, r"prediction \(H, W\), got shape \(2,\)"),
        ([[[0, 1]]], None, ValueError, "got None for 1"),
    ],
)
def test_a_refused_batch_is_named_and_leaves_nothing_behind(
    metric, predictions, references, error, match
):
    """Half a batch in the totals would falsify the rest of the evaluation."""
    good = draw(1)
    metric.add_batch(predictions=good[0], references=good[1])
    with pytest.raises(error, match=match):
        metric.add_batch(predictions=predictions, references=references)
    assert len(metric) == 1
    assert metric.compute() == pytest.approx(expected(*good), abs=1e-12)


def test_a_bad_map_late_in_a_batch_leaves_nothing_behind(metric):
    """The good maps before it must not be counted either."""
    predictions, references = draw(3)
    metric.add_batch(predictions=predictions[:1], references=references[:1])
    broken = references.copy()
    broken[2, 0, 0] = 100
    with pytest.raises(ValueError, match=r"got \[100\]"):
        metric.add_batch(predictions=predictions, references=broken)
    assert metric.compute() == pytest.approx(expected(predictions[:1], references[:1]), abs=1e-12)


def test_settings_are_given_at_load(metric):
    """A num_labels given too late would be swallowed."""
    with pytest.raises(ValueError, match="num_labels"):
        metric.add_batch(predictions=[[[0]]], references=[[[0]]], num_labels=2)
    with pytest.raises(ValueError, match="num_labels >= 2, got 1"):
        load_metric(1)
