"""The card of a published student: it says what was measured, and nothing of the machine."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from PIL import Image
from small_runs import train_flags, write_pairs

from kd_trainer.commands.push import PushArguments, push
from kd_trainer.commands.train import train
from kd_trainer.config import DEFAULT_RECIPE, load_recipe, parse
from kd_trainer.model_card import CardFacts, dataset_name, render

CONFIG = {
    "_model_class": "Unet",
    "encoder_name": "timm-efficientnet-b0",
    "classes": 1,
    "id2label": {"0": "background", "1": "person"},
    "image_size": 640,
    "image_mean": [0.1, 0.2, 0.3],
    "image_std": [0.4, 0.5, 0.6],
}
RESULTS = {
    "student_miou": 0.8123456789,
    "student_dice": 0.9,
    "student_boundary_iou": None,
    "student_iou_person": 0.7,
    "teacher_miou": 0.85,
    "teacher_dice": 0.91,
    "agreement": 0.96,
    "eval_images": 1200,
    "train_images": 3400,
    "teacher_parameters": 12_566_137,
    "teacher": "runs/big/student",
}


def facts(**changes: Any) -> CardFacts:
    known = CardFacts(
        repo_id="me/little-net",
        license="cc-by-4.0",
        config=CONFIG,
        parameters=(5_839_309, 412_160),
        file_mib=23.9,
        dataset="me/photos",
        results=RESULTS,
        settings={**load_recipe(DEFAULT_RECIPE), "teacher": "/home/jane/big/student"}
        | {"eval_split": "test"},
    )
    return dataclasses.replace(known, **changes)


def row(card: str, name: str) -> list[str]:
    """Cells behind a name in a table of the card."""
    (found,) = re.findall(rf"^\| {re.escape(name)} \|(.*)\|$", card, re.MULTILINE)
    return [cell.strip() for cell in found.split("|")]


def test_metadata_holds_the_measured_figures():
    """The Hub shows what stands in `model-index`; the stock Trainer leaves it empty."""
    data = ModelCard(render(facts())).data
    assert (data.license, data.pipeline_tag) == ("cc-by-4.0", "image-segmentation")
    assert data.datasets == ["me/photos"]
    assert data.model_name == "little-net"
    values = {result.metric_type: result.metric_value for result in data.eval_results}
    assert values == {"mean_iou": 0.812346, "dice": 0.9}
    for result in data.eval_results:
        assert (result.dataset_type, result.dataset_split) == ("me/photos", "test")
        assert result.task_type == "image-segmentation"


def test_without_results_nothing_is_claimed():
    """An empty table of figures reads as if there were some."""
    card = render(facts(results={}, settings={}))
    assert ModelCard(card).data.eval_results is None
    for heading in ("## Figures", "## Recipe"):
        assert heading not in card
    assert "None" not in re.sub(r"```.*?```", "", card, flags=re.DOTALL)


def test_table_compares_with_teacher_and_baseline():
    """Whether the distillation was worth it is the first question of a reader."""
    card = render(facts(baseline={"student_miou": 0.79, "student_dice": None}))
    assert row(card, "mIoU") == ["0.8123", "0.8500", "0.7900"]
    assert row(card, "Dice") == ["0.9000", "0.9100", ""]
    assert row(card, "IoU of person") == ["0.7000", "", ""]
    assert "95.6% of its teacher's mIoU and gives 96.0% of the pixels" in card
    assert len(row(render(facts()), "mIoU")) == 2


def test_sizes_tell_used_from_never_used():
    """412,160 parameters in the file that no output depends on are no part of the network."""
    card = render(facts())
    assert row(card, "student") == ["5,839,309", "412,160", "23.9"]
    assert row(card, "teacher") == ["12,566,137", "", ""]


def test_further_measurements_become_tables():
    """Latency and exports are measured by other commands, and shown where they are known."""
    rows = [{"runtime": "torch", "median_ms": 12.3456}, {"runtime": "onnx", "median_ms": None}]
    card = render(facts(measured={"Latency": rows}))
    assert "## Latency" in card
    assert "| runtime | median ms |" in card
    assert row(card, "torch") == ["12.35"]
    assert row(card, "onnx") == [""]


@pytest.mark.parametrize(
    ("dataset", "name", "hub_id"),
    [
        ("/home/jane/pictures/photos", "photos", None),
        ("../photos/", "photos", None),
        ("someone/else", "someone/else", "someone/else"),
        ("synthetic", "synthetic", None),
        ("coco/annotations/all.json", "all.json", None),
        (None, "unnamed", None),
    ],
)
def test_a_local_folder_is_named_by_its_last_part(dataset, name, hub_id):
    """A path of the writer's machine says who they are, and nothing to the reader."""
    assert dataset_name({"dataset": dataset}) == name
    assert facts(dataset=name).dataset_id == hub_id


