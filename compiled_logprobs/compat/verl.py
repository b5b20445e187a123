"""verl's `verl.utils.torch_functional`.

Kept: names, order of arguments, and dtypes where an original has one dtype. `logprobs_from_logits` has two, float32 with
flash-attn and that of the logits without: here it is float32 always, as with flash-attn, which also has -100 as a label that
counts 0. `inplace_backward=True`, the default, writes the gradient over `logits`, as flash-attn does.

Not kept: 16-bit logits are summed in float32 and rounded once at the end, where the originals without flash-attn round on the
way. A token of probability 0 counts 0 in an entropy, where the originals give NaN. After an in-place gradient autograd raises
an error where something else needs the values of the logits; flash-attn's kernel does not tell autograd that it wrote.
The variable VERL_DISABLE_FLASH_ATTN_CE is not read: `compiled_logprobs.autotune` chooses.
"""

import torch
from torch import Tensor

from compiled_logprobs.compat.conventions import NO_LABEL, may_overwrite, wide
from compiled_logprobs.compat.conventions import entropy as _entropy
from compiled_logprobs.compat.conventions import log_probs as _log_probs


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


def logprobs_from_logits_v2(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-probability of each label, [...] in the dtype of `logits` [..., V], which are not modified."""
    return _log_probs(logits, labels, ignore_index=NO_LABEL, out_dtype=None)


def logprobs_from_logits_naive(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-probability of each label, [...] in the dtype of `logits` [..., V], which are not modified."""
    return _log_probs(logits, labels, ignore_index=NO_LABEL, out_dtype=None)


def gather_from_labels(data: Tensor, label: Tensor) -> Tensor:
    """`data` [..., V] at `label` [...]."""
    return data.gather(-1, label.unsqueeze(-1)).squeeze(-1)


def entropy_from_logits(logits: Tensor) -> Tensor:
    """Entropy of each row of `logits` [..., V], [...] in their dtype."""
    return _entropy(logits, out_dtype=None)


def entropy_from_logits_with_chunking(logits: Tensor, chunk_size: int = 2048) -> Tensor:
    """Entropy of each row of `logits` [N, V], [N] float32. `chunk_size` changes nothing: no backend copies all logits."""
    return _entropy(logits)


def calculate_sum_pi_squared_from_logits(logits: Tensor) -> Tensor:
    """Sum of the squared probabilities of each row of `logits` [..., V], [...] in their dtype, differentiable.

    With any label y it is exp(2 log p(y) - log q(y)), where q is the distribution at temperature 1/2: q(y) is p(y)^2 over that
    very sum. The label is the most likely one, for which the terms are smallest.
    """
    labels = logits.detach().argmax(-1)
    # With a gradient as float32, so that the two gradients, which nearly cancel, are rounded after their sum.
    x = logits.to(wide(logits)) if logits.requires_grad else logits
    log_p = _log_probs(x, labels, out_dtype=wide(logits))
    log_q = _log_probs(x, labels, temperature=0.5, out_dtype=wide(logits))
    return torch.exp(2 * log_p - log_q).to(logits.dtype)


def log_probs_from_logits_response(input_ids: Tensor, logits: Tensor, response_length: int) -> Tensor:
    """Log-probabilities of the last `response_length` tokens, [B, response_length] float32.

    Args:
        input_ids: [B, S], of which each token is predicted by the logits one position before.
        logits: [B, S, V]. Not modified. In the original's flash-attn branch the gradient goes over a copy of the slice, which
            is one only where B is more than 1: otherwise it goes over `logits`.
    """
    return logprobs_from_logits(
        logits[:, -response_length - 1 : -1], input_ids[:, -response_length:], inplace_backward=False
    )
