"""The public functions: check the arguments, choose a backend, call it."""

import numbers
import warnings
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from compiled_logprobs import decisions
from compiled_logprobs.autograd import ForwardBackward, PlainFormula, compute
from compiled_logprobs.backends import backends, get_backend, require_backend, why_not
from compiled_logprobs.backends.base import Backend
from compiled_logprobs.errors import BackendUnavailable, InputError, nothing_can_serve_after
from compiled_logprobs.formula import accumulation_dtype
from compiled_logprobs.problem import (
    DTYPES,
    Layout,
    Problem,
    Temperature,
    collapse,
    layout_of,
    short_name,
)
from compiled_logprobs.tuning import tuner

_PLAIN = PlainFormula()
_FLOAT32 = torch.finfo(torch.float32)


class LogProbs(NamedTuple):
    """What `log_probs_from_logits(..., return_entropy=True)` returns."""

    log_probs: Tensor
    """[...] or [..., K], in nats, never positive."""
    entropy: Tensor
    """[...], in nats, never negative."""


def log_probs_from_logits(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    ignore_index: int = -100,
    return_entropy: bool = False,
    masked_logits: bool = False,
    inplace_backward: bool = False,
    out_dtype: torch.dtype | None = torch.float32,
    backend: str = "auto",
) -> Tensor | LogProbs:
    """Log-probability of each label under softmax(logits / temperature).

    With x = logits / temperature:  out[...] = x[..., label] - logsumexp(x[..., :]), accumulated in float32.

    Args:
        logits: [..., V] unnormalised scores; float32, bfloat16 or float16 (float64 through eager). Not modified, and not
            copied as long as the last stride is 1: slices such as `logits[:, :-1]` are taken as they are.
        labels: [...] or [..., K], int64 or int32, in [0, V) or `ignore_index`, on the device of `logits`.
        temperature: dimensionless, > 0; a number, or a tensor broadcastable to [...] (one a token) that needs no gradient.
        ignore_index: a label that counts 0: result 0, gradient 0 (entropy 0 too where all K labels of a row are ignored).
        return_entropy: also return the entropy of each row, from the same pass.
        masked_logits: whole regions of the vocabulary are -inf, as top-k and top-p filtering leave them.
        inplace_backward: write the gradient over `logits`, which saves its memory. Nothing else may need their values by
            then: whoever saved them for its own backward gets autograd's error (a second slice of the same tensor too), but
            a plain read afterwards finds the gradient and cannot be detected. Not for leaf tensors. Where memory overlaps
            (an expanded tensor), where the last stride is not 1, and inside torch.compile the gradient gets memory of its
            own.
        out_dtype: dtype of the results; None is the dtype of `logits`.
        backend: "auto", or the name of one of `backends()`, which then runs or raises. Inside torch.compile,
            torch.export and under a fake-tensor mode the plain formula runs, whatever is named, for the compiler to fuse.
            Under other dispatch modes (such as a counter of operations) "auto" is eager.

    Returns:
        [...] (or [..., K]) log-probabilities in nats, never positive, differentiable in `logits` once; with
        `return_entropy` a `LogProbs`, whose entropy [...] is never negative and differentiable too. Rows that are all -inf,
        or hold NaN or +inf, are NaN. On an accelerator, and while tracing, no value is looked at: a label outside
        [0, V) or a temperature that is not > 0 makes its row NaN.

    Raises:
        InputError: shapes, dtypes, devices, labels or temperature do not fit together.
        BackendUnavailable: the named backend is unknown or cannot run this problem.
    """
    _check_logits(logits)
    _check_labels(logits, labels, ignore_index)
    temperature = _checked_temperature(logits, temperature)
    out_dtype = _checked_out_dtype(logits, out_dtype)
    if inplace_backward and not _is_traced(logits):
        _check_not_leaf(logits)
    many = labels.ndim == logits.ndim
    log_probs, entropy = _run(
        logits,
        labels if many else labels.unsqueeze(-1),
        temperature,
        ignore_index=int(ignore_index),
        entropy=return_entropy,
        masked_logits=masked_logits,
        inplace_backward=inplace_backward,
        out_dtype=out_dtype,
        name=backend,
    )
    log_probs = (log_probs if many else log_probs.squeeze(-1)).to(out_dtype)
    return log_probs if entropy is None else LogProbs(log_probs, entropy.to(out_dtype))


