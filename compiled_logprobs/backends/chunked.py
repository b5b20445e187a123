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
from compiled_logprobs.operation.chunks import Scratch, gradient_in_place, spread
from compiled_logprobs.operation.contract import Results, Upstream, Wanted
from compiled_logprobs.operation.hidden import Gradients, HiddenInputs, LogitsBackend, Needs, at_rows
from compiled_logprobs.operation.products import BLOCK, add_product, multiply
from compiled_logprobs.problem import Problem, accumulation_dtype, of_logits

WORKSPACE = 2**24
"""Bytes that a product, or a backend over logits, may take beside them."""
WORKSPACE_OF_EAGER = 2**25 + 2**23
"""The same of eager, whose copies are of 2^20 logits in float32, as measured on a CPU."""
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
        least = self.least_memory(problem)
        if least is not None and problem.memory_limit is not None and least > problem.memory_limit:
            return f"it takes {least / MIB:.1f} MiB, and may take {problem.memory_limit / MIB:.1f}"
        return None

    def least_memory(self, problem: Problem) -> int | None:
        if self._rows is not None:
            return self._bytes(problem, 1) if problem.rows > self._rows else None
        of_all = self._bytes(problem, problem.rows)
        return min(self._bytes(problem, 1), of_all) if self._may_be_fewer else of_all

    def memory_of_a_step(self, problem: Problem) -> int:
        return self._bytes(problem, 1) - self._bytes(problem, 0) if problem.rows > 1 else problem.vocab

    def forward(
        self, inputs: HiddenInputs, wanted: Wanted, logits_backend: LogitsBackend, *, keep: bool
    ) -> tuple[Results, Tensor | None]:
        chunks, parts = list(self._chunks(inputs)), []
        scratch = Scratch(inputs, chunks[0].stop, len(inputs.weight))
        for rows in chunks:
            chunk = scratch.multiply(scratch.hidden_of(rows), rows)
            serving = logits_backend(of_logits(inputs.problem, len(chunk.z)), self._uses)
            parts.append(serving.forward(chunk.inputs, wanted))
        if len(chunks) > 1:
            return _joined(parts), None
        return parts[0], chunk.z if keep else None

    def backward(
        self,
        inputs: HiddenInputs,
        stats: Tensor,
        kept: Any,
        upstream: Upstream,
        logits_backend: LogitsBackend,
        needs: Needs,
    ) -> Gradients:
        chunks = list(self._chunks(inputs)) if kept is None else [slice(0, len(inputs.labels))]
        scratch = Scratch(inputs, chunks[0].stop, len(inputs.weight), is_known=kept is not None)
        sums = _Sums(inputs, needs, is_one=len(chunks) == 1)
        for rows in chunks:
            hidden_CH = scratch.hidden_of(rows)
            chunk = scratch.multiply(hidden_CH, rows) if kept is None else scratch.cap(kept, rows)
            serving = logits_backend(of_logits(inputs.problem, len(chunk.z)), self._uses)
            of_rows = stats[:, rows].contiguous()
            gradient = gradient_in_place(serving, chunk, inputs.softcap, of_rows, at_rows(upstream, rows))
            sums.add(gradient, hidden_CH, rows)
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
        if self._rows is None and self._bytes(problem, problem.rows) <= limit:
            return problem.rows
        fixed, a_row = self._bytes(problem, 0), self._bytes(problem, 1) - self._bytes(problem, 0)
        return max(1, (limit - fixed) // a_row)

    def _bytes(self, problem: Problem, rows: int) -> int:
        """Beside arguments, results and gradients, so many rows a chunk, copied where some are ignored."""
        size, wide, hidden = problem.dtype.itemsize, accumulation_dtype(problem.dtype).itemsize, problem.hidden or 1
        a_row = problem.vocab * (size + problem.softcap * wide) + hidden * size
        sums = 0
        if rows < problem.rows and problem.needs_grad and problem.weight_grad and size < wide:
            sums = (problem.vocab * wide + min(problem.vocab, BLOCK) * size) * hidden
        workspace = WORKSPACE if self._uses is None else WORKSPACE_OF_EAGER
        return workspace + rows * a_row + sums


class _Sums:
    """The gradients, a chunk of rows after another, in the accumulation dtype where there are several."""

    def __init__(self, inputs: HiddenInputs, needs: Needs, *, is_one: bool) -> None:
        hidden, weight, self._inputs, self._needs, self._is_one = inputs.hidden, inputs.weight, inputs, needs, is_one
        wide = accumulation_dtype(hidden.dtype)
        self._hidden = hidden.new_empty(hidden.shape) if needs.hidden else None
        self._bias = hidden.new_zeros(len(weight), dtype=wide) if needs.bias else None
        self._weight = None
        if needs.weight:
            self._weight = weight.new_empty(weight.shape) if is_one else weight.new_zeros(weight.shape, dtype=wide)

    def add(self, gradient_CV: Tensor, hidden_CH: Tensor, rows: slice) -> None:
        if self._hidden is not None:
            multiply(gradient_CV, self._inputs.weight, self._hidden[rows])
        if self._bias is not None:
            self._bias += gradient_CV.sum(0, dtype=self._bias.dtype)
        if self._weight is not None:
            (multiply if self._is_one else add_product)(gradient_CV.T, hidden_CH, self._weight)

    def gradients(self) -> Gradients:
        dtype = self._inputs.hidden.dtype
        weight, bias = (None if x is None else x.to(dtype) for x in (self._weight, self._bias))
        return Gradients(None if self._hidden is None else spread(self._hidden, self._inputs.counting), weight, bias)


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
