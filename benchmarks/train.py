"""Training steps in turn: `benchmark.py train` and, of two processes, `benchmark.py processes`.

The plain loop, the student alone and our trainer all train the same networks on the same files.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.profiler import profile, record_function
from transformers import TrainerCallback

from benchmarks.data import draw_pairs, read_folder
from benchmarks.memory import added_mib, in_new_process
from benchmarks.plain_loop import PlainDataset, PlainLoop
from benchmarks.timer import Clock, Turn, figures_table, ratios, take_turns
from kd_trainer.arguments import DistillationArguments, usable_processors
from kd_trainer.build import speed_up
from kd_trainer.costs import reset_peak_memory
from kd_trainer.data import TransformedDataset
from kd_trainer.evaluation import input_statistics
from kd_trainer.fast_layers import usual_memory
from kd_trainer.fields import check_at_least, check_choice, help_field
from kd_trainer.files import replacing_file, write_text
from kd_trainer.models.modeling import SmpForSemanticSegmentation
from kd_trainer.teacher import Teacher
from kd_trainer.teacher_targets import use_cached_targets
from kd_trainer.trainer import DistillationTrainer

CONTENDERS = ("plain", "student", "ours", "cached")
RATIOS = (
    *(("plain", "ours"), ("ours", "student"), ("plain", "cached"), ("cached", "student")),
    ("plain", "student"),
)
_WARM_UP = 1
_LOG_EVERY = 10
_IMAGES = 64

Contender = Callable[[int], Turn]
"""Trains for so many steps after one that warms up, and says how long they took."""


@dataclass
class StepArguments:
    """What a step is measured on; the defaults are those of the published table."""

    image_size: int = help_field(256, "Side of the square images in pixels.")
    batch_size: int = help_field(4, "Images of a step.")
    teacher_encoder: str = help_field("timm-efficientnet-b3", "Encoder of the teacher.")
    student_encoder: str = help_field("timm-efficientnet-b0", "Encoder of the student.")
    free_units: int | None = help_field(
        None, "Encoder units of the student that are trained: 0 is the decoder alone, default all."
    )
    augmentation: str = help_field(
        "heavy", "heavy, seed, light or none; the plain loop has heavy only."
    )
    dataset: str | None = help_field(
        None, "Pair folder to read (<split>/images, <split>/masks); default: drawn for this run."
    )
    train_split: str = help_field("train", "Split of that folder.")
    mixed_precision: str = help_field("bf16", "Of the student alone and of ours: bf16, fp16 or no.")
    workers: int = help_field(0, "Processes that read the data, for each contender.")
    device: str = help_field("auto", "cpu, cuda, or auto: the GPU where there is one.")
    compile: bool = help_field(False, "Compile our students, and the teacher of ours.")
    steps: int = help_field(10, "Measured steps of a turn.")
    pairs: int = help_field(5, "Rounds: how often each has its turn.")
    json: str | None = help_field(None, "File that gets everything that was measured.")

    def __post_init__(self) -> None:
        check_at_least("image_size", self.image_size, 32)
        for name in ("batch_size", "steps", "pairs"):
            check_at_least(name, getattr(self, name), 1)
        check_at_least("workers", self.workers, 0)
        check_choice("device", self.device, ("auto", "cpu", "cuda"))
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("Expected a GPU with --device cuda, got none. Leave --device out.")

    @property
    def torch_device(self) -> torch.device:
        """The device that `device` means here."""
        on_gpu = torch.cuda.is_available() and self.device != "cpu"
        return torch.device("cuda" if on_gpu else "cpu")


@dataclass
class TrainArguments(StepArguments):
    """Settings of `benchmark.py train`."""

    contenders: list[str] = help_field(
        list(CONTENDERS),
        "Who takes part: plain, student, ours, cached (ours with cached targets); all.",
    )
    memory: bool = help_field(True, "Measure the peak memory of each in a process of its own.")
    profile: str | None = help_field(None, "Folder that gets a trace of two steps of ours.")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.contenders:
            check_choice("contenders", name, CONTENDERS)


@dataclass
class ProcessArguments(StepArguments):
    """Settings of `benchmark.py processes`: two share the batch."""

    pairs: int = help_field(3, "How often one and two processes are started in turn.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size % 2:
            raise ValueError(
                f"Expected --batch_size divisible by 2 processes, got {self.batch_size}. Each gets "
                "an equal share of it."
            )


def run_train(args: TrainArguments) -> dict[str, Any]:
    """Medians of each contender, ratios within the rounds, and peak memory."""
    memory: dict[str, dict[str, float]] = {}
    with _pair_folder(args) as folder, TemporaryDirectory() as cache:
        contenders = {
            name: make_contender(name, args, folder, Path(cache)) for name in args.contenders
        }
        variants = {name: partial(_turn, who, args.steps) for name, who in contenders.items()}
        result = summary(take_turns(variants, args.pairs))
        if args.memory:
            for name in contenders:
                mib = in_new_process(_contender_mib, name, args, folder)
                memory[name] = {"training_mib": mib}
        if args.profile is not None and "ours" in contenders:
            _save_trace(contenders["ours"], Path(args.profile))
    steps = {
        name: {**own, "images/s": args.batch_size / own["seconds"], **memory.get(name, {})}
        for name, own in result["median"].items()
    }
    print(f"\nA step:\n\n{figures_table(steps)}")
    print(f"\nRatios within the rounds:\n\n{figures_table(result['ratios'])}")
    return result | {"memory": memory}


def _turn(contender: Contender, steps: int, number: int) -> Turn:
    return contender(steps if number >= 0 else 1)  # allocations and kernels that are made once


def summary(turns: dict[str, list[Turn]]) -> dict[str, Any]:
    """`rounds`, `median`, and `ratios` with the spread of the rounds."""
    keys = ("seconds", "cpu_seconds")
    rounds = {
        name: {key: [getattr(turn, key) for turn in own] for key in keys}
        for name, own in turns.items()
    }
    compared: dict[str, dict[str, float]] = {}
    for above, below in RATIOS:
        if above in turns and below in turns:
            wall, cpu = (ratios(rounds[above][key], rounds[below][key]) for key in keys)
            compared[f"{above} / {below}"] = {
                "seconds": median(wall),
                "lowest": min(wall),
                "highest": max(wall),
                "cpu_seconds": median(cpu),
            }
    medians = {name: {key: median(own[key]) for key in keys} for name, own in rounds.items()}
    return {"rounds": rounds, "median": medians, "ratios": compared}


@contextmanager
def _pair_folder(args: StepArguments) -> Iterator[Path]:
    """The folder of `--dataset`, or a temporary one with drawn images."""
    if args.dataset is not None:
        yield Path(args.dataset)
        return
    with TemporaryDirectory(prefix="kd_trainer-benchmark-") as folder:
        yield draw_pairs(Path(folder), max(_IMAGES, 2 * args.batch_size))


def make_networks(args: StepArguments) -> tuple[SmpForSemanticSegmentation, Teacher]:
    """A student and its teacher of random weights; speed does not depend on them.

    Raises:
        ValueError: if an encoder is unknown, or has fewer units than shall be free.
    """
    torch.manual_seed(0)
    teacher, student = (
        SmpForSemanticSegmentation.create(
            "unet", encoder, encoder_weights="none", image_size=args.image_size
        )
        for encoder in (args.teacher_encoder, args.student_encoder)
    )
    student.set_free_units(args.free_units)
    mean, std = input_statistics(student)
    return student, Teacher(
        teacher, num_labels=2, mean=mean, std=std, input_mean=mean, input_std=std
    )


def make_contender(name: str, args: StepArguments, folder: Path, cache: Path) -> Contender:
    """A contender by its name, with networks of its own.

    Args:
        name: plain, student, ours, or cached, which is ours with the teacher's logits on the disk.
        args: the work.
        folder: the pair folder.
        cache: folder that `cached` fills before its first turn.

    Raises:
        ValueError: if the folder has fewer images than a batch.
    """
    student, teacher = make_networks(args)
    rows, transform = read_folder(
        folder, args.train_split, image_size=args.image_size, augmentation=args.augmentation
    )
    if len(rows) < args.batch_size:
        raise ValueError(
            f"Expected at least {args.batch_size} images for a batch, got {len(rows)} in "
            f"{folder}. Lower --batch_size, or name a larger folder."
        )
    dataset = TransformedDataset(rows, transform)
    if name == "plain":
        return _plain(args, student, teacher.network, rows)
    changed: dict[str, Any] = {"torch_compile": args.compile}
    if name == "ours":
        changed["compile_teacher"] = args.compile
    elif name == "cached":
        changed |= {"teacher_targets": "cached", "teacher_cache": str(cache)}
        with redirect_stdout(io.StringIO()):
            use_cached_targets(trainer_arguments(args, str(cache), **changed), teacher, [dataset])
    taught_by = None if name == "student" else teacher
    return lambda steps: _train(args, student, taught_by, dataset, steps=steps, **changed)


def _plain(args: StepArguments, student: nn.Module, teacher: nn.Module, rows: Any) -> Contender:
    files = [(row["image"]["path"], row["mask"]["path"]) for row in rows]
    loop = PlainLoop(
        student,
        teacher,
        PlainDataset(files, args.image_size),
        batch_size=args.batch_size,
        device=args.torch_device,
        workers=args.workers,
    )

    def turn(steps: int) -> Turn:
        if args.torch_device.type == "cpu":
            usual_memory()  # what our trainer has set for this process is no part of a plain loop
        loop.step()
        clock = Clock(args.torch_device)
        for _ in range(steps):
            loop.step()
        return clock.turn(steps)

    return turn


def trainer_arguments(args: StepArguments, output: str, **changed: Any) -> DistillationArguments:
    """Arguments of a training of ours without evaluation and checkpoints, but with its log."""
    settings: dict[str, Any] = {
        "output_dir": output,
        "per_device_train_batch_size": args.batch_size,
        "mixed_precision": args.mixed_precision,
        "use_cpu": args.torch_device.type == "cpu",
        "dataloader_num_workers": args.workers,
        "num_train_epochs": 1000,
        "unfreeze_start_epoch": 0,
        "unfreeze_every": 0,
        "eval_strategy": "no",
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": min(_LOG_EVERY, changed.get("max_steps", _LOG_EVERY)),
    }
    return DistillationArguments(**(settings | changed))


class _Window(TrainerCallback):
    """Times whole steps with their data and logs, from the warm-up to the log of the last step."""

    clock: Clock
    turn: Turn

    def __init__(self, args: StepArguments, steps: int) -> None:
        self.args, self.steps = args, steps

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Free what is asked for, after the schedule has freed every unit."""
        kwargs["model"].set_free_units(self.args.free_units)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start after the warm-up."""
        if state.global_step == _WARM_UP:
            self.clock = Clock(self.args.torch_device)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop after the last step, and the log that follows it."""
        if state.global_step == _WARM_UP + self.steps:
            self.turn = self.clock.turn(self.steps)


