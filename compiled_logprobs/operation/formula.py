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

There are two forms of each direction, of which `compiled` takes one for a device:

* `forward_at_once` and `backward_at_once` need the whole row's maximum before the first exponential, which a compiler
  turns into two loops over the row. On a CPU these are the faster ones, and a row that was just read is still in its
  cache.
* `forward_in_blocks` and `gradient` are for GPUs: a block of the row is read once, while it lies in registers.
"""

import math
from typing import NamedTuple

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
"""Columns that `forward_in_blocks` reads at a time: as many as Inductor keeps in registers (a persistent reduction)."""
LOG2_E = math.log2(math.e)
LN_2 = math.log(2.0)


class Computed(NamedTuple):
    """What is computed of clean inputs, in float32 (float64 for float64 logits)."""

    log_probs: Tensor
    """[..., K], in nats."""
    entropy: Tensor | None
    """[...], in nats; None where it was not asked for."""
    residuals: tuple[Tensor, ...]
    """What the backward needs of each row."""


class Saved(NamedTuple):
    """What the forward leaves for the backward: its arguments, and what it found."""

    logits: Tensor
    """[..., V]."""
    labels: Tensor
    """[..., K] int64 in [0, V)."""
    temperature: float | Tensor
    residuals: tuple[Tensor, ...]
    """As forward returned them."""
    ignored: Tensor
    """[...] bool: rows whose gradient is exactly 0, whatever they hold."""


def per_row(temperature: float | Tensor) -> float | Tensor:
    """The temperature in a shape that divides [..., V]."""
    return temperature.unsqueeze(-1) if isinstance(temperature, Tensor) and temperature.ndim else temperature


def finite(log_p: Tensor) -> Tensor:
    """Bounded from below, so that a probability of 0 times its logarithm counts 0 and not NaN.

    The bound changes no product: exp(-1000) is 0 in float64 already.
    """
    return log_p.clamp(min=-1000.0)


def forward(inputs: Inputs, wanted: Wanted) -> Results:
    """Finished results, as a user's graph inlines them."""
    rows = clean(inputs)
    log_probs, entropy, (m, log_s, *_) = forward_at_once(
        inputs.logits, rows.labels, rows.temperature, entropy=wanted.entropy
    )
    argmax = inputs.logits.argmax(-1) if wanted.argmax else None
    sum_p_squared = None
    if wanted.sum_p_squared:
        d = (inputs.logits.to(m.dtype) - m) * (1.0 / per_row(rows.temperature))
        sum_p_squared = (2.0 * (d - log_s)).exp().sum(-1)
    return finish(rows, wanted, log_probs, m.squeeze(-1), log_s.squeeze(-1), entropy, argmax, sum_p_squared)


