"""What each framework's function computes, stated anew from its description: one formula each, in plain torch.

Three things are as in the originals, since they are compared: the arguments, the dtype of each step, and what is done
with labels that do not count. Loops over rows and chunks, which change no number, are left out. Where an original
converts to float32, float64 stays, so that the same statement, given float64, is the truth.
"""

from itertools import pairwise

import torch
from torch.nn import functional


def at(values, labels):
    return values.gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def up(x):
    return x if x.dtype == torch.float64 else x.float()


def log_softmax_at(x, labels):
    return at(x.log_softmax(-1), labels)


def log_probs_or_zero(x, labels):
    """Minus a cross entropy that ignores -100, in the dtype of `x`; of labels of any shape."""
    labels = labels.reshape(x.shape[:-1])
    counts = labels != -100
    return torch.where(counts, log_softmax_at(x, labels.where(counts, 0)), 0.0)


def log_probs_by_dtype(logits, labels):
    """verl's way without a kernel, and TRL's: logsumexp in 32 and 64 bits, log_softmax in 16."""
    is_wide = logits.dtype in (torch.float32, torch.float64)
    return at(logits, labels) - logits.logsumexp(-1) if is_wide else log_softmax_at(logits, labels)


def entropy_by_logsumexp(logits):
    return logits.logsumexp(-1) - (logits.softmax(-1) * logits).sum(-1)


def entropy_by_log_softmax(logits):
    log_p = logits.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


def verl_response(input_ids, logits, response_length):
    start = logits.shape[1] - response_length
    return log_probs_or_zero(up(logits[:, start - 1 : -1]), input_ids[:, start:])


def verl_response_rmpad(input_ids, attention_mask, logits_rmpad, response_length):
    """Row by row, without flash-attn's pad_input, by whose zeros the result is padded."""
    counts = attention_mask.bool()
    log_probs = log_probs_or_zero(up(logits_rmpad), input_ids[counts].roll(-1))
    rows = torch.zeros_like(input_ids, dtype=log_probs.dtype).masked_scatter(counts, log_probs)
    return rows[:, -response_length - 1 : -1]


def verl_all_rmpad(input_ids_rmpad, logits_rmpad, indices, batch_size, seqlen, response_length):
    mask, tokens = torch.zeros(2, batch_size * seqlen, dtype=torch.int64)
    mask[indices], tokens[indices] = 1, input_ids_rmpad[0]
    rows = (batch_size, seqlen)
    return verl_response_rmpad(tokens.view(rows), mask.view(rows), logits_rmpad, response_length)


def skyrl_entropy(logits, requires_grad=False, attention_mask=None, chunk_size=1024):
    entropy = entropy_by_log_softmax(logits if requires_grad else logits.detach())
    return entropy if attention_mask is None else (entropy * attention_mask).to(logits.dtype)


def trl_log_probs(logits, index, temperature=1.0, row_mask=None):
    """Without TRL's kernel, which is for GPUs."""
    x = logits / temperature
    labels = index if index.ndim == logits.ndim else index.unsqueeze(-1)
    is_wide = logits.dtype in (torch.float32, torch.float64)
    log_p = x.gather(-1, labels) - x.logsumexp(-1, keepdim=True) if is_wide else x.log_softmax(-1).gather(-1, labels)
    return log_p.view_as(index) if row_mask is None else torch.where(row_mask == 0, 0.0, log_p.view_as(index))


def trl_both(logits, index, entropy_requires_grad=True, temperature=1.0, row_mask=None):
    x = logits / temperature
    entropy = entropy_by_log_softmax(x if entropy_requires_grad else x.detach())
    entropy = entropy if row_mask is None else torch.where(row_mask == 0, 0.0, entropy)
    return trl_log_probs(logits, index, temperature, row_mask), entropy


def areal_both(logits, labels, temperature=1.0, tp_group=None, chunk_size=1024):
    x = up(logits) / temperature
    return log_softmax_at(x, labels), entropy_by_log_softmax(x)


