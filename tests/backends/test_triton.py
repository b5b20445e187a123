"""The `triton` backend: its kernels in Triton's interpreter, and when it can run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from compiled_logprobs.backends import get_backend, triton
from compiled_logprobs.problem import Problem

ROOT = Path(__file__).parents[2]
ON_GPU = Problem("cuda", 64, 151936, torch.bfloat16)


@pytest.mark.slow
def test_the_kernels_pass_the_gate_and_agree_with_float64_in_the_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    program = [sys.executable, "-m", "tests.helpers.triton_in_interpreter"]
    ran = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=400)
    print(ran.stdout)
    assert ran.returncode == 0, ran.stderr[-3000:]
    for dtype in ("float32", "float16", "bfloat16"):
        assert f"{dtype} on cpu" in ran.stdout
    for checked in ("hard rows", "the same bits", "half of the rows ignored", "rows beyond 2^31 elements"):
        assert checked in ran.stdout


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"device_type": "cpu"}, "needs a CUDA or ROCm device"),
        ({"dtype": torch.float64}, "computes in float32; float64 logits are for eager"),
        ({"labels_per_row": 1025}, "takes up to 1024 labels a row, not 1025"),
    ],
)
def test_what_it_cannot_run(changes, reason):
    assert get_backend("triton").why_not(ON_GPU._replace(**changes)) == reason


def test_old_devices_and_a_missing_triton_are_reasons(monkeypatch):
    backend = get_backend("triton")
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    monkeypatch.setattr(triton, "_why_no_kernels", lambda: None)
    assert backend.why_not(ON_GPU) == "needs compute capability 8.0 or newer, and this device has 7.5"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (12, 0))
    assert backend.why_not(ON_GPU) is None
    monkeypatch.undo()
    monkeypatch.setattr(triton, "find_spec", lambda name: None)
    triton._why_no_kernels.cache_clear()
    assert backend.why_not(ON_GPU) == "triton is not installed: pip install triton"
    triton._why_no_kernels.cache_clear()


def test_the_fingerprint_names_tritons_version():
    assert get_backend("triton").fingerprint().endswith(f", triton {triton._triton_version()}")
