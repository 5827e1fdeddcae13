"""Recipes and flags: which setting wins, which mistakes are caught, what is written down."""

import dataclasses
import re
import shlex
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.commands.launch import launch_command_parser
from accelerate.utils.launch import prepare_simple_launcher_cmd_env

from kd_trainer.argument_checks import LAUNCHER
from kd_trainer.arguments import DistillationArguments
from kd_trainer.checkpointing.fingerprint import settings_of
from kd_trainer.commands.evaluate import EvaluateArguments, evaluate_main
from kd_trainer.commands.export import export_main
from kd_trainer.commands.main import COMMANDS, main
from kd_trainer.config import (
    ALIASES,
    DEFAULT_RECIPE,
    OWN_FIELDS,
    build,
    load_recipe,
    parse,
    parser,
    recipe_names,
)
from kd_trainer.data.listing import did_you_mean
from kd_trainer.data_arguments import DataArguments
from kd_trainer.export.exporter import ExportArguments
from kd_trainer.fields import closest
from kd_trainer.foreign_flags import ABSENT, RENAMED
from kd_trainer.model_arguments import ModelArguments
from kd_trainer.models.config_checks import nearest_hint
from kd_trainer.parsing import CONSOLE, Parser

PIECEWISE = ["--temperature_schedule", "piecewise", "--temperature_points", "0:3", "49:1"]
LIGHT = "rgb_hierarchical_unet_v2_distillation_b0_light_from_b3_temp_prog"
TIMELINE = "rgb_hierarchical_unet_v2_distillation_b0_from_b3_timeline"


def written(folder: Path, text: str, name: str = "mine.yaml") -> str:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_recipe_by_name_sets_what_the_recipe_says():
    """A recipe that is read but not used trains with the defaults and nobody notices."""
    run = parse(["--config", TIMELINE, "--dataset", "photos"])
    assert run.training.temperature_schedule == "piecewise"
    assert run.training.temperature(22 / 49) == pytest.approx(1.6)
    assert run.training.output_dir == f"runs/{TIMELINE}"
    assert parse([]).training.output_dir == f"runs/{DEFAULT_RECIPE}"


def test_recipe_by_path_sets_what_the_file_says(tmp_path: Path):
    """Short names work in a file as on the command line, and numbers like 1e-4 are numbers."""
    path = written(tmp_path, "epochs: 3\nlearning_rate: 1e-4\nclass_names: [sky, bird]\n")
    run = parse(["--config", path])
    assert run.training.num_train_epochs == 3
    assert run.training.learning_rate == 1e-4
    assert run.data.id2label == {0: "sky", 1: "bird"}
    assert run.training.output_dir == "runs/mine"


def test_a_bare_no_in_yaml_is_the_word(tmp_path: Path):
    """YAML reads it as false, and these fields know only words."""
    path = written(tmp_path, "eval_strategy: no\nsave_strategy: no\nmixed_precision: no\n")
    run = parse(["--config", path]).training
    assert (run.eval_strategy, run.save_strategy, run.mixed_precision) == ("no", "no", "no")


def test_default_of_every_field_is_that_of_the_recipe():
    """The recipe's figures stand in two places; they must not drift apart."""
    recipe = build(load_recipe(DEFAULT_RECIPE)).resolved()
    assert recipe == build({}).resolved()


@pytest.mark.parametrize("name", [*recipe_names()])
def test_every_shipped_recipe_parses(name: str):
    """A recipe with a misspelt or removed field would fail only at its first user."""
    assert parse(["--config", name, "--dataset", "x"]).data.dataset == "x"


def test_light_recipe_differs_in_the_decoder_alone():
    """It is a copy, and a comparison with the recipe would measure what has drifted apart too."""
    given = load_recipe(LIGHT)
    assert given.pop("decoder_channels") == [64, 48, 32, 16, 8]
    assert given == load_recipe(DEFAULT_RECIPE)


def test_flags_override_the_recipe(tmp_path: Path):
    """The other way round a flag would be silently without effect."""
    path = written(tmp_path, "kl_weight: 0.7\nimage_size: 64\naugmentation: light\n")
    run = parse(["--config", path, "--kl_weight", "0", "--image_size=96"])
    assert run.training.kl_weight == 0
    assert run.data.image_size == 96
    assert run.data.augmentation == "light"