def slime_both(
    logits, tokens, tp_group, with_entropy=False, chunk_size=-1, log_prob_keep_mask=None, with_entropy_grad=True
):
    if len(logits) == 0:
        return logits.new_zeros(0), logits.new_zeros(0) if with_entropy else None
    x = up(logits)
    entropy = entropy_by_logsumexp(x if with_entropy_grad else x.detach()) if with_entropy else None
    if log_prob_keep_mask is not None:
        is_token = torch.arange(x.shape[-1]) == tokens.unsqueeze(-1)
        x = torch.where(log_prob_keep_mask | is_token, x, -torch.inf)
    return log_softmax_at(x, tokens).unsqueeze(-1), entropy


def megatron_losses(vocab_parallel_logits, target, label_smoothing=0.0, tp_group=None):
    """But for -100, of which the original makes the loss of a logit at the maximum."""
    return -log_probs_or_zero(up(vocab_parallel_logits), target)


def torchtitan_sum(pred, labels, *, global_vocab_size=None):
    return -log_probs_or_zero(up(pred), labels).sum()


def torchtune_sequences(logits, labels, label_pad_token_id=-100, return_average_logprobs=False):
    counts = labels[:, 1:] != label_pad_token_id
    each = log_softmax_at(logits[:, :-1], labels[:, 1:].where(counts, 0)) * counts
    return each.sum(-1) / (counts.sum(-1) + 1e-8) if return_average_logprobs else each.sum(-1)


def torchforge_log_probs(logits, input_ids, temperature=1.0, align=True):
    last = logits.shape[1] - 1
    x = logits[:, last - input_ids.shape[1] : last] if align else logits
    return log_probs_or_zero(up(x / temperature), input_ids)


def torchtitan_log_probs(logits, labels, *, return_entropy=False):
    log_probs = log_probs_or_zero(up(logits), labels)
    return (log_probs, entropy_by_logsumexp(up(logits.detach()))) if return_entropy else log_probs


def rlinf_log_probs(logits, target, op_type="torch"):
    return up(log_probs_or_zero(up(logits) if op_type == "flash_attn" else logits, target))


def rlinf_entropy(logits, dim=-1):
    log_p = logits.log_softmax(dim)
    return -torch.where(log_p.exp() > 0, log_p.exp() * log_p, 0.0).sum(dim)


def nemo_rl_next(
    input_ids,
    next_token_logits,
    seq_index=None,
    vocab_parallel_rank=None,
    vocab_parallel_group=None,
    context_parallel_group=None,
    sampling_params=None,
    chunk_size=None,
):
    x = up(next_token_logits[:, : input_ids.shape[1] - 1])
    if sampling_params is not None:
        x = x.masked_fill(~sampled_from(x, sampling_params.top_k, sampling_params.top_p), -torch.inf)
    return log_softmax_at(x, input_ids[:, 1:])


def nemo_rl_parallel(
    vocab_parallel_logits,
    target,
    vocab_start_index,
    vocab_end_index,
    tp_group,
    inference_only=False,
    cp_group=None,
    chunk_size=None,
    sampling_params=None,
):
    logits = vocab_parallel_logits.detach() if inference_only else vocab_parallel_logits
    return nemo_rl_next(target, logits, sampling_params=sampling_params)


def nemo_rl_packed(
    vocab_parallel_logits,
    target,
    cu_seqlens_padded,
    unpacked_seqlen,
    vocab_start_index,
    vocab_end_index,
    group,
    inference_only=False,
    cp_group=None,
    chunk_size=None,
    sampling_params=None,
    target_is_pre_rolled=False,
):
    x, rows = vocab_parallel_logits[0].detach() if inference_only else vocab_parallel_logits[0], []
    for start, end in pairwise(cu_seqlens_padded.tolist()):
        last = max(start, min(end, start + unpacked_seqlen) - 1)
        labels = target[0, start:last] if target_is_pre_rolled else target[0, start + 1 : last + 1]
        log_probs = log_softmax_at(up(x[start:last]), labels)
        rows.append(functional.pad(log_probs, (0, unpacked_seqlen - 1 - len(log_probs))))
    return torch.stack(rows)


def skyrl_parallel(
    vocab_parallel_logits,
    target,
    vocab_start_index,
    vocab_end_index,
    tp_group,
    inference_only=False,
    cp_group=None,
    chunk_size=None,
):
    return nemo_rl_parallel(vocab_parallel_logits, target, 0, 0, None, inference_only)


