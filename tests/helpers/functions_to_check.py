"""Functions of (logits, labels) for `compiled-logprobs check tests.helpers.functions_to_check:...`."""

import torch
from torch import Tensor
from torch.nn import functional

from compiled_logprobs.backends.eager import Eager

not_a_function = 7


def right(logits: Tensor, labels: Tensor) -> Tensor:
    """As simple as it can be, and right."""
    return -functional.cross_entropy(logits.float(), labels, reduction="none")


def positive(logits: Tensor, labels: Tensor) -> Tensor:
    """The mistake that this library is named for: a cross entropy returned as a log-probability."""
    return functional.cross_entropy(logits.float(), labels, reduction="none")


def without_ignored(logits: Tensor, labels: Tensor) -> Tensor:
    """Right for labels in the vocabulary; -100 is an error."""
    return torch.log_softmax(logits.float(), -1).gather(-1, labels[:, None]).squeeze(-1)


def talkative(logits: Tensor, labels: Tensor) -> Tensor:
    """Right, and prints."""
    print("checking [/red] me")
    return right(logits, labels)


def tempered(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """Takes a temperature, and forgets it."""
    return right(logits, labels)


class Borrowed(Eager):
    """A backend of somebody else's, which nobody has registered."""

    name = "borrowed"