def test_short_names_and_later_flags():
    """`--epochs` and `--num_train_epochs` are one field: the last one given counts."""
    run = parse(["--epochs", "7", "--batch_size", "3", "--eval_batch_size", "5"])
    assert run.training.num_train_epochs == 7
    assert run.training.per_device_train_batch_size == 3
    assert run.training.per_device_eval_batch_size == 5
    assert parse(["--epochs", "7", "--num_train_epochs", "9"]).training.num_train_epochs == 9


def test_flags_are_converted_to_the_types_of_their_fields():
    """Text that stays text (`"false"` is true, `"64"` is no size) fails far from its cause."""
    run = parse(
        shlex.split(
            "--teacher_mean 0.5 0.5 0.5 --teacher_std 0.2,0.2,0.2 --mask_values 0 255 --streaming "
            "--load_best_model_at_end false --max_train_samples null --pos_weight 2 "
            "--class_names background tree --temperature_schedule piecewise "
            "--temperature_points 0:4 49:1 --gradient_accumulation_steps 2"
        )
    )
    assert run.model.teacher_mean == [0.5, 0.5, 0.5]
    assert run.model.teacher_std == [0.2, 0.2, 0.2]
    assert run.data.mask_values == [0, 255]
    assert run.data.streaming is True
    assert run.data.max_train_samples is None
    assert run.data.class_names == ["background", "tree"]
    assert run.training.load_best_model_at_end is False
    assert run.training.pos_weight == 2.0
    assert run.training.temperature_points == ["0:4", "49:1"]
    assert run.training.gradient_accumulation_steps == 2


def test_flags_with_dashes_and_switches_turned_off():
    """Other trainings on transformers take both; an error would look like a missing flag."""
    run = parse(["--learning-rate", "2e-4", "--no_report", "--no-fold_teacher"]).training
    assert (run.learning_rate, run.report, run.fold_teacher) == (2e-4, False, False)


