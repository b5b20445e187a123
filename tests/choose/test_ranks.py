"""`tune(group=...)` on real ranks: all that are left come back, with the decision of the first, or eager.

The faults are real; see `tests/helpers/rank.py`. `test_group.py` has those that need no processes.
"""

import json
import os
import subprocess
import sys

import pytest

from compiled_logprobs.decision import Decision
from compiled_logprobs.store.files import Store

pytestmark = pytest.mark.slow


def test_all_ranks_that_are_left_hold_what_the_first_measured_or_eager(tmp_path):
    environment = {
        **os.environ,
        "COMPILED_LOGPROBS_MODE": "tune",
        "COMPILED_LOGPROBS_PROFILES": str(tmp_path / "store"),
        "OMP_NUM_THREADS": "1",
        "TMPDIR": str(tmp_path),  # where the lock of the device is: other tests may run on this machine
        "WORLD_SIZE": "3",
        "METHOD": f"file://{tmp_path / 'meeting'}",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    command = [sys.executable, "-m", "tests.helpers.rank"]
    processes = [
        subprocess.Popen(command, env={**environment, "RANK": str(rank)}, stdout=-1, stderr=-1, text=True)
        for rank in range(3)
    ]
    try:
        printed, errors = zip(*(process.communicate(timeout=220) for process in processes), strict=True)
    except subprocess.TimeoutExpired:
        pytest.fail("a rank hangs")
    finally:
        for process in processes:
            process.kill()
            process.wait()
    # Gloo prints there, too, in torch 2.8.
    results = [[json.loads(line) for line in text.splitlines() if line.startswith("{")] for text in printed]
    assert list(map(len, results)) == [2, 3, 1], errors  # until it was killed

    first, *others = [of_rank[0] for of_rank in results]
    decision = Decision.from_json(first["decisions"][0].encode())
    assert decision.rounds > 0 and set(decision.candidates) == {"eager", "right"} and not first["warnings"]
    assert first["serves"] == [decision.chosen, "ranks"] and others == [first, first]
    assert decision in [stored for _, stored in Store(tmp_path / "store").decisions()]

    assert results[0][1]["serves"] == results[1][1]["serves"] == ["right", "ranks"]  # though the third was killed

    left = results[1][2]  # when the first was killed, too
    assert left["serves"] == ["eager", "ranks"] and left["decisions"] == []
    assert "rank 1 waited for 2 s" in left["warnings"][0]
