"""What backends have in common that are somebody's loss of a token, negated, which autograd differentiates.

Shapes: N rows, of which M count; H hidden size; V vocabulary.
"""

from abc import abstractmethod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compiled_logprobs.backends.base import HiddenBackend
from compiled_logprobs.backends.fingerprint import digest_of
from compiled_logprobs.operation.contract import Inputs, Results, Upstream, Wanted, clean, finish
from compiled_logprobs.operation.hidden import Gradients, HiddenInputs, LogitsBackend, Needs
from compiled_logprobs.problem import Problem, results_of


class LossBackend(HiddenBackend):
    """A loss of one label a row, without a temperature, that returns nothing else."""

    needs_autograd = True

    @abstractmethod
    def losses(
        self, hidden_MH: Tensor, weight: Tensor, bias: Tensor | None, labels_M: Tensor, softcap: float | None
    ) -> Tensor:
        """[M] in the accumulation dtype, differentiable; all labels are in [0, V)."""

    def why_not(self, problem: Problem) -> str | None:
        if problem.labels_per_row > 1:
            return f"takes one label a row, not {problem.labels_per_row}"
        if problem.temperature != "none":
            return "has neither a temperature nor a scale of the logits; 1.0 is valid"
        if asked := results_of(problem):
            why = ", which a vocabulary that is split over ranks needs" if problem.logsumexp else ""
            return f"computes log-probabilities alone, without {', '.join(asked)}{why}"
        return None

    def forward(
        self, inputs: HiddenInputs, wanted: Wanted, logits_backend: LogitsBackend, *, keep: bool
    ) -> tuple[Results, Any]:
        rows = clean(Inputs(inputs.weight.T, inputs.labels, inputs.temperature, inputs.ignore_index))
        losses, arguments = self._compute(inputs, rows.labels, keep)
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
        losses, arguments = self._compute(inputs, rows.labels, True) if kept is None else kept
        grad_N = upstream.log_probs.squeeze(-1).masked_fill(rows.invalid, torch.nan).masked_fill(rows.dropped, 0.0)
        asked = [x for x, is_needed in zip(arguments, needs, strict=True) if is_needed]
        found = iter(torch.autograd.grad(losses, asked, -grad_N))
        of_hidden, *others = (next(found) if is_needed else None for is_needed in needs)
        if of_hidden is not None and inputs.counting is not None:
            of_hidden = torch.zeros_like(inputs.hidden).index_copy_(0, inputs.counting, of_hidden)
        return Gradients(of_hidden, *others)

    def fingerprint(self) -> str:
        return f"{super().fingerprint()}, {digest_of(Path(__file__))}"

    def _compute(self, inputs: HiddenInputs, labels: Tensor, keep: bool) -> tuple[Tensor, list[Tensor | None]]:
        """The losses, and the arguments that they are differentiable in, if `keep` is set."""
        hidden, weight = inputs.hidden_of(slice(0, len(inputs.labels))).detach(), inputs.weight.detach()
        bias = None if inputs.bias is None else inputs.bias.detach().requires_grad_(keep)
        hidden.requires_grad_(keep)
        weight.requires_grad_(keep and inputs.problem.weight_grad)  # a frozen one costs no gradient
        with torch.set_grad_enabled(keep):
            losses = self.losses(hidden, weight, bias, labels.squeeze(-1), inputs.softcap)
        return losses, [hidden, weight, bias]