@pytest.mark.parametrize(
    ("arguments", "precision"),
    [
        (["--mixed_precision", "--use_cpu"], "bf16"),
        (["--mixed_precision", "no", "--use_cpu"], "no"),
        (["--use_cpu"], "no"),
    ],
)
def test_mixed_precision_without_a_value_is_bf16_on_a_cpu(arguments: list[str], precision: str):
    """fp16 on a CPU would silently be fp32."""
    args = parse(arguments).training
    assert args.mixed_precision == precision
    assert args.bf16 == (precision == "bf16")
    assert not args.fp16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epoch", "3"], r"got --epoch\. Did you mean --epochs\?"),
        (["--lr", "1e-3"], r"got --lr\. It is called --learning_rate here\.$"),
        (["--weight-dcay", "1"], r"got --weight-dcay\. Did you mean --weight_decay\?$"),
        (["--num-classes", "3"], r"got --num-classes\. It is called --num_labels here\.$"),
        (["-j", "3"], r"got -j\. It is called --dataloader_num_workers here\.$"),
        (["--early_stopping_patience", "3"], r"patience\. A run is not stopped early.*--epochs\.$"),
        (["--opset", "17"], r"got --opset\. It is a flag of scripts/export\.py"),
        (["--frobnicate"], r"got --frobnicate\.$"),
        (["--do_train"], r"^Expected no --do_train, got True: scripts/train\.py always trains"),
        (["--do_train", "false"], r"^Expected no --do_train: scripts/train\.py always trains"),
        (["--freeze_encoder"], r"got --freeze_encoder\. An encoder that stays frozen has --unfr"),
        (["--do_eval"], r"^Expected no --do_eval: --eval_strategy says when"),
        (["--do_predict"], r"^Expected no --do_predict, got True: .*scripts/predict\.py"),
        (["--kl_wieght=0.1"], r"got --kl_wieght\. Did you mean --kl_weight\?"),
        (["stray"], r"got 'stray' behind none"),
        (["--epochs"], r"Expected a command line .*expected one argument"),
        (["--epochs", "many"], r"Expected --num_train_epochs to be .*number, got 'many'"),
        (["--image_size", "33.5"], r"Expected --image_size to be .*whole number, got '33\.5'"),
        (["--streaming", "perhaps"], r"Expected --streaming to be true or false"),
        (["--image_size", "16"], r"Expected --image_size of at least 32, got 16"),
        (
            ["--augmentation", "some"],
            r"Expected --augmentation to be one of heavy, seed, light, none",
        ),
        (["--num_labels", "1"], r"Expected --num_labels of at least 2"),
        (["--num_labels", "3", "--class_names", "a", "b"], r"Expected 3 --class_names"),
        (["--teacher_mean", "0", "0", "0"], r"Expected --teacher_mean and --teacher_std together"),
        (["--mixed_precision", "fp16", "--use_cpu"], r"Expected --mixed_precision bf16 or no"),
        (["--mixed_precision", "fp8"], r"Expected --mixed_precision to be one of"),
        (["--warmup_steps", "10"], r"Expected a warm-up as --warmup_epochs"),
        (["--min_learning_rate", "1"], r"Expected --min_learning_rate of at most"),
        (["--temperature_schedule", "sine"], r"^Expected .*cosine, linear, exponential"),
        (["--kl_weight", "-1"], r"^Expected "),
        (["--temperature_points", "0-4"], r"^Expected "),
        (["--eval_strategy", "sometimes"], r"^Expected .*eval_strategy"),
        (["--batch_size", "0"], r"^Expected --per_device_train_batch_size of at least 1"),
        (["--epochs", "0"], r"^Expected --epochs"),
        (["--report_to", "nowhere"], r"^Expected --report_to .*got nowhere"),
        (["--eval_strategy", "steps"], r"^Expected --save_strategy and --eval_strategy"),
        (["--bf16", "--fp16"], r"^Expected one precision, got --bf16 and --fp16\. Leave one out"),
        (
            ["--bf16", "--mixed_precision", "no"],
            r"^Expected one precision.* no\.",
        ),
        (["--sync_batchnorm", "--use_cpu"], r"several GPUs with --sync_batchnorm, got the CPU"),
        (["--optim", "bogus"], r"^Expected settings that transformers accepts, got: "),
        (["--teacher_image_size", "0"], r"^Expected --teacher_image_size of at least 32, got 0"),
        (["--decoder_channels", "8", "-1"], r"^Expected --decoder_channels of at least 1, got -1"),
        (["--class_names", "person", "person"], r"^Expected one distinct name .*person, person"),
        (
            ["--num_labels", "3", "--class_names", "a", "foreground", "b"],
            r"^Expected one distinct name .*none of them `foreground`",
        ),
        (["--learning_rate", "0", "--min_learning_rate", "0"], r"^Expected --learning_rate above"),
        (["--weight_decay", "-0.1"], r"^Expected --weight_decay of at least 0, got -0\.1"),
        (["--max_grad_norm", "-1"], r"^Expected --max_grad_norm of at least 0, got -1"),
        (["--adam_beta1", "1"], r"^Expected --adam_beta1 below 1, got 1"),
        (["--gradient_checkpointing"], r"^Expected no --gradient_checkpointing, .*--batch_size"),
        (["--batch_eval_metrics"], r"^Expected no --batch_eval_metrics"),
        (
            ["--eval_do_concat_batches", "false"],
            r"^Expected no --eval_do_concat_b.*got False",
        ),
        (["--fsdp", "full_shard"], r"^Expected no --fsdp, got .*full_shard.*: .*multi_gpu\.yaml"),
        (["--use_liger_kernel"], r"^Expected no --use_liger_kernel"),
        (["--label_smoothing_factor", "0.1"], r"^Expected no --label_smoothing_factor, got 0\.1"),
        (["--resume_from_checkpoint", "x"], r"^Expected no --resume_from_checkpoint.*Use --resume"),
        (["--dataloader_persistent_workers"], r"^Expected --dataloader_num_workers above 0"),
        (["--train_sampling_strategy", "group_by_length"], r"^Expected --train_sampling_strategy"),
        (
            ["--config", TIMELINE, "--temperature_schedule", "cosine"],
            r"^Expected no points for the cosine .*--temperature_points null",
        ),
        (["--config", TIMELINE, "--temperature_start", "3"], r"^Expected --temperature_start 4 as"),
        (["--config", TIMELINE, "--temperature_end", "2"], r"^Expected --temperature_end 1 as"),
        ([*PIECEWISE, "--temperature_start", "4"], r"^Expected --temperature_start 3 as .*, got 4"),
        (["--hub_strategy", "never"], r"^Expected --hub_strategy to be one of end, every_save"),
    ],
)
def test_wrong_flags_are_errors_of_one_kind(arguments: list[str], message: str):
    """A flag that is dropped, or a value that is clipped, trains something else than was asked."""
    with pytest.raises((ValueError, TypeError), match=message):
        parse(arguments)


