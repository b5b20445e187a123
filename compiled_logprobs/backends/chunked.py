"""Chunks of rows: the product, then a backend over logits; backward computes the logits again, a chunk at a time.

Where one chunk holds all rows its logits are kept for backward, which writes their gradient over them.

Shapes: N rows, C of a chunk; H hidden size; V vocabulary.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from compiled_logprobs.backends.base import SHARE_OF_MEMORY, HiddenBackend, why_not_at_once
from compiled_logprobs.machine.clock import total_memory
from compiled_logprobs.operation.contract import Results, Upstream, Wanted
from compiled_logprobs.operation.hidden import Gradients, HiddenInputs, LogitsBackend, Needs, at_rows, gradient_in_place
from compiled_logprobs.problem import Problem, accumulation_dtype, of_logits

WORKSPACE = 2**24
"""Bytes that a backend over logits may take beside them."""
MIB = 2**20


class Chunked(HiddenBackend):
    """Chunks of so many rows, or fewer where the memory is limited.

    Args:
        name, summary: as for `HiddenBackend`.
        rows: of a chunk; None: all.
        uses: the backend over logits; None: the one that is chosen for them.
        may_be_fewer: whether it also runs with fewer rows a chunk, where the limit leaves room for no more.
    """

    keeps_logits = True

    def __init__(
        self, name: str, summary: str, rows: int | None, *, uses: str | None = None, may_be_fewer: bool = True
    ) -> None:
        self.name, self.summary = name, summary
        self._rows, self._uses, self._may_be_fewer = rows, uses, may_be_fewer

    def why_not(self, problem: Problem) -> str | None:
        if self._rows is not None and problem.rows <= self._rows:
            return f"its chunks of {self._rows} rows would hold all of the {problem.rows}, as `whole` has them"
        if not self._may_be_fewer and (reason := why_not_at_once(problem)):
            return reason
        rows = problem.rows if self._rows is None else self._rows
        least = self.least_memory(problem) if self._may_be_fewer else self._bytes(problem, rows)
        if problem.memory_limit is not None and least > problem.memory_limit:
            return f"it takes {least / MIB:.1f} MiB, and may take {problem.memory_limit / MIB:.1f}"
        return None

    def least_memory(self, problem: Problem) -> int:
        return min(self._bytes(problem, 1), self._bytes(problem, problem.rows))

    def forward(
        self, inputs: HiddenInputs, wanted: Wanted, logits_backend: LogitsBackend, *, keep: bool
    ) -> tuple[Results, Tensor | None]:
        chunks, parts = list(self._chunks(inputs)), []
        kept = None
        for rows in chunks:
            z_CV = inputs.product(inputs.hidden_of(rows))
            serving = logits_backend(of_logits(inputs.problem, len(z_CV)), self._uses)
            parts.append(serving.forward(inputs.at(z_CV, rows), wanted))
            kept = z_CV if keep and len(chunks) == 1 else None
            del z_CV  # before there is another one
        return parts[0] if len(parts) == 1 else _joined(parts), kept

    def backward(
        self,
        inputs: HiddenInputs,
        stats: Tensor,
        kept: Any,
        upstream: Upstream,
        logits_backend: LogitsBackend,
        needs: Needs,
    ) -> Gradients:
        sums = _Sums(inputs, needs)
        for rows in [slice(0, len(inputs.labels))] if kept is not None else self._chunks(inputs):
            hidden_CH = inputs.hidden_of(rows)
            z_CV = inputs.product(hidden_CH) if kept is None else kept
            serving = logits_backend(of_logits(inputs.problem, len(z_CV)), self._uses)
            part = at_rows(upstream, rows)
            of_rows = stats[:, rows].contiguous()
            gradient = gradient_in_place(serving, z_CV, inputs.at(z_CV, rows), inputs.softcap, of_rows, part)
            sums.add(gradient, hidden_CH, rows)
            del z_CV, gradient
        return sums.gradients()

    def _chunks(self, inputs: HiddenInputs) -> Iterator[slice]:
        count = len(inputs.labels)
        step = count if self._rows is None else self._rows
        limit = inputs.problem.memory_limit
        if limit is None and self._rows is None and why_not_at_once(inputs.problem):
            limit = (total_memory(inputs.problem.device_type) or 0) // SHARE_OF_MEMORY
        if limit is not None:
            step = min(step, self._rows_within(inputs.problem, limit))
        return (slice(start, min(start + step, count)) for start in range(0, count, step))

    def _rows_within(self, problem: Problem, limit: int) -> int:
        if self._bytes(problem, problem.rows) <= limit:
            return problem.rows
        fixed, a_row = self._bytes(problem, 0), self._bytes(problem, 1) - self._bytes(problem, 0)
        return max(1, (limit - fixed) // a_row)

    @staticmethod
    def _bytes(problem: Problem, rows: int) -> int:
        """Beside arguments, results and gradients, with so many rows a chunk."""
        size, wide = problem.dtype.itemsize, accumulation_dtype(problem.dtype).itemsize
        a_logit = size + problem.softcap * wide
        sums = 0
        if rows < problem.rows and problem.needs_grad and size < wide:
            block = min(problem.vocab, _BLOCK)
            sums = problem.weight_grad * (problem.vocab * wide + block * size) * (problem.hidden or 1)
        return WORKSPACE + rows * problem.vocab * a_logit + sums


_BLOCK = 2**13
"""Columns of the vocabulary whose part of the weight's gradient is rounded at once."""


