"""What the compiled backend does on a GPU, read from the code that is generated for it. Nothing here is measured.

How often the logits are read is counted in the kernels' source. Each load and store stands in loops over rows, columns or both,
and so touches as many elements as these have, at most as many as its tensor has. Two rules are not obvious:

* Loads of one kernel from the same address count once if they are in the same loop. In a later loop they count again, as a
  pass over memory, unless what all programs on a multiprocessor have read since then fits into `STAYS_IN_L1`.
* What is done to ignored rows only, under a condition that is loaded, is left out: a call without ignored labels.

Shapes: N rows, V vocabulary, K labels a row.
"""

import ast
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from compiled_logprobs.backends import compiled, get_backend
from compiled_logprobs.errors import BackendUnavailable
from compiled_logprobs.machine.bandwidth import backward_bytes, forward_bytes
from compiled_logprobs.operation import formula
from compiled_logprobs.operation.formula import Saved, Upstream
from compiled_logprobs.problem import Problem, as_it_lies, short_name
from tests.gpu_code.data_sheets import Gpu
from tests.gpu_code.generated_code import (
    Candidate,
    Kernel,
    Launch,
    Program,
    generate,
    record,
    record_eager,
    record_launches,
)

NOT_MEASURED = "from generated code, not measured"
STAYS_IN_L1 = 64 * 1024
"""Bytes: half of the L1 of the smallest of the GPUs here, an L40S."""
PART_OF_A_PASS = 0.05
"""Of the logits; accesses to fewer elements, such as those at the labels and results by row or block, are no part of a pass."""
RESIDENT_PROGRAMS = 32
"""On a multiprocessor, at most."""
EXPONENTIALS = {"exp": 1, "exp2": 1, "fast_expf": 1, "online_softmax_combine": 2}
"""Functions by the exponentials that each element costs."""
INDEXES_WITH_64_BITS = re.compile(r"(program_id\(0\)|row|row_stride)\.to\(tl\.int64\)")
ACROSS = {"row_idx": "x", "row": "x", "cols": "c", "col_offsets": "c", "columns": "c"}
"""Variables of hand-written kernels that run over rows (x) and over columns (c)."""


@dataclass(frozen=True)
class Access:
    """A load or a store in a kernel's source."""

    parameter: str
    address: str
    is_store: bool
    axes: frozenset[str]
    """What its address runs over: x and y for elements of a pointwise kernel or rows of a reduction, r0_ for what is reduced."""
    loop: int | None
    """Which of the kernel's loops it stands in."""
    conditional: bool


@dataclass(frozen=True)
class Analysis:
    """A kernel's source, looked through once."""

    accesses: tuple[Access, ...]
    exponentials: tuple[tuple[int, frozenset[str]], ...]
    """How many at a place, and what it runs over."""
    sizes: dict[str, int]
    """Sizes that stand in the source, such as r0_numel."""


@dataclass(frozen=True)
class KernelReport:
    """One kernel, over all its launches in a direction."""

    name: str
    launches: int
    candidates: int
    """Configurations that the autotuner chooses from on the device; the next four are the worst of them."""
    registers: int
    spills: int
    """Bytes a thread."""
    shared_bytes: int
    """A program."""
    warps: tuple[int, ...]
    index_bits: int
    logits_reads: float
    """Passes over the logits' memory; less than 1 where only single elements are read."""
    repeated_loads_in_l1: int
    bytes: int


