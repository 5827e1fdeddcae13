"""Two processes over gloo: staged unfreezing keeps the ranks together."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


@pytest.mark.distributed
def test_two_ranks_have_the_same_weights_while_units_are_freed(tmp_path: Path):
    """A unit that is frozen before the DDP wrap is never reduced: the ranks drift apart silently.

    The number of processes is asserted, because some ways to launch two start one.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["--standalone", str(TESTS / "workers" / "staged_ddp.py"), str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [json.loads((tmp_path / f"rank_{rank}.json").read_text()) for rank in (0, 1)]
    assert [rank["world"] for rank in ranks] == [2, 2]
    assert [rank["free"] for rank in ranks] == [[0, 1, 2]] * 2
    assert ranks[0]["digests"] == ranks[1]["digests"]
    assert len(set(ranks[0]["digests"])) == 3
