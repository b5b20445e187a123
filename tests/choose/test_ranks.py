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
SCENARIOS = ["agree", "another_is_killed", "first_is_killed"]
COUNT, LIMIT_S = 3, 220


def test_all_ranks_that_are_left_hold_what_the_first_measured_or_eager(tmp_path):
    environment = {
        **os.environ,
        "COMPILED_LOGPROBS_MODE": "tune",
        "COMPILED_LOGPROBS_PROFILES": str(tmp_path / "store"),
        "OMP_NUM_THREADS": "1",
        "TMPDIR": str(tmp_path),  # where the lock of the device is: other tests may run on this machine
        "WORLD_SIZE": str(COUNT),
        "METHOD": f"file://{tmp_path / 'meeting'}",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    command = [sys.executable, "-m", "tests.helpers.rank", str(tmp_path), *SCENARIOS]
    processes = []
    for rank in range(COUNT):
        with (tmp_path / f"errors of rank {rank}").open("w") as errors:
            processes.append(subprocess.Popen(command, env={**environment, "RANK": str(rank)}, stderr=errors))
    try:
        for process in processes:
            process.wait(LIMIT_S)
    except subprocess.TimeoutExpired:
        pytest.fail("a rank hangs")
    finally:
        for process in processes:
            process.kill()
            process.wait()

    def results_of(name: str) -> list[dict]:
        """Of the ranks that got there."""
        files = [tmp_path / f"{name} of rank {rank}" for rank in range(COUNT)]
        results = [json.loads(file.read_text()) for file in files if file.exists()]
        assert results, (tmp_path / "errors of rank 0").read_text()[-5000:]
        return results

    first, *others = results_of("agree")
    decision = Decision.from_json(first["decisions"][0].encode())
    assert decision.rounds > 0 and set(decision.candidates) == {"eager", "right"} and not first["warnings"]
    assert first["serves"] == [decision.chosen, "ranks"] and others == [first, first]
    assert decision in [stored for _, stored in Store(tmp_path / "store").decisions()]

    both = results_of("another_is_killed")
    assert len(both) == 2 and all(result["serves"] == ["right", "ranks"] for result in both)

    (left,) = results_of("first_is_killed")
    assert left["serves"] == ["eager", "ranks"] and left["decisions"] == []
    assert "rank 1 waited for 2 s" in left["warnings"][0]
