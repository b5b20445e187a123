"""What a backend is given and what it returns, and the contract's rules for one whose kernels do not know them.

Shapes: ... leading dimensions (rows), V vocabulary, K labels a row.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from compiled_logprobs.problem import Problem


class Inputs(NamedTuple):
    """What both directions are computed from."""

    logits: Tensor
    """[..., V], two dimensions or more, a unit last stride, at least one row."""
    labels: Tensor
    """[..., K] int64 or int32, contiguous: in [0, V), `ignore_index`, or neither, which makes the row NaN."""
    temperature: float | Tensor
    """A positive number, or [...] contiguous in the accumulation dtype; whose values may be bad: their rows are NaN."""
    ignore_index: int


class Wanted(NamedTuple):
    """What forward returns beside the log-probabilities."""

    entropy: bool = False
    logsumexp: bool = False
    argmax: bool = False
    sum_p_squared: bool = False


def wanted_by(problem: Problem) -> Wanted:
    """What `problem` asks for."""
    return Wanted(problem.entropy, problem.logsumexp, problem.argmax, problem.sum_p_squared)


class Results(NamedTuple):
    """What forward returns, finished, in the accumulation dtype; None for what was not wanted.

    A row all of whose labels are ignored has 0 everywhere, and argmax -1; an invalid one NaN, and argmax -1, but 0 at
    the labels that are ignored.
    """

    log_probs: Tensor
    """[..., K], in nats, never positive."""
    stats: Tensor
    """[2, ...], or [3, ...] with the entropy: all that a backward, of any backend, needs of a row. The row maximum m;
    log s, the logarithm of the sum of exp((x - m) / T); and the entropy. Of a row that is all -inf m is that, and of
    one that holds NaN not. No other result shares its memory."""
    entropy: Tensor | None = None
    """[...], in nats, never negative."""
    logsumexp: Tensor | None = None
    """[...], in nats: m / T + log s."""
    argmax: Tensor | None = None
    """[...] int64: the first column that holds the maximum."""
    sum_p_squared: Tensor | None = None
    """[...]: the sum of the squares of the probabilities."""


def in_dtype(result: Tensor, dtype: torch.dtype) -> Tensor:
    """A result as it is returned to a caller who asked for `dtype`: a column stays an integer."""
    return result.to(dtype) if result.is_floating_point() else result


class Upstream(NamedTuple):
    """The gradients that come from above, contiguous, in the accumulation dtype; None where none comes."""

    log_probs: Tensor
    """[..., K]; at ignored labels it may hold anything."""
    entropy: Tensor | None = None
    """[...]"""
    logsumexp: Tensor | None = None
    """[...]"""


class Clean(NamedTuple):
    """Inputs that are safe to compute with, and what their results are replaced by afterwards."""

    labels: Tensor
    """[..., K] int64 in [0, V)."""
    temperature: float | Tensor
    """Positive and finite."""
    ignored: Tensor
    """[..., K] bool: labels that count 0."""
    dropped: Tensor
    """[...] bool: rows that count 0, since all their labels are ignored."""
    invalid: Tensor
    """[...] bool: rows that are NaN."""


def clean(inputs: Inputs, vocab: int | None = None) -> Clean:
    """Bring labels and temperatures into range; labels into that of `vocab`, where the logits are a part of it."""
    labels = inputs.labels.to(torch.int64)
    ignored = labels == inputs.ignore_index
    in_range = labels.clamp(0, (vocab or inputs.logits.shape[-1]) - 1)
    outside = (in_range != labels) & (labels != inputs.ignore_index)
    one = labels.shape[-1] == 1  # of which a reduction would be a launch for nothing
    invalid = outside.squeeze(-1) if one else outside.any(-1)
    t = inputs.temperature
    if isinstance(t, Tensor) and t.ndim:
        limits = torch.finfo(torch.float32)
        usable = (t >= limits.tiny) & (t <= limits.max)
        invalid = invalid | usable.logical_not()
        t = torch.where(usable, t, 1.0)
    return Clean(in_range, t, ignored, ignored.squeeze(-1) if one else ignored.all(-1), invalid)


def finish(
    rows: Clean,
    wanted: Wanted,
    log_probs: Tensor,
    m: Tensor,
    log_s: Tensor,
    entropy: Tensor | None = None,
    argmax: Tensor | None = None,
    sum_p_squared: Tensor | None = None,
) -> Results:
    """Results from what was computed of clean inputs: [..., K] log-probabilities, the others [...].

    Only what is wanted is looked at of the last three.
    """

    def of_row(values: Tensor) -> Tensor:
        return values.masked_fill(rows.invalid, torch.nan).masked_fill(rows.dropped, 0.0)

    log_probs = log_probs.clamp(max=0.0).masked_fill(rows.invalid.unsqueeze(-1), torch.nan)
    kept = [m, log_s]
    if wanted.entropy:
        assert entropy is not None
        entropy = of_row(entropy.clamp(min=0.0))
        kept.append(entropy)
    if wanted.argmax:
        assert argmax is not None
        argmax = argmax.masked_fill(log_s.isnan() | rows.invalid | rows.dropped, -1)
    return Results(
        log_probs.masked_fill(rows.ignored, 0.0),
        torch.stack(kept),
        entropy if wanted.entropy else None,
        of_row(m / rows.temperature + log_s) if wanted.logsumexp else None,
        argmax if wanted.argmax else None,
        of_row(sum_p_squared) if wanted.sum_p_squared and sum_p_squared is not None else None,
    )


def clean_upstream(rows: Clean, upstream: Upstream) -> Upstream:
    """0 where a label is ignored, NaN where a row is invalid; that of the logsumexp is then for who has a use for it.

    The gradient of a row that is dropped has to be made 0 afterwards: 0 times a NaN among its logits is none.
    """
    g = upstream.log_probs.masked_fill(rows.ignored, 0.0).masked_fill(rows.invalid.unsqueeze(-1), torch.nan)
    return Upstream(g, upstream.entropy, upstream.logsumexp)


def weight_of_all(upstream: Upstream) -> Tensor:
    """[..., 1]: by which the probabilities of a row are weighted in its gradient, the entropy's part left out."""
    total = upstream.log_probs.sum(-1, keepdim=True) if upstream.log_probs.shape[-1] > 1 else upstream.log_probs
    return total if upstream.logsumexp is None else total - upstream.logsumexp.unsqueeze(-1)
