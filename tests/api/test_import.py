"""Importing is cheap, and brings nothing that was not asked for."""

import json
import subprocess
import sys

import pytest

import compiled_logprobs

PROGRAM = """
import gc, json, sys, time
gc.disable()  # or a collection of what torch has made falls into either of the two
began = time.perf_counter()
import torch
start = time.perf_counter()
import compiled_logprobs
share = (time.perf_counter() - start) / (start - began)
heavy = ("triton", "streamlit", "plotly", "pandas", "typer", "rich", "torch._dynamo", "torch._inductor")
print(json.dumps({"share": share, "heavy": [name for name in heavy if name in sys.modules]}))
"""


@pytest.mark.slow
def test_importing_adds_little_to_torch():
    shares = []
    for _ in range(3):  # the best of three: what the code needs, whatever else the machine is doing
        ran = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
        run = json.loads(ran.stdout)
        assert run["heavy"] == []
        shares.append(run["share"])
        if shares[-1] < 0.15:  # measured: 0.05 to 0.07 of torch's own import
            return
    pytest.fail(f"shares of torch's import: {shares}")


def test_the_public_names():
    assert compiled_logprobs.__all__ == sorted(compiled_logprobs.__all__)
    assert set(compiled_logprobs.__all__) == {
        "BackendUnavailable",
        "CheckReport",
        "Decision",
        "Explanation",
        "InputError",
        "LogProbs",
        "LogProbsError",
        "Problem",
        "ProfileError",
        "autotune",
        "backends",
        "check_backend",
        "cross_entropy_from_logits",
        "entropy_from_logits",
        "explain",
        "log_probs_from_logits",
        "register_backend",
        "tune",
    }
    assert compiled_logprobs.backends() == ["cpp", "compiled", "flash_attn", "eager"]
    for name in compiled_logprobs.__all__:
        assert getattr(compiled_logprobs, name).__doc__
