"""SkyRL's `utils.torch_utils` and `distributed.megatron.model_utils`, both in `skyrl.backends.skyrl_train`.

Kept: names, order of arguments, dtypes. `logprobs_from_logits` is as with flash-attn: float32, and a label of -100
counts 0. `inplace_backward=True`, the default, writes the gradient over `logits`. Entropies have the dtype of the
logits. The functions of `model_utils` from logits, and its classes, are as in `compat.nemo_rl`;
`vocab_parallel_entropy` is as in `compat.verl`, and so is the gradient of hidden states over a group.

Not kept: if something else needs the logits after an in-place gradient, autograd raises an error, as in `compat.verl`.
The logits are divided by the temperature, not the weight.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from compiled_logprobs.compat import conventions, missing, nemo_rl
from compiled_logprobs.compat.nemo_rl import ChunkedDistributedLogprob, DistributedLogprob
from compiled_logprobs.compat.sequences import Sequences, in_rows, of_next_tokens
from compiled_logprobs.errors import InputError

__all__ = [
    "ChunkedDistributedLogprob",
    "DistributedLogprob",
    "chunked_entropy_from_logits",
    "from_parallel_hidden_to_logprobs",
    "from_parallel_logits_to_logprobs",
    "from_parallel_logits_to_logprobs_packed_sequences",
    "logprobs_from_logits",
    "vocab_parallel_entropy",
]
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


def from_parallel_logits_to_logprobs(
    vocab_parallel_logits: Tensor,
    target: Tensor,
    vocab_start_index: int,
    vocab_end_index: int,
    tp_group: Any,
    inference_only: bool = False,
    cp_group: Any = None,
    chunk_size: int | None = None,
) -> Tensor:
    """As `compat.nemo_rl.from_parallel_logits_to_logprobs`: [B, S - 1] float32. `chunk_size` changes nothing."""
    bounds = (vocab_start_index, vocab_end_index)
    return nemo_rl.from_parallel_logits_to_logprobs(
        vocab_parallel_logits, target, *bounds, tp_group, inference_only, cp_group
    )


def from_parallel_logits_to_logprobs_packed_sequences(
    vocab_parallel_logits: Tensor,
    target: Tensor,
    cu_seqlens_padded: Tensor,
    unpacked_seqlen: int,
    vocab_start_index: int,
    vocab_end_index: int,
    group: Any,
    inference_only: bool = False,
    cp_group: Any = None,
    chunk_size: int | None = None,
    attention_mask: Tensor | None = None,
    sub_seq_lengths: list[list[int]] | None = None,
) -> Tensor:
    """As `compat.nemo_rl.from_parallel_logits_to_logprobs_packed_sequences`, and:

    Args:
        attention_mask: [B, unpacked_seqlen], whose columns a sequence's tokens are put back to.
        sub_seq_lengths: of each row of the result, the lengths of the sequences that lie in it, one after another at
            the distances that `cu_seqlens_padded` has.
    """
    part = conventions.part_of_group(vocab_parallel_logits, vocab_start_index, vocab_end_index, group=group)
    logits = (vocab_parallel_logits.detach() if inference_only else vocab_parallel_logits)[0]
    starts, columns = cu_seqlens_padded.to(logits.device), unpacked_seqlen - 1
    sequences = Sequences(starts, len(logits), cp_group)
    labels = sequences.next_tokens(target[0].to(logits.device))
    log_probs = sequences.of_all_ranks(conventions.gathered_log_probs(logits, labels, **part))
    if sub_seq_lengths is not None:
        return _in_shared_rows(log_probs, starts, columns, sub_seq_lengths)
    mask = None if attention_mask is None else attention_mask.to(logits.device, torch.bool)
    return in_rows(log_probs, starts, columns, mask)


def from_parallel_hidden_to_logprobs(
    hidden: Tensor,
    lm_head_weight: Tensor,
    target: Tensor,
    vocab_start_index: int,
    vocab_end_index: int,
    tp_group: Any,
    inference_only: bool = False,
    cp_group: Any = None,
    chunk_size: int | None = None,
    temperature: float = 1.0,
    fused_backend: str = "torch",
) -> Tensor:
    """Log-probability of each token but the first, [B, S - 1] float32.

    `chunk_size` and `fused_backend` change nothing.

    Args:
        hidden: [B, S / context ranks, H], or more positions, of which the last are not used.
        lm_head_weight: [V / ranks, H].
        target: [B, S], not shifted.
        vocab_start_index, vocab_end_index: the rows of the weight, of which all ranks have as many, else InputError.
        tp_group, cp_group: None or a process group.
        inference_only: the result carries no gradient.
        temperature: > 0.
    """
    part = conventions.part_of_group(lm_head_weight.T, vocab_start_index, vocab_end_index, tp_group=tp_group)
    if inference_only:
        hidden, lm_head_weight = hidden.detach(), lm_head_weight.detach()

    def compute(states: Tensor, labels: Tensor) -> Tensor:
        return conventions.log_probs_of_head(states, lm_head_weight, labels, temperature=temperature, **part)

    return of_next_tokens(compute, conventions.with_share_of_gradient(hidden, part["group"]), target, cp_group)


def vocab_parallel_entropy(
    vocab_parallel_logits: Tensor, chunk_size: int | None = None, chunk_memory_mb: int = 512
) -> Tensor:
    """Entropy of each row of `vocab_parallel_logits` [..., V / ranks], [...] in their dtype.

    `chunk_size` and `chunk_memory_mb` change nothing.
    """
    group = conventions.tensor_parallel_ranks()
    return conventions.entropy(vocab_parallel_logits, out_dtype=None, group=group)


def _in_shared_rows(values: Tensor, starts: Tensor, columns: int, lengths: Sequence[Sequence[int]]) -> Tensor:
    """Values [T] as `in_rows` has them, but with several sequences in a row."""
    padded = (starts[1:] - starts[:-1]).tolist()
    if sum(map(len, lengths)) != len(padded):
        raise InputError(
            f"got sub_seq_lengths of {sum(map(len, lengths))} sequences for cu_seqlens_padded of {len(padded)}; as "
            "many are valid. Pass one length for each sequence that is packed."
        )
    result, distances = [], iter(padded)
    begin = 0
    for of_row in lengths:
        row = values.new_zeros(columns)
        steps = [next(distances) for _ in of_row]
        for length, column in zip(of_row, accumulate(steps, initial=0), strict=False):
            count = max(0, min(length - 1, columns - column))
            row = row.index_copy(
                0, torch.arange(column, column + count, device=row.device), values[begin + column :][:count]
            )
        begin += sum(steps)
        result.append(row)
    return torch.stack(result) if result else values.new_zeros(0, columns)
