"""From hidden states: what is common to all backends that multiply them with the output layer's weight.

With z = hidden @ weight.T + bias, a soft cap c and a temperature T:

    x  = c tanh(z / c) / T          z / T without a cap; a factor of z is in c and T already
    dz = dx (1 - tanh(z / c)^2)
    d hidden = dz @ weight          d weight = dz.T @ hidden          d bias = the sum of dz over the rows

Rows all of whose labels are ignored are left out before the product.

Shapes: N rows, of which C in a chunk and M count; H hidden size; V vocabulary; K labels a row.
"""

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from compiled_logprobs.arguments import has_saved_tensor_hooks
from compiled_logprobs.operation.autograd import (
    DIFFERENTIABLE,
    PLAIN,
    ForwardBackward,
    forward_ad_level,
    names,
    refuse_double_backward,
    refuse_forward_mode,
)
from compiled_logprobs.operation.contract import Results, Upstream, Wanted
from compiled_logprobs.problem import Problem, accumulation_dtype


class LogitsBackend(Protocol):
    """What computes from logits, for a problem that these pose: that of this name, or the one that is chosen."""

    def __call__(self, problem: Problem, name: str | None = None) -> ForwardBackward: ...


class HiddenInputs(NamedTuple):
    """What both directions are computed from."""

    problem: Problem
    """Of the call, with N of all rows."""
    hidden: Tensor
    """[N, H]"""
    weight: Tensor
    """[V, H]"""
    bias: Tensor | None
    """[V]"""
    labels: Tensor
    """[M, K] int64 or int32, contiguous: as for `contract.Inputs`."""
    temperature: float | Tensor
    """A positive number, or [M]; divided by what the logits are to be multiplied by."""
    ignore_index: int
    softcap: float | None
    """Divided by the same."""
    counting: Tensor | None
    """[M] int64: the rows that count; None where all do."""

    def hidden_of(self, rows: slice, memory: Tensor | None = None) -> Tensor:
        """[C, H], of the rows that count; a copy, where there has to be one, lies in `memory`, if that is given."""
        if self.counting is None:
            return self.hidden[rows]
        counting = self.counting[rows]
        return torch.index_select(self.hidden, 0, counting, out=None if memory is None else memory[: len(counting)])


class Needs(NamedTuple):
    """Which gradients are asked for."""

    hidden: bool
    weight: bool
    bias: bool


class Gradients(NamedTuple):
    """In the dtype of what each is of; None where it was not asked for."""

    hidden: Tensor | None
    """[N, H], 0 in the rows that do not count."""
    weight: Tensor | None
    """[V, H]"""
    bias: Tensor | None
    """[V]"""


class FromHidden(Protocol):
    """The pair that `compute_from_hidden` wraps; `compiled_logprobs.backends.base.HiddenBackend`, a layer above,
    documents it."""

    def forward(
        self, inputs: HiddenInputs, wanted: Wanted, logits_backend: LogitsBackend, *, keep: bool
    ) -> tuple[Results, Any]: ...

    def backward(
        self,
        inputs: HiddenInputs,
        stats: Tensor,
        kept: Any,
        upstream: Upstream,
        logits_backend: LogitsBackend,
        needs: Needs,
    ) -> Gradients: ...


def at_rows(upstream: Upstream, rows: slice | Tensor) -> Upstream:
    """The part of it that comes to these rows."""
    of_labels, *of_rows = upstream
    return Upstream(of_labels[rows], *(None if grad is None else grad[rows] for grad in of_rows))