def _train(
    args: StepArguments,
    student: SmpForSemanticSegmentation,
    teacher: Teacher | None,
    dataset: TransformedDataset,
    *,
    steps: int,
    **changed: Any,
) -> Turn:
    """Some steps of `DistillationTrainer.train`, of which the first only warms up."""
    window = _Window(args, steps)
    with TemporaryDirectory() as output, redirect_stdout(io.StringIO()):
        settings = trainer_arguments(args, output, max_steps=_WARM_UP + steps, **changed)
        speed_up(student, settings)
        trainer = DistillationTrainer(
            student,
            settings,
            teacher=teacher,
            train_dataset=dataset,
            callbacks=[window],
        )
        for method in ("_prepare_inputs", "teacher_logits", "compute_loss", "log"):
            # Names these parts in a trace; the profiler names data, backward and optimizer itself.
            setattr(trainer, method, record_function(method)(getattr(trainer, method)))
        trainer.train()
    return window.turn


def _contender_mib(name: str, args: StepArguments, folder: Path) -> float:
    """Peak of two steps, beyond the imported libraries."""

    def use() -> None:
        with TemporaryDirectory() as cache:
            contender = make_contender(name, args, folder, Path(cache))
            reset_peak_memory()  # filling the cache is no training
            contender(2)

    return added_mib(use)


