"""torch.compile over the formula: one fused pass forward, one fused pointwise pass backward, the contract inside.

N is dynamic and V static: one compilation a direction serves every N, every temperature and every `ignore_index`. Each
combination of V, dtype, K and options (`Key`) has a compiled function of its own, which knows nothing of the others.
What is compiled, and in which form for which device, is in `compiled_logprobs.backends.compiled_code`.

On a GPU logits beyond 2^31 are computed in parts, and slices through a map of their rows or, where none fits, outer
index by outer index. None of this was timed on one: `python -m tests.gpu_code` shows what the generated code does.

Shapes: N rows (or A x S, where two strides lead from row to row), V vocabulary, K labels a row.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache, lru_cache
from importlib.util import find_spec
from pathlib import Path
from types import FunctionType
from typing import Any, NoReturn

import torch
from torch import Tensor

from compiled_logprobs.backends import compiled_code
from compiled_logprobs.backends.base import Backend
from compiled_logprobs.backends.compiled_code import Key, mark, number, options, parameters, takes_hints
from compiled_logprobs.backends.fingerprint import digest_of
from compiled_logprobs.errors import BackendUnavailable
from compiled_logprobs.machine.environment import cpp_compiler
from compiled_logprobs.operation import contract, formula
from compiled_logprobs.operation.contract import Inputs, Results, Upstream, Wanted
from compiled_logprobs.problem import Problem, layout_of

RECOMPILE_LIMIT = 32
"""Per `Key`. Another row stride or number of threads and the labels' dtype add a compilation each."""
INT32_MAX = 2**31 - 1
COMPILER_ERRORS = ("torch._dynamo.exc", "torch._inductor.exc")
"""The modules whose exceptions say that something could not be compiled."""
DISABLED = ("TORCHDYNAMO_DISABLE", "TORCH_COMPILE_DISABLE")


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
        if (disabled := _why_disabled()) is not None:
            return disabled
        if problem.device_type in ("cpu", "cuda"):
            return _why_no_cpp_compiler() if problem.device_type == "cpu" else _why_no_triton()
        return f"is not tested on {problem.device_type}"

    def is_warm(self, problem: Problem) -> bool:
        key = key_for(problem)
        # Whether a gradient will come through each result is not known; whoever warms up does what they do later.
        backward = "backward", key, problem.inplace_backward
        forward = "forward", key, contract.wanted_by(problem)
        return forward in self._warm and (not problem.needs_grad or backward in self._warm)

    def fingerprint(self) -> str:
        return digest_of(
            *(Path(str(file)) for file in (__file__, compiled_code.__file__, formula.__file__, contract.__file__))
        )

    def forward(self, inputs: Inputs, wanted: Wanted) -> Results:
        key = key_of(inputs)
        results = _forward(inputs, wanted, key)
        self._warm.add(("forward", key._replace(starts_aligned=True), wanted))
        return results

    def backward(self, inputs: Inputs, stats: Tensor, upstream: Upstream, *, inplace: bool) -> Tensor:
        key = key_of(inputs)
        gradient = _backward(inputs, stats, upstream, key, inplace)
        self._warm.add(("backward", key._replace(starts_aligned=True), inplace))
        return gradient


def key_for(problem: Problem) -> Key:
    """The key of the calls that `problem` stands for."""
    on_cpu = problem.device_type == "cpu"
    return Key(
        problem.device_type,
        problem.vocab,
        problem.dtype,
        problem.labels_per_row,
        problem.temperature == "per_token",
        problem.layout,
        problem.aligned or on_cpu,
        True,
    )


def key_of(inputs: Inputs) -> Key:
    """The key of a call."""
    logits, labels, temperature, _ = inputs
    layout, aligned = layout_of(logits)
    device_type, starts_aligned = logits.device.type, True
    if device_type == "cpu":
        aligned = True
    else:
        starts_aligned = logits.data_ptr() % 16 == 0
        aligned = aligned and (layout == "flat" or all(stride % 16 == 0 for stride in logits.stride()[:-1]))
    per_token = isinstance(temperature, Tensor)
    return Key(
        device_type, logits.shape[-1], logits.dtype, labels.shape[-1], per_token, layout, aligned, starts_aligned
    )


