"""The one autograd.Function: what every backend's forward and backward have in common lives here, once.

* the leading dimensions, merged as far as strides allow, so that backends see few of them;
* what is saved for the backward: the inputs, and statistics of one form, so that any backend can take them;
* the guard of `inplace_backward`: the version counter, the second backward, overlapping memory.

The contract itself is kept by the backends, since each rule would be a launch of its own here.

Shapes: ... leading dimensions, N or ... rows after merging, V vocabulary, K labels a row.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from compiled_logprobs.arguments import has_saved_tensor_hooks
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
    """The formula as it stands, for a user's graph to inline where eager is named."""

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
        labels: [...] or [..., K], int64 or int32: those outside [0, V), unless they are `ignore_index`, make their row
            NaN.
        temperature: a number, or a tensor broadcastable to [...]; values that are not positive and finite make their
            row NaN.
        ignore_index: the label that counts 0.
        wanted: what to return beside the log-probabilities.
        inplace_backward: whether the gradient may be written over `logits`.

    Returns:
        log_probs in the shape of `labels` and, each [...], what is wanted, in its order; in float32 (float64 for
        float64 logits), but argmax int64.
    """
    if isinstance(temperature, Tensor):
        dtype = accumulation_dtype(logits.dtype)
        temperature = temperature.to(dtype).expand(logits.shape[:-1])
    if _needs_no_graph(logits):  # whose making takes as long as a small call
        return in_shape(
            run_forward(backend, logits, labels, temperature, ignore_index, wanted)[1], wanted, logits, labels
        )
    if not torch.compiler.is_compiling() and forward_ad_level() >= 0:
        refuse_forward_mode(logits)
    results: Any = _LogProbs.apply(  # type: ignore[no-untyped-call]  # torch's gap
        logits, labels, temperature, backend, ignore_index, wanted, inplace_backward
    )
    return results if isinstance(results, tuple) else (results,)


def _needs_no_graph(logits: Tensor) -> bool:
    """Whether no derivative can be asked for of this call, so that no autograd.Function has to refuse or compute it."""
    if (logits.requires_grad and torch.is_grad_enabled()) or torch.compiler.is_compiling():
        return False
    return forward_ad_level() < 0  # else the autograd.Function refuses


def forward_ad_level() -> int:
    """How deep this is in forward-mode differentiation: -1 outside of it; 0 also where torch does not tell."""
    return getattr(torch.autograd.forward_ad, "_current_level", 0)


def refuse_forward_mode(tensor: Tensor, function: str = "log_probs_from_logits") -> None:
    """Raise LogProbsError for what has a tangent: a `jvp` of the autograd.Function would be in words, too, but
    torch.compile takes none that has one."""
    dual = torch.autograd.forward_ad.unpack_dual(tensor)  # type: ignore[no-untyped-call]  # torch's gap
    if dual.tangent is not None:
        raise LogProbsError(
            f"forward-mode differentiation (jvp, forward_ad) got to {function}, which has a backward alone. "
            "Use torch.autograd.grad, or torch.log_softmax and gather where you need it."
        )


def run_forward(
    backend: ForwardBackward,
    logits: Tensor,
    labels: Tensor,
    temperature: float | Tensor,
    ignore_index: int,
    wanted: Wanted,
) -> tuple[Inputs | None, Results]:
    """What `backend` was given, and what it returned; no inputs where there are no rows."""
    if logits.numel() == 0:  # V is at least 1
        return None, _empty(logits, labels)
    inputs = merged(logits, labels, temperature, ignore_index)
    return inputs, backend.forward(inputs, wanted)


def merged(logits: Tensor, labels: Tensor, temperature: float | Tensor, ignore_index: int) -> Inputs:
    """The inputs of a backend, whose leading dimensions are merged: what is saved for backward."""
    if torch.compiler.is_compiling():
        x = logits  # merging would look at strides, and put guards on them
    else:
        x = collapse(logits.detach() if logits.requires_grad else logits)  # which shares memory and version counter
    rows = x.shape[:-1]
    y = _reshaped(labels, (*rows, labels.shape[-1] if labels.ndim == logits.ndim else 1))
    t = _reshaped(temperature, rows) if isinstance(temperature, Tensor) else temperature
    return Inputs(x, y, t, ignore_index)


def run_backward(
    backend: ForwardBackward, inputs: Inputs, stats: Tensor, grads: Sequence[Tensor | None], *, inplace: bool
) -> Tensor:
    """The gradient in the merged logits, of those that come from above, if they do, in the order of `Upstream`."""
    shape = inputs.labels.shape
    of_labels, *of_rows = grads
    if of_labels is None:
        of_labels = torch.zeros(shape, dtype=stats.dtype, device=stats.device)
    upstream = (None if grad is None else _reshaped(grad, shape[:-1]) for grad in of_rows)
    return backend.backward(inputs, stats, Upstream(_reshaped(of_labels, shape), *upstream), inplace=inplace)


def refuse_double_backward(function: str = "log_probs_from_logits") -> None:
    """Raise LogProbsError in a backward that is to be differentiated itself."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise LogProbsError(
            f"double backward (create_graph=True) got to {function}, whose gradient is not differentiable itself. "
            "Call backward without create_graph, or use torch.log_softmax and gather where you need it."
        )


