"""What every test may rely on: no network look-ups, own caches, few threads, fixed seeds."""

import atexit
import os
import random
import shutil
import tempfile
from pathlib import Path

# Libraries read these when they are imported, so they stand before any other import.
_CACHE = tempfile.mkdtemp(prefix="kd_trainer-tests-")
atexit.register(shutil.rmtree, _CACHE, ignore_errors=True)
os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # its import asks a server for a newer version
os.environ["MPLBACKEND"] = "Agg"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
for _name in ("HF_DATASETS_CACHE", "HF_MODULES_CACHE", "HF_EVALUATE_CACHE", "HF_METRICS_CACHE"):
    os.environ[_name] = str(Path(_CACHE) / _name.lower())
os.environ.setdefault("OMP_NUM_THREADS", "2")

from collections.abc import Iterator  # noqa: E402

import cv2  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from hub_server import Hub, serving  # noqa: E402
from hypothesis import settings  # noqa: E402

from kd_trainer.data.synthetic import synthetic_pair  # noqa: E402

torch.set_num_threads(min(2, int(os.environ["OMP_NUM_THREADS"])))
cv2.setNumThreads(1)
# The same examples on every machine, however busy it is: a failure can be repeated.
settings.register_profile("suite", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("suite")


@pytest.fixture(autouse=True)
def fixed_seeds():
    """Seed the three global generators, so that a test draws the same alone and in the suite."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def pair_folder(tmp_path: Path) -> Path:
    """Folder with 8 training and 4 validation pairs of 64 px: `<split>/{images,masks}`."""
    root = tmp_path / "pairs"
    for split, count in (("train", 8), ("validation", 4)):
        for kind in ("images", "masks"):
            (root / split / kind).mkdir(parents=True)
        for index in range(count):
            image, mask = synthetic_pair(split, index, size=64, seed=0)
            photograph = str(root / split / "images" / f"person{index}.jpg")
            cv2.imwrite(photograph, image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 95])
            cv2.imwrite(str(root / split / "masks" / f"person{index}.png"), mask)
    return root


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    """A Hub on loopback, to which huggingface_hub speaks until the test ends."""
    with serving(tmp_path / "hub_cache") as server:
        yield server
