"""AReaL's `areal.utils.functional`, for whole logits and for those that are split over tensor-parallel ranks.

Kept: float32 results of logits of any dtype, divided by the temperature in float32.

Not kept: empty input gives an empty result, where the original fails. The gradient takes one tensor of the size and
dtype of the logits, and the graph can be kept for a second backward.
"""

from typing import Any

from torch import Tensor

from compiled_logprobs.compat import conventions


def gather_logprobs(
    logits: Tensor, labels: Tensor, temperature: float = 1.0, tp_group: Any = None, chunk_size: int = 1024
) -> Tensor:
    """Log-probability of each label under softmax(logits / temperature), [...] float32.

    `logits` [..., V], or [..., V / ranks] of this rank of `tp_group`, are not modified. `labels` are of the whole
    vocabulary. `chunk_size` is not used.
    """
    return conventions.gathered_log_probs(logits, labels, temperature=temperature, group=tp_group)


def gather_logprobs_entropy(
    logits: Tensor, labels: Tensor, temperature: float = 1.0, tp_group: Any = None, chunk_size: int = 1024
) -> tuple[Tensor, Tensor]:
    """As `gather_logprobs`, and the entropy of each row, [...] float32 both. The entropy carries a gradient."""
    return conventions.gathered_log_probs_and_entropy(logits, labels, temperature=temperature, group=tp_group)
