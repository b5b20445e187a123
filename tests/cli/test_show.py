"""`show`, `explain` and `doctor` on the command line, and `--version`."""

import json
import os
import socket
from pathlib import Path

import pytest
import torch

import compiled_logprobs
from compiled_logprobs.backends import backends
from compiled_logprobs.cli.options import device_of
from compiled_logprobs.machine.environment import environment_of
from compiled_logprobs.problem import Problem
from tests.helpers.stored_decisions import decided, publish

PROBLEM = Problem("cpu", 384, 4096, torch.float32)
EXPLAIN = ("explain", "--device", "cpu", "--rows", "300", "--vocab", "4096", "--dtype", "float32", "--mode", "forward")


def test_show_lists_what_is_stored_and_where_it_comes_from(run):
    publish(decided(PROBLEM))
    result = run("show")
    assert result.exit_code == 0
    (row,) = (line for line in result.stdout.splitlines() if " 4096 " in line)
    assert row.split()[:8] == ["384", "4096", "float32", "forward", "eager", "not", "timed", "baseline"]
    assert row.rstrip().endswith("user store")
    text = run("show", "--json").stdout
    (decision,) = (one for one in json.loads(text)["decisions"] if one["from"] == "user store")
    assert decision["problem"]["vocab"] == 4096 and decision["chosen"] == "eager"
    assert str(Path(compiled_logprobs.__file__).parent) not in text
    assert os.environ.get("HOME", "/root") not in text


def test_show_says_so_where_nothing_is_stored(run, tmp_path):
    result = run("show", "--store", str(tmp_path))
    assert result.exit_code == 0 and "`compiled-logprobs profile` measures some" in result.stdout
    assert json.loads(run("show", "--store", str(tmp_path), "--json").stdout) == {"decisions": []}


def test_explain_tells_of_every_candidate(run, mode):
    mode("lookup")
    assert "not decided yet\n  the next call takes the first of" in run(*EXPLAIN).stdout
    publish(decided(PROBLEM, "cpp"))
    after = run(*EXPLAIN)
    assert "300 x 4096 float32 on cpu: cpp" in after.stdout
    assert "FASTER_CLEAR: cpp is faster" in after.stdout and "1 of 1 checks" in after.stdout
    assert "log_softmax and gather, which people use today: 4 ms a call" in after.stdout
    told = json.loads(run(*EXPLAIN, "--json").stdout, parse_constant=pytest.fail)
    assert told["backend"] == "cpp" and told["source"] == "user store" and told["bucket_rows"] == 384


def test_doctor_tells_machine_versions_and_backends_and_neither_host_nor_home(run, monkeypatch):
    result = run("doctor")
    assert result.exit_code == 0 and "no: needs a CUDA or ROCm device" in result.stdout
    for expected in ("cpu model", "cpu capability", "torch", "triton", "C++ compiler", *backends()):
        assert expected in result.stdout
    monkeypatch.setattr("compiled_logprobs.cli.show.why_not", lambda *_: f"cannot read {Path.home()}/secret/kernel.so")
    result = run("doctor", "--json")
    told = json.loads(result.stdout, parse_constant=pytest.fail)
    assert told.keys() == {"environments", "cpp_compiler", "backends"}
    assert told["environments"][0]["fingerprint"] == environment_of().fingerprint()
    asked = [(row["name"], row["problem"].split()[3]) for row in told["backends"] if row["problem"].endswith("on cpu")]
    assert asked == [(name, dtype) for name in backends() for dtype in ("float32", "bfloat16")]
    assert str(Path.home()) not in result.stdout and "secret" not in result.stdout
    if len(socket.gethostname()) > 3:
        assert socket.gethostname() not in result.stdout


def test_the_version_is_shown(run):
    assert run("--version").stdout.startswith("compiled-logprobs ")


@pytest.mark.parametrize(
    ("asked", "device"), [(None, "cuda:1"), ("cuda", "cuda:1"), ("cuda:0", "cuda:0"), ("cpu:0", "cpu")]
)
def test_on_a_machine_with_gpus_the_device_is_the_one_that_is_meant(monkeypatch, asked, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("compiled_logprobs.cli.options.checked_device", torch.device)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert device_of(asked) == torch.device(device)
