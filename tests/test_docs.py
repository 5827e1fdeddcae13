"""README and docs against the code: blocks run, commands parse, flags, defaults and paths exist."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from pathlib import Path

import pytest
from small_runs import save_network, train_flags, write_pairs
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_layers import LAYERS

from benchmarks import frontier
from benchmarks.main import PARTS, benchmark_parser, parse_benchmark
from kd_trainer.arguments import DistillationArguments
from kd_trainer.commands import data as data_command
from kd_trainer.commands import evaluate, predict, push, report
from kd_trainer.commands import export as export_main
from kd_trainer.commands import web_demo as web_demo
from kd_trainer.commands.doctor import doctor_parser, parse_doctor
from kd_trainer.commands.train import train
from kd_trainer.compare.arguments import (
    CompareArguments,
    compare_parser,
    parse_comparison,
)
from kd_trainer.config import ALIASES, OWN_FIELDS, load_recipe, parse, parser
from kd_trainer.console import markdown_table
from kd_trainer.data_arguments import DataArguments
from kd_trainer.doctor.plan import timeline
from kd_trainer.model_arguments import ModelArguments
from kd_trainer.models.modeling import SmpForSemanticSegmentation
from kd_trainer.parsing import Parser, convert, hints_of
from kd_trainer.students import parameter_counts

ROOT = Path(__file__).parents[1]
TOP = ("README.md", "CONTRIBUTING.md", "SECURITY.md")
PAGES = [*(ROOT / name for name in TOP), *sorted(ROOT.glob("docs/*.md"))]
TEXTS = {str(page.relative_to(ROOT)): page.read_text(encoding="utf-8") for page in PAGES}
README = TEXTS["README.md"]
PLAN_EPOCHS = (0, 5, 8, 11, 14, 17, 20, 23, 49)
# Flags on these pages that belong to accelerate and tensorboard.
FOREIGN = {"--config_file", "--logdir", "--quiet", "--max", "--nproc_per_node"}  # --max-restarts
FOREIGN |= {"--activation_checkpointing"}  # of newer versions of transformers
# Left empty as a default, and then set from the recipe's name, the launcher, task and data.
DERIVED = ("output_dir", "mixed_precision", "label_names", "greater_is_better", "num_labels")
LOADING = ("dataloader_num_workers", "dataloader_persistent_workers")
CLASSES = (ModelArguments, DataArguments, DistillationArguments)


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def prose(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


class CaughtError(Exception):
    """Carries a parser out of the function that makes it."""


@pytest.fixture(scope="module")
def parsers():
    """The parser of each script."""

    def catch(made, _arguments):
        raise CaughtError(made)

    found = {
        "train.py": parser(),
        "compare.py": compare_parser(),
        "doctor.py": doctor_parser(),
        **{f"benchmark.py {word}": benchmark_parser(word) for word in PARTS},
    }
    mains = {
        "eval.py": evaluate.evaluate_main,
        "predict.py": predict.predict_main,
        "export.py": export_main.export_main,
        "data.py": data_command.data_main,
        "report.py": report.report_main,
        "push.py": push.push_main,
        "demo.py": web_demo.web_demo_main,
        "frontier.py": frontier.frontier_main,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Parser, "given", catch)
        for name, main in mains.items():
            with pytest.raises(CaughtError) as caught:
                main([])
            found[name] = caught.value.args[0]
    return found


def options(of: object) -> set[str]:
    return {option for action in of._actions for option in action.option_strings}  # type: ignore[attr-defined]


def commands() -> list[tuple[str, list[str]]]:
    """(script, arguments) of each command line of ours in the bash blocks."""
    found = []
    for text in TEXTS.values():
        for line in "\n".join(blocks(text, "bash")).splitlines():
            words = shlex.split(line)
            script = next((w for w in words if w.startswith("scripts/")), None)
            if script is not None:
                found.append((Path(script).name, words[words.index(script) + 1 :]))
    return found


PAGES_WITH_CODE = [n for n in TEXTS if n != "README.md" and blocks(TEXTS[n], "python")]


@pytest.mark.parametrize("page", PAGES_WITH_CODE)
def test_python_blocks_run_in_order(page: str, tmp_path: Path, monkeypatch):
    """An example that stopped working is the first thing a new user meets."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": page}
    for number, block in enumerate(blocks(TEXTS[page], "python")):
        exec(compile(block, f"{page}, block {number}", "exec"), names)


