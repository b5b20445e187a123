"""A look at a few rows of a large result: where 32-bit offsets overflow, what is right for few rows is wrong for many.

The check asks how exact a backend is; this asks only whether it computes the same thing at this size.

Shapes: N rows, n of them looked at, V vocabulary, K labels a row; R the leading dimensions, whose product is N.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from compiled_logprobs.operation.reference import reference
from compiled_logprobs.problem import Problem

ROWS = 8
"""How many rows are looked at: spread evenly, the first and the last among them."""
SLACK = 64.0
"""How many times eps(float32) times the row's largest |x| a log-probability may be off; and how many times that,
with its dtype's own rounding, a gradient."""
EPS = torch.finfo(torch.float32).eps


def what_is_wrong(
    problem: Problem,
    logits: Tensor,
    labels: Tensor,
    temperature: float | Tensor,
    upstream: Sequence[Tensor],
    results: Sequence[Tensor],
    gradient: Tensor | None,
) -> str | None:
    """The first row at which a result is another than in float64, in words; None if there is none.

    Args:
        problem: what was asked for.
        logits: [R, V], as they were before the call.
        labels: [R, K], none of them ignored.
        temperature: a number or [R].
        upstream: the gradient of each result.
        results: log-probabilities [R, K], and the entropy [R] if it was asked for.
        gradient: [R, V], None where none was asked for.
    """
    vocab, count = problem.vocab, problem.rows
    rows = torch.linspace(0, count - 1, min(ROWS, count), device=logits.device).round().long()
    at = torch.unravel_index(rows, logits.shape[:-1])
    x_nV = logits[at]
    t = temperature[at] if isinstance(temperature, Tensor) else temperature
    results = [result.detach() for result in results]
    true = reference(
        x_nV,
        labels[at],
        t,
        grad_log_probs=upstream[0][at].double() if gradient is not None else None,
        grad_entropy=upstream[1][at].double() if gradient is not None and problem.entropy else None,
    )
    finite_nV = torch.where(x_nV.isfinite(), x_nV, 0.0).double()
    largest_n1 = (finite_nV.abs().amax(-1) / t).unsqueeze(-1).clamp(min=1.0)
    rounding = torch.finfo(problem.out_dtype).eps
    limit_n1 = SLACK * EPS * largest_n1
    kinds = [("log-probability", results[0][at].double(), true.log_probs, limit_n1, rounding)]
    if problem.entropy:
        kinds.append(("entropy", results[1][at].double().unsqueeze(-1), true.entropy.unsqueeze(-1), limit_n1, rounding))
    if gradient is not None and true.gradient is not None:
        size_n1 = upstream[0][at].double().abs().sum(-1, keepdim=True)
        if problem.entropy:  # a probability times its logarithm
            size_n1 = size_n1 + upstream[1][at].double().abs().unsqueeze(-1) * largest_n1
        size_n1 = size_n1 / (t.unsqueeze(-1) if isinstance(t, Tensor) else t)
        own = torch.finfo(problem.dtype)
        limit = limit_n1 * size_n1 + own.tiny
        kinds.append(("gradient", gradient.reshape(-1, vocab)[rows].double(), true.gradient, limit, own.eps))
    for what, got, expected, limit, relative in kinds:
        off = ~torch.isclose(got, expected, rtol=0.0, atol=0.0, equal_nan=True) & ~(
            (got - expected).abs() <= limit + relative * expected.abs()
        )
        if off.any():
            place = int(off.nonzero()[0, 0])
            worst = (got - expected).abs()[off].nan_to_num(nan=torch.inf).max()
            return f"with {count} rows, the {what} of row {int(rows[place])} is off by {float(worst):.3g}"
    return None
