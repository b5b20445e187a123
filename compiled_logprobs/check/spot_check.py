"""A look at a few rows of a large result: where 32-bit offsets overflow, what is right for few rows is wrong for many.

The check asks how exact a backend is; this asks only whether it computes the same thing at this size.

Shapes: N rows, n of them looked at, V vocabulary, K labels a row; R the leading dimensions, whose product is N.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from compiled_logprobs.check.inputs import PLAIN_CEILING, row_scale
from compiled_logprobs.check.verdicts import EPS
from compiled_logprobs.operation.reference import reference
from compiled_logprobs.problem import Problem, results_of

ROWS = 8
"""How many rows are looked at: spread evenly, the first and the last among them."""


def what_is_wrong(
    problem: Problem,
    logits: Tensor,
    labels: Tensor,
    temperature: float | Tensor,
    upstream: Mapping[str, Tensor],
    results: Sequence[Tensor],
    gradient: Tensor | None,
) -> str | None:
    """The first row at which a result is another than in float64, in words; None if there is none.

    Args:
        problem: what was asked for.
        logits: [R, V], as they were before the call.
        labels: [R, K], none of them ignored.
        temperature: a number or [R].
        upstream: the gradients of results, by name.
        results: log-probabilities [R, K], and what else was asked for, [R], in order.
        gradient: [R, V], None where none was asked for.
    """
    rows = torch.linspace(0, problem.rows - 1, min(ROWS, problem.rows), device=logits.device).round().long()
    at = torch.unravel_index(rows, logits.shape[:-1])
    x_nV = logits[at]
    t = temperature[at] if isinstance(temperature, Tensor) else temperature
    given: dict[str, Any] = (
        {} if gradient is None else {f"grad_{name}": grad[at].double() for name, grad in upstream.items()}
    )
    true = reference(x_nV, labels[at], t, **given)
    t = t.unsqueeze(-1) if isinstance(t, Tensor) else t
    scale_n1 = row_scale(x_nV, t).double()
    limit_n1 = PLAIN_CEILING * EPS * scale_n1
    own, returned = torch.finfo(problem.dtype), torch.finfo(problem.out_dtype)
    kinds = [("log-probability", results[0], true.log_probs, limit_n1, returned.eps)]
    for name, result in zip(results_of(problem), results[1:], strict=True):
        truth_n1, limit = getattr(true, name).unsqueeze(-1).double(), limit_n1
        if name in ("argmax", "sum_p_squared"):  # the one exact, the other off by as much as two factors of it
            limit = torch.zeros_like(limit_n1) if name == "argmax" else 2 * limit_n1 * truth_n1
        kinds.append((name, result.unsqueeze(-1), truth_n1, limit, 0.0 if name == "argmax" else returned.eps))
    if gradient is not None and true.gradient is not None:
        size_n1 = upstream["log_probs"][at].double().abs().sum(-1, keepdim=True)
        for name, factor in (("entropy", scale_n1), ("logsumexp", 1.0)):
            if name in upstream:  # of the entropy, a probability times its logarithm
                size_n1 = size_n1 + upstream[name][at].double().abs().unsqueeze(-1) * factor
        kinds.append(("gradient", gradient, true.gradient, limit_n1 * size_n1 / t + own.tiny, own.eps))
    for what, result, expected, limit, relative in kinds:
        got = result.detach()[at].double()
        error = (got - expected).abs()
        off = ~(torch.isclose(got, expected, 0.0, 0.0, True) | (error <= limit + relative * expected.abs()))
        if off.any():
            place = int(off.nonzero()[0, 0])
            worst = float(error[off].nan_to_num(nan=torch.inf).max())
            return f"with {problem.rows} rows, the {what} of row {int(rows[place])} is off by {worst:.3g}"
    return None
