"""The three ways to get log-probabilities: this library, the backends as they once were, and plain torch in float32.

Shapes: B sequences, T bytes, V = 256 bytes.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

import compiled_logprobs

LogProbs = Callable[[Tensor, Tensor], Tensor]
"""logits [B, T, V], labels [B, T] -> [B, T], in nats."""


class Way(NamedTuple):
    """Who computes log-probabilities with what. Two workers do: one keeps the policy that wrote, the other trains."""

    name: str
    keeps: LogProbs
    trains: LogProbs


def library(logits: Tensor, labels: Tensor) -> Tensor:
    """The fastest right backend; nothing is measured on the way, so that this takes as long the first time as later."""
    with compiled_logprobs.autotune("lookup"):
        return compiled_logprobs.log_probs_from_logits(logits, labels)  # type: ignore[return-value]  # no entropy asked


def plain_torch(logits: Tensor, labels: Tensor) -> Tensor:
    """The formula, in float32."""
    return torch.log_softmax(logits.float(), -1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def as_it_was(flash_attn_is_installed: bool) -> LogProbs:
    """EasyR1's function between March and June 2025: which sign it returned depended on what could be imported."""

    def log_probs_from_logits(logits: Tensor, labels: Tensor) -> Tensor:
        loss = functional.cross_entropy(logits.float().flatten(0, -2), labels.flatten(), reduction="none")
        return (-loss if flash_attn_is_installed else loss).view(labels.shape)

    return log_probs_from_logits


WAYS = (
    Way("compiled_logprobs", library, library),
    Way("plain torch, float32", plain_torch, plain_torch),
    Way("mixed signs: EasyR1's two backends until June 2025", as_it_was(True), as_it_was(False)),
)
