"""What a call poses, and the backend that it names."""

from typing import Any, cast

import torch
from torch import Tensor

from compiled_logprobs.arguments import check_no_transform
from compiled_logprobs.backends import EAGER, built_in_for, get_backend, require_backend
from compiled_logprobs.backends.base import AnyBackend, HiddenBackend
from compiled_logprobs.choose import memory
from compiled_logprobs.choose.auto import is_capturing
from compiled_logprobs.errors import BackendUnavailable, InputError
from compiled_logprobs.operation.autograd import PLAIN
from compiled_logprobs.operation.contract import Wanted
from compiled_logprobs.problem import Problem, Temperature, layout_of


def problem_of(
    logits: Tensor,
    labels: Tensor,
    temperature: float | Tensor,
    wanted: Wanted = PLAIN,
    masked_logits: bool = False,
    inplace_backward: bool = False,
    out_dtype: torch.dtype = torch.float32,
) -> Problem:
    """The problem that a call with `labels` [...] or [..., K] poses."""
    shape = logits.shape
    layout, aligned = layout_of(logits) if logits.numel() > 0 else ("flat", True)
    kind: Temperature = "per_token" if isinstance(temperature, Tensor) else "none" if temperature == 1.0 else "number"
    needs_grad = logits.requires_grad and torch.is_grad_enabled()
    return Problem(
        "cpu" if logits.is_cpu else logits.device.type,  # a device's name takes a while to make
        logits.numel() // shape[-1],
        shape[-1],
        logits.dtype,
        out_dtype,
        labels.shape[-1] if labels.ndim == len(shape) else 1,
        needs_grad,
        *wanted,
        kind,
        masked_logits,
        inplace_backward and needs_grad,
        layout,
        aligned,
    )


def problem_from_hidden(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    temperature: float | Tensor,
    wanted: Wanted,
    softcap: float | None,
    memory_limit: int | None,
    out_dtype: torch.dtype,
) -> Problem:
    """The problem of a call from hidden states; `temperature` and `softcap` are divided by its `logit_scale`."""
    kind: Temperature = "per_token" if isinstance(temperature, Tensor) else "none" if temperature == 1.0 else "number"
    differentiable = (x.requires_grad for x in (hidden, weight, bias) if x is not None)
    needs_grad = torch.is_grad_enabled() and any(differentiable)
    return Problem(
        hidden.device.type,
        hidden.numel() // hidden.shape[-1],
        weight.shape[0],
        hidden.dtype,
        out_dtype,
        labels.shape[-1] if labels.ndim == hidden.ndim else 1,
        needs_grad,
        *wanted,
        kind,
        hidden=hidden.shape[-1],
        weight_grad=needs_grad and weight.requires_grad,
        bias=bias is not None,
        softcap=softcap is not None,
        memory_limit=memory_limit,
    )


def check_limit(problem: Problem) -> None:
    """Raise InputError for a limit of memory that nothing can keep."""
    limit = problem.memory_limit
    if limit is None:
        return
    backends = (cast(HiddenBackend, get_backend(name, problem)) for name in built_in_for(problem))
    least = min(bytes for backend in backends if (bytes := backend.least_memory(problem)) is not None)
    if isinstance(limit, bool) or not isinstance(limit, int) or limit < least:
        raise InputError(
            f"got memory_limit={limit!r} for {problem}; an integer of at least {least} bytes, the least that is "
            "possible, or None is valid."
        )


def named_backend(name: str, problem: Problem) -> Any:
    """The backend called `name`. Raises BackendUnavailable where it cannot run `problem` now."""
    backend: AnyBackend = require_backend(name, problem)
    if name != EAGER:
        check_no_transform(name)
    if is_capturing(problem) and not memory.MEMORY.is_warm(name, backend, problem):
        raise BackendUnavailable(
            f"backend {name!r} has not run {problem} yet, and cannot compile while a CUDA graph is captured. "
            f"Call warm(problem, backend={name!r}) before the capture, or the function once."
        )
    return backend
