"""OpenRLHF's `openrlhf.models.utils`.

Kept: results in the dtype of the logits; a label of -100 counts 0 in every dtype, as in the original in float32 with flash-attn
(otherwise it is an error there).

Not kept: the original divides `logits` by the temperature in place, and hands what is left to its caller as the model's
output; here they are not modified. Whoever counted on the division has to do it. 16-bit logits are divided and summed in
float32 and rounded once at the end. A token of probability 0 counts 0 in the entropy, where the original gives NaN. Before
September 2026 OpenRLHF's actor takes the entropy of logits that are not yet divided by the temperature: pass it what you mean.
"""

from torch import Tensor

from compiled_logprobs.compat.conventions import entropy as _entropy
from compiled_logprobs.compat.conventions import log_probs as _log_probs


def log_probs_from_logits(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probability of each label under softmax(logits / temperature), [...] in the dtype of `logits`.

    Args:
        logits: [..., V]. Not modified.
        labels: [...].
        temperature: > 0.
    """
    return _log_probs(logits, labels, temperature=temperature, out_dtype=None)


def compute_entropy(logits: Tensor) -> Tensor:
    """Entropy of each row of `logits` [..., V], [...] in their dtype."""
    return _entropy(logits, out_dtype=None)
