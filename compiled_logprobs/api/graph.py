"""The custom operators that stand for a call in the graphs of torch.compile and torch.export, and for fake tensors.

Each time the graph runs, the operator chooses a backend as a call outside does, so that the same one serves, with the
same bits; but nothing is measured. While the graph is traced nothing is chosen: shapes, dtypes, options and whether a
gradient is needed are what it fixes.

Shapes: [...] leading dimensions (rows), N rows in all, V vocabulary, K labels a row.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.library import define, impl, register_autograd, register_fake

from compiled_logprobs.api.call import named_backend, problem_of
from compiled_logprobs.arguments import is_temperature, is_traced, peek_transform
from compiled_logprobs.choose.auto import Auto, choose_again
from compiled_logprobs.choose.rule import Context
from compiled_logprobs.decision import Decision
from compiled_logprobs.errors import LogProbsError
from compiled_logprobs.operation.autograd import (
    DIFFERENTIABLE,
    forward_ad_level,
    in_shape,
    merged,
    names,
    refuse_double_backward,
    run_backward,
    run_forward,
)
from compiled_logprobs.operation.contract import Upstream, Wanted
from compiled_logprobs.problem import Problem, accumulation_dtype

FORWARD, BACKWARD = "compiled_logprobs::log_probs", "compiled_logprobs::log_probs_backward"
IN_PLACE = f"{BACKWARD}_"
_INPUTS = "Tensor logits, Tensor labels, Tensor? temperature"
_OPTIONS = (
    "SymInt ignore_index, bool[4] wanted, bool per_token, bool needs_grad, bool masked_logits, bool inplace, "
    "ScalarType out_dtype, str backend"
)
TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)  # so that slices come as they lie in memory


def log_probs_in_graph(
    logits: Tensor,
    labels: Tensor,
    temperature: float | Tensor,
    *,
    ignore_index: int,
    wanted: Wanted,
    per_token: bool,
    masked_logits: bool,
    inplace_backward: bool,
    out_dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, ...]:
    """What `operation.autograd.compute` returns, by the operator.

    Args:
        logits, labels, ignore_index, wanted, masked_logits, inplace_backward, backend: as for `log_probs_from_logits`.
        temperature: as `checked_temperature` returns it.
        per_token: whether the caller gave it as a tensor.
        out_dtype: what the results will be converted to, which counts for the choice.
    """
    t = as_argument(temperature, logits)
    needs_grad = logits.requires_grad and torch.is_grad_enabled()
    options = ignore_index, list(wanted), per_token, needs_grad, masked_logits, inplace_backward, out_dtype, backend
    log_probs, _, *others = torch.ops.compiled_logprobs.log_probs(logits, labels, t, *options)
    return log_probs, *(result for result, is_wanted in zip(others, wanted, strict=True) if is_wanted)


def as_argument(temperature: float | Tensor, at: Tensor) -> Tensor | None:
    """What an operator takes for a temperature of rows of `at`: a tensor, which no new value compiles anew; None for
    1."""
    if isinstance(temperature, Tensor):
        return temperature
    if temperature == 1.0:
        return None
    dtype = torch.float64 if at.is_cpu else accumulation_dtype(at.dtype)
    return torch.full((), temperature, dtype=dtype, device=at.device)  # torch.tensor would copy it from the host


def as_given(temperature: Tensor | None, per_token: bool, at: Tensor) -> float | Tensor:
    """The temperature for a backend, of rows of `at`, from what `as_argument` made of it."""
    if temperature is None:
        return 1.0
    is_number = not per_token and temperature.is_cpu  # elsewhere reading it would wait for the device
    if is_number and is_temperature(number := temperature.item()):
        return number
    return temperature.to(accumulation_dtype(at.dtype)).expand(at.shape[:-1])


def dtype_of(name: str, at: Tensor) -> torch.dtype:
    """Of the result of this name."""
    return torch.int64 if name == "argmax" else accumulation_dtype(at.dtype)


def refuse_transforms(function: str) -> None:
    """Raise LogProbsError for what torch would differentiate through an operator in silence, to a tangent of 0."""
    if forward_ad_level() >= 0 or peek_transform() is not None:
        raise LogProbsError(
            f"forward-mode differentiation or a transform of torch.func got to {function} in a graph; it has a "
            "backward alone. Use torch.autograd.grad, or torch.log_softmax and gather."
        )


def without_measuring(context: Context, standing: Decision | None) -> str:
    """Why a call in a graph does not tune."""
    return "a call inside a graph does not measure; tune(...) does"


# Forward


def _forward(
    logits: Tensor, labels: Tensor, temperature: Tensor | None, ignore_index: int, wanted: list[bool], *options: Any
) -> tuple[Tensor, ...]:
    refuse_transforms("log_probs_from_logits")
    *_, backend = options
    t, problem = _posed(logits, labels, temperature, wanted, options)
    asked = Wanted(*wanted)
    serving = Auto(problem, logits, without_measuring) if backend == "auto" else named_backend(backend, problem)
    inputs, results = run_forward(serving, logits, labels, t, ignore_index, asked)
    log_probs, *others = in_shape(results, asked, logits, labels)
    stats = results.stats.view(-1, problem.rows) if inputs is not None else log_probs.new_empty(2 + asked.entropy, 0)
    given = dict(zip(names(asked), others, strict=True))
    for name in Wanted._fields:
        if name not in given:
            given[name] = logits.new_empty(0, dtype=dtype_of(name, logits))
    return log_probs, stats, *(given[name] for name in Wanted._fields)


def _posed(
    logits: Tensor, labels: Tensor, temperature: Tensor | None, wanted: list[bool], options: tuple[Any, ...]
) -> tuple[float | Tensor, Problem]:
    """The temperature for a backend, and the problem."""
    per_token, needs_grad, masked_logits, inplace, out_dtype, _ = options
    t = as_given(temperature, per_token, logits)
    problem = problem_of(logits, labels, t, Wanted(*wanted), masked_logits, False, out_dtype)
    # Inside an operator gradients are off.
    return t, problem._replace(needs_grad=needs_grad, inplace_backward=inplace and needs_grad)


def _fake_forward(
    logits: Tensor, labels: Tensor, temperature: Tensor | None, ignore_index: int, wanted: list[bool], *options: Any
) -> tuple[Tensor, ...]:
    refuse_transforms("log_probs_from_logits")
    rows, dtype = logits.shape[:-1], accumulation_dtype(logits.dtype)
    asked = Wanted(*wanted)
    others = (
        logits.new_empty(rows if is_wanted else 0, dtype=dtype_of(name, logits))
        for name, is_wanted in asked._asdict().items()
    )
    stats = logits.new_empty(2 + asked.entropy, math.prod(rows), dtype=dtype)
    return logits.new_empty(labels.shape, dtype=dtype), stats, *others


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, labels, temperature, *ctx.options = inputs
    _, stats, _, _, argmax, sum_p_squared = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(stats, argmax, sum_p_squared)
    ctx.save_for_backward(logits, labels, temperature, stats)


def _differentiate(ctx: Any, grad: Tensor | None, _: Tensor | None, *grad_others: Tensor | None) -> tuple[Any, ...]:
    refuse_double_backward()
    logits, labels, temperature, stats = ctx.saved_tensors
    _, wanted, *_ = ctx.options
    grads = dict.fromkeys(DIFFERENTIABLE) | {
        name: grad for name, grad, is_wanted in zip(Wanted._fields, grad_others, wanted, strict=True) if is_wanted
    }
    given = labels, temperature, stats, grad, *map(grads.get, DIFFERENTIABLE), *ctx.options
    *_, inplace, _, _ = ctx.options
    if inplace and is_traced(logits) and logits.is_contiguous() and not torch.is_grad_enabled():
        # What was saved may not be written over. But where nobody needs it any more, Inductor makes this copy onto
        # itself. Of a slice it would copy the whole, for a gradient that autograd copies again.
        gradient = logits.clone()
        torch.ops.compiled_logprobs.log_probs_backward_(gradient, *given)
    else:
        gradient = torch.ops.compiled_logprobs.log_probs_backward(logits, *given)
    return gradient, *[None] * (2 + len(ctx.options))


# Backward


def _backward(
    logits: Tensor,
    labels: Tensor,
    temperature: Tensor | None,
    stats: Tensor,
    grad_log_probs: Tensor | None,
    grad_entropy: Tensor | None,
    grad_logsumexp: Tensor | None,
    ignore_index: int,
    wanted: list[bool],
    *options: Any,
    inplace: bool = False,
) -> Tensor:
    *_, backend = options
    if logits.numel() == 0:
        return torch.zeros_like(logits, memory_format=torch.contiguous_format)
    t, problem = _posed(logits, labels, temperature, wanted, options)
    is_auto = backend == "auto"
    serving = choose_again(problem, logits.device)[1] if is_auto else named_backend(backend, problem)
    inputs = merged(logits, labels, t, ignore_index)
    grads = grad_log_probs, grad_entropy, grad_logsumexp
    gradient = run_backward(serving, inputs, stats.view(-1, *inputs.labels.shape[:-1]), grads, inplace=inplace)
    return gradient.view(logits.shape)


def _fake_backward(logits: Tensor, *others: Any) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _backward_in_place(logits: Tensor, *others: Any) -> None:
    """Write the gradient over `logits`."""
    if logits.numel() > 0:
        _backward(logits, *others, inplace=True)


def refuse(ctx: Any, *grads: Any) -> None:
    """A backward of the backward, where the forward's own was not asked, as in a graph that holds both."""
    with torch.enable_grad():
        refuse_double_backward()


_RESULTS = ", ".join(f"Tensor {name}" for name in ("log_probs", "stats", *Wanted._fields))
define(FORWARD, f"({_INPUTS}, {_OPTIONS}) -> ({_RESULTS})", tags=TAGS)
_GRADS = ", ".join(f"Tensor? grad_{name}" for name in Upstream._fields)
_UPSTREAM = f"Tensor stats, {_GRADS}, {_OPTIONS}"
define(BACKWARD, f"({_INPUTS}, {_UPSTREAM}) -> Tensor", tags=TAGS)
define(IN_PLACE, f"({_INPUTS.replace('Tensor', 'Tensor(a!)', 1)}, {_UPSTREAM}) -> ()", tags=TAGS)
impl(FORWARD, "default", _forward)
impl(BACKWARD, "default", _backward)
impl(IN_PLACE, "default", _backward_in_place)
register_fake(FORWARD, _fake_forward)
register_fake(BACKWARD, _fake_backward)
register_fake(IN_PLACE, lambda *_: None)
register_autograd(FORWARD, _differentiate, setup_context=_save)
register_autograd(BACKWARD, refuse)
