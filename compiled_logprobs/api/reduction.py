"""From log-probabilities to the cross entropy: the sign, and what is made of all labels."""

from typing import Literal

import torch
from torch import Tensor

from compiled_logprobs.errors import InputError

Reduction = Literal["mean", "sum", "none"]


def check_reduction(reduction: str) -> None:
    if reduction not in ("mean", "sum", "none"):
        raise InputError(f"got reduction={reduction!r}; 'mean', 'sum' or 'none' is valid.")


def cross_entropy_of(
    log_probs: Tensor, labels: Tensor, reduction: Reduction, ignore_index: int, dtype: torch.dtype
) -> Tensor:
    """Minus the log-probabilities as they are; or their sum in `dtype`, or the mean over labels that count."""
    losses = 0.0 - log_probs  # not a negation, which would turn the 0 of an ignored label into -0
    if reduction == "none":
        return losses
    total = losses.sum()
    if reduction == "mean":
        total = total / (labels.long() != ignore_index).sum()
    return total.to(dtype)
