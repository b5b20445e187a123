"""The operation in plain torch: what `compiled` compiles and what a user's own graph inlines.

Shapes: ... leading dimensions (rows), V vocabulary, K labels a row.

With T the temperature, m the row maximum and d = (x - m) / T <= 0:

    log s      = log sum_v exp(d_v)                       s >= 1, since the maximum contributes exp(0)
    log p_y    = d_y - log s
    entropy    = log s - sum_v exp(d_v) d_v / s           a sum of terms that are all >= 0
    dx         = (g_y - p (sum_k g_k + h (log p + entropy))) / T

where g is the upstream gradient of the log-probabilities, g_y its part at the label, and h that of the entropy. Nothing
cancels: m and log s stay apart, because their sum would round a log-sum-exp of 1e4 to 1e-3, and the
subtraction comes before the division, so that a shift of the whole row costs nothing.

A row's maximum comes before its first exponential, which a compiler turns into two loops over the row. On a CPU a row
that was just read is still in its cache; `compiled_logprobs.backends.compiled_code` has forms for GPUs, which read it
once. Sums are taken in blocks, since one long float32 sum loses the tail of a row, and exponents are in bits: Inductor
stores each exponential that two sums share for a CPU, and not each power of two.
"""

import math

import torch
from torch import Tensor

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
from compiled_logprobs.problem import accumulation_dtype

BLOCK = 1024
"""Columns that are added up by themselves; as many as Inductor keeps in a GPU's registers (a persistent reduction)."""
WIDTH = 16
"""Numbers in the widest vector of a CPU. Of fewer columns Inductor takes the same one of several rows at a time, which
leaves some rows to be computed by other instructions, with other bits."""
LOG2_E = math.log2(math.e)
LN_2 = math.log(2.0)


def per_row(temperature: float | Tensor) -> float | Tensor:
    """The temperature in a shape that divides [..., V]."""
    return temperature.unsqueeze(-1) if isinstance(temperature, Tensor) and temperature.ndim else temperature


def finite(log_p: Tensor) -> Tensor:
    """Bounded from below, so that a probability of 0 times its logarithm counts 0 and not NaN.

    The bound changes no product: exp(-1000) is 0 in float64 already.
    """
    return log_p.clamp(min=-1000.0)


def forward(inputs: Inputs, wanted: Wanted) -> Results:
    """Finished results. The temperature of `inputs` may also be a 0-d tensor, and `ignore_index` one."""
    logits, rows = inputs.logits, clean(inputs)
    x, t = logits.to(accumulation_dtype(logits.dtype)), per_row(rows.temperature)
    m = x.amax(-1, keepdim=True)
    bits = LOG2_E / t
    d = [(part - m) * bits if part.ndim == m.ndim else (part - m.unsqueeze(-1)) * per_row(bits) for part in _split(x)]
    e = [part.exp2() for part in d]
    s = _sum(e, x.ndim - 1)
    log_s = _log(s)
    log_probs = (logits.gather(-1, rows.labels).to(x.dtype) - m) / t - log_s.unsqueeze(-1)
    entropy = first = sum_p_squared = None
    if wanted.entropy:
        q = _sum([ee * finite(dd) for ee, dd in zip(e, d, strict=True)], x.ndim - 1)
        entropy = log_s - q * LN_2 / s
    if wanted.argmax:
        columns = torch.arange(x.shape[-1], dtype=torch.int32, device=x.device)
        first = torch.where(x == m, columns, x.shape[-1]).amin(-1).to(torch.int64)
    if wanted.sum_p_squared:
        sum_p_squared = _sum([part * part for part in e], x.ndim - 1) / s / s
    return finish(rows, wanted, log_probs, m.squeeze(-1), log_s, entropy, first, sum_p_squared)


def backward(
    inputs: Inputs, stats: Tensor, upstream: Upstream, logits_at_labels: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient in the logits: one pointwise pass that leaves the labels out, and what belongs at the labels.

    `logits_at_labels` are [..., K] where the logits may be overwritten before they are gathered.

    Returns:
        gradient [..., V] in the dtype of the logits, right everywhere but in the label columns;
        the gradient at the label columns, [..., K], in the same dtype; and these columns, [..., K].
    """
    logits, rows = inputs.logits, clean(inputs)
    labels, upstream = rows.labels, clean_upstream(rows, upstream)
    m, log_s, *entropy = stats.unsqueeze(-1).unbind(0)
    inverse_t = 1.0 / per_row(rows.temperature)
    total, drop = weight_of_all(upstream), rows.dropped.unsqueeze(-1)

    def without_label_term(columns: Tensor) -> Tensor:
        log_p = (columns.to(m.dtype) - m) * inverse_t - log_s
        weight = total
        if upstream.entropy is not None:
            weight = total + upstream.entropy.unsqueeze(-1) * (finite(log_p) + entropy[0])
        return -(log_p.exp() * weight) * inverse_t

    gradient = without_label_term(logits).masked_fill(drop, 0.0).to(logits.dtype)
    label_term = upstream.log_probs
    if labels.shape[-1] > 1:
        # A repeated label writes the whole sum each time, so that the order of the writes does not matter.
        same_label = labels.unsqueeze(-1) == labels.unsqueeze(-2)
        label_term = torch.where(same_label, label_term.unsqueeze(-2), 0.0).sum(-1)
    at_labels = logits.gather(-1, labels) if logits_at_labels is None else logits_at_labels
    at_labels = without_label_term(at_labels) + label_term * inverse_t
    return gradient, at_labels.masked_fill(drop, 0.0).to(logits.dtype), labels


def write_label_columns(gradient: Tensor, labels: Tensor, at_labels: Tensor) -> None:
    """Write `at_labels` [..., K] into the columns `labels` [..., K] of `gradient` [..., V], in place."""
    # Indexed assignment: scatter_ walks the whole row of a bfloat16 tensor on CPU, some 500 times slower.
    rows = torch.meshgrid(*(torch.arange(n, device=labels.device) for n in labels.shape[:-1]), indexing="ij")
    gradient[(*(r.unsqueeze(-1) for r in rows), labels)] = at_labels


def _log(s: Tensor) -> Tensor:
    """The same bits for a number whatever stands beside it.

    On a CPU Inductor's logarithm of sixteen numbers at a time rounds otherwise than that of those which are left: in
    float64, where a difference is lost when it is rounded, once in some 10^8 numbers.
    """
    return s.double().log().to(s.dtype) if s.device.type == "cpu" else s.log()


def _split(x: Tensor) -> list[Tensor]:
    """`x` [..., V] as whole blocks [..., blocks, BLOCK] and the columns that are left, [..., columns], whichever there
    are: two tensors cost a compiler nothing, where padding would cost the time of an addition to each column."""
    vocab = x.shape[-1]
    whole = max(0, vocab - WIDTH) // BLOCK * BLOCK if vocab % BLOCK else vocab
    if not whole:
        return [x]
    blocks = x.narrow(-1, 0, whole).view(*x.shape[:-1], -1, BLOCK)
    return [blocks, x.narrow(-1, whole, vocab - whole)] if whole < vocab else [blocks]


def _sum(parts: list[Tensor], rows: int) -> Tensor:
    """[...], of as many dimensions as there are of `rows`: the sum of all columns, each block by itself first."""
    sums = [part.sum(-1) if part.ndim == rows + 1 else part.sum(-1).sum(-1) for part in parts]
    return sums[0] if len(sums) == 1 else sums[0] + sums[1]