class _Sums:
    """The gradients, a chunk of rows after another, in the accumulation dtype where there are several."""

    def __init__(self, inputs: HiddenInputs, needs: Needs) -> None:
        self._inputs, self._needs = inputs, needs
        hidden, self._dtype = inputs.hidden, accumulation_dtype(inputs.hidden.dtype)
        new = hidden.new_empty if inputs.counting is None else hidden.new_zeros
        self._hidden = new(hidden.shape) if needs.hidden else None
        self._weight: Tensor | None = None
        self._bias: Tensor | None = None

    def add(self, gradient_CV: Tensor, hidden_CH: Tensor, rows: slice) -> None:
        inputs, needs = self._inputs, self._needs
        if self._hidden is not None and inputs.counting is None:
            torch.mm(gradient_CV, inputs.weight, out=self._hidden[rows])
        elif self._hidden is not None and inputs.counting is not None:
            self._hidden.index_copy_(0, inputs.counting[rows], gradient_CV @ inputs.weight)
        if needs.weight:
            self._add_weight(gradient_CV, hidden_CH, is_only=rows == slice(0, len(inputs.labels)))
        if needs.bias:
            part = gradient_CV.sum(0, dtype=self._dtype)
            self._bias = part if self._bias is None else self._bias.add_(part)

    def _add_weight(self, gradient_CV: Tensor, hidden_CH: Tensor, *, is_only: bool) -> None:
        weight = self._inputs.weight
        if self._weight is None:
            dtype = weight.dtype if is_only else self._dtype
            self._weight = weight.new_empty(weight.shape, dtype=dtype)
            if dtype == weight.dtype:
                torch.mm(gradient_CV.T, hidden_CH, out=self._weight)
                return
            self._weight.zero_()
        if self._weight.dtype == weight.dtype:
            self._weight.addmm_(gradient_CV.T, hidden_CH)
            return
        for start in range(0, len(weight), _BLOCK):  # so that what is rounded takes little memory
            columns = slice(start, start + _BLOCK)
            self._weight[columns] += gradient_CV[:, columns].T @ hidden_CH

    def gradients(self) -> Gradients:
        dtype = self._inputs.hidden.dtype
        weight, bias = (None if x is None else x.to(dtype) for x in (self._weight, self._bias))
        return Gradients(self._hidden, weight, bias)


def _joined(parts: list[Results]) -> Results:
    """Of all chunks, in order."""
    joined: dict[str, Any] = {}
    for name in Results._fields:
        tensors = [getattr(part, name) for part in parts]
        joined[name] = None if tensors[0] is None else torch.cat(tensors, -1 if name == "stats" else 0)
    return Results(**joined)


WHOLE = Chunked("whole", "all logits at once, kept for backward", None, may_be_fewer=False)
EAGER = Chunked("eager", "all logits at once, as far as memory may go, in plain torch", None, uses="eager")
CHUNKED_64 = Chunked("chunked_64", "64 rows at a time, whose logits backward computes again", 64)
CHUNKED_256 = Chunked("chunked_256", "256 rows at a time, whose logits backward computes again", 256)
CHUNKED_1024 = Chunked("chunked_1024", "1024 rows at a time, whose logits backward computes again", 1024)
CHUNKED_4096 = Chunked("chunked_4096", "4096 rows at a time, whose logits backward computes again", 4096)
