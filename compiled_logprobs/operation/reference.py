"""The contract as a program: slow, obvious, in float64. Every backend is held against this file, and nothing else.

It shares no code with any backend, and its gradient comes from autograd, not from a formula.

Shapes: ... leading dimensions, N rows, V vocabulary, K labels a row; H hidden size.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

CHUNK_ELEMENTS = 2**22


class Reference(NamedTuple):
    """What is true, in float64."""

    log_probs: Tensor
    """[..., K], in nats."""
    entropy: Tensor
    """[...], in nats."""
    logsumexp: Tensor
    """[...], in nats: of logits / temperature."""
    argmax: Tensor
    """[...] int64: the first column that holds the maximum; -1 where a row is ignored, or all else of it NaN."""
    sum_p_squared: Tensor
    """[...]: of all probabilities of the row."""
    gradient: Tensor | None = None
    """[..., V], in the logits: of the sums of grad_log_probs * log_probs, grad_entropy * entropy and grad_logsumexp *
    logsumexp."""


def reference(
    logits: Tensor,
    labels: Tensor,
    temperature: float | Tensor = 1.0,
    *,
    ignore_index: int = -100,
    grad_log_probs: Tensor | None = None,
    grad_entropy: Tensor | None = None,
    grad_logsumexp: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> Reference:
    """All results and the gradient for `labels` [..., K] under softmax(logits [..., V] / temperature).

    Args:
        logits: [..., V], any floating dtype.
        labels: [..., K], integers in [0, V) or `ignore_index`; any other makes its row NaN.
        temperature: a number, or broadcastable to [...]; a value that is not positive and finite in float32 makes its
            row NaN.
        ignore_index: the label that counts 0.
        grad_log_probs: [..., K] upstream gradient; without any of the three no gradient is computed.
        grad_entropy: [...] upstream gradient.
        grad_logsumexp: [...] upstream gradient.
        dtype: to compute in; in float32 it is what plain torch makes of the same input.

    Returns:
        A `Reference` on the device of `logits`.
    """
    rows, vocab, count = logits.shape[:-1], logits.shape[-1], labels.shape[-1]
    given = (grad_log_probs, labels.shape), (grad_entropy, rows), (grad_logsumexp, rows)
    want_gradient = any(grad is not None for grad, _ in given)
    t = torch.as_tensor(temperature, device=logits.device).to(dtype).expand(rows).reshape(-1)
    x_NV, y_NK = logits.detach().reshape(-1, vocab), labels.reshape(-1, count).long()
    upstream = [torch.zeros(shape) if grad is None else grad for grad, shape in given]
    upstream = [grad.to(logits.device, dtype) for grad in upstream]
    g_NK, h_N, i_N = upstream[0].reshape(-1, count), upstream[1].reshape(-1), upstream[2].reshape(-1)

    parts: list[tuple[Tensor | None, ...]] = []
    step = max(1, CHUNK_ELEMENTS // vocab)
    for start in range(0, max(1, len(x_NV)), step):
        n = slice(start, start + step)
        x = x_NV[n].to(dtype).requires_grad_(want_gradient)
        with torch.set_grad_enabled(want_gradient):
            part = _rows(x, y_NK[n], t[n], ignore_index)
        if want_gradient:
            # The log-probabilities always: through them a row that is NaN has NaN for its whole gradient.
            first, *others = zip(part[:3], (g_NK[n], h_N[n], i_N[n]), strict=True)
            asked = [pair for pair, (grad, _) in zip(others, given[1:], strict=True) if grad is not None]
            results, grads = zip(first, *asked, strict=True)
            (gradient,) = torch.autograd.grad(results, [x], grads)
            part = part._replace(gradient=_with_special_rows(gradient, y_NK[n], t[n], ignore_index))
        parts.append(tuple(part))

    def joined(tensors: tuple[Any, ...]) -> Any:
        return None if tensors[0] is None else torch.cat(tensors).detach().reshape((*rows, *tensors[0].shape[1:]))

    return Reference(*map(joined, zip(*parts, strict=True)))


class ReferenceFromHidden(NamedTuple):
    """What is true from hidden states."""

    results: Reference
    """[N, K] and [N], without the gradient in the logits."""
    hidden: Tensor | None = None
    """[N, H]: the gradient in the hidden states; None, as the next two, where no upstream gradient is given."""
    weight: Tensor | None = None
    """[V, H]"""
    bias: Tensor | None = None
    """[V]; None where there is no bias."""


def reference_from_hidden(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    *,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    grad_log_probs: Tensor | None = None,
    grad_entropy: Tensor | None = None,
    grad_logsumexp: Tensor | None = None,
    product_dtype: torch.dtype = torch.float64,
    dtype: torch.dtype = torch.float64,
) -> ReferenceFromHidden:
    """All results and gradients for `labels` [N, K] under the softmax of what an output layer makes of hidden states.

    Args:
        hidden: [N, H]; rows all of whose labels are ignored count 0, whatever they hold.
        weight: [V, H].
        labels: as for `reference`.
        bias: [V].
        temperature: a number, or [N].
        logit_scale: what the logits are multiplied by.
        softcap: what they are softly kept below, after that and before the temperature.
        ignore_index, grad_log_probs, grad_entropy, grad_logsumexp: as for `reference`.
        product_dtype: of products, and so of the gradients.
        dtype: to compute all else in; with that of the arguments before and float32 here, it is what plain torch makes
            of the same input.
    """
    upstream = [grad_log_probs, grad_entropy, grad_logsumexp]
    want_gradients = any(grad is not None for grad in upstream)
    counting = hidden.masked_fill((labels == ignore_index).all(-1, keepdim=True), 0.0)
    given = (None if x is None else x.detach().to(product_dtype) for x in (counting, weight, bias))
    leaves: Any = [None if x is None else x.clone().requires_grad_(want_gradients) for x in given]
    t_N = torch.as_tensor(temperature, device=hidden.device).to(dtype).expand(len(hidden))
    with torch.set_grad_enabled(want_gradients):
        x_NV = leaves[0] @ leaves[1].T
        x_NV = x_NV if bias is None else x_NV + leaves[2]  # which rounds, too: so it is commonly written
        x_NV = x_NV.to(dtype) * logit_scale
        if softcap is not None:
            x_NV = softcap * torch.tanh(x_NV / softcap)
        results = _rows(x_NV, labels.long(), t_N, ignore_index)
    if not want_gradients:
        return ReferenceFromHidden(results)
    outputs = list(results[:3])
    grads = [torch.zeros_like(x) if g is None else g.to(dtype) for x, g in zip(outputs, upstream, strict=True)]
    found = iter(torch.autograd.grad(outputs, [x for x in leaves if x is not None], grads))
    detached = Reference(*(None if x is None else x.detach() for x in results))  # type: ignore[arg-type]
    return ReferenceFromHidden(detached, *(None if x is None else next(found) for x in leaves))


def _rows(x_NV: Tensor, y_NK: Tensor, t_N: Tensor, ignore_index: int) -> Reference:
    ignored_NK, invalid_N = _special(x_NV.shape[-1], y_NK, t_N, ignore_index)
    tempered_NV = x_NV / t_N[:, None]
    log_p_NV = torch.log_softmax(tempered_NV, -1)
    p_NV = log_p_NV.exp()
    log_p_NK = log_p_NV.gather(-1, y_NK.clamp(0, x_NV.shape[-1] - 1))
    # A token of probability 0 counts 0, as p log p does in the limit.
    h_N = -(p_NV * log_p_NV.masked_fill(log_p_NV == -torch.inf, 0.0)).sum(-1)
    # A row that is all -inf, or holds +inf, has no probabilities, though torch gives it a logsumexp.
    invalid_N = invalid_N | log_p_NV.isnan().any(-1)

    def of_rows(result_N: Tensor, ignored: float, invalid: float) -> Tensor:
        return result_N.masked_fill(invalid_N, invalid).masked_fill(ignored_NK.all(-1), ignored)

    return Reference(
        log_p_NK.masked_fill(invalid_N[:, None], torch.nan).masked_fill(ignored_NK, 0.0),
        of_rows(h_N, 0.0, torch.nan),
        of_rows(tempered_NV.logsumexp(-1), 0.0, torch.nan),
        of_rows(x_NV.detach().argmax(-1), -1, -1),
        of_rows(p_NV.detach().square().sum(-1), 0.0, torch.nan),
    )


def _with_special_rows(gradient_NV: Tensor, y_NK: Tensor, t_N: Tensor, ignore_index: int) -> Tensor:
    ignored_NK, invalid_N = _special(gradient_NV.shape[-1], y_NK, t_N, ignore_index)
    gradient_NV = gradient_NV.masked_fill(invalid_N[:, None], torch.nan)
    return gradient_NV.masked_fill(ignored_NK.all(-1, keepdim=True), 0.0)


def _special(vocab: int, y_NK: Tensor, t_N: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Which labels are ignored, [N, K], and which rows are invalid, [N]."""
    ignored_NK = y_NK == ignore_index
    bad_label_NK = ((y_NK < 0) | (y_NK >= vocab)) & ~ignored_NK
    limits = torch.finfo(torch.float32)
    bad_temperature_N = ~((t_N >= limits.tiny) & (t_N <= limits.max))
    return ignored_NK, bad_label_NK.any(-1) | bad_temperature_N
