"""What the originals agree on: which labels count, which dtype comes back, and that one rank holds whole rows."""

from typing import Any, cast

import torch
from torch import Tensor

from compiled_logprobs import entropy_from_logits, log_probs_from_logits
from compiled_logprobs.arguments import NO_LABEL, check_not_leaf
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


def sum_p_squared(logits: Tensor, **options: Any) -> Tensor:
    """Sum of the squared probabilities of each row, without a gradient."""
    labels = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    _, result = log_probs_from_logits(logits, labels, ignore_index=NO_LABEL, return_sum_p_squared=True, **options)
    return result


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


def require_one_rank(**groups: Any) -> None:
    """Raise InputError, which names the argument, unless each process group is None or has one rank."""
    for name, group in groups.items():
        if group is not None and group.size() > 1:
            raise split_error(f"a {name} of {group.size()} ranks", "None or a group of one rank is valid")


def split_error(what: str, valid: str) -> InputError:
    """Say that logits are split over ranks."""
    return InputError(
        f"got {what}; {valid}: logits that are split over ranks are not served here. Keep the framework's own function "
        "for them (unpatch it), or gather the logits first."
    )


def _may_overwrite(logits: Tensor) -> bool:
    """Not over a leaf, whose value would be lost, nor inside a graph, where there is no place."""
    if torch.compiler.is_compiling():
        return False
    try:
        check_not_leaf(logits)
    except InputError:
        return False
    return True
