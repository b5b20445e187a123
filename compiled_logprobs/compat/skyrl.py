"""SkyRL's `skyrl.backends.skyrl_train.utils.torch_utils`.

Kept: names, order of arguments, dtypes. `logprobs_from_logits` returns float32, as with flash-attn, where -100 counts 0, too;
`inplace_backward=True`, the default, writes the gradient over `logits`. Entropies have the dtype of the logits.

Not kept: 16-bit logits are summed in float32 and rounded once at the end, where the originals without flash-attn round on the
way. A token of probability 0 counts 0 in an entropy, where the original gives NaN. After an in-place gradient autograd raises
an error where something else needs the values of the logits; flash-attn's kernel does not tell autograd that it wrote.
"""

from torch import Tensor

from compiled_logprobs.compat.conventions import entropy as _entropy
from compiled_logprobs.compat.conventions import log_probs as _log_probs
from compiled_logprobs.compat.conventions import may_overwrite, wide
from compiled_logprobs.errors import InputError


def logprobs_from_logits(logits: Tensor, labels: Tensor, inplace_backward: bool = True) -> Tensor:
    """Log-probability of each label, [...] float32 (float64 for float64 logits).

    Args:
        logits: [..., V].
        labels: [...]; -100 counts 0.
        inplace_backward: write the gradient over `logits`, where they are not a leaf of the graph; do not read them
            afterwards. With False they are never modified.
    """
    return _log_probs(
        logits,
        labels.reshape(logits.shape[:-1]),
        inplace_backward=inplace_backward and may_overwrite(logits),
        out_dtype=wide(logits),
    )


def chunked_entropy_from_logits(
    logits: Tensor, requires_grad: bool = False, attention_mask: Tensor | None = None, chunk_size: int = 1024
) -> Tensor:
    """Entropy of each position, [B, S] in the dtype of `logits`.

    Args:
        logits: [B, S, V]. Not modified.
        requires_grad: whether the entropy carries a gradient.
        attention_mask: [B, S], what each entropy is multiplied by: 0 where a position does not count.
        chunk_size: changes nothing: no backend copies all logits.

    Raises:
        InputError: the mask is not [B, S] (a ValueError, as in the original).
    """
    if attention_mask is not None and attention_mask.shape != logits.shape[:-1]:
        raise InputError(
            f"got an attention_mask of shape {list(attention_mask.shape)} for logits of shape {list(logits.shape)}; "
            f"{list(logits.shape[:-1])} is valid. Slice one of them so that they agree."
        )
    entropy = _entropy(logits if requires_grad else logits.detach(), out_dtype=wide(logits))
    if attention_mask is not None:
        entropy = entropy * attention_mask
    return entropy.to(logits.dtype)