def _forward(inputs: Inputs, wanted: Wanted, key: Key) -> Results:
    if key.device_type != "cpu" and (pieces := pieces_of(inputs.logits, key, maps=key.reads_blocks)):
        return _together([_forward(part, wanted, key_of(part)) for part in _parts(inputs, pieces)], pieces)
    arguments = arguments_of(inputs)
    if inputs.labels.shape[0] == 1:
        arguments = doubled(arguments)
    if key.layout == "slice" and key.reads_blocks:
        arguments = mapped(arguments)
    results = Results(*_call(_compiled_forward(key, wanted), arguments, key, "forward"))
    rows = inputs.labels.shape[:-1]
    if rows[0] == 1:  # and not two, as it was computed
        return _of_each(results, lambda result, dimension: result.narrow(dimension, 0, 1).clone())
    if results.log_probs.shape[:-1] == rows:
        return results
    return _of_each(
        results, lambda result, dimension: result.view(*result.shape[:dimension], *rows, *result.shape[dimension + 1 :])
    )


def _of_each(results: Results, function: Callable[[Tensor, int], Tensor]) -> Results:
    """What `function` makes of each result and the dimension in which its rows begin."""
    made = (
        None if result is None else function(result, int(name == "stats")) for name, result in results._asdict().items()
    )
    return Results(*made)  # type: ignore[arg-type]  # the first two are never None


def _backward(
    inputs: Inputs, stats: Tensor, upstream: Upstream, key: Key, inplace: bool, out: Tensor | None = None
) -> Tensor:
    logits, maps = inputs.logits, key.reads_blocks and key.in_one_pass and not inplace
    if key.device_type != "cpu" and (pieces := pieces_of(logits, key, maps=maps)):
        gradient = logits if inplace else logits.new_empty(logits.shape) if out is None else out
        for piece, part in zip(pieces, _parts(inputs, pieces), strict=True):
            grads = Upstream(*(None if grad is None else grad[piece] for grad in upstream))  # type: ignore[arg-type]
            _backward(part, stats[:, piece], grads, key_of(part), inplace, gradient[piece])
        return gradient
    others = ("grad_entropy", upstream.entropy), ("grad_logsumexp", upstream.logsumexp)
    arguments = {**arguments_of(inputs), "stats": stats, "grad_log_probs": upstream.log_probs}
    arguments |= {name: grad for name, grad in others if grad is not None}
    if inplace and not key.in_one_pass:
        # Not by the compiled function: torch 2.11 and older have it read them from the gradient that it wrote there.
        arguments["logits_at_labels"] = logits.gather(-1, inputs.labels.to(torch.int64).clamp(0, key.vocab - 1))
    rows = logits.shape[:-1]
    if rows[0] == 1:
        arguments = doubled(arguments)
    elif out is not None and not inplace:
        arguments["out"] = out
    if key.layout == "slice" and maps:
        arguments = mapped(arguments)
    through = upstream.entropy is not None, upstream.logsumexp is not None
    compiled = _compiled_backward(key, inplace, "out" in arguments, *through)
    gradient, values, positions = _call(compiled, arguments, key, "backward")
    target = logits if inplace else out
    if rows[0] == 1:
        row = (arguments["logits"] if inplace else gradient)[:1]
        gradient = row.clone() if target is None else target.copy_(row)
    else:
        gradient = gradient.view(*rows, -1) if target is None else target
    if values is not None:
        values, positions = values[: rows[0]], positions[: rows[0]]
        if gradient.is_contiguous():
            torch.ops.aten.index_put_(gradient.view(-1), [positions], values)
        else:
            formula.write_label_columns(gradient, positions % key.vocab, values)
    return gradient


def arguments_of(inputs: Inputs) -> dict[str, Tensor]:
    """What compiled functions take, by name."""
    logits, labels, temperature, ignore_index = inputs
    t = temperature if isinstance(temperature, Tensor) else number(temperature)
    return {"logits": logits, "labels": labels, "temperature": t, "ignore_index": number(ignore_index, torch.int64)}


