"""AReaL's `areal.utils.functional`, for logits that are not split over ranks.

Kept: float32 results of logits of any dtype, divided by the temperature in float32.

Not kept: empty input gives an empty result, where the original fails. The gradient takes one tensor of the size and
dtype of the logits.
"""

from typing import Any

from torch import Tensor

from compiled_logprobs.compat import conventions


def gather_logprobs(
    logits: Tensor, labels: Tensor, temperature: float = 1.0, tp_group: Any = None, chunk_size: int = 1024
) -> Tensor:
    """Log-probability of each label under softmax(logits / temperature), [...] float32.

    `logits` [..., V] are not modified. A `tp_group` of more than one rank is an InputError. `chunk_size` is not used.
    """
    conventions.require_one_rank(tp_group=tp_group)
    return conventions.gathered_log_probs(logits, labels, temperature=temperature)


def gather_logprobs_entropy(
    logits: Tensor, labels: Tensor, temperature: float = 1.0, tp_group: Any = None, chunk_size: int = 1024
) -> tuple[Tensor, Tensor]:
    """As `gather_logprobs`, and the entropy of each row, [...] float32 both. The entropy carries a gradient."""
    conventions.require_one_rank(tp_group=tp_group)
    return conventions.gathered_log_probs_and_entropy(logits, labels, temperature=temperature)
