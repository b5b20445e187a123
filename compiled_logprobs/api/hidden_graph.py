"""The custom operators that stand for a call from hidden states in graphs, as those of `api/graph.py` do from logits.

Logits that a backend keeps for its own backward are no part of the graph: which backend serves is not known while it is
traced, nor how many rows count. They travel as the memory of a tensor without elements, `kept`, which is freed with it,
and which the backward empties when it has written over them. Whatever copies that tensor loses them, and they are
computed again.

Shapes: [...] leading dimensions (rows), N rows in all, M that count, H hidden size, V vocabulary, K labels a row.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.library import define, impl, register_autograd, register_fake

from compiled_logprobs.api.call import check_limit, named_backend, problem_from_hidden
from compiled_logprobs.api.graph import (
    TAGS,
    as_argument,
    as_given,
    dtype_of,
    refuse,
    refuse_transforms,
    without_measuring,
)
from compiled_logprobs.backends import backends_for, built_in_for, get_backend, why_not
from compiled_logprobs.choose.auto import Auto, choose_again, logits_backend_on
from compiled_logprobs.errors import BackendUnavailable
from compiled_logprobs.operation.autograd import DIFFERENTIABLE, refuse_double_backward
from compiled_logprobs.operation.contract import Upstream, Wanted
from compiled_logprobs.operation.hidden import HiddenInputs, Needs, inputs_of, run_backward, run_forward
from compiled_logprobs.problem import Problem, accumulation_dtype

FORWARD = "compiled_logprobs::log_probs_from_hidden"
BACKWARD = "compiled_logprobs::log_probs_from_hidden_backward"
_INPUTS = "Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor? temperature"
_OPTIONS = (
    "SymInt ignore_index, float? softcap, bool[4] wanted, bool per_token, bool needs_grad, bool weight_grad, "
    "SymInt? memory_limit, ScalarType out_dtype, str backend"
)


def log_probs_in_graph(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    temperature: float | Tensor,
    *,
    softcap: float | None,
    ignore_index: int,
    wanted: Wanted,
    per_token: bool,
    memory_limit: int | None,
    out_dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, ...]:
    """What `operation.hidden.compute_from_hidden` returns, by the operator.

    Args:
        hidden, weight, labels, bias, temperature, softcap, ignore_index, wanted: as for that.
        per_token: whether the caller gave the temperature as a tensor.
        memory_limit, backend: as for `log_probs_from_hidden`.
        out_dtype: what the results will be converted to, which counts for the choice.
    """
    needs_grad = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in (hidden, weight, bias)]
    options = per_token, any(needs_grad), needs_grad[1], memory_limit, out_dtype, backend
    log_probs, _, _, *others = torch.ops.compiled_logprobs.log_probs_from_hidden(
        hidden, weight, bias, labels, as_argument(temperature, hidden), ignore_index, softcap, list(wanted), *options
    )
    return log_probs, *(result for result, is_wanted in zip(others, wanted, strict=True) if is_wanted)


# Forward


def _forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    temperature: Tensor | None,
    ignore_index: int,
    softcap: float | None,
    wanted: list[bool],
    *options: Any,
) -> tuple[Tensor, ...]:
    refuse_transforms("log_probs_from_hidden")
    *_, backend = options
    inputs = _inputs(hidden, weight, bias, labels, temperature, ignore_index, softcap, wanted, options)
    problem, asked = inputs.problem, Wanted(*wanted)
    check_limit(problem)
    serving: Any
    if backend == "auto":
        auto = Auto(problem, hidden, without_measuring)
        serving = auto if (able := _in_graph(auto.chosen, problem)) is None else able
    else:
        serving = _named(backend, problem)
    logits_backend = logits_backend_on(hidden.device)
    with torch.autocast(hidden.device.type, enabled=False):  # what it asks for was done before
        results, kept = run_forward(serving, inputs, asked, logits_backend, keep=problem.needs_grad)
    stats = results.stats
    if inputs.counting is not None:  # in a graph a size that depends on values would be in the way
        stats = stats.new_zeros(len(stats), problem.rows).index_copy_(1, inputs.counting, stats)
    others = (
        hidden.new_empty(0, dtype=dtype_of(name, hidden))
        if not is_wanted
        else getattr(results, name).reshape(hidden.shape[:-1])
        for name, is_wanted in asked._asdict().items()
    )
    return results.log_probs.reshape(labels.shape), stats, _carried(kept, inputs), *others


def _named(name: str, problem: Problem) -> Any:
    """The backend of this name. Raises BackendUnavailable where it cannot run `problem` in a graph."""
    backend = named_backend(name, problem)
    if problem.needs_grad and backend.needs_autograd:
        others = (other for other in backends_for(problem) if not get_backend(other, problem).needs_autograd)
        raise BackendUnavailable(
            f"backend {name!r} differentiates by autograd, which an operator in a graph cannot. Name another one of "
            f"{', '.join(others)}, or use backend='auto'."
        )
    return backend


def _in_graph(chosen: str, problem: Problem) -> Any:
    """What serves instead of the backend that was chosen, where that needs autograd: the first that can; else None."""
    if not (problem.needs_grad and get_backend(chosen, problem).needs_autograd):
        return None
    able = (get_backend(name, problem) for name in built_in_for(problem) if why_not(name, problem) is None)
    return next(backend for backend in able if not backend.needs_autograd)


def _inputs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    temperature: Tensor | None,
    ignore_index: int,
    softcap: float | None,
    wanted: list[bool],
    options: tuple[Any, ...],
) -> HiddenInputs:
    """What a backend is given; with the problem that a call outside would pose."""
    per_token, needs_grad, weight_grad, memory_limit, out_dtype, _ = options
    t = as_given(temperature, per_token, hidden)
    asked = Wanted(*wanted)
    posed = problem_from_hidden(hidden, weight, bias, labels, t, asked, softcap, memory_limit, out_dtype)
    problem: Problem = posed._replace(needs_grad=needs_grad, weight_grad=weight_grad)  # here gradients are off
    return inputs_of(problem, hidden, weight, bias, labels, t, softcap, ignore_index)


def _carried(kept: Any, inputs: HiddenInputs) -> Tensor:
    """A tensor without elements, whose memory is that of the logits that are kept, if some are."""
    nothing = inputs.hidden.new_empty(0)
    if not isinstance(kept, Tensor) or kept.dtype != nothing.dtype or not kept.is_contiguous():
        return nothing
    return kept.detach().view(-1)[:0] if kept.untyped_storage().nbytes() == _bytes(inputs) else nothing


def _uncarried(kept: Tensor, inputs: HiddenInputs) -> Tensor | None:
    """The logits [M, V] in the memory of `kept`; None where nothing was kept, or it was lost or used on the way."""
    storage, rows, vocab = kept.untyped_storage(), len(inputs.labels), len(inputs.weight)
    if rows == 0 or storage.nbytes() != _bytes(inputs):
        return None
    return kept.new_empty(0).set_(storage, 0, (rows, vocab), (vocab, 1))


def _bytes(inputs: HiddenInputs) -> int:
    return len(inputs.labels) * len(inputs.weight) * inputs.hidden.element_size()


def _fake_forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    temperature: Tensor | None,
    ignore_index: int,
    softcap: float | None,
    wanted: list[bool],
    *options: Any,
) -> tuple[Tensor, ...]:
    refuse_transforms("log_probs_from_hidden")
    rows, dtype = hidden.shape[:-1], accumulation_dtype(hidden.dtype)
    asked = Wanted(*wanted)
    others = (
        hidden.new_empty(rows if is_wanted else 0, dtype=dtype_of(name, hidden))
        for name, is_wanted in asked._asdict().items()
    )
    stats = hidden.new_empty(2 + asked.entropy, math.prod(rows), dtype=dtype)
    return hidden.new_empty(labels.shape, dtype=dtype), stats, hidden.new_empty(0), *others


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.options = *inputs[:5], inputs[5:]
    _, stats, kept, _, _, argmax, sum_p_squared = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(stats, kept, argmax, sum_p_squared)
    ctx.save_for_backward(*tensors, stats, kept)


def _differentiate(ctx: Any, grad: Tensor | None, *grads: Tensor | None) -> tuple[Any, ...]:
    refuse_double_backward("log_probs_from_hidden")
    _, _, *grad_others = grads
    _, _, wanted, *_ = ctx.options
    given = dict.fromkeys(DIFFERENTIABLE) | {
        name: grad for name, grad, is_wanted in zip(Wanted._fields, grad_others, wanted, strict=True) if is_wanted
    }
    needs = list(ctx.needs_input_grad[:3])
    gradients = torch.ops.compiled_logprobs.log_probs_from_hidden_backward(
        *ctx.saved_tensors, grad, *map(given.get, DIFFERENTIABLE), needs, *ctx.options
    )
    asked = (gradient if is_needed else None for gradient, is_needed in zip(gradients, needs, strict=True))
    return *asked, *[None] * (2 + len(ctx.options))


# Backward


def _backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    temperature: Tensor | None,
    stats: Tensor,
    kept: Tensor,
    grad_log_probs: Tensor | None,
    grad_entropy: Tensor | None,
    grad_logsumexp: Tensor | None,
    needs: list[bool],
    ignore_index: int,
    softcap: float | None,
    wanted: list[bool],
    *options: Any,
) -> tuple[Tensor, ...]:
    *_, backend = options
    inputs = _inputs(hidden, weight, bias, labels, temperature, ignore_index, softcap, wanted, options)
    problem = inputs.problem
    serving: Any
    if backend == "auto":
        name, chosen = choose_again(problem, hidden.device)
        serving = chosen if (able := _in_graph(name, problem)) is None else able
    else:
        serving = _named(backend, problem)
    stats = stats if inputs.counting is None else stats.index_select(1, inputs.counting)
    if grad_log_probs is None:
        grad_log_probs = torch.zeros_like(labels, dtype=stats.dtype)
    of_rows = (None if grad is None else grad.reshape(problem.rows) for grad in (grad_entropy, grad_logsumexp))
    upstream = Upstream(
        grad_log_probs.reshape(problem.rows, problem.labels_per_row).contiguous(),
        *(None if grad is None else grad.contiguous() for grad in of_rows),
    )
    logits = _uncarried(kept, inputs) if serving.keeps_logits else None
    logits_backend = logits_backend_on(hidden.device)
    with torch.autocast(hidden.device.type, enabled=False):
        gradients = run_backward(serving, inputs, stats, logits, upstream, logits_backend, Needs(*needs))
    if logits is not None:
        kept.untyped_storage().resize_(0)  # a second backward must not take them for logits
    of_hidden, *others = gradients
    of_hidden = None if of_hidden is None else of_hidden.view(hidden.shape)
    return tuple(hidden.new_empty(0) if gradient is None else gradient for gradient in (of_hidden, *others))


def _fake_backward(hidden: Tensor, weight: Tensor, bias: Tensor | None, *others: Any) -> tuple[Tensor, ...]:
    needs = others[7]
    return tuple(
        torch.empty_like(x, memory_format=torch.contiguous_format)
        if is_needed and x is not None
        else hidden.new_empty(0)
        for x, is_needed in zip((hidden, weight, bias), needs, strict=True)
    )


_RESULTS = ", ".join(f"Tensor {name}" for name in ("log_probs", "stats", "kept", *Wanted._fields))
define(FORWARD, f"({_INPUTS}, {_OPTIONS}) -> ({_RESULTS})", tags=TAGS)
_GRADS = ", ".join(f"Tensor? grad_{name}" for name in Upstream._fields)
define(
    BACKWARD,
    f"({_INPUTS}, Tensor stats, Tensor kept, {_GRADS}, bool[3] needs, {_OPTIONS}) -> "
    "(Tensor hidden_grad, Tensor weight_gradient, Tensor bias_grad)",
    tags=TAGS,
)
impl(FORWARD, "default", _forward)
impl(BACKWARD, "default", _backward)
register_fake(FORWARD, _fake_forward)
register_fake(BACKWARD, _fake_backward)
register_autograd(FORWARD, _differentiate, setup_context=_save)
register_autograd(BACKWARD, refuse)
