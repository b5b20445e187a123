"""What each framework's function computes, stated anew from its description: one formula each, in plain torch.

Three things are as in the originals, since they are compared: the arguments, the dtype of each step, and what is done
with labels that do not count. Loops over rows and chunks, which change no number, are left out. Where an original
converts to float32, float64 stays, so that the same statement, given float64, is the truth.
"""

from typing import Any

import torch
from torch import Tensor


def _at(values: Tensor, labels: Tensor) -> Tensor:
    return values.gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def _up(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _log_probs_or_zero(logits: Tensor, labels: Tensor) -> Tensor:
    """Minus a cross entropy that ignores -100, in the dtype of `logits`."""
    counts = labels != -100
    return torch.where(counts, _at(logits.log_softmax(-1), labels.where(counts, 0)), 0.0)


def _by_dtype(logits: Tensor, labels: Tensor) -> Tensor:
    """verl's way without a kernel, and TRL's: logsumexp in 32 and 64 bits, log_softmax in 16."""
    if logits.dtype in (torch.float32, torch.float64):
        return _at(logits, labels) - logits.logsumexp(-1)
    return _at(logits.log_softmax(-1), labels)


def _entropy_by_logsumexp(logits: Tensor) -> Tensor:
    return logits.logsumexp(-1) - (logits.softmax(-1) * logits).sum(-1)


def _entropy_by_log_softmax(logits: Tensor) -> Tensor:
    log_p = logits.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


def easyr1_log_probs_from_logits(logits: Tensor, labels: Tensor) -> Tensor:
    return _log_probs_or_zero(_up(logits), labels.reshape(logits.shape[:-1]))


def verl_logprobs_from_logits(logits: Tensor, labels: Tensor, inplace_backward: bool = True) -> Tensor:
    """As with flash-attn: float32, whatever the logits, which are not to be looked at afterwards."""
    return _log_probs_or_zero(_up(logits), labels)


verl_logprobs_from_logits_v2 = _by_dtype


def verl_logprobs_from_logits_naive(logits: Tensor, labels: Tensor) -> Tensor:
    return _at(logits.log_softmax(-1), labels)


verl_gather_from_labels = _at
verl_entropy_from_logits = _entropy_by_logsumexp


def verl_entropy_from_logits_with_chunking(logits: Tensor, chunk_size: int = 2048) -> Tensor:
    return _entropy_by_logsumexp(_up(logits))


def verl_calculate_sum_pi_squared_from_logits(logits: Tensor) -> Tensor:
    return (torch.logsumexp(2 * logits, -1) - 2 * torch.logsumexp(logits, -1)).exp()


def verl_log_probs_from_logits_response(input_ids: Tensor, logits: Tensor, response_length: int) -> Tensor:
    length = logits.shape[1]
    return _log_probs_or_zero(
        _up(logits[:, length - response_length - 1 : length - 1]), input_ids[:, length - response_length :]
    )


skyrl_logprobs_from_logits = verl_logprobs_from_logits


def skyrl_chunked_entropy_from_logits(
    logits: Tensor, requires_grad: bool = False, attention_mask: Tensor | None = None, chunk_size: int = 1024
) -> Tensor:
    entropy = _entropy_by_log_softmax(logits if requires_grad else logits.detach())
    return entropy if attention_mask is None else (entropy * attention_mask).to(logits.dtype)


def trl_selective_log_softmax(
    logits: Tensor, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None
) -> Tensor:
    """Without TRL's kernel, which is for GPUs."""
    x = logits if temperature == 1 else logits / temperature
    labels = index if index.ndim == logits.ndim else index.unsqueeze(-1)
    is_wide = logits.dtype in (torch.float32, torch.float64)
    log_p = x.gather(-1, labels) - x.logsumexp(-1, keepdim=True) if is_wide else x.log_softmax(-1).gather(-1, labels)
    return log_p.view_as(index) if row_mask is None else torch.where(row_mask == 0, 0.0, log_p.view_as(index))


def trl_selective_log_softmax_and_entropy(
    logits: Tensor,
    index: Tensor,
    entropy_requires_grad: bool = True,
    temperature: float = 1.0,
    row_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    x = logits if temperature == 1 else logits / temperature
    entropy = _entropy_by_log_softmax(x if entropy_requires_grad else x.detach())
    return (
        trl_selective_log_softmax(logits, index, temperature, row_mask),
        entropy if row_mask is None else torch.where(row_mask == 0, 0.0, entropy),
    )


def trl_entropy_from_logits(logits: Tensor, chunk_size: int = 128) -> Tensor:
    return _entropy_by_log_softmax(logits)


def openrlhf_log_probs_from_logits(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """But for the division, which the original does in place, and for -100 in 16 bits, which is an error there."""
    return _log_probs_or_zero(logits if temperature == 1 else logits / temperature, labels)


openrlhf_compute_entropy = _entropy_by_logsumexp


def areal_gather_logprobs(
    logits: Tensor, labels: Tensor, temperature: float = 1.0, tp_group: Any = None, chunk_size: int = 1024
) -> Tensor:
    return _at((_up(logits) / temperature).log_softmax(-1), labels)


def areal_gather_logprobs_entropy(
    logits: Tensor, labels: Tensor, temperature: float = 1.0, tp_group: Any = None, chunk_size: int = 1024
) -> tuple[Tensor, Tensor]:
    x = _up(logits) / temperature
    return _at(x.log_softmax(-1), labels), _entropy_by_log_softmax(x)


def slime_calculate_log_probs_and_entropy(
    logits: Tensor,
    tokens: Tensor,
    tp_group: Any,
    with_entropy: bool = False,
    chunk_size: int = -1,
    log_prob_keep_mask: Tensor | None = None,
    with_entropy_grad: bool = True,
) -> tuple[Tensor, Tensor | None]:
    if len(logits) == 0:
        return logits.new_zeros(0), logits.new_zeros(0) if with_entropy else None
    x = _up(logits)
    entropy = _entropy_by_logsumexp(x if with_entropy_grad else x.detach()) if with_entropy else None
    if log_prob_keep_mask is not None:
        is_token = torch.arange(x.shape[-1]) == tokens.unsqueeze(-1)
        x = torch.where(log_prob_keep_mask | is_token, x, -torch.inf)
    return _at(x.log_softmax(-1), tokens).unsqueeze(-1), entropy


def prime_rl_selective_log_softmax(logits: Tensor, index: Tensor) -> Tensor:
    return _at(logits.log_softmax(-1), index)


def prime_rl_compute_entropy(shifted_logits: Tensor) -> Tensor:
    return _entropy_by_logsumexp(shifted_logits.detach())


def torchtune_logits_to_logprobs(logits: Tensor, sequences: Tensor, temperature: float = 1.0) -> Tensor:
    return _at((logits / temperature).log_softmax(-1), sequences)


def torchtune_batched_logits_to_logprobs(
    logits: Tensor, sequences: Tensor, temperature: float = 1.0, chunk_size: int = 4
) -> Tensor:
    return _up(torchtune_logits_to_logprobs(logits, sequences, temperature))


def torchtune_get_batch_log_probs(
    logits: Tensor, labels: Tensor, label_pad_token_id: int = -100, return_average_logprobs: bool = False
) -> Tensor:
    counts = labels[:, 1:] != label_pad_token_id
    each = torchtune_logits_to_logprobs(logits[:, :-1], labels[:, 1:].where(counts, 0)) * counts
    return each.sum(-1) / (counts.sum(-1) + 1e-8) if return_average_logprobs else each.sum(-1)


def torchtune_truncate_sequence_for_logprobs(query_response_logits: Tensor, context_length: int) -> Tensor:
    return query_response_logits[:, context_length - 1 : query_response_logits.shape[1] - 1]


def torchforge_compute_logprobs(
    logits: Tensor, input_ids: Tensor, temperature: float = 1.0, align: bool = True
) -> Tensor:
    if align:
        last = logits.shape[1] - 1
        logits = logits[:, last - input_ids.shape[1] : last]
    return _log_probs_or_zero(_up(logits / temperature), input_ids)


def torchtitan_compute_logprobs(
    logits: Tensor, labels: Tensor, *, return_entropy: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    log_probs = _log_probs_or_zero(_up(logits), labels)
    return (log_probs, _entropy_by_logsumexp(_up(logits.detach()))) if return_entropy else log_probs


def roll_log_probs_from_logits(logits: Tensor, labels: Tensor) -> Tensor:
    return _at(_up(logits).log_softmax(-1), labels)


def roll_entropy_from_logits(logits: Tensor) -> Tensor:
    return _entropy_by_logsumexp(_up(logits))


def roll_vocab_parallel_logprobs(
    vocab_parallel_logits: Tensor, target: Tensor, use_fused_kernel: bool = True
) -> Tensor:
    return _at(_up(vocab_parallel_logits).log_softmax(-1), target)


def rlinf_compute_logprobs_from_logits(logits: Tensor, target: Tensor, op_type: str = "torch") -> Tensor:
    return _up(_log_probs_or_zero(logits if op_type != "flash_attn" else _up(logits), target))


def rlinf_compute_entropy_from_logits(logits: Tensor, dim: int = -1) -> Tensor:
    log_p = logits.log_softmax(dim)
    return -torch.where(log_p.exp() > 0, log_p.exp() * log_p, 0.0).sum(dim)


def nemo_rl_get_next_token_logprobs_from_logits(
    input_ids: Tensor,
    next_token_logits: Tensor,
    seq_index: Tensor | None = None,
    vocab_parallel_rank: int | None = None,
    vocab_parallel_group: Any = None,
    context_parallel_group: Any = None,
    sampling_params: Any = None,
    chunk_size: int | None = None,
) -> Tensor:
    x = _up(next_token_logits[:, : input_ids.shape[1] - 1])
    if sampling_params is not None:
        x = x.masked_fill(~_sampled_from(x, sampling_params.top_k, sampling_params.top_p), -torch.inf)
    return _at(x.log_softmax(-1), input_ids[:, 1:])


def nemo_rl_from_parallel_logits_to_logprobs(
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
    logits = vocab_parallel_logits.detach() if inference_only else vocab_parallel_logits
    return nemo_rl_get_next_token_logprobs_from_logits(target, logits, sampling_params=sampling_params)


def nemo_rl_distributed_logprob(logits: Tensor, target: Tensor, start: int, end: int, *rest: Any) -> Tensor:
    """Its `apply`; the last argument says whether no gradient is wanted."""
    return _at(_up(logits.detach() if rest[-1] else logits).log_softmax(-1), target)


nemo_rl_chunked_distributed_logprob = nemo_rl_distributed_logprob


def nemo_rl_chunked_distributed_entropy(
    logits: Tensor, chunk_size: int, group: Any, inference_only: bool = False
) -> Tensor:
    """The sum of p log p."""
    return -_entropy_by_log_softmax(_up(logits.detach() if inference_only else logits))


def _sampled_from(logits: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    """Which tokens top-k and then top-p leave: token by token, from the most likely one on."""
    keep = torch.zeros(logits.shape, dtype=torch.bool)
    for row, kept in zip(logits.detach().reshape(-1, logits.shape[-1]), keep.view(-1, logits.shape[-1]), strict=True):
        order = row.argsort(descending=True)
        if top_k is not None and top_k > 0:
            order = order[:top_k]
        mass = row.new_zeros(())
        for token, p in zip(order, row[order].softmax(-1), strict=True):
            if top_p is None or top_p == 1 or mass < top_p or token == order[0]:
                kept[token] = True
            mass = mass + p
    return keep
