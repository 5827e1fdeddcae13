"""Whole runs: train, read back, evaluate, predict, resume, plan."""

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import segmentation_models_pytorch as smp
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from small_runs import SIDE, save_network, train_flags, write_pairs
from test_teacher import segformer
from tiny import arguments
from transformers import AutoModelForSemanticSegmentation, SegformerForSemanticSegmentation

from kd_trainer.build import build_run, evaluation_dataset
from kd_trainer.commands.evaluate import evaluate_main
from kd_trainer.commands.predict import PredictArguments, predict, predict_main
from kd_trainer.commands.train import run_train, train
from kd_trainer.config import parse
from kd_trainer.data.input_files import find_input_files, read_image
from kd_trainer.evaluation import classes_of, normalise, pixel_statistics
from kd_trainer.loading import load_student
from kd_trainer.losses import distillation_terms
from kd_trainer.metrics import SegmentationCounts, image_counts
from kd_trainer.models.image_processing import SmpImageProcessor
from kd_trainer.trainer import DistillationTrainer

RESULTS = {
    "student_miou",
    "student_dice",
    "student_iou_foreground",
    "teacher_miou",
    "teacher_dice",
    "agreement",
    "eval_images",
    "train_seconds",
    "images_per_second",
    "peak_memory_mib",
    "student_ms",
    "teacher_ms",
    "latency_threads",
    "versions",
}


@dataclass
class Run:
    """A finished run that several tests look at; none changes it."""

    num_labels: int
    data: Path
    teacher: Path
    output: Path
    results: dict[str, Any]

    @property
    def student(self) -> str:
        return str(self.output / "student")


@pytest.fixture(scope="module", params=[2, 4], ids=["binary", "4 classes"])
def finished(request, tmp_path_factory) -> Run:
    """Two epochs with a teacher, everything written that a run writes."""
    count = request.param
    root = tmp_path_factory.mktemp(f"run{count}")
    data = write_pairs(root / "data", num_labels=count)
    teacher = save_network(root / "teacher", num_labels=count)
    output = root / "out"
    flags = train_flags(data, output, "--num_labels", str(count), teacher=teacher)
    results = train(parse([*flags, "--report_to", "tensorboard", "--panel_images", "2"]))
    return Run(count, data, teacher, output, results)


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """A saved binary student of random weights."""
    return save_network(tmp_path_factory.mktemp("plain") / "student", seed=3)


def test_student_folder_is_read_by_transformers_and_smp_with_equal_weights(finished: Run):
    """A folder that only our own class reads is no Hugging Face model, and no smp model either."""
    ours = AutoModelForSemanticSegmentation.from_pretrained(finished.student).eval()
    theirs = smp.from_pretrained(finished.student).eval()
    left, right = ours.state_dict(), theirs.state_dict()
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)
    pixels = torch.randn(1, 3, SIDE, SIDE)
    with torch.no_grad():
        answer = ours(pixel_values=pixels)
        assert torch.equal(answer.raw_logits, theirs(pixels))
    assert answer.logits.shape == (1, finished.num_labels, SIDE, SIDE)
    assert answer.raw_logits.shape[1] == (1 if finished.num_labels == 2 else finished.num_labels)


