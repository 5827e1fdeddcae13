"""Short runs whose numbers a change of the code's structure must leave alone, bit for bit.

`python tests/golden.py write FILE` before the change, `python tests/golden.py check FILE` after it,
on the same machine: other processors round otherwise. Where a change is meant to alter results, the
changelog says so under "Changes results".
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from small_runs import save_network, train_flags, write_pairs

ROOT = Path(__file__).parents[1]
# Of a log and of results.json: what no clock and no allocator has a part in.
UNSTEADY = ("runtime", "second", "memory", "latency", "ms", "versions", "speed", "rss", "time")
STAGED = ("--unfreeze_start_epoch", "1", "--unfreeze_every", "1", "--epochs", "4")
CACHED = ("--augmentation", "none", "--teacher_targets", "cached", "--teacher_cache", "cache")
RUNS = {
    "without teacher": ("--teacher", "none"),
    "online": (*STAGED, "--gradient_accumulation_steps", "2", "--warmup_epochs", "1"),
    "cached": (*STAGED, *CACHED),
    "streamed": ("--streaming", "--epochs", "2", "--temperature_per", "step"),
}


def numbers(value: Any, name: str = "") -> dict[str, float]:
    """The numbers of nested dictionaries and lists by their dotted names."""
    if isinstance(value, dict):
        items = [(str(key), inner) for key, inner in value.items()]
    elif isinstance(value, list):
        items = [(str(index), inner) for index, inner in enumerate(value)]
    else:
        return {name: value} if isinstance(value, int | float) else {}
    kept = [(k, v) for k, v in items if not any(word in k.lower() for word in UNSTEADY)]
    return {
        key: number
        for part, inner in kept
        for key, number in numbers(inner, f"{name}.{part}".lstrip(".")).items()
    }


def digest(file: Path) -> str:
    """SHA-256 over the tensors of a safetensors file, by name."""
    total = hashlib.sha256()
    for name, tensor in sorted(load_file(file).items()):
        total.update(name.encode() + tensor.contiguous().view(-1).numpy().tobytes())
    return total.hexdigest()


def run(folder: Path, name: str, more: tuple[str, ...], *, classes: int) -> dict[str, Any]:
    """One training through `scripts/train.py`: log, results and digests of its weights."""
    data, out = folder / f"data{classes}", folder / name.replace(" ", "_")
    more = tuple(str(folder / word) if word == "cache" else word for word in more)
    flags = train_flags(data, out, "--augmentation", "heavy", teacher=folder / f"teacher{classes}")
    flags += ["--num_labels", str(classes), "--save_strategy", "epoch", "--save_total_limit", "9"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "scripts" / "train.py"), *flags, *more]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    state = json.loads((out / "trainer_state.json").read_text())
    weights = sorted(out.rglob("model.safetensors"))
    return {
        "log": numbers(state["log_history"]),
        "results": numbers(json.loads((out / "results.json").read_text())),
        "weights": {file.parent.name: digest(file) for file in weights},
    }


def golden() -> dict[str, Any]:
    """All runs, of a binary task and of three classes."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for classes in (2, 3):
            write_pairs(folder / f"data{classes}", num_labels=classes)
            save_network(folder / f"teacher{classes}", num_labels=classes)
        found = {name: run(folder, name, more, classes=2) for name, more in RUNS.items()}
        found["three classes"] = run(folder, "three classes", RUNS["online"], classes=3)
        return found


def main() -> None:
    action, file = sys.argv[1], Path(sys.argv[2])
    found = golden()
    if action == "write":
        file.write_text(json.dumps(found, indent=1))
        return
    before = json.loads(file.read_text())
    for name, parts in before.items():
        for part, values in parts.items():
            now = found[name][part]
            for key in sorted(values.keys() | now.keys()):
                if values.get(key) != now.get(key):
                    print(f"{name}: {part} {key} was {values.get(key)}, is {now.get(key)}")
    same = json.loads(json.dumps(found)) == before
    print("the same, bit for bit" if same else "DIFFERENT")
    sys.exit(not same)


if __name__ == "__main__":
    main()