def cross_entropy_from_logits(
    logits: Tensor,
    labels: Tensor,
    *,
    reduction: Literal["mean", "sum", "none"] = "mean",
    temperature: float | Tensor = 1.0,
    ignore_index: int = -100,
    masked_logits: bool = False,
    inplace_backward: bool = False,
    out_dtype: torch.dtype | None = torch.float32,
    backend: str = "auto",
) -> Tensor:
    """Cross entropy of each label: minus `log_probs_from_logits`, whose arguments and errors it shares.

    Args:
        reduction: "none" returns [...] (or [..., K]); "sum" and "mean" a scalar. The mean is over the labels that are not
            ignored, and NaN where all are, as in torch.nn.functional.cross_entropy.

    Returns:
        Nats, never negative.
    """
    if reduction not in ("mean", "sum", "none"):
        raise InputError(f"got reduction={reduction!r}; 'mean', 'sum' or 'none' is valid.")
    log_probs = log_probs_from_logits(
        logits,
        labels,
        temperature=temperature,
        ignore_index=ignore_index,
        masked_logits=masked_logits,
        inplace_backward=inplace_backward,
        out_dtype=out_dtype if reduction == "none" else None if logits.dtype == torch.float64 else torch.float32,
        backend=backend,
    )
    losses = 0.0 - cast(Tensor, log_probs)  # not a negation, which would turn the 0 of an ignored label into -0
    if reduction == "none":
        return losses
    total = losses.sum()
    if reduction == "mean":
        total = total / (labels != ignore_index).sum()
    return total.to(logits.dtype if out_dtype is None else out_dtype)


def entropy_from_logits(
    logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    masked_logits: bool = False,
    inplace_backward: bool = False,
    out_dtype: torch.dtype | None = torch.float32,
    backend: str = "auto",
) -> Tensor:
    """Entropy of softmax(logits / temperature): [...] nats, never negative, differentiable in `logits`.

    Arguments and errors are those of `log_probs_from_logits`. A token of probability 0 counts 0.
    """
    _check_logits(logits)
    _, entropy = cast(
        LogProbs,
        log_probs_from_logits(
            logits,
            torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device),
            temperature=temperature,
            return_entropy=True,
            masked_logits=masked_logits,
            inplace_backward=inplace_backward,
            out_dtype=out_dtype,
            backend=backend,
        ),
    )
    return entropy


def _run(
    logits: Tensor,
    labels: Tensor,
    temperature: float | Tensor,
    *,
    ignore_index: int,
    entropy: bool,
    masked_logits: bool,
    inplace_backward: bool,
    out_dtype: torch.dtype,
    name: str,
) -> tuple[Tensor, Tensor | None]:
    """Choose a backend for `labels` [..., K] and call it."""
    if name != "auto" and (not isinstance(name, str) or name not in backends()):
        get_backend(name)  # raises
    if _is_traced(logits):
        return compute(_PLAIN, logits, labels, temperature, ignore_index=ignore_index, entropy=entropy)
    problem = problem_of(logits, labels, temperature, entropy, masked_logits, inplace_backward, out_dtype)
    backend: ForwardBackward = _chosen_automatically(problem, logits) if name == "auto" else _named(name, problem)
    return compute(
        backend,
        logits,
        labels,
        temperature,
        ignore_index=ignore_index,
        entropy=entropy,
        inplace_backward=inplace_backward,
    )


def _named(name: str, problem: Problem) -> Backend:
    backend = require_backend(name, problem)
    if _is_capturing(problem) and not backend.is_warm(problem):
        raise BackendUnavailable(
            f"backend {name!r} has not run {problem} yet, and cannot compile while a CUDA graph is captured. "
            "Call the function once before the capture, as torch.cuda.graphs asks of every function."
        )
    return backend


def _chosen_automatically(problem: Problem, logits: Tensor) -> ForwardBackward:
    eager = get_backend(decisions.EAGER)
    if problem.rows == 0 or _is_observed(logits):
        return eager
    if _is_capturing(problem):
        known = decisions.lookup(problem)
        backend = eager if known is None else get_backend(known)
        return backend if backend.is_warm(problem) else eager
    name = tuner.serve(problem, logits.device)
    if name == decisions.EAGER or why_not(name, problem) is not None:
        return eager
    return _WithFallback(name, problem)


class _WithFallback:
    """A backend that was chosen automatically: should it raise, eager serves the call, and it is not chosen again."""

    def __init__(self, name: str, problem: Problem) -> None:
        self._name, self._problem = name, problem
        self._backend = get_backend(name)

    def forward(
        self, logits: Tensor, labels: Tensor, temperature: float | Tensor, *, entropy: bool
    ) -> tuple[Tensor, Tensor | None, tuple[Tensor, ...]]:
        try:
            return self._backend.forward(logits, labels, temperature, entropy=entropy)
        except Exception as error:
            if nothing_can_serve_after(error):
                raise
            decisions.set_aside(self._name, self._problem)
            warnings.warn(
                f"backend {self._name!r} failed on {self._problem} and is set aside for such problems in this process: "
                f"{error}\neager serves the call. To see the whole error, name the backend.",
                RuntimeWarning,
                stacklevel=2,
            )
        self._backend = get_backend(decisions.EAGER)
        return self._backend.forward(logits, labels, temperature, entropy=entropy)

    def backward(
        self,
        logits: Tensor,
        labels: Tensor,
        temperature: float | Tensor,
        residuals: tuple[Tensor, ...],
        ignored: Tensor,
        grad_log_probs: Tensor,
        grad_entropy: Tensor | None,
        *,
        inplace: bool,
    ) -> Tensor:
        return self._backend.backward(
            logits, labels, temperature, residuals, ignored, grad_log_probs, grad_entropy, inplace=inplace
        )