def test_readme_example_leaves_a_student_that_transformers_reads(tmp_path: Path, monkeypatch):
    """The example is copied as it stands, and would run through if it saved nothing of use."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "example"}
    exec("\n".join(blocks(README, "python")), names)
    assert type(names["model"]).__name__ == "SmpForSemanticSegmentation"
    assert type(names["processor"]).__name__ == "SmpImageProcessor"


@pytest.mark.parametrize(("script", "arguments"), commands(), ids=lambda v: str(v)[:60])
def test_documented_commands_parse(script: str, arguments: list[str], parsers, tmp_path: Path):
    """A flag that was renamed would stay in the documentation."""
    if "--help" in arguments:
        return
    if script == "compare.py":
        parse_comparison(arguments)
        return
    if script == "benchmark.py":
        parse_benchmark(arguments)
        return
    if script not in ("train.py", "doctor.py"):
        parsers[script].given(arguments)
        return
    if "--config" in arguments:
        place = arguments.index("--config") + 1
        if arguments[place].endswith(".yaml"):  # stands for a file of the reader's
            own = tmp_path / "own.yaml"
            own.write_text("num_train_epochs: 3\n")
            arguments = [*arguments[:place], str(own), *arguments[place + 1 :]]
    (parse if script == "train.py" else parse_doctor)(arguments)


@pytest.mark.parametrize("page", TEXTS)
def test_every_flag_exists(page: str, parsers):
    """A flag in running text is not parsed by any other test."""
    known = FOREIGN.union(*map(options, parsers.values()))
    named = set(re.findall(r"(?<![\w-])--[a-zA-Z_]\w*", TEXTS[page]))
    assert named - known == set()


def test_every_field_of_ours_is_documented():
    """A new field would be found by nobody who does not read --help to the end."""
    fields = {f.name for cls in (ModelArguments, DataArguments) for f in dataclasses.fields(cls)}
    fields |= set(OWN_FIELDS) | set(ALIASES)
    pages = "\n".join(TEXTS.values())
    assert {name for name in fields if not re.search(rf"`--{name}\b", pages)} == set()


def rows(text: str, heading: str) -> list[list[str]]:
    """Cells of the rows of all tables whose first column is headed so."""
    found, inside = [], False
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line[:1] == "|" else []
        if cells and (cells[0] == heading or (inside and not set(line) <= set("|-: "))):
            found += [cells] if inside else []
            inside = True
        inside = inside and bool(cells)
    return found


@pytest.mark.parametrize(
    ("page", "least"),
    [
        ("docs/data.md", 16),
        ("docs/training.md", 16),
        ("docs/publish.md", 5),
        ("docs/bad_input.md", 2),
        ("docs/speed.md", 5),
        ("docs/teacher_cache.md", 2),
    ],
)
def test_documented_defaults_are_those_of_the_recipe(page: str, least: int):
    """Defaults are looked up in tables, and a stale one decides somebody's run."""
    run = parse([])
    hints = hints_of(CLASSES)
    checked = 0
    for flag, default, _ in rows(TEXTS[page], "flag"):
        name = flag.strip("`-")
        holder = next(h for h in (run.model, run.data, run.training) if hasattr(h, name))
        if default:
            wanted = convert(name, default, hints[name])
            actual = getattr(holder, name)
            assert actual in (wanted, [wanted]), name
        elif name not in (*DERIVED, *LOADING):
            assert getattr(holder, name) in (None, ""), name
        checked += 1
    assert checked >= least


