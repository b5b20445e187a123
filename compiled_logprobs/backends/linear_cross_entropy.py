"""torch's own `linear_cross_entropy` (from 2.13), negated: all logits at once, and their gradient beside them.

Shapes: N rows, H hidden size, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from compiled_logprobs.backends.base import HiddenBackend, why_not_at_once
from compiled_logprobs.operation.contract import Inputs, Results, Upstream, Wanted, clean, finish
from compiled_logprobs.operation.hidden import Gradients, HiddenInputs, LogitsBackend, Needs
from compiled_logprobs.problem import Problem, results_of


class LinearCrossEntropy(HiddenBackend):
    """torch.nn.functional.linear_cross_entropy, with reduction="none"."""

    name = "linear_cross_entropy"
    summary = "torch's own linear_cross_entropy, all logits at once"
    needs_autograd = True

    def why_not(self, problem: Problem) -> str | None:
        if not hasattr(functional, "linear_cross_entropy"):
            return "torch has linear_cross_entropy from 2.13 on"
        if problem.dtype in (torch.bfloat16, torch.float16):
            return "it rounds its results to half precision"
        if problem.labels_per_row > 1 or results_of(problem) or problem.softcap or problem.temperature != "none":
            return "it has one label a row, no temperature, no soft cap, and returns nothing but the loss"
        if problem.memory_limit is not None:
            return "it holds all logits and their gradient, and keeps within no limit"
        return why_not_at_once(problem)

    def forward(
        self, inputs: HiddenInputs, wanted: Wanted, logits_backend: LogitsBackend, *, keep: bool
    ) -> tuple[Results, Any]:
        rows = clean(Inputs(inputs.weight.T, inputs.labels, inputs.temperature, inputs.ignore_index))
        arguments = self._arguments(inputs, keep)
        with torch.set_grad_enabled(keep):
            losses = self._losses(arguments, rows.labels)
        log_probs = -losses.detach().unsqueeze(-1)
        m, log_s = torch.zeros_like(losses.detach()), -log_probs.squeeze(-1)  # of no use to another's backward
        return finish(rows, wanted, log_probs, m, log_s), (losses, arguments) if keep else None

    def backward(
        self,
        inputs: HiddenInputs,
        stats: Tensor,
        kept: Any,
        upstream: Upstream,
        logits_backend: LogitsBackend,
        needs: Needs,
    ) -> Gradients:
        rows = clean(Inputs(inputs.weight.T, inputs.labels, inputs.temperature, inputs.ignore_index))
        if kept is None:
            arguments = self._arguments(inputs, True)
            with torch.enable_grad():
                kept = self._losses(arguments, rows.labels), arguments
        losses, arguments = kept
        grad_N = upstream.log_probs.squeeze(-1).masked_fill(rows.invalid, torch.nan).masked_fill(rows.dropped, 0.0)
        asked = [x for x, is_needed in zip(arguments, needs, strict=True) if is_needed]
        found = iter(torch.autograd.grad(losses, asked, -grad_N))
        of_hidden, *others = (next(found) if is_needed else None for is_needed in needs)
        if of_hidden is not None and inputs.counting is not None:
            of_hidden = torch.zeros_like(inputs.hidden).index_copy_(0, inputs.counting, of_hidden)
        return Gradients(of_hidden, *others)

    @staticmethod
    def _arguments(inputs: HiddenInputs, keep: bool) -> list[Tensor | None]:
        given = inputs.hidden_of(slice(0, len(inputs.labels))), inputs.weight, inputs.bias
        return [None if x is None else x.detach().requires_grad_(keep) for x in given]

    @staticmethod
    def _losses(arguments: list[Tensor | None], labels: Tensor) -> Tensor:
        hidden, weight, bias = arguments
        compute: Any = functional.linear_cross_entropy  # whose own types leave the bias out
        losses: Tensor = compute(hidden, weight, labels.squeeze(-1), linear_bias=bias, reduction="none")
        return losses
