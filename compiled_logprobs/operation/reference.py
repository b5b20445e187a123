"""The contract as a program: slow, obvious, in float64. Every backend is held against this file, and nothing else.

It shares no code with any backend, and its gradient comes from autograd, not from a formula.

Shapes: ... leading dimensions, N rows, V vocabulary, K labels a row.
"""

from typing import NamedTuple

import torch
from torch import Tensor

CHUNK_ELEMENTS = 2**22


class Reference(NamedTuple):
    """What is true, in float64."""

    log_probs: Tensor
    """[..., K], in nats."""
    entropy: Tensor
    """[...], in nats."""
    gradient: Tensor | None
    """[..., V], of sum(grad_log_probs * log_probs) + sum(grad_entropy * entropy) in the logits."""


def reference(
    logits: Tensor,
    labels: Tensor,
    temperature: float | Tensor = 1.0,
    *,
    ignore_index: int = -100,
    grad_log_probs: Tensor | None = None,
    grad_entropy: Tensor | None = None,
) -> Reference:
    """Log-probabilities, entropy and gradient of `labels` [..., K] under softmax(logits [..., V] / temperature).

    Args:
        logits: [..., V], any floating dtype.
        labels: [..., K], integers in [0, V) or `ignore_index`; any other makes its row NaN.
        temperature: a number, or broadcastable to [...]; a value that is not positive and finite in float32 makes its
            row NaN.
        ignore_index: the label that counts 0.
        grad_log_probs: [..., K] upstream gradient; without it and `grad_entropy` no gradient is computed.
        grad_entropy: [...] upstream gradient.

    Returns:
        A `Reference` on the device of `logits`.
    """
    rows, vocab, count = logits.shape[:-1], logits.shape[-1], labels.shape[-1]
    want_gradient = grad_log_probs is not None or grad_entropy is not None
    t = torch.as_tensor(temperature, device=logits.device).double().expand(rows).reshape(-1)
    g = torch.zeros(labels.shape) if grad_log_probs is None else grad_log_probs
    h = torch.zeros(rows) if grad_entropy is None else grad_entropy
    x_NV, y_NK = logits.detach().reshape(-1, vocab), labels.reshape(-1, count).long()
    g_NK = g.to(logits.device).double().reshape(-1, count)
    h_N = h.to(logits.device).double().reshape(-1)

    log_probs, entropies, gradients = [], [], []
    step = max(1, CHUNK_ELEMENTS // vocab)
    for start in range(0, len(x_NV), step):
        n = slice(start, start + step)
        x = x_NV[n].double().requires_grad_(want_gradient)
        with torch.set_grad_enabled(want_gradient):
            log_p, h_row = _rows(x, y_NK[n], t[n], ignore_index)
        if want_gradient:
            (gradient,) = torch.autograd.grad([log_p, h_row], [x], [g_NK[n], h_N[n]])
            gradients.append(_with_special_rows(gradient, y_NK[n], t[n], ignore_index))
        log_probs.append(log_p.detach())
        entropies.append(h_row.detach())

    def join(parts: list[Tensor], shape: tuple[int, ...]) -> Tensor:
        return torch.cat(parts).view(shape) if parts else x_NV.new_empty(shape, dtype=torch.float64)

    return Reference(
        join(log_probs, labels.shape),
        join(entropies, rows),
        join(gradients, logits.shape) if want_gradient else None,
    )


def _rows(x_NV: Tensor, y_NK: Tensor, t_N: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    ignored_NK, invalid_N = _special(x_NV.shape[-1], y_NK, t_N, ignore_index)
    log_p_NV = torch.log_softmax(x_NV / t_N[:, None], -1)
    log_p_NK = log_p_NV.gather(-1, y_NK.clamp(0, x_NV.shape[-1] - 1))
    # A token of probability 0 counts 0, as p log p does in the limit.
    h_N = -(log_p_NV.exp() * log_p_NV.masked_fill(log_p_NV == -torch.inf, 0.0)).sum(-1)
    log_p_NK = log_p_NK.masked_fill(invalid_N[:, None], torch.nan).masked_fill(ignored_NK, 0.0)
    h_N = h_N.masked_fill(invalid_N, torch.nan).masked_fill(ignored_NK.all(-1), 0.0)
    return log_p_NK, h_N


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