@dataclass(frozen=True)
class Direction:
    """Forward or backward."""

    kernels: int
    """Launches of generated kernels, and of operations of torch that are not generated."""
    logits_reads: int
    """Whole passes over the logits' memory."""
    gradient_writes: int
    """Whole passes that write N x V."""
    nxv_float32_buffers: int
    """Allocated by the way, of N x V elements in float32 or wider, apart from results in the dtype of the logits."""
    registers: int
    """The most of any kernel, in any configuration."""
    spills: int
    """Bytes a thread, likewise."""
    shared_bytes: int
    bytes: int
    """Between memory and chip."""
    minimum_bytes: int | None
    """That every backend has to move; None where the function is not this library's operation."""
    exponentials_per_logit: float
    seconds_by_bandwidth: float
    """What `bytes` take at the data sheet's bandwidth."""
    kernel_reports: tuple[KernelReport, ...]
    operations: tuple[str, ...] = ()
    """Those of torch that are not generated."""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Inspection:
    """What `inspect` found."""

    gpu: Gpu
    problem: Problem
    forward: Direction
    backward: Direction | None
    flash_attn: "FlashAttnInspection | str"
    """Or the reason why its kernels are not here."""

    def to_dict(self) -> dict[str, Any]:
        """For programs: numbers, strings, lists and dictionaries."""
        problem = self.problem
        return {
            "note": NOT_MEASURED,
            "gpu": {**asdict(self.gpu), "bandwidth_from": "data sheet"},
            "arch": self.gpu.arch,
            "torch": torch.__version__,
            "problem": {
                **{
                    name: getattr(problem, name)
                    for name in ("rows", "vocab", "labels_per_row", "needs_grad", "entropy")
                },
                "dtype": short_name(problem.dtype),
                "inplace_backward": problem.inplace_backward,
            },
            "forward": asdict(self.forward),
            "backward": None if self.backward is None else asdict(self.backward),
            "flash_attn": {"why_not": self.flash_attn} if isinstance(self.flash_attn, str) else asdict(self.flash_attn),
        }


@dataclass(frozen=True)
class FlashAttnInspection:
    """flash-attn's kernels on the same problem."""

    forward: Direction
    backward: Direction | None


def inspect(problem: Problem, gpu: Gpu) -> Inspection:
    """Generate, assemble and count the kernels of the `compiled` backend, and of flash-attn beside it.

    Args:
        problem: on cuda; contiguous logits and a temperature for all rows.
        gpu: what to compile for.

    Raises:
        BackendUnavailable: triton is missing, or torch's or triton's internals are not as expected.
    """
    try:
        import triton  # type: ignore[import-untyped, import-not-found, unused-ignore]  # noqa: F401  no stubs, and optional
    except ImportError as error:
        raise BackendUnavailable(
            "inspect assembles kernels with triton, which is not installed here. It needs no GPU: pip install triton."
        ) from error
    problem = as_it_lies(problem)
    forward = _forward(problem, gpu)
    backward = _backward(problem, gpu) if problem.needs_grad else None
    return Inspection(gpu, problem, forward, backward, _flash_attn(problem, gpu))


def inspect_function(
    function: Callable[..., Any],
    arguments: Mapping[str, Tensor],
    gpu: Gpu,
    *,
    least: int | None = None,
    hints: list[int] | None = None,
) -> Direction:
    """What torch.compile makes of any `function(**arguments)` with N dynamic.

    Args:
        function: takes tensors by name, among them `logits` [N, V].
        arguments: on the meta device.
        gpu: what to compile for.
        least: the bytes that have to move.
        hints: the sizes that the leading dimensions are optimised for, in place of their own.
    """
    generated = generate(function, arguments, gpu, lambda fakes: compiled.mark(fakes, 1, hints))
    return _direction(record(generated, [arguments], gpu), [arguments["logits"]], gpu, least)


def _forward(problem: Problem, gpu: Gpu) -> Direction:
    logits = _empty(problem.rows, problem.vocab, dtype=problem.dtype)
    key = compiled.key_for(problem)
    rows, hints = problem.rows, None
    if compiled.reads_blocks(key.device_type, key.vocab):
        hints = compiled.hints_for(logits)
        rows = compiled.rows_at_a_time(logits)
    calls = [
        {
            "logits": logits[start : start + rows],
            "labels": _empty(min(rows, problem.rows - start), problem.labels_per_row, dtype=torch.int64),
            "temperature": _empty(),
        }
        for start in range(0, problem.rows, rows)
    ]
    function = compiled.forward_function(key, problem.entropy)
    generated = generate(function, calls[0], gpu, lambda fakes: compiled.mark(fakes, 1, hints))
    notes = [] if len(calls) == 1 else [f"in {len(calls)} parts of {rows} rows at most, which 32-bit indices reach"]
    return _direction(
        record(generated, calls, gpu), [call["logits"] for call in calls], gpu, forward_bytes(problem), notes
    )


