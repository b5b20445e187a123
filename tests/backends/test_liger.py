"""Liger's real kernel in Triton's interpreter, and what is said where its function does not fit."""

import os
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from compiled_logprobs.backends import liger, why_not
from compiled_logprobs.problem import Problem

ROOT = Path(__file__).parents[2]
PROBLEM = Problem("cuda", 64, 301, torch.float32, hidden=64, needs_grad=True, weight_grad=True)


@pytest.fixture
def installed(monkeypatch):
    """Have liger-kernel be of this version; None: not installed."""

    def version_is(number: str | None) -> None:
        def version(package: str) -> str:
            if number is None:
                raise PackageNotFoundError(package)
            return number

        monkeypatch.setattr(liger, "version", version)
        liger._why_no_function.cache_clear()

    yield version_is
    liger._why_no_function.cache_clear()


@pytest.mark.skipif(find_spec("liger_kernel") is None or find_spec("triton") is None, reason="has no liger-kernel")
@pytest.mark.slow
def test_the_real_kernel_passes_the_check_in_the_interpreter():
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "TRITON_INTERPRET": "1"}
    program = [sys.executable, "-m", "tests.helpers.liger_in_interpreter"]
    ran = subprocess.run(program, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=400)
    assert ran.returncode == 0, ran.stderr[-3000:]
    for dtype in ("float32", "bfloat16"):
        assert f"gate, 64 x 64 x 301 {dtype} on cpu" in ran.stdout


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"device_type": "cpu"}, "needs a CUDA or ROCm device"),
        ({"dtype": torch.float64}, "float32, bfloat16 and float16 are valid"),
        ({"dtype": torch.bfloat16}, "rounds probabilities .* with a gradient, float32 is valid"),
        ({"memory_limit": 2**30}, "keeps within no limit"),
        ({"labels_per_row": 3}, "takes one label a row, not 3"),
        ({"temperature": "per_token"}, "has neither a temperature nor a scale of the logits; 1.0 is valid"),
        ({"entropy": True, "argmax": True}, "computes log-probabilities alone, without entropy, argmax$"),
        ({"logsumexp": True}, "without logsumexp, which a vocabulary that is split over ranks needs"),
    ],
)
def test_what_does_not_fit_is_said(installed, changes, reason):
    installed(None)
    assert re.search(reason, str(why_not("liger", PROBLEM._replace(**changes))))


def test_a_version_that_does_not_fit_is_said(installed, monkeypatch):
    installed(None)
    assert why_not("liger", PROBLEM) == "liger-kernel is not installed: pip install 'liger-kernel>=0.8.4'"
    for old in ("0.8.3", "0.7.0", "0.8.3.post1"):
        installed(old)
        assert str(why_not("liger", PROBLEM)).startswith("needs liger-kernel 0.8.4 or newer")
        assert str(why_not("liger", PROBLEM)).endswith(f"this is {old}")

    def broken() -> None:
        raise RuntimeError("made for another triton")

    installed("0.8.4rc1")
    monkeypatch.setattr(liger, "_function", broken)
    assert why_not("liger", PROBLEM) == "liger-kernel cannot be loaded: RuntimeError: made for another triton"
    installed("0.9")
    monkeypatch.setattr(liger, "_function", lambda: None)
    for forward in (PROBLEM._replace(dtype=torch.float16, needs_grad=False), PROBLEM._replace(bias=True, softcap=True)):
        assert why_not("liger", forward) is None
