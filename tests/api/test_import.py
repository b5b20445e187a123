"""Importing is cheap, and brings nothing that was not asked for."""

import subprocess
import sys

import pytest

import compiled_logprobs

PROGRAM = """
import sys
import compiled_logprobs
heavy = ("triton", "streamlit", "plotly", "pandas", "typer", "rich", "torch._dynamo", "torch._inductor")
print([name for name in heavy if name in sys.modules])
"""
PUBLIC = """
BackendUnavailable CheckReport Decision Explanation InputError LogProbs LogProbsError Problem ProfileError autotune
backends check_backend cross_entropy_from_hidden cross_entropy_from_logits entropy_from_logits explain
log_probs_from_hidden log_probs_from_logits register_backend tune warm
"""


@pytest.mark.slow
def test_importing_brings_nothing_that_takes_long():
    ran = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert ran.stdout == "[]\n"


@pytest.mark.slow
def test_importing_says_nothing_where_numpy_is_not_installed():
    program = "import sys; sys.modules['numpy'] = None; import compiled_logprobs"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert (ran.stdout, ran.stderr) == ("", "")


def test_the_public_names():
    assert compiled_logprobs.__all__ == PUBLIC.split()
    assert compiled_logprobs.backends() == ["cpp", "compiled", "triton", "flash_attn", "eager"]
    for name in compiled_logprobs.__all__:
        assert getattr(compiled_logprobs, name).__doc__
