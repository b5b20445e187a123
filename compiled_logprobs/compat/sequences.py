"""Sequences that lie one after another in a row of tokens, all on this rank or split over context-parallel ranks.

Each sequence is cut into 2p equal pieces, of which rank r of p has the r-th and the r-th from the end, so that causal
attention is as much work on all. Labels and log-probabilities are moved to where they belong, logits never.

Shapes: B sequences, T tokens in all, L = T / p on this rank.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, distributed
from torch.nn import functional

from compiled_logprobs.arguments import NO_LABEL
from compiled_logprobs.compat import conventions
from compiled_logprobs.errors import InputError


class Sequences:
    """Where the tokens of this rank lie among all, and what follows each."""

    def __init__(self, starts: Tensor, held: int, context_group: Any = None) -> None:
        """Take `starts` [B + 1], of which the last is the end of all, and the number of tokens on this rank, L."""
        self._group = conventions.of_ranks(context_group)
        ranks, rank = (1, 0) if self._group is None else (self._group.size(), self._group.rank())
        self.tokens = held * ranks
        """T"""
        self.starts = starts = starts.to(torch.int64)
        here = torch.arange(held, device=starts.device)
        ends = starts[1:].contiguous()
        sequence = torch.searchsorted(ends // ranks, here, right=True)
        self.sequence = sequence.clamp(max=len(ends) - 1)
        """[L]: which sequence a token belongs to; the last, behind all."""
        begin, self._end = starts[self.sequence], ends[self.sequence]
        offset, piece = here - begin // ranks, ((self._end - begin) // (2 * ranks)).clamp(min=1)
        if ranks > 1:
            offset = torch.where(offset < piece, rank, 2 * ranks - 1 - rank) * piece + offset % piece
        self._position = (begin + offset).masked_fill(sequence == len(ends), self.tokens)

    def next_tokens(self, tokens: Tensor) -> Tensor:
        """Of tokens [..., T] the one that follows each of this rank, [..., L]; NO_LABEL where a sequence ends."""
        if tokens.shape[-1] != self.tokens:
            raise InputError(
                f"got {tokens.shape[-1]} tokens for logits at {self.tokens} positions in all; as many are valid. Pass "
                "those of all sequences, padded as the logits are."
            )
        after = self._position + 1
        return tokens[..., after.clamp(max=self.tokens - 1)].long().masked_fill(after >= self._end, NO_LABEL)

    def without_last(self, labels: Tensor) -> Tensor:
        """Labels [..., L] of this rank, those where a sequence ends replaced by NO_LABEL."""
        return labels.long().masked_fill(self._position + 1 >= self._end, NO_LABEL)

    def of_all_ranks(self, values: Tensor) -> Tensor:
        """Values [..., L] of this rank to those of all, [..., T]. The gradients of all ranks are added up."""
        if self._group is None:
            return values
        apart = values.new_zeros(*values.shape[:-1], self.tokens + 1)  # the last one for what lies behind all sequences
        here: Tensor = apart.index_copy(-1, self._position, values)[..., :-1]
        whole: Tensor = _SumOverRanks.apply(here, self._group)  # type: ignore[no-untyped-call]  # torch's gap
        return whole


def of_next_tokens(
    compute: Callable[[Tensor, Tensor], Tensor], states: Tensor, tokens: Tensor, context_group: Any = None
) -> Tensor:
    """Of each of `tokens` [B, S] but the first what `compute` makes of states before them and labels: [B, S - 1].

    `states` are [B, S / context ranks, ...], or more positions, of which the last are not used.
    """
    tokens, width = tokens.to(states.device), tokens.shape[1]
    if (context := conventions.of_ranks(context_group)) is None:
        return compute(states[:, : width - 1], tokens[:, 1:])
    padded = states.shape[1] * context.size()
    sequences = Sequences(torch.tensor([0, padded], device=states.device), states.shape[1], context)
    labels = sequences.next_tokens(functional.pad(tokens, (0, padded - width)))
    return sequences.of_all_ranks(compute(states, labels))[:, : width - 1]


def gathered_sequence(states: Tensor, group: Any) -> Tensor:
    """States [S / ranks, ...] of a sequence that is split over `group` to those of all, [S, ...].

    Their gradient, which is the same on all ranks, goes back to this rank's own.
    """
    if group is None:
        return states
    whole: Tensor = _GatheredSequence.apply(states, group)  # type: ignore[no-untyped-call]  # torch's gap
    return whole


def in_rows(values: Tensor, starts: Tensor, columns: int, mask: Tensor | None = None) -> Tensor:
    """Values [T] of tokens that have another after them, a row for each sequence, [B, columns], and 0 elsewhere.

    With a `mask` [B, columns + 1] a sequence has as many tokens as its row of it, and they lie where it is True.
    """
    starts = starts.to(torch.int64)
    if mask is None:
        number, length = torch.arange(columns, device=values.device), starts[1:] - starts[:-1]
        counts = number < length.unsqueeze(-1) - 1
    else:
        number, length = mask.cumsum(-1)[:, :columns] - 1, mask.sum(-1)
        counts = mask[:, :columns] & (number < length.unsqueeze(-1) - 1)
    index = (starts[:-1].unsqueeze(-1) + number).masked_fill(~counts, len(values))
    return functional.pad(values, (0, 1))[index]


class _GatheredSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, group: Any) -> Tensor:
        ctx.group, ctx.held = group, len(states)
        states = states.contiguous()
        received = [torch.empty_like(states) for _ in range(group.size())]
        distributed.all_gather(received, states, group=group)
        return torch.cat(received)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0].narrow(0, ctx.group.rank() * ctx.held, ctx.held), None


class _SumOverRanks(torch.autograd.Function):
    """The sum over the ranks of a group, forward and backward."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: Any) -> Tensor:
        ctx.group = group
        total = values.clone()
        distributed.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        total = gradients[0].clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(total, group=ctx.group)
        return total, None