def skyrl_packed(
    vocab_parallel_logits,
    target,
    cu_seqlens_padded,
    unpacked_seqlen,
    vocab_start_index,
    vocab_end_index,
    group,
    inference_only=False,
    cp_group=None,
    chunk_size=None,
    attention_mask=None,
    sub_seq_lengths=None,
):
    starts, mask = cu_seqlens_padded.tolist(), attention_mask
    wide = target.shape[1] + unpacked_seqlen
    each = nemo_rl_packed(vocab_parallel_logits, target, cu_seqlens_padded, wide, 0, 0, None, inference_only)
    if sub_seq_lengths is not None:
        rows = []
        for lengths in sub_seq_lengths:
            row, begin = each.new_zeros(wide), starts[0]
            for length in lengths:
                taken, before = each[0, : max(0, length - 1)], starts[0] - begin
                row = row + functional.pad(taken, (before, wide - before - len(taken)))
                starts, each = starts[1:], each[1:]
            rows.append(row[: unpacked_seqlen - 1])
        return torch.stack(rows)
    if mask is None:
        return each[:, : unpacked_seqlen - 1]
    rows = []
    for values, columns in zip(each, mask, strict=True):
        (columns,) = columns.nonzero(as_tuple=True)
        taken = values[: max(0, len(columns) - 1)]
        rows.append(values.new_zeros(unpacked_seqlen).index_put((columns[: len(taken)],), taken)[:-1])
    return torch.stack(rows)


def nemo_rl_class(logits, target, start, end, *rest):
    """Its `apply`; the last argument says whether no gradient is wanted."""
    return log_softmax_at(up(logits.detach() if rest[-1] else logits), target)


def sampled_from(x, top_k, top_p):
    """Which tokens top-k and then top-p leave: those before which, from the most likely one on, is less than top-p."""
    ordered, order = x.detach().sort(descending=True)
    if top_k is not None and top_k > 0:
        ordered[..., top_k:] = -torch.inf
    p = ordered.softmax(-1)
    kept = (p > 0) & ((p.cumsum(-1) - p < top_p) | (top_p == 1))
    kept[..., 0] = True
    return torch.zeros_like(kept).scatter(-1, order, kept)


def verl_head(hidden_states, vocab_weights, input_ids, temperature=1.0, chunk_size=512):
    x = (hidden_states @ vocab_weights.T) / temperature
    return log_softmax_at(up(x), input_ids), entropy_by_logsumexp(up(x)).to(x.dtype)


def verl_kernel(hidden, weight, labels, temperature=1.0, reduction="none", dist_process_group=None):
    x = up(hidden.flatten(0, -2) @ weight.T) / temperature
    return log_softmax_at(x, labels.flatten()), entropy_by_logsumexp(x)


def prime_rl_head(hidden, weight, labels, inv_temperature, chunk_size):
    x = up(hidden @ weight.T) * inv_temperature.unsqueeze(-1)
    return log_softmax_at(x, labels), entropy_by_logsumexp(x.detach())


def prime_rl_gemma_head(hidden, weight, labels, inv_temperature, chunk_size, softcap):
    x = softcap * torch.tanh(up(hidden @ weight.T) / softcap) * inv_temperature.unsqueeze(-1)
    return log_softmax_at(x, labels), entropy_by_logsumexp(x.detach())


def nemo_rl_head(
    tensor_parallel_hidden_states,
    output_weight_layer,
    runtime_gather_output,
    target,
    vocab_start_index,
    vocab_end_index,
    tp_group,
    inference_only=False,
    cp_group=None,
    chunk_size=None,
):
    x = up(tensor_parallel_hidden_states @ output_weight_layer.T).transpose(0, 1)
    log_probs = log_softmax_at(x, target.roll(-1, -1))[:, :-1]
    return log_probs.detach() if inference_only else log_probs


def skyrl_head(
    hidden,
    lm_head_weight,
    target,
    vocab_start_index,
    vocab_end_index,
    tp_group,
    inference_only=False,
    cp_group=None,
    chunk_size=None,
    temperature=1.0,
    fused_backend="torch",
):
    x = up(hidden @ (lm_head_weight / temperature).T)[:, : target.shape[1] - 1]
    log_probs = log_softmax_at(x, target[:, 1:])
    return log_probs.detach() if inference_only else log_probs


