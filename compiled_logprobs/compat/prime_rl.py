"""prime-rl's `prime_rl.trainer.rl.loss`, and the heads of `prime_rl.trainer.models.layers`.

Kept: results in the dtype of the logits; from hidden states float32. The entropy carries no gradient.

Not kept: shapes are not checked by jaxtyping. prime-rl divides the logits by a temperature a token before the call;
this library's `log_probs_from_logits(..., temperature=temperatures)` divides in float32, without the copy.
"""

from torch import Tensor, nn

from compiled_logprobs.compat import conventions
from compiled_logprobs.errors import InputError


def selective_log_softmax(logits: Tensor, index: Tensor) -> Tensor:
    """Log-probability of each label, [B, S] in the dtype of `logits` [B, S, V], which are not modified."""
    return conventions.gathered_log_probs(logits, index, out_dtype=None)


def compute_entropy(shifted_logits: Tensor) -> Tensor:
    """Entropy of each row of `shifted_logits` [B, S, V], [B, S] in their dtype, without a gradient."""
    return conventions.entropy(shifted_logits.detach(), out_dtype=None)


class _SequenceChunkedLogProbEntropyFn:
    """Stand for an autograd function of the same name; only `apply` is there."""

    @staticmethod
    def apply(
        hidden: Tensor, weight: Tensor, labels: Tensor, inv_temperature: Tensor, chunk_size: int
    ) -> tuple[Tensor, Tensor]:
        """Log-probability of each label and entropy of each row, [N] float32 both, the entropy without a gradient.

        Args:
            hidden: [N, H].
            weight: [V, H].
            labels: [N].
            inv_temperature: [N], what the logits of each row are multiplied by.
            chunk_size: changes nothing.
        """
        return _of_head(hidden, weight, labels, 1.0 / inv_temperature)


class _GemmaChunkedLogProbEntropyFn:
    """Stand for an autograd function of the same name; only `apply` is there."""

    @staticmethod
    def apply(
        hidden: Tensor, weight: Tensor, labels: Tensor, inv_temperature: Tensor, chunk_size: int, softcap: float
    ) -> tuple[Tensor, Tensor]:
        """As `_SequenceChunkedLogProbEntropyFn.apply`, of softcap * tanh(logits / softcap)."""
        return _of_head(hidden, weight, labels, 1.0 / inv_temperature, softcap)


class FusedOutputLinear(nn.Linear):
    """An output layer without bias that returns log-probabilities and entropies. `chunk_size` changes nothing."""

    softcap: float | None = None

    def __init__(self, in_features: int, out_features: int, chunk_size: int) -> None:
        super().__init__(in_features, out_features, bias=False)
        self.chunk_size = chunk_size

    def forward(  # type: ignore[override]  # as prime-rl has it
        self, hidden_states: Tensor, labels: Tensor | None = None, temperature: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The "logprobs" of `labels` and the "entropy" of each row, [B, S] float32 both, the latter without a gradient.

        Args:
            hidden_states: [B, S, H].
            labels: [B, S], already shifted.
            temperature: [B, S].
        """
        if labels is None or temperature is None:
            missing_one = "labels" if labels is None else "temperature"
            raise InputError(f"got no {missing_one}; a tensor [B, S] is valid. Pass it beside the hidden states.")
        logprobs, entropy = _of_head(hidden_states, self.weight, labels, temperature, self.softcap)
        return {"logprobs": logprobs, "entropy": entropy}


class GemmaFusedOutputLinear(FusedOutputLinear):
    """The same with softcap * tanh(logits / softcap) in place of the logits."""

    def __init__(self, in_features: int, out_features: int, chunk_size: int, softcap: float) -> None:
        super().__init__(in_features, out_features, chunk_size)
        self.softcap = softcap


def _of_head(
    hidden: Tensor, weight: Tensor, labels: Tensor, temperature: Tensor, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    log_probs, entropy = conventions.log_probs_and_entropy_of_head(
        hidden, weight, labels, temperature=temperature, softcap=softcap
    )
    return log_probs, entropy.detach()
