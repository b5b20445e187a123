"""OpenRLHF's `openrlhf.models.utils`.

Kept: results in the dtype of the logits. A label of -100 counts 0 in every dtype, as in the original in float32 with
flash-attn; elsewhere it is an error there.

Not kept: the logits are not modified, where the original divides them by the temperature in place and its caller passes
them on: divide them yourself if you counted on that. Before September 2026 OpenRLHF's actor takes the entropy of logits
that are not yet divided by the temperature: pass what you mean.
"""

from torch import Tensor

from compiled_logprobs.compat import conventions


def log_probs_from_logits(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probability of each label under softmax(logits / temperature), [...] in the dtype of `logits` [..., V]."""
    return conventions.log_probs(logits, labels, temperature=temperature, out_dtype=None)


def compute_entropy(logits: Tensor) -> Tensor:
    """Entropy of each row of `logits` [..., V], [...] in their dtype."""
    return conventions.entropy(logits, out_dtype=None)
