"""NeMo-RL's `nemo_rl.distributed.model_utils`.

Kept: float32 results of logits [B, S, V / ranks], the columns of this rank of a tensor-parallel group; positions may be
split over a context-parallel group as well, whose gradients are added up. The functions shift by themselves and return
S - 1 columns for S tokens; the classes do not shift. `ChunkedDistributedEntropy` returns the sum of p log p: minus the
entropy, in spite of its name. Sampling parameters filter the logits as in the originals, which do not apply their
temperature; a label that was filtered out has -inf.

Not kept: filtering needs all columns on one rank. With `inference_only=True` the result carries no gradient, where the
originals' backward fails.
"""

from typing import Any

import torch
from torch import Tensor

from compiled_logprobs.compat import conventions, missing
from compiled_logprobs.compat.sequences import Sequences, gathered_sequence, in_rows, of_next_tokens
from compiled_logprobs.errors import InputError

missing.advise(globals())


def get_next_token_logprobs_from_logits(
    input_ids: Tensor,
    next_token_logits: Tensor,
    seq_index: Tensor | None = None,
    vocab_parallel_rank: int | None = None,
    vocab_parallel_group: Any = None,
    context_parallel_group: Any = None,
    sampling_params: Any = None,
    chunk_size: int | None = None,
) -> Tensor:
    """Log-probability of each token but the first, [B, S - 1] float32.

    `seq_index` and `chunk_size` change nothing.

    Args:
        input_ids: [B, S], not shifted.
        next_token_logits: [B, S / context ranks, V / ranks], or more positions, of which the last are not used; or a
            DTensor that is sharded over its last dimension. Not modified.
        vocab_parallel_rank: that of this process in the group, else InputError.
        vocab_parallel_group, context_parallel_group: None or a process group.
        sampling_params: None, or has `top_k` and `top_p`; filtering needs all columns here, and costs a copy of them.
    """
    logits, group = next_token_logits, conventions.of_ranks(vocab_parallel_group)
    if group is not None and vocab_parallel_rank != group.rank():
        raise InputError(
            f"got vocab_parallel_rank={vocab_parallel_rank!r} on rank {group.rank()} of vocab_parallel_group; "
            "these are the same where the columns lie in the order of the ranks. Pass that rank."
        )
    return of_next_tokens(
        lambda logits, labels: _log_probs(logits, labels, group, sampling_params),
        logits,
        input_ids,
        context_parallel_group,
    )


def from_parallel_logits_to_logprobs(
    vocab_parallel_logits: Tensor,
    target: Tensor,
    vocab_start_index: int,
    vocab_end_index: int,
    tp_group: Any,
    inference_only: bool = False,
    cp_group: Any = None,
    chunk_size: int | None = None,
    sampling_params: Any = None,
) -> Tensor:
    """As `get_next_token_logprobs_from_logits`, from the same logits and tokens.

    Args:
        vocab_start_index, vocab_end_index: the columns of this rank, of which all ranks have as many, else InputError.
        tp_group, cp_group: None or a process group.
        inference_only: the result carries no gradient.
    """
    bounds = (vocab_start_index, vocab_end_index)
    group = conventions.part_of_group(vocab_parallel_logits, *bounds, tp_group=tp_group)["group"]
    return get_next_token_logprobs_from_logits(
        target,
        vocab_parallel_logits.detach() if inference_only else vocab_parallel_logits,
        vocab_parallel_rank=None if group is None else group.rank(),
        vocab_parallel_group=group,
        context_parallel_group=cp_group,
        sampling_params=sampling_params,
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
    sampling_params: Any = None,
    target_is_pre_rolled: bool = False,
) -> Tensor:
    """Log-probability of each token but the first of each of B sequences, [B, unpacked_seqlen - 1] float32.

    What follows a sequence in its row is 0. `chunk_size` changes nothing.

    Args:
        vocab_parallel_logits: [1, T / context ranks, V / ranks], of all sequences one after another. Not modified.
        target: [1, T], not shifted.
        cu_seqlens_padded: [B + 1], where each sequence begins and the last one ends, in T.
        unpacked_seqlen: longer sequences are cut.
        vocab_start_index, vocab_end_index: the columns of this rank, of which all ranks have as many, else InputError.
        group, cp_group: None or a process group.
        inference_only: the result carries no gradient.
        sampling_params: as in `get_next_token_logprobs_from_logits`.
        target_is_pre_rolled: `target` is [1, T / context ranks] of this rank, shifted already.
    """
    part = conventions.part_of_group(vocab_parallel_logits, vocab_start_index, vocab_end_index, group=group)
    logits = (vocab_parallel_logits.detach() if inference_only else vocab_parallel_logits)[0]
    starts = cu_seqlens_padded.to(logits.device)
    sequences = Sequences(starts, len(logits), cp_group)
    labels = (sequences.without_last if target_is_pre_rolled else sequences.next_tokens)(target[0].to(logits.device))
    log_probs = _log_probs(logits, labels, part["group"], sampling_params)
    return in_rows(sequences.of_all_ranks(log_probs), starts, unpacked_seqlen - 1)


