"""ROLL's `roll.utils.functionals`, and `mcore_adapter.parallel_functions` for logits that are not split over ranks.

Kept: float32 results of logits of any dtype.

Not kept: `vocab_parallel_logprobs` does not modify the logits, where the original without the fused kernel overwrites
float32 ones with their exponentials; it is refused where Megatron has more than one tensor-parallel rank.
"""

import sys

from torch import Tensor

from compiled_logprobs.compat import conventions


def log_probs_from_logits(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-probability of each label, [...] float32, of `logits` [..., V], which are not modified."""
    return conventions.gathered_log_probs(logits, labels)


def entropy_from_logits(logits: Tensor) -> Tensor:
    """Entropy of each row of `logits` [..., V], [...] float32."""
    return conventions.entropy(logits)


def vocab_parallel_logprobs(vocab_parallel_logits: Tensor, target: Tensor, use_fused_kernel: bool = True) -> Tensor:
    """Log-probability of each label, [...] float32. `use_fused_kernel` changes nothing.

    Args:
        vocab_parallel_logits: [..., V], the whole vocabulary; InputError where Megatron splits it. Not modified.
        target: [...].
    """
    megatron = sys.modules.get("megatron.core.parallel_state")
    if megatron is not None and megatron.model_parallel_is_initialized():
        conventions.require_one_rank(tensor_model_parallel_group=megatron.get_tensor_model_parallel_group())
    return conventions.gathered_log_probs(vocab_parallel_logits, target)
