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
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed

from compiled_logprobs.errors import InputError
from compiled_logprobs.operation.autograd import ForwardBackward
from compiled_logprobs.operation.contract import Clean, Inputs, Results, Upstream, Wanted, clean, finish
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

    def forward(self, inputs: Inputs, wanted: Wanted) -> tuple[Results, Tensor]:
        """What the backend makes of these columns, and which labels are among them, [..., K]."""
        labels, is_here = self._span.labels(inputs)
        local = inputs._replace(labels=labels, ignore_index=IGNORED)
        return self._backend.forward(local, wanted._replace(logsumexp=True)), is_here

    def backward(self, inputs: Inputs, stats: Tensor, upstream: Upstream, *, inplace: bool) -> Tensor:
        """The gradient in these columns."""
        labels, is_here = self._span.labels(inputs)
        local = inputs._replace(labels=labels, ignore_index=IGNORED)
        of_part = upstream_of(upstream, labels == IGNORED, is_here)
        return self._backend.backward(local, stats, of_part, inplace=inplace)


class Span(NamedTuple):
    """Which columns they are."""

    start: int
    columns: int
    vocab: int

    def labels(self, inputs: Inputs | HiddenInputs) -> tuple[Tensor, Tensor]:
        """What a backend is given, any label that is elsewhere being the nearest column; and which are here."""
        labels = inputs.labels.to(torch.int64)
        ignored = labels == inputs.ignore_index
        columns = (labels - self.start).masked_fill(ignored, -1)
        nearest = columns.clamp(0, max(1, self.columns) - 1)
        is_here = nearest == columns if self.columns else torch.zeros_like(ignored)
        return nearest.masked_fill(ignored, IGNORED), is_here


def upstream_of(upstream: Upstream, ignored: Tensor, is_here: Tensor) -> Upstream:
    """The gradients that come to a part from above."""
    # What weights the probabilities of a row, but has no column here, goes the way of the logsumexp.
    elsewhere = upstream.log_probs.masked_fill(is_here | ignored, 0.0).sum(-1)
    of_logsumexp = -elsewhere if upstream.logsumexp is None else upstream.logsumexp - elsewhere
    return Upstream(upstream.log_probs.masked_fill(~is_here, 0.0), upstream.entropy, of_logsumexp)


def highest(m: Tensor) -> Tensor:
    """Maxima of parts for a maximum over these, which may lose a NaN: infinity makes the row one, too."""
    return m.nan_to_num(math.inf, math.inf, -math.inf)


def sums_of(rows: Clean, part: Results, is_here: Tensor, wanted: Wanted) -> Callable[[Tensor], list[Tensor]]:
    """What is added up over the parts, [how many, ...] each, once M is known: u; (x_y - M) / T of each label; then, as
    far as they are wanted, u (log s - entropy + (m - M) / T) and u^2 times the sum of the squares.

    In float64, since a few roundings more would show; these are few numbers. What needs no M is computed at once.
    """
    m, log_s = part.stats[:2].double()
    is_empty, is_elsewhere = m == -math.inf, ~is_here.movedim(-1, 0)
    # The logarithms of u and of its share of each label, but for (m - M) / T. Where all parts are empty, M makes them
    # NaN, and so the row.
    logs = torch.cat([log_s.unsqueeze(0), part.log_probs.movedim(-1, 0) + log_s]).masked_fill(is_empty, -math.inf)
    m = m.masked_fill(is_empty, 0.0)

    def sums(top: Tensor) -> list[Tensor]:
        below = m - top
        if isinstance(rows.temperature, Tensor) or rows.temperature != 1:
            below = below / rows.temperature
        log_u, of_labels = (logs + below).tensor_split([1])
        u = log_u.exp()
        result = [u, of_labels.masked_fill_(is_elsewhere, 0.0)]
        if wanted.entropy:
            assert part.entropy is not None
            result.append((u * (log_u - part.entropy)).masked_fill(is_empty, 0.0))
        if wanted.sum_p_squared:
            assert part.sum_p_squared is not None
            result.append((u.square() * part.sum_p_squared).masked_fill(is_empty, 0.0))
        return result

    return sums


def of_whole_rows(rows: Clean, wanted: Wanted, top: Tensor, sums: Tensor, argmax: Tensor | None = None) -> Results:
    """Results from `sums_of` all parts together, with `top` M in the accumulation dtype."""
    labels = rows.labels.shape[-1]
    s, of_labels, others = sums[0], sums[1 : 1 + labels].movedim(0, -1), sums[1 + labels :]
    log_s = s.masked_fill(rows.invalid, math.nan).log()
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
        return exchange(inputs, *super().forward(inputs, wanted), wanted, self._span, self._group)