@pytest.mark.parametrize(
    ("page", "heading", "cls"),
    [
        ("docs/training.md", "flag of eval.py", evaluate.EvaluateArguments),
        ("docs/training.md", "flag of predict.py", predict.PredictArguments),
        ("docs/report.md", "flag of report.py", report.ReportArguments),
        ("docs/publish.md", "flag of push.py", push.PushArguments),
        ("docs/export.md", "flag of export.py", export_main.ExportArguments),
        ("docs/demo.md", "flag of demo.py", web_demo.WebDemoArguments),
        ("docs/frontier.md", "flag of frontier.py", frontier.FrontierArguments),
        ("docs/speed.md", "flag of benchmark.py train", PARTS["train"].arguments),
    ],
)
def test_documented_defaults_are_those_of_the_scripts(page: str, heading: str, cls: type):
    """The small scripts have defaults of their own under the same names."""
    hints = hints_of([cls])
    wanted = {f.name: _default(f) for f in dataclasses.fields(cls) if f.name != "model"}
    found = {row[0].strip("`-"): row[1] for row in rows(TEXTS[page], heading)}
    assert {name: convert(name, v, hints[name]) for name, v in found.items()} == wanted


def _default(field: dataclasses.Field) -> object:
    made = field.default_factory is not dataclasses.MISSING
    return field.default_factory() if made else field.default


def test_documented_defaults_are_those_of_the_comparison():
    """The number of seeds decides what a comparison can say, and a stale table the number."""
    wanted, hints = CompareArguments(), hints_of([CompareArguments])
    found = {row[0].strip("`-"): row[1] for row in rows(TEXTS["docs/compare.md"], "flag")}
    assert found.keys() == hints.keys()
    for name, value in found.items():
        assert convert(name, value, hints[name]) == getattr(wanted, name), name


def test_documented_variables_are_those_that_a_space_is_told():
    """A Space has no --help, and a variable that nothing reads looks like one that is set."""
    named = {
        cell for row in rows(TEXTS["docs/demo.md"], "variable") for cell in [row[0].strip("`")]
    }
    assert named == set(web_demo.SPACE_VARIABLES)


def slug(heading: str) -> str:
    return re.sub(r"[^\w -]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", TEXTS)
