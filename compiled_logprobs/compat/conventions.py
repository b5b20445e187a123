"""The public functions as the originals' callers expect them, and what several of the originals agree on."""

from typing import Any, cast

import torch
from torch import Tensor

from compiled_logprobs import LogProbs, entropy_from_logits, log_probs_from_logits
from compiled_logprobs.arguments import check_not_leaf
from compiled_logprobs.errors import InputError

NO_LABEL = -(2**63)
"""An `ignore_index` that no label has. The originals that gather know no ignored label: -100 is an error there, as here."""


def log_probs(logits: Tensor, labels: Tensor, **options: Any) -> Tensor:
    """`log_probs_from_logits`."""
    return cast(Tensor, log_probs_from_logits(logits, labels, **options))


def log_probs_and_entropy(logits: Tensor, labels: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """`log_probs_from_logits` with `return_entropy=True`."""
    both = cast(LogProbs, log_probs_from_logits(logits, labels, return_entropy=True, **options))
    return both.log_probs, both.entropy


def entropy(logits: Tensor, **options: Any) -> Tensor:
    """`entropy_from_logits`."""
    return entropy_from_logits(logits, **options)


def wide(logits: Tensor) -> torch.dtype:
    """float32, or float64 for float64 logits: what originals return that compute in at least float32."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def may_overwrite(logits: Tensor) -> bool:
    """Whether the gradient can be written over `logits`. A leaf's value would be lost, and inside a graph there is no place."""
    if torch.compiler.is_compiling():
        return False
    try:
        check_not_leaf(logits)
    except InputError:
        return False
    return True
