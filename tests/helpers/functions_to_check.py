"""Functions of (logits, labels) for `compiled-logprobs check functions_to_check:...`."""

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


# --- of other argument orders, names and shapes -----------------------------------------------------------------------


def labels_first(labels: Tensor, logits: Tensor) -> Tensor:
    """Right, the other way round."""
    return right(logits, labels)


def of_other_names(scores: Tensor, *, targets: Tensor, temp: float = 1.0, reduction: str = "mean") -> Tensor:
    """Right, where `reduction` is 'none' and `temp` the temperature; a loss."""
    return functional.cross_entropy(scores.float() / temp, targets, reduction=reduction)


def of_batches(logits: Tensor, labels: Tensor) -> Tensor:
    """logits [B, T, V], labels [B, T] -> [B, T]; right."""
    return torch.stack([right(one, of) for one, of in zip(logits, labels, strict=True)])


def with_a_required_length(logits: Tensor, labels: Tensor, length: int) -> Tensor:
    """Cannot be called with two arguments."""
    return right(logits, labels)[:length]


# --- wrong ------------------------------------------------------------------------------------------------------------


def twice_tempered(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """The caller divides, and so does the function."""
    return right(logits.float() / temperature / temperature, labels)


def tempered_afterwards(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """PrimeIntellect-ai/prime-rl#697: the log-probabilities are divided, and not the logits."""
    return right(logits, labels) / temperature


def shifted(logits: Tensor, labels: Tensor) -> Tensor:
    """Takes the label of the next row."""
    return right(logits, labels.roll(-1))


def shifts_itself(logits: Tensor, labels: Tensor) -> Tensor:
    """[N - 1] results, each of the next label."""
    return right(logits[:-1], labels[1:])


def in_half_precision(logits: Tensor, labels: Tensor) -> Tensor:
    """float32 in and out, half precision in between."""
    return right(logits.bfloat16(), labels)


def in_the_dtype_of_the_logits(logits: Tensor, labels: Tensor) -> Tensor:
    """As TRL and verl do it: bfloat16 log-probabilities."""
    return right(logits, labels).to(logits.dtype)


def divides_in_place(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """As OpenRLHF does it."""
    with torch.no_grad():
        logits.div_(temperature)
    return right(logits, labels)


def cut_off(logits: Tensor, labels: Tensor) -> Tensor:
    """No gradient flows."""
    return right(logits.detach(), labels)


def counts_ignored(logits: Tensor, labels: Tensor) -> Tensor:
    """-100 is taken for token 0."""
    return right(logits, labels.clamp(min=0))


def mean_of_the_batch(logits: Tensor, labels: Tensor) -> Tensor:
    """One number for all."""
    return right(logits, labels).mean()


def loss_and_more(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """flash-attn's cross entropy returns (losses, z_losses)."""
    return positive(logits, labels), torch.zeros(len(labels))


def negative_entropy(logits: Tensor, labels: Tensor, return_entropy: bool = False) -> Tensor | tuple[Tensor, Tensor]:
    """NVIDIA-NeMo/RL's entropy is the sum of p log p."""
    log_p = torch.log_softmax(logits.float(), -1)
    entropy = (log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0.0)).sum(-1).masked_fill(labels == -100, 0.0)
    return (right(logits, labels), entropy) if return_entropy else right(logits, labels)


def fails(logits: Tensor, labels: Tensor) -> Tensor:
    """Raises whatever it gets."""
    raise RuntimeError("Pointer argument (at 0) cannot be accessed from Triton (cpu tensor?)")
