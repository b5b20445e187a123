"""From hidden states, a chunk at a time: the logits of some rows or columns, and what becomes of their gradient.

Shapes: N rows, of which C in a chunk and M count; H hidden size; V vocabulary.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from compiled_logprobs.operation.contract import Inputs, Upstream
from compiled_logprobs.operation.hidden import HiddenInputs
from compiled_logprobs.operation.products import multiply
from compiled_logprobs.problem import accumulation_dtype

PIECE = 2**20
"""Elements of which there is a copy at once, where a soft cap is undone or rows are put in their places."""


class Chunk(NamedTuple):
    """The logits of some rows, or of some columns."""

    z: Tensor
    """In the dtype of the hidden states."""
    inputs: Inputs
    """What a backend over logits is given: z with its cap, in the accumulation dtype where there is one, else z."""


class Scratch:
    """Memory in which one chunk after another is computed.

    Were it taken anew for each, what is allocated in between would lie in the holes, and a process would take more with
    each chunk.
    """

    def __init__(self, inputs: HiddenInputs, rows: int, columns: int, *, is_known: bool = False) -> None:
        """Have room for chunks of at most so many rows and columns, or for no product where it is known."""
        self._inputs, hidden, logits = inputs, inputs.hidden, rows * columns
        self._hidden = None if inputs.counting is None else hidden.new_empty(rows, hidden.shape[-1])
        self._z = hidden.new_empty(0 if is_known else logits)
        is_capped = inputs.softcap is not None
        self._x = hidden.new_empty(logits, dtype=accumulation_dtype(hidden.dtype)) if is_capped else None

    def hidden_of(self, rows: slice) -> Tensor:
        """[C, H], of the rows that count, until others are asked for."""
        return self._inputs.hidden_of(rows, self._hidden)

    def multiply(self, hidden_CH: Tensor, rows: slice, columns: slice = slice(None)) -> Chunk:
        """The logits [C, columns] of these rows, until the next ones are asked for."""
        inputs = self._inputs
        weight = inputs.weight[columns]
        z = self._z[: len(hidden_CH) * len(weight)].view(len(hidden_CH), len(weight))
        bias = None if inputs.bias is None else inputs.bias[columns]
        return self.cap(multiply(hidden_CH, weight.T, z, bias), rows)

    def cap(self, z: Tensor, rows: slice) -> Chunk:
        """The same, of a product that is known."""
        inputs, x = self._inputs, z
        if self._x is not None and inputs.softcap is not None:
            x = cap(z, inputs.softcap, self._x[: z.numel()].view(z.shape))
        t = inputs.temperature[rows] if isinstance(inputs.temperature, Tensor) else inputs.temperature
        return Chunk(z, Inputs(x, inputs.labels[rows], t, inputs.ignore_index))


def cap(z: Tensor, softcap: float, out: Tensor) -> Tensor:
    """c tanh(z / c), in `out`, whose dtype is the accumulation dtype: a division in half precision would round."""
    return out.copy_(z).div_(softcap).tanh_().mul_(softcap)


class Differentiates(Protocol):
    """What computes from logits, backward alone."""

    def backward(self, inputs: Inputs, stats: Tensor, upstream: Upstream, *, inplace: bool) -> Tensor: ...


def gradient_in_place(
    backend: Differentiates, chunk: Chunk, softcap: float | None, stats: Tensor, upstream: Upstream
) -> Tensor:
    """dz, over the memory of the chunk's z."""
    z, inputs = chunk
    gradient = backend.backward(inputs, stats, upstream, inplace=True)
    if softcap is None:
        return gradient
    step = max(1, PIECE // z.shape[-1])
    slope = torch.empty_like(gradient[:step])
    for start in range(0, len(z), step):
        piece = z[start : start + step]
        part = cap(piece, softcap, slope[: len(piece)]).div_(softcap).square_().neg_().add_(1.0)
        piece.copy_(part.mul_(gradient[start : start + step]))
    return z


def spread(gradient: Tensor, counting: Tensor | None) -> Tensor:
    """A gradient [N, H] whose first M rows are those of the rows that count, with each in its place and 0 elsewhere.

    In place, from behind: no row lies behind its place.
    """
    if counting is None:
        return gradient
    step = max(1, PIECE // gradient.shape[-1])
    for start in range((len(counting) - 1) // step * step, -1, -step):
        rows = slice(start, min(start + step, len(counting)))
        gradient.index_copy_(0, counting[rows], gradient[rows].clone())
    counts = torch.zeros(len(gradient), dtype=torch.bool, device=gradient.device).index_fill_(0, counting, True)
    return gradient.masked_fill_(~counts.unsqueeze(-1), 0.0)
