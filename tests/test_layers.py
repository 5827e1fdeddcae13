"""The house rules that can be read off the syntax trees."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "kd_trainer"
# A guard against accidents, no aim: a file holds one concept, whole.
LONGEST_FILE, LONGEST_FUNCTION, MOST_POSITIONAL = 600, 60, 5
ONE_CLASS = "kd_trainer/trainer.py"  # whose overrides cannot lie elsewhere: half as much again

# This travels to the Hub as remote code, without the rest of the package.
PORTABLE = "models"
AUGMENTATION = "kd_trainer/data/augmentation.py"
# A file imports from its own package and from the layers before its own.
LAYERS = (
    (
        *("losses", "schedules", "adaptive_weight", "metrics", "fast_layers"),
        *("errors", "fields", "files", "processes", "universal", PORTABLE),
    ),
    (
        "argument_checks",
        "class_map",
        "console",
        "foreign_flags",
        "mask_flags",
        "reports",
        "sources",
        "stock_models",
        "teacher_files",
    ),
    (
        "arguments",
        "data_arguments",
        "model_arguments",
        "model_card",
        "parsing",
        "students",
        "teacher",
    ),
    ("config", "data", "optim", "teacher_ensemble"),
    ("evaluation", "feature_maps", "found_settings", "teacher_maps"),
    ("accepted", "callbacks", "checkpointing", "ema", "loading", "run_folder", "tracking"),
    ("build", "costs", "hub", "teacher_cache"),
    ("export", "push_callback", "teacher_targets"),
    ("inference", "trainer"),
    ("doctor", "measurement", "web_demo"),
    ("compare",),
    ("commands",),
    ("__init__", "__main__"),
    ("scripts",),
)
RANKS = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}


def place_of(path: str) -> str:
    """Name in LAYERS of a file: `kd_trainer/data/coco.py` -> data, `scripts/eval.py` -> scripts."""
    parts = Path(path).with_suffix("").parts
    return parts[1] if parts[0] == PACKAGE else "scripts"


def imported(path: str, tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and absolute dotted name of everything imported, inside functions as well."""
    package = list(Path(path).parent.parts)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = [*base, *([node.module] if node.module else [])]
            for alias in node.names:
                yield node.lineno, ".".join([*module, alias.name])


def import_faults(path: str, tree: ast.AST) -> Iterator[str]:
    here = place_of(path)
    if here not in RANKS:
        yield f"{path}: no rank. Put {here} into LAYERS."
        return
    for line, name in imported(path, tree):
        where, parts = f"{path}:{line}", name.split(".")
        if parts[0] == "albumentations" and path.startswith(PACKAGE) and path != AUGMENTATION:
            yield f"{where} imports albumentations, which only {AUGMENTATION} may"
        if parts[0] != PACKAGE:
            continue
        there = parts[1] if len(parts) > 1 and parts[1] in RANKS else "__init__"
        if here == PORTABLE != there:
            yield f"{where} imports {name}, but it travels as remote code without the package"
        elif there != here and RANKS[there] >= RANKS[here]:
            yield f"{where} imports {name} of rank {RANKS[there]}, own rank {RANKS[here]}"


def size_faults(path: str, source: str, tree: ast.AST) -> Iterator[str]:
    lines = source.count("\n")
    longest = LONGEST_FILE * 3 // 2 if path == ONE_CLASS else LONGEST_FILE
    if lines > longest:
        yield f"{path} has {lines} lines, at most {longest}"
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        length = node.end_lineno - node.lineno + 1
        names = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args)]
        positional = len(names) - (names[:1] in (["self"], ["cls"]))
        if length > LONGEST_FUNCTION:
            yield f"{path}:{node.lineno} {node.name} has {length} lines, at most {LONGEST_FUNCTION}"
        if positional > MOST_POSITIONAL:
            yield f"{path}:{node.lineno} {node.name} takes {positional} positional parameters"


def faults(sources: dict[str, str]) -> list[str]:
    """All violations in a tree given as path -> source."""
    found = []
    for path, source in sources.items():
        tree = ast.parse(source)
        found += [*import_faults(path, tree), *size_faults(path, source, tree)]
    return found


def test_the_tree_keeps_the_layers_and_sizes():
    """An import upwards makes a cycle sooner or later; nobody sees it in a review."""
    files = [
        *ROOT.glob(f"{PACKAGE}/**/*.py"),
        *ROOT.glob("scripts/*.py"),
        *ROOT.glob("benchmarks/*.py"),
    ]
    sources = {str(file.relative_to(ROOT)): file.read_text() for file in files}
    assert len(sources) > 5
    assert faults(sources) == []


@pytest.mark.parametrize(
    ("path", "source", "fault"),
    [
        ("kd_trainer/losses/kl.py", "from kd_trainer.trainer import X", "of rank 8, own rank 0"),
        ("kd_trainer/losses/kl.py", "from ..metrics import X", "of rank 0, own rank 0"),
        (
            "kd_trainer/optim.py",
            "def f():\n    import kd_trainer.callbacks",
            "of rank 5, own rank 3",
        ),
        ("kd_trainer/trainer.py", "from kd_trainer import Teacher", "of rank 12, own rank 8"),
        ("kd_trainer/trainer.py", "from . import commands", "of rank 11, own rank 8"),
        ("kd_trainer/models/modeling.py", "from kd_trainer.losses import kl", "remote code"),
        ("kd_trainer/models/modeling.py", "import kd_trainer", "remote code"),
        ("kd_trainer/data/coco.py", "import albumentations as A", "albumentations"),
        ("kd_trainer/surprise.py", "", "no rank"),
        ("kd_trainer/hub.py", "x = 1\n" * 601, "601 lines"),
        ("kd_trainer/hub.py", "def f():\n" + "    x = 1\n" * 60, "f has 61 lines"),
        ("kd_trainer/hub.py", "def f(a, b, c, d, e, g): ...", "6 positional"),
        ("kd_trainer/hub.py", "class A:\n    def f(self, a, b, c, d, e, g): ...", "6 positional"),
    ],
)
def test_the_checker_catches(path, source, fault):
    """A checker that finds nothing looks like a tree without faults."""
    found = faults({path: source})
    assert len(found) == 1
    assert fault in found[0]


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("kd_trainer/trainer.py", "from kd_trainer.losses import kl\nfrom .optim import groups"),
        ("kd_trainer/data/coco.py", "from kd_trainer.data.pairs import x\nfrom . import pairs"),
        ("kd_trainer/models/modeling.py", "from .image_processing import SmpImageProcessor"),
        ("kd_trainer/data/augmentation.py", "import albumentations as A"),
        ("benchmarks/plain_loop.py", "import albumentations as A"),
        ("scripts/train.py", "from kd_trainer.commands.train import main\nimport torch"),
        ("kd_trainer/hub.py", "class A:\n    def f(self, a, b, c, d, e, *, g, h): ..."),
    ],
)
def test_the_checker_allows(path, source):
    """A checker that forbids what the layers allow would soon be switched off."""
    assert faults({path: source}) == []
