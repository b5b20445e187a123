"""EasyR1's `verl.utils.torch_functional`.

Kept: float32 results, labels of -100 (result 0, gradient 0), labels of any shape with as many elements.

Not kept: the gradient takes a tensor of its own, where the original with flash-attn always writes it over `logits`.
Whether flash-attn can be imported makes no difference. Logits that are a slice are not copied. The result is never
positive: before June 2025 EasyR1 without flash-attn returned the loss.
"""

from torch import Tensor

from compiled_logprobs.compat import conventions, missing

missing.advise(globals())


def log_probs_from_logits(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-probability of each label, [...] float32; `logits` [..., V], divided by the temperature, are not modified."""
    return conventions.log_probs(logits, conventions.as_rows(labels, logits))