def test_links_and_paths_resolve(page: str):
    """A moved file leaves dead links behind."""
    text, folder = TEXTS[page], (ROOT / page).parent
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(text)):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = (folder / path).resolve() if path else ROOT / page
        assert file.is_file(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in map(slug, headings), target
    places = r"(?<![\w/])((?:kd_trainer|scripts|tests|docs|accelerate_configs)/[\w./-]*\w/?)"
    for path in re.findall(places, text):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("page", TEXTS)
def test_recipes_and_make_targets_exist(page: str):
    """Both are names in running text that nothing else checks."""
    for name in re.findall(r"\brgb_\w+", TEXTS[page]):
        load_recipe(name)
    targets = re.findall(r"^([a-z][a-z -]*):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    known = {name for line in targets for name in line.split()}
    code = "\n".join([*re.findall(r"`([^`\n]+)`", TEXTS[page]), *blocks(TEXTS[page], "bash")])
    assert set(re.findall(r"^make ([a-z-]+)", code, re.MULTILINE)) <= known


@pytest.mark.parametrize("page", TEXTS)
def test_no_path_or_address_of_one_machine(page: str):
    """A path of the writer's machine means nothing on the reader's."""
    assert not re.search(r"(?<![\w.:/])/(work|home|root|tmp|mnt|usr|data)/|file://", TEXTS[page])


@pytest.fixture(scope="module")
def networks() -> dict[str, SmpForSemanticSegmentation]:
    """Student and teacher of the recipe, of random weights."""
    return {
        who: SmpForSemanticSegmentation.create(
            "unet", f"timm-efficientnet-{size}", encoder_weights="none"
        )
        for who, size in (("teacher", "b3"), ("student", "b0"))
    }


def test_plan_in_the_readme_is_the_plan(networks):
    """The plan is what a reader compares with the recipe; typed by hand it would drift."""
    plan = timeline(networks["student"], parse([]).training, 50)
    header = ["epoch", "temperature", "free encoder units", "trainable parameters"]
    body = [
        [
            f"{row['epoch']:.0f}",
            f"{row['temperature']:.2f}",
            f"{row['free_units']:.0f}",
            f"{row['trainable']:,.0f}",
            f"{row['decoder_lr']:.0e}",
            f"{row['encoder_lr']:.0e}" if row["encoder_lr"] else "frozen",
        ]
        for row in (plan[epoch] for epoch in PLAN_EPOCHS)
    ]
    table = markdown_table([*header, "decoder lr", "encoder lr"], body)
    assert table in README, f"expected in README.md:\n{table}"


def test_sizes_in_the_readme_are_true(networks):
    """Published tables of these networks often count the classifier's head."""
    body = []
    for who, network in networks.items():
        used, never_used, _ = parameter_counts(network)
        encoder = network.config.encoder_name
        body.append([f"{who}: U-Net on `{encoder}`", f"{used:,}", f"{never_used:,}"])
    table = markdown_table(["network", "parameters", "never used"], body)
    assert table in README, f"expected in README.md:\n{table}"


def test_design_names_every_part_of_the_package():
    """A part that the table of layers leaves out is a part nobody can place."""
    names = [re.findall(r"`(\w+)`", row[1]) for row in rows(TEXTS["docs/design.md"], "layer")]
    present = {p.stem for p in (ROOT / "kd_trainer").iterdir() if p.suffix == ".py" or p.is_dir()}
    present |= {"scripts"}
    assert [set(n) for n in names] == [set(layer) & present for layer in LAYERS]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """Output folder of a small distillation with TensorBoard and panels."""
    root = tmp_path_factory.mktemp("docs")
    flags = train_flags(
        write_pairs(root / "pairs", train=4, validation=2),
        root / "run",
        *("--report_to", "tensorboard", "--panel_images", "1", "--epochs", "1"),
        *("--logging_steps", "1", "--report", "true"),
        teacher=save_network(root / "teacher"),
    )
    train(parse(flags))
    return root / "run"


def test_output_folder_is_the_documented_tree(finished: Path):
    """Readers write scripts that rely on these names."""
    trees = [b for text in TEXTS.values() for b in blocks(text, "text") if "runs/distilled/" in b]
    assert len(trees) == 2
    for tree in trees:
        top = set(re.findall(r"^[├└]── ([\w.*-]+)", tree, re.MULTILINE))
        assert all(any(finished.glob(name)) for name in top)
        here = {p.name for p in finished.iterdir() if not p.name.startswith("checkpoint-")}
        assert top == here | {"checkpoint-*"}
    inside = set(re.findall(r"^│   [├└]── ([\w.]+)", trees[1], re.MULTILINE))
    assert all((finished / "student" / name).is_file() for name in inside)


def test_documented_keys_of_results_are_there_and_complete(finished: Path):
    """The tables in the README are the interface of results.json."""

    def first_column(heading: str) -> set[str]:
        return set(re.findall(r"`(\w+)`", " ".join(row[0] for row in rows(README, heading))))

    # IoU and Dice of each class are described, not listed.
    metrics = first_column("key, each as `student_` and `teacher_`")
    words = first_column("key")
    assert "boundary_iou" in metrics
    assert "agreement" in words
    keys = set(json.loads((finished / "results.json").read_text()))
    listed = {f"{who}_{name}" for who in ("student", "teacher") for name in metrics} | words
    assert listed - keys == set()
    per_class = re.compile(r"(student|teacher)_(iou|dice)_(background|foreground|person|class_\d)")
    assert {key for key in keys - listed if not per_class.fullmatch(key)} == set()


def test_documented_names_in_tensorboard_exist(finished: Path):
    """A curve that is documented and missing looks like a failed run."""
    (folder,) = (finished / "runs").iterdir()
    board = EventAccumulator(str(folder))
    board.Reload()
    tags = {*board.Tags()["scalars"], *board.Tags()["images"]}
    named = [row[0] for row in rows(TEXTS["docs/training.md"], "name")]
    wanted = {tag for cell in named for tag in re.findall(r"`([\w/]+)`", cell)}
    wanted -= {"train/lr/unit_6"}  # of an encoder of seven units
    assert "train/grad_share/kl" in wanted
    assert wanted - tags == set()


def test_readme_stays_short_and_keeps_the_place_of_the_results():
    """The first page is read in a minute or not at all."""
    assert README.count("\n") <= 300
    assert "\n## Results\n" in README
    pictures = sum(p.stat().st_size for p in (ROOT / "docs" / "images").iterdir())
    assert pictures < 300_000