def _empty(logits: Tensor, labels: Tensor) -> Results:
    dtype = accumulation_dtype(logits.dtype)
    of_rows = logits.new_empty(logits.shape[:-1], dtype=dtype)
    argmax = logits.new_empty(logits.shape[:-1], dtype=torch.int64)
    stats = logits.new_empty(0)
    return Results(
        logits.new_empty(labels.shape, dtype=dtype), stats, of_rows, of_rows.clone(), argmax, of_rows.clone()
    )


def in_shape(results: Results, wanted: Wanted, logits: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    """The log-probabilities in the shape of the labels, and what is wanted in that of the rows."""
    log_probs = _unmerged(results.log_probs, labels.shape)
    if wanted == PLAIN:
        return (log_probs,)
    return log_probs, *(_unmerged(getattr(results, name), logits.shape[:-1]) for name in names(wanted))


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
        inputs, results = run_forward(backend, logits, labels, temperature, ignore_index, wanted)
        ctx.backend, ctx.inplace, ctx.shape, ctx.spent, ctx.wanted = backend, False, logits.shape, False, wanted
        ctx.empty = (logits.dtype, logits.device) if inputs is None else None
        if inputs is not None:
            x, y, t, _ = inputs
            # Under hooks no version counter guards what others have saved of the logits.
            if inplace_backward and not (torch.compiler.is_compiling() or has_saved_tensor_hooks(otherwise=False)):
                ctx.inplace = x.data_ptr() == logits.data_ptr() and not overlaps(x)
            ctx.number, ctx.ignore_index = None if isinstance(t, Tensor) else t, ignore_index
            ctx.save_for_backward(x, y, t if isinstance(t, Tensor) else None, results.stats)
        log_probs, *others = in_shape(results, wanted, logits, labels)
        if not others:
            return log_probs
        named = zip(names(wanted), others, strict=True)
        ctx.mark_non_differentiable(*(result for name, result in named if name not in DIFFERENTIABLE))
        return (log_probs, *others)

    @staticmethod
    def backward(ctx: Any, grad_log_probs: Tensor | None, *grad_others: Tensor | None) -> Any:
        refuse_double_backward()
        if ctx.spent:
            raise LogProbsError(
                "a second backward through log_probs_from_logits(..., inplace_backward=True): the first one wrote the "
                "gradient over the logits. Set inplace_backward=False where backward runs more than once."
            )
        if ctx.empty is not None:
            dtype, device = ctx.empty
            return torch.zeros(ctx.shape, dtype=dtype, device=device), *[None] * 6

        x, y, temperature, stats = ctx.saved_tensors
        grads: list[Tensor | None] = [grad_log_probs, None, None]
        if grad_others:
            given = dict(zip(names(ctx.wanted), grad_others, strict=True))
            grads[1:] = (given.get(name) for name in DIFFERENTIABLE)  # a graph makes up one for the others, too
        inputs = Inputs(x, y, ctx.number if temperature is None else temperature, ctx.ignore_index)
        run = run_backward
        if torch.compiler.is_compiling() and not isinstance(ctx.backend, PlainFormula):
            # Compiled autograd would trace the calls of kernels.
            run = torch.compiler.disable(run)  # type: ignore[no-untyped-call]  # torch's gap
        gradient = run(ctx.backend, inputs, stats, grads, inplace=ctx.inplace)
        if ctx.inplace:
            ctx.spent = True
            # Kernels write without telling autograd; whoever saved the logits must hear of it.
            torch.autograd.graph.increment_version(x)
        return gradient if gradient.shape == ctx.shape else gradient.view(ctx.shape), *[None] * 6


DIFFERENTIABLE = Upstream._fields[1:]
"""What a gradient can come through, beside the log-probabilities."""


def names(wanted: Wanted) -> list[str]:
    """Of what is wanted, in order."""
    return [name for name, is_wanted in zip(Wanted._fields, wanted, strict=True) if is_wanted]


_VIEW = getattr(torch.ops.aten, "_unsafe_view", torch.ops.aten.view_copy)


def _reshaped(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Contiguous, in `shape`: `tensor` itself where it is so already, since each operation counts in a small call."""
    return (tensor if tensor.shape == shape else tensor.reshape(*shape)).contiguous()


def _unmerged(result: Tensor, shape: torch.Size) -> Tensor:
    """`result` in `shape`, as a tensor that is no view: autograd refuses to have views that were made in here written
    into."""
    if result.shape == shape:
        return result
    if torch.compiler.is_compiling() or not result.is_contiguous():
        copy: Tensor = _VIEW(result.contiguous(), shape)
        return copy
    return result.resize_(shape)  # of the same size, so that nothing moves