def test_a_script_without_a_foreign_flag_says_why(tmp_path: Path):
    """The nearest name would be another thing altogether."""
    with pytest.raises(ValueError, match=r"got --image_size\. The size is the student's own"):
        export_main([str(tmp_path), "--image_size", "64"])
    with pytest.raises(ValueError, match=r"got --opset_version\. It is called --opset here"):
        export_main([str(tmp_path), "--opset_version", "17"])
    with pytest.raises(ValueError, match=r"got --num_workers\. It is called --workers here"):
        evaluate_main([str(tmp_path), "--num_workers", "2"])


def test_foreign_flags_lead_to_flags_that_exist():
    """A table of names outlives the flags that it points to."""
    known = {option for action in parser()._actions for option in action.option_strings}
    others = {
        f.name for cls in (ExportArguments, EvaluateArguments) for f in dataclasses.fields(cls)
    }
    for ours, theirs in RENAMED.items():
        assert f"--{ours}" in known or ours in others, ours
        assert not known & {f"--{name}" for name in theirs.split()}, ours
    for theirs, told in ABSENT.items():
        assert not set(theirs.split()) & (others - {"opset"}), theirs
        assert told.endswith("."), theirs
        assert all(flag in known for flag in re.findall(r"--\w+", told)), theirs


@pytest.mark.parametrize(
    ("name", "known"),
    [("--lr", ["--help"]), ("train", ["gtFine", "leftImg8bit"]), ("--opset", ["--output_dir"])],
)
def test_a_distant_name_is_no_hint(name: str, known: list[str]):
    """A hint that cannot be meant sends the reader the wrong way."""
    assert closest(name, known) == ""
    assert did_you_mean(name, known) == ""
    assert "Did you mean" not in nearest_hint(name, known)


def test_null_takes_back_the_list_of_a_recipe():
    """Without it no flag could turn a recipe with points into one of another schedule."""
    flags = ["--temperature_schedule", "cosine", "--temperature_points", "null"]
    run = parse(["--config", TIMELINE, *flags])
    assert run.training.temperature_points is None
    assert run.training.temperature(1.0) == 1.0


def test_points_say_where_a_piecewise_schedule_starts_and_ends():
    """The recipe's own start of 4 is no contradiction to points that are given as flags."""
    for flags in (PIECEWISE, [*PIECEWISE, "--temperature_start", "3", "--temperature_end", "1"]):
        assert parse(flags).training.temperature(0.0) == 3.0


def test_deepspeed_of_the_launcher_is_refused_like_the_flag(monkeypatch: pytest.MonkeyPatch):
    """It would ignore every unit that is frozen at the start, and the loss would still fall."""
    with pytest.raises(ValueError, match="got DeepSpeed, which ignores"):
        parse(["--deepspeed", "config.json"])
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ValueError, match="got DeepSpeed, which ignores"):
        parse([])


@pytest.mark.parametrize(
    "flags", [("--ddp_static_graph", "true"), ("--ddp_find_unused_parameters", "false")]
)
def test_ddp_that_counts_on_one_graph_is_refused_while_units_are_freed(flags: tuple[str, str]):
    """DDP would fail at the first freed unit, hours later; with all units free it works."""
    with pytest.raises(ValueError, match="the graph changes when a unit is freed"):
        parse([*flags])
    parse([*flags, "--unfreeze_start_epoch", "0", "--unfreeze_every", "0"])


