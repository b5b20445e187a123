"""torchforge's `forge.util.ops`.

Kept: float32 results; `align=True` takes the logits that predict `input_ids`; a label of -100 counts 0.

Not kept: 16-bit logits are divided by the temperature in float32, where the original divides them in their dtype. Neither
the quotient nor a float32 copy of it is stored.
"""

from torch import Tensor

from compiled_logprobs.compat.conventions import log_probs as _log_probs


def compute_logprobs(logits: Tensor, input_ids: Tensor, temperature: float = 1.0, align: bool = True) -> Tensor:
    """Log-probability of each token under softmax(logits / temperature), [B, R] float32.

    Args:
        logits: [B, S, V]. Not modified.
        input_ids: [B, R].
        temperature: > 0.
        align: the logits at each position predict the token at the next one, and the last R tokens of S are meant: takes
            `logits[:, -R - 1 : -1]`. With False S is R, and the logits are taken as they are.
    """
    if align:
        logits = logits[:, -input_ids.shape[1] - 1 : -1].to(input_ids.device)
    return _log_probs(logits, input_ids.long(), temperature=temperature)
