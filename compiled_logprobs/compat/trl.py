"""TRL's `trl.trainer.utils`, with the arguments of 1.14 and later, of which 1.13 had the first two.

From 1.15 on, TRL's trainers compute log-probabilities from hidden states (`add_fused_lm_head`) and call none of these.

Kept: one label a row or K of them, `row_mask`, results in the dtype of the logits, but float32 where TRL 1.14 has a
kernel: on CUDA and XPU, for at most three dimensions and one label a row. The logits are not modified.

Not kept: results and gradients of 16-bit logits are closer to float64 than those of TRL's plain torch. A masked row has
gradient 0 even where its logits are NaN. An empty batch gives an empty result, where plain TRL raises an error.
"""

import torch
from torch import Tensor

from compiled_logprobs.arguments import NO_LABEL
from compiled_logprobs.compat import conventions, missing
from compiled_logprobs.errors import InputError

missing.advise(globals())


def selective_log_softmax(
    logits: Tensor, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None
) -> Tensor:
    """Log-probability of each label under softmax(logits / temperature), in the shape of `index`.

    Args:
        logits: [..., V]. Not modified.
        index: [...] or [..., K].
        temperature: > 0.
        row_mask: of the shape of `index`; where it is 0 the result is 0 and the label is not looked at.
    """
    labels, dtype = _masked(index, row_mask), _result_dtype(logits, index, row_mask)
    return conventions.gathered_log_probs(logits, labels, temperature=temperature, out_dtype=dtype)


def selective_log_softmax_and_entropy(
    logits: Tensor,
    index: Tensor,
    entropy_requires_grad: bool = True,
    temperature: float = 1.0,
    row_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each label and entropy of each row, [...] both, under softmax(logits / temperature).

    Args:
        logits: [..., V]. Not modified.
        index: [...].
        entropy_requires_grad: whether the entropy carries a gradient.
        temperature: > 0.
        row_mask: [...]; where it is 0 both results are 0 and the label is not looked at.
    """
    labels, dtype = _masked(index, row_mask), _result_dtype(logits, index, row_mask)
    log_probs, entropy = conventions.gathered_log_probs_and_entropy(
        logits, labels, temperature=temperature, out_dtype=dtype
    )
    return log_probs, entropy if entropy_requires_grad else entropy.detach()


def entropy_from_logits(logits: Tensor, chunk_size: int = 128) -> Tensor:
    """Entropy of each row of `logits` [..., V], [...]. `chunk_size` changes nothing."""
    return conventions.entropy(logits, out_dtype=_result_dtype(logits))


def _masked(index: Tensor, row_mask: Tensor | None) -> Tensor:
    """The labels, of which those with a `row_mask` of 0 are ignored."""
    if row_mask is None:
        return index
    if row_mask.ndim > index.ndim or any(
        m not in (1, n) for m, n in zip(reversed(row_mask.shape), reversed(index.shape), strict=False)
    ):
        raise InputError(
            f"got a row_mask of shape {list(row_mask.shape)} for an index of shape {list(index.shape)}; the same shape "
            "is valid. Slice one of them so that they agree."
        )
    return index.long().masked_fill(row_mask == 0, NO_LABEL)


def _result_dtype(logits: Tensor, index: Tensor | None = None, row_mask: Tensor | None = None) -> torch.dtype:
    """float32 where TRL runs its kernel, else that of the logits."""
    has_kernel = logits.device.type in ("cuda", "xpu") and logits.dtype != torch.float64 and logits.ndim <= 3
    integers = (torch.int32, torch.int64)
    for rows, dtypes in ((index, integers), (row_mask, (torch.bool, *integers))):
        has_kernel &= rows is None or (rows.shape == logits.shape[:-1] and rows.dtype in dtypes)
    return torch.float32 if has_kernel and logits.stride(-1) == 1 else logits.dtype
