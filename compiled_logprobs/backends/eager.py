"""Plain torch, some rows at a time: torch's own log_softmax, and its gradient written out.

The baseline: what every other backend is compared with. Chunks bound the float32 copies, and keep them in cache.

Shapes: C rows of a chunk, V vocabulary, K labels a row.
"""

from collections.abc import Iterator
from itertools import product

import torch
from torch import Tensor

from compiled_logprobs.backends.base import Backend
from compiled_logprobs.operation.formula import Computed, Saved, Upstream, finite, per_row
from compiled_logprobs.problem import accumulation_dtype

CHUNK_ELEMENTS = {"cpu": 2**20}
"""How many logits are upcast at once. On CPU a chunk stays in cache; elsewhere few launches matter more."""
CHUNK_ELEMENTS_ELSEWHERE = 2**26


class Eager(Backend):
    """torch.log_softmax over chunks of rows."""

    name = "eager"
    summary = "plain torch: log_softmax over chunks of rows"
    # Not row_invariant: torch divides the sum of a lone row among threads, and on a GPU sums by the number of rows.

    def forward(self, logits: Tensor, labels: Tensor, temperature: float | Tensor, *, entropy: bool) -> Computed:
        results = logits.new_empty(labels.shape, dtype=accumulation_dtype(logits.dtype))
        entropies = results.new_empty(labels.shape[:-1]) if entropy else None
        for chunk in row_chunks(logits):
            log_p_CV = _log_softmax(logits[chunk], _rows_of(temperature, chunk))
            results[chunk] = log_p_CV.gather(-1, labels[chunk])
            if entropies is not None:
                entropies[chunk] = -(log_p_CV.exp() * finite(log_p_CV)).sum(-1)
        return Computed(results, entropies, () if entropies is None else (entropies,))

    def backward(self, saved: Saved, upstream: Upstream, *, inplace: bool) -> Tensor:
        logits, labels, temperature, residuals, ignored = saved
        gradient = logits if inplace else torch.empty_like(logits, memory_format=torch.contiguous_format)
        for chunk in row_chunks(logits):
            t = _rows_of(temperature, chunk)
            log_p_CV = _log_softmax(logits[chunk], t)
            weight = upstream.log_probs[chunk].sum(-1, keepdim=True)
            if upstream.entropy is not None:
                weight = weight + upstream.entropy[chunk].unsqueeze(-1) * (
                    finite(log_p_CV) + residuals[0][chunk].unsqueeze(-1)
                )
            gradient_CV = log_p_CV.exp_().mul_(weight).neg_()
            gradient_CV.scatter_add_(-1, labels[chunk], upstream.log_probs[chunk])
            gradient_CV.div_(per_row(t)).masked_fill_(ignored[chunk].unsqueeze(-1), 0.0)
            gradient[chunk] = gradient_CV
        return gradient


def row_chunks(logits: Tensor) -> Iterator[tuple[int | slice, ...]]:
    """Indices that together cover the rows of `logits`, each of at most the chunk's size or one row."""
    elements = CHUNK_ELEMENTS.get(logits.device.type, CHUNK_ELEMENTS_ELSEWHERE)
    step = max(1, elements // logits.shape[-1])
    for outer in product(*(range(n) for n in logits.shape[:-2])):
        for start in range(0, logits.shape[-2], step):
            yield (*outer, slice(start, start + step))


def _log_softmax(logits_CV: Tensor, temperature: float | Tensor) -> Tensor:
    """A new tensor in the accumulation dtype."""
    x_CV = logits_CV.to(accumulation_dtype(logits_CV.dtype))
    if not (isinstance(temperature, float) and temperature == 1.0):
        x_CV = x_CV / per_row(temperature)
    return torch.log_softmax(x_CV, -1)


def _rows_of(temperature: float | Tensor, chunk: tuple[int | slice, ...]) -> float | Tensor:
    return temperature[chunk] if isinstance(temperature, Tensor) else temperature
