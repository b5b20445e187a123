"""SkyRL's `skyrl.backends.skyrl_train.utils.torch_utils`.

Kept: names, order of arguments, dtypes. `logprobs_from_logits` is as with flash-attn: float32, and a label of -100
counts 0. `inplace_backward=True`, the default, writes the gradient over `logits`. Entropies have the dtype of the
logits.

Not kept: if something else needs the logits after an in-place gradient, autograd raises an error, as in `compat.verl`.
"""

from torch import Tensor

from compiled_logprobs.compat import conventions, missing
from compiled_logprobs.errors import InputError

missing.advise(globals())


def logprobs_from_logits(logits: Tensor, labels: Tensor, inplace_backward: bool = True) -> Tensor:
    """As `compat.verl.logprobs_from_logits`: [...] float32, the gradient written over `logits` by default."""
    return conventions.overwriting_log_probs(logits, labels, inplace_backward)


def chunked_entropy_from_logits(
    logits: Tensor, requires_grad: bool = False, attention_mask: Tensor | None = None, chunk_size: int = 1024
) -> Tensor:
    """Entropy of each position, [B, S] in the dtype of `logits`.

    Args:
        logits: [B, S, V]. Not modified.
        requires_grad: whether the entropy carries a gradient.
        attention_mask: [B, S], what each entropy is multiplied by; InputError (a ValueError) for another shape.
        chunk_size: changes nothing.
    """
    if attention_mask is not None and attention_mask.shape != logits.shape[:-1]:
        raise InputError(
            f"attention_mask shape {list(attention_mask.shape)} does not match logits shape {list(logits.shape)}; "
            f"{list(logits.shape[:-1])} is valid. Slice one of them so that they agree."
        )
    logits = logits if requires_grad else logits.detach()
    entropy = conventions.entropy(logits, out_dtype=conventions.at_least_float32(logits))
    return (entropy if attention_mask is None else entropy * attention_mask).to(logits.dtype)
