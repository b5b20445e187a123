"""What people use today: torch's `log_softmax` and `gather`, with autograd for backward. It is timed and serves nobody.

Shapes: ... leading dimensions (rows), V vocabulary, K labels a row.
"""

import torch
from torch import Tensor
from torch.nn import functional

from compiled_logprobs.operation.autograd import PLAIN
from compiled_logprobs.operation.contract import Wanted
from compiled_logprobs.operation.formula import per_row
from compiled_logprobs.problem import Problem, accumulation_dtype


def plain(logits: Tensor, labels: Tensor, temperature: float | Tensor, *, wanted: Wanted = PLAIN) -> tuple[Tensor, ...]:
    """Log-probabilities [..., K], and what is wanted beside them, [...], in order.

    Args:
        logits: [..., V].
        labels: [..., K] int64 in [0, V).
        temperature: a number, or a tensor [...].
        wanted: what else to compute; as elsewhere, only the entropy and the logsumexp carry a gradient.
    """
    x = logits.to(accumulation_dtype(logits.dtype))
    if isinstance(temperature, Tensor) or temperature != 1.0:
        x = x / per_row(temperature)
    of_x = []
    if wanted.logsumexp:
        of_x.append(x.logsumexp(-1))
    if wanted.argmax:
        of_x.append(x.argmax(-1))
    log_p = torch.log_softmax(x, -1)
    del x  # memory is what this takes most of
    results = [log_p.gather(-1, labels)]
    if wanted.entropy:
        results.append(-(log_p.exp() * log_p).sum(-1))
    results += of_x
    if wanted.sum_p_squared:
        results.append(log_p.detach().exp().square_().sum(-1))
    return tuple(results)


def bytes_of_plain(problem: Problem) -> int:
    """What a call takes beside its inputs, backward included where the problem needs the gradient."""
    # As measured, in copies of the logits.
    copies = 2 + problem.entropy + problem.needs_grad * (1 + max(2 * problem.entropy, 3 * problem.logsumexp))
    copies += problem.hidden is not None
    of_weight = problem.weight_grad * problem.vocab * (problem.hidden or 0) * problem.dtype.itemsize
    return copies * problem.rows * problem.vocab * accumulation_dtype(problem.dtype).itemsize + of_weight


def plain_from_hidden(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    temperature: float | Tensor,
    *,
    softcap: float | None,
    wanted: Wanted = PLAIN,
) -> tuple[Tensor, ...]:
    """The same of all logits at once, as a model's output layer makes them.

    Args:
        hidden: [..., H].
        weight: [V, H].
        labels, temperature, wanted: as for `plain`.
        bias: [V].
        softcap: the bound of the logits, before the temperature.
    """
    logits = functional.linear(hidden, weight, bias)
    if softcap is not None:
        logits = softcap * torch.tanh(logits.to(accumulation_dtype(logits.dtype)) / softcap)
    return plain(logits, labels, temperature, wanted=wanted)
