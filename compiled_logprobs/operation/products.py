"""Products of matrices, whose terms are added up in the accumulation dtype.

For a CPU without instructions for half precision torch multiplies it several times, float16 hundreds of times, as
slowly as float32, and takes memory for a copy of an argument. There the product is computed in float32, a tile after
another, and rounded once.

Shapes: [M, K] times [K, N].
"""

from collections.abc import Iterator
from functools import cache
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from compiled_logprobs.problem import accumulation_dtype

TILE = 2**10
"""Rows or columns of a tile, at most; three tiles in float32 are in memory at once, at most 12 MiB."""
BLOCK = 2**11
"""Rows of a product that are in half precision at once, where it is added to a sum in float32."""
_INSTRUCTIONS = {torch.bfloat16: {"avx512_bf16", "amx_bf16", "bf16"}, torch.float16: {"avx512_fp16", "amx_fp16"}}
"""Any of these, as Linux names them for x86 and Arm."""


def multiply(a: Tensor, b: Tensor, out: Tensor, bias: Tensor | None = None) -> Tensor:
    """a @ b + bias, all of one dtype, in `out`; the bias is [N]."""
    if _needs_tiles(a):
        return _by_tiles(a, b, out, bias)
    return torch.mm(a, b, out=out) if bias is None else torch.addmm(bias, a, b, out=out)


def add_product(a: Tensor, b: Tensor, sums: Tensor) -> Tensor:
    """Add a @ b to `sums`, which are in the accumulation dtype."""
    if _needs_tiles(a):
        return _by_tiles(a, b, sums, sums)
    if sums.dtype == a.dtype:
        return sums.addmm_(a, b)
    part = a.new_empty(min(len(a), BLOCK), b.shape[-1])
    for rows in _slices(len(a), BLOCK):
        block = sums[rows]
        block += torch.mm(a[rows], b, out=part[: len(block)])
    return sums


def _needs_tiles(a: Tensor) -> bool:
    return a.device.type == "cpu" and a.dtype in _INSTRUCTIONS and not _INSTRUCTIONS[a.dtype] & _cpu_flags()


@cache
def _cpu_flags() -> frozenset[str]:
    """What the CPU has; nothing where neither the system nor torch says it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        known = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        return frozenset(name for name, is_there in known.items() if is_there is True)
    named = (line.partition(":") for line in lines)
    return next(
        (frozenset(flags.split()) for name, _, flags in named if name.strip() in ("flags", "Features")), frozenset()
    )


def _by_tiles(a: Tensor, b: Tensor, out: Tensor, start: Tensor | None) -> Tensor:
    """`start` + a @ b in `out`, rounded to its dtype; `start` may be `out`."""
    (m, k), n, wide = a.shape, b.shape[-1], accumulation_dtype(a.dtype)
    of_a, of_b, of_sum = (
        a.new_empty(min(height, TILE) * min(width, TILE), dtype=wide) for height, width in ((m, k), (k, n), (m, n))
    )
    start = None if start is None else start.expand(m, n)
    for rows, columns in product(_slices(m, TILE), _slices(n, TILE)):
        tile = out[rows, columns]
        total = of_sum[: tile.numel()].view(tile.shape)
        if start is None:
            total.zero_()
        else:
            total.copy_(start[rows, columns])
        for terms in _slices(k, TILE):
            total.addmm_(_copy(a[rows, terms], of_a), _copy(b[terms, columns], of_b))
        tile.copy_(total)
    return out


def _copy(tile: Tensor, memory: Tensor) -> Tensor:
    """Copy a tile into `memory`, in the order in which it lies: a copy across that order would be slow."""
    if tile.stride(0) == 1:
        return memory[: tile.numel()].view(tile.T.shape).copy_(tile.T).T
    return memory[: tile.numel()].view(tile.shape).copy_(tile)


def _slices(length: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, length)) for start in range(0, length, step))
