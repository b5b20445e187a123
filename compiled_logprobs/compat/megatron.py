"""Megatron-LM's `megatron.core.tensor_parallel.cross_entropy` and `megatron.core.fusions.fused_cross_entropy`.

Kept: names, order of arguments, float32 losses. Logits are those of this rank of the tensor-parallel group: `tp_group`,
or Megatron's own.

Not kept: the logits are not modified, where the original overwrites float32 ones. A target of -100 counts 0, where the
original gives it the loss of a logit at the maximum; others outside of the vocabulary are errors. Smoothed labels are
refused.
"""

from typing import Any

from torch import Tensor

from compiled_logprobs.compat import conventions


def vocab_parallel_cross_entropy(
    vocab_parallel_logits: Tensor, target: Tensor, label_smoothing: float = 0.0, tp_group: Any = None
) -> Tensor:
    """Cross entropy of each target, [S, B] float32, never negative.

    Args:
        vocab_parallel_logits: [S, B, V / ranks]. Not modified.
        target: [S, B], of the whole vocabulary; -100 counts 0.
        label_smoothing: 0, else InputError.
        tp_group: the ranks that the vocabulary is split over, equally and in their order.
    """
    conventions.require_no_smoothing(label_smoothing)
    group = conventions.tensor_parallel_ranks() if tp_group is None else tp_group
    return conventions.losses(vocab_parallel_logits, target, group=group)


def fused_vocab_parallel_cross_entropy(vocab_parallel_logits: Tensor, target: Tensor, tp_group: Any) -> Tensor:
    """As `vocab_parallel_cross_entropy`."""
    return vocab_parallel_cross_entropy(vocab_parallel_logits, target, tp_group=tp_group)
