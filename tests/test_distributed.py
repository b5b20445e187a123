"""`tune(group=...)`: whatever happens on any rank, all of them come back, with the same decision."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from compiled_logprobs import distributed
from compiled_logprobs.store import user_store

RANK = Path(__file__).with_name("rank.py")


def ranks(what: str, count: int = 2) -> list[dict]:
    process = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}", str(RANK), what],
        env={**os.environ, "COMPILED_LOGPROBS_MODE": "tune", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return [json.loads(line) for line in process.stdout.splitlines() if line.startswith("{")]


def test_all_ranks_hold_what_the_first_measured():
    first, second = ranks("same")
    assert first["seed"] == second["seed"] and first["chosen"] == second["chosen"]
    assert first["source"] == second["source"] == "tuned here"
    assert first["right"] and second["right"]
    ((_, _, record),) = user_store().records()  # stored once, by the first
    assert record["seed"] == first["seed"]


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("other problems", "InputError: got other problems on rank 1 of the group than on its first"),
        ("cannot measure", "LogProbsError: the first rank of the group decided nothing: "),
    ],
)
def test_an_error_reaches_all_ranks(what, said):
    found = ranks(what)
    assert len(found) == 2 and all(one["error"].startswith(said) and one["right"] for one in found)


def test_ranks_that_differ_hold_the_baseline():
    found = ranks("another environment")
    assert {(one["chosen"], one["code"]) for one in found} == {("eager", "RANKS_DIFFER")}
    assert all(one["right"] for one in found)


def test_objects_travel_on_the_device_where_nccl_carries_them(monkeypatch):
    set_devices = []
    monkeypatch.setattr(torch.cuda, "set_device", set_devices.append)
    monkeypatch.setattr(distributed.distributed, "get_backend", lambda group: "nccl")
    monkeypatch.setattr(distributed.distributed, "get_world_size", lambda group: 2)
    monkeypatch.setattr(
        distributed.distributed, "all_gather_object", lambda found, value, group: found.__setitem__(0, value)
    )
    device = torch.device("cuda", 1)
    assert distributed._gather("told", device, None) == ["told", None]
    assert set_devices == [device] == [distributed._place(device, None)]