def trl_head(
    hidden,
    weight,
    bias,
    targets,
    temperature,
    chunk_size,
    final_logit_softcapping=None,
    logit_scale=1.0,
    outputs=("entropy", "log_sum_sq_probs", "mean_logits", "is_top1"),
):
    z = hidden @ weight.T if bias is None else hidden @ weight.T + bias
    x, cap = up(z) * logit_scale, final_logit_softcapping
    x = (x if cap is None else cap * torch.tanh(x / cap)) / temperature
    fixed = x.detach()
    more = {
        "entropy": lambda: entropy_by_logsumexp(x),
        "log_sum_sq_probs": lambda: fixed.softmax(-1).square().sum(-1).log(),
        "mean_logits": lambda: fixed.mean(-1),
        "is_top1": lambda: fixed.argmax(-1) == targets,
    }
    return log_softmax_at(x, targets), *(compute() if name in outputs else None for name, compute in more.items())


def unsloth_head(
    hidden_states,
    lm_head,
    index,
    chunks=4,
    logit_scale_multiply=0.0,
    logit_scale_divide=0.0,
    logit_softcapping=0.0,
    temperature=1.0,
    max_rows_per_chunk=0,
):
    z = hidden_states.to(lm_head.dtype) @ lm_head.T
    z = z * logit_scale_multiply if logit_scale_multiply else z
    z = z / logit_scale_divide if logit_scale_divide else z
    z = logit_softcapping * torch.tanh(z / logit_softcapping) if logit_softcapping else z
    return log_softmax_at(up(z) / temperature, index)