def compute_from_hidden(
    backend: FromHidden,
    problem: Problem,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    *,
    softcap: float | None = None,
    ignore_index: int = -100,
    wanted: Wanted = PLAIN,
    logits_backend: LogitsBackend,
) -> tuple[Tensor, ...]:
    """Run `backend`, differentiably.

    Args:
        backend: the pair of functions.
        problem: what the call poses.
        hidden: [..., H].
        weight: [V, H].
        labels: [...] or [..., K], int64 or int32: as for `autograd.compute`.
        bias: [V].
        temperature: a number, or a tensor broadcastable to [...]; divided by what the logits are to be multiplied by.
        softcap: divided by the same.
        ignore_index: the label that counts 0.
        wanted: what to return beside the log-probabilities.
        logits_backend: what computes from logits, where the backend has some.

    Returns:
        As `autograd.compute`.
    """
    if isinstance(temperature, Tensor):
        temperature = temperature.to(accumulation_dtype(hidden.dtype)).expand(hidden.shape[:-1])
    if not torch.compiler.is_compiling() and forward_ad_level() >= 0:
        for tensor in (hidden, weight, bias):
            if tensor is not None:
                refuse_forward_mode(tensor, "log_probs_from_hidden")
    results: Any = _FromHidden.apply(  # type: ignore[no-untyped-call]  # torch's gap
        hidden, weight, bias, labels, temperature, backend, problem, softcap, ignore_index, wanted, logits_backend
    )
    return results if isinstance(results, tuple) else (results,)


def run_forward(
    backend: FromHidden,
    inputs: HiddenInputs,
    wanted: Wanted,
    logits_backend: LogitsBackend,
    *,
    keep: bool,
) -> tuple[Results, Any]:
    """Results of all rows, those that do not count being 0, but the statistics of those that do; and what is kept."""
    rows, counting = len(inputs.hidden), inputs.counting
    if len(inputs.labels) == 0:
        results, kept = _nothing(inputs, wanted), None
    else:
        results, kept = backend.forward(inputs, wanted, logits_backend, keep=keep)
    if counting is None:
        return results, kept

    def spread(result: Tensor | None, fill: int = 0) -> Tensor | None:
        if result is None:
            return None
        return result.new_full((rows, *result.shape[1:]), fill).index_copy_(0, counting, result)

    log_probs = spread(results.log_probs)
    assert log_probs is not None
    others: dict[str, Any] = {
        name: spread(getattr(results, name), -1 if name == "argmax" else 0) for name in names(wanted)
    }
    return results._replace(log_probs=log_probs, **others), kept


def run_backward(
    backend: FromHidden,
    inputs: HiddenInputs,
    stats: Tensor,
    kept: Any,
    upstream: Upstream,
    logits_backend: LogitsBackend,
    needs: Needs,
) -> Gradients:
    """The gradients that are needed, of upstream gradients of all rows."""
    if inputs.counting is not None:
        upstream = at_rows(upstream, inputs.counting)
    if len(inputs.labels) == 0:
        given = zip(needs, (inputs.hidden, inputs.weight, inputs.bias), strict=True)
        return Gradients(*(torch.zeros_like(x) if is_needed and x is not None else None for is_needed, x in given))
    return backend.backward(inputs, stats, kept, upstream, logits_backend, needs)


def inputs_of(
    problem: Problem,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    temperature: float | Tensor,
    softcap: float | None,
    ignore_index: int,
) -> HiddenInputs:
    """What a backend is given, of arguments with any leading dimensions."""
    rows = problem.rows
    x_NH = hidden.detach().reshape(rows, hidden.shape[-1])
    x_NH = x_NH if x_NH.stride(-1) == 1 else x_NH.contiguous()
    y_NK = labels.reshape(rows, problem.labels_per_row).contiguous()
    t = temperature.reshape(rows).contiguous() if isinstance(temperature, Tensor) else temperature
    counting = None
    if not (hidden.is_cuda and torch.cuda.is_current_stream_capturing()):  # where nothing waits for the device
        counts = (y_NK.long() != ignore_index).any(-1)  # torch cuts it off for an int32: -2**63 would be 0
        if not bool(counts.all()):
            counting = counts.nonzero().squeeze(-1)
            y_NK = y_NK.index_select(0, counting)
            t = t.index_select(0, counting) if isinstance(t, Tensor) else t
    bias = None if bias is None else bias.detach()
    return HiddenInputs(problem, x_NH, weight.detach(), bias, y_NK, t, ignore_index, softcap, counting)


