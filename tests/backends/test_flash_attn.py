"""flash-attn's real kernels in Triton's interpreter, and what is said where they cannot be loaded."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


def python(*arguments: str, path: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    folders = [str(path)] if path else []
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*folders, str(ROOT)]), **environment}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, timeout=400)


def test_the_real_kernels_pass_the_gate_in_the_interpreter():
    ran = python("-m", "tests.helpers.flash_attn_in_interpreter", TRITON_INTERPRET="1")
    print(ran.stdout)
    assert ran.returncode == 0, ran.stderr[-3000:]
    for dtype in ("float32", "float16", "bfloat16"):
        assert f"gate, 8 x 20011 {dtype} on cpu" in ran.stdout


WHY_NOT = """
import torch
from compiled_logprobs.backends import why_not
from compiled_logprobs.problem import Problem
print(why_not("flash_attn", Problem("cuda", 8, 5000, torch.float32)))
"""


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({}, "no ops/triton/cross_entropy.py"),
        (
            {"ops/triton/cross_entropy.py": "raise RuntimeError('made for another triton')"},
            "flash-attn's kernel cannot be loaded: RuntimeError: made for another triton",
        ),
    ],
)
def test_a_broken_flash_attn_is_a_reason_and_no_error(tmp_path, files, reason):
    for name, text in ({"__init__.py": "raise ImportError('libcudart.so.11 is missing')"} | files).items():
        file = tmp_path / "flash_attn" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    ran = python("-c", WHY_NOT, path=tmp_path)
    assert reason in ran.stdout, ran.stderr


def test_the_installed_package_is_loaded_without_its_compiled_extension():
    """flash-attn is installed here without it, so that importing the package fails."""
    assert python("-c", "import flash_attn").returncode != 0
    ran = python("-c", WHY_NOT)
    assert ran.stdout == "None\n", ran.stdout + ran.stderr