def _save_trace(contender: Contender, folder: Path) -> None:
    """Write a trace of two steps for Perfetto, and the dearest operations."""
    folder.mkdir(parents=True, exist_ok=True)
    with profile() as profiler:
        contender(1)
    with replacing_file(folder / "ours.json") as partial:
        profiler.export_chrome_trace(str(partial))
    table = profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=40)
    write_text(folder / "operations.txt", table)
    print(f"Trace: {folder / 'ours.json'}; dearest operations: {folder / 'operations.txt'}")


def run_processes(args: ProcessArguments) -> dict[str, Any]:
    """Seconds of a step of one and of two processes on the same cores and the same batch.

    Two can win nothing there but must not lose: what they add is the exchange of gradients, the
    search for parameters without one, and everything that is done twice.
    """
    with _pair_folder(args) as folder:
        starts = {str(count): partial(_started, args, folder, count) for count in (1, 2)}
        seconds = take_turns(starts, args.pairs, warm_up=0)
    each = ratios(seconds["1"], seconds["2"])
    spread = {"median": median(each), "lowest": min(each), "highest": max(each)}
    print(f"\nSpeed of two processes, one is 1:\n\n{figures_table({'': spread})}")
    return {"seconds": seconds, "ratio": spread["median"]}


def _started(args: ProcessArguments, folder: Path, count: int, _: int) -> float:
    """Seconds of a step of so many processes, which share the batch and the cores."""
    config = LaunchConfig(
        1, 1, count, run_id="benchmark", rdzv_backend="c10d", start_method="spawn"
    )
    by_rank: dict[int, float] = elastic_launch(config, _share)(args, folder, count)
    return by_rank[0]


def _share(args: ProcessArguments, folder: Path, count: int) -> float:
    torch.set_num_threads(max(1, usable_processors() // count))
    args.batch_size //= count
    return make_contender("ours", args, folder, folder)(args.steps).seconds