def test_unknown_recipe_names_the_nearest():
    """A misspelt recipe must not fall back to the default one."""
    with pytest.raises(FileNotFoundError, match=rf"^Expected a recipe .*Did you mean {TIMELINE}\?"):
        parse(["--config", TIMELINE.replace("timeline", "timelime")])
    with pytest.raises(FileNotFoundError, match=r"^Expected a recipe .*got nowhere/mine\.yaml"):
        parse(["--config", "nowhere/mine.yaml"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "kl_wieght: 1",
            r"Expected known fields in mine\.yaml, got 'kl_wieght'. Did you",
        ),
        ("lr: 0.1", r"Expected known fields .*, got 'lr'\. It is called learning_rate here\.$"),
        ("epochs: many", r"Expected --epochs to be .*number, got 'many'"),
        ("epochs:", r"Expected a value for --epochs, got none"),
        ("- 1\n- 2", r"Expected `name: value` lines"),
        ("a: [", r"Expected YAML in "),
        ("", r"Expected `name: value` lines"),
        ("7: 3", r"Expected known fields in mine\.yaml, got 7"),
    ],
)
def test_wrong_recipe_files_say_what_is_wrong(tmp_path: Path, text: str, message: str):
    """An unknown key that is skipped leaves the default in its place."""
    with pytest.raises(ValueError, match=message):
        load_recipe(written(tmp_path, text))


def test_resolved_configuration_loads_again_and_gives_the_same_settings(tmp_path: Path):
    """config.yaml in the output folder is the only record of how a student was made."""
    first = parse(
        shlex.split(
            "--dataset photos --teacher t --epochs 3 --batch_size 2 --mixed_precision bf16 "
            "--mask_values 0 255 --class_names background 'street person' --output_dir out "
            "--eval_strategy no --eval_steps 7 --seed 5 "
            "--lr_scheduler_type polynomial --lr_scheduler_kwargs '{\"power\": 0.9}' "
            "--temperature_schedule piecewise --temperature_points 0:4 2:1 --use_cpu "
            "--report_to none"
        )
    )
    path = written(tmp_path, yaml.safe_dump(first.resolved(), sort_keys=False))
    second = parse(["--config", path])
    assert second.resolved() == first.resolved()
    assert second.model == first.model
    assert second.data == first.data
    for field in dataclasses.fields(DistillationArguments):
        if field.init and field.name not in ("logging_dir", "run_name"):
            left, right = (getattr(run.training, field.name) for run in (first, second))
            assert str(left) == str(right), field.name


@pytest.mark.parametrize("way", ["--bf16", "--mixed_precision", "accelerate"])
def test_precision_is_written_down_however_it_was_given(way: str, tmp_path: Path, monkeypatch):
    """The same configuration then trained in fp32, and was refused on `--resume`."""
    flags = {"--bf16": ["--bf16"], "--mixed_precision": ["--mixed_precision", "bf16"]}.get(way, [])
    with monkeypatch.context() as patch:
        if way == "accelerate":
            patch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
        first = parse(["--use_cpu", *flags])
    path = written(tmp_path, yaml.safe_dump(first.resolved(), sort_keys=False))
    second = parse(["--config", path])
    assert second.training.mixed_precision == "bf16"
    assert settings_of(second.training) == settings_of(first.training)


@pytest.mark.parametrize(
    ("name", "value", "cure"),
    [
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "use --torch_compile_backend"),
        ("ACCELERATE_DYNAMO_MODE", "max-autotune", "use --torch_compile_mode"),
        ("ACCELERATE_DYNAMO_USE_FULLGRAPH", "True", "Leave it out of the accelerate"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "true", "lower --batch_size"),
    ],
)
def test_what_only_the_launcher_says_is_refused(name: str, value: str, cure: str, monkeypatch):
    """A run started without it would be another one, of the same config.yaml."""
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f"^Expected no {name}, got {value}: .*{cure}"):
        parse(["--use_cpu"])


