"""The one autograd.Function: what every backend's forward and backward have in common lives here, once.

* the leading dimensions, merged as far as strides allow, so that backends see few of them;
* what is saved for the backward: the inputs, and statistics of one form, so that any backend can take them;
* the guard of `inplace_backward`: the version counter, the second backward, overlapping memory.

The contract itself is kept by the backends, since each rule would be a launch of its own here.

Shapes: ... leading dimensions, N or ... rows after merging, V vocabulary, K labels a row.
"""

from typing import Any, Protocol

import torch
from torch import Tensor

from compiled_logprobs.errors import LogProbsError
from compiled_logprobs.operation import formula
from compiled_logprobs.operation.contract import Inputs, Results, Upstream, Wanted
from compiled_logprobs.problem import accumulation_dtype, collapse, overlaps

PLAIN = Wanted()
"""Log-probabilities alone."""


class ForwardBackward(Protocol):
    """The pair of functions that `compute` wraps; `compiled_logprobs.backends.base.Backend`, a layer above, documents
    them."""

    def forward(self, inputs: Inputs, wanted: Wanted) -> Results: ...

    def backward(self, inputs: Inputs, stats: Tensor, upstream: Upstream, *, inplace: bool) -> Tensor: ...


class PlainFormula:
    """The formula as it stands, for a user's graph to inline; a graph cannot overwrite its logits."""

    def forward(self, inputs: Inputs, wanted: Wanted) -> Results:
        return formula.forward(inputs, wanted)

    def backward(self, inputs: Inputs, stats: Tensor, upstream: Upstream, *, inplace: bool) -> Tensor:
        gradient, at_labels, labels = formula.backward(inputs, stats, upstream)
        formula.write_label_columns(gradient, labels, at_labels)
        return gradient


def compute(
    backend: ForwardBackward,
    logits: Tensor,
    labels: Tensor,
    temperature: float | Tensor = 1.0,
    *,
    ignore_index: int = -100,
    wanted: Wanted = PLAIN,
    inplace_backward: bool = False,
) -> tuple[Tensor, ...]:
    """Run `backend`, differentiably.

    Args:
        backend: the pair of functions.
        logits: [..., V].
        labels: [..., K], int64 or int32: those outside [0, V), unless they are `ignore_index`, make their row NaN.
        temperature: a number, or a tensor broadcastable to [...]; values that are not positive and finite make their
            row NaN.
        ignore_index: the label that counts 0.
        wanted: what to return beside the log-probabilities.
        inplace_backward: whether the gradient may be written over `logits`.

    Returns:
        log_probs [..., K] and, each [...], what is wanted, in its order; in float32 (float64 for float64 logits), but
        argmax int64.
    """
    if isinstance(temperature, Tensor):
        dtype = accumulation_dtype(logits.dtype)
        temperature = temperature.to(dtype).expand(logits.shape[:-1])
    results: Any = _LogProbs.apply(  # type: ignore[no-untyped-call]  # torch's gap
        logits, labels, temperature, backend, ignore_index, wanted, inplace_backward
    )
    return results if isinstance(results, tuple) else (results,)


class _LogProbs(torch.autograd.Function):
    """Shapes inside: logits [..., V] merged to few leading dimensions, everything else to the same ones."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        temperature: float | Tensor,
        backend: ForwardBackward,
        ignore_index: int,
        wanted: Wanted,
        inplace_backward: bool,
    ) -> Tensor | tuple[Tensor, ...]:  # no None among several: torch 2.6 cannot trace that
        ctx.set_materialize_grads(False)
        ctx.backend, ctx.inplace, ctx.shape, ctx.spent, ctx.wanted = backend, False, logits.shape, False, wanted
        rows = logits.shape[:-1]
        if logits.numel() == 0:  # V is at least 1, so there are no rows
            ctx.empty = logits.dtype, logits.device
            dtype = accumulation_dtype(logits.dtype)
            results = Results(
                logits.new_empty(labels.shape, dtype=dtype),
                logits.new_empty(0),
                *(logits.new_empty(rows, dtype=dtype) for _ in wanted),
            )
            results = results._replace(argmax=logits.new_empty(rows, dtype=torch.int64))
        else:
            ctx.empty = None
            if torch.compiler.is_compiling():
                x = logits  # merging would look at strides, and put guards on them
            else:
                x = collapse(logits.detach())  # which shares memory and version counter
                ctx.inplace = inplace_backward and x.data_ptr() == logits.data_ptr() and not overlaps(x)
            merged = x.shape[:-1]
            y = labels.reshape(*merged, labels.shape[-1]).contiguous()
            t = temperature.reshape(merged).contiguous() if isinstance(temperature, Tensor) else temperature
            results = backend.forward(Inputs(x, y, t, ignore_index), wanted)
            ctx.number, ctx.ignore_index = None if isinstance(t, Tensor) else t, ignore_index
            ctx.save_for_backward(x, y, t if isinstance(t, Tensor) else None, results.stats)
        log_probs = _unmerged(results.log_probs, labels.shape)
        others = {name: _unmerged(getattr(results, name), rows) for name in _names(wanted)}
        if not others:
            return log_probs
        ctx.mark_non_differentiable(*(result for name, result in others.items() if name not in _DIFFERENTIABLE))
        return (log_probs, *others.values())

    @staticmethod
    def backward(ctx: Any, grad_log_probs: Tensor | None, *grad_others: Tensor | None) -> Any:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise LogProbsError(
                "double backward (create_graph=True) got to log_probs_from_logits, whose gradient is not "
                "differentiable itself. Call backward without create_graph, or use torch.log_softmax and gather where "
                "you need it."
            )
        if ctx.spent:
            raise LogProbsError(
                "a second backward through log_probs_from_logits(..., inplace_backward=True): the first one wrote the "
                "gradient over the logits. Set inplace_backward=False where backward runs more than once."
            )
        if ctx.empty is not None:
            dtype, device = ctx.empty
            return torch.zeros(ctx.shape, dtype=dtype, device=device), *[None] * 6

        x, y, temperature, stats = ctx.saved_tensors
        if grad_log_probs is None:
            grad_log_probs = torch.zeros(y.shape, dtype=stats.dtype, device=x.device)
        of_rows = dict(zip(_names(ctx.wanted), grad_others, strict=True))
        upstream = Upstream(
            grad_log_probs.reshape(y.shape).contiguous(),
            *(
                None if (grad := of_rows.get(name)) is None else grad.reshape(y.shape[:-1]).contiguous()
                for name in _DIFFERENTIABLE
            ),
        )
        inputs = Inputs(x, y, ctx.number if temperature is None else temperature, ctx.ignore_index)
        gradient = ctx.backend.backward(inputs, stats, upstream, inplace=ctx.inplace)
        if ctx.inplace:
            ctx.spent = True
            # Kernels write without telling autograd; whoever saved the logits must hear of it.
            torch.autograd.graph.increment_version(x)
        return gradient.view(ctx.shape), *[None] * 6


_DIFFERENTIABLE = Upstream._fields[1:]


def _names(wanted: Wanted) -> list[str]:
    return [name for name, is_wanted in zip(Wanted._fields, wanted, strict=True) if is_wanted]


_VIEW = getattr(torch.ops.aten, "_unsafe_view", torch.ops.aten.view_copy)


def _unmerged(result: Tensor, shape: torch.Size) -> Tensor:
    """`result` in `shape`, as a tensor that is no view: autograd refuses to have views that were made in here written
    into."""
    return result if result.shape == shape else _VIEW(result, shape)
