"""ROLL's `roll.utils.functionals`, `roll.third_party.megatron.tensor_parallel`, and `mcore_adapter.parallel_functions`.

Kept: float32 results of logits of any dtype. The `vocab_parallel` functions take the columns that this rank of
Megatron's tensor-parallel group has.

Not kept: `vocab_parallel_logprobs` does not modify the logits, where the original without the fused kernel overwrites
float32 ones with their exponentials. Nothing depends on `use_fused_kernel`, nor on `used_fp32`: sums are in float32.
"""

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
        vocab_parallel_logits: [..., V / ranks]. Not modified.
        target: [...], of the whole vocabulary.
    """
    group = conventions.tensor_parallel_ranks()
    return conventions.gathered_log_probs(vocab_parallel_logits, target, group=group)


def vocab_parallel_entropy(
    vocab_parallel_logits: Tensor, used_fp32: bool = True, use_fused_kernel: bool = True
) -> Tensor:
    """Entropy of each row of `vocab_parallel_logits` [..., V / ranks], [...] float32. The options change nothing."""
    return conventions.entropy(vocab_parallel_logits, group=conventions.tensor_parallel_ranks())