def _nothing(inputs: HiddenInputs, wanted: Wanted) -> Results:
    """Of no rows."""
    dtype = accumulation_dtype(inputs.hidden.dtype)
    of_rows = inputs.hidden.new_empty(0, dtype=dtype)
    others = {name: of_rows.long() if name == "argmax" else of_rows.clone() for name in names(wanted)}
    stats = of_rows.new_empty(2 + wanted.entropy, 0)
    return Results(of_rows.new_empty(0, inputs.labels.shape[-1]), stats, **others)


class _FromHidden(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        temperature: float | Tensor,
        backend: FromHidden,
        problem: Problem,
        softcap: float | None,
        ignore_index: int,
        wanted: Wanted,
        logits_backend: LogitsBackend,
    ) -> Tensor | tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        inputs = inputs_of(problem, hidden, weight, bias, labels, temperature, softcap, ignore_index)
        # What hooks on saved tensors make of it, as a checkpoint that drops it, takes effect for a tensor alone.
        keep = problem.needs_grad
        with torch.autocast(hidden.device.type, enabled=False):  # what it asks for was done before
            results, kept = run_forward(backend, inputs, wanted, logits_backend, keep=keep)
        is_tensor = isinstance(kept, Tensor)
        if not is_tensor and has_saved_tensor_hooks(otherwise=False):
            kept = None
        ctx.backend, ctx.logits_backend, ctx.wanted, ctx.shape = backend, logits_backend, wanted, hidden.shape
        ctx.problem, ctx.softcap, ctx.ignore_index = problem, softcap, ignore_index
        ctx.kept, ctx.is_spent = None if is_tensor else kept, False
        ctx.number = None if isinstance(inputs.temperature, Tensor) else inputs.temperature
        t = inputs.temperature if isinstance(inputs.temperature, Tensor) else None
        ctx.save_for_backward(
            inputs.hidden,
            weight,
            bias,
            inputs.labels,
            t,
            inputs.counting,
            results.stats,
            kept if is_tensor else None,
        )
        log_probs = results.log_probs.reshape(labels.shape)
        others = [getattr(results, name).reshape(hidden.shape[:-1]) for name in names(wanted)]
        if not others:
            return log_probs
        named = zip(names(wanted), others, strict=True)
        ctx.mark_non_differentiable(*(result for name, result in named if name not in DIFFERENTIABLE))
        return (log_probs, *others)

    @staticmethod
    def backward(ctx: Any, grad_log_probs: Tensor | None, *grad_others: Tensor | None) -> Any:
        refuse_double_backward("log_probs_from_hidden")
        hidden, weight, bias, labels, temperature, counting, stats, kept = ctx.saved_tensors
        problem = ctx.problem
        t = ctx.number if temperature is None else temperature
        inputs = HiddenInputs(
            problem, hidden, weight.detach(), bias, labels, t, ctx.ignore_index, ctx.softcap, counting
        )
        # Without its version, so that a second backward may unpack what this one writes over.
        kept = ctx.kept if kept is None else kept.data
        kept = None if ctx.is_spent else kept  # a first backward has written over it
        kept = kept.data if isinstance(kept, Tensor) else kept  # whose being written over autograd would refuse later
        ctx.kept, ctx.is_spent = None, True
        rows, per_row = problem.rows, problem.labels_per_row
        if grad_log_probs is None:
            grad_log_probs = hidden.new_zeros(rows, per_row, dtype=accumulation_dtype(hidden.dtype))
        given = dict(zip(names(ctx.wanted), grad_others, strict=True)) if grad_others else {}
        of_rows = (given.get(name) for name in DIFFERENTIABLE)
        upstream = Upstream(
            grad_log_probs.reshape(rows, per_row).contiguous(),
            *(None if grad is None else grad.reshape(rows).contiguous() for grad in of_rows),
        )
        needs = Needs(*ctx.needs_input_grad[:3])
        with torch.autocast(hidden.device.type, enabled=False):
            gradients = run_backward(ctx.backend, inputs, stats, kept, upstream, ctx.logits_backend, needs)
        of_hidden = None if gradients.hidden is None else gradients.hidden.view(ctx.shape)
        return of_hidden, gradients.weight, gradients.bias, *[None] * 8
