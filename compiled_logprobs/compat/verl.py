"""verl's `verl.utils.torch_functional` and `verl.utils.megatron.tensor_parallel`.

Kept: names, order of arguments, and dtypes. `logprobs_from_logits` is as with flash-attn: float32, and a label of -100
counts 0; verl without flash-attn returns the dtype of the logits. `inplace_backward=True`, the default, writes the
gradient over `logits`, as flash-attn does. The `vocab_parallel` functions take the columns that this rank of Megatron's
tensor-parallel group has; a label of -100 counts 0. From hidden states log-probabilities are float32 and ignore no
label; the entropy of `FusedLinearForPPO` has the dtype of the hidden states. Over a group their gradients on all ranks
add up to the whole, as where Megatron gathers a sequence that is split over them.

Not kept: if something else needs the logits after an in-place gradient, autograd raises an error; flash-attn's kernel
does not tell autograd that it wrote. VERL_DISABLE_FLASH_ATTN_CE is not read: `compiled_logprobs.autotune` chooses. The
`vocab_parallel` functions never modify the logits, so that they need not be copied for the entropy, and a sum of
squares has no gradient. `linear_cross_entropy` reduces nothing.
"""

from typing import Any

import torch
from torch import Tensor, nn

from compiled_logprobs.compat import conventions, missing
from compiled_logprobs.errors import InputError

missing.advise(globals())


def logprobs_from_logits(logits: Tensor, labels: Tensor, inplace_backward: bool = True) -> Tensor:
    """Log-probability of each label, [...] float32 (float64 for float64 logits).

    Args:
        logits: [..., V].
        labels: [...]; -100 counts 0.
        inplace_backward: write the gradient over `logits`, unless they are a leaf of the graph; do not read them
            afterwards. With False they are never modified.
    """
    return conventions.overwriting_log_probs(logits, labels, inplace_backward)


