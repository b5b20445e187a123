"""AReaL's `areal.utils.functional`, for logits that are not split over ranks.

Kept: float32 results of logits of any dtype, divided by the temperature in float32.

Not kept: a `tp_group` of more than one rank is refused. Empty input gives an empty result, where the original stops with an
assertion. A token of probability 0 counts 0 in the entropy, where the original gives NaN. The gradient needs one tensor of the
size of the logits, in their dtype, whatever `chunk_size` is; the original leaves to torch.compile what is kept of each chunk.
"""

from typing import Any

from torch import Tensor

from compiled_logprobs.compat.conventions import NO_LABEL
from compiled_logprobs.compat.conventions import log_probs as _log_probs
from compiled_logprobs.compat.conventions import log_probs_and_entropy as _both
from compiled_logprobs.compat.ranks import require_one_rank


def gather_logprobs(
    logits: Tensor, labels: Tensor, temperature: float = 1.0, tp_group: Any = None, chunk_size: int = 1024
) -> Tensor:
    """Log-probability of each label under softmax(logits / temperature), [...] float32.

    Args:
        logits: [..., V]. Not modified.
        labels: [...].
        temperature: > 0.
        tp_group: None or a process group of one rank.
        chunk_size: changes nothing: no backend copies all logits.

    Raises:
        InputError: `tp_group` has more ranks.
    """
    require_one_rank(tp_group=tp_group)
    return _log_probs(logits, labels, temperature=temperature, ignore_index=NO_LABEL)


def gather_logprobs_entropy(
    logits: Tensor, labels: Tensor, temperature: float = 1.0, tp_group: Any = None, chunk_size: int = 1024
) -> tuple[Tensor, Tensor]:
    """Log-probability of each label, and entropy of each row, under softmax(logits / temperature): [...] float32 both.

    The arguments and errors are those of `gather_logprobs`. The entropy carries a gradient.
    """
    require_one_rank(tp_group=tp_group)
    return _both(logits, labels, temperature=temperature, ignore_index=NO_LABEL)
