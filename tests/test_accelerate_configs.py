import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.utils import DistributedType

FOLDER = Path(__file__).resolve().parents[1] / "accelerate_configs"
NAMES = ("cpu", "single_gpu", "multi_gpu", "multi_node", "fsdp2")
WITH_GPUS = NAMES[1:]


def load(name):
    return load_config_from_file(str(FOLDER / f"{name}.yaml"))


def test_the_folder_holds_these_files_and_no_other():
    """A file that no test reads would rot unnoticed."""
    assert sorted(file.stem for file in FOLDER.glob("*")) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_accelerate_reads_the_file(name):
    """Unknown keys are refused by accelerate, which the user would find out at the launch."""
    config = load(name)
    assert isinstance(config, ClusterConfig)
    assert config.num_machines == (2 if name == "multi_node" else 1)
    assert config.mixed_precision in ("no", "bf16")


@pytest.mark.parametrize("name", NAMES)
def test_each_line_says_what_it_does(name):
    """The files are read by people who have never seen accelerate."""
    lines = (FOLDER / f"{name}.yaml").read_text().splitlines()
    assert f"--config_file accelerate_configs/{name}.yaml" in lines[0]
    assert [line for line in lines if not re.search(r"# \w.{8,}", line)] == []


@pytest.mark.parametrize("name", WITH_GPUS)
def test_what_never_ran_on_gpus_says_so(name):
    """Whoever pays for several GPUs should know that nobody tried it on them before."""
    assert "not yet run on GPUs" in (FOLDER / f"{name}.yaml").read_text().splitlines()[0]


@pytest.mark.parametrize("name", NAMES)
def test_words_are_not_read_as_truth_values(name):
    """YAML reads a bare no as False: accelerate would get a precision that does not exist."""
    values = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    for key in ("distributed_type", "mixed_precision"):
        assert isinstance(values[key], str)


def test_only_files_for_several_gpus_start_several_processes():
    """A MULTI_CPU file would start one process and say nothing."""
    kinds = {name: load(name).distributed_type for name in NAMES}
    assert kinds == {
        "cpu": DistributedType.NO,
        "single_gpu": DistributedType.NO,
        "multi_gpu": DistributedType.MULTI_GPU,
        "multi_node": DistributedType.MULTI_GPU,
        "fsdp2": DistributedType.FSDP,
    }
    assert [load(name).num_processes for name in NAMES] == [1, 1, 2, 16, 2]
    assert load("fsdp2").fsdp_config["fsdp_version"] == 2
    assert load("cpu").use_cpu


@pytest.mark.distributed
@pytest.mark.parametrize(("name", "world"), [("cpu", 1), ("multi_gpu", 2)])
def test_a_launch_starts_the_processes_it_names(tmp_path, name, world):
    """A launch that quietly starts one process trains, only half as fast."""
    script = tmp_path / "count.py"
    script.write_text(
        "from accelerate import PartialState\n"
        "state = PartialState(cpu=True)\n"  # what the Trainer does for --use_cpu true
        "state.wait_for_everyone()\n"
        "print(f'{state.process_index} of {state.num_processes}')\n"
    )
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]
    command = [*launch, "--config_file", str(FOLDER / f"{name}.yaml"), str(script)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    expected = [f"{rank} of {world}" for rank in range(world)]
    # Not by lines: two processes may write theirs before either ends its own.
    assert sorted(re.findall(r"\d of \d", done.stdout)) == expected