def problem_of(
    logits: Tensor,
    labels: Tensor,
    temperature: float | Tensor,
    entropy: bool = False,
    masked_logits: bool = False,
    inplace_backward: bool = False,
    out_dtype: torch.dtype = torch.float32,
) -> Problem:
    """The problem that a call with `labels` [..., K] poses."""
    vocab = logits.shape[-1]
    copied = logits.stride(-1) != 1 and vocab > 1
    layout: Layout = "flat"
    aligned = True
    if not copied and logits.numel() > 0:
        layout, aligned = layout_of(collapse(logits.detach()))
    kind: Temperature = "per_token" if isinstance(temperature, Tensor) else "none" if temperature == 1.0 else "number"
    needs_grad = logits.requires_grad and torch.is_grad_enabled()
    return Problem(
        logits.device.type,
        logits.numel() // vocab,
        vocab,
        logits.dtype,
        out_dtype,
        labels.shape[-1],
        needs_grad,
        entropy,
        kind,
        masked_logits,
        inplace_backward and needs_grad,
        layout,
        aligned,
    )


def _is_traced(logits: Tensor) -> bool:
    """Whether a compiler, an exporter or a fake mode records the operations, so that values may not exist."""
    return (
        torch.compiler.is_compiling()
        or logits.is_meta
        or isinstance(logits, FakeTensor | FunctionalTensor)
        or any(mode.is_infra_mode() for mode in _get_current_dispatch_mode_stack())
    )


def _is_observed(logits: Tensor) -> bool:
    """Whether something else than torch itself sees each operation: a profiler of operations, or a tensor subclass."""
    return bool(_get_current_dispatch_mode_stack()) or type(logits) not in (Tensor, torch.nn.Parameter)


def _is_capturing(problem: Problem) -> bool:
    return problem.device_type == "cuda" and torch.cuda.is_current_stream_capturing()


def _check_logits(logits: Tensor) -> None:
    if not isinstance(logits, Tensor):
        raise InputError(f"got logits of type {type(logits).__name__}; a torch.Tensor [..., V] is valid.")
    if hasattr(logits, "full_tensor"):
        raise InputError(
            "got logits that are a DTensor; a plain tensor is valid. "
            "Pass logits.full_tensor(), or logits.to_local() where the vocabulary is not sharded."
        )
    if not torch.compiler.is_compiling() and torch._C._functorch.is_functorch_wrapped_tensor(logits):
        raise InputError(
            "got logits inside torch.func.grad, vmap or another of its transforms; plain tensors are valid. "
            "Use torch.autograd.grad, or torch.log_softmax and gather."
        )
    if logits.layout is not torch.strided:
        raise InputError(f"got logits of layout {logits.layout}; torch.strided is valid. Use logits.to_dense().")
    if logits.dtype not in DTYPES:
        raise InputError(
            f"got logits of dtype {short_name(logits.dtype)}; {', '.join(map(short_name, DTYPES))} are valid. "
            "Convert them, e.g. logits.float()."
        )
    if logits.ndim == 0 or logits.shape[-1] == 0:
        raise InputError(
            f"got logits of shape {list(logits.shape)}; [..., V] with a vocabulary V of at least 1 is valid. "
            "The last dimension is the vocabulary."
        )


