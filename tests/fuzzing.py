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
from collections.abc import Callable

import cv2

SECONDS = 20  # that one case may take
MEMORY = 3 * 2**30  # that the process may take beyond what it has when it starts


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
