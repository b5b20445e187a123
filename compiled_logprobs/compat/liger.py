"""Liger's `liger_kernel.transformers.LigerVocabParallelCrossEntropy`.

Kept: the arguments of the module and of its call, and float32 losses [S, B].

Not kept: smoothed labels are refused, so that the formula and the mode of smoothing change nothing. The graph can be
kept for a second backward, and no float32 exponentials of all logits are stored.
"""

from typing import Any

from torch import Tensor, nn

from compiled_logprobs.compat import conventions
from compiled_logprobs.errors import InputError


class LigerVocabParallelCrossEntropy(nn.Module):
    """The cross entropy of logits whose vocabulary is split over tensor-parallel ranks."""

    def __init__(
        self,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        reduction: str = "none",
        label_smoothing_formula: str = "pytorch",
        label_smoothing_mode: str = "global",
    ) -> None:
        """Take a target that counts 0. Raises InputError (a ValueError) for another reduction, and for smoothing."""
        super().__init__()
        if reduction != "none":
            raise InputError(f"got reduction={reduction!r}; 'none' is valid. Reduce the losses afterwards.")
        conventions.require_no_smoothing(label_smoothing)
        self.ignore_index = ignore_index

    def forward(self, vocab_parallel_logits: Tensor, target: Tensor, tp_group: Any = None) -> Tensor:
        """Cross entropy of each target, [S, B] float32, never negative.

        Args:
            vocab_parallel_logits: [S, B, V / ranks]. Not modified.
            target: [S, B], of the whole vocabulary.
            tp_group: the ranks that the vocabulary is split over, equally and in their order; None for one rank.
        """
        if vocab_parallel_logits.ndim != 3:
            raise InputError(
                f"got vocab_parallel_logits of shape {list(vocab_parallel_logits.shape)}; three dimensions are valid: "
                "[sequence, batch, vocabulary]. Add the one that is missing."
            )
        return conventions.losses(vocab_parallel_logits, target, group=tp_group, ignore_index=self.ignore_index)
