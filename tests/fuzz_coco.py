"""Feeds mutated COCO annotations to the loader; see `fuzzing` for the arguments and the output."""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from fuzzing import DEEP, mutated, run
from pycocotools import mask as coco_mask

from kd_trainer.data import load_splits, mask_rule
from kd_trainer.data.mask_files import decode_mask
from kd_trainer.data_arguments import DataArguments

SOUND = 8  # different sound files
SIDE = (24, 32)
# As JSON text, because Python would not write some of them.
VALUES = (
    *("null", "true", "false", "0", "-1", "1", "2", "7", "0.5", "-0.0", "1e999", "-1e999", "NaN"),
    *("9" * 30, "9" * 5000, "1e300", "89478485", "2147483648", "4294967296", "50000", '""'),
    *('"1"', '"text"', '"../a.png"', '"/etc/passwd"', '"\\ud800"', '"\\u0000"', '"\\u001b[2J"'),
    *('"' + "x" * 5000 + '"', "[]", "{}", "[1]", "[[]]", "[[[1, 2], [3, 4], [5, 6]]]", DEEP),
    *("[0, 768]", "[768]", "[0, -1, 769]", "[[1, 2, 3, 4, 5, 6, 7]]", "[[1e9, 0, 1, 1, 9, 9]]"),
    *('{"size": [24, 32], "counts": "0"}', '{"size": [24, 32], "counts": [1e999]}', '{"a": 1}'),
    *('{"size": [24, 32], "counts": [0, 4294967296, -4294966528]}', '"P_1000000000000000"'),
)


def sound(number: int) -> dict[str, Any]:
    """Two images with polygons, runs and crowds."""
    draw = np.random.default_rng(number)
    blob = np.zeros(SIDE, np.uint8)
    blob[5:15, 8:20] = 1
    rle = coco_mask.encode(np.asfortranarray(blob))
    flat = blob.T.ravel()
    edges = [0, *np.flatnonzero(np.diff(flat)) + 1, flat.size]
    polygon = [round(float(v), 2) for v in draw.uniform(0, 24, 8)]
    shapes = [
        [polygon],
        {"size": list(SIDE), "counts": np.diff(edges).tolist()},
        {"size": list(SIDE), "counts": rle["counts"].decode()},
        [polygon, [1, 1, 9, 1, 9, 9]],
    ]
    images = [{"id": i, "file_name": f"{i}.png", "height": 24, "width": 32} for i in range(2)]
    annotations = [
        {"id": i, "image_id": i % 2, "category_id": 1 + (i + number) % 2, "area": 10 * i}
        | {"segmentation": shape, "iscrowd": int(i == number % 8), "bbox": [1, 1, 8, 8]}
        for i, shape in enumerate(shapes)
    ]
    categories = [{"id": 1, "name": "person"}, {"id": 2, "name": "dog"}]
    return {"images": images, "annotations": annotations, "categories": categories}


def make_folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="fuzz-coco-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    (folder / "annotations").mkdir()
    for split in ("train", "validation"):
        (folder / split).mkdir()
        for i in range(2):
            cv2.imwrite(str(folder / split / f"{i}.png"), np.zeros((*SIDE, 3), np.uint8))
    return folder


def outcome(number: int) -> str:
    """`sample`, `error`, or what should not be; a negative number is a file that nobody changed."""
    draw = np.random.default_rng([11, abs(number)])
    content = sound(abs(number) % SOUND)
    text = json.dumps(content).encode() if number < 0 else mutated(content, VALUES, draw)
    (FOLDER / "annotations" / "train.json").write_bytes(text)
    one = {"category": "person"} if number % 2 else {"num_labels": 3}
    data = DataArguments(dataset=str(FOLDER), streaming=True, **one)
    try:
        splits = load_splits(data, ["train"])
        rule = mask_rule(splits, data, every_class=False)
        rows = list(splits["train"])
        labels = [rule.labels(decode_mask(row["mask"], 0), "mask") for row in rows]
    except (ValueError, FileNotFoundError) as error:
        text = str(error)
        ours = text.startswith("Expected") and str(FOLDER) in text and "\n" not in text
        return "error" if ours and len(text) < 1500 else f"another message: {text[:500]!r}"
    except Exception as error:
        return f"another exception: {error!r}"[:500]
    inside = all(Path(row["image"]["path"]).parent == FOLDER / "train" for row in rows)
    drawn = all(set(np.unique(mask)) <= {0, 1, 2, 255} for mask in labels)
    return "sample" if inside and drawn and rows else "a sample of another kind"


FOLDER = make_folder()

if __name__ == "__main__":
    run(outcome)
