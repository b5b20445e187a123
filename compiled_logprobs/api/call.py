"""What a call poses, and the backend that it names."""

from typing import Any

import torch
from torch import Tensor

from compiled_logprobs.arguments import check_no_transform
from compiled_logprobs.backends import EAGER, require_backend
from compiled_logprobs.backends.base import AnyBackend
from compiled_logprobs.choose import memory
from compiled_logprobs.choose.auto import is_capturing
from compiled_logprobs.errors import BackendUnavailable
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
