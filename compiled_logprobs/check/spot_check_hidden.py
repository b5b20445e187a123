"""The look at a few rows of a large result, where it was computed from hidden states.

The check asks how exact a backend is; this asks only whether it computes the same thing at this size.

Shapes: N rows, n of them looked at; H hidden size; V vocabulary, v of its columns looked at; K labels a row.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from compiled_logprobs.check.spot_check import ROWS
from compiled_logprobs.operation.reference import reference
from compiled_logprobs.problem import Problem, results_of

ROUNDED, NOT_ROUNDED = 0.25, 1e-3
"""How far off a gradient may be, as a share of its length: in half precision, where two products round the logits each
in its own way; and in float32."""
NATS = 8.0
"""The same of results, in roundings of the row's largest logit."""
LEAST_ROUNDING = 2.0**-16
"""What a product over H sums up to in float32."""
BLOCK = 2**13
"""Columns that are computed with in float64 at once."""


def what_is_wrong_from_hidden(
    problem: Problem,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    temperature: float | Tensor,
    softcap: float | None,
    upstream: Mapping[str, Tensor],
    results: Sequence[Tensor],
    gradients: Sequence[Tensor],
) -> str | None:
    """The first result or gradient that is another than in float64, in words; None if there is none.

    Args:
        problem: what was asked for.
        hidden, weight, bias: [N, H], [V, H], [V].
        labels: [N, K], none of them ignored.
        temperature: a number or [N].
        softcap: as for `compute_from_hidden`.
        upstream: the gradients of results, by name.
        results: log-probabilities [N, K], and what else was asked for, [N], in order.
        gradients: in the hidden states, and in weight and bias where these need one.
    """
    at = torch.linspace(0, problem.rows - 1, min(ROWS, problem.rows), device=hidden.device).round().long()
    t_n = temperature[at] if isinstance(temperature, Tensor) else temperature
    z_nV = functional.linear(hidden[at], weight, bias).double()
    x_nV, slope_nV = _capped(z_nV, softcap)
    asked: dict[str, Any] = {f"grad_{name}": grad[at].double() for name, grad in upstream.items()} if gradients else {}
    true = reference(x_nV, labels[at], t_n, **asked)
    rounding = max(torch.finfo(problem.dtype).eps, LEAST_ROUNDING)
    limit_n1 = NATS * rounding * (x_nV.abs().amax(-1) / t_n).clamp(min=1.0).unsqueeze(-1)
    named = [("log-probability", results[0], true.log_probs)]
    for name, result in zip(results_of(problem), results[1:], strict=True):
        if name != "argmax":  # which rounding moves to a near one
            named.append((name, result.unsqueeze(-1), getattr(true, name).unsqueeze(-1)))
    own = torch.finfo(problem.out_dtype).eps
    for what, result, expected in named:
        error = (result.detach()[at].double() - expected).abs()
        limit = limit_n1 if what != "entropy" else limit_n1 * x_nV.abs().amax()
        if not bool((error <= limit + own * expected.abs()).all()):
            worst = float(error.nan_to_num(torch.inf).max())
            return f"with {problem.rows} rows, the {what} of some is off by {worst:.3g}"
    if not gradients or true.gradient is None:
        return None
    share = NOT_ROUNDED if problem.dtype.itemsize > 2 else ROUNDED
    dz_nV = true.gradient * slope_nV
    of_hidden_nH = dz_nV.new_zeros(len(at), weight.shape[-1])
    for start in range(0, len(weight), BLOCK):
        of_hidden_nH += dz_nV[:, start : start + BLOCK] @ weight[start : start + BLOCK].double()
    wrong = _off("hidden states", gradients[0][at], of_hidden_nH, share)
    if wrong is None and problem.weight_grad and upstream.keys() == {"log_probs"}:
        v = labels[at, 0]
        dz_Nv = _gradient_at(v, hidden, weight, bias, labels, temperature, softcap, upstream["log_probs"], results[0])
        wrong = _off("weight", gradients[1][v], dz_Nv.T @ hidden.double(), share)
    return wrong if wrong is None else f"with {problem.rows} rows, {wrong}"


def _capped(z: Tensor, softcap: float | None) -> tuple[Tensor, Tensor | float]:
    """The logits, and their slope in z."""
    if softcap is None:
        return z, 1.0
    tanh = (z / softcap).tanh()
    return softcap * tanh, 1.0 - tanh.square()


def _gradient_at(
    v: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    temperature: float | Tensor,
    softcap: float | None,
    upstream_NK: Tensor,
    log_probs_NK: Tensor,
) -> Tensor:
    """[N, v]: the gradient in the product at some columns, with the logsumexp that the log-probabilities imply."""
    t_N1 = temperature.double().unsqueeze(-1) if isinstance(temperature, Tensor) else temperature
    z_Nv = functional.linear(hidden, weight[v], None if bias is None else bias[v]).double()
    x_Nv, slope_Nv = _capped(z_Nv, softcap)
    first_N = labels[:, 0]
    z_N = torch.einsum("nh,nh->n", hidden.double(), weight[first_N].double())
    x_N, _ = _capped(z_N if bias is None else z_N + bias[first_N], softcap)
    logsumexp_N1 = x_N.unsqueeze(-1) / t_N1 - log_probs_NK[:, :1].detach().double()
    g_NK = upstream_NK.double()
    is_label_Nv = (g_NK.unsqueeze(-1) * (labels.unsqueeze(-1) == v)).sum(1)
    return (is_label_Nv - g_NK.sum(-1, keepdim=True) * (x_Nv / t_N1 - logsumexp_N1).exp()) / t_N1 * slope_Nv


def _off(what: str, got: Tensor, expected: Tensor, share: float) -> str | None:
    error, length = (got.detach().double() - expected).norm(), expected.norm()
    if bool(error <= share * length + torch.finfo(got.dtype).tiny * got.numel()):
        return None
    return f"the gradient in the {what} is off by {float(error / length.clamp(min=1e-300)):.3g} of its length"
