"""torch.compile over the formula: one fused forward pass, one fused pointwise backward.

N is dynamic and V static: one compilation a direction serves every N and every temperature. Each combination of V,
dtype, K and options (`Key`) has a compiled function of its own, which knows nothing of the others.

Which form of the formula is compiled depends on the device:

* On a CPU `formula.forward_at_once`, in one level: the two-level form is slower there as Inductor writes it.
* On a GPU `formula.forward_in_blocks`, where a row is longer than a block: two kernels, of which the first reads the
  logits, once, and the second combines a few numbers a block. The one-level form makes two loops over the row, and a
  row rarely stays in a GPU's cache until the second. Inductor's online softmax would read once as well, without the
  entropy, but with two exponentials a logit: an H100 has 132 SMs with 16 a clock each, and at the 1.5e12 logits a
  second that its memory brings in bfloat16 two of them take 81 % of these units, one 40 %.
* Backward on a GPU is `formula.gradient` for one label a row, a single kernel; for several, and on a CPU,
  `formula.backward_at_once` and a write to the label columns. On a CPU the comparison of each column with the label
  would cost more than that write.

None of this was timed on a GPU: `python -m tests.gpu_code` shows what the generated code does.

Shapes: N rows (or A x B, where two strides lead from row to row), V vocabulary, K labels a row.
"""

import inspect
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, lru_cache
from importlib.util import find_spec
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from compiled_logprobs.backends.base import Backend
from compiled_logprobs.errors import BackendUnavailable
from compiled_logprobs.machine.environment import cpp_compiler
from compiled_logprobs.operation import contract, formula
from compiled_logprobs.operation.contract import Inputs, Results, Upstream, Wanted
from compiled_logprobs.operation.formula import Computed, Saved
from compiled_logprobs.problem import Layout, Problem, layout_of

RECOMPILE_LIMIT = 32
"""Per `Key`. Another row stride or number of threads, inference mode and 64-bit indexing add a compilation each."""

BLOCKS_TO_COMPILE_FOR = 1024
"""How many blocks Inductor is told of on a GPU, whatever N comes first.

It chooses between kernels by this number. From 64 a multiprocessor on, of which an A100 has 108, it no longer looks at
strides, takes the blocks for scattered, and loads each twice. From 1024 on it finds one warp enough for a block, and
offers just that to its autotuner. In between, every N has the same kernel, and one that reads once.
"""
INT32_MAX = 2**31 - 1
COMPILER_ERRORS = ("torch._dynamo.exc", "torch._inductor.exc")
"""The modules whose exceptions say that something could not be compiled."""
DISABLED = ("TORCHDYNAMO_DISABLE", "TORCH_COMPILE_DISABLE")
OPTIONS = {"triton.autotune_pointwise": False}
"""Of Inductor on a GPU. To choose between two configurations it would run both at the first call, and copy the logits
before each run of a kernel that writes over them. The one that is left is the first of both, and takes fewer
instructions a logit."""


