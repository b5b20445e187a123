"""torch's own `linear_cross_entropy` (from 2.13), negated: all logits at once, and their gradient beside them.

Shapes: M rows that count, H hidden size, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from compiled_logprobs.backends.base import why_not_at_once
from compiled_logprobs.backends.base_loss import LossBackend
from compiled_logprobs.problem import Problem


class LinearCrossEntropy(LossBackend):
    """torch.nn.functional.linear_cross_entropy, with reduction="none"."""

    name = "linear_cross_entropy"
    summary = "torch's own linear_cross_entropy, all logits at once"

    def why_not(self, problem: Problem) -> str | None:
        if not hasattr(functional, "linear_cross_entropy"):
            return "torch has linear_cross_entropy from 2.13 on"
        if problem.dtype in (torch.bfloat16, torch.float16):
            return "it rounds its results to half precision"
        if problem.softcap:
            return "it has no soft cap"
        if problem.memory_limit is not None:
            return "it holds all logits and their gradient, and keeps within no limit"
        return super().why_not(problem) or why_not_at_once(problem)

    def losses(
        self, hidden_MH: Tensor, weight: Tensor, bias: Tensor | None, labels_M: Tensor, softcap: float | None
    ) -> Tensor:
        compute: Any = functional.linear_cross_entropy  # whose own types leave the bias out
        losses: Tensor = compute(hidden_MH, weight, labels_M, linear_bias=bias, reduction="none")
        return losses