def mapped(arguments: dict[str, Tensor]) -> dict[str, Tensor]:
    """`arguments` with the rows of a slice one after another, and where each lies in memory."""
    found = compiled_code.map_rows(arguments["logits"])
    assert found is not None
    memory, row_map = found
    flat = {
        name: argument.flatten(int(name == "stats"), 1 + int(name == "stats")) if argument.ndim else argument
        for name, argument in arguments.items()
        if name != "logits"
    }
    return {"logits": memory, **flat, **row_map._asdict()}


@cache
def _compiled_forward(key: Key, wanted: Wanted) -> Callable[..., Any]:
    return compile_function(compiled_code.forward_function(key, wanted), f"forward_{key}_{wanted}", key.device_type)


@cache
def _compiled_backward(key: Key, inplace: bool, *variant: bool) -> Callable[..., Any]:
    """`variant`: whether the gradient goes into a tensor, and comes through the entropy and the logsumexp."""
    function = compiled_code.backward_function(key, inplace)
    return compile_function(function, f"backward_{key}_{inplace}_{variant}", key.device_type)


def compile_function(function: Callable[..., Any], name: str, device_type: str) -> Callable[..., Any]:
    """Compile a copy of `function` that has a code object and a name of its own.

    torch.compile remembers by these which sizes have changed so far, and takes them for dynamic from then on: to one
    function for all keys, V would look like such a size. It also counts compilations by code object.
    """
    assert isinstance(function, FunctionType)
    code = function.__code__.replace(co_name=name)
    own = FunctionType(code, function.__globals__, name, function.__defaults__, function.__closure__)
    how: Any = {} if device_type == "cpu" else {"options": options()}
    if "recompile_limit" in parameters(torch.compile):
        how["recompile_limit"] = RECOMPILE_LIMIT
    compiled: Callable[..., Any] = torch.compile(own, fullgraph=True, **how)
    return compiled


def doubled(arguments: dict[str, Tensor]) -> dict[str, Tensor]:
    """`arguments` of a single row, twice: torch.compile never treats a size of 1 as dynamic, and would compile once
    more for it, with another order of summation."""
    return {name: torch.cat([a, a], int(name == "stats")) if a.ndim else a for name, a in arguments.items()}


def _call(function: Callable[..., Any], arguments: dict[str, Tensor], key: Key, direction: str) -> Any:
    """Call a compiled function with the leading dimensions dynamic, in the one mode that it was compiled for."""
    stats = arguments.get("stats")
    # Marks take half as long as the call, and matter where it compiles.
    compiles_for = (
        *(function, arguments["labels"].dtype, torch.get_num_threads(), stats is None or stats.is_contiguous()),
    )
    with _in_its_mode(key.device_type) if _is_in_another_mode(key.device_type) else _AS_IT_IS:
        try:
            arguments = {name: _plain(argument) if argument.ndim else argument for name, argument in arguments.items()}
            if compiles_for not in _COMPILED:
                hints = compiled_code.hints_for(key, arguments["logits"], direction)
                if hints is not None and not takes_hints():
                    function(**dummies(arguments, hints))
                mark(arguments, hints)
            results = function(**arguments)
        except Exception as error:  # noqa: BLE001  raised again, translated or as it is
            raise_translated(error)
    _COMPILED.add(compiles_for)
    return results


def _plain(argument: Tensor) -> Tensor:
    """A new object for the same memory, to mark: marks stay on one, and those of forward are not for backward.

    It is no view, of which the compiler also looks at the tensor that it was made from, and at its sizes. And it is no
    inference tensor, for which, in each place of the arguments, the compiler would compile once more.
    """
    if not argument.is_inference():
        return argument.data
    empty = torch.empty(0, dtype=argument.dtype, device=argument.device)
    return empty.set_(argument.untyped_storage(), argument.storage_offset(), argument.shape, argument.stride())


_AS_IT_IS = nullcontext()
_COMPILED: set[tuple[object, ...]] = set()
"""What functions were compiled for: themselves, and what they are compiled anew for."""


def dummies(arguments: dict[str, Tensor], hints: list[int]) -> dict[str, Tensor]:
    """Arguments of the sizes `hints`, of the same kind and layout as `arguments`, for torch to compile by."""
    logits, leading = arguments["logits"], len(hints)
    made = {}
    for name, a in arguments.items():
        first = a.shape[:1] if name == "stats" else ()
        made[name] = a.new_zeros(*first, *hints, *a.shape[len(first) + leading :]) if a.ndim else torch.zeros_like(a)
    if leading > 1:
        made["logits"] = logits.new_zeros(hints[0], hints[1] + 1, logits.shape[-1])[:, : hints[1]]
    elif not logits.is_contiguous():
        made["logits"] = logits.new_zeros(*hints, logits.shape[-1] + 16)[:, : logits.shape[-1]]
    mark(made, None)
    return made