def _check_labels(logits: Tensor, labels: Tensor, ignore_index: int) -> None:
    if not isinstance(labels, Tensor):
        raise InputError(f"got labels of type {type(labels).__name__}; a torch.Tensor of integers is valid.")
    if hasattr(labels, "full_tensor"):
        raise InputError("got labels that are a DTensor; a plain tensor is valid. Pass labels.full_tensor().")
    if labels.dtype not in (torch.int64, torch.int32):
        raise InputError(
            f"got labels of dtype {short_name(labels.dtype)}; int64 and int32 are valid. Use labels.long()."
        )
    rows = logits.shape[:-1]
    if labels.shape != rows and not (labels.ndim == logits.ndim and labels.shape[:-1] == rows and labels.shape[-1] > 0):
        shape = ", ".join(map(str, rows))
        raise InputError(
            f"got labels of shape {list(labels.shape)} for logits of shape {list(logits.shape)}; [{shape}] and "
            f"[{f'{shape}, ' if shape else ''}K] are valid. Shift or slice one of them so that the leading dimensions agree."
        )
    if labels.device != logits.device:
        raise InputError(
            f"got labels on {labels.device} and logits on {logits.device}; one device is valid. "
            f"Use labels.to({str(logits.device)!r})."
        )
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int) or not -(2**63) <= ignore_index < 2**63:
        raise InputError(f"got ignore_index={ignore_index!r}; an integer of 64 bits is valid, e.g. -100.")
    if logits.device.type == "cpu" and not _is_traced(logits):
        vocab = logits.shape[-1]
        bad = ((labels < 0) | (labels >= vocab)) & (labels != ignore_index)
        if bad.any():
            first = bad.nonzero()[0].tolist()
            raise InputError(
                f"got {_position('labels', first)} = {labels[tuple(first)].item()}; 0 to {vocab - 1} "
                f"(the vocabulary has {vocab}) and ignore_index={ignore_index} are valid. "
                "Correct it, or mark positions that do not count with ignore_index."
            )


def _position(name: str, index: list[int]) -> str:
    return f"{name}[{', '.join(map(str, index))}]" if index else name


def _checked_temperature(logits: Tensor, temperature: float | Tensor) -> float | Tensor:
    if isinstance(temperature, Tensor):
        return _checked_temperature_tensor(logits, temperature)
    if torch.compiler.is_compiling() and isinstance(temperature, int | float) and not isinstance(temperature, bool):
        # As a tensor, which makes its rows NaN if it is not positive. A product: torch.full would be compiled for each value.
        return torch.ones((), dtype=accumulation_dtype(logits.dtype), device=logits.device) * temperature
    number = isinstance(temperature, numbers.Real) and not isinstance(temperature, bool)
    if not number or not _FLOAT32.tiny <= temperature <= _FLOAT32.max:
        raise InputError(
            f"got temperature={temperature!r}; a number from {_FLOAT32.tiny:.3g} to {_FLOAT32.max:.3g}, or a tensor of them "
            "broadcastable to the leading dimensions of the logits, is valid. For greedy decoding take the argmax."
        )
    return float(temperature)


def _checked_temperature_tensor(logits: Tensor, temperature: Tensor) -> Tensor:
    rows = logits.shape[:-1]
    if not temperature.dtype.is_floating_point:
        raise InputError(
            f"got a temperature tensor of dtype {short_name(temperature.dtype)}; a floating dtype is valid."
        )
    if temperature.requires_grad:
        raise InputError(
            "got a temperature tensor that requires a gradient; only logits get one. Pass temperature.detach(), or "
            "divide the logits by it yourself."
        )
    if temperature.device != logits.device:
        raise InputError(
            f"got a temperature tensor on {temperature.device} and logits on {logits.device}; one device is valid. "
            f"Use temperature.to({str(logits.device)!r}), or a number."
        )
    fits = temperature.ndim <= len(rows) and all(
        t in (1, n) for t, n in zip(reversed(temperature.shape), reversed(rows), strict=False)
    )
    if not fits:
        raise InputError(
            f"got a temperature tensor of shape {list(temperature.shape)} for logits of shape {list(logits.shape)}; "
            f"a shape broadcastable to {list(rows)} is valid (one temperature a token). "
            "For one a sequence use temperature.unsqueeze(-1)."
        )
    if temperature.device.type == "cpu" and not _is_traced(logits):
        bad = ~((temperature >= _FLOAT32.tiny) & (temperature <= _FLOAT32.max))
        if bad.any():
            first = bad.nonzero()[0].tolist()
            raise InputError(
                f"got {_position('temperature', first)} = {temperature[tuple(first)].item():.6g}; "
                f"numbers from {_FLOAT32.tiny:.3g} to {_FLOAT32.max:.3g} are valid. "
                "Use temperature.clamp(min=...), and ignore_index where a position does not count."
            )
    return temperature


def _checked_out_dtype(logits: Tensor, out_dtype: torch.dtype | None) -> torch.dtype:
    if out_dtype is None:
        return logits.dtype
    if out_dtype not in DTYPES:
        raise InputError(
            f"got out_dtype={out_dtype!r}; {', '.join(f'torch.{short_name(d)}' for d in DTYPES)}, or None for the dtype of "
            "the logits, are valid."
        )
    return out_dtype


def _check_not_leaf(logits: Tensor) -> None:
    base = logits._base if logits._is_view() else logits
    if base is not None and base.is_leaf and base.requires_grad:
        raise InputError(
            "got inplace_backward=True for logits that are a leaf (or a view of one) and require a gradient: the gradient "
            "would overwrite their value, and be their .grad as well. Logits computed by a model are valid; "
            "for a leaf set inplace_backward=False."
        )
