"""How near a measurement comes to what memory allows: the bytes that must move, and the bandwidth of this device.

Shapes: N rows, V vocabulary, K labels a row.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

from compiled_logprobs.machine.clock import MIB, cache_bytes, free_memory, measurable, time_call
from compiled_logprobs.problem import Problem, accumulation_dtype, bytes_of_results

REPETITIONS = 7
LAUNCHES = {"cpu": 1, "cuda": 4}
"""Between two looks at the clock, so that what one launch takes to begin and to end does not count."""
CACHES = 4
"""Size of a buffer in caches, so that little of it is still there in the next repetition."""
LEAST = {"cpu": 64 * MIB, "cuda": 2048 * MIB}
"""Size of a buffer behind a small cache; a GPU takes some microseconds to get going."""
SHARE_OF_FREE = 1 / 16


@dataclass(frozen=True)
class Bandwidth:
    """Bytes a second, measured on a buffer of float32 with torch's own kernels, by as many threads as torch uses."""

    read: float
    """By a maximum over the buffer."""
    copy: float
    """By writing the negative to another buffer; bytes read and bytes written."""
    in_place: float
    """By negating within the buffer; bytes read and bytes written. A CPU is faster at it than at writing to another
    buffer, since it fetches every line that it writes, and here it has that line already."""
    buffer_bytes: int
    """What the buffer had; where memory is short it may fit into the cache, and then these are figures of the cache."""


def minimum_bytes(problem: Problem) -> int:
    """Bytes that every backend has to move between memory and chip.

    Forward reads the logits once; backward, which begins when forward has returned, reads them again and writes their
    gradient, in place or not. Labels, results, temperatures and what a row keeps for backward are counted, with labels
    in int64.
    """
    return forward_bytes(problem) + backward_bytes(problem)


def forward_bytes(problem: Problem) -> int:
    """The part of `minimum_bytes` that forward moves, with what it keeps for backward."""
    return _logits_bytes(problem) + problem.rows * (bytes_of_results(problem) + _bytes_beside(problem))


def backward_bytes(problem: Problem) -> int:
    """The part of `minimum_bytes` that backward moves; 0 where no gradient is needed."""
    if not problem.needs_grad:
        return 0
    upstream = bytes_of_results(problem._replace(argmax=False, sum_p_squared=False))  # which have no gradient
    return 2 * _logits_bytes(problem) + problem.rows * (upstream + _bytes_beside(problem))


def percent_of_bandwidth(problem: Problem, seconds: float, bandwidth: Bandwidth) -> float:
    """The time that moving `minimum_bytes` takes at `bandwidth`, in per cent of `seconds`.

    Forward is held against `read`, backward against `copy` or, where the problem says so, `in_place`. Logits that fit
    into the cache, and are there already, can give more than 100.
    """
    backward = bandwidth.in_place if problem.inplace_backward else bandwidth.copy
    shortest = forward_bytes(problem) / bandwidth.read + backward_bytes(problem) / backward
    return 100 * shortest / seconds


def measured_bandwidth(device: torch.device | str) -> Bandwidth:
    """The best of several repetitions; measured once for a device and a number of threads, then remembered."""
    return _measured(measurable(device), torch.get_num_threads())


@cache
def _measured(device: torch.device, threads: int) -> Bandwidth:
    size = _buffer_bytes(device)
    source, target = (torch.ones(size // 4, dtype=torch.float32, device=device) for _ in range(2))

    launches = LAUNCHES[device.type]

    def best(function: Callable[[], object]) -> float:
        def several() -> None:
            for _ in range(launches):
                function()

        return min(time_call(several, device).seconds for _ in range(REPETITIONS)) / launches

    return Bandwidth(
        read=size / best(source.amax),
        copy=2 * size / best(lambda: torch.neg(source, out=target)),
        in_place=2 * size / best(source.neg_),
        buffer_bytes=size,
    )


def _buffer_bytes(device: torch.device) -> int:
    size = max(CACHES * cache_bytes(device), LEAST[device.type])
    size = min(size, int(free_memory(device) * SHARE_OF_FREE))
    return max(size // MIB, 1) * MIB


def _logits_bytes(problem: Problem) -> int:
    return problem.rows * problem.vocab * problem.dtype.itemsize


def _bytes_beside(problem: Problem) -> int:
    """What forward and backward move alike for a row: labels, what is kept, the temperature."""
    number = accumulation_dtype(problem.dtype).itemsize
    kept = 2 * number if problem.needs_grad else 0  # the maximum and the logarithm of the sum: written, then read
    temperature = number if problem.temperature == "per_token" else 0
    return problem.labels_per_row * torch.int64.itemsize + kept + temperature
