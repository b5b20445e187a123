"""How one problem is measured: all candidates in shuffled rounds on the same tensors; memory and errors apart.

Shapes: N rows, n of them looked at, V vocabulary.
"""

import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.candidates import READ, Contender
from benchmarks.idioms import Idiom
from benchmarks.results import Cell, Result
from compiled_logprobs.errors import is_out_of_memory
from compiled_logprobs.machine import clock
from compiled_logprobs.machine.bandwidth import measured_bandwidth
from compiled_logprobs.operation.reference import reference
from compiled_logprobs.problem import Problem
from compiled_logprobs.tuning.rounds import AHEAD, LONGEST_REASON

CHECKED_ROWS = 64
"""How many rows are held against float64: spread evenly, the first and the last among them."""
SLOW, ROUNDS_OF_SLOW = 6.0, 6
"""A candidate that takes so many times as long as the fastest is timed in these rounds only, which give an interval."""
MEMORY_PASSES = 2
"""The least of them counts: on the CPU, what other threads of the process take meanwhile can only add to it."""
LIKELY = 8
"""Tokens of a row that share most of the probability, as a language model's do."""
CHUNK_ELEMENTS = 2**26
"""How many logits are made at a time, in float32."""
WRONG = 0.05
"""How far off a result may be, as a share of the row's largest |x|, and a gradient, of the upstream one: rounding to 16
bits stays below, and another sign, label or scale does not."""


def measure(
    problem: Problem, mode: str, chosen: Sequence[Contender], device: torch.device, *, rounds: int, seconds: float
) -> Cell:
    """Compile and check each candidate, measure its memory, then time all of them beside a bare read of the logits.

    Args:
        problem: flat logits, one label a row, no temperature.
        mode: its name.
        chosen: who takes part. One that cannot, fails or is wrong has an outcome, and the others go on.
        device: where.
        rounds: how many at most; each calls everybody once, in an order of its own.
        seconds: after which no further round begins, once there are `ROUNDS_OF_SLOW`.
    """
    results = {one.name: Result(one.name, one.ours, one.note(problem)) for one in chosen}
    bandwidth = measured_bandwidth(device)
    try:
        inputs = _Arguments(problem, device)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        for result in results.values():
            result.outcome, result.reason = "oom", "there is no memory for the logits"
        return Cell(problem, mode, results, [], bandwidth.copy)
    idioms: dict[str, Idiom] = {}
    for one in chosen:
        result = results[one.name]
        reason = one.why_not(problem)
        if reason is not None:
            result.outcome, result.reason = "unavailable", reason
            continue
        with _failures_kept_in(result):
            idiom = one.prepare(problem)
            inputs.check(result, *inputs.prepared(idiom)())
            if result.measured:
                peaks = [clock.extra_peak_bytes(inputs.prepared(idiom), device) for _ in range(MEMORY_PASSES)]
                result.extra_bytes = min((peak for peak in peaks if peak is not None), default=None)
                idioms[one.name] = idiom

    read_seconds: list[float] = []
    order, end = random.Random(0), time.monotonic() + seconds
    for done in range(rounds):
        if done >= ROUNDS_OF_SLOW and time.monotonic() > end:
            break
        names = [READ, *(name for name in idioms if _takes_part(name, results))]
        order.shuffle(names)
        for name in names:
            if name == READ:
                read_seconds.append(_timed(inputs.values.amax, device).seconds)
                continue
            result = results[name]
            with _failures_kept_in(result):
                call = inputs.prepared(idioms[name])
                took = _timed(partial(_dropped, call), device, AHEAD * min(result.host_seconds, default=0.0))
                result.seconds.append(took.seconds)
                result.host_seconds.append(took.host_seconds)
    return Cell(problem, mode, results, read_seconds, bandwidth.copy)


