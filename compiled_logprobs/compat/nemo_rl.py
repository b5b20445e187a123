"""NeMo-RL's `nemo_rl.distributed.model_utils`, for logits that are not split over ranks.

Kept: float32 results. The functions shift by themselves and return S - 1 columns for S tokens; the classes do not
shift. `ChunkedDistributedEntropy` returns the sum of p log p: minus the entropy, in spite of its name. Sampling
parameters filter the logits as in the originals, which do not apply their temperature; a label that was filtered out
has -inf.

Not kept: a part of the vocabulary is refused. With `inference_only=True` the result carries no gradient, where the
originals' backward fails. Functions for packed sequences and from hidden states are not here.
"""

from typing import Any

import torch
from torch import Tensor

from compiled_logprobs.compat import conventions, missing
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

    `seq_index`, `vocab_parallel_rank` and `chunk_size` change nothing.

    Args:
        input_ids: [B, S], not shifted.
        next_token_logits: [B, S, V], or more positions, of which the last are not used. Not modified.
        vocab_parallel_group, context_parallel_group: None or a process group of one rank, else InputError.
        sampling_params: None, or has `top_k` and `top_p`; filtering costs a copy of the logits.
    """
    groups = {"vocab_parallel_group": vocab_parallel_group, "context_parallel_group": context_parallel_group}
    conventions.require_one_rank(**groups)
    labels = input_ids[:, 1:].to(next_token_logits.device)
    logits, keep = next_token_logits[:, : labels.shape[1]], None
    if sampling_params is not None:
        keep = _keep_mask(logits, sampling_params.top_k, sampling_params.top_p)
    if keep is not None:
        logits = logits.masked_fill(~keep, -torch.inf)
    return conventions.gathered_log_probs(logits, labels, masked_logits=keep is not None)


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
        vocab_start_index, vocab_end_index: 0 and V, else InputError.
        tp_group, cp_group: None or a process group of one rank, else InputError.
        inference_only: the result carries no gradient.
    """
    conventions.require_one_rank(tp_group=tp_group, cp_group=cp_group)
    logits = _whole(vocab_parallel_logits, vocab_start_index, vocab_end_index, inference_only)
    return get_next_token_logprobs_from_logits(target, logits, sampling_params=sampling_params)


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
        """Log-probability of each label of `target` [B, S], already shifted: [B, S] float32, from logits [B, S, V]."""
        conventions.require_one_rank(group=group)
        logits = _whole(vocab_parallel_logits, vocab_start_index, vocab_end_index, inference_only)
        return conventions.gathered_log_probs(logits, target)


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
        """The sum of p log p of each row, MINUS the entropy: [B, S] float32, never positive, from logits [B, S, V]."""
        conventions.require_one_rank(tp_group=tp_group)
        return 0.0 - conventions.entropy(vocab_parallel_logits.detach() if inference_only else vocab_parallel_logits)


def _whole(logits: Tensor, start: int, end: int, inference_only: bool) -> Tensor:
    """The logits, without gradient for inference. Raise InputError unless [start, end) is the whole vocabulary."""
    vocab = logits.shape[-1]
    if (start, end) != (0, vocab):
        what = f"the vocabulary's part from {start} to {end} for logits with {vocab} columns"
        raise conventions.split_error(what, f"0 to {vocab} is valid")
    return logits.detach() if inference_only else logits


@torch.no_grad()
def _keep_mask(logits: Tensor, top_k: int | None, top_p: float | None) -> Tensor | None:
    """Which logits [..., V] top-k and then top-p leave, or None where neither filters.

    top-k keeps what is no less than the k-th largest. top-p keeps the most likely of what is left until their
    probabilities add up to `top_p`, and at least one.
    """
    top_k, top_p = max(0, top_k or 0), 1.0 if top_p is None else top_p
    if not top_k and top_p == 1.0:
        return None
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
