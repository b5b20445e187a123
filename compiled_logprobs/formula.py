"""The operation in plain torch: what `compiled` compiles and what a user's own graph inlines.

Shapes: ... leading dimensions (rows), V vocabulary, K labels a row.

With T the temperature, m the row maximum and d = (x - m) / T <= 0:

    log s      = log sum_v exp(d_v)                       s >= 1, since the maximum contributes exp(0)
    log p_y    = d_y - log s
    entropy    = log s - sum_v exp(d_v) d_v / s           a sum of terms that are all >= 0
    dx         = (g_y - p (sum_k g_k + h (log p + entropy))) / T

where g is the upstream gradient of the log-probabilities, g_y its part at the label, and h that of the entropy. Nothing
cancels: m and log s stay apart, because their sum would round a log-sum-exp of 1e4 to 1e-3, and the
subtraction comes before the division, so that a shift of the whole row costs nothing.
"""

import torch
from torch import Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 for float64 logits."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def per_row(temperature: float | Tensor) -> float | Tensor:
    """The temperature in a shape that divides [..., V]."""
    return temperature.unsqueeze(-1) if isinstance(temperature, Tensor) and temperature.ndim else temperature


def finite(log_p: Tensor) -> Tensor:
    """Bounded from below, so that a probability of 0 times its logarithm counts 0 and not NaN.

    The bound changes no product: exp(-1000) is 0 in float64 already.
    """
    return log_p.clamp(min=-1000.0)


def forward(
    logits: Tensor, labels: Tensor, temperature: float | Tensor, *, entropy: bool
) -> tuple[Tensor, Tensor | None, tuple[Tensor, ...]]:
    """Log-probabilities, entropy, and the row statistics that the backward needs.

    Args:
        logits: [..., V].
        labels: [..., K] int64 in [0, V).
        temperature: a number, or a tensor [] or [...] in the accumulation dtype.
        entropy: whether to compute the entropy.

    Returns:
        log_probs [..., K]; entropy [...] or None; (m [..., 1], log s [..., 1] and, if computed, entropy [..., 1]);
        all in the accumulation dtype.
    """
    x = logits.to(accumulation_dtype(logits.dtype))
    t = per_row(temperature)
    # An amax that keeps its dimension, a subtraction, an exp and a sum are what Inductor fuses into one online-softmax read.
    m = x.amax(-1, keepdim=True)
    d = (x - m) * (1.0 / t)
    e = d.exp()
    s = e.sum(-1, keepdim=True)
    log_s = s.log()
    log_probs = (logits.gather(-1, labels).to(x.dtype) - m) / t - log_s
    if not entropy:
        return log_probs, None, (m, log_s)
    h = log_s - (e * finite(d)).sum(-1, keepdim=True) / s
    return log_probs, h.squeeze(-1), (m, log_s, h)


def backward(
    logits: Tensor,
    labels: Tensor,
    temperature: float | Tensor,
    residuals: tuple[Tensor, ...],
    ignored: Tensor,
    grad_log_probs: Tensor,
    grad_entropy: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The gradient in the logits: one pointwise pass that leaves the labels out, and the values at the labels.

    Args:
        logits, labels, temperature: as in `forward`.
        residuals: what `forward` returned; with the entropy where `grad_entropy` is given.
        ignored: [...] bool, rows whose gradient is exactly 0 whatever they hold.
        grad_log_probs: [..., K].
        grad_entropy: [...] or None.

    Returns:
        gradient [..., V] in the dtype of `logits`, right everywhere but in the label columns; and
        the gradient at the label columns, [..., K], in the same dtype, for `write_label_columns`.
    """
    m, log_s = residuals[:2]
    t = per_row(temperature)
    inverse_t = 1.0 / t
    total = grad_log_probs.sum(-1, keepdim=True)
    drop = ignored.unsqueeze(-1)

    def without_label_term(columns: Tensor) -> Tensor:
        log_p = (columns.to(m.dtype) - m) * inverse_t - log_s
        weight = total
        if grad_entropy is not None:
            weight = total + grad_entropy.unsqueeze(-1) * (finite(log_p) + residuals[2])
        return -(log_p.exp() * weight) * inverse_t

    gradient = without_label_term(logits).masked_fill(drop, 0.0).to(logits.dtype)
    # A repeated label writes the whole sum each time, so that the order of the writes does not matter.
    same_label = labels.unsqueeze(-1) == labels.unsqueeze(-2)
    label_term = grad_log_probs.unsqueeze(-2).expand_as(same_label).masked_fill(~same_label, 0.0).sum(-1) * inverse_t
    at_labels = without_label_term(logits.gather(-1, labels)) + label_term
    return gradient, at_labels.masked_fill(drop, 0.0).to(logits.dtype)


def write_label_columns(gradient: Tensor, labels: Tensor, at_labels: Tensor) -> None:
    """Write `at_labels` [..., K] into the columns `labels` [..., K] of `gradient` [..., V], in place."""
    # Indexed assignment: scatter_ walks the whole row of a bfloat16 tensor on CPU, some 500 times slower.
    rows = torch.meshgrid(*(torch.arange(n, device=labels.device) for n in labels.shape[:-1]), indexing="ij")
    gradient[(*(r.unsqueeze(-1) for r in rows), labels)] = at_labels