class _Arguments:
    """Logits [N, V], labels [N], the upstream gradient [N] of the log-probabilities, and what is true of some rows."""

    def __init__(self, problem: Problem, device: torch.device) -> None:
        rows, vocab = problem.rows, problem.vocab
        generator = torch.Generator(device).manual_seed(0)
        likely = torch.randint(vocab, (rows, min(LIKELY, vocab)), generator=generator, device=device)
        self.values = torch.empty(rows, vocab, dtype=problem.dtype, device=device)
        step = max(1, CHUNK_ELEMENTS // vocab)
        for start in range(0, rows, step):
            n = slice(start, start + step)
            x_nV = 2.0 * torch.randn(self.values[n].shape, generator=generator, device=device)
            more = 10.0 + 4.0 * torch.rand(likely[n].shape, generator=generator, device=device)
            self.values[n] = x_nV.scatter_add_(-1, likely[n], more)
        anywhere = torch.randint(vocab, (rows,), generator=generator, device=device)
        is_anywhere = torch.rand(rows, generator=generator, device=device) < 0.2
        self._labels = torch.where(is_anywhere, anywhere, likely[:, 0])
        self._problem = problem
        self._upstream = torch.randn(rows, generator=generator, device=device)
        self._model = torch.zeros((), device=device, requires_grad=True)
        self._original = self.values.clone() if problem.needs_grad else None
        self._at = torch.linspace(0, rows - 1, min(CHECKED_ROWS, rows), device=device).round().long()
        upstream_n1 = self._upstream[self._at].unsqueeze(-1) if problem.needs_grad else None
        x_nV = self.values[self._at]
        self._true = reference(x_nV, self._labels[self._at].unsqueeze(-1), grad_log_probs=upstream_n1)
        self._largest_n = x_nV.double().abs().amax(-1).clamp(min=1.0)

    def logits(self) -> Tensor:
        """Fresh ones, whatever was written over them: no leaf, as a model gives them, where a gradient is needed."""
        if self._original is None:
            return self.values
        self.values.copy_(self._original)
        logits: Tensor = _Computed.apply(self._model, self.values)  # type: ignore[no-untyped-call]  # torch's gap
        return logits

    def prepared(self, idiom: Idiom) -> Callable[[], tuple[Tensor, Tensor | None, Tensor | None]]:
        """A call on fresh logits: log-probabilities, and entropy and gradient where the problem asks for them."""
        problem, labels, logits = self._problem, self._labels, self.logits()

        def call() -> tuple[Tensor, Tensor | None, Tensor | None]:
            with torch.set_grad_enabled(problem.needs_grad):
                log_probs, entropy = idiom(logits, labels, problem.entropy)
            if not problem.needs_grad:
                return log_probs, entropy, None
            (gradient,) = torch.autograd.grad(log_probs, logits, self._upstream.to(log_probs.dtype))
            return log_probs, entropy, gradient

        return call

    def check(self, result: Result, log_probs: Tensor, entropy: Tensor | None, gradient: Tensor | None) -> None:
        """Hold some rows against float64: sets the errors of `result`, or the outcome 'wrong'."""
        errors = log_probs.detach()[self._at].double() - self._true.log_probs.squeeze(-1)
        result.error_max, result.error_rmse = float(errors.abs().max()), float(errors.square().mean().sqrt())
        limit_n = WRONG * self._largest_n
        parts = [("log-probability", errors.unsqueeze(-1), limit_n)]
        if entropy is not None:
            parts.append(("entropy", (entropy[self._at].double() - self._true.entropy).unsqueeze(-1), limit_n))
        if gradient is not None and self._true.gradient is not None:
            errors_nV = gradient[self._at].double() - self._true.gradient
            parts.append(("gradient", errors_nV, WRONG * self._upstream[self._at].double().abs()))
        for what, error, limit in parts:
            worst_n = error.abs().amax(-1)
            if not (worst_n <= limit).all():  # NaN is not
                result.outcome, result.reason = "wrong", f"its {what} is off by {float(worst_n.max()):.3g}"
                return


class _Computed(torch.autograd.Function):
    """Makes logits of its own of `values`, which stay the memory that they lie in."""

    @staticmethod
    def forward(ctx: Any, model: Tensor, values: Tensor) -> Tensor:
        return values

    @staticmethod
    def backward(ctx: Any, *gradient: Tensor) -> tuple[None, None]:
        return None, None


def _takes_part(name: str, results: dict[str, Result]) -> bool:
    """Whether another round times it: not what has failed, nor, after some rounds, what is far slower than others."""
    one = results[name]
    if not one.measured or len(one.seconds) < ROUNDS_OF_SLOW:
        return one.measured
    fastest = min(median(other.seconds) for other in results.values() if other.measured and other.seconds)
    return median(one.seconds) <= SLOW * fastest


@contextmanager
def _failures_kept_in(result: Result) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # noqa: BLE001 - whatever a candidate raises is its outcome
        result.outcome = "oom" if is_out_of_memory(error) else "failed"
        result.reason = f"{type(error).__name__}: {' '.join(str(error).split())}"[:LONGEST_REASON]


def _timed(call: Callable[[], object], device: torch.device, ahead_s: float = 0.0) -> clock.Time:
    clock.flush_cache(device)
    return clock.time_call(call, device, ahead_s=max(ahead_s, clock.AHEAD_S))


def _dropped(call: Callable[[], object]) -> None:
    """Call and keep nothing: freeing what was made is within the time of all alike."""
    call()
