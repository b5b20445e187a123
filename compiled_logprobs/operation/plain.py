"""What people use today: torch's `log_softmax` and `gather`, with autograd for backward. It is timed and serves nobody.

Shapes: ... leading dimensions (rows), V vocabulary, K labels a row.
"""

import torch
from torch import Tensor

from compiled_logprobs.operation.formula import per_row
from compiled_logprobs.problem import Problem, accumulation_dtype


def plain(logits: Tensor, labels: Tensor, temperature: float | Tensor, *, entropy: bool) -> tuple[Tensor, ...]:
    """Log-probabilities [..., K], and the entropy [...] if asked for.

    Args:
        logits: [..., V].
        labels: [..., K] int64 in [0, V).
        temperature: a number, or a tensor [...].
        entropy: whether to compute the entropy.
    """
    x = logits.to(accumulation_dtype(logits.dtype))
    if isinstance(temperature, Tensor) or temperature != 1.0:
        x = x / per_row(temperature)
    log_p = torch.log_softmax(x, -1)
    del x  # memory is what this takes most of
    log_probs = log_p.gather(-1, labels)
    return (log_probs, -(log_p.exp() * log_p).sum(-1)) if entropy else (log_probs,)


def bytes_of_plain(problem: Problem) -> int:
    """What a call takes beside its inputs, backward included where the problem needs the gradient."""
    copies = 2 + problem.entropy + problem.needs_grad * (1 + 2 * problem.entropy)  # as measured, of the logits
    return copies * problem.rows * problem.vocab * accumulation_dtype(problem.dtype).itemsize
