"""The one autograd.Function: what every backend's forward and backward have in common lives here, once.

* the sign: a log-probability is never above 0, an entropy never below, however a backend rounds; NaN passes through;
* ignored labels (result 0, gradient 0) and invalid rows (a label outside [0, V) or a bad temperature: NaN);
* the leading dimensions, merged as far as strides allow, so that backends see few of them;
* the guard of `inplace_backward`: the version counter, the second backward, overlapping memory.

Shapes: ... leading dimensions, N or ... rows after merging, V vocabulary, K labels a row.
"""

from typing import Any, Protocol

import torch
from torch import Tensor

from compiled_logprobs.errors import LogProbsError
from compiled_logprobs.operation import formula
from compiled_logprobs.operation.formula import Computed, Saved, Upstream
from compiled_logprobs.problem import accumulation_dtype, collapse, overlaps


class ForwardBackward(Protocol):
    """The pair of functions that `compute` wraps; `compiled_logprobs.backends.base.Backend`, a layer above, documents
    them."""

    def forward(self, logits: Tensor, labels: Tensor, temperature: float | Tensor, *, entropy: bool) -> Computed: ...

    def backward(self, saved: Saved, upstream: Upstream, *, inplace: bool) -> Tensor: ...


class PlainFormula:
    """The formula as it stands, for a user's graph to inline; a graph cannot overwrite its logits."""

    def forward(self, logits: Tensor, labels: Tensor, temperature: float | Tensor, *, entropy: bool) -> Computed:
        return formula.forward(logits, labels, temperature, entropy=entropy)

    def backward(self, saved: Saved, upstream: Upstream, *, inplace: bool) -> Tensor:
        gradient, at_labels = formula.backward(saved, upstream)
        formula.write_label_columns(gradient, saved.labels, at_labels)
        return gradient


def compute(
    backend: ForwardBackward,
    logits: Tensor,
    labels: Tensor,
    temperature: float | Tensor = 1.0,
    *,
    ignore_index: int = -100,
    entropy: bool = False,
    inplace_backward: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Run `backend`, differentiably, under the whole contract.

    Args:
        backend: the pair of functions.
        logits: [..., V].
        labels: [..., K], any integers: those outside [0, V), unless they are `ignore_index`, make their row NaN.
        temperature: a number, or a tensor broadcastable to [...]; values that are not positive and finite make their
            row NaN.
        ignore_index: the label that counts 0.
        entropy: whether to return the entropy.
        inplace_backward: whether the gradient may be written over `logits`.

    Returns:
        log_probs [..., K] and entropy [...] or None, in float32 (float64 for float64 logits).
    """
    if isinstance(temperature, Tensor):
        dtype = accumulation_dtype(logits.dtype)
        temperature = temperature.to(dtype).expand(logits.shape[:-1])
    results: Any = _LogProbs.apply(  # type: ignore[no-untyped-call]  # torch's gap
        logits, labels, temperature, backend, ignore_index, entropy, inplace_backward
    )
    return results if entropy else (results, None)


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
        entropy: bool,
        inplace_backward: bool,
    ) -> Tensor | tuple[Tensor, Tensor]:  # no None among several: torch 2.6 cannot trace that
        ctx.set_materialize_grads(False)
        ctx.backend, ctx.inplace, ctx.shape, ctx.spent = backend, False, logits.shape, False
        if logits.numel() == 0:  # V is at least 1, so there are no rows
            ctx.empty = logits.dtype, logits.device
            dtype = accumulation_dtype(logits.dtype)
            log_probs = logits.new_empty(labels.shape, dtype=dtype)
            return (log_probs, logits.new_empty(logits.shape[:-1], dtype=dtype)) if entropy else log_probs
        ctx.empty = None
        if torch.compiler.is_compiling():
            x = logits  # merging would look at strides, and put guards on them
        else:
            x = collapse(logits.detach())  # which shares memory and version counter
            ctx.inplace = inplace_backward and x.data_ptr() == logits.data_ptr() and not overlaps(x)
        rows, vocab = x.shape[:-1], x.shape[-1]
        y = labels.reshape(*rows, labels.shape[-1]).to(torch.int64).contiguous()
        t = temperature.reshape(rows).contiguous() if isinstance(temperature, Tensor) else temperature

        ignored = y == ignore_index
        in_range = y.clamp(0, vocab - 1)
        invalid = ((in_range != y) & ~ignored).any(-1)
        if isinstance(t, Tensor):
            usable = (t >= torch.finfo(t.dtype).tiny) & (t <= torch.finfo(t.dtype).max)
            invalid = invalid | ~usable
            t = t.masked_fill(~usable, 1.0)

        log_probs, entropies, residuals = backend.forward(x, in_range, t, entropy=entropy)

        all_ignored = ignored.all(-1)
        log_probs = log_probs.clamp(max=0.0).masked_fill(invalid.unsqueeze(-1), torch.nan)
        # The last step makes a tensor that is no view: autograd refuses to have views that were made in here written
        # into.
        log_probs = log_probs.view(labels.shape).masked_fill(ignored.view(labels.shape), 0.0)
        if entropies is not None:
            entropies = entropies.clamp(min=0.0).masked_fill(invalid, torch.nan)
            entropies = entropies.view(ctx.shape[:-1]).masked_fill(all_ignored.view(ctx.shape[:-1]), 0.0)

        ctx.temperature = None if isinstance(t, Tensor) else t
        ctx.save_for_backward(x, in_range, ignored, invalid, t if isinstance(t, Tensor) else None, *residuals)
        return log_probs if entropies is None else (log_probs, entropies)

    @staticmethod
    def backward(ctx: Any, grad_log_probs: Tensor | None, grad_entropy: Tensor | None = None) -> Any:
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

        x, labels, ignored, invalid, temperature, *residuals = ctx.saved_tensors
        dtype = accumulation_dtype(x.dtype)
        if grad_log_probs is None:
            grad_log_probs = torch.zeros(labels.shape, dtype=dtype, device=x.device)
        grad_log_probs = grad_log_probs.reshape(labels.shape).contiguous().masked_fill(ignored, 0.0)
        grad_log_probs = grad_log_probs.masked_fill(invalid.unsqueeze(-1), torch.nan)
        if grad_entropy is not None:
            grad_entropy = grad_entropy.reshape(invalid.shape).contiguous().masked_fill(invalid, torch.nan)
        t = ctx.temperature if temperature is None else temperature
        saved = Saved(x, labels, t, tuple(residuals), ignored.all(-1))
        gradient = ctx.backend.backward(saved, Upstream(grad_log_probs, grad_entropy), inplace=ctx.inplace)
        if ctx.inplace:
            ctx.spent = True
            # Kernels write without telling autograd; whoever saved the logits must hear of it.
            torch.autograd.graph.increment_version(x)
        return gradient.view(ctx.shape), *[None] * 6