class HiddenShard:
    """The same from hidden states, over those rows of the weight that one rank has: `backend` multiplies with them.

    Backward: one sum, of the gradient in the hidden states, in the accumulation dtype.
    """

    def __init__(self, backend: FromHidden, group: Any, start: int, columns: int, vocab: int) -> None:
        self._backend, self._group, self._span = backend, group, Span(start, columns, vocab)

    def forward(
        self, inputs: HiddenInputs, wanted: Wanted, logits_backend: LogitsBackend, *, keep: bool
    ) -> tuple[Results, Any]:
        labels, is_here = self._span.labels(inputs)
        local = inputs._replace(labels=labels, ignore_index=IGNORED)
        of_part = wanted._replace(logsumexp=True)
        results, kept = self._backend.forward(local, of_part, logits_backend, keep=keep)
        if self._span.columns == 0:  # a soft cap makes the -inf of its one column finite
            results.stats[0] = -math.inf
        given = Inputs(inputs.hidden, inputs.labels, inputs.temperature, inputs.ignore_index)
        return exchange(given, results, is_here, wanted, self._span, self._group), kept

    def backward(
        self,
        inputs: HiddenInputs,
        stats: Tensor,
        kept: Any,
        upstream: Upstream,
        logits_backend: LogitsBackend,
        needs: Needs,
    ) -> Gradients:
        labels, is_here = self._span.labels(inputs)
        local = inputs._replace(labels=labels, ignore_index=IGNORED)
        upstream = upstream_of(upstream, labels == IGNORED, is_here)
        gradients = self._backend.backward(local, stats, kept, upstream, logits_backend, needs)
        if gradients.hidden is None:
            return gradients
        total = gradients.hidden.to(accumulation_dtype(gradients.hidden.dtype))
        distributed.all_reduce(total, distributed.ReduceOp.SUM, group=self._group)
        return gradients._replace(hidden=gradients.hidden.copy_(total))


def exchange(inputs: Inputs, part: Results, is_here: Tensor, wanted: Wanted, own: Span, group: Any) -> Results:
    """Results of whole rows, from what each rank of `group` made of its part. Of `inputs` only the labels and
    temperatures count, which are the same on all ranks."""
    top = highest(part.stats[0])
    maximum: Any = distributed.all_reduce(top, distributed.ReduceOp.MAX, group=group, async_op=True)
    # What needs no maximum is done while it is under way: the operations are small, but each shows.
    rows = clean(inputs, own.vocab)
    sums = sums_of(rows, part, is_here, wanted)
    layout = _layout_of(own, top)
    maximum.wait()
    packed = torch.cat([*(added.flatten() for added in sums(top)), *layout]).to(top.dtype)
    distributed.all_reduce(packed, distributed.ReduceOp.SUM, group=group)
    whole = packed.double()
    is_torn = _is_torn(own, whole[-2:])
    whole = whole[:-2].view(-1, *top.shape)
    return of_whole_rows(rows, wanted, top, whole if is_torn is None else whole.masked_fill(is_torn, math.nan))


def _layout_of(own: Span, top: Tensor) -> list[Tensor]:
    """This rank's part, as two numbers for `_is_torn` to see added up, on the device of `top`."""
    numbers = [own.columns, mark(own.start + own.columns) - mark(own.start)]
    if top.is_cpu:
        return [torch.tensor(numbers, dtype=torch.float64)]
    # Filled in there: a copy from the host would wait for the device, and could not be captured in a CUDA graph.
    return [torch.full((1,), number, dtype=torch.float64, device=top.device) for number in numbers]


def _is_torn(own: Span, layout: Tensor) -> Tensor | None:
    """Whether the parts of the ranks are not each column of the vocabulary once. On a CPU that is an error;
    elsewhere, where no value is looked at, it makes all rows NaN."""
    whole = [own.vocab, mark(own.vocab) - mark(0)]
    if not layout.is_cpu:
        return (layout[0] != whole[0]) | (layout[1] != whole[1])
    columns, marks = layout.tolist()
    if [columns, marks] != whole:
        wrong = f"of {int(columns)} columns in all" if columns != own.vocab else "that overlap"
        raise InputError(
            f"got parts of the vocabulary {wrong}, of which {own.columns} columns on this rank from column "
            f"{own.start}; each of {own.vocab} on one rank is valid. Pass vocab_size, and vocab_start_index "
            "where the parts are not equal."
        )
    return None


def mark(column: int) -> int:
    """A number below 2^15 for the edge before a column, as good as a random one.

    Each part adds that of its end and takes off that of its start. Where each column is in one part, the sum over all
    is what the whole vocabulary adds, since the others cancel; elsewhere it is that only by chance. As float32 the sum
    is exact for 512 ranks.
    """
    return pow(column, 3, 32749)
