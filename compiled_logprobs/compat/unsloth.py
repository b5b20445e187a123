"""unsloth's `unsloth_zoo.rl_replacements`.

Kept: the arguments, and float32 results in the shape of `index`, on the device of `hidden_states`, which are converted
to the dtype of `lm_head`. It can be traced whole, as unsloth compiles its own.

Not kept: results are of all positions at once; `chunks` and `max_rows_per_chunk` change nothing. A scale or soft cap of
0 means none, as there; a negative one is refused.
"""

from torch import Tensor

from compiled_logprobs.compat import conventions


def chunked_hidden_states_selective_log_softmax(
    hidden_states: Tensor,
    lm_head: Tensor,
    index: Tensor,
    chunks: int = 4,
    logit_scale_multiply: float = 0.0,
    logit_scale_divide: float = 0.0,
    logit_softcapping: float = 0.0,
    temperature: float = 1.0,
    max_rows_per_chunk: int = 0,
) -> Tensor:
    """Log-probability of each token of `index` [B, S], [B, S] float32.

    Args:
        hidden_states: [B, S, H].
        lm_head: [V, H].
        index: [B, S].
        chunks, max_rows_per_chunk: change nothing.
        logit_scale_multiply, logit_scale_divide: what the logits are multiplied and divided by; 0: not.
        logit_softcapping: the bound that they are then kept below; 0: none.
        temperature: > 0; what they are divided by at last.
    """
    log_probs = conventions.log_probs_of_head(
        hidden_states.to(device=lm_head.device, dtype=lm_head.dtype),
        lm_head,
        index.to(lm_head.device),
        logit_scale=(logit_scale_multiply or 1.0) / (logit_scale_divide or 1.0),
        softcap=logit_softcapping or None,
        temperature=temperature,
    )
    return log_probs.to(hidden_states.device)