def test_output_folder_holds_what_is_promised(finished: Run):
    """Whoever reads results.json by a script finds out late that a key is missing."""
    written = json.loads((finished.output / "results.json").read_text())
    assert written.keys() >= RESULTS
    assert written == json.loads(json.dumps(finished.results))
    assert written["eval_images"] == 5
    assert written["train_images"] == 8
    assert written["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert all(np.isfinite(v) for v in written.values() if isinstance(v, float))
    assert len(written["eval_history"]) == 2
    names = {path.name for path in finished.output.iterdir()}
    assert names >= {"student", "runs", "panels", "config.yaml", "results.json"}
    assert any(name.startswith("checkpoint-") for name in names)
    saved = {path.name for path in (finished.output / "student").iterdir()}
    assert saved >= {"config.json", "model.safetensors", "preprocessor_config.json"}


def test_written_configuration_describes_the_run(finished: Run):
    """A student whose settings cannot be loaded again cannot be made again."""
    again = parse(["--config", str(finished.output / "config.yaml")])
    assert again.data.num_labels == finished.num_labels
    assert again.model.teacher == str(finished.teacher)
    assert again.training.num_train_epochs == 2
    assert again.training.output_dir == str(finished.output)


def evaluated(finished: Run, folder: Path, *more: str) -> dict[str, Any]:
    flags = ["--dataset", str(finished.data), "--output_dir", str(folder), *more]
    evaluate_main([finished.student, "--teacher", str(finished.teacher), *flags])
    return json.loads((folder / "eval_results.json").read_text())


def test_eval_script_gives_the_figures_of_the_training(finished: Run, tmp_path: Path, capsys):
    """Two ways to count that differ in the third digit make every comparison worthless."""
    figures = evaluated(finished, tmp_path, "--batch_size", "3")
    for name, value in figures.items():
        assert finished.results[name] == pytest.approx(value, abs=1e-9), name
    assert figures.keys() >= {"student_miou", "teacher_miou", "agreement", "eval_images"}
    table = (tmp_path / "eval_results.md").read_text()
    assert f"{figures['student_miou']:.4f}" in table
    assert table.strip() in capsys.readouterr().out


def test_streaming_gives_the_same_figures(finished: Run, tmp_path: Path):
    """A stream that loses its last rows, or sees some twice, is hard to notice."""
    figures = evaluated(finished, tmp_path, "--streaming")
    for name, value in figures.items():
        assert finished.results[name] == pytest.approx(value, abs=1e-9), name


def test_results_are_those_of_the_trainer_in_fp32(finished: Run, tmp_path: Path):
    """The Trainer chooses the best student, the metric reports it: they must agree."""
    run = parse(
        train_flags(
            finished.data,
            tmp_path,
            "--num_labels",
            str(finished.num_labels),
            teacher=finished.teacher,
        )
    )
    trainer = DistillationTrainer(
        load_student(finished.student),
        arguments(tmp_path, per_device_eval_batch_size=2),
        teacher=build_run(run).teacher,
        eval_dataset=evaluation_dataset(run.data, batch_size=2),
    )
    figures = trainer.evaluate()
    shared = 0
    for name, value in finished.results.items():
        who, _, metric = name.partition("_")
        key = f"eval_{metric}" if who == "student" else f"eval_{name}"
        if key in figures and name != "eval_images":
            assert figures[key] == pytest.approx(value, abs=1e-9), name
            shared += 1
    assert shared >= 2 * 9 + 1
    best = max(entry["miou"] for entry in finished.results["eval_history"])
    assert figures["eval_miou"] == pytest.approx(best, abs=1e-9)


def test_eval_script_measures_any_segmentation_model(finished: Run, tmp_path: Path, capsys):
    """A teacher is measured before anybody distils it, whatever library it is from."""
    count = finished.num_labels
    names = {0: "background"} | {i: f"class_{i}" for i in range(1, count)}
    segformer(count, names).save_pretrained(tmp_path / "segformer")
    data = ["--dataset", str(finished.data), "--output_dir", str(tmp_path / "out")]
    evaluate_main([str(tmp_path / "segformer"), *data, "--image_size", str(SIDE)])
    found = json.loads((tmp_path / "out" / "eval_results.json").read_text())
    model = SegformerForSemanticSegmentation.from_pretrained(tmp_path / "segformer").eval()
    counts = SegmentationCounts.zero(count)
    dataset = evaluation_dataset(
        parse(train_flags(finished.data, tmp_path, "--num_labels", str(count))).data, batch_size=1
    )
    for sample in (dataset[i] for i in range(len(dataset))):
        pixels = normalise(
            sample["pixel_values"][None], pixel_statistics(load_student(finished.student), "cpu")
        )
        with torch.no_grad():
            logits = model(pixels).logits
        large = torch.nn.functional.interpolate(logits, (SIDE, SIDE), mode="bilinear")
        counts = counts.add(
            image_counts(large.argmax(1), sample["labels"][None].long(), count).numpy()
        )
    assert found["student_miou"] == pytest.approx(counts.metrics(names)["miou"], abs=1e-3)

    weights = Path(finished.student) / "model.safetensors"
    bare = str(shutil.copy(weights, tmp_path / "bare.safetensors"))
    sizes = ["--image_size", str(SIDE), "--num_labels", str(count)]
    with pytest.raises(ValueError, match="give both"):
        evaluate_main([bare, *data, *sizes])


def test_evaluation_can_be_limited_on_any_split(finished: Run, tmp_path: Path):
    """On the split that was trained on, the limit of the training would count instead."""
    figures = evaluated(finished, tmp_path, "--eval_split", "train", "--max_eval_samples", "3")
    assert figures["eval_images"] == 3


def test_streamed_training_leaves_a_measured_student(tmp_path: Path):
    """The Trainer knows neither the length of a stream nor when its epoch ends."""
    data = write_pairs(tmp_path / "data")
    results = train(parse(train_flags(data, tmp_path / "out", "--streaming")))
    assert results["train_images"] == 8
    assert results["eval_images"] == 5
    state = json.loads((tmp_path / "out" / "checkpoint-8" / "trainer_state.json").read_text())
    assert state["global_step"] == 8  # two epochs of four batches
    assert state["epoch"] == 2


def test_unlabelled_photographs_teach_through_the_teacher_only(tmp_path: Path):
    """Read as pictures without a person they would train the student to find nobody."""
    data = write_pairs(tmp_path / "data", train=2)
    bare = write_pairs(tmp_path / "more", train=3) / "train" / "images"
    teacher = save_network(tmp_path / "teacher")
    flags = train_flags(data, tmp_path / "out", "--unlabelled", str(bare), teacher=teacher)
    parts = build_run(parse(flags))
    samples = [parts.train_dataset[i] for i in range(len(parts.train_dataset))]
    assert len(samples) == 2 + 3
    assert [bool((s["labels"] == 255).all()) for s in samples] == [False] * 2 + [True] * 3
    assert all(s["distil_mask"].all() for s in samples)

    student = torch.randn(5, 1, SIDE, SIDE, requires_grad=True)
    guide = torch.randn(5, 1, SIDE, SIDE)
    labels = torch.stack([s["labels"] for s in samples]).long()
    mask = torch.stack([s["distil_mask"] for s in samples])
    terms = distillation_terms(student, guide, labels, temperature=2.0, distil_mask=mask)
    for name, value in terms.named().items():
        (gradient,) = torch.autograd.grad(value, student, retain_graph=True)
        reached = [bool(g.abs().sum() > 0) for g in gradient]
        assert reached == [True] * 2 + [name in ("kl", "mse")] * 3, name

    results = train(parse(flags))
    assert results["train_images"] == 5
    assert np.isfinite(results["student_miou"])


def test_a_new_run_does_not_mix_with_an_old_one(tmp_path: Path):
    """A second run into the same folder would pick its best student from both."""
    data = write_pairs(tmp_path / "data", train=4)
    flags = train_flags(data, tmp_path / "out")
    train(parse(flags))
    before = (tmp_path / "out" / "config.yaml").read_text()
    with pytest.raises(ValueError, match=r"^Expected --resume or an output folder without"):
        train(parse([*flags, "--kl_weight", "0.9"]))
    assert (tmp_path / "out" / "config.yaml").read_text() == before
    with pytest.raises(ValueError, match=r"^Expected the run's epochs 2.0, got 3.0 .*another run"):
        train(parse([*flags, "--epochs", "3", "--resume"]))
    assert (tmp_path / "out" / "config.yaml").read_text() == before


def test_a_student_that_went_bad_is_not_saved(tmp_path: Path):
    """With rare logs and no checkpoint, the last save is the only one that can notice."""
    data, teacher = write_pairs(tmp_path / "data", train=4), save_network(tmp_path / "teacher")
    state = load_file(teacher / "model.safetensors")
    state["segmentation_head.0.bias"].fill_(1e38)  # finite itself; its square is not
    save_file(state, teacher / "model.safetensors", metadata={"format": "pt"})
    more = ["--save_strategy", "no", "--eval_strategy", "no", "--logging_steps", "1000"]
    run = parse(train_flags(data, tmp_path / "out", *more, teacher=teacher))
    with pytest.raises(FloatingPointError, match="Expected finite loss terms"):
        train(run)
    assert not (tmp_path / "out" / "student").exists()
    assert not (tmp_path / "out" / "results.json").exists()


def test_a_saved_student_goes_on_at_the_size_and_under_the_names_of_the_new_run(tmp_path: Path):
    """Its folder would else tell users of the student to feed it the size it had before."""
    data = write_pairs(tmp_path / "data", train=4)
    flags = ["--dataset", str(data), "--teacher", "none", "--student"]
    flags += [str(save_network(tmp_path / "first")), "--output_dir", str(tmp_path / "out")]
    flags += ["--image_size", "96", "--class_names", "rest", "cat", "--ignore_index", "200"]
    train(parse([*flags, "--epochs", "1", "--batch_size", "2", "--use_cpu", "--disable_tqdm"]))
    saved = tmp_path / "out" / "student"
    config = load_student(saved).config
    assert (config.image_size, config.semantic_loss_ignore_index) == (96, 200)
    assert (config.id2label, config.label2id["cat"]) == ({0: "rest", 1: "cat"}, 1)
    assert SmpImageProcessor.from_pretrained(saved).size["height"] == 96


@pytest.mark.parametrize("checkpoint", ["latest", "elsewhere/checkpoint-3"])
def test_resume_without_a_checkpoint_writes_nothing(tmp_path: Path, checkpoint: str):
    """Starting anew instead would look like a run that went on."""
    flags = train_flags(tmp_path / "data", tmp_path / "out", "--resume", checkpoint)
    with pytest.raises(FileNotFoundError, match=r"^Expected a checkpoint"):
        train(parse(flags))
    assert not (tmp_path / "out").exists()


def test_dry_run_prints_the_recipes_plan_and_writes_nothing(tmp_path: Path, capsys, monkeypatch):
    """The plan is what a user checks before a night of training; it must be that of the run."""
    monkeypatch.chdir(tmp_path)
    data = write_pairs(tmp_path / "data")
    before = sorted(tmp_path.rglob("*"))
    result = run_train(
        parse(
            [
                *("--dataset", str(data), "--encoder_weights", "none", "--image_size", "64"),
                *("--teacher", str(save_network(tmp_path / "data" / "teacher")), "--dry_run"),
            ]
        )
    )
    plan = capsys.readouterr().out
    assert result == {}
    after = {p for p in tmp_path.rglob("*") if "teacher" not in p.parts}
    assert after == set(before)
    assert re.search(r"student \| +Unet timm-efficientnet-b0 \| +5,839,\d{3} \| +412,160 \|", plan)
    assert "8 images (2 steps an epoch" in plan
    assert "5 images" in plan
    assert "classes: background, foreground" in plan
    assert "total = 0.3·kl + 0.5·mse + 0.5·bce + 1·dice" in plan
    rows = [line.split("|")[1:-1] for line in plan.splitlines() if re.match(r"\| +\d+ \|", line)]
    table = {int(row[0]): [cell.strip() for cell in row[1:]] for row in rows}
    assert list(table) == list(range(50))
    assert table[0][:2] == ["4.00", "0"]
    assert table[49][:2] == ["1.00", "7"]
    free = [int(table[epoch][1]) for epoch in (4, 5, 7, 8, 22, 23)]
    assert free == [0, 1, 1, 2, 6, 7]
    assert table[4][3::2] == ["1.00e-04", "frozen"]
    assert table[23][3::2] == ["1.00e-04", "3.00e-05"]
    trainable = [int(table[epoch][2].replace(",", "")) for epoch in range(50)]
    assert trainable == sorted(trainable)
    assert trainable[-1] == int(re.search(r"b0 \| +([\d,]+) \|", plan)[1].replace(",", ""))
    settings = plan.split("## Configuration\n")[1]
    (tmp_path / "again.yaml").write_text(settings)
    assert parse(["--config", str(tmp_path / "again.yaml")]).data.dataset == str(data)


def opened(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def pictures(folder: Path) -> dict[str, tuple[int, int]]:
    """Pictures of every kind, and the (width, height) that a viewer shows."""
    draw = np.random.default_rng(0)
    folder.mkdir()
    rgb = Image.fromarray(draw.integers(0, 256, (50, 70, 3), dtype=np.uint8))
    rgb.save(folder / "holiday photo.jpg")
    rgb.convert("L").save(folder / "grey.png")
    clear = rgb.copy()
    clear.putalpha(128)
    clear.save(folder / "clear.png")
    rgb.quantize(16).save(folder / "palette.gif")
    rgb.convert("CMYK").save(folder / "cmyk.jpg")
    turned = Image.Exif()
    turned[0x0112] = 6  # a phone held upright
    rgb.save(folder / "phone.jpg", exif=turned)
    rgb.resize((33, 201)).save(folder / "narrow [1].webp")
    (folder / "notes.txt").write_text("no picture")
    sizes = dict.fromkeys(("holiday photo", "grey", "clear", "palette", "cmyk"), (70, 50))
    return sizes | {"phone": (50, 70), "narrow [1]": (33, 201)}


def test_predict_reads_every_kind_of_picture_and_keeps_its_size(plain: Path, tmp_path: Path):
    """A mask of another size, or turned by EXIF, does not lie on its picture."""
    sizes = pictures(tmp_path / "in")
    predict_main([str(plain), str(tmp_path / "in"), "--output_dir", str(tmp_path / "out")])
    masks = {p.stem: opened(p) for p in (tmp_path / "out" / "masks").iterdir()}
    assert {name: mask.shape[::-1] for name, mask in masks.items()} == sizes
    assert all(set(np.unique(mask)) <= {0, 255} for mask in masks.values())
    shown = {p.stem: opened(p).shape for p in (tmp_path / "out" / "overlays").iterdir()}
    assert shown == {name: (*size[::-1], 3) for name, size in sizes.items()}


def test_predict_takes_files_folders_and_globs(tmp_path: Path):
    """Each picture once, in a fixed order, and none that was not asked for."""
    pictures(tmp_path / "in")
    folder = tmp_path / "in"

    def names(*sources: object) -> list[str]:
        return [p.name for p in find_input_files([str(s) for s in sources])]

    assert names(folder / "holiday photo.jpg") == ["holiday photo.jpg"]
    assert names(folder / "narrow [1].webp") == ["narrow [1].webp"]
    assert names(folder / "*.jpg") == ["cmyk.jpg", "holiday photo.jpg", "phone.jpg"]
    assert names(tmp_path / "**" / "*oto*") == ["holiday photo.jpg"]
    assert names(folder, folder / "grey.png") == sorted(p.name for p in folder.glob("*.[!t]*"))
    for nothing in (folder / "*.bmp", folder / "gone.jpg"):
        with pytest.raises(FileNotFoundError, match=r"^Expected an image, a folder"):
            names(nothing)


def test_pictures_of_the_same_name_do_not_overwrite_each_other(plain: Path, tmp_path: Path):
    """Two cameras both count from IMG_0001."""
    for folder in ("left", "right"):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (40, 30)).save(tmp_path / folder / "IMG_1.png")
    args = PredictArguments(str(plain), str(tmp_path / "out"), ["masks"])
    predict(args, [str(tmp_path / "left"), str(tmp_path / "right")])
    assert len(list((tmp_path / "out" / "masks").iterdir())) == 2
    assert not (tmp_path / "out" / "overlays").exists()


def test_predict_sees_the_pixels_of_the_evaluation(finished: Run, tmp_path: Path):
    """Other resizing or other colours than in training cost accuracy that no figure shows."""
    run = parse(train_flags(finished.data, tmp_path, "--num_labels", str(finished.num_labels)))
    dataset = evaluation_dataset(run.data, batch_size=2)
    student = load_student(finished.student).eval()
    folder = finished.data / "validation" / "images"
    predict(PredictArguments(finished.student, str(tmp_path / "out")), [str(folder)])
    for index in range(len(dataset)):
        pixels = dataset[index]["pixel_values"][None]
        with torch.no_grad():
            raw = student(normalise(pixels, pixel_statistics(student, "cpu"))).raw_logits
        expected = classes_of(raw)[0].numpy() * (255 if finished.num_labels == 2 else 1)
        found = opened(tmp_path / "out" / "masks" / f"p {index}.png")
        # The last bits of a convolution depend on the batch, so a pixel on the edge may differ.
        assert (found == expected).mean() > 0.999


def test_transparent_pictures_are_white_as_in_training(tmp_path: Path):
    """Pillow alone makes transparent pixels black, or whatever colour lies hidden below."""
    Image.new("RGBA", (8, 8), (200, 0, 0, 0)).save(tmp_path / "clear.png")
    assert np.asarray(read_image(tmp_path / "clear.png")).min() == 255


def test_threshold_moves_the_mask_of_a_binary_model(plain: Path, tmp_path: Path):
    """A threshold on logits, or none at all, would be a factor of nothing."""
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(
        tmp_path / "x.png"
    )
    shares = []
    for threshold in (0.01, 0.5, 0.99):
        args = PredictArguments(str(plain), str(tmp_path / "out"), threshold=threshold)
        predict(args, [str(tmp_path / "x.png")])
        shares.append((opened(tmp_path / "out" / "masks" / "x.png") > 0).mean())
    assert shares[0] == 1
    assert shares[2] == 0
    assert 0 < shares[1] < 1


def test_processor_beside_the_student_prepares_the_pixels_of_training(finished: Run):
    """Without it a user of the published folder guesses size and normalisation."""
    processor = SmpImageProcessor.from_pretrained(finished.student)
    student = load_student(finished.student)
    picture = opened(finished.data / "validation" / "images" / "p 0.png")
    made = processor(Image.fromarray(picture), return_tensors="pt")["pixel_values"]
    raw = torch.from_numpy(picture.copy()).permute(2, 0, 1)[None]
    assert torch.allclose(made, normalise(raw, pixel_statistics(student, "cpu")), atol=1e-5)