def test_a_folder_is_local_before_it_is_an_id(tmp_path: Path, monkeypatch):
    """`data/photos` is a folder to the training; as an id it would be somebody else's data."""
    (tmp_path / "data" / "photos").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert dataset_name({"dataset": "data/photos"}) == "photos"


def test_no_path_of_the_machine_is_left():
    """The teacher's path is in config.yaml and in results.json."""
    card = render(facts(dataset=dataset_name({"dataset": "/home/jane/photos"})))
    assert "jane" not in card
    assert "distilled from `big`" in card


RECIPES = {
    "rgb_hierarchical_unet_v2_distillation_b0_from_b3_temp_prog": (
        "- Loss: 0.3 KL(T) + 0.5 MSE + 0.5 BCE + 1 Dice",
        "- Temperature: cosine from 4 to 1, moved each epoch",
        "its deepest unit is freed at epoch 5 (counted from 0), one more every 3 epochs",
        "0.0001 for decoder and head, 3e-05 for the encoder; 5 epochs of warm-up",
        "- Length: 50 epochs, 4 images",
        "- Augmentation: heavy",
    ),
    "rgb_hierarchical_unet_v2_distillation_b0_from_b3_timeline": (
        "linear between the points 0:4.0, 4:3.6, 7:3.2",
    ),
    "demo": ("- Loss: 0.3 KL(T) + 0.5 BCE + 1 Dice", "from random weights"),
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_is_that_of_the_settings(name: str):
    """A recipe in words that differs from what was run cannot be repeated."""
    run = parse(["--config", name, "--teacher", "big"])
    card = render(facts(settings=run.resolved()))
    for line in RECIPES[name]:
        assert line in card


def test_a_student_without_a_teacher_is_not_called_distilled():
    """Terms that need a teacher are 0 then, whatever the weights say."""
    settings = parse(["--teacher", "none", "--num_labels", "3"]).resolved()
    card = render(facts(settings=settings, results={"student_miou": 0.5}))
    assert "- Loss: 0.5 cross entropy + 1 Dice" in card
    assert "Trained without a teacher" in card
    assert "istilled" not in card.split("## Citation")[0].split("---", 2)[2]
    assert "Temperature" not in card


def test_encoders_of_timm_are_not_promised_to_smp():
    """smp refuses the folder: a snippet that crashes is the first thing a reader would try."""
    card = render(facts(config=CONFIG | {"encoder_name": "tu-convnext_atto"}))
    assert "import segmentation_models_pytorch" not in card
    assert "`smp.from_pretrained` does not read this repository" in card
    assert "import segmentation_models_pytorch" in render(facts())


def test_a_student_in_training_says_so():
    """Figures of the first epoch would be read as the result."""
    assert "**In training, update 4 of 8.**" in render(facts(progress="update 4 of 8"))
    assert "In training" not in render(facts())


def test_names_of_a_stranger_are_text_in_the_card():
    """Classes come from a data set: on the Hub's page they would be markup, or a broken table."""
    evil = "a|b <img src=x> [c](d) `e`\x1b[2J\n## f"
    shown = r"a\|b \<img src=x\> \[c\](d) \`e\`\\x1b\[2J\\n## f"
    labels = {"0": "sky", "1": "class_1", "2": evil}
    results = {**RESULTS, f"student_iou_{evil}": 0.5, "student_iou_class_1": 0.25}
    card = render(
        facts(
            config={**CONFIG, "classes": 3, "id2label": labels},
            results=results,
            dataset="p|q",
            measured={"Latency": [{"runtime": evil, "median_ms": 1.0}]},
        )
    )
    assert f"out of sky, class_1, {shown}." in card
    assert f"\n| IoU of {shown} | 0.5000 |  |\n" in card
    assert row(card, "IoU of class_1") == ["0.2500", ""]
    assert f"\n| {shown} | 1 |\n" in card
    assert "of p\\|q (1,200 images)" in card
    assert all(line.isprintable() for line in card.split("\n"))


def test_the_masks_of_the_snippet_stay_in_their_folder(tmp_path: Path, monkeypatch):
    """A class may be called `../../x` or `a/b`, and two may differ in one such character only."""
    (snippet,) = re.findall(r"^```python\n(from transformers.*?)^```", render(facts()), re.M | re.S)
    labels = ["../up", "/root", "a/b", "a|b", "stra\u00dfe", "x" * 300]
    parts = [{"label": label, "mask": Image.new("1", (1, 1))} for label in labels]
    monkeypatch.setattr("transformers.pipeline", lambda *_, **__: lambda _: parts)
    monkeypatch.chdir(tmp_path)
    exec(snippet, {})
    found = sorted(path.name for path in tmp_path.rglob("*"))
    assert found[:3] == ["0____up.png", "1__root.png", "2_a_b.png"]
    assert len(found) == len(labels)


def test_a_run_is_as_long_as_it_was(tmp_path: Path):
    """The setting is but a limit: 3 updates of 2 in an epoch are 1.5 epochs, not the 50 of it."""
    data = write_pairs(tmp_path / "data", train=4, validation=1)
    more = ("--max_steps", "3", "--epochs", "50", "--save_strategy", "no")
    results = train(parse(train_flags(data, tmp_path / "run", *more)))
    assert results["epochs"] == 1.5
    push(PushArguments(license="mit", dry_run=True), str(tmp_path / "run"), "me/little-net")
    (card,) = (tmp_path / "run").glob("*/README.md")
    line = "- Length: 1.5 epochs (of at most 3 updates), 2 images an update and device"
    assert line in card.read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize(
    ("ran", "said"),
    [(7.0, "7 epochs (of at most 50 epochs)"), (50.0, "50 epochs"), (None, "50 epochs")],
)
def test_an_early_stop_shows_in_the_card(ran: float | None, said: str):
    """Results of earlier versions do not say what ran; then the setting is all that is known."""
    settings = {"num_train_epochs": 50, "per_device_train_batch_size": 8}
    results = RESULTS if ran is None else RESULTS | {"epochs": ran}
    card = render(facts(settings=settings, results=results))
    assert f"- Length: {said}, 8 images an update and device" in card


def test_a_stock_model_of_one_logit_says_how_it_is_read():
    """A pipeline's argmax over one channel is always class 0: the whole image is the class."""
    config = {
        "architectures": ["SegformerForSemanticSegmentation"],
        "model_type": "segformer",
        "classes": 1,
        "one_logit": True,
        "id2label": {"0": "rest", "1": "road"},
        "image_size": 64,
    }
    card = render(facts(config=config))
    assert "above 0 it is road" in card
    assert "pipeline(" not in card
    snippet = card.split("```python")[1].split("```")[0]
    compile(snippet, "card", "exec")
    assert "[0, 0] > 0" in snippet
    assert "pipeline(" in render(facts(config=config | {"one_logit": False}))


def test_the_shape_of_the_rates_is_that_of_the_settings():
    """All were called a cosine."""
    for kind, said in (("polynomial", "then a polynomial to 1e-06"), ("constant", "then constant")):
        settings = facts().settings | {"lr_scheduler_type": kind}
        assert said in " ".join(render(facts(settings=settings)).split())
    assert "then a cosine to" in " ".join(render(facts()).split())