def backward(inputs: Inputs, stats: Tensor, upstream: Upstream) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient [..., V] but for the label columns, and what belongs there: values and columns, [..., K]."""
    rows = clean(inputs)
    residuals = tuple(stats.unsqueeze(-1).unbind(0))
    saved = Saved(inputs.logits, rows.labels, rows.temperature, residuals, rows.dropped)
    gradient, at_labels = backward_at_once(saved, clean_upstream(rows, upstream))
    return gradient, at_labels, rows.labels


def forward_at_once(logits: Tensor, labels: Tensor, temperature: float | Tensor, *, entropy: bool) -> Computed:
    """Log-probabilities, entropy, and the row statistics that the backward needs.

    Args:
        logits: [..., V].
        labels: [..., K] int64 in [0, V).
        temperature: a number, or a tensor [] or [...] in the accumulation dtype.
        entropy: whether to compute the entropy.

    Returns:
        With the residuals m [..., 1], log s [..., 1] and, if computed, the entropy [..., 1].
    """
    x = logits.to(accumulation_dtype(logits.dtype))
    t = per_row(temperature)
    # An amax that keeps its dimension, a subtraction, an exp and a sum are what Inductor fuses into one online-softmax
    # read.
    m = x.amax(-1, keepdim=True)
    d = (x - m) * (1.0 / t)
    e = d.exp()
    s = e.sum(-1, keepdim=True)
    log_s = s.log()
    log_probs = (logits.gather(-1, labels).to(x.dtype) - m) / t - log_s
    if not entropy:
        return Computed(log_probs, None, (m, log_s))
    h = log_s - (e * finite(d)).sum(-1, keepdim=True) / s
    return Computed(log_probs, h.squeeze(-1), (m, log_s, h))


def forward_in_blocks(logits: Tensor, labels: Tensor, temperature: float | Tensor, *, entropy: bool) -> Computed:
    """As `forward_at_once`, in two levels: each block of `BLOCK` columns by itself, then the blocks of a row together.

    With B a block, m_B its maximum and d_B = (x - m_B) / T:

        s_B = sum_B exp(d_B)                       w_B = exp((m_B - m) / T) <= 1
        q_B = sum_B exp(d_B) d_B <= 0              s   = sum_B w_B s_B
        sum_v exp(d_v) d_v = sum_B w_B (q_B + s_B (m_B - m) / T)

    All terms of a sum have one sign, so that nothing cancels here either. The logits are read once, with or without the
    entropy, and each costs one exponential: a sum that follows a running maximum through the row costs two. What the
    first level leaves for the second is two or three numbers a block. Exponents are in bits, for exp2 is a GPU's own
    instruction.
    """
    x = logits.to(accumulation_dtype(logits.dtype))
    inverse_t = 1.0 / per_row(temperature)
    bits = inverse_t * LOG2_E
    vocab = x.shape[-1]
    blocks = -(-vocab // BLOCK)
    if vocab % BLOCK:
        # No copy: it is fused, as a load with a mask.
        x = torch.nn.functional.pad(x, (0, blocks * BLOCK - vocab), value=-torch.inf)
    x = x.view(*x.shape[:-1], blocks, BLOCK)
    block_m = x.amax(-1, keepdim=True)
    # A block that is all -inf has the sum 0; subtracting its maximum would make that NaN. Its weight is 0, too, unless
    # the row is all -inf: there the subtraction of m, below, gives the NaN that is due.
    d = (x - block_m.masked_fill(block_m == -torch.inf, 0.0)) * _unsqueezed(bits)
    e = d.exp2()
    block_s = e.sum(-1)
    block_m = block_m.squeeze(-1)
    m = block_m.amax(-1, keepdim=True)
    shift = (block_m - m) * bits
    weight = shift.exp2()
    weighted_s = weight * block_s
    s = weighted_s.sum(-1, keepdim=True)
    log_s = s.log()
    log_probs = (_at(logits, labels).to(m.dtype) - m) * inverse_t - log_s
    if not entropy:
        return Computed(log_probs, None, (m, log_s))
    block_q = (e * finite(d)).sum(-1)
    q = (weight * block_q + weighted_s * finite(shift)).sum(-1, keepdim=True)
    h = log_s - q * LN_2 / s
    return Computed(log_probs, h.squeeze(-1), (m, log_s, h))


def gradient(saved: Saved, upstream: Upstream) -> Tensor:
    """The gradient in the logits, [..., V] in their dtype, in one pointwise pass for one label a row.

    With K = 1. A GPU waits for memory here, and compares each column with the label meanwhile.
    """
    logits, labels, temperature, residuals, ignored = saved
    m, log_s = residuals[:2]
    inverse_t = 1.0 / per_row(temperature)
    log2_p = (logits.to(m.dtype) - m) * (inverse_t * LOG2_E) - log_s * LOG2_E
    weight = weight_of_all(upstream)
    if upstream.entropy is not None:
        weight = weight + upstream.entropy.unsqueeze(-1) * (finite(log2_p) * LN_2 + residuals[2])
    columns = torch.arange(logits.shape[-1], dtype=torch.int32, device=logits.device)
    at_label = torch.where(columns == labels.to(torch.int32), upstream.log_probs, 0.0)
    whole = (at_label - log2_p.exp2() * weight) * inverse_t
    return whole.masked_fill(ignored.unsqueeze(-1), 0.0).to(logits.dtype)


def backward_at_once(saved: Saved, upstream: Upstream) -> tuple[Tensor, Tensor]:
    """The gradient in the logits: one pointwise pass that leaves the labels out, and the values at the labels.

    Returns:
        gradient [..., V] in the dtype of `logits`, right everywhere but in the label columns; and
        the gradient at the label columns, [..., K], in the same dtype, for `write_label_columns`.
    """
    logits, labels, temperature, residuals, ignored = saved
    m, log_s = residuals[:2]
    t = per_row(temperature)
    inverse_t = 1.0 / t
    total = weight_of_all(upstream)
    drop = ignored.unsqueeze(-1)

    def without_label_term(columns: Tensor) -> Tensor:
        log_p = (columns.to(m.dtype) - m) * inverse_t - log_s
        weight = total
        if upstream.entropy is not None:
            weight = total + upstream.entropy.unsqueeze(-1) * (finite(log_p) + residuals[2])
        return -(log_p.exp() * weight) * inverse_t

    gradient = without_label_term(logits).masked_fill(drop, 0.0).to(logits.dtype)
    # A repeated label writes the whole sum each time, so that the order of the writes does not matter.
    same_label = labels.unsqueeze(-1) == labels.unsqueeze(-2)
    label_term = (
        upstream.log_probs.unsqueeze(-2).expand_as(same_label).masked_fill(same_label.logical_not(), 0.0).sum(-1)
        * inverse_t
    )
    at_labels = without_label_term(logits.gather(-1, labels)) + label_term
    return gradient, at_labels.masked_fill(drop, 0.0).to(logits.dtype)


def write_label_columns(gradient: Tensor, labels: Tensor, at_labels: Tensor) -> None:
    """Write `at_labels` [..., K] into the columns `labels` [..., K] of `gradient` [..., V], in place."""
    # Indexed assignment: scatter_ walks the whole row of a bfloat16 tensor on CPU, some 500 times slower.
    rows = torch.meshgrid(*(torch.arange(n, device=labels.device) for n in labels.shape[:-1]), indexing="ij")
    gradient[(*(r.unsqueeze(-1) for r in rows), labels)] = at_labels


def _unsqueezed(number: float | Tensor) -> float | Tensor:
    return number.unsqueeze(-1) if isinstance(number, Tensor) and number.ndim else number


_INDEX = getattr(torch.ops.aten, "_unsafe_index", torch.ops.aten.index)


def _at(logits: Tensor, labels: Tensor) -> Tensor:
    """`logits` [..., V] at `labels` [..., K], which are in range: unlike gather, compiled without an assertion on the
    device."""
    rows = torch.meshgrid(*(torch.arange(n, device=labels.device) for n in labels.shape[:-1]), indexing="ij")
    picked: Tensor = _INDEX(logits, [*(r.unsqueeze(-1) for r in rows), labels])
    return picked
