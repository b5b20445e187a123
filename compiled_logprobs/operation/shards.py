"""A vocabulary in parts, of one rank after another or split over ranks: what backends compute of them, put together.

The statistics of a part have the form of those of a row, whichever backend they are from, and say all that the other
ranks need to know of it. With m and log s those of a part, M the largest m, and all sums over the parts:

    u          = s exp((m - M) / T)                                              S = sum u, the s of the whole row
    log p_y    = (x_y - M) / T - log S                                           x_y from the rank that has it
    entropy    = log S - sum u (log s - entropy of the part + (m - M) / T) / S
    sum of p^2 = sum u^2 (that of the part) / S^2

With the statistics of the whole row each rank has the gradient of its part.

Shapes: ... leading dimensions (rows), V columns of this rank, K labels a row.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed

from compiled_logprobs.errors import InputError
from compiled_logprobs.operation.autograd import ForwardBackward
from compiled_logprobs.operation.contract import Clean, Inputs, Results, Upstream, Wanted, clean, finish
from compiled_logprobs.operation.formula import finite
from compiled_logprobs.operation.hidden import FromHidden, Gradients, HiddenInputs, LogitsBackend, Needs
from compiled_logprobs.problem import accumulation_dtype

IGNORED = -100
"""What is no column, unlike an `ignore_index` that may be one."""


class Columns:
    """Some columns of the vocabulary, as a backend of the whole rows: `backend` computes them.

    Labels, upstream gradients and statistics are those of the whole rows.
    """

    def __init__(self, backend: ForwardBackward, start: int, columns: int, vocab: int) -> None:
        """Take columns [start, start + columns) of `vocab`. Where `columns` is 0, the logits are one column of -inf."""
        self._backend, self._span = backend, Span(start, columns, vocab)

    def forward(self, inputs: Inputs, wanted: Wanted) -> tuple[Clean, Results, Tensor]:
        """The rows; what the backend makes of these columns; and which labels are among them, [..., K]."""
        rows = clean(inputs, self._span.vocab)
        labels, is_here = self._span.labels(rows)
        local = inputs._replace(labels=labels, ignore_index=IGNORED)
        return rows, self._backend.forward(local, wanted._replace(logsumexp=True)), is_here

    def backward(self, inputs: Inputs, stats: Tensor, upstream: Upstream, *, inplace: bool) -> Tensor:
        """The gradient in these columns."""
        rows = clean(inputs, self._span.vocab)
        labels, is_here = self._span.labels(rows)
        local = inputs._replace(labels=labels, ignore_index=IGNORED)
        return self._backend.backward(local, stats, upstream_of(upstream, rows, is_here), inplace=inplace)


class Span(NamedTuple):
    """Which columns they are."""

    start: int
    columns: int
    vocab: int

    def labels(self, rows: Clean) -> tuple[Tensor, Tensor]:
        """What a backend is given, any label that is elsewhere being the first column; and which are here."""
        columns = rows.labels - self.start
        is_here = (columns >= 0) & (columns < self.columns) & ~rows.ignored
        return columns.masked_fill(~is_here, 0).masked_fill(rows.ignored, IGNORED), is_here


def upstream_of(upstream: Upstream, rows: Clean, is_here: Tensor) -> Upstream:
    """The gradients that come to a part from above."""
    # What weights the probabilities of a row, but has no column here, goes the way of the logsumexp.
    elsewhere = upstream.log_probs.masked_fill(is_here | rows.ignored, 0.0).sum(-1)
    of_logsumexp = -elsewhere if upstream.logsumexp is None else upstream.logsumexp - elsewhere
    return Upstream(upstream.log_probs.masked_fill(~is_here, 0.0), upstream.entropy, of_logsumexp)


def highest(m: Tensor) -> Tensor:
    """Maxima of parts for a maximum over these, which may lose a NaN: infinity makes the row one, too."""
    return m.masked_fill(m.isnan(), math.inf)


def sums_of(rows: Clean, part: Results, is_here: Tensor, wanted: Wanted, top: Tensor) -> Tensor:
    """[S, ...]: what is added up over the parts. u; (x_y - M) / T of each label; then, as far as they are wanted,
    u (log s - entropy + (m - M) / T) and u^2 times the sum of the squares.

    In float64, since a few roundings more would show; these are few numbers.
    """
    m, log_s = part.stats[0], part.stats[1].double()
    is_empty = m == -math.inf
    t = rows.temperature.double() if isinstance(rows.temperature, Tensor) else rows.temperature
    below = ((m.double() - top) / t).masked_fill(is_empty, -math.inf)
    of_labels = (part.log_probs + (log_s + below).unsqueeze(-1)).masked_fill(is_empty.unsqueeze(-1), -math.inf)
    log_s = log_s.masked_fill(is_empty, 0.0)
    u = (log_s + below).exp()
    sums = [u, *of_labels.masked_fill(~is_here, 0.0).unbind(-1)]
    if wanted.entropy:
        assert part.entropy is not None
        sums.append((u * (log_s - part.entropy + finite(below))).masked_fill(is_empty, 0.0))
    if wanted.sum_p_squared:
        assert part.sum_p_squared is not None
        sums.append((u.square() * part.sum_p_squared).masked_fill(is_empty, 0.0))
    return torch.stack(sums)


def of_whole_rows(rows: Clean, wanted: Wanted, top: Tensor, sums: Tensor, argmax: Tensor | None = None) -> Results:
    """Results from `sums_of` all parts together, with `top` M in the accumulation dtype."""
    labels = rows.labels.shape[-1]
    s, of_labels, others = sums[0], sums[1 : 1 + labels].movedim(0, -1), sums[1 + labels :]
    s = s.masked_fill(~(s > 0) | rows.invalid, math.nan)
    log_s = s.log()
    return finish(
        rows,
        wanted,
        (of_labels - log_s.unsqueeze(-1)).to(top.dtype),
        top,
        log_s.to(top.dtype),
        (log_s - others[0] / s).to(top.dtype) if wanted.entropy else None,
        argmax,
        (others[-1] / s.square()).to(top.dtype) if wanted.sum_p_squared else None,
    )


class Shard(Columns):
    """The columns of one rank.

    Forward: two collectives, the maximum of [...] and one sum of [1 + K + entropy + sum of p^2, ...] and two numbers
    more, in the accumulation dtype. Backward: none. What they return has the same bits on all ranks, and so have the
    results, whatever backends the ranks take.
    """

    def __init__(self, backend: ForwardBackward, group: Any, start: int, columns: int, vocab: int) -> None:
        """As for `Columns`, of the vocabulary that `group` holds."""
        super().__init__(backend, start, columns, vocab)
        self._group = group

    def forward(self, inputs: Inputs, wanted: Wanted) -> Results:  # type: ignore[override]  # of whole rows
        return exchange(*super().forward(inputs, wanted), wanted, self._span, self._group)


class HiddenShard:
    """The same from hidden states, over those rows of the weight that one rank has: `backend` multiplies with them.

    Backward: one sum, of the gradient in the hidden states, in the accumulation dtype.
    """

    def __init__(self, backend: FromHidden, group: Any, start: int, columns: int, vocab: int) -> None:
        self._backend, self._group, self._span = backend, group, Span(start, columns, vocab)

    def forward(
        self, inputs: HiddenInputs, wanted: Wanted, logits_backend: LogitsBackend, *, keep: bool
    ) -> tuple[Results, Any]:
        rows, local, is_here = self._local(inputs)
        of_part = wanted._replace(logsumexp=True)
        results, kept = self._backend.forward(local, of_part, logits_backend, keep=keep)
        if self._span.columns == 0:  # a soft cap makes the -inf of its one column finite
            results.stats[0] = -math.inf
        return exchange(rows, results, is_here, wanted, self._span, self._group), kept

    def backward(
        self,
        inputs: HiddenInputs,
        stats: Tensor,
        kept: Any,
        upstream: Upstream,
        logits_backend: LogitsBackend,
        needs: Needs,
    ) -> Gradients:
        rows, local, is_here = self._local(inputs)
        upstream = upstream_of(upstream, rows, is_here)
        gradients = self._backend.backward(local, stats, kept, upstream, logits_backend, needs)
        if gradients.hidden is None:
            return gradients
        total = gradients.hidden.to(accumulation_dtype(gradients.hidden.dtype))
        distributed.all_reduce(total, distributed.ReduceOp.SUM, group=self._group)
        return gradients._replace(hidden=total.to(gradients.hidden.dtype))

    def _local(self, inputs: HiddenInputs) -> tuple[Clean, HiddenInputs, Tensor]:
        rows = clean(Inputs(inputs.hidden, inputs.labels, inputs.temperature, inputs.ignore_index), self._span.vocab)
        labels, is_here = self._span.labels(rows)
        return rows, inputs._replace(labels=labels, ignore_index=IGNORED), is_here


def exchange(rows: Clean, part: Results, is_here: Tensor, wanted: Wanted, own: Span, group: Any) -> Results:
    """Results of whole rows, from what each rank of `group` made of its part."""
    top = highest(part.stats[0])
    distributed.all_reduce(top, distributed.ReduceOp.MAX, group=group)
    sums = sums_of(rows, part, is_here, wanted, top)
    layout = top.new_tensor([own.columns, mark(own.start + own.columns) - mark(own.start)])
    packed = torch.cat([sums.flatten().to(top.dtype), layout])
    distributed.all_reduce(packed, distributed.ReduceOp.SUM, group=group)
    whole = packed[:-2].view(sums.shape).double()
    is_torn = torch.as_tensor(_is_torn(own, *packed[-2:]), device=top.device)
    return of_whole_rows(rows, wanted, top, whole.masked_fill(is_torn, math.nan))


def _is_torn(own: Span, columns: Tensor, marks: Tensor) -> bool | Tensor:
    """Whether the parts of the ranks are not each column of the vocabulary once. On a CPU that is an error;
    elsewhere, where no value is looked at, it makes all rows NaN."""
    is_torn = (columns != own.vocab) | (marks != mark(own.vocab) - mark(0))
    if columns.device.type == "cpu" and bool(is_torn):
        wrong = f"of {int(columns)} columns in all" if int(columns) != own.vocab else "that overlap"
        raise InputError(
            f"got parts of the vocabulary {wrong}, of which {own.columns} columns on this rank from column "
            f"{own.start}; each of {own.vocab} on one rank is valid. Pass vocab_size, and vocab_start_index "
            "where the parts are not equal."
        )
    return is_torn


def mark(column: int) -> int:
    """A number below 2^15 for the edge before a column, as good as a random one.

    Each part adds that of its end and takes off that of its start. Where each column is in one part, the sum over all
    is what the whole vocabulary adds, since the others cancel; elsewhere it is that only by chance. As float32 the sum
    is exact for 512 ranks.
    """
    return pow(column, 3, 32749)