def _backward(problem: Problem, gpu: Gpu) -> Direction:
    rows, labels_per_row = problem.rows, problem.labels_per_row
    logits = _empty(rows, problem.vocab, dtype=problem.dtype)
    arguments = {
        "logits": logits,
        "labels": _empty(rows, labels_per_row, dtype=torch.int64),
        "temperature": _empty(),
        "m": _empty(rows, 1),
        "log_s": _empty(rows, 1),
        "ignored": _empty(rows, dtype=torch.bool),
        "grad_log_probs": _empty(rows, labels_per_row),
    }
    if problem.entropy:
        arguments |= {"entropy": _empty(rows, 1), "grad_entropy": _empty(rows)}
    function = compiled.backward_function(compiled.key_for(problem), problem.inplace_backward)
    program = record(generate(function, arguments, gpu, lambda fakes: compiled.mark(fakes, 1, None)), [arguments], gpu)
    if len(program.results) > 1:  # the values at the labels, which the backend writes afterwards
        gradient, at_labels = program.results
        program.operations += [
            # An indexed assignment touches what it assigns, and not the whole gradient.
            (name, 3 * at_labels.numel() * 8)
            for name, _ in record_eager(lambda: formula.write_label_columns(gradient, arguments["labels"], at_labels))
        ]
    return _direction(program, [logits], gpu, backward_bytes(problem))


def _flash_attn(problem: Problem, gpu: Gpu) -> FlashAttnInspection | str:
    """flash-attn's kernels as its backend launches them, on tensors without memory."""
    backend = get_backend("flash_attn")
    reason = backend.why_not(problem)
    if reason is not None:
        return reason
    from compiled_logprobs.backends import (
        flash_attn,
        flash_attn_rows,  # the second imports triton
    )

    module = flash_attn.kernel_module()
    owners = {
        "cross_entropy_fwd_kernel": module,
        "cross_entropy_bwd_kernel": module,
        "zero_ignored_rows": flash_attn_rows,
    }
    kernels = {name: getattr(owner, name) for name, owner in owners.items()}
    logits = _empty(problem.rows, problem.vocab, dtype=problem.dtype)
    labels = _empty(problem.rows, 1, dtype=torch.int64)
    results: list[Any] = []

    def forward() -> list[Tensor]:
        results[:] = backend.forward(logits, labels, 1.0, entropy=False)
        return [results[0]]

    def backward() -> list[Tensor]:
        ignored, upstream = _empty(problem.rows, dtype=torch.bool), _empty(problem.rows, 1)
        residuals, inplace = results[2], problem.inplace_backward
        return [backend.backward(Saved(logits, labels, 1.0, residuals, ignored), Upstream(upstream), inplace=inplace)]

    def recorded(function: Callable[[], list[Tensor]]) -> Program:
        return record_launches(function, kernels, gpu, lambda name, kernel: setattr(owners[name], name, kernel))

    forward_report = _direction(recorded(forward), [logits], gpu, forward_bytes(problem))
    if not problem.needs_grad:
        return FlashAttnInspection(forward_report, None)
    return FlashAttnInspection(forward_report, _direction(recorded(backward), [logits], gpu, backward_bytes(problem)))


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


@dataclass
class _Sum:
    """What the launches of one kernel add up to."""

    kernel: Kernel
    launches: int = 0
    elements_read: int = 0
    repeated_in_l1: int = 0
    bytes: int = 0
    read_in_passes: int = 0
    written_in_passes: int = 0
    exponentials: int = 0


def _direction(
    program: Program, parts: Sequence[Tensor], gpu: Gpu, least: int | None, notes: Sequence[str] = ()
) -> Direction:
    """Add up what a program does. `parts` are the logits, in one or several tensors."""
    whole = sum(part.numel() for part in parts)
    storages = {_identity(part) for part in parts}
    sums: dict[str, _Sum] = {}
    for launch in program.launches:
        one = sums.setdefault(launch.kernel.name, _Sum(launch.kernel))
        one.launches += 1
        _add(one, launch, storages, whole)
    reports = tuple(
        KernelReport(
            one.kernel.name,
            one.launches,
            len(one.kernel.candidates),
            *_worst(one.kernel.candidates),
            tuple(sorted({candidate.warps for candidate in one.kernel.candidates})),
            64 if INDEXES_WITH_64_BITS.search(one.kernel.source) else 32,
            one.elements_read / whole,
            one.repeated_in_l1,
            one.bytes,
        )
        for one in sums.values()
    )
    results = {_identity(result) for result in program.results if result.dtype == parts[0].dtype}
    wide = [
        buffer
        for buffer in program.buffers
        if buffer.numel() >= PART_OF_A_PASS * whole
        and buffer.dtype.is_floating_point
        and buffer.dtype.itemsize >= 4
        and _identity(buffer) not in results
    ]
    moved = sum(one.bytes for one in sums.values()) + sum(size for _, size in program.operations)
    if moved < 0.99 * (least or 1):
        raise BackendUnavailable(
            f"inspect cannot follow the kernels that torch {torch.__version__} generated: it finds {moved} bytes moved, fewer "
            "than there have to be. Nothing else in this library depends on it."
        )
    return Direction(
        kernels=len(program.launches) + len(program.operations),
        logits_reads=_passes(sum(one.read_in_passes for one in sums.values()), whole),
        gradient_writes=_passes(sum(one.written_in_passes for one in sums.values()), whole),
        nxv_float32_buffers=_passes(sum(buffer.numel() for buffer in wide), whole),
        registers=max((report.registers for report in reports), default=0),
        spills=max((report.spills for report in reports), default=0),
        shared_bytes=max((report.shared_bytes for report in reports), default=0),
        bytes=moved,
        minimum_bytes=least,
        exponentials_per_logit=round(sum(one.exponentials for one in sums.values()) / whole, 3),
        seconds_by_bandwidth=moved / gpu.bandwidth,
        kernel_reports=reports,
        operations=tuple(name for name, _ in program.operations),
        notes=tuple(notes),
    )