def from_parallel_hidden_states_to_logprobs(
    tensor_parallel_hidden_states: Tensor,
    output_weight_layer: Tensor,
    runtime_gather_output: bool,
    target: Tensor,
    vocab_start_index: int,
    vocab_end_index: int,
    tp_group: Any,
    inference_only: bool = False,
    cp_group: Any = None,
    chunk_size: int | None = None,
) -> Tensor:
    """Log-probability of each token but the first, [B, S - 1] float32.

    `runtime_gather_output` and `chunk_size` change nothing.

    Args:
        tensor_parallel_hidden_states: [S / ranks, B, H], as Megatron has them where a sequence is split over the group.
        output_weight_layer: [V / ranks, H].
        target: [B, S], not shifted.
        vocab_start_index, vocab_end_index: the rows of the weight, of which all ranks have as many, else InputError.
        tp_group: None or a process group.
        cp_group: None or a process group of one rank, else InputError, as in the original.
        inference_only: the result carries no gradient.
    """
    if (context := conventions.of_ranks(cp_group)) is not None:
        raise InputError(
            f"got a cp_group of {context.size()} ranks; None or a group of one rank is valid here, as in NeMo-RL. Call "
            "from_parallel_logits_to_logprobs, or compiled_logprobs.log_probs_from_hidden with each rank's own labels."
        )
    hidden, weight = tensor_parallel_hidden_states, output_weight_layer
    part = conventions.part_of_group(weight.T, vocab_start_index, vocab_end_index, tp_group=tp_group)
    if inference_only:
        hidden, weight = hidden.detach(), weight.detach()
    return of_next_tokens(
        lambda states, labels: conventions.log_probs_of_head(states, weight, labels, **part),
        gathered_sequence(hidden, part["group"]).transpose(0, 1),
        target,
    )


class DistributedLogprob:
    """Stand for an autograd function of the same name; only `apply` is there."""

    @staticmethod
    def apply(
        vocab_parallel_logits: Tensor,
        target: Tensor,
        vocab_start_index: int,
        vocab_end_index: int,
        group: Any,
        inference_only: bool = False,
    ) -> Tensor:
        """Log-probability of each label of `target` [B, S], shifted already: [B, S] float32.

        Args:
            vocab_parallel_logits: [B, S, V / ranks].
            vocab_start_index, vocab_end_index, group: as in `from_parallel_logits_to_logprobs`.
        """
        part = conventions.part_of_group(vocab_parallel_logits, vocab_start_index, vocab_end_index, group=group)
        logits = vocab_parallel_logits.detach() if inference_only else vocab_parallel_logits
        return conventions.gathered_log_probs(logits, target, **part)


class ChunkedDistributedLogprob:
    """`DistributedLogprob`, in chunks; only `apply` is there."""

    @staticmethod
    def apply(
        vocab_parallel_logits: Tensor,
        target: Tensor,
        vocab_start_index: int,
        vocab_end_index: int,
        chunk_size: int,
        tp_group: Any,
        inference_only: bool = False,
    ) -> Tensor:
        """As `DistributedLogprob.apply`. `chunk_size` changes nothing."""
        bounds = (vocab_start_index, vocab_end_index)
        return DistributedLogprob.apply(vocab_parallel_logits, target, *bounds, tp_group, inference_only)


class ChunkedDistributedEntropy:
    """Stand for an autograd function of the same name; only `apply` is there."""

    @staticmethod
    def apply(vocab_parallel_logits: Tensor, chunk_size: int, tp_group: Any, inference_only: bool = False) -> Tensor:
        """The sum of p log p of each row, MINUS the entropy: [B, S] float32, never positive, of [B, S, V / ranks]."""
        logits = vocab_parallel_logits.detach() if inference_only else vocab_parallel_logits
        return 0.0 - conventions.entropy(logits, group=tp_group)


def _log_probs(logits: Tensor, labels: Tensor, group: Any, sampling_params: Any) -> Tensor:
    """Of labels of which NO_LABEL counts 0, after filtering."""
    keep = None
    if sampling_params is not None:
        top_k, top_p = max(0, sampling_params.top_k or 0), sampling_params.top_p
        top_p = 1.0 if top_p is None else top_p
        is_split = group is not None or hasattr(logits, "placements")
        if is_split and (top_k or top_p != 1.0):
            raise InputError(
                f"got top_k={top_k} and top_p={top_p} for a vocabulary that is split over ranks; None and 1 are valid "
                "there, since the largest logits are found among all columns. Gather the logits, or keep the "
                "framework's own function."
            )
        keep = _keep_mask(logits, top_k, top_p) if top_k or top_p != 1.0 else None
    if keep is not None:
        logits = logits.masked_fill(~keep, -torch.inf)
    return conventions.gathered_log_probs(logits, labels, masked_logits=keep is not None, group=group)


@torch.no_grad()
def _keep_mask(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Which logits [..., V] top-k and then top-p leave. A `top_k` of 0 and a `top_p` of 1 leave all.

    top-k keeps what is no less than the k-th largest. top-p keeps the most likely of what is left until their
    probabilities add up to `top_p`, and at least one.
    """
    vocab = logits.shape[-1]
    if top_k > vocab:
        raise InputError(
            f"got top_k={top_k} for logits with {vocab} columns; 1 to {vocab} are valid, and None or -1 for all. "
            "Pass the whole vocabulary, or a smaller top_k."
        )
    keep = torch.empty(logits.shape, dtype=torch.bool, device=logits.device)
    rows = max(1, 2**22 // vocab)  # so many logits are sorted at once
    chunks = (torch.split(matrix, rows) for matrix in (logits.reshape(-1, vocab), keep.view(-1, vocab)))
    for x_CV, keep_CV in zip(*chunks, strict=True):
        x_CV = x_CV.float()
        if top_k:
            keep_CV.copy_(x_CV >= x_CV.topk(top_k).values[:, -1:])
            x_CV = x_CV.masked_fill(~keep_CV, -torch.inf)
        if top_p != 1.0:
            ascending_CV, order_CV = x_CV.sort(dim=-1)
            likely_CV = ascending_CV.softmax(-1).cumsum(-1) > 1 - top_p
            likely_CV[:, -1] = True
            likely_CV &= ascending_CV > -torch.inf
            keep_CV.scatter_(-1, order_CV, likely_CV)
    return keep