class Key(NamedTuple):
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
    row_invariant = True  # N is dynamic: one kernel for all N, which reduces each row by itself

    def __init__(self) -> None:
        self._warm: set[tuple[object, ...]] = set()

    def why_not(self, problem: Problem) -> str | None:
        if problem.dtype == torch.float64:
            return "computes in float32; float64 logits are for eager"
        if _is_disabled():
            return "torch.compile is disabled here: unset TORCHDYNAMO_DISABLE and TORCH_COMPILE_DISABLE"
        if problem.logsumexp or problem.argmax or problem.sum_p_squared:
            return "computes log-probabilities and their entropy alone"
        if problem.device_type in ("cpu", "cuda"):
            return _why_no_cpp_compiler() if problem.device_type == "cpu" else _why_no_triton()
        return f"is not tested on {problem.device_type}"

    def is_warm(self, problem: Problem) -> bool:
        key = key_for(problem)
        forward = ("forward", key, problem.entropy)
        # Whether a gradient will come through the entropy is not known; whoever warms up does what they do later.
        backward = [("backward", key, entropy, problem.inplace_backward) for entropy in (False, True)]
        return forward in self._warm and (not problem.needs_grad or any(b in self._warm for b in backward))

    def forward(self, inputs: Inputs, wanted: Wanted) -> Results:
        rows = contract.clean(inputs)
        computed = self._forward(inputs.logits, rows.labels, rows.temperature, entropy=wanted.entropy)
        m, log_s = (residual.squeeze(-1) for residual in computed.residuals[:2])
        return contract.finish(rows, wanted, computed.log_probs, m, log_s, computed.entropy)

    def _forward(self, logits: Tensor, labels: Tensor, temperature: float | Tensor, *, entropy: bool) -> Computed:
        t = _as_tensor(temperature, logits)
        key = _key_of(logits, labels, t)
        hints = None
        if reads_blocks(key.device_type, key.vocab):
            if rows_within_int32(logits) < len(logits):
                return self._forward_in_parts(logits, labels, t, entropy=entropy)
            hints = hints_for(logits)
        log_probs, entropies, residuals = _run(_compiled_forward(key, entropy), logits, labels, t, hints=hints)
        self._warm.add(("forward", key, entropy))
        if logits.shape[0] > 1:
            return Computed(log_probs, entropies, residuals)
        return Computed(log_probs[:1], None if entropies is None else entropies[:1], tuple(r[:1] for r in residuals))

    def backward(self, inputs: Inputs, stats: Tensor, upstream: Upstream, *, inplace: bool) -> Tensor:
        logits, rows = inputs.logits, contract.clean(inputs)
        labels, upstream = rows.labels, contract.clean_upstream(rows, upstream)
        t = _as_tensor(rows.temperature, logits)
        key = _key_of(logits, labels, t)
        m, log_s, *entropy = stats.unsqueeze(-1).unbind(0)
        through_entropy = () if upstream.entropy is None else (entropy[0], upstream.entropy)
        gradient: Tensor
        gradient, at_labels = _run(
            _compiled_backward(key, upstream.entropy is not None, inplace),
            *(logits, labels, t, m, log_s, rows.dropped, upstream.log_probs, *through_entropy),
        )
        self._warm.add(("backward", key, upstream.entropy is not None, inplace))
        if logits.shape[0] == 1:
            gradient = logits.copy_(gradient[:1]) if inplace else gradient[:1].clone()
            at_labels = None if at_labels is None else at_labels[:1]
        if at_labels is not None:
            formula.write_label_columns(gradient, labels, at_labels)
        return gradient

    def _forward_in_parts(self, logits: Tensor, labels: Tensor, temperature: Tensor, *, entropy: bool) -> Computed:
        """Forward over parts of the rows that 32-bit indices reach; what it returns is small, and put together again.

        Inductor indexes with 32 bits where it is told of few blocks, and guards that these suffice.
        """
        rows = rows_at_a_time(logits)
        pieces: list[Any] = list(range(len(logits)))
        if rows > 1:
            pieces = [slice(start, start + rows) for start in range(0, len(logits), rows)]
        parts = [
            self._forward(logits[p], labels[p], temperature[p] if temperature.ndim else temperature, entropy=entropy)
            for p in pieces
        ]
        together = torch.cat if rows > 1 else torch.stack
        log_probs, entropies, residuals = zip(*parts, strict=True)
        return Computed(
            together(log_probs),
            together(entropies) if entropy else None,
            tuple(together(parts) for parts in zip(*residuals, strict=True)),
        )


def key_for(problem: Problem) -> Key:
    """The key of the calls that `problem` stands for."""
    return Key(
        problem.device_type,
        problem.vocab,
        problem.dtype,
        problem.labels_per_row,
        problem.temperature == "per_token",
        problem.layout,
        problem.aligned or problem.device_type == "cpu",
    )


def _key_of(logits: Tensor, labels: Tensor, temperature: Tensor) -> Key:
    layout, aligned = layout_of(logits)
    return Key(
        logits.device.type,
        logits.shape[-1],
        logits.dtype,
        labels.shape[-1],
        temperature.ndim > 0,
        layout,
        aligned or logits.device.type == "cpu",
    )


@cache
def _compiled_forward(key: Key, entropy: bool) -> Callable[..., Any]:
    return _compile(forward_function(key, entropy), f"forward_{key}_{entropy}", key.device_type)