def _passes(elements: int, whole: int) -> int:
    return math.ceil(elements / whole - 1e-6)


def _worst(candidates: tuple[Candidate, ...]) -> tuple[int, int, int]:
    return (
        max(one.registers for one in candidates),
        max(one.spilled_bytes for one in candidates),
        max(one.shared_bytes for one in candidates),
    )


def _add(one: _Sum, launch: Launch, logits: set[int], whole: int) -> None:
    constants = launch.kernel.candidates[0].constants
    analysis = analyse(launch.kernel.source, {**constants, **_numbers(launch.arguments)})
    sizes = {**analysis.sizes, **_numbers(launch.arguments)}

    def elements(axes: frozenset[str]) -> int:
        return math.prod(_size(axis, sizes, launch) for axis in axes)

    one.exponentials += sum(count * elements(axes) for count, axes in analysis.exponentials)
    seen: dict[tuple[str, bool, str], set[int | None]] = {}
    for access in analysis.accesses:
        tensor = launch.arguments.get(access.parameter)
        if not isinstance(tensor, Tensor) or (access.conditional and elements(access.axes) > len(tensor)):
            continue
        loops = seen.setdefault((access.parameter, access.is_store, access.address), set())
        if access.loop in loops:
            continue
        again = bool(loops) and not access.is_store
        loops.add(access.loop)
        # Padding is masked, and what all columns of a row share is read from memory once.
        touched = min(elements(access.axes), tensor.numel())
        if again and _stays(launch, sizes, tensor):
            one.repeated_in_l1 += 1
            continue
        one.bytes += touched * tensor.element_size()
        in_passes = touched if touched >= PART_OF_A_PASS * whole else 0
        if access.is_store:
            one.written_in_passes += in_passes
        if _identity(tensor) in logits and not access.is_store:
            one.elements_read += touched
            one.read_in_passes += in_passes


def _stays(launch: Launch, sizes: Mapping[str, int], tensor: Tensor) -> bool:
    """Whether what a program read in one loop is still in L1 when it comes back to it, in every configuration."""
    walked = math.prod(size for name, size in sizes.items() if name.startswith("r") and name.endswith("numel"))
    return all(
        walked
        * candidate.constants.get("XBLOCK", 1)
        * tensor.element_size()
        * min(RESIDENT_PROGRAMS, 64 // candidate.warps)
        <= STAYS_IN_L1
        for candidate in launch.kernel.candidates
    )


def _size(axis: str, sizes: Mapping[str, int], launch: Launch) -> int:
    if axis == "c":
        return sizes["n_cols"] if "n_cols" in sizes else sizes["V"]
    return launch.grid[0] if launch.grid else sizes[f"{axis}numel"]


def _numbers(arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if not isinstance(value, Tensor)}


def _identity(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def analyse(source: str, constants: Mapping[str, Any]) -> Analysis:
    """Look through the source of one Triton function.

    Args:
        source: the function, with or without decorators.
        constants: what is known of its parameters, to tell which branches are compiled.
    """
    function = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)][-1]  # after its helpers
    reader = _Reader(constants, {argument.arg for argument in function.args.args})
    reader.read(function.body)
    return Analysis(tuple(reader.accesses), tuple(reader.exponentials), reader.sizes)


