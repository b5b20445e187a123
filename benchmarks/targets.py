"""What this library has set itself for a CPU, and whether the best of its own backends reached it in a run."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

from benchmarks.candidates import AUTO, COMPILE
from benchmarks.results import Cell, Result
from compiled_logprobs.backends import EAGER
from compiled_logprobs.decision import MARGIN
from compiled_logprobs.problem import short_name

FORWARD_SHAPE, BACKWARD_SHAPE = (512, 151936), (256, 151936)
LARGE_VOCAB = 32000
LARGE_BYTES = 32 * 2**20
"""Of logits whose memory is looked at: resident memory is told to some hundred KiB, which is 1 % of this."""
SEVERAL_ROWS = 16
"""For errors: of fewer, one candidate's may be small by luck."""


@dataclass(frozen=True)
class Target:
    """One line of the list."""

    what: str
    limit: float
    at_least: bool
    """Whether the limit is the least that is wanted, or the most."""
    reached: float | None
    """The worst where several problems count; None where none of them was measured."""
    where: str
    """The problem and the backend that it was reached with."""

    @property
    def met(self) -> bool | None:
        if self.reached is None:
            return None
        return self.reached >= self.limit if self.at_least else self.reached <= self.limit


class _Reached(NamedTuple):
    value: float
    where: str


def targets(cells: Sequence[Cell]) -> list[Target]:
    """All targets, by dtype, with what `cells` reached."""
    by_dtype: dict[str, list[Cell]] = {}
    for cell in cells:
        by_dtype.setdefault(short_name(cell.problem.dtype), []).append(cell)
    return [target for dtype, some in by_dtype.items() for target in _of_one_dtype(dtype, some)]


def _of_one_dtype(dtype: str, cells: list[Cell]) -> Iterator[Target]:
    def at_least(what: str, limit: float, reached: Iterator[_Reached]) -> Target:
        worst = min(reached, default=None)
        return Target(f"{dtype}: {what}", limit, True, *(worst or (None, "")))

    def at_most(what: str, limit: float, reached: Iterator[_Reached]) -> Target:
        worst = max(reached, default=None)
        return Target(f"{dtype}: {what}", limit, False, *(worst or (None, "")))

    forward = [cell for cell in cells if cell.mode == "forward"]
    yield at_least(
        f"forward, {_x(FORWARD_SHAPE)}, times torch.compile's speed",
        2.0,
        _over_compile(forward, FORWARD_SHAPE),
    )
    yield at_least(f"forward, {_x(FORWARD_SHAPE)}, % of a bare read", 50.0, _of_read(forward))
    for mode, what, limit in (("backward", "forward and backward", 1.7), ("inplace", "in place", 3.0)):
        yield at_least(
            f"{what}, {_x(BACKWARD_SHAPE)}, times torch.compile's speed",
            limit,
            _over_compile([cell for cell in cells if cell.mode == mode], BACKWARD_SHAPE),
        )
    yield at_most("forward with entropy, times the time without", 1.35, _entropy_over_forward(cells))
    for mode, what, share in (
        ("forward", "forward", 0.01),
        ("backward", "forward and backward", 1.02),
        ("inplace", "in place", 0.02),
    ):
        yield at_most(f"{what}, extra memory x logits", share, _memory([cell for cell in cells if cell.mode == mode]))
    yield at_most("RMSE against float64, times eager's", 2.0, _rmse(cells))
    yield at_most("auto, times the time of the best backend", 1.10, _auto_over(cells, _best))
    yield at_most(
        "auto, times the time of eager",
        1 + MARGIN,
        _auto_over(cells, lambda cell: cell.results[EAGER] if cell.has(EAGER) else None),
    )


def _best(cell: Cell) -> Result | None:
    """The fastest of this library's backends by name."""
    named = [one for one in cell.measured(ours=True) if one.name != AUTO]
    return min(named, key=lambda one: median(one.seconds), default=None)


def _over_compile(cells: list[Cell], shape: tuple[int, int]) -> Iterator[_Reached]:
    for cell in cells:
        best = _best(cell)
        if _shape(cell) == shape and best and cell.has(COMPILE):
            yield _Reached(cell.times_as_fast(best.name, COMPILE).median, best.name)


def _of_read(cells: list[Cell]) -> Iterator[_Reached]:
    for cell in cells:
        best = _best(cell)
        if _shape(cell) == FORWARD_SHAPE and best:
            yield _Reached(cell.percent_of_read(best.name), best.name)


def _entropy_over_forward(cells: list[Cell]) -> Iterator[_Reached]:
    """Each as a share of its own bare read: the two were not timed in the same rounds."""
    shares = {
        (cell.mode, _shape(cell)): (cell.percent_of_read(best.name), best.name)
        for cell in cells
        if (best := _best(cell))
    }
    for (mode, shape), (share, name) in shares.items():
        if mode == "entropy" and ("forward", shape) in shares:
            yield _Reached(shares["forward", shape][0] / share, f"{_x(shape)}, {name}")


def _memory(cells: list[Cell]) -> Iterator[_Reached]:
    for cell in cells:
        best = _best(cell)
        large = cell.problem.vocab >= LARGE_VOCAB and cell.logits_bytes >= LARGE_BYTES
        if large and best and best.extra_bytes is not None:
            yield _Reached(best.extra_bytes / cell.logits_bytes, f"{_x(_shape(cell))}, {best.name}")


def _rmse(cells: list[Cell]) -> Iterator[_Reached]:
    for cell in cells:
        if not cell.has(EAGER) or cell.problem.rows < SEVERAL_ROWS:
            continue
        eager = cell.results[EAGER].error_rmse
        for one in cell.measured(ours=True):
            if one.name != EAGER and eager > 0:
                yield _Reached(one.error_rmse / eager, f"{_x(_shape(cell))} {cell.mode}, {one.name}")


def _auto_over(cells: list[Cell], other: Callable[[Cell], Result | None]) -> Iterator[_Reached]:
    for cell in cells:
        against = other(cell)
        if against and cell.has(AUTO):
            low, middle, high = cell.times_as_fast(against.name, AUTO)
            ends = f" ({low:.2f} to {high:.2f})" if math.isfinite(high) else ""
            yield _Reached(middle, f"{_x(_shape(cell))} {cell.mode}, {against.name}{ends}")


def _shape(cell: Cell) -> tuple[int, int]:
    return cell.problem.rows, cell.problem.vocab


def _x(shape: tuple[int, int]) -> str:
    return f"{shape[0]} x {shape[1]}"
