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
from typing import Any

import torch
from torch import Tensor, distributed

from compiled_logprobs.errors import InputError
from compiled_logprobs.operation.autograd import ForwardBackward
from compiled_logprobs.operation.contract import Clean, Inputs, Results, Upstream, Wanted, clean, finish
from compiled_logprobs.operation.formula import finite, per_row

IGNORED = -100
"""What is no column, unlike an `ignore_index` that may be one."""


class Columns:
    """Some columns of the vocabulary, as a backend of the whole rows: `backend` computes them.

    Labels, upstream gradients and statistics are those of the whole rows.
    """

    def __init__(self, backend: ForwardBackward, start: int, columns: int, vocab: int) -> None:
        """Take columns [start, start + columns) of `vocab`. Where `columns` is 0, the logits are one column of -inf."""
        self._backend, self._start, self._columns, self._vocab = backend, start, columns, vocab

    def forward(self, inputs: Inputs, wanted: Wanted) -> tuple[Results, Clean, Tensor, Tensor]:
        """What the backend makes of these columns; the rows; and, [..., K] each, the logits at the labels and which of
        them are here."""
        rows = clean(inputs, self._vocab)
        local, is_here = self._part(inputs, rows.labels, rows.ignored)
        part = self._backend.forward(local, wanted._replace(logsumexp=True))
        return part, rows, inputs.logits.gather(-1, local.labels.clamp(min=0)).double(), is_here

    def backward(self, inputs: Inputs, stats: Tensor, upstream: Upstream, *, inplace: bool) -> Tensor:
        """The gradient in these columns."""
        rows = clean(inputs, self._vocab)
        local, is_here = self._part(inputs, rows.labels, rows.ignored)
        # What weights the probabilities of a row, but has no column here, goes the way of the logsumexp.
        elsewhere = upstream.log_probs.masked_fill(is_here | rows.ignored, 0.0).sum(-1)
        of_logsumexp = -elsewhere if upstream.logsumexp is None else upstream.logsumexp - elsewhere
        log_probs = upstream.log_probs.masked_fill(~is_here, 0.0)
        return self._backend.backward(
            local, stats, Upstream(log_probs, upstream.entropy, of_logsumexp), inplace=inplace
        )

    def _part(self, inputs: Inputs, labels: Tensor, ignored: Tensor) -> tuple[Inputs, Tensor]:
        """What the backend is given, any label that is elsewhere being the first column; and which are here."""
        columns = labels - self._start
        is_here = (columns >= 0) & (columns < self._columns) & ~ignored
        columns = columns.masked_fill(~is_here, 0).masked_fill(ignored, IGNORED)
        return inputs._replace(labels=columns, ignore_index=IGNORED), is_here


def highest(m: Tensor) -> Tensor:
    """Maxima of parts for a maximum over these, which may lose a NaN: infinity makes the row one, too."""
    return m.masked_fill(m.isnan(), math.inf)


def sums_of(part: Results, wanted: Wanted, top: Tensor, temperature: float | Tensor) -> list[Tensor]:
    """What is added up over the parts: u, then, as far as they are wanted, u (log s - entropy + (m - M) / T) and u^2
    times the sum of the squares.

    In float64, since a few roundings more would show; these are few numbers.
    """
    m, log_s = part.stats[0], part.stats[1]
    is_empty = m == -math.inf
    below = ((m.double() - top) / temperature).masked_fill(is_empty, -math.inf)
    log_s = log_s.double().masked_fill(is_empty, 0.0)
    u = (log_s + below).exp()
    sums = [u]
    if wanted.entropy:
        assert part.entropy is not None
        sums.append((u * (log_s - part.entropy + finite(below))).masked_fill(is_empty, 0.0))
    if wanted.sum_p_squared:
        assert part.sum_p_squared is not None
        sums.append((u.square() * part.sum_p_squared).masked_fill(is_empty, 0.0))
    return sums


def of_whole_rows(
    rows: Clean, wanted: Wanted, top: Tensor, sums: list[Tensor], d_K: Tensor, argmax: Tensor | None = None
) -> Results:
    """Results from `sums_of` all parts together; `d_K` are (x_y - M) / T, `top` M in the accumulation dtype."""
    s, *others = sums
    s = s.masked_fill(~(s > 0) | rows.invalid, math.nan)
    log_s = s.log()
    return finish(
        rows,
        wanted,
        (d_K - log_s.unsqueeze(-1)).to(top.dtype),
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
        part, rows, x_K, is_here = super().forward(inputs, wanted)
        top = highest(part.stats[0])
        distributed.all_reduce(top, distributed.ReduceOp.MAX, group=self._group)

        t = rows.temperature.double() if isinstance(rows.temperature, Tensor) else rows.temperature
        d_K = ((x_K - top.unsqueeze(-1)) / per_row(t)).masked_fill(~is_here, 0.0)
        sums = [*d_K.unbind(-1), *sums_of(part, wanted, top, t)]
        layout = top.new_tensor([self._columns, mark(self._start + self._columns) - mark(self._start)])
        packed = torch.cat([torch.stack(sums).flatten().to(top.dtype), layout])
        distributed.all_reduce(packed, distributed.ReduceOp.SUM, group=self._group)
        whole = packed[:-2].view(-1, *top.shape).double()
        labels = d_K.shape[-1]
        s, *others = whole[labels:].unbind()
        s = s.masked_fill(torch.as_tensor(self._is_torn(*packed[-2:]), device=s.device), math.nan)
        return of_whole_rows(rows, wanted, top, [s, *others], whole[:labels].movedim(0, -1))

    def _is_torn(self, columns: Tensor, marks: Tensor) -> bool | Tensor:
        """Whether the parts of the ranks are not each column of the vocabulary once. On a CPU that is an error;
        elsewhere, where no value is looked at, it makes all rows NaN."""
        is_torn = (columns != self._vocab) | (marks != mark(self._vocab) - mark(0))
        if columns.device.type == "cpu" and bool(is_torn):
            wrong = f"of {int(columns)} columns in all" if int(columns) != self._vocab else "that overlap"
            raise InputError(
                f"got parts of the vocabulary {wrong}, of which {self._columns} columns on this rank from column "
                f"{self._start}; each of {self._vocab} on one rank is valid. Pass vocab_size, and vocab_start_index "
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