class _Reader:
    """Follows, statement by statement, what each variable runs over."""

    def __init__(self, constants: Mapping[str, Any], parameters: set[str]) -> None:
        self.constants, self.parameters = constants, parameters
        self.axes: dict[str, frozenset[str]] = {}
        self.origin: dict[str, str] = {}
        """Variables that are a pointer plus an offset, by the parameter that they come from."""
        self.accesses: list[Access] = []
        self.exponentials: list[tuple[int, frozenset[str]]] = []
        self.sizes: dict[str, int] = {}
        self.loop: int | None = None
        self.loops = 0
        self.conditional = False

    def read(self, statements: list[ast.stmt]) -> None:
        for statement in statements:
            if isinstance(statement, ast.For):
                outer, self.loop, self.loops = self.loop, self.loops, self.loops + 1
                self.read(statement.body)
                self.loop = outer
            elif isinstance(statement, ast.If):
                self._branch(statement)
            elif isinstance(statement, ast.Assign | ast.AugAssign | ast.AnnAssign):
                self._assign(statement)
            elif isinstance(statement, ast.Expr):
                self._axes_of(statement.value)

    def _branch(self, statement: ast.If) -> None:
        try:
            known = {"__builtins__": {}, **self.constants}
            taken = eval(compile(ast.Expression(statement.test), "test", "eval"), known)
        except Exception:  # noqa: BLE001  not known when it is compiled
            self._axes_of(statement.test)
            outer, self.conditional = self.conditional, True
            self.read(statement.body)
            self.read(statement.orelse)
            self.conditional = outer
        else:
            self.read(statement.body if taken else statement.orelse)

    def _assign(self, statement: ast.Assign | ast.AugAssign | ast.AnnAssign) -> None:
        target = statement.targets[0] if isinstance(statement, ast.Assign) else statement.target
        value = statement.value
        if value is None:
            return
        axes = self._axes_of(value)
        if isinstance(statement, ast.AugAssign):
            axes |= self._axes_of(target)
        for name in target.elts if isinstance(target, ast.Tuple) else [target]:
            if not isinstance(name, ast.Name):
                continue
            if name.id.endswith("index") and name.id != "rindex":  # xindex, r0_index
                self.axes[name.id] = frozenset({name.id.removesuffix("index")})
            else:
                self.axes[name.id] = frozenset({ACROSS[name.id]}) if name.id in ACROSS else axes
            pointer = self._pointer(value)
            if pointer is not None and name.id != pointer:
                self.origin[name.id] = pointer
            if name.id.endswith("numel") and isinstance(value, ast.Constant) and isinstance(value.value, int):
                self.sizes[name.id] = value.value

    def _axes_of(self, node: ast.AST) -> frozenset[str]:
        if isinstance(node, ast.Name):
            return self.axes.get(node.id, frozenset())
        if isinstance(node, ast.Call):
            return self._call(node)
        if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Tuple):
            # [:, None] follows a reduction, which leaves the rows.
            return frozenset(axis for axis in self._axes_of(node.value) if not axis.startswith("r"))
        found: frozenset[str] = frozenset()
        for child in ast.iter_child_nodes(node):
            found |= self._axes_of(child)
        return found

    def _call(self, node: ast.Call) -> frozenset[str]:
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        arguments = frozenset[str]().union(*(self._axes_of(child) for child in (*node.args, *node.keywords)))
        if isinstance(node.func, ast.Attribute):
            arguments |= self._axes_of(node.func.value)
        if name in ("load", "store"):
            pointer = self._pointer(node.args[0])
            axes = self._axes_of(node.args[0])
            if pointer is not None and pointer in self.axes:
                axes |= self.axes[pointer]
            access = (ast.unparse(node.args[0]), name == "store", axes, self.loop, self.conditional)
            self.accesses.append(Access(pointer or "", *access))
            return axes if name == "load" else frozenset()
        if name in EXPONENTIALS:
            self.exponentials.append((EXPONENTIALS[name], arguments))
        if name in ("sum", "max") and len(node.args) == 1:  # over everything
            return frozenset()
        return arguments

    def _pointer(self, node: ast.AST) -> str | None:
        """The parameter that a sum starts from, if it is one with a pointer."""
        while isinstance(node, ast.BinOp):
            node = node.left
        if not isinstance(node, ast.Name):
            return None
        if node.id in self.origin:
            return self.origin[node.id]
        return node.id if node.id in self.parameters else None