@cache
def _compiled_backward(key: Key, through_entropy: bool, inplace: bool) -> Callable[..., Any]:
    return _compile(backward_function(key, inplace), f"backward_{key}_{through_entropy}_{inplace}", key.device_type)


def forward_function(key: Key, entropy: bool) -> Callable[..., Any]:
    """What is compiled for the forward pass."""
    chosen = formula.forward_in_blocks if reads_blocks(key.device_type, key.vocab) else formula.forward_at_once

    def forward(logits: Tensor, labels: Tensor, temperature: Tensor) -> Any:
        return chosen(logits, labels, temperature, entropy=entropy)

    return forward


def backward_function(key: Key, inplace: bool) -> Callable[..., Any]:
    """What is compiled for backward: gradient, and the values at the labels where these are written afterwards."""
    in_one_pass = key.device_type != "cpu" and key.labels_per_row == 1

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
    ) -> tuple[Tensor, Tensor | None]:
        residuals = (m, log_s) if entropy is None else (m, log_s, entropy)
        bundles = Saved(logits, labels, temperature, residuals, ignored), Upstream(grad_log_probs, grad_entropy)
        gradient, at_labels = (formula.gradient(*bundles), None) if in_one_pass else formula.backward_at_once(*bundles)
        return logits.copy_(gradient) if inplace else gradient, at_labels

    return backward


def _compile(function: Callable[..., Any], name: str, device_type: str) -> Callable[..., Any]:
    """Compile a copy of `function` that has a code object and a name of its own.

    torch.compile remembers by these which sizes have changed so far, and takes them for dynamic from then on: to one
    function for all keys, V would look like such a size. It also counts compilations by code object.
    """
    assert isinstance(function, FunctionType)
    code = function.__code__.replace(co_name=name)
    own = FunctionType(code, function.__globals__, name, function.__defaults__, function.__closure__)
    options: Any = {} if device_type == "cpu" else {"options": OPTIONS}
    if "recompile_limit" in _parameters(torch.compile):
        options["recompile_limit"] = RECOMPILE_LIMIT
    compiled: Callable[..., Any] = torch.compile(own, fullgraph=True, **options)
    return compiled


def _run(function: Callable[..., Any], logits: Tensor, *others: Tensor, hints: list[int] | None = None) -> Any:
    """Call a compiled function with the leading dimensions dynamic, in the one mode that it was compiled for.

    `hints` are the sizes that it is optimised for when it is compiled, in place of those that it is called with.

    A single row is computed twice, and the results have two rows: torch.compile never treats a size of 1 as dynamic,
    and would compile once more for it, with another order of summation.
    """
    # `.data` is no view: of a view, the compiler also looks at the tensor that it was made from, and at its sizes. And
    # it is a new object: marks stay on one, and those of forward are not for backward.
    arguments = [argument.data for argument in (logits, *others)]
    if logits.shape[0] == 1:
        arguments = [torch.cat([a, a]) if a.ndim else a for a in arguments]
    leading = logits.ndim - 1
    with torch.no_grad(), _no_autocast(logits.device.type), _translated_errors():
        if hints is not None and not _takes_hints() and function not in _OPTIMISED:
            function(*_dummies(arguments, leading, hints))
            _OPTIMISED.add(function)
        mark(arguments, leading, hints)
        return function(*arguments)


_OPTIMISED: set[Callable[..., Any]] = set()
"""The functions that were compiled by a call with the sizes that they are optimised for."""


def _takes_hints() -> bool:
    """Whether torch can be told of sizes that it is not called with; torch 2.8 and older cannot."""
    return "hint_override" in _parameters(torch._dynamo.mark_dynamic)


def _dummies(arguments: Sequence[Tensor], leading: int, hints: list[int]) -> list[Tensor]:
    """Arguments of the sizes `hints`, of the same kind and layout as `arguments`, for torch to compile by."""
    logits = arguments[0]
    if logits.is_contiguous():
        dummy = logits.new_zeros(*hints, logits.shape[-1])
    elif leading == 1:
        dummy = logits.new_zeros(*hints, logits.shape[-1] + 16)[:, : logits.shape[-1]]
    else:
        dummy = logits.new_zeros(hints[0], hints[1] + 1, logits.shape[-1])[:, : hints[1]]
    dummies = [dummy, *(a.new_zeros(*hints, *a.shape[leading:]) if a.ndim else a for a in arguments[1:])]
    mark(dummies, leading, None)
    return dummies


