"""torch.compile over the formula: one fused forward pass, one fused pointwise backward.

N is dynamic and V static: one compilation a direction serves every N and every temperature. Each combination of V, dtype,
K and options (`_Key`) has a compiled function of its own, which knows nothing of the others.

Shapes: N rows (or A x B, where two strides lead from row to row), V vocabulary, K labels a row.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, lru_cache
from importlib.util import find_spec
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from compiled_logprobs import formula
from compiled_logprobs.backends.base import Backend
from compiled_logprobs.environment import cpp_compiler
from compiled_logprobs.errors import BackendUnavailable
from compiled_logprobs.problem import Layout, Problem, layout_of

RECOMPILE_LIMIT = 32
"""Per `_Key`. Another row stride, another number of threads, inference mode and 64-bit indexing add a compilation each."""


class _Key(NamedTuple):
    """What a compiled function is specialised on."""

    device_type: str
    vocab: int
    dtype: torch.dtype
    labels_per_row: int
    per_token_temperature: bool
    layout: Layout
    aligned: bool
    """Inductor copies a misaligned input on an accelerator, unless it saw a misaligned one when it compiled."""


class Compiled(Backend):
    """torch.compile over the formula."""

    name = "compiled"
    summary = "torch.compile: one fused pass forward, one backward"

    def __init__(self) -> None:
        self._warm: set[tuple[object, ...]] = set()

    def why_not(self, problem: Problem) -> str | None:
        if problem.dtype == torch.float64:
            return "computes in float32; float64 logits are for eager"
        if problem.device_type == "cpu":
            return _why_no_cpp_compiler()
        if problem.device_type == "cuda":
            return _why_no_triton()
        return f"is not tested on {problem.device_type}"

    def is_warm(self, problem: Problem) -> bool:
        key = _Key(
            problem.device_type,
            problem.vocab,
            problem.dtype,
            problem.labels_per_row,
            problem.temperature == "per_token",
            problem.layout,
            problem.aligned or problem.device_type == "cpu",
        )
        forward = ("forward", key, problem.entropy)
        # Whether a gradient will come through the entropy cannot be known; whoever warms up does what they will do later.
        backward = [("backward", key, entropy, problem.inplace_backward) for entropy in (False, True)]
        return forward in self._warm and (not problem.needs_grad or any(b in self._warm for b in backward))

    def forward(
        self, logits: Tensor, labels: Tensor, temperature: float | Tensor, *, entropy: bool
    ) -> tuple[Tensor, Tensor | None, tuple[Tensor, ...]]:
        t = _as_tensor(temperature, logits)
        key = _key_of(logits, labels, t)
        log_probs, entropies, residuals = _run(_compiled_forward(key, entropy), logits, labels, t)
        self._warm.add(("forward", key, entropy))
        if logits.shape[0] > 1:
            return log_probs, entropies, residuals
        return log_probs[:1], None if entropies is None else entropies[:1], tuple(r[:1] for r in residuals)

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
        t = _as_tensor(temperature, logits)
        key = _key_of(logits, labels, t)
        m, log_s = residuals[:2]
        through_entropy = () if grad_entropy is None else (residuals[2], grad_entropy)
        gradient: Tensor
        gradient, at_labels = _run(
            _compiled_backward(key, grad_entropy is not None, inplace),
            *(logits, labels, t, m, log_s, ignored, grad_log_probs, *through_entropy),
        )
        self._warm.add(("backward", key, grad_entropy is not None, inplace))
        if logits.shape[0] == 1:
            gradient, at_labels = gradient[:1], at_labels[:1]
            gradient = logits.copy_(gradient) if inplace else gradient.clone()
        formula.write_label_columns(gradient, labels, at_labels)
        return gradient


def _key_of(logits: Tensor, labels: Tensor, temperature: Tensor) -> _Key:
    device_type = logits.device.type
    layout, aligned = layout_of(logits)
    return _Key(
        device_type,
        logits.shape[-1],
        logits.dtype,
        labels.shape[-1],
        temperature.ndim > 0,
        layout,
        aligned or device_type == "cpu",
    )


@cache
def _compiled_forward(key: _Key, entropy: bool) -> Callable[..., Any]:
    def forward(logits: Tensor, labels: Tensor, temperature: Tensor) -> Any:
        return formula.forward(logits, labels, temperature, entropy=entropy)

    return _compile(forward, f"forward_{key}_{entropy}")


@cache
def _compiled_backward(key: _Key, through_entropy: bool, inplace: bool) -> Callable[..., Any]:
    def backward(
        logits: Tensor,
        labels: Tensor,
        temperature: Tensor,
        m: Tensor,
        log_s: Tensor,
        ignored: Tensor,
        grad_log_probs: Tensor,
        entropy: Tensor | None = None,
        grad_entropy: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        residuals = (m, log_s) if entropy is None else (m, log_s, entropy)
        gradient, at_labels = formula.backward(
            logits, labels, temperature, residuals, ignored, grad_log_probs, grad_entropy
        )
        return logits.copy_(gradient) if inplace else gradient, at_labels

    return _compile(backward, f"backward_{key}_{through_entropy}_{inplace}")


def _compile(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """Compile a copy of `function` that has a code object and a name of its own.

    torch.compile remembers by these which sizes have changed so far, and takes them for dynamic from then on: to one function
    for all keys, V would look like such a size. It also counts compilations by code object.
    """
    assert isinstance(function, FunctionType)
    code = function.__code__.replace(co_name=name)
    own = FunctionType(code, function.__globals__, name, function.__defaults__, function.__closure__)
    compiled: Callable[..., Any] = torch.compile(  # type: ignore[call-overload]  # its overloads lack the last
        own, fullgraph=True, recompile_limit=RECOMPILE_LIMIT
    )
    return compiled


def _run(function: Callable[..., Any], logits: Tensor, *others: Tensor) -> Any:
    """Call a compiled function with the leading dimensions dynamic, in the one mode that it was compiled for.

    A single row is computed twice, and the results have two rows: torch.compile never treats a size of 1 as dynamic, and would
    compile once more for it, with another order of summation.
    """
    leading = list(range(logits.ndim - 1))
    # `.data` is no view: of a view, the compiler also looks at the tensor that it was made from, and at its sizes.
    arguments = [logits.data, *others]
    if logits.shape[0] == 1:
        arguments = [torch.cat([a, a]) if a.ndim else a for a in arguments]
    for argument in arguments:
        if argument.ndim:
            # On every call: an unmarked one that recompiles, for whatever reason, would compile N as a constant.
            torch._dynamo.mark_dynamic(argument, leading)
    with torch.no_grad(), _no_autocast(logits.device.type), _translated_errors():
        return function(*arguments)


@contextmanager
def _no_autocast(device_type: str) -> Iterator[None]:
    """Autocast changes nothing here, but compiled functions are guarded on it."""
    if torch.is_autocast_enabled(device_type):
        with torch.autocast(device_type, enabled=False):
            yield
    else:
        yield


@contextmanager
def _translated_errors() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        from torch._dynamo.exc import TorchDynamoException
        from torch._inductor.exc import InductorError

        if not isinstance(error, TorchDynamoException | InductorError):
            raise
        first_line = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise BackendUnavailable(
            f"backend 'compiled' could not be compiled here: {first_line} The whole error is above. "
            "Mend what it names, or use backend='eager' or backend='auto'."
        ) from error


def _as_tensor(temperature: float | Tensor, logits: Tensor) -> Tensor:
    """As a tensor, since compiled code treats each number as a constant of its own.

    A fill on the device, where a copy from the host would wait for it; and a new one for each call, since memory that was
    filled while a CUDA graph was captured, or on another stream, may hold nothing yet.
    """
    if isinstance(temperature, Tensor):
        return temperature
    return torch.full((), temperature, dtype=torch.float32, device=logits.device)


@lru_cache(maxsize=1)
def _why_no_cpp_compiler() -> str | None:
    if cpp_compiler() is not None:
        return None
    return "torch.compile needs a C++ compiler on CPU, and there is none on the PATH: install one, or name it in CXX"


@lru_cache(maxsize=1)
def _why_no_triton() -> str | None:
    if find_spec("triton") is None:
        return "torch.compile needs triton on CUDA, and it is not installed"
    capability = torch.cuda.get_device_capability()
    if capability < (7, 0):
        return (
            f"torch.compile needs compute capability 7.0 or newer, and this device has {capability[0]}.{capability[1]}"
        )
    return None
