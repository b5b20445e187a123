"""Liger's fused linear cross entropy, negated: chunks of rows, whose logits a Triton kernel turns into their gradient.

Backward multiplies again, since a loss a token is told only there what comes to it from above. The weight's gradient is
added up in float32.

Shapes: M rows that count, H hidden size, V vocabulary.
"""

import re
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from compiled_logprobs.backends.base_loss import LossBackend
from compiled_logprobs.problem import Problem

LEAST_VERSION = (0, 8, 4)
"""Of liger-kernel. The gradients of a loss a token are right from 0.8.2 on; before 0.8.4 columns beyond the vocabulary
count where there is a soft cap."""
NONE_IGNORED = -100
"""Labels are all in [0, V) here."""


class Liger(LossBackend):
    """LigerFusedLinearCrossEntropyFunction, with reduction="none"."""

    name = "liger"
    summary = "Liger's fused linear cross entropy, chunks of rows"

    def why_not(self, problem: Problem) -> str | None:
        if problem.device_type != "cuda":  # which is what torch calls ROCm, too
            return "needs a CUDA or ROCm device"
        if problem.dtype == torch.float64:
            return "computes in float32; float32, bfloat16 and float16 are valid"
        if problem.dtype != torch.float32 and problem.needs_grad:
            return (
                "rounds probabilities to half precision before it multiplies them by what comes from above; with a "
                "gradient, float32 is valid"
            )
        if problem.memory_limit is not None:
            return "chooses its chunks itself, and keeps within no limit"
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return "waits for the device, which cannot be captured in a CUDA graph"
        return super().why_not(problem) or _why_no_function()

    def is_warm(self, problem: Problem) -> bool:
        return False  # Triton compiles for each V, and more that a problem does not tell

    def losses(
        self, hidden_MH: Tensor, weight: Tensor, bias: Tensor | None, labels_M: Tensor, softcap: float | None
    ) -> Tensor:
        options = None, NONE_IGNORED, 0.0, 0.0, "none", softcap, False, torch.float32
        with torch.cuda.device_of(hidden_MH):  # type: ignore[no-untyped-call]  # torch's gap
            losses: Tensor = _function().apply(hidden_MH, weight, labels_M, bias, *options)[0]
        return losses

    def fingerprint(self) -> str:
        return f"{super().fingerprint()}, liger-kernel {_version()}, triton {_version('triton')}"


def _function() -> Any:
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    return LigerFusedLinearCrossEntropyFunction


@lru_cache(maxsize=1)
def _why_no_function() -> str | None:
    least = ".".join(map(str, LEAST_VERSION))
    installed = _version()
    if installed == "none":
        return f"liger-kernel is not installed: pip install 'liger-kernel>={least}'"
    if tuple(map(int, re.findall(r"\d+", installed)[:3])) < LEAST_VERSION:
        return f"needs liger-kernel {least} or newer, whose gradients and soft caps are right, and this is {installed}"
    try:
        _function()
    except Exception as error:  # noqa: BLE001  foreign code, and what it imports, may raise anything
        return f"liger-kernel cannot be loaded: {type(error).__name__}: {error}"
    return None


def _version(package: str = "liger-kernel") -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"
