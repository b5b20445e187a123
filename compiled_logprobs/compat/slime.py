"""slime's `slime.utils.ppo_utils`, for logits that are not split over ranks.

Kept: log-probabilities [T, 1] beside entropies [T], both float32; for T = 0 both are [0], in the dtype of the logits.
The entropy is that of all logits, whatever `log_prob_keep_mask` leaves out. The mask cannot leave out the label itself.

Not kept: logits that are split over ranks are refused; a `tp_group` of None means all ranks of torch.distributed, as in
the original. A token of -100 is an error. The graph can be kept for a second backward, and no float32 softmax of all
logits is stored.
"""

from typing import Any

import torch
from torch import Tensor, distributed

from compiled_logprobs.arguments import NO_LABEL, check_labels, check_logits
from compiled_logprobs.compat import conventions
from compiled_logprobs.errors import InputError


def calculate_log_probs_and_entropy(
    logits: Tensor,
    tokens: Tensor,
    tp_group: Any,
    with_entropy: bool = False,
    chunk_size: int = -1,
    log_prob_keep_mask: Tensor | None = None,
    with_entropy_grad: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Log-probability of each token, [T, 1], and the entropy of each row, [T], or None where not asked for.

    Args:
        logits: [T, V], already divided by the temperature. Not modified.
        tokens: [T].
        tp_group: a process group of one rank, or None where torch.distributed has no more, else InputError.
        with_entropy: whether to return the entropy.
        chunk_size: changes nothing.
        log_prob_keep_mask: [T, V] bool, what each token was sampled from (top-p); costs a copy of the logits.
        with_entropy_grad: whether the entropy carries a gradient.
    """
    if tp_group is not None:
        conventions.require_one_rank(tp_group=tp_group)
    elif distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        what = f"a tp_group of None, which stands for all {distributed.get_world_size()} ranks"
        raise conventions.split_error(what, "a group of one rank is valid")
    entropy = None
    if log_prob_keep_mask is not None:
        check_logits(logits)
        check_labels(logits, tokens, NO_LABEL)
        if log_prob_keep_mask.shape != logits.shape or log_prob_keep_mask.dtype != torch.bool:
            raise InputError(
                f"got a log_prob_keep_mask of shape {list(log_prob_keep_mask.shape)} and {log_prob_keep_mask.dtype} "
                f"for logits of shape {list(logits.shape)}; their shape and torch.bool are valid. "
                "Convert it, e.g. with mask.bool()."
            )
        # Widened for two gradients, as in the original, so that they are rounded after their sum.
        is_wide = with_entropy and with_entropy_grad
        x = logits.to(conventions.at_least_float32(logits)) if is_wide else logits
        entropy = conventions.entropy(x) if with_entropy else None
        # Where no value was looked at, a token may still be outside, and its row becomes NaN.
        inside = tokens.long().clamp(0, logits.shape[-1] - 1)
        keep = log_prob_keep_mask.scatter(-1, inside.unsqueeze(-1), True)
        kept = x.masked_fill(~keep, -torch.inf)
        log_probs = conventions.gathered_log_probs(kept, tokens, masked_logits=True)
    elif with_entropy:
        log_probs, entropy = conventions.gathered_log_probs_and_entropy(logits, tokens)
    else:
        log_probs = conventions.gathered_log_probs(logits, tokens)
    if entropy is not None and not with_entropy_grad:
        entropy = entropy.detach()
    if len(logits) == 0:
        return log_probs.to(logits.dtype), None if entropy is None else entropy.to(logits.dtype)
    return log_probs.unsqueeze(-1), entropy
