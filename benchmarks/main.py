"""The command line of scripts/benchmark.py: one word says what is measured."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.data import DataPathArguments, run_data
from benchmarks.evaluation import EvaluationArguments, run_evaluation
from benchmarks.timer import figures_table, machine
from benchmarks.train import ProcessArguments, TrainArguments, run_processes, run_train
from kd_trainer.fields import closest
from kd_trainer.files import write_json
from kd_trainer.parsing import Parser


@dataclass(frozen=True)
class Part:
    """One kind of measurement: in words, its settings, and what measures, prints and gives it."""

    about: str
    arguments: type
    run: Callable[[Any], dict[str, Any]]


# A further measurement is a line here.
PARTS = {
    "train": Part("steps of plain loop, student alone, ours, cached", TrainArguments, run_train),
    "data": Part("augmentation, decoding, growth of the data", DataPathArguments, run_data),
    "processes": Part("steps of two processes against one", ProcessArguments, run_processes),
    "evaluation": Part("memory by evaluation images", EvaluationArguments, run_evaluation),
}
DEFAULT = "train"


def benchmark_parser(word: str) -> Parser:
    """The parser of one part."""
    parts = "\n".join(f"  {name:<12} {part.about}" for name, part in PARTS.items())
    return Parser(
        [PARTS[word].arguments],
        f"benchmark.py {word}",
        f"Measure {PARTS[word].about}.",
        f"What can be measured (`benchmark.py NAME --help`), `{DEFAULT}` if no name is given:\n"
        f"{parts}\n\n"
        "Examples:\n  benchmark.py train --json speed.json\n"
        "  benchmark.py train --free_units 0 --pairs 9\n"
        "  benchmark.py train --dataset photos/ --image_size 640 --batch_size 16 --profile trace/",
    )


def parse_benchmark(arguments: Sequence[str] | None = None) -> tuple[str, Any]:
    """Name of what is measured, and its settings.

    Raises:
        ValueError: on an unknown name, flag or value.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    word = words.pop(0) if words and not words[0].startswith("-") else DEFAULT
    if word not in PARTS:
        raise ValueError(
            f"Expected one of {', '.join(PARTS)} to measure, got {word!r}.{closest(word, PARTS)}"
        )
    return word, PARTS[word].arguments(**benchmark_parser(word).given(words))


def benchmark_main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write the file that is asked for."""
    word, args = parse_benchmark(arguments)
    about = machine(getattr(args, "torch_device", torch.device("cpu")))
    print(figures_table({"machine": about}))
    result = {"what": word, "machine": about, "work": vars(args), **PARTS[word].run(args)}
    if args.json is not None:
        write_json(Path(args.json), result)