ORIGINALS = {
    "verl.FusedLinearForPPOFunction": verl_head,
    "verl.linear_cross_entropy": verl_kernel,
    "prime_rl._SequenceChunkedLogProbEntropyFn": prime_rl_head,
    "prime_rl._GemmaChunkedLogProbEntropyFn": prime_rl_gemma_head,
    "nemo_rl.from_parallel_hidden_states_to_logprobs": nemo_rl_head,
    "skyrl.from_parallel_hidden_to_logprobs": skyrl_head,
    "trl._ChunkedLogProbFunction": trl_head,
    "unsloth.chunked_hidden_states_selective_log_softmax": unsloth_head,
    "easyr1.log_probs_from_logits": lambda logits, labels: log_probs_or_zero(up(logits), labels),
    # As with flash-attn: float32, whatever the logits, which are not to be looked at afterwards.
    "verl.logprobs_from_logits": lambda logits, labels, inplace_backward=True: log_probs_or_zero(up(logits), labels),
    "verl.logprobs_from_logits_v2": log_probs_by_dtype,
    "verl.logprobs_from_logits_naive": lambda logits, labels: log_softmax_at(logits, labels),
    "verl.gather_from_labels": at,
    "verl.entropy_from_logits": entropy_by_logsumexp,
    "verl.entropy_from_logits_with_chunking": lambda logits, chunk_size=2048: entropy_by_logsumexp(up(logits)),
    "verl.calculate_sum_pi_squared_from_logits": lambda logits: torch.exp(
        torch.logsumexp(2 * logits, -1) - 2 * torch.logsumexp(logits, -1)
    ),
    "verl.log_probs_from_logits_response": verl_response,
    "verl.log_probs_from_logits_response_rmpad": verl_response_rmpad,
    "verl.log_probs_from_logits_all_rmpad": verl_all_rmpad,
    "skyrl.logprobs_from_logits": lambda logits, labels, inplace_backward=True: log_probs_or_zero(up(logits), labels),
    "verl.vocab_parallel_log_probs_from_logits": lambda logits, labels: log_probs_or_zero(up(logits), labels),
    "verl.vocab_parallel_log_probs_from_logits_response_rmpad": verl_response_rmpad,
    "verl.vocab_parallel_entropy": lambda vocab_parallel_logits: entropy_by_logsumexp(vocab_parallel_logits),
    "verl.vocab_parallel_entropy_with_chunking": lambda vocab_parallel_logits, chunk_size=2048: entropy_by_logsumexp(
        up(vocab_parallel_logits)
    ),
    # Of ranks that share a vocabulary no gradient comes through the original's sums.
    "verl.vocab_parallel_sum_pi_squared": lambda vocab_parallel_logits: (
        vocab_parallel_logits.detach().softmax(-1).square().sum(-1)
    ),
    "skyrl.chunked_entropy_from_logits": skyrl_entropy,
    "skyrl.from_parallel_logits_to_logprobs": skyrl_parallel,
    "skyrl.from_parallel_logits_to_logprobs_packed_sequences": skyrl_packed,
    "skyrl.vocab_parallel_entropy": lambda vocab_parallel_logits, chunk_size=None, chunk_memory_mb=512: (
        entropy_by_logsumexp(vocab_parallel_logits)
    ),
    "trl.selective_log_softmax": trl_log_probs,
    "trl.selective_log_softmax_and_entropy": trl_both,
    "trl.entropy_from_logits": lambda logits, chunk_size=128: entropy_by_log_softmax(logits),
    # But for the division, which is in place there, and for -100 in 16 bits, which is an error there.
    "openrlhf.log_probs_from_logits": lambda logits, labels, temperature=1.0: log_probs_or_zero(
        logits / temperature, labels
    ),
    "openrlhf.compute_entropy": entropy_by_logsumexp,
    "areal.gather_logprobs": lambda logits, labels, temperature=1.0, tp_group=None, chunk_size=1024: areal_both(
        logits, labels, temperature
    )[0],
    "areal.gather_logprobs_entropy": areal_both,
    "slime.calculate_log_probs_and_entropy": slime_both,
    "prime_rl.selective_log_softmax": lambda logits, index: log_softmax_at(logits, index),
    "prime_rl.compute_entropy": lambda shifted_logits: entropy_by_logsumexp(shifted_logits.detach()),
    "torchtune.logits_to_logprobs": lambda logits, sequences, temperature=1.0: log_softmax_at(
        logits / temperature, sequences
    ),
    "torchtune.batched_logits_to_logprobs": lambda logits, sequences, temperature=1.0, chunk_size=4: up(
        log_softmax_at(logits / temperature, sequences)
    ),
    "torchtune.get_batch_log_probs": torchtune_sequences,
    "torchtune.truncate_sequence_for_logprobs": lambda query_response_logits, context_length: query_response_logits[
        :, context_length - 1 : query_response_logits.shape[1] - 1
    ],
    "torchforge.compute_logprobs": torchforge_log_probs,
    "torchtitan.compute_logprobs": torchtitan_log_probs,
    "torchtitan.cross_entropy_loss": torchtitan_sum,
    "megatron.vocab_parallel_cross_entropy": megatron_losses,
    "megatron.fused_vocab_parallel_cross_entropy": lambda vocab_parallel_logits, target, tp_group: megatron_losses(
        vocab_parallel_logits, target
    ),
    "roll.log_probs_from_logits": lambda logits, labels: log_softmax_at(up(logits), labels),
    "roll.entropy_from_logits": lambda logits: entropy_by_logsumexp(up(logits)),
    "roll.vocab_parallel_logprobs": lambda vocab_parallel_logits, target, use_fused_kernel=True: log_softmax_at(
        up(vocab_parallel_logits), target
    ),
    "roll.vocab_parallel_entropy": lambda vocab_parallel_logits, used_fp32=True, use_fused_kernel=True: (
        entropy_by_logsumexp(up(vocab_parallel_logits))
    ),
    "rlinf.compute_logprobs_from_logits": rlinf_log_probs,
    "rlinf.compute_entropy_from_logits": rlinf_entropy,
    "nemo_rl.get_next_token_logprobs_from_logits": nemo_rl_next,
    "nemo_rl.from_parallel_logits_to_logprobs": nemo_rl_parallel,
    "nemo_rl.from_parallel_logits_to_logprobs_packed_sequences": nemo_rl_packed,
    "nemo_rl.DistributedLogprob.apply": nemo_rl_class,
    "nemo_rl.ChunkedDistributedLogprob.apply": nemo_rl_class,
    # The sum of p log p, in spite of its name.
    "nemo_rl.ChunkedDistributedEntropy.apply": lambda logits, chunk_size, group, inference_only=False: (
        -entropy_by_log_softmax(up(logits.detach() if inference_only else logits))
    ),
}
