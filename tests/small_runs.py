"""Small data sets and saved networks for tests of whole runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import torch

from kd_trainer.models.modeling import SmpForSemanticSegmentation

ENCODER = "mobilenet_v2"
SIDE = 64
DECODER = ("16", "8", "8", "8", "8")


def write_pairs(root: Path, *, num_labels: int = 2, train: int = 8, validation: int = 5) -> Path:
    """Coloured rectangles on noise; masks are 0/255 of a binary task, else class ids."""
    for split, count in (("train", train), ("validation", validation)):
        draw = np.random.default_rng([num_labels, count])
        for kind in ("images", "masks"):
            (root / split / kind).mkdir(parents=True)
        for index in range(count):
            image = draw.integers(0, 120, (SIDE, SIDE, 3), dtype=np.uint8)
            mask = np.zeros((SIDE, SIDE), np.uint8)
            for label in range(1, num_labels):
                top, left = draw.integers(0, SIDE // 2, 2)
                area = np.s_[top : top + SIDE // 2, left : left + SIDE // 3]
                mask[area] = label
                image[area][..., label % 3] += 120
            if num_labels == 2:
                mask *= 255
            cv2.imwrite(str(root / split / "images" / f"p {index}.png"), image)
            cv2.imwrite(str(root / split / "masks" / f"p {index}.png"), mask)
    return root


def save_network(folder: Path, *, num_labels: int = 2, seed: int = 7) -> Path:
    """A network of random weights, as a training run saves it."""
    torch.manual_seed(seed)
    network = SmpForSemanticSegmentation.create(
        "unet",
        ENCODER,
        encoder_weights="none",
        id2label={0: "background"} | {i: f"class_{i}" for i in range(1, num_labels)},
        image_size=SIDE,
        decoder_channels=tuple(map(int, DECODER)),
    )
    network.save_pretrained(folder)
    return folder


def train_flags(
    dataset: Path | str, output: Path, *more: str, teacher: Path | str = "none"
) -> list[str]:
    """The command line of a run of seconds."""
    flags = {
        "dataset": str(dataset),
        "output_dir": str(output),
        "teacher": str(teacher),
        "student_encoder": ENCODER,
        "encoder_weights": "none",
        "image_size": str(SIDE),
        "augmentation": "none",
        "epochs": "2",
        "batch_size": "2",
        "unfreeze_start_epoch": "0",
        "unfreeze_every": "0",
        "warmup_epochs": "0",
        "learning_rate": "1e-3",
        "report_to": "none",
        "panel_images": "0",
        "report": "false",
    }
    channels = ["--decoder_channels", *DECODER]
    if "--student" in more:  # which has its network already
        channels = []
        del flags["student_encoder"], flags["encoder_weights"]
    named = [word for name, value in flags.items() for word in (f"--{name}", value)]
    # Teachers of random weights are no better than a constant, which a preflight refuses.
    return [*named, "--use_cpu", "--disable_tqdm", "--no_preflight", *channels, *more]


# All Python of a card, in a process that has never heard of kd_trainer.
_STRANGER = """
import json, re, sys
import numpy as np

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "kd_trainer":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Blocked())
folder, repo, *wanted = sys.argv[1:]
card = open(folder + "/README.md", encoding="utf-8").read()
names = {}
for block in re.findall(r"^```python\\n(.*?)^```", card, re.MULTILINE | re.DOTALL):
    exec(block.replace(json.dumps(repo), json.dumps(folder)), names)
np.savez("found.npz", **{name: np.asarray(names[name]) for name in wanted})
"""


def run_card(folder: Path, repo_id: str, work: Path, *wanted: str) -> dict[str, np.ndarray]:
    """What the code of the card in a folder of push.py leaves in these names, run in `work`."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "PYTHON"))}
    done = subprocess.run(
        [sys.executable, "-I", "-c", _STRANGER, str(folder), repo_id, *wanted],
        cwd=work,
        env=clean | {"HF_HOME": str(work / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return dict(np.load(work / "found.npz"))
