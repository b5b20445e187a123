"""The command line, as a person or a program meets it: what it prints, where, and its exit codes."""

import json
import os
import socket
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from compiled_logprobs.backends import backends
from compiled_logprobs.cli.main import app
from compiled_logprobs.machine import environment

ROOTS = (Path(__file__).parents[2], Path(__file__).parents[2] / "dashboard")
"""What has to be on the import path of a program."""


@pytest.fixture
def run(monkeypatch):
    """Calls the command line in this process, with the backends and the import path put back afterwards."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    registry = import_module("compiled_logprobs.backends")
    monkeypatch.setattr(registry, "_targets", dict(registry._targets))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # two that wait for each other on a busy machine take ten times as long
    # A small vocabulary is checked in a tenth of the time.
    yield lambda name, *rest: CliRunner().invoke(app, [name, *(["--vocab", "259"] if name == "check" else []), *rest])
    torch.set_num_threads(threads)


def last_line(text: str) -> str:
    return text.rstrip().splitlines()[-1]


def test_a_right_function_passes(run):
    result = run("check", "tests.helpers.functions_to_check:right")
    assert result.exit_code == 0, result.output
    total = result.stdout.count(" passed ") - 1  # the last line has one, too
    assert last_line(result.stdout) == f"right: passed {total} of {total} checks"
    assert "no log-probability is positive" in result.stdout
    assert "row invariant" in result.stdout


def test_a_cross_entropy_returned_as_a_log_probability_is_wrong_and_told_why(run):
    result = run("check", "tests.helpers.functions_to_check:positive")
    assert result.exit_code == 1
    assert last_line(result.stdout).startswith("positive: wrong: ")
    assert "log_prob_sign" in last_line(result.stdout)
    assert "log_prob_sign (float32): " in result.stdout
    assert "log_prob_sign (bfloat16): " in result.stdout


def test_a_temperature_that_the_signature_has_is_tried(run):
    result = run("check", "tests.helpers.functions_to_check:tempered")
    assert result.exit_code == 1
    assert "log_prob_error" in last_line(result.stdout)


def test_without_ignored_labels_a_function_that_has_none_passes(run):
    with_ignored = run("check", "tests.helpers.functions_to_check:without_ignored")
    assert with_ignored.exit_code == 1
    assert last_line(with_ignored.stdout) == "without_ignored: wrong: runs"
    assert run("check", "tests.helpers.functions_to_check:without_ignored", "--no-ignore-index").exit_code == 0


def test_json_is_one_object_even_if_the_function_prints(run):
    result = run("check", "tests.helpers.functions_to_check:talkative", "--json", "--seed", "7")
    assert result.exit_code == 0
    (report,) = json.loads(result.stdout, parse_constant=pytest.fail)["reports"]
    assert report["subject"] == "talkative"
    assert report["passed"]
    assert report["reasons"] == []
    assert report["seed"] == 7
    assert {"name", "meaning", "problem", "passed", "figure", "limit", "detail"} <= report["checks"][0].keys()
    assert "checking" in result.stderr


def test_json_of_a_wrong_function_has_the_reasons(run):
    result = run("check", "tests.helpers.functions_to_check:positive", "--json")
    assert result.exit_code == 1
    (report,) = json.loads(result.stdout, parse_constant=pytest.fail)["reports"]
    assert not report["passed"]
    assert "log_prob_sign" in report["reasons"]


def test_a_backend_of_ones_own_is_checked_before_it_is_registered(run):
    result = run("check", "tests.helpers.functions_to_check:Borrowed")
    assert result.exit_code == 0, result.output
    assert last_line(result.stdout).startswith("borrowed: passed ")


@pytest.mark.parametrize(
    ("target", "said"),
    [
        (
            "no_such_backend",
            "InputError: got target 'no_such_backend'; a backend's name (cpp, compiled, flash_attn, eager)",
        ),
        ("no_such_module:function", "cannot be imported: ModuleNotFoundError: No module named 'no_such_module'"),
        ("tests.helpers.functions_to_check:no_such_function", "cannot be imported: AttributeError"),
        ("tests.helpers.functions_to_check:not_a_function", "which is of type int; a function is valid"),
        ("tests.helpers.functions_to_check:", "package.module:function is valid"),
        ("exits_when_imported:function", "cannot be imported: SystemExit"),
    ],
)
def test_what_cannot_be_checked_is_exit_2_with_the_reason_on_stderr(run, tmp_path, monkeypatch, target, said):
    (tmp_path / "exits_when_imported.py").write_text("raise SystemExit(0)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    result = run("check", target)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert said in result.stderr
    assert "Traceback" not in result.stderr


def test_a_backend_that_cannot_run_here_is_exit_2(run):
    result = run("check", "flash_attn", "--device", "cpu")
    assert result.exit_code == 2
    assert "BackendUnavailable: backend 'flash_attn' cannot run" in result.stderr
    assert "needs a CUDA or ROCm device" in result.stderr


def test_a_mistake_of_our_own_does_not_look_like_a_wrong_backend(run, monkeypatch):
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("a mistake")

    monkeypatch.setattr("compiled_logprobs.cli.check.check_backend", broken)
    result = run("check", "eager")
    assert result.exit_code == 2
    assert "RuntimeError: a mistake" in result.stderr


def test_without_a_target_every_backend_is_checked_or_listed_with_its_reason(run, monkeypatch):
    # Without `compiled`, which takes long to compile, and has tests of its own.
    monkeypatch.setattr("compiled_logprobs.cli.check.backends", lambda: ["flash_attn", "eager"])
    result = run("check", "--device", "cpu")
    assert result.exit_code == 0, result.output
    flash_attn, eager = (line for line in result.stdout.splitlines() if ": passed " in line or "cannot run" in line)
    assert eager.startswith("eager: passed ")
    assert flash_attn.startswith("backend 'flash_attn' cannot run")
    assert flash_attn.endswith("needs a CUDA or ROCm device.")


def test_where_no_backend_can_run_it_is_exit_2_with_the_reasons(run, monkeypatch):
    monkeypatch.setattr("compiled_logprobs.cli.check.backends", lambda: ["flash_attn"])
    result = run("check", "--device", "cpu", "--json")
    assert result.exit_code == 2
    assert json.loads(result.stdout)["unavailable"].keys() == {"flash_attn"}


def test_a_gpu_that_is_not_there_is_said_so(run, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    result = run("check", "eager", "--device", "cuda")
    assert result.exit_code == 2
    assert result.stderr.startswith("InputError: got --device cuda; torch sees no CUDA or ROCm device here.")


def test_doctor_tells_machine_versions_and_backends(run):
    result = run("doctor")
    assert result.exit_code == 0
    for expected in ("cpu model", "cpu capability", "torch", "triton", "C++ compiler", *backends()):
        assert expected in result.stdout
    assert "no: needs a CUDA or ROCm device" in result.stdout


def test_doctor_has_json_and_names_neither_host_nor_home(run, monkeypatch):
    monkeypatch.setattr("compiled_logprobs.cli.show.why_not", lambda *_: f"cannot read {Path.home()}/secret/kernel.so")
    result = run("doctor", "--json")
    assert result.exit_code == 0
    found = json.loads(result.stdout, parse_constant=pytest.fail)
    assert found.keys() == {"environments", "cpp_compiler", "backends"}
    assert found["environments"][0]["fingerprint"] == environment.environment_of().fingerprint()
    dtypes = [
        (row["name"], row["problem"].split()[3]) for row in found["backends"] if row["problem"].endswith("on cpu")
    ]
    assert dtypes == [(name, dtype) for name in backends() for dtype in ("float32", "bfloat16")]
    assert str(Path.home()) not in result.stdout
    assert "secret" not in result.stdout
    if len(socket.gethostname()) > 3:
        assert socket.gethostname() not in result.stdout


@pytest.mark.slow
def test_python_m_is_the_same_program_and_finds_functions_in_the_current_directory(tmp_path):
    (tmp_path / "mine.py").write_text("from tests.helpers.functions_to_check import without_ignored\n")
    process = subprocess.run(
        [sys.executable, "-P", "-m", "compiled_logprobs", "check", "mine:without_ignored"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, ROOTS))},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert process.returncode == 1, process.stderr
    assert last_line(process.stdout) == "without_ignored: wrong: runs"
