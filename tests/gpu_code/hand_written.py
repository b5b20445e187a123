"""The kernels of the `triton` backend, assembled as it launches them: counted for NVIDIA's GPUs, and read for AMD's.

Shapes: N rows, V vocabulary, K labels a row.
"""

import re
from collections.abc import Callable
from contextlib import ExitStack
from functools import cache
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from compiled_logprobs.backends import get_backend
from compiled_logprobs.machine.bandwidth import backward_bytes, forward_bytes
from compiled_logprobs.operation.contract import Inputs, Upstream, wanted_by
from compiled_logprobs.problem import Problem
from tests.gpu_code.data_sheets import DataSheet
from tests.gpu_code.generated_code import record_launches
from tests.gpu_code.inspection import Direction, _direction, logits_of

MI300 = ("hip", "gfx942", 64)
TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
}


@cache
def inspect_triton(problem: Problem, gpu: DataSheet) -> dict[str, Direction | None]:
    """What both directions do, for one label a row and one temperature; None for a backward that is not asked for."""
    logits = logits_of(problem.rows, problem.vocab, problem.dtype, problem.layout)
    forward, backward = _calls(problem, logits)

    def direction(call: Callable[[], list[Tensor]], least: int) -> Direction:
        return _direction(record_launches(call, _owners(), gpu), [logits], gpu, least)

    return {
        "forward": direction(forward, forward_bytes(problem)),
        "backward": direction(backward, backward_bytes(problem)) if problem.needs_grad else None,
    }


def assemble_for_amd(problem: Problem) -> dict[str, str]:
    """The machine code of each kernel for an MI300, by its name."""
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    code: dict[str, str] = {}

    class Recorder:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            def launch(*arguments: Any, **options: Any) -> None:
                values = {**dict(zip(self.kernel.arg_names, arguments, strict=False)), **options}
                kinds = {parameter.name: kind_of(parameter, values[parameter.name]) for parameter in parameters}
                constants = {(p.num,): values[p.name] for p in parameters if p.is_constexpr}
                settings = {name: value for name, value in options.items() if name not in kinds}
                source = ASTSource(self.kernel, kinds, constants, {})
                code[self.kernel.__name__] = compile(source, target=GPUTarget(*MI300), options=settings).asm["amdgcn"]

            parameters = self.kernel.params
            return launch

    def kind_of(parameter: Any, value: Any) -> str:
        if parameter.is_constexpr:
            return "constexpr"
        return TYPES[value.dtype] if isinstance(value, Tensor) else parameter.annotation_type or "fp32"

    with ExitStack() as stack:
        stack.enter_context(patch.object(torch.version, "hip", "6.4"))
        for name, owner in _owners().items():
            stack.enter_context(patch.object(owner, name, Recorder(getattr(owner, name))))
        for call in _calls(problem, logits_of(problem.rows, problem.vocab, problem.dtype, problem.layout)):
            call()
    return code


def registers_of(code: str) -> tuple[int, int]:
    """Vector registers of a thread, and how many are spilled, as the assembler for AMD's GPUs notes them."""
    registers, spilled = (re.search(rf"\.vgpr_{name}:\s+(\d+)", code) for name in ("count", "spill_count"))
    assert registers is not None and spilled is not None
    return int(registers[1]), int(spilled[1])


def _owners() -> dict[str, Any]:
    from compiled_logprobs.backends import triton_gradient, triton_kernels  # import triton

    return {
        "reduce_chunks": triton_kernels,
        "combine_chunks": triton_kernels,
        "differentiate": triton_gradient,
    }


def _calls(problem: Problem, logits: Tensor) -> tuple[Callable[[], list[Tensor]], Callable[[], list[Tensor]]]:
    """Forward and backward on tensors without memory."""
    backend, rows = get_backend("triton"), logits.shape[:-1]

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    labels = empty(*rows, problem.labels_per_row, dtype=torch.int64)
    temperature = empty(*rows) if problem.temperature == "per_token" else 0.7
    inputs = Inputs(logits, labels, temperature, -100)
    entropy = empty(*rows) if problem.entropy else None

    def forward() -> list[Tensor]:
        results = backend.forward(inputs, wanted_by(problem))
        return [result for result in results if result is not None]

    def backward() -> list[Tensor]:
        stats, upstream = empty(3 if problem.entropy else 2, *rows), Upstream(empty(*labels.shape), entropy)
        return [backend.backward(inputs, stats, upstream, inplace=problem.inplace_backward)]

    return forward, backward
