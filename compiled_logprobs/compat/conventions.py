"""What the originals agree on: which labels count, which dtype comes back, and who has which columns."""

import sys
from typing import Any, cast

import torch
from torch import Tensor, distributed

from compiled_logprobs import (
    cross_entropy_from_logits,
    entropy_from_logits,
    log_probs_from_hidden,
    log_probs_from_logits,
)
from compiled_logprobs.arguments import NO_LABEL, check_not_leaf, ranks_of
from compiled_logprobs.errors import InputError


def log_probs(logits: Tensor, labels: Tensor, **options: Any) -> Tensor:
    """Stand for originals made of a cross entropy: a label of -100 counts 0."""
    return cast(Tensor, log_probs_from_logits(logits, labels, **options))


def gathered_log_probs(logits: Tensor, labels: Tensor, **options: Any) -> Tensor:
    """Stand for originals that gather: they ignore no label, and -100 is an error, there as here."""
    return log_probs(logits, labels, ignore_index=NO_LABEL, **options)


def gathered_log_probs_and_entropy(logits: Tensor, labels: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """As `gathered_log_probs`, with the entropy of each row from the same pass."""
    log_probs, entropy = log_probs_from_logits(logits, labels, ignore_index=NO_LABEL, return_entropy=True, **options)
    return log_probs, entropy


def log_probs_of_head(hidden: Tensor, weight: Tensor, labels: Tensor, **options: Any) -> Tensor:
    """Stand for originals that multiply and gather, [...] float32 (float64 for float64 hidden states)."""
    dtype = at_least_float32(hidden)
    return cast(
        Tensor, log_probs_from_hidden(hidden, weight, labels, ignore_index=NO_LABEL, out_dtype=dtype, **options)
    )


def log_probs_and_entropy_of_head(
    hidden: Tensor, weight: Tensor, labels: Tensor, **options: Any
) -> tuple[Tensor, Tensor]:
    """As `log_probs_of_head`, with the entropy of each row from the same pass."""
    log_probs, entropy = cast(Any, log_probs_of_head(hidden, weight, labels, return_entropy=True, **options))
    return log_probs, entropy


def with_share_of_gradient(hidden: Tensor, group: Any) -> Tensor:
    """Hidden states whose gradients on the ranks of `group` add up to the whole, which each rank is given.

    So for originals that leave the sum to what made the hidden states, as Megatron's gather of a sequence does.
    """
    if group is None:
        return hidden
    shared: Tensor = _ShareOfGradient.apply(hidden, group)  # type: ignore[no-untyped-call]  # torch's gap
    return shared


def sum_p_squared(logits: Tensor, **options: Any) -> Tensor:
    """Sum of the squared probabilities of each row, without a gradient."""
    labels = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    _, result = log_probs_from_logits(logits, labels, ignore_index=NO_LABEL, return_sum_p_squared=True, **options)
    return result


def losses(logits: Tensor, labels: Tensor, **options: Any) -> Tensor:
    """Stand for cross entropies that return a number a label: a label of -100 counts 0."""
    return cross_entropy_from_logits(logits, labels, reduction="none", **options)


def require_no_smoothing(label_smoothing: float) -> None:
    """Raise InputError unless labels are not smoothed."""
    if label_smoothing != 0:
        raise InputError(
            f"got label_smoothing={label_smoothing!r}; 0 is valid: smoothed labels need the mean of all "
            "log-probabilities, which no backend has. Keep the framework's own function for them."
        )


def overwriting_log_probs(logits: Tensor, labels: Tensor, inplace_backward: bool) -> Tensor:
    """Stand for originals that call flash-attn: labels of any shape, the gradient over the logits where it can be."""
    return log_probs(
        logits,
        as_rows(labels, logits),
        inplace_backward=inplace_backward and _may_overwrite(logits),
        out_dtype=at_least_float32(logits),
    )


entropy = entropy_from_logits
"""By a name that no original has."""


def as_rows(labels: Tensor, logits: Tensor) -> Tensor:
    """Labels of any shape in that of the rows, as flash-attn takes them. Too many or too few are refused later."""
    rows = logits.shape[:-1]
    return labels.reshape(rows) if isinstance(labels, Tensor) and labels.numel() == rows.numel() else labels


def at_least_float32(logits: Tensor) -> torch.dtype:
    """float64 for float64 logits, else float32."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def part_of_group(logits: Tensor, start: int, end: int, **groups: Any) -> dict[str, Any]:
    """The options of a call whose logits are columns [start, end) of a vocabulary, split over the one group named.

    InputError unless all ranks have as many columns, in their order; without ranks, unless these are all columns.
    """
    ((name, group),) = groups.items()
    held, group = logits.shape[-1], of_ranks(group)
    due = (0, held) if group is None else (group.rank() * held, (group.rank() + 1) * held)
    if (start, end) != due:
        whose = f"with a {name} of one rank" if group is None else f"on rank {group.rank()} of {group.size()}"
        raise InputError(
            f"got the vocabulary's part from {start} to {end} for logits of {held} columns, {whose}; {due[0]} to "
            f"{due[1]} is valid: here all ranks of the {name} have as many columns. For other parts call "
            "compiled_logprobs.log_probs_from_logits with group, vocab_start_index and vocab_size."
        )
    return {"group": group}


def of_ranks(group: Any) -> Any:
    """The group, or None in place of one that has one rank."""
    return None if group is None or ranks_of(group) == 1 else group


def all_ranks() -> Any:
    """The group of all ranks of torch.distributed, None where there is one rank."""
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        return distributed.group.WORLD
    return None


def tensor_parallel_ranks() -> Any:
    """Megatron's tensor-parallel group, None where it has one rank, or where there is one rank in all."""
    megatron = sys.modules.get("megatron.core.parallel_state")
    if megatron is not None and megatron.model_parallel_is_initialized():
        return of_ranks(megatron.get_tensor_model_parallel_group())
    if (group := all_ranks()) is not None:
        raise InputError(
            f"got a call on one of {group.size()} ranks, and no tensor-parallel group of Megatron's; one is valid, "
            "since it says whose the columns are. Call megatron.core.parallel_state.initialize_model_parallel first, "
            "or compiled_logprobs.log_probs_from_logits with group."
        )
    return None


class _ShareOfGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, group: Any) -> Tensor:
        ctx.ranks = group.size()
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] / ctx.ranks, None


def _may_overwrite(logits: Tensor) -> bool:
    """Not over a leaf, whose value would be lost, nor inside a graph, where there is no place."""
    if torch.compiler.is_compiling():
        return False
    try:
        check_not_leaf(logits)
    except InputError:
        return False
    return True
