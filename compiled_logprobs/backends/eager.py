"""Plain torch, some rows at a time: a softmax and its gradient, written out.

The baseline: what every other backend is compared with. Chunks bound the float32 copies, and keep them in cache. The
exponentials are summed by torch.sum, which sums in blocks; torch.log_softmax adds them up one by one on a CPU, and
loses the tail of a long row.

Shapes: C rows of a chunk, V vocabulary, K labels a row.
"""

from collections.abc import Iterator
from itertools import product

import torch
from torch import Tensor

from compiled_logprobs.backends.base import Backend
from compiled_logprobs.operation.contract import (
    Inputs,
    Results,
    Upstream,
    Wanted,
    clean,
    clean_upstream,
    finish,
    weight_of_all,
)
from compiled_logprobs.operation.formula import finite, per_row
from compiled_logprobs.problem import accumulation_dtype

CHUNK_ELEMENTS = {"cpu": 2**20}
"""How many logits are upcast at once. On CPU a chunk stays in cache; elsewhere few launches matter more."""
CHUNK_ELEMENTS_ELSEWHERE = 2**26


class Eager(Backend):
    """Plain torch over chunks of rows."""

    name = "eager"
    summary = "plain torch, chunk by chunk of rows"
    # Not row_invariant: torch divides the sum of a lone row among threads, and on a GPU sums by the number of rows.

    def forward(self, inputs: Inputs, wanted: Wanted) -> Results:
        logits, rows = inputs.logits, clean(inputs)
        labels, leading = rows.labels, logits.shape[:-1]
        log_probs = logits.new_empty(labels.shape, dtype=accumulation_dtype(logits.dtype))
        m, log_s, *others = log_probs.new_empty(2 + wanted.entropy + wanted.sum_p_squared, *leading)
        argmax = labels.new_empty(leading) if wanted.argmax else None
        for chunk in row_chunks(logits):
            x_CV = logits[chunk]
            d_CV, m_C1 = _shifted(x_CV, _rows_of(rows.temperature, chunk))
            log_probs[chunk] = d_CV.gather(-1, labels[chunk])
            e_CV = d_CV.exp() if wanted.entropy else d_CV.exp_()
            s_C1 = e_CV.sum(-1, keepdim=True)
            log_s_C1 = s_C1.log()
            log_probs[chunk] -= log_s_C1
            m[chunk], log_s[chunk] = m_C1.squeeze(-1), log_s_C1.squeeze(-1)
            if wanted.entropy:
                others[0][chunk] = (log_s_C1 - (finite(d_CV).mul_(e_CV)).sum(-1, keepdim=True) / s_C1).squeeze(-1)
            if wanted.sum_p_squared:
                others[-1][chunk] = e_CV.div_(s_C1).square_().sum(-1)
            if argmax is not None:
                argmax[chunk] = x_CV.argmax(-1)
        entropy = others[0] if wanted.entropy else None
        return finish(rows, wanted, log_probs, m, log_s, entropy, argmax, others[-1] if others else None)

    def backward(self, inputs: Inputs, stats: Tensor, upstream: Upstream, *, inplace: bool) -> Tensor:
        logits, rows = inputs.logits, clean(inputs)
        upstream = clean_upstream(rows, upstream)
        weights = weight_of_all(upstream)
        gradient = logits if inplace else torch.empty_like(logits, memory_format=torch.contiguous_format)
        for chunk in row_chunks(logits):
            t = per_row(_rows_of(rows.temperature, chunk))
            log_p_CV = logits[chunk].to(stats.dtype) - stats[0][chunk].unsqueeze(-1)
            log_p_CV = _divided(log_p_CV, t).sub_(stats[1][chunk].unsqueeze(-1))
            weight = weights[chunk]
            if upstream.entropy is not None:
                h_C1, entropy_C1 = upstream.entropy[chunk].unsqueeze(-1), stats[2][chunk].unsqueeze(-1)
                weight = finite(log_p_CV).add_(entropy_C1).mul_(h_C1).add_(weight)
            gradient_CV = log_p_CV.exp_().mul_(weight).neg_()
            gradient_CV.scatter_add_(-1, rows.labels[chunk], upstream.log_probs[chunk])
            gradient[chunk] = _divided(gradient_CV, t).masked_fill_(rows.dropped[chunk].unsqueeze(-1), 0.0)
        return gradient


def row_chunks(logits: Tensor) -> Iterator[tuple[int | slice, ...]]:
    """Indices that together cover the rows of `logits`, each of at most the chunk's size or one row."""
    elements = CHUNK_ELEMENTS.get(logits.device.type, CHUNK_ELEMENTS_ELSEWHERE)
    step = max(1, elements // logits.shape[-1])
    for outer in product(*(range(n) for n in logits.shape[:-2])):
        for start in range(0, logits.shape[-2], step):
            yield (*outer, slice(start, start + step))


def _shifted(x_CV: Tensor, temperature: float | Tensor) -> tuple[Tensor, Tensor]:
    """(x - m) / T, new, in the accumulation dtype; and m, [C, 1]."""
    x_CV = x_CV.to(accumulation_dtype(x_CV.dtype))
    m_C1 = x_CV.amax(-1, keepdim=True)
    return _divided(x_CV - m_C1, per_row(temperature)), m_C1


def _divided(values: Tensor, temperature: float | Tensor) -> Tensor:
    """`values`, divided in place."""
    return values if isinstance(temperature, float) and temperature == 1.0 else values.div_(temperature)


def _rows_of(temperature: float | Tensor, chunk: tuple[int | slice, ...]) -> float | Tensor:
    return temperature[chunk] if isinstance(temperature, Tensor) else temperature