@cache
def _parameters(function: Callable[..., Any]) -> frozenset[str]:
    """The names of what `function` takes, which differ between releases of torch."""
    return frozenset(inspect.signature(function).parameters)


def mark(arguments: Sequence[Tensor], leading: int, hints: list[int] | None) -> None:
    """Tell the compiler that the first `leading` dimensions of all but 0-d `arguments` are dynamic.

    On every call: an unmarked one that recompiles, for whatever reason, would compile N as a constant.
    """
    for argument in arguments:
        if argument.ndim and (hints is None or not _takes_hints()):
            torch._dynamo.mark_dynamic(argument, list(range(leading)))
        elif argument.ndim:
            for dimension, hint in enumerate(hints or ()):
                torch._dynamo.mark_dynamic(argument, dimension, hint_override=hint)


def hints_for(logits: Tensor) -> list[int]:
    """Sizes of the leading dimensions that make `BLOCKS_TO_COMPILE_FOR` blocks, or little more."""
    blocks = -(-logits.shape[-1] // formula.BLOCK)
    outer = [2] * (logits.ndim - 2)
    return [*outer, max(2, -(-BLOCKS_TO_COMPILE_FOR // (blocks * 2 ** len(outer))))]


def reads_blocks(device_type: str, vocab: int) -> bool:
    """Whether forward reads the logits in blocks; a row no longer than one needs no second level."""
    return device_type != "cpu" and vocab > formula.BLOCK


def rows_at_a_time(logits: Tensor) -> int:
    """How far the first dimension of a part goes; 0 or 1 where it has to go through the next dimension as well."""
    rows = rows_within_int32(logits)
    if rows >= len(logits):
        return len(logits)
    return rows // 16 * 16 or rows  # which leaves each part aligned as the whole is


def rows_within_int32(logits: Tensor) -> int:
    """How far the first dimension may go for 32-bit indices to reach the last element, padding counted."""
    first = logits[0]
    padded = -(-first.shape[-1] // formula.BLOCK) * formula.BLOCK * first[..., 0].numel()
    reach = sum((size - 1) * stride for size, stride in zip(first.shape, first.stride(), strict=True))
    in_memory = (INT32_MAX - 1 - reach) // logits.stride(0) + 1 if logits.stride(0) else len(logits)
    return max(0, min(INT32_MAX // padded, in_memory))


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
        if not any(cls.__module__ in COMPILER_ERRORS for cls in type(error).__mro__):
            raise
        first_line = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise BackendUnavailable(
            f"backend 'compiled' could not be compiled here: {first_line} The whole error is above. "
            "Mend what it names, or use backend='eager' or backend='auto'."
        ) from error


def _as_tensor(temperature: float | Tensor, logits: Tensor) -> Tensor:
    """As a tensor, since compiled code treats each number as a constant of its own.

    A fill on the device, where a copy from the host would wait for it; and a new one for each call, since memory that
    was filled while a CUDA graph was captured, or on another stream, may hold nothing yet.
    """
    if isinstance(temperature, Tensor):
        return temperature
    return torch.full((), temperature, dtype=torch.float32, device=logits.device)


def _is_disabled() -> bool:
    """Whether torch.compile returns functions as they are: the formula would then hold float32 copies of the logits."""
    config = sys.modules.get("torch._dynamo.config")  # not imported to find out, which takes a second
    return getattr(config, "disable", False) or "1" in map(os.environ.get, DISABLED)


@lru_cache(maxsize=1)
def _why_no_cpp_compiler() -> str | None:
    if cpp_compiler() is not None:
        return None
    return "torch.compile needs a C++ compiler on CPU, and there is none on the PATH: install one, or name it in CXX"


@lru_cache(maxsize=1)
def _why_no_triton() -> str | None:
    if find_spec("triton") is None:
        return "torch.compile needs triton on CUDA, and it is not installed"
    major, minor = torch.cuda.get_device_capability()
    if major < 7:
        return f"torch.compile needs compute capability 7.0 or newer, and this device has {major}.{minor}"
    return None
