"""The `liger` backend on CPU tensors, with liger-kernel's real kernel in Triton's interpreter.

A program, which tests spawn with TRITON_INTERPRET=1: prints what it checked, and fails with an AssertionError.
"""

from unittest.mock import patch

import torch
import triton
import triton.language as tl

from compiled_logprobs.backends import register_backend
from compiled_logprobs.backends.liger import Liger
from compiled_logprobs.check.run import check_backend
from compiled_logprobs.problem import Problem
from tests.helpers.triton_interpreter import like_a_gpu


class InterpretedLiger(Liger):
    """The backend, allowed on the CPU."""

    def why_not(self, problem: Problem) -> str | None:
        return super().why_not(problem._replace(device_type="cuda"))


LIGER = InterpretedLiger()


@triton.jit
def tanh(x):
    return 2 * tl.sigmoid(2 * x) - 1


def check_that_the_gate_lets_it_pass() -> None:
    register_backend("interpreted_liger", LIGER, from_hidden=True)
    plain = Problem("cpu", rows=64, vocab=301, dtype=torch.float32, hidden=64)
    for problem in (
        plain._replace(needs_grad=True, weight_grad=True, bias=True, softcap=True),
        plain._replace(dtype=torch.bfloat16),
    ):
        report = check_backend("interpreted_liger", problem)
        assert report.passed, [check.detail for check in report.checks if not check.passed]
        print(f"gate, {problem} ({problem.details() or 'forward'}): passed {len(report.checks)} checks", flush=True)


if __name__ == "__main__":
    torch.manual_seed(0)
    from liger_kernel.ops import cross_entropy

    with like_a_gpu(), patch.object(cross_entropy, "tanh", tanh):  # libdevice is NVIDIA's bitcode
        check_that_the_gate_lets_it_pass()
