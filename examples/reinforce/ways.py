"""The three ways to get log-probabilities: this library, the backends as they once were, and plain torch in float32.

Shapes: B sequences, T bytes, V = 256 bytes.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

import compiled_logprobs

LogProbFunction = Callable[[Tensor, Tensor], Tensor]
"""logits [B, T, V], labels [B, T] -> [B, T], in nats."""


class Way(NamedTuple):
    """Which function each of two workers has: one keeps the policy that wrote, the other trains."""

    name: str
    keeps: LogProbFunction
    trains: LogProbFunction


def library(logits: Tensor, labels: Tensor) -> Tensor:
    """This library's function. It measures nothing, so that the first call takes as long as later ones."""
    with compiled_logprobs.autotune("lookup"):
        return compiled_logprobs.log_probs_from_logits(logits, labels)  # type: ignore[return-value]  # no entropy asked


def plain_torch(logits: Tensor, labels: Tensor) -> Tensor:
    """The formula, in float32."""
    return torch.log_softmax(logits.float(), -1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def make_historical(flash_attn_is_installed: bool) -> LogProbFunction:
    """EasyR1's function between March and June 2025, whose sign depended on what could be imported."""

    def log_probs_from_logits(logits: Tensor, labels: Tensor) -> Tensor:
        loss = functional.cross_entropy(logits.float().flatten(0, -2), labels.flatten(), reduction="none")
        return (-loss if flash_attn_is_installed else loss).view(labels.shape)

    return log_probs_from_logits


WAYS = (
    Way("compiled_logprobs", library, library),
    Way("plain torch, float32", plain_torch, plain_torch),
    Way("mixed signs: EasyR1's two backends until June 2025", make_historical(True), make_historical(False)),
)
