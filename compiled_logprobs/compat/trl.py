"""TRL's `trl.trainer.utils`, with the arguments of 1.14 and later, of which 1.13 had the first two.

From 1.15 on, TRL's trainers compute log-probabilities from hidden states: `add_fused_lm_head` has a model call
`_ChunkedLogProbFunction`, which `patch` replaces, and none of the others.

Kept: one label a row or K of them, `row_mask`, results in the dtype of the logits, but float32 where TRL 1.14 has a
kernel: on CUDA and XPU, for at most three dimensions and one label a row. The logits are not modified.

From hidden states results are float32, or float64 where these are, which TRL computes in float32. `log_sum_sq_probs`
costs a second product, and `mean_logits` of a model with a soft cap another.

Not kept: results and gradients of 16-bit logits are closer to float64 than those of TRL's plain torch. A masked row has
gradient 0 even where its logits are NaN. An empty batch gives an empty result, where plain TRL raises an error.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

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


_OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


class _ChunkedLogProbFunction:
    """Stand for an autograd function of the same name, called `ChunkedLogProbFunction` in `trl.kernels`; only `apply`
    is there."""

    @staticmethod
    def apply(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = _OUTPUTS,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """Log-probability of each target [N], and of each row, [N], what `outputs` name, in their order, else None.

        Args:
            hidden: [N, H].
            weight, bias: [V, H] and [V], converted to the dtype of `hidden`.
            targets: [N].
            temperature: > 0.
            chunk_size: changes nothing.
            final_logit_softcapping: > 0, or None for no soft cap.
            logit_scale: > 0; what the logits are multiplied by, before the cap.
            outputs: "entropy", which carries a gradient; "log_sum_sq_probs", the logarithm of the sum of the squared
                probabilities; "mean_logits", the mean of the logits after cap and temperature; "is_top1", whether the
                target is the first of the most likely.
        """
        if not torch.is_autocast_enabled(hidden.device.type):
            weight, bias = weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)
        head: dict[str, Any] = {"bias": bias, "softcap": final_logit_softcapping, "logit_scale": logit_scale}
        asked = {"return_entropy": "entropy" in outputs, "return_argmax": "is_top1" in outputs}
        squares = "log_sum_sq_probs" in outputs
        results: Any = conventions.log_probs_of_head(
            hidden, weight, targets, temperature=temperature, return_logsumexp=squares, **asked, **head
        )
        if not squares and not any(asked.values()):
            return results, None, None, None, None
        log_squares = mean = None
        with torch.no_grad():
            if squares:  # the sum of exp(2 x), over the square of that of exp(x)
                twice: Any = conventions.log_probs_of_head(
                    hidden, weight, targets, temperature=temperature / 2, return_logsumexp=True, **head
                )
                log_squares = twice.logsumexp - 2 * results.logsumexp
            if "mean_logits" in outputs:
                mean = _mean_logits(hidden, weight, bias, final_logit_softcapping, logit_scale) / temperature
        is_top1 = results.argmax == targets if "is_top1" in outputs else None
        return results.log_probs, results.entropy, log_squares, mean, is_top1


def _mean_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, logit_scale: float
) -> Tensor:
    """Mean over the vocabulary, [N], after scale and soft cap; without one it is the product with the mean weight."""
    dtype = conventions.at_least_float32(hidden)
    if softcap is None:
        mean = hidden.to(dtype) @ weight.mean(0, dtype=dtype)
        return logit_scale * (mean if bias is None else mean + bias.mean(dtype=dtype))
    parts = [hidden.new_empty(0, dtype=dtype)]
    for part in torch.split(hidden, max(1, 2**24 // len(weight))):
        logits = functional.linear(part, weight, bias).to(dtype).mul_(logit_scale / softcap)
        parts.append(logits.tanh_().mean(-1).mul_(softcap))
    return torch.cat(parts)


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