def test_a_launcher_that_asks_for_nothing_is_taken(monkeypatch: pytest.MonkeyPatch):
    """It sets each of the variables to nothing, and none that is not in the table."""
    asked = launch_command_parser().parse_args(["train.py"])
    # What the launcher fills in where no configuration file says otherwise.
    vars(asked).update(use_cpu=True, mixed_precision="no", dynamo_backend="no")
    vars(asked).update(num_machines=1, num_processes=1)
    _, launched = prepare_simple_launcher_cmd_env(asked)
    dynamo = {name for name in launched if name.startswith("ACCELERATE_DYNAMO_")}
    assert dynamo == {name for name in LAUNCHER if name.startswith("ACCELERATE_DYNAMO_")}
    for name in dynamo:
        monkeypatch.setenv(name, launched[name])
    parse(["--use_cpu"])


def test_no_switch_that_changes_a_run_is_missing_in_its_configuration():
    """A setting that counts on resume and is not written down cannot be given again."""
    base = ["--dataset", "photos", "--output_dir", "out", "--use_cpu"]
    switches = [f for f in dataclasses.fields(DistillationArguments) if f.init]
    tried = []
    for field in (f for f in switches if isinstance(f.default, bool)):
        try:
            first = parse([*base, f"--{field.name}", str(not field.default).lower()])
        except ValueError:
            continue  # refused: it changes nothing
        if field.name == "torch_compile":
            continue  # looks for a compiler
        second = build(yaml.safe_load(yaml.safe_dump(first.resolved())))
        assert settings_of(second.training) == settings_of(first.training), field.name
        tried.append(field.name)
    assert len(tried) > 20


