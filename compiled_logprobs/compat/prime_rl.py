"""prime-rl's `prime_rl.trainer.rl.loss`.

Kept: results in the dtype of the logits; the entropy carries no gradient.

Not kept: shapes are not checked by jaxtyping. A token of probability 0 counts 0 in the entropy, where the original gives NaN.
prime-rl's temperatures, one a token, divide the logits before the call; `log_probs_from_logits(..., temperature=temperatures)`
of this library divides in float32, without the copy.
"""

from torch import Tensor

from compiled_logprobs.compat.conventions import NO_LABEL
from compiled_logprobs.compat.conventions import entropy as _entropy
from compiled_logprobs.compat.conventions import log_probs as _log_probs


def selective_log_softmax(logits: Tensor, index: Tensor) -> Tensor:
    """Log-probability of each label, [B, S] in the dtype of `logits` [B, S, V], which are not modified."""
    return _log_probs(logits, index, ignore_index=NO_LABEL, out_dtype=None)


def compute_entropy(shifted_logits: Tensor) -> Tensor:
    """Entropy of each row of `shifted_logits` [B, S, V], [B, S] in their dtype, without a gradient."""
    return _entropy(shifted_logits.detach(), out_dtype=None)
