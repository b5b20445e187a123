"""torchtune's `torchtune.rlhf`.

Kept: `logits_to_logprobs` and the sums of `get_batch_log_probs` have the dtype of the logits; its means and
`batched_logits_to_logprobs` are float32. `get_batch_log_probs` shifts by itself: the logits at one position predict the
label at the next.

Not kept: the mean of a sequence without a label has gradient 0, where the original's is NaN in float16.
"""

from torch import Tensor

from compiled_logprobs.compat import conventions
from compiled_logprobs.errors import InputError


def logits_to_logprobs(logits: Tensor, sequences: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probability of each token under softmax(logits / temperature), [B, R] in the dtype of `logits` [B, R, V]."""
    return conventions.gathered_log_probs(logits, sequences, temperature=temperature, out_dtype=None)


def batched_logits_to_logprobs(
    logits: Tensor, sequences: Tensor, temperature: float = 1.0, chunk_size: int = 4
) -> Tensor:
    """As `logits_to_logprobs`, but float32. `chunk_size` changes nothing."""
    return conventions.gathered_log_probs(logits, sequences, temperature=temperature)


def get_batch_log_probs(
    logits: Tensor, labels: Tensor, label_pad_token_id: int = -100, return_average_logprobs: bool = False
) -> Tensor:
    """Log-probability of each sequence, [B] in the dtype of `logits`, but a mean at least in float32.

    Args:
        logits: [B, S, V], of which the last position is not used. Not modified.
        labels: [B, S], of which the first position is not used.
        label_pad_token_id: a label that does not count.
        return_average_logprobs: the mean over the labels that count instead of their sum; 0 where none does.
    """
    if logits.shape[:-1] != labels.shape:
        raise InputError(
            f"got labels of shape {list(labels.shape)} for logits of shape {list(logits.shape)}; "
            f"{list(logits.shape[:-1])} is valid. Do not shift them: that is done here."
        )
    labels = labels[:, 1:]
    log_probs = conventions.log_probs(
        logits[:, :-1], labels, ignore_index=label_pad_token_id, out_dtype=conventions.at_least_float32(logits)
    )
    total = log_probs.sum(-1)
    if return_average_logprobs:
        return total / ((labels != label_pad_token_id).sum(-1) + 1e-8)
    return total.to(logits.dtype)


def truncate_sequence_for_logprobs(query_response_logits: Tensor, context_length: int) -> Tensor:
    """The logits that predict the response: [B, R, V], a view of [B, context_length + R, V]."""
    return query_response_logits[:, context_length - 1 : -1]
