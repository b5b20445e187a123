"""slime's `slime.utils.ppo_utils`, for whole logits and for those that are split over tensor-parallel ranks.

Kept: log-probabilities [T, 1] beside entropies [T], both float32; for T = 0 both are [0], in the dtype of the logits.
The entropy is that of all logits, whatever `log_prob_keep_mask` leaves out. The mask cannot leave out the label itself.

A `tp_group` of None stands for all ranks of torch.distributed.

Not kept: a token of -100 is an error. The graph can be kept for a second backward, and no float32 softmax of all logits
is stored.
"""

from typing import Any

import torch
from torch import Tensor

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
        logits: [T, V], or [T, V / ranks] of this rank, already divided by the temperature. Not modified.
        tokens: [T], of the whole vocabulary.
        tp_group: the ranks that the vocabulary is split over, equally and in their order; None for all there are.
        with_entropy: whether to return the entropy.
        chunk_size: changes nothing.
        log_prob_keep_mask: of the shape of `logits`, bool: what each token was sampled from (top-p); costs a copy of
            the logits.
        with_entropy_grad: whether the entropy carries a gradient.
    """
    group = conventions.all_ranks() if tp_group is None else tp_group
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
        entropy = conventions.entropy(x, group=group) if with_entropy else None
        kept = x.masked_fill(~_with_token(log_prob_keep_mask, tokens, group), -torch.inf)
        log_probs = conventions.gathered_log_probs(kept, tokens, masked_logits=True, group=group)
    elif with_entropy:
        log_probs, entropy = conventions.gathered_log_probs_and_entropy(logits, tokens, group=group)
    else:
        log_probs = conventions.gathered_log_probs(logits, tokens, group=group)
    if entropy is not None and not with_entropy_grad:
        entropy = entropy.detach()
    if len(logits) == 0:
        return log_probs.to(logits.dtype), None if entropy is None else entropy.to(logits.dtype)
    return log_probs.unsqueeze(-1), entropy


def _with_token(keep: Tensor, tokens: Tensor, group: Any) -> Tensor:
    """The mask of the columns here, with the token's own, if it is one of them."""
    held = keep.shape[-1]
    column = (tokens.long() - (0 if group is None else group.rank() * held)).unsqueeze(-1)
    # Another rank has the token, or nobody, where no value was looked at: then its row becomes NaN.
    is_here = (column >= 0) & (column < held)
    column = column.clamp(0, held - 1)
    return keep.scatter(-1, column, keep.gather(-1, column) | is_here)
