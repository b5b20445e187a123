"""prime-rl's `prime_rl.trainer.rl.loss`.

Kept: results in the dtype of the logits; the entropy carries no gradient.

Not kept: shapes are not checked by jaxtyping. prime-rl divides the logits by a temperature a token before the call;
this library's `log_probs_from_logits(..., temperature=temperatures)` divides in float32, without the copy.
"""

from torch import Tensor

from compiled_logprobs.compat import conventions, missing

missing.advise(globals())


def selective_log_softmax(logits: Tensor, index: Tensor) -> Tensor:
    """Log-probability of each label, [B, S] in the dtype of `logits` [B, S, V], which are not modified."""
    return conventions.gathered_log_probs(logits, index, out_dtype=None)


def compute_entropy(shifted_logits: Tensor) -> Tensor:
    """Entropy of each row of `shifted_logits` [B, S, V], [B, S] in their dtype, without a gradient."""
    return conventions.entropy(shifted_logits.detach(), out_dtype=None)
