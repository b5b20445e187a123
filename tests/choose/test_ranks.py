"""`tune(group=...)` on real ranks: all that are left come back, with the decision of the first, or eager.

The faults are real; see `tests/helpers/rank.py`.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from compiled_logprobs.decision import Decision
from compiled_logprobs.store.files import Store

pytestmark = pytest.mark.slow
SCENARIOS = ["agree", "first_fails", "other_problems", "first_is_late", "another_is_killed", "first_is_killed"]
COUNT, LIMIT_S = 3, 220


@pytest.fixture(scope="module")
def told(tmp_path_factory) -> dict[str, list[dict | None]]:
    """By scenario, what each rank wrote; None where it did not get there."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = {
        **os.environ,
        "COMPILED_LOGPROBS_MODE": "tune",
        "COMPILED_LOGPROBS_PROFILES": str(folder / "store"),
        "OMP_NUM_THREADS": "1",
        "TMPDIR": str(folder),  # where the lock of the device is: other tests may run on this machine
        "WORLD_SIZE": str(COUNT),
        "METHOD": f"file://{folder / 'meeting'}",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    command = [sys.executable, "-m", "tests.helpers.rank", str(folder), *SCENARIOS]
    processes = []
    for rank in range(COUNT):
        with (folder / f"errors of rank {rank}").open("w") as errors:
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
    assert (folder / "agree of rank 0").exists(), (folder / "errors of rank 0").read_text()[-5000:]
    results: dict[str, list[dict | None]] = {"folder": [{"path": str(folder)}]}
    for name in SCENARIOS:
        files = [folder / f"{name} of rank {rank}" for rank in range(COUNT)]
        results[name] = [json.loads(file.read_text()) if file.exists() else None for file in files]
    return results


def assert_baseline(ranks: list[dict | None], reason: str) -> None:
    """All of them hold it, and say why."""
    for rank in ranks:
        assert rank is not None and "error" not in rank, ranks
        (decision,) = map(json.loads, rank["decisions"])
        assert (decision["chosen"], decision["code"]) == ("eager", "RANKS_DIFFER")
        assert (rank["backend"], rank["source"]) == ("eager", "ranks")
        assert any(reason in text for text in rank["warned"]), rank["warned"]


def test_all_ranks_hold_what_the_first_measured_and_stored(told):
    first, *others = told["agree"]
    assert first is not None and "error" not in first, first
    decision = Decision.from_json(first["decisions"][0].encode())
    assert decision.rounds > 0 and set(decision.candidates) == {"eager", "right"}
    for rank in (first, *others):
        assert rank["decisions"] == first["decisions"] and not rank["warned"]
        assert (rank["backend"], rank["source"]) == (decision.chosen, "ranks")
    assert decision in [stored for _, stored in Store(Path(told["folder"][0]["path"]) / "store").decisions()]


def test_where_the_first_rank_fails_all_hold_eager(told):
    assert_baseline(told["first_fails"], "rank 0: OSError: the disk is gone")


def test_a_rank_that_asks_for_other_problems_is_refused(told):
    first, other, third = told["other_problems"]
    assert other["error"].startswith("InputError: got the problems cpu-n1024-v1035-float32-masked")
    assert first["backend"] == third["backend"] == "right"


def test_where_the_first_rank_is_late_all_hold_eager(told):
    assert_baseline(told["first_is_late"], "waited for 2 s")


def test_a_rank_that_is_killed_keeps_nobody(told):
    first, second, third = told["another_is_killed"]
    assert third is None and first["backend"] == second["backend"] == "right"


def test_where_the_first_rank_is_killed_all_that_are_left_hold_eager(told):
    first, second, third = told["first_is_killed"]
    assert first is None and third is None
    assert_baseline([second], "rank 1 waited for 2 s")
