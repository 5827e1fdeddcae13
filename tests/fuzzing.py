"""Runs mutated cases in a process of its own, which a crash, a hang or a full memory may end.

    python tests/fuzz_X.py FIRST LAST PLACE

Case N is a function of N alone, so `python tests/fuzz_X.py N N+1 place` repeats it. PLACE is a file
that holds the number of the running case. Prints one JSON object: how many cases gave a sample and
how many our error, how many of the sound ones (of negative numbers) gave one, and every other
outcome by case.
"""

from __future__ import annotations

import faulthandler
import json
import os
import resource
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import cv2
import numpy as np

SECONDS = 20  # that one case may take
MEMORY = 3 * 2**30  # that the process may take beyond what it has when it starts
DEEP = "[" * 100_000 + "]" * 100_000  # as JSON text


def places(tree: Any) -> list[tuple[Any, Any]]:
    """(container, key) of everything inside a tree."""
    keys = list(tree) if isinstance(tree, dict) else range(len(tree))
    here = [(tree, key) for key in keys]
    inside = [tree[key] for key in keys if isinstance(tree[key], dict | list)]
    return here + [place for child in inside for place in places(child)]


def mutated(content: dict[str, Any], values: Sequence[str], draw: np.random.Generator) -> bytes:
    """One or two changes of the tree, some to `values`, and of one file in three of its text."""
    put = {}
    for _ in range(int(draw.integers(1, 3))):
        found = places(content)
        if not found:  # the first change took all there was
            break
        container, key = found[int(draw.integers(len(found)))]
        match int(draw.integers(4)):
            case 0:
                del container[key]
            case 1:  # something from elsewhere in the file
                other, there = found[int(draw.integers(len(found)))]
                container[key] = json.loads(json.dumps(other[there]))
            case _:
                mark = f"PUT {len(put)} HERE"
                put[mark] = values[int(draw.integers(len(values)))]
                container[key] = mark
    text = json.dumps(content)
    for mark, value in put.items():
        text = text.replace(f'"{mark}"', value)
    changed = bytearray(text.encode())
    if draw.random() < 0.33:
        place = int(draw.integers(len(changed)))
        match int(draw.integers(3)):
            case 0:
                changed[place] ^= 1 << int(draw.integers(8))
            case 1:
                del changed[place:]
            case _:
                changed[place : place + 8] = draw.bytes(4)
    return bytes(changed)


def run(outcome: Callable[[int], str]) -> None:
    """Try the cases that the command line names; `outcome` says `sample`, `error` or a fault."""
    first, last, place = int(sys.argv[1]), int(sys.argv[2]), os.open(sys.argv[3], os.O_WRONLY)
    warnings.simplefilter("ignore")  # as users run it, PIL's remarks about EXIF are no errors
    cv2.setNumThreads(1)
    size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()  # noqa: PTH123, SIM115
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
    counts = Counter({"sample": 0, "error": 0, "sound": 0})
    faults = {}
    for number in range(first, last):
        os.pwrite(place, f"{number:9d}".encode(), 0)
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        found = outcome(number)
        counts[found if found in ("sample", "error") else "fault"] += 1
        counts["sound"] += number < 0 and found == "sample"
        if found not in ("sample", "error"):
            faults[number] = found
    faulthandler.cancel_dump_traceback_later()
    print(json.dumps(counts | {"faults": faults}))
