"""The command line of scripts/compare.py: that of a training, and what is compared."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from kd_trainer.compare.variants import Variant, check_wanted, is_baseline, read_variants
from kd_trainer.config import parser
from kd_trainer.fields import check_at_least, expanded, help_field
from kd_trainer.parsing import Parser, settings_of

DEFAULT_OUTPUT = "runs/compare"
DESCRIPTION = """Train the same student with and without its teacher and compare them.

For each seed two runs of equal budget: `baseline` (no teacher) and `distilled`, or one for each of
--variants. All flags of train.py are taken, and mean the same. Runs that are complete are not
repeated, interrupted ones go on from their newest checkpoint. The figures are in comparison.md and
comparison.json, beside the folders of the runs, in --output_dir (here runs/compare if it is not
given)."""
EPILOG = """Examples:
  compare.py --dataset photos/ --teacher teacher/ --epochs 12
  compare.py --dataset photos/ --teacher teacher/ --epochs 12 --seed_list 3 4 --output_dir runs/b
  compare.py --dataset photos/ --teacher teacher/ --epochs 12 --output_dir runs/losses \\
      --variants recipe= soft="--kl_weight 1 --mse_weight 0" mine.yaml
  compare.py --merge runs/compare runs/b --output_dir runs/both"""
# What the comparison itself decides.
_NOT_TAKEN = {
    "seed": "Expected --seeds or --seed_list, got --seed. Name all seeds at once.",
    "resume": "Expected no --resume, got one. Runs go on by themselves: leave it out.",
    "push_to_hub": "Expected no --push_to_hub, got one: every run would push to the same place. "
    "Push the best run's folder afterwards with push.py.",
}

# What says nothing to a comparison that only reports.
_OF_A_TRAINING = (
    *("seeds", "seed_list", "variants", "only", "baselines", "final_dataset", "final_split"),
)


@dataclasses.dataclass
class CompareArguments:
    """Settings of scripts/compare.py beside those of a training."""

    seeds: int = help_field(3, "Number of seeds: 0, 1, 2, ...")
    seed_list: list[int] | None = help_field(None, "The seeds themselves, instead of their number.")
    variants: list[str] | None = help_field(
        None,
        "Compare several ways to distil with one set of baselines: NAME='FLAGS' each, where FLAGS "
        "(--config among them) are those by which it differs from this command line; NAME= is the "
        "command line itself, a recipe or YAML file needs no name, '--teacher self' is a student "
        "that teaches itself (default: distilled=).",
        metavar="NAME=FLAGS",
    )
    only: str = help_field(
        "", "Train `baseline` or the variant of this name only, to share the work among machines."
    )
    baselines: str | None = help_field(
        None,
        "Take the baselines of this comparison instead of training them again: for other weights "
        "or temperatures of the distillation.",
    )
    final_dataset: str | None = help_field(
        None,
        "Also measure each chosen student on this data set, whose images chose nothing (default: "
        "--dataset, if --final_split is given).",
        metavar="SOURCE",
    )
    final_split: str | None = help_field(
        None, "The split of it (default: --eval_split, if --final_dataset is given)."
    )
    merge: list[str] | None = help_field(
        None, "Train nothing: report the runs in these folders of comparisons together."
    )
    bootstrap: int = help_field(2000, "Resamples of the images for the interval.")
    latency_repeats: int = help_field(
        30, "Measured calls for each latency; 0 leaves latencies out."
    )

    def __post_init__(self) -> None:
        check_at_least("seeds", self.seeds, 1)
        check_at_least("bootstrap", self.bootstrap, 1)
        check_at_least("latency_repeats", self.latency_repeats, 0)
        self.final_dataset = expanded(self.final_dataset)
        if self.only and self.baselines is not None:
            raise ValueError(
                f"Expected --only or --baselines, got both. With --baselines only the distilled "
                f"runs are trained: leave --only {self.only} out."
            )
        seeds = self.seed_list if self.seed_list is not None else [0]
        if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
            raise ValueError(
                f"Expected --seed_list of different seeds from 0, got "
                f"{' '.join(map(str, seeds)) or 'none'}."
            )

    @property
    def chosen_seeds(self) -> list[int]:
        """The seeds that are compared."""
        return list(range(self.seeds)) if self.seed_list is None else self.seed_list

    def wants(self, kind: str) -> bool:
        """Whether runs of this name are trained here."""
        if is_baseline(kind):
            return self.baselines is None and self.only in ("", "baseline")
        return self.only in ("", kind)


@dataclasses.dataclass
class Comparison:
    """A command line: what to compare, and the variants of the distillation."""

    args: CompareArguments
    output: Path
    variants: list[Variant] = dataclasses.field(default_factory=list)
    dry_run: bool = False
    trust_remote_code: bool = False


def compare_parser() -> Parser:
    """The parser of scripts/compare.py: that of train.py and a few flags."""
    return parser("compare.py", DESCRIPTION, EPILOG, own=[CompareArguments], hidden=_NOT_TAKEN)


def parse_comparison(arguments: Sequence[str] | None = None) -> Comparison:
    """Recipe, then flags, as train.py reads them.

    Raises:
        ValueError: on unknown flags, wrong values, or flags that cannot go together.
    """
    flags = compare_parser().given(arguments)
    chosen = settings_of(CompareArguments, flags)
    flags = {name: value for name, value in flags.items() if name not in chosen}
    config, dry_run = flags.pop("config"), flags.pop("dry_run")
    output = Path(flags.pop("output_dir", DEFAULT_OUTPUT))
    for name, message in _NOT_TAKEN.items():
        if name in flags:
            raise ValueError(message)
    if "seeds" in chosen and "seed_list" in chosen:
        raise ValueError("Expected --seeds or --seed_list, got both. Leave one out.")
    args = CompareArguments(**chosen)
    trusted = bool(flags.get("trust_remote_code"))
    if args.merge is not None:
        flags.pop("trust_remote_code", None)
        of_training = [name for name in _OF_A_TRAINING if name in chosen]
        unused = [*flags, *of_training, *(["dry_run"] if dry_run else [])]
        if unused:
            raise ValueError(
                f"Expected --merge with --output_dir, --bootstrap and --latency_repeats only, got "
                f"--{unused[0]}. It trains nothing: leave that out."
            )
        return Comparison(args, output, trust_remote_code=trusted)
    # One page a run, that nobody asked for.
    common = {} if "report" in flags else {"report": False}
    variants = [
        # A configuration that a run has written may hold what the comparison decides.
        dataclasses.replace(one, settings={k: v for k, v in one.settings.items() if _taken(k)})
        for one in read_variants(args.variants, config, flags, common)
    ]
    check_wanted(args.only, variants)
    return Comparison(args, output, variants, dry_run, trusted)


def _taken(name: str) -> bool:
    return name not in _NOT_TAKEN or name == "seed"