def pieces_of(logits: Tensor, key: Key, *, maps: bool) -> list[Any]:
    """Indices of the parts that logits on a GPU are computed in; empty where they are computed at once.

    32-bit indices have to reach all of a part: Inductor uses these where it is told of few rows, and guards that they
    suffice. A slice whose rows cannot be mapped is computed outer index by outer index.
    """
    is_slice = logits.ndim > 2
    if is_slice and (logits.ndim > 3 or (key.reads_blocks and (not maps or compiled_code.map_rows(logits) is None))):
        return list(range(len(logits)))
    rows = rows_at_a_time(logits)
    if rows >= len(logits):
        return []
    if rows <= 1:
        return list(range(len(logits))) if is_slice else [slice(n, n + 1) for n in range(len(logits))]
    return [slice(start, start + rows) for start in range(0, len(logits), rows)]


def _parts(inputs: Inputs, pieces: list[Any]) -> Iterator[Inputs]:
    logits, labels, t, ignore_index = inputs
    for piece in pieces:
        yield Inputs(logits[piece], labels[piece], t[piece] if isinstance(t, Tensor) else t, ignore_index)


def _together(parts: list[Results], pieces: list[Any]) -> Results:
    """The results of all parts, which are small."""
    together = torch.cat if isinstance(pieces[0], slice) else torch.stack
    columns = zip(Results._fields, zip(*parts, strict=True), strict=True)
    joined = (None if each[0] is None else together(each, int(name == "stats")) for name, each in columns)
    return Results(*joined)  # type: ignore[arg-type]  # the first two are never None


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


def _is_in_another_mode(device_type: str) -> bool:
    return torch.is_grad_enabled() or torch.is_autocast_enabled(device_type) or torch.is_inference_mode_enabled()


@contextmanager
def _in_its_mode(device_type: str) -> Iterator[None]:
    """Without gradients, autocast and inference mode, which change nothing here, but compiled functions are guarded on
    them."""
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device_type, enabled=False):
        yield


def raise_translated(error: Exception) -> NoReturn:
    """Raise `error`, and what a compiler raised as a reason why this backend cannot run."""
    if not any(cls.__module__ in COMPILER_ERRORS for cls in type(error).__mro__):
        raise error
    first_line = next(iter(str(error).strip().splitlines()), type(error).__name__)
    raise BackendUnavailable(
        f"backend 'compiled' could not be compiled here: {first_line} The whole error is above. "
        "Mend what it names, or use backend='eager' or backend='auto'."
    ) from error


def _why_disabled() -> str | None:
    """Why torch.compile returns functions as they are: the formula would then hold float32 copies of the logits."""
    config, frames = (sys.modules.get(f"torch._dynamo.{name}") for name in ("config", "eval_frame"))  # slow to import
    if getattr(config, "disable", False) or "1" in map(os.environ.get, DISABLED):
        return "torch.compile is disabled here: unset TORCHDYNAMO_DISABLE and TORCH_COMPILE_DISABLE"
    if getattr(getattr(frames, "_stance", None), "stance", None) == "force_eager":
        return "torch.compile is disabled here: call torch.compiler.set_stance('default')"
    return None


@lru_cache(maxsize=1)
def _why_no_cpp_compiler() -> str | None:
    if cpp_compiler() is not None:
        return None
    return "torch.compile needs a C++ compiler on CPU, and there is none on the PATH: install one, or name it in CXX"


def _why_no_triton() -> str | None:
    if find_spec("triton") is None:
        return "torch.compile needs triton on CUDA, and it is not installed"
    return _why_not_on(torch.cuda.current_device())


@cache
def _why_not_on(device: int) -> str | None:
    major, minor = torch.cuda.get_device_capability(device)
    if major < 7:
        return f"torch.compile needs compute capability 7.0 or newer, and this device has {major}.{minor}"
    return None
