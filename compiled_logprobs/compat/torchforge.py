"""torchforge's `forge.util.ops`.

Kept: float32 results; `align=True` takes the logits that predict `input_ids`; a label of -100 counts 0.

Not kept: 16-bit logits are divided by the temperature in float32, where the original divides them in their dtype.
"""

from torch import Tensor

from compiled_logprobs.compat import conventions


def compute_logprobs(logits: Tensor, input_ids: Tensor, temperature: float = 1.0, align: bool = True) -> Tensor:
    """Log-probability of each token under softmax(logits / temperature), [B, R] float32.

    Args:
        logits: [B, S, V]. Not modified.
        input_ids: [B, R].
        temperature: > 0.
        align: take `logits[:, -R - 1 : -1]`, which predict the last R of S tokens. With False S is R, and the logits
            are taken as they are.
    """
    if align:
        logits = logits[:, -input_ids.shape[1] - 1 : -1].to(input_ids.device)
    return conventions.log_probs(logits, input_ids.long(), temperature=temperature)
