"""Chunks of the vocabulary: of each, the product of all rows; backward computes it again, a chunk at a time.

Each block of the weight's gradient is one product over all rows, so that no sum of it has to be held: what is added up
is the gradient in the hidden states.

Shapes: N rows; H hidden size; V vocabulary, B of a chunk; K labels a row.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from compiled_logprobs.backends.base import HiddenBackend
from compiled_logprobs.operation.chunks import Scratch, gradient_in_place, spread
from compiled_logprobs.operation.contract import Inputs, Results, Upstream, Wanted, clean
from compiled_logprobs.operation.hidden import Gradients, HiddenInputs, LogitsBackend, Needs
from compiled_logprobs.operation.products import BLOCK, add_product, multiply
from compiled_logprobs.operation.shards import Columns, highest, of_whole_rows, sums_of
from compiled_logprobs.problem import Problem, accumulation_dtype, of_logits

ELEMENTS = {"cpu": 2**24}
"""Logits of a chunk."""
ELEMENTS_ELSEWHERE = 2**27
LEAST = 128
"""Columns; chunks are multiples of it, so that they lie as well in memory as the weight does."""
WORKSPACE = 2**24
"""Bytes that a product, or a backend over logits, may take beside them."""
MIB = 2**20


class ChunkedVocab(HiddenBackend):
    """Chunks of columns, as many as the memory leaves room for."""

    name = "chunked_vocab"
    summary = "a part of the vocabulary at a time, whose logits backward computes again"

    def why_not(self, problem: Problem) -> str | None:
        least = self.least_memory(problem)
        if least is None:
            return f"it has no more than {LEAST} columns"
        if problem.memory_limit is not None and least > problem.memory_limit:
            return f"it takes {least / MIB:.1f} MiB, and may take {problem.memory_limit / MIB:.1f}"
        return None

    def least_memory(self, problem: Problem) -> int | None:
        return self._bytes(problem, LEAST) if problem.vocab > LEAST else None

    def forward(
        self, inputs: HiddenInputs, wanted: Wanted, logits_backend: LogitsBackend, *, keep: bool
    ) -> tuple[Results, None]:
        all_rows = slice(0, len(inputs.labels))
        parts: list[Results] = []
        here: list[Tensor] = []
        argmax: Tensor | None = None
        chunks = list(self._chunks(inputs))
        scratch = Scratch(inputs, len(inputs.labels), chunks[0].stop)
        hidden_NH = scratch.hidden_of(all_rows)
        for columns in chunks:
            chunk = scratch.multiply(hidden_NH, all_rows, columns)
            part, is_here = self._of(columns, inputs, logits_backend).forward(chunk.inputs, wanted)
            if part.argmax is not None:
                first = part.argmax + columns.start
                argmax = first if argmax is None else torch.where(part.stats[0] > _highest(parts), first, argmax)
            parts.append(part)
            here.append(is_here)
        rows = clean(Inputs(hidden_NH, inputs.labels, inputs.temperature, inputs.ignore_index), len(inputs.weight))
        top = _highest(parts)
        of_parts = (
            torch.cat(sums_of(rows, part, is_here, wanted)(top)) for part, is_here in zip(parts, here, strict=True)
        )
        return of_whole_rows(rows, wanted, top, torch.stack(list(of_parts)).sum(0), argmax), None

    def backward(
        self,
        inputs: HiddenInputs,
        stats: Tensor,
        kept: Any,
        upstream: Upstream,
        logits_backend: LogitsBackend,
        needs: Needs,
    ) -> Gradients:
        all_rows, weight, bias = slice(0, len(inputs.labels)), inputs.weight, inputs.bias
        of_weight = torch.empty_like(weight, memory_format=torch.contiguous_format) if needs.weight else None
        of_bias = torch.empty_like(bias) if needs.bias and bias is not None else None
        wide = accumulation_dtype(inputs.hidden.dtype)
        of_hidden = inputs.hidden.new_empty(inputs.hidden.shape) if needs.hidden else None
        of_rows = None if of_hidden is None else of_hidden[all_rows].to(wide).zero_()
        chunks = list(self._chunks(inputs))
        scratch = Scratch(inputs, len(inputs.labels), chunks[0].stop)
        hidden_NH = scratch.hidden_of(all_rows)
        for columns in chunks:
            chunk, serving = scratch.multiply(hidden_NH, all_rows, columns), self._of(columns, inputs, logits_backend)
            gradient_NB = gradient_in_place(serving, chunk, inputs.softcap, stats, upstream)
            if of_weight is not None:
                multiply(gradient_NB.T, hidden_NH, of_weight[columns])
            if of_bias is not None:
                of_bias[columns] = gradient_NB.sum(0, dtype=wide)
            if of_rows is not None:
                add_product(gradient_NB, weight[columns], of_rows)
        if of_hidden is not None and of_rows is not None:
            if of_rows.dtype != of_hidden.dtype:
                of_hidden[all_rows] = of_rows
            spread(of_hidden, inputs.counting)
        return Gradients(of_hidden, of_weight, of_bias)

    def _chunks(self, inputs: HiddenInputs) -> Iterator[slice]:
        vocab, step = len(inputs.weight), self._columns(inputs.problem)
        return (slice(start, min(start + step, vocab)) for start in range(0, vocab, step))

    def _columns(self, problem: Problem) -> int:
        columns = ELEMENTS.get(problem.device_type, ELEMENTS_ELSEWHERE) // max(1, problem.rows)
        if problem.memory_limit is not None:
            fixed, a_column = self._bytes(problem, 0), self._bytes(problem, 1) - self._bytes(problem, 0)
            columns = min(columns, (problem.memory_limit - fixed) // max(1, a_column))
        return max(LEAST, columns // LEAST * LEAST)

    @staticmethod
    def _of(columns: slice, inputs: HiddenInputs, logits_backend: LogitsBackend) -> Columns:
        width = columns.stop - columns.start
        problem = of_logits(inputs.problem, len(inputs.labels), width)._replace(logsumexp=True)
        return Columns(logits_backend(problem), columns.start, width, len(inputs.weight))

    @staticmethod
    def _bytes(problem: Problem, columns: int) -> int:
        """Beside arguments, results and gradients, with so many columns a chunk."""
        size, wide, hidden = problem.dtype.itemsize, accumulation_dtype(problem.dtype).itemsize, problem.hidden or 1
        copied = problem.rows * hidden * size  # where some are ignored
        sums = 0
        if problem.needs_grad and size < wide:
            sums = (problem.rows * wide + min(problem.rows, BLOCK) * size) * hidden
        return WORKSPACE + problem.rows * columns * (size + problem.softcap * wide) + copied + sums


def _highest(parts: list[Results]) -> Tensor:
    """[N]: the maxima of the rows, as far as `parts` go."""
    return torch.stack([highest(part.stats[0]) for part in parts]).amax(0)


CHUNKED_VOCAB = ChunkedVocab()