def logprobs_from_logits_v2(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-probability of each label, [...] in the dtype of `logits` [..., V], which are not modified."""
    return conventions.gathered_log_probs(logits, labels, out_dtype=None)


logprobs_from_logits_naive = logprobs_from_logits_v2  # the originals differ in their loops


def gather_from_labels(data: Tensor, label: Tensor) -> Tensor:
    """`data` [..., V] at `label` [...]."""
    return data.gather(-1, label.unsqueeze(-1)).squeeze(-1)


def entropy_from_logits(logits: Tensor) -> Tensor:
    """Entropy of each row of `logits` [..., V], [...] in their dtype."""
    return conventions.entropy(logits, out_dtype=None)


def entropy_from_logits_with_chunking(logits: Tensor, chunk_size: int = 2048) -> Tensor:
    """Entropy of each row of `logits` [N, V], [N] float32. `chunk_size` changes nothing."""
    return conventions.entropy(logits)


def calculate_sum_pi_squared_from_logits(logits: Tensor) -> Tensor:
    """Sum of the squared probabilities of each row of `logits` [..., V], [...] in their dtype, differentiable.

    Where a gradient is needed: at temperature 1/2 the probability of y is q(y) = p(y)^2 / sum, so the sum is
    exp(2 log p(y) - log q(y)) for any y. The most likely y is taken, for which both logarithms are smallest.
    """
    if not (logits.requires_grad and torch.is_grad_enabled()):
        return conventions.sum_p_squared(logits, out_dtype=None)
    labels = logits.detach().argmax(-1)
    dtype = conventions.at_least_float32(logits)
    x = logits.to(dtype)  # the two gradients nearly cancel, so they are rounded after their sum
    log_p = conventions.log_probs(x, labels, out_dtype=dtype)
    log_q = conventions.log_probs(x, labels, temperature=0.5, out_dtype=dtype)
    return torch.exp(2 * log_p - log_q).to(logits.dtype)


def log_probs_from_logits_response(input_ids: Tensor, logits: Tensor, response_length: int) -> Tensor:
    """Log-probabilities of the last `response_length` tokens, [B, response_length] float32.

    Args:
        input_ids: [B, S]; the logits one position before predict each token.
        logits: [B, S, V]. Not modified; the original with flash-attn overwrites them where B is 1.
    """
    _require_response(response_length, logits.shape[1], f"logits of shape {list(logits.shape)}")
    return logprobs_from_logits(
        logits[:, -response_length - 1 : -1], input_ids[:, -response_length:], inplace_backward=False
    )


def log_probs_from_logits_response_rmpad(
    input_ids: Tensor, attention_mask: Tensor, logits_rmpad: Tensor, response_length: int
) -> Tensor:
    """As `log_probs_from_logits_response`, from the logits of the tokens that are no padding; 0 at padding.

    The last token of a sequence counts as followed by the first of the next, as in the original: mask that position.

    Args:
        input_ids, attention_mask: [B, S]; T tokens have a mask other than 0.
        logits_rmpad: [T, V]. Not modified; the original with flash-attn overwrites them.
    """
    indices, tokens = _without_padding(input_ids, attention_mask)
    batch_size, seqlen = input_ids.shape
    return log_probs_from_logits_all_rmpad(
        tokens.unsqueeze(0), logits_rmpad, indices, batch_size, seqlen, response_length
    )


def log_probs_from_logits_all_rmpad(
    input_ids_rmpad: Tensor, logits_rmpad: Tensor, indices: Tensor, batch_size: int, seqlen: int, response_length: int
) -> Tensor:
    """As `log_probs_from_logits_response_rmpad`, from T tokens [1, T] and their `indices` [T] in [B * S]."""
    _require_response(response_length, seqlen, f"sequences of {seqlen} tokens")
    labels = input_ids_rmpad.squeeze(0).roll(-1)
    log_probs = logprobs_from_logits(logits_rmpad, labels, inplace_backward=False)
    return _response(log_probs, indices, batch_size, seqlen, response_length)


def vocab_parallel_log_probs_from_logits(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-probability of each label, [...] float32, of `logits` [..., V / ranks]; a label of -100 counts 0."""
    return conventions.log_probs(logits, labels, group=conventions.tensor_parallel_ranks())


def vocab_parallel_log_probs_from_logits_response_rmpad(
    input_ids: Tensor, attention_mask: Tensor, logits_rmpad: Tensor, response_length: int
) -> Tensor:
    """As `log_probs_from_logits_response_rmpad`, of `logits_rmpad` [T, V / ranks]."""
    indices, tokens = _without_padding(input_ids, attention_mask)
    _require_response(response_length, input_ids.shape[1], f"sequences of {input_ids.shape[1]} tokens")
    log_probs = vocab_parallel_log_probs_from_logits(logits_rmpad, tokens.roll(-1))
    return _response(log_probs, indices, len(input_ids), input_ids.shape[1], response_length)


def vocab_parallel_entropy(vocab_parallel_logits: Tensor) -> Tensor:
    """Entropy of each row of `vocab_parallel_logits` [..., V / ranks], [...] in their dtype."""
    group = conventions.tensor_parallel_ranks()
    return conventions.entropy(vocab_parallel_logits, out_dtype=None, group=group)


def vocab_parallel_entropy_with_chunking(vocab_parallel_logits: Tensor, chunk_size: int = 2048) -> Tensor:
    """Entropy of each row of `vocab_parallel_logits` [..., V / ranks], [...] float32. `chunk_size` changes nothing."""
    return conventions.entropy(vocab_parallel_logits, group=conventions.tensor_parallel_ranks())


def vocab_parallel_sum_pi_squared(vocab_parallel_logits: Tensor) -> Tensor:
    """Sum of the squared probabilities of each row of logits [..., V / ranks], [...] in their dtype."""
    group = conventions.tensor_parallel_ranks()
    return conventions.sum_p_squared(vocab_parallel_logits.detach(), out_dtype=None, group=group)


def _without_padding(input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Where the tokens that are no padding lie in [B * S], [T], and they."""
    if attention_mask.shape != input_ids.shape:
        raise InputError(
            f"got an attention_mask of shape {list(attention_mask.shape)} for input_ids of shape "
            f"{list(input_ids.shape)}; the same shape is valid. Slice one of them so that they agree."
        )
    indices = attention_mask.flatten().nonzero().squeeze(-1)
    return indices, input_ids.flatten()[indices]


def _response(log_probs: Tensor, indices: Tensor, batch_size: int, seqlen: int, response_length: int) -> Tensor:
    """Log-probabilities [T] of tokens, each at the token before, those of the last tokens as [B, response_length]."""
    padded = log_probs.new_zeros(batch_size * seqlen).index_put((indices,), log_probs)
    return padded.view(batch_size, seqlen)[:, -response_length - 1 : -1]


def _require_response(response_length: int, length: int, what: str) -> None:
    """Raise InputError unless each token of the response has another before it."""
    if not 0 < response_length < length:
        raise InputError(
            f"got response_length={response_length} for {what}; 1 to {length - 1} are valid: nothing predicts the "
            "first token. Pass the prompt's last token with its logits as well."
        )


class FusedLinearForPPOFunction:
    """Stand for an autograd function of the same name; only `apply` is there."""

    @staticmethod
    def apply(
        hidden_states: Tensor,
        vocab_weights: Tensor,
        input_ids: Tensor,
        temperature: float = 1.0,
        chunk_size: int = 512,
    ) -> tuple[Tensor, Tensor]:
        """Log-probability of each of `input_ids`, float32, and entropy, in the dtype of the hidden states.

        Args:
            hidden_states: [T, H] or [B, S, H].
            vocab_weights: [V, H].
            input_ids: [T] or [B, S].
            temperature: > 0.
            chunk_size: changes nothing.
        """
        log_probs, entropy = conventions.log_probs_and_entropy_of_head(
            hidden_states, vocab_weights, input_ids, temperature=temperature
        )
        return log_probs, entropy.to(hidden_states.dtype)


class FusedLinearForPPO(nn.Module):
    """Stand for the module of the same name, which has no parameters. `chunk_size` changes nothing."""

    def __init__(self, chunk_size: int = 512) -> None:
        super().__init__()
        self.chunk_size = chunk_size

    def forward(
        self, hidden_states: Tensor, vocab_weights: Tensor, input_ids: Tensor, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """As `FusedLinearForPPOFunction.apply`."""
        return FusedLinearForPPOFunction.apply(hidden_states, vocab_weights, input_ids, temperature)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    reduction: str = "none",
    dist_process_group: Any = None,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each label and entropy of each row, [T] float32 both.

    Args:
        hidden: [T, H], or more dimensions, which are merged.
        weight: [V / ranks, H].
        labels: [T], or as many in any shape.
        temperature: > 0.
        reduction: "none", else InputError.
        dist_process_group: None or the process group that the vocabulary is split over.
    """
    if reduction.lower() != "none":
        raise InputError(f"got reduction={reduction!r}; 'none' is valid. Reduce the results afterwards.")
    group = conventions.of_ranks(dist_process_group)
    rows = conventions.with_share_of_gradient(hidden.reshape(-1, hidden.shape[-1]), group)
    return conventions.log_probs_and_entropy_of_head(
        rows, weight, labels.reshape(-1), temperature=temperature, group=group
    )
