"""What backends do on a GPU, read from the code that is generated and assembled for it. Nothing here is measured.

A kernel's time is the largest of three: its bytes over the bandwidth, its exponentials over the rate of the special
function units, its instructions over the rate at which warps are issued. `machine_code.py` counts all three a thread;
here they are multiplied with the threads of all launches. Two rules are not obvious:

* What threads load of a small tensor, such as labels, is moved once. Of the logits and whatever else has their size,
  whole passes are counted; a second one not where what all programs on a multiprocessor read fits into `STAYS_IN_L1`.
* Of several configurations that Inductor's autotuner tries on the device, the one of the fewest instructions is timed.
  Registers, spills and shared memory are those of the worst.

Shapes: N rows, V vocabulary; B sequences of T positions, N = B x T.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from compiled_logprobs.backends import compiled, compiled_code, get_backend
from compiled_logprobs.errors import BackendUnavailable, InputError
from compiled_logprobs.machine.bandwidth import backward_bytes, forward_bytes
from compiled_logprobs.operation.contract import Inputs, Upstream, Wanted, wanted_by
from compiled_logprobs.problem import Layout, Problem, layout_of, problem_to_dict
from tests.gpu_code.data_sheets import WARP, DataSheet
from tests.gpu_code.generated_code import Assembled, Kernel, Launch, Program, generate, record, record_launches
from tests.gpu_code.machine_code import Work, read, trips

NOT_MEASURED = "from generated code, not measured"
STAYS_IN_L1 = 64 * 1024  # bytes: half of the L1 of the smallest of the GPUs here, an L40S
PART_OF_A_PASS = 0.05  # of the logits; tensors with fewer elements are small
LARGEST_BLOCK = 16384
"""Columns that a program reads at most at a time. Rows may be padded to whole blocks, and what is loaded with them."""
RESIDENT_PROGRAMS = 32  # on a multiprocessor, at most
INDEXES_WITH_64_BITS = re.compile(r"(program_id\(0\)|row|row_stride)\.to\(tl\.int64\)")
SEQUENCES = 8  # B of a slice, at most

Function = Callable[..., Any]


@dataclass(frozen=True)
class KernelReport:
    """One kernel, over all its launches in a direction."""

    name: str
    launches: int
    candidates: int  # configurations that the autotuner chooses from on the device; the next three are the worst's
    registers: int
    spills: int  # bytes a thread
    shared_bytes: int  # a program
    warps: tuple[int, ...]  # of a program, each number that a configuration takes
    index_bits: int
    logits_reads: float  # passes over the logits' memory; less than 1 where only single elements are read
    repeated_loads_in_l1: int
    bytes: int
    instructions_per_logit: float  # the fewest of any configuration
    exponentials_per_logit: float
    seconds: float  # the largest of its three times


@dataclass(frozen=True)
class Direction:
    """Forward or backward."""

    kernels: int  # launches of generated kernels, and of operations of torch that are not generated
    logits_reads: int  # whole passes over the logits' memory
    gradient_writes: int  # whole passes that write N x V
    nxv_float32_buffers: int  # allocated by the way: N x V elements, float32 or wider, no results in the logits' dtype
    registers: int  # the most of any kernel, in any configuration; the next two likewise
    spills: int
    shared_bytes: int
    bytes: int  # between memory and chip
    minimum_bytes: int | None  # that every backend has to move; None where it is not this library's operation
    exponentials_per_logit: float
    instructions_per_logit: float
    seconds_by_bandwidth: float  # what `bytes` take at the data sheet's bandwidth; the next two likewise
    seconds_by_exponentials: float  # with logarithms and reciprocals, which the same units compute
    seconds_by_issue: float
    seconds: float  # the sum over the kernels of the largest of their three times
    kernel_reports: tuple[KernelReport, ...]
    operations: tuple[str, ...]  # those of torch that are not generated
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Inspection:
    """One problem on one GPU. A backend's `backward` is None where none is asked for."""

    gpu: DataSheet
    problem: Problem
    forward: Direction
    backward: Direction | None
    flash_attn: dict[str, Direction | None] | str  # the same problem, or the reason why its kernels are not here

    def to_dict(self) -> dict[str, Any]:
        """For programs: numbers, strings, lists and dictionaries."""
        plain = asdict(self)
        return {
            **plain,
            "note": NOT_MEASURED,
            "gpu": {**plain["gpu"], "bandwidth_from": "data sheet"},
            "arch": self.gpu.arch,
            "torch": torch.__version__,
            "problem": problem_to_dict(self.problem),
            "layout": self.problem.layout,
            "flash_attn": {"why_not": self.flash_attn} if isinstance(self.flash_attn, str) else plain["flash_attn"],
        }