@pytest.mark.parametrize("named", ["work/runs/a/config.yaml", "work/runs/a"])
def test_a_run_goes_on_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: str):
    """The paths in its configuration are those of the folder it was started in."""
    (tmp_path / "work/runs/a").mkdir(parents=True)
    (tmp_path / "work/photos").mkdir()
    (tmp_path / "t.pth").touch()  # here, where the same name there is nothing
    text = "dataset: photos\nteacher: t.pth\nunlabelled: gone\noutput_dir: runs/a\n"
    (tmp_path / "work/runs/a/config.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    run = parse(["--config", named, "--resume"])
    assert str(run.output) == "work/runs/a"
    assert Path(run.data.dataset) == tmp_path / "work/photos"
    assert run.model.teacher == "t.pth"
    assert run.data.unlabelled == "gone"
    assert str(parse(["--config", named]).output) == "runs/a"  # a new run, set up in the same way
    assert str(parse(["--config", named, "--resume", "--output_dir", "b"]).output) == "b"
    monkeypatch.chdir(tmp_path / "work")
    again = parse(["--config", "runs/a", "--resume"])
    assert (str(again.output), again.data.dataset) == ("runs/a", "photos")
    monkeypatch.chdir(tmp_path / "work/photos")
    assert parse(["--config", str(tmp_path / named), "--resume"]).output == tmp_path / "work/runs/a"


def test_resolved_configuration_does_not_pin_the_machine(tmp_path: Path):
    """Resolved on a laptop, `use_cpu` would keep the next machine's GPU idle; a seed that was
    derived would stay when another `--seed` is given.
    """
    settings = parse(["--mixed_precision"]).resolved()
    derived = {"use_cpu", "dataloader_pin_memory", "data_seed", "bf16", "fp16", "resume"}
    assert not derived & settings.keys()
    path = written(tmp_path, yaml.safe_dump(settings))
    assert parse(["--config", path, "--seed", "7"]).training.data_seed == 7


def test_no_token_is_taken_or_written_down(tmp_path: Path):
    """Each checkpoint would hold it in clear, and the configuration too."""
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("hub_token: hf_secret\n")
    for arguments in (["--hub_token", "hf_secret"], ["--config", str(recipe)]):
        with pytest.raises(ValueError, match=r"^Expected no --hub_token, got one") as caught:
            parse(arguments)
        assert "hf_secret" not in str(caught.value)
    assert "hub_token" not in yaml.safe_dump(parse([]).resolved())


def test_help_names_every_field_of_ours():
    """A field without a line in --help does not exist for a user."""
    text = parser().format_help()
    ours = {f.name for cls in (ModelArguments, DataArguments) for f in dataclasses.fields(cls)}
    for name in (*ours, *OWN_FIELDS, *ALIASES, "config", "dry_run"):
        assert f"--{name}" in text, name
    for name in recipe_names():
        assert name in text


@pytest.mark.parametrize("columns", ["80", "120"])
def test_help_begins_with_what_most_runs_need(columns: str, monkeypatch: pytest.MonkeyPatch):
    """A newcomer reads one screen, and 100 flags in the order of a class teach nobody."""
    monkeypatch.setenv("COLUMNS", columns)
    text = parser().format_help()
    assert max(map(len, text.splitlines())) <= int(columns)
    assert re.findall(r"^(\w[\w ]+):$", text, re.MULTILINE) == [
        *("what most runs need", "data", "views", "teacher", "student", "loss"),
        *("images without masks",),
        *("temperature and unfreezing", "optimisation", "run and resume", "evaluation and report"),
        *("Hub", "rarely needed"),
    ]
    flags = re.findall(r"^  (--\w+)", text, re.MULTILINE)
    assert flags[:3] == ["--dataset", "--teacher", "--output_dir"]
    assert flags.index("--train_split") <= 16, "the first of the data"
    assert len(flags) == len(set(flags))


def test_every_field_of_ours_has_a_help_text():
    """An empty line in --help explains nothing."""
    for cls in (ModelArguments, DataArguments, DistillationArguments):
        for field in dataclasses.fields(cls):
            if cls is not DistillationArguments or field.name in OWN_FIELDS:
                assert field.metadata.get("help"), field.name


def test_a_home_folder_is_the_same_in_every_flag_and_in_yaml(tmp_path, monkeypatch):
    """A shell leaves `--flag=~/x` and YAML alone: a folder called `~` would be made."""
    monkeypatch.setenv("HOME", str(tmp_path))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("teacher: ~/teacher\nunlabelled: ~/more\nencoder_weights: ~/a.pth\n")
    flags = ["--config=~/recipe.yaml", "--dataset=~/photos", "--output_dir=~/runs", "--resume=~/c"]
    run = parse(flags)
    found = (run.model.teacher, run.data.unlabelled, run.model.encoder_weights, run.data.dataset)
    assert found == tuple(str(tmp_path / name) for name in ("teacher", "more", "a.pth", "photos"))
    assert run.training.output_dir == str(tmp_path / "runs")
    assert run.training.resume == str(tmp_path / "c")


def test_a_home_folder_is_expanded_where_a_script_takes_words(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    words = Parser([], "x", "")
    words.add_argument("model")
    words.add_argument("pictures", nargs="+")
    given = words.given(["~/student", "~/a.jpg", "b~/c", "~"])
    assert given == {
        "model": str(tmp_path / "student"),
        "pictures": [str(tmp_path / "a.jpg"), "b~/c", str(tmp_path)],
    }


@pytest.mark.parametrize("name", COMMANDS)
def test_each_console_command_shows_its_help_by_its_own_name(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """`usage: eval.py` would name a file that an installed package does not have."""
    monkeypatch.setattr(sys, "argv", [CONSOLE, name, "--help"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: {CONSOLE} {name} [")


def test_the_console_command_knows_what_the_scripts_do():
    """A script without its command could be called from a checkout alone."""
    scripts = {path.stem for path in Path("scripts").glob("*.py")}
    assert scripts - set(COMMANDS) == {"benchmark", "frontier"}, "which measure and are not shipped"
    assert set(COMMANDS) <= scripts


def test_a_mistyped_console_command_names_the_nearest(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """The list of all of them hides which one was meant."""
    monkeypatch.setattr(sys, "argv", [CONSOLE, "trian"])
    with pytest.raises(SystemExit, match="1"):
        main()
    assert capsys.readouterr().err.endswith("got 'trian'. Did you mean train?\n")