def inspect(problem: Problem, gpu: DataSheet) -> Inspection:
    """Generate, assemble and count the kernels of the `compiled` backend, and of flash-attn beside it.

    Args:
        problem: on cuda, with one label a row. Its alignment becomes that of its layout.
        gpu: what to compile for.

    Raises:
        BackendUnavailable: the generated code cannot be followed.
        InputError: these rows cannot be a slice.
    """
    logits = logits_of(problem.rows, problem.vocab, problem.dtype, problem.layout)
    problem = problem._replace(aligned=layout_of(logits)[1])
    backward = _backward(problem, logits, gpu) if problem.needs_grad else None
    return Inspection(gpu, problem, _forward(problem, logits, gpu), backward, _flash_attn(problem, logits, gpu))


def logits_of(rows: int, vocab: int, dtype: torch.dtype, layout: Layout = "flat") -> Tensor:
    """Logits without memory: [N, V], or for a slice [B, T, V] with B as large as it can be, up to `SEQUENCES`."""
    if layout == "flat":
        return _empty(rows, vocab, dtype=dtype)
    if layout == "rows":
        return _empty(rows, vocab + 64, dtype=dtype)[:, :vocab]
    batch = max(n for n in range(1, SEQUENCES + 1) if rows % n == 0)
    if batch in (1, rows):
        raise InputError(
            f"got {rows} rows for a slice, which are no several sequences of several positions; 8192 = 8 x 1024 is "
            "valid. Take another number."
        )
    return _empty(batch, rows // batch + 1, vocab, dtype=dtype)[:, :-1]


def inspect_function(function: Function, arguments: Mapping[str, Tensor], gpu: DataSheet) -> Direction:
    """What torch.compile makes of any `function(**arguments)` with N dynamic, on tensors on the meta device.

    One of them is `logits` [N, V].
    """
    generated = generate(function, arguments, gpu, partial(compiled_code.mark, hints=None), {})
    return _direction(record(generated, [arguments], gpu), [arguments["logits"]], gpu, None)


def _recorded(
    function: Function, calls: Sequence[Mapping[str, Tensor]], gpu: DataSheet, hints: list[int] | None
) -> Program:
    return record(generate(function, calls[0], gpu, partial(compiled_code.mark, hints=hints)), calls, gpu)


def _forward(problem: Problem, logits: Tensor, gpu: DataSheet) -> Direction:
    key = compiled.key_for(problem)
    parts = _parts(logits, key, maps=key.reads_blocks)
    calls = [_arguments(part, key, maps=key.reads_blocks) for part in parts]
    key, hints = _of_parts(key, parts), compiled_code.hints_for(key, calls[0]["logits"], "forward")
    program = _recorded(compiled_code.forward_function(key, wanted_by(problem)), calls, gpu, hints)
    return _direction(program, parts, gpu, forward_bytes(problem), _notes(parts))


def _backward(problem: Problem, logits: Tensor, gpu: DataSheet) -> Direction:
    key = compiled.key_for(problem)
    maps = key.reads_blocks and not problem.inplace_backward
    parts = _parts(logits, key, maps=maps)
    calls = []
    for part in parts:
        rows = part.shape[:-1]
        upstream = {"stats": _empty(2 + problem.entropy, *rows), "grad_log_probs": _empty(*rows, 1)}
        if problem.entropy:
            upstream["grad_entropy"] = _empty(*rows)
        if problem.logsumexp:
            upstream["grad_logsumexp"] = _empty(*rows)
        if len(parts) > 1 and not problem.inplace_backward:
            upstream["out"] = _empty(*part.shape, dtype=problem.dtype)
        calls.append(_arguments(part, key, maps=maps, **upstream))
    key, hints = _of_parts(key, parts), compiled_code.hints_for(key, calls[0]["logits"], "backward")
    program = _recorded(compiled_code.backward_function(key, problem.inplace_backward), calls, gpu, hints)
    return _direction(program, parts, gpu, backward_bytes(problem), _notes(parts))


def _parts(logits: Tensor, key: compiled_code.Key, *, maps: bool) -> list[Tensor]:
    """What `compiled` computes at once, each."""
    return [logits[piece] for piece in compiled.pieces_of(logits, key, maps=maps)] or [logits]


def _of_parts(key: compiled_code.Key, parts: Sequence[Tensor]) -> compiled_code.Key:
    return key._replace(layout=layout_of(parts[0])[0])


def _arguments(part: Tensor, key: compiled_code.Key, *, maps: bool, **others: Tensor) -> dict[str, Tensor]:
    labels = _empty(*part.shape[:-1], 1, dtype=torch.int64)
    arguments = {**compiled.arguments_of(Inputs(part, labels, 1.0, -100)), **others}
    return compiled.mapped(arguments) if maps and part.ndim > 2 else arguments


def _notes(parts: Sequence[Tensor]) -> tuple[str, ...]:
    rows = parts[0].shape[:-1].numel()
    return (f"in {len(parts)} parts of at most {rows} rows",) if len(parts) > 1 else ()


def _flash_attn(problem: Problem, logits: Tensor, gpu: DataSheet) -> dict[str, Direction | None] | str:
    """flash-attn's kernels as its backend launches them, on tensors without memory."""
    backend = get_backend("flash_attn")
    reason = backend.why_not(problem)
    if reason is not None:
        return reason
    from compiled_logprobs.backends import flash_attn, flash_attn_rows  # the second imports triton

    owners = dict.fromkeys(("cross_entropy_fwd_kernel", "cross_entropy_bwd_kernel"), flash_attn.kernel_module())
    owners["zero_ignored_rows"] = flash_attn_rows
    rows, labels = logits.shape[:-1], _empty(*logits.shape[:-1], 1, dtype=torch.int64)
    inputs, stats = Inputs(logits, labels, 1.0, -100), _empty(2, *rows)

    def forward() -> list[Tensor]:
        return [backend.forward(inputs, Wanted()).log_probs]

    def backward() -> list[Tensor]:
        return [backend.backward(inputs, stats, Upstream(_empty(*rows, 1)), inplace=problem.inplace_backward)]

    def direction(function: Callable[[], list[Tensor]], least: int) -> Direction:
        return _direction(record_launches(function, owners, gpu), [logits], gpu, least)

    return {
        "forward": direction(forward, forward_bytes(problem)),
        "backward": direction(backward, backward_bytes(problem)) if problem.needs_grad else None,
    }


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _direction(
    program: Program, parts: Sequence[Tensor], gpu: DataSheet, least: int | None, notes: tuple[str, ...] = ()
) -> Direction:
    """Add up what a program does. `parts` are the logits, in one or several tensors."""
    whole = sum(part.numel() for part in parts)
    kernels = {launch.kernel.name: launch.kernel for launch in program.launches}
    counts: dict[str, Counter[str]] = {name: Counter() for name in kernels}
    for launch in program.launches:
        counts[launch.kernel.name] += _count(launch, parts, whole)
    reports = tuple(_report(kernels[name], counts[name], gpu, whole) for name in kernels)
    total = sum(counts.values(), Counter())
    results = {_identity(result) for result in program.results if result.dtype == parts[0].dtype}
    wide = sum(
        buffer.numel()
        for buffer in program.buffers
        if buffer.numel() >= PART_OF_A_PASS * whole
        and buffer.dtype.is_floating_point
        and buffer.dtype.itemsize >= 4
        and _identity(buffer) not in results
    )
    by_torch = sum(size for _, size in program.operations)
    moved = total["bytes"] + by_torch
    if moved < 0.99 * (least or 1):
        raise BackendUnavailable(
            f"the kernels that torch {torch.__version__} generated cannot be followed: {moved} bytes are moved, fewer "
            "than there have to be. Nothing in the library depends on it."
        )
    return Direction(
        kernels=len(program.launches) + len(program.operations),
        logits_reads=_passes(total["read in passes"], whole),
        gradient_writes=_passes(total["written in passes"], whole),
        nxv_float32_buffers=_passes(wide, whole),
        registers=max((report.registers for report in reports), default=0),
        spills=max((report.spills for report in reports), default=0),
        shared_bytes=max((report.shared_bytes for report in reports), default=0),
        bytes=moved,
        minimum_bytes=least,
        exponentials_per_logit=round(total["exponentials"] / whole, 3),
        instructions_per_logit=round(total["instructions"] / whole, 2),
        seconds_by_bandwidth=moved / gpu.bandwidth,
        seconds_by_exponentials=total["special"] / gpu.special_per_second,
        seconds_by_issue=total["instructions"] / gpu.instructions_per_second,
        seconds=sum(report.seconds for report in reports) + by_torch / gpu.bandwidth,
        kernel_reports=reports,
        operations=tuple(name for name, _ in program.operations),
        notes=notes,
    )


def _report(kernel: Kernel, count: Counter[str], gpu: DataSheet, whole: int) -> KernelReport:
    configurations = kernel.configurations
    return KernelReport(
        name=kernel.name,
        launches=count["launches"],
        candidates=len(configurations),
        registers=max(each.registers for each in configurations),
        spills=max(each.spilled_bytes for each in configurations),
        shared_bytes=max(each.shared_bytes for each in configurations),
        warps=tuple(sorted({each.warps for each in configurations})),
        index_bits=64 if INDEXES_WITH_64_BITS.search(kernel.source) else 32,
        logits_reads=count["logits read"] / whole,
        repeated_loads_in_l1=count["repeated in L1"],
        bytes=count["bytes"],
        instructions_per_logit=round(count["instructions"] / whole, 3),
        exponentials_per_logit=round(count["exponentials"] / whole, 3),
        seconds=max(
            count["bytes"] / gpu.bandwidth,
            count["special"] / gpu.special_per_second,
            count["instructions"] / gpu.instructions_per_second,
        ),
    )


def _passes(elements: float, whole: int) -> int:
    return math.ceil(elements / whole - 1e-6)


def _identity(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _count(launch: Launch, logits: Sequence[Tensor], whole: int) -> Counter[str]:
    """What a launch does in its configuration of the fewest instructions: bytes, instructions, elements."""
    numbers = {name: value for name, value in launch.arguments.items() if not isinstance(value, Tensor)}

    def work_of(configuration: Assembled) -> tuple[int, int, Work]:
        loops = trips(launch.kernel.source, {**numbers, **configuration.constants})
        work = read(configuration.ptx, configuration.sass, configuration.parameters, loops)
        programs = math.prod(launch.grid) if launch.grid else _programs(numbers, configuration.constants)
        return programs * WARP * configuration.warps, programs, work

    works = [(*work_of(each), each) for each in launch.kernel.configurations]
    threads, programs, work, configuration = min(works, key=lambda each: each[0] * each[2].instructions)
    count = Counter(
        launches=1,
        instructions=threads * work.instructions,
        special=threads * work.special,
        exponentials=threads * work.exponentials,
    )
    resident = min(RESIDENT_PROGRAMS, 64 // configuration.warps)
    storages = {_identity(part) for part in logits}
    padding = _padded(logits[0].shape[-1]) / logits[0].shape[-1]
    accesses = [("read", *loaded) for loaded in work.loaded.items()]
    accesses += [("written", *stored) for stored in work.stored.items()]
    for way, name, size in accesses:
        tensor = launch.arguments[name]
        if not isinstance(tensor, Tensor):  # a stride, which addresses are computed from as well
            continue
        elements = threads * size / tensor.element_size()
        # A slice is handed over as the memory that it lies in, of which nothing else is touched.
        numel = min(tensor.numel(), max(part.numel() for part in logits))
        if numel < PART_OF_A_PASS * whole or elements < 0.95 * numel:
            touched = min(int(elements), numel)
        else:
            passes = max(1, math.ceil(elements / numel / padding / 1.02))
            if way == "read" and threads * size / passes / programs * resident <= STAYS_IN_L1:
                count["repeated in L1"] += passes - 1
                passes = 1
            touched = passes * numel
        count["bytes"] += touched * tensor.element_size()
        if way == "written" or _identity(tensor) in storages:
            count[f"{way} in passes"] += touched if touched >= PART_OF_A_PASS * whole else 0
            count["logits read"] += touched if way == "read" else 0
    return count


def _programs(numbers: Mapping[str, Any], blocks: Mapping[str, Any]) -> int:
    """Of a kernel of Inductor's, from its sizes and blocks."""
    return math.prod(
        -(-numbers[f"{x}numel"] // blocks.get(f"{x.upper()}BLOCK", 1)) for x in "xyz" if f"{x}numel" in numbers
    )


def _padded(columns: int) -> int:
    """To whole blocks, or for a short row to a power of two."""
    return -(-columns // LARGEST_BLOCK) * LARGEST_BLOCK if columns > LARGEST_BLOCK else 1 << (columns - 1).bit_length()
