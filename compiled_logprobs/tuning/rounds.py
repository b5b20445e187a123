"""Time the candidates of one problem: shuffled rounds on inputs that look real, with a cold cache.

A candidate that raises has an outcome of its own, and the others go on. Plain `log_softmax` and `gather` run beside
them, for comparison. Nothing is chosen here, and nothing stored.

Shapes: N rows, D of them drawn and the others made of these, V vocabulary, K labels a row; R the leading dimensions of
the logits, one or two, whose product is N.
"""

import math
import random
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from compiled_logprobs.backends.base import AnyBackend
from compiled_logprobs.check.spot_check import what_is_wrong
from compiled_logprobs.decision import PLAIN
from compiled_logprobs.errors import is_out_of_memory
from compiled_logprobs.machine import clock
from compiled_logprobs.machine.clock import MIB
from compiled_logprobs.operation.autograd import compute
from compiled_logprobs.operation.contract import Upstream, in_dtype, wanted_by
from compiled_logprobs.operation.plain import bytes_of_plain, plain
from compiled_logprobs.problem import Problem
from compiled_logprobs.tuning.hidden_inputs import InputsFromHidden
from compiled_logprobs.tuning.sizes import BUFFERS, SHARE_OF_FREE_MEMORY

DISTINCT_ROWS = 64
"""Drawing every row would take longer than timing it: the others are these, shifted along the vocabulary."""
LIKELY = 8
"""Tokens of a row that share most of the probability, as a language model's do."""
KEPT = 50
"""Tokens of a row that are not -inf, where the problem masks its logits."""
ALIGNED = 16
"""Elements; rows whose stride is a multiple of it start at multiples of 16 bytes in every dtype."""
LONGEST_REASON = 500
"""Characters; compilers' errors run to pages."""
AHEAD = 1.5
"""Times as long as the host takes for a call, a device is kept busy before it."""

STATE: dict[str, tuple[Callable[[], Any], Callable[[Any], object]]] = {
    "number of threads": (torch.get_num_threads, torch.set_num_threads),
    "default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "grad mode": (torch.is_grad_enabled, torch.set_grad_enabled),
    "deterministic mode": (torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms),
}
"""What a candidate must leave as it was: how to get it, and how to set it."""

Forward = Callable[[Tensor, Tensor, float | Tensor], tuple[Tensor, ...]]
"""Logits, labels, temperature -> log-probabilities, and what else is wanted."""


@dataclass
class Run:
    """What was measured of one candidate, up to its failure if it had one."""

    name: str
    outcome: Literal["measured", "wrong", "failed", "oom"] = "measured"
    reason: str = ""
    """Why it was not measured further."""
    first_call_seconds: float | None = None
    """Compiling included; not among `seconds`."""
    extra_bytes: int | None = None
    """Peak memory beyond the logits, results and their gradient included; from hidden states, beyond these, results and
    gradients; None where it cannot be measured."""
    extra_multiple: float | None = None
    """The same, as a multiple of the logits' size."""
    seconds: list[float] = field(default_factory=list)
    """Of the timed calls, one a round, as the clock gave them."""
    host_seconds: list[float] = field(default_factory=list)
    """Of the same calls, until each returned."""

    @property
    def alive(self) -> bool:
        return self.outcome == "measured"


class Measurement:
    """The candidates of one problem on one device.

    Forward alone, or with backward where the problem needs the gradient, through `autograd.compute` as the public
    functions call it. Ask `rounds()` for rounds, one at a time, and look at `times()` in between.

    Args:
        problem: what to compute; for a bucket of N, its top.
        candidates: in the order in which they are first called; the baseline first, so that it has run whatever comes
            after.
        device: by default the current one of the problem's type.
        seed: of the inputs and of the order within rounds; fresh at random by default.
        on_step: told the candidate and the step (compile, memory, time, full size) before each of its calls.
        look_at_results: whether to hold a few rows of what it returns against float64, which not even candidates that
            passed the check are sure to get right at this size.
        plain_s: how long a call of plain torch may take to be timed in each round, too; by default it is not called.
        whole: from hidden states: the problem that this one is a part of, by default this one. Its limit of memory is
            kept to where it is this one.
        logits_backend: from hidden states: the name of what candidates are handed for logits.
    """

    def __init__(
        self,
        problem: Problem,
        candidates: Mapping[str, AnyBackend],
        *,
        device: torch.device | str | None = None,
        seed: int | None = None,
        on_step: Callable[[str, str], None] = lambda name, step: None,
        look_at_results: bool = True,
        plain_s: float = 0.0,
        whole: Problem | None = None,
        logits_backend: str | None = None,
    ) -> None:
        self.problem = problem
        self.device = clock.measurable(device or problem.device_type)
        self.seed = random.randrange(2**31) if seed is None else seed
        self.runs = {name: Run(name) for name in candidates}
        self._candidates, self._plain, self._plain_s = dict(candidates), Run(PLAIN), plain_s
        self._on_step, self._look_at_results = on_step, look_at_results
        self._whole, self._logits_backend = whole or problem, logits_backend
        self._left: dict[str, str] = {}

    def times(self) -> dict[str, list[float]]:
        """Seconds by candidate and round, of those that have run in every round."""
        timed = (run for run in self.runs.values() if run.alive and run.name not in self._left)
        return {run.name: run.seconds for run in timed if run.seconds}

    def leave(self, name: str, other: str) -> None:
        """Time it in no further round, unless `other`, which is far ahead of it, fails."""
        self._left[name] = other

    def bring_back(self) -> bool:
        """Time those again that were left for one that has failed, if there are any.

        Only the rounds that they have had count for all.
        """
        back = [name for name, other in self._left.items() if not self.runs[other].alive]
        if not back:
            return False
        common = min(len(self.runs[name].seconds) for name in back)
        for run in (*self.runs.values(), self._plain):
            del run.seconds[common:], run.host_seconds[common:]
        for name in back:
            del self._left[name]
        return True

    def host_times(self) -> dict[str, list[float]]:
        """Seconds until the same calls returned; none on a CPU, where they would be the same ones."""
        return {} if self.device.type == "cpu" else {name: self.runs[name].host_seconds for name in self.times()}

    def plain_times(self) -> list[float]:
        """Seconds of plain torch by round; none where it was left out, or failed."""
        return self._plain.seconds if self._plain.alive else []

    def extra_bytes(self) -> dict[str, int | None]:
        return {run.name: run.extra_bytes for run in self.runs.values() if run.alive}

    def rounds(self, most: int = 2**31) -> Generator[int, None, None]:
        """Compile, measure memory, then time: yields the number of rounds that count, after each.

        Ends after `most` rounds, or when no candidate is left. What making the inputs raises is raised here: it
        concerns all of them.
        """
        inputs = self._inputs()
        for name in self._candidates:
            self._attempt(name, "compile", inputs)
        for name in self._candidates:
            self._attempt(name, "memory", inputs)
        self._begin_plain(inputs)
        order = random.Random(self.seed)
        for turn in range(1, most + 1):
            runs = [run for run in self.runs.values() if run.alive and run.name not in self._left]
            if not runs:
                return
            done = 1 + len(runs[0].seconds)
            names = [run.name for run in (*runs, self._plain) if run.alive]
            order.shuffle(names)
            for name in names:  # all on the same input: they are compared within the round
                self._attempt(name, "time", inputs, turn % BUFFERS)
            yield done

    def look_at(self, name: str) -> None:
        """Call `name` once, and hold a few rows of what it returns against float64, without timing anything."""
        self._attempt(name, "full size", self._inputs(buffers=1))

    def _inputs(self, buffers: int = BUFFERS) -> "_Inputs | InputsFromHidden":
        problem, device, seed = self.problem, self.device, self.seed
        if problem.hidden is None:
            return _Inputs(problem, device, seed, buffers)
        return InputsFromHidden(problem, device, seed, buffers, whole=self._whole, logits_backend=self._logits_backend)

    def _begin_plain(self, inputs: "_Inputs | InputsFromHidden") -> None:
        """Give plain torch its first calls; leave it out where they take too long, or too much memory."""
        room = SHARE_OF_FREE_MEMORY * clock.free_memory(self.device)
        if self._plain_s > 0.0 and bytes_of_plain(self.problem) <= room:
            for index in range(BUFFERS):
                self._attempt(PLAIN, "time", inputs, index)
        if max(self._plain.seconds[1:], default=math.inf) > self._plain_s:
            self._plain.outcome = "failed"
        self._plain.seconds.clear()

    def _attempt(self, name: str, step: str, inputs: "_Inputs | InputsFromHidden", index: int = 0) -> None:
        run = self._plain if name == PLAIN else self.runs[name]
        if not run.alive:
            return
        self._on_step(name, step)
        before = {name: get() for name, (get, _) in STATE.items()}
        try:
            forward = inputs.forward_by(None if name == PLAIN else self._candidates[name])
            call = inputs.call(forward, index)
            if step == "compile":
                run.first_call_seconds = max(clock.time_call(call, self.device))
                for other in range(1, BUFFERS):  # what a second call still does once belongs to no round
                    results, gradients = inputs.call(forward, other)()
                if self._look_at_results and (mistake := inputs.what_is_wrong(other, results, gradients)):
                    run.outcome, run.reason = "wrong", mistake
            elif step == "full size":
                if mistake := inputs.what_is_wrong(index, *call()):
                    run.outcome, run.reason = "wrong", mistake
                elif self.problem.memory_limit is not None:
                    self._measure_memory(run, call, inputs)
            elif step == "memory":
                self._measure_memory(run, call, inputs)
            else:
                # The least, since a call that waits for the device waits for what keeps that busy, too.
                ahead_s = max(clock.AHEAD_S, AHEAD * min(run.host_seconds, default=0.0))
                clock.flush_cache(self.device)
                time = clock.time_call(call, self.device, ahead_s=ahead_s)
                if time.seconds <= 0.0:
                    raise ValueError(f"the clock gave {time.seconds} s, which no call can take")
                run.seconds.append(time.seconds)
                run.host_seconds.append(time.host_seconds)
        except Exception as error:  # noqa: BLE001 - whatever a candidate raises is its outcome
            run.outcome = "oom" if is_out_of_memory(error) else "failed"
            run.reason = f"{step}: {type(error).__name__}: {' '.join(str(error).split())}"[:LONGEST_REASON]
        changed = [name for name, (get, _) in STATE.items() if get() != before[name]]
        for name in changed:  # the others would run under it
            STATE[name][1](before[name])
            run.outcome, run.reason = "failed", f"{step}: it left torch with another {', '.join(changed)}"

    def _measure_memory(self, run: Run, call: Callable[[], object], inputs: "_Inputs | InputsFromHidden") -> None:
        peak = clock.extra_peak_bytes(call, self.device)
        if peak is None:
            return
        run.extra_bytes = max(0, peak - inputs.bytes_returned)
        run.extra_multiple = run.extra_bytes / inputs.logits_bytes
        limit = self.problem.memory_limit
        if limit is not None and self.problem == self._whole and run.extra_bytes > limit:
            run.outcome, run.reason = "oom", f"it took {run.extra_bytes / MIB:.1f} MiB, and may take {limit / MIB:.1f}"


class _Inputs:
    """Logits in `BUFFERS` places, with everything that goes with them."""

    def __init__(self, problem: Problem, device: torch.device, seed: int, buffers: int = BUFFERS) -> None:
        self._problem = problem
        # Of the CPU everywhere, so that a seed makes the same inputs on every device.
        generator = torch.Generator("cpu").manual_seed(seed)
        overwritten = problem.inplace_backward and problem.needs_grad
        self._logits = [empty_logits(problem, device) for _ in range(buffers)]
        rows = self._logits[0].shape[:-1]
        self.logits_bytes = self._logits[0].numel() * problem.dtype.itemsize
        labels = [_fill(logits, problem, generator) for logits in self._logits[: 1 if overwritten else buffers]]
        # One original serves all buffers: memory is what large problems lack.
        self._original = self._logits[0].clone() if overwritten else None
        self._labels = labels * buffers if overwritten else labels
        self._temperature: float | Tensor = 1.0
        if problem.temperature == "number":
            self._temperature = 0.7
        elif problem.temperature == "per_token":
            self._temperature = torch.empty(rows).uniform_(0.5, 1.5, generator=generator).to(device)
        upstream = {"log_probs": torch.randn(labels[0].shape, generator=generator)}
        others = [name for name in Upstream._fields if getattr(problem, name, False)]
        upstream |= {name: torch.randn(rows, generator=generator) for name in others}
        self._upstream = {name: gradient.to(device, problem.out_dtype) for name, gradient in upstream.items()}

    bytes_returned = 0
    """Of results and gradient: they count as memory that a call takes."""

    def forward_by(self, backend: Any) -> Forward:
        """What `call` takes: `backend`, differentiably; plain torch where it is None."""
        wanted, inplace = wanted_by(self._problem), self._problem.inplace_backward
        if backend is None:
            return partial(plain, wanted=wanted)
        return partial(compute, backend, wanted=wanted, inplace_backward=inplace)

    def what_is_wrong(self, index: int, results: list[Tensor], gradients: tuple[Tensor, ...]) -> str | None:
        """The same of what `call(..., index)` returned, looked at in a few rows; None if nothing is."""
        logits = self._logits[index] if self._original is None else self._original
        gradient = gradients[0] if gradients else None
        return what_is_wrong(
            self._problem, logits, self._labels[index], self._temperature, self._upstream, results, gradient
        )

    def call(self, forward: Forward, index: int) -> Callable[[], tuple[list[Tensor], tuple[Tensor, ...]]]:
        """What is to be timed, on fresh logits: returns all results, so that they count as memory in use."""
        problem, labels = self._problem, self._labels[index]
        logits = self._logits[index].detach()
        if self._original is not None:
            logits.copy_(self._original)
        logits.requires_grad_(problem.needs_grad)

        def call() -> tuple[list[Tensor], tuple[Tensor, ...]]:
            with torch.set_grad_enabled(problem.needs_grad):
                parts = forward(logits, labels, self._temperature)
                results = [in_dtype(part, problem.out_dtype) for part in parts]
            if not problem.needs_grad:
                return results, ()
            differentiable = [result for result in results if result.requires_grad]
            return results, torch.autograd.grad(differentiable, [logits], [*self._upstream.values()])

        return call


def empty_logits(problem: Problem, device: torch.device) -> Tensor:
    """[R, V] memory with the layout and the alignment that the problem has."""
    rows, vocab = problem.rows, problem.vocab
    row_stride = vocab
    if problem.layout == "rows":
        row_stride = vocab + ALIGNED
    if problem.layout != "flat" and problem.aligned:
        row_stride += -row_stride % ALIGNED
    shape: tuple[int, ...] = (rows, vocab)
    strides: tuple[int, ...] = (row_stride, 1)
    if problem.layout == "slice" and rows >= 4 and rows % 2 == 0:  # as all tops of buckets from 4 on are
        outer = 2  # sequences whose last position is left out, as in logits[:, :-1]
        shape = (outer, rows // outer, vocab)
        strides = ((rows // outer + 1) * row_stride, row_stride, 1)
    offset = 0 if problem.aligned else 1
    size = offset + (rows + 2) * row_stride
    return torch.zeros(size, dtype=problem.dtype, device=device).as_strided(shape, strides, offset)


def _fill(logits: Tensor, problem: Problem, generator: torch.Generator) -> Tensor:
    """Write logits as a model gives them; returns labels [R, K] drawn from their softmax.

    Real values matter: a chip that computes zeros heats less and clocks higher.
    """
    rows, vocab, labels_per_row = problem.rows, problem.vocab, problem.labels_per_row
    distinct = min(rows, DISTINCT_ROWS)
    x_DV = 2.0 * torch.randn(distinct, vocab, generator=generator)
    likely = torch.randint(vocab, (distinct, min(LIKELY, vocab)), generator=generator)
    x_DV.scatter_add_(-1, likely, 10.0 + 4.0 * torch.rand(likely.shape, generator=generator))
    if problem.masked_logits:
        least_kept = x_DV.topk(min(KEPT, vocab), dim=-1).values[:, -1:]
        x_DV.masked_fill_(x_DV < least_kept, -torch.inf)
    drawn_DK = torch.multinomial(torch.softmax(x_DV, -1), labels_per_row, replacement=True, generator=generator)
    shifts_N = torch.randint(vocab, (rows,), generator=generator)
    source_N = torch.arange(rows) % distinct
    labels_NK = (drawn_DK[source_N] + shifts_N.unsqueeze(-1)) % vocab

    x_DV = x_DV.to(logits.device, logits.dtype)
    targets = [row_V for part in (logits if logits.ndim == 3 else [logits]) for row_V in part]
    for target_V, source, shift in zip(targets, source_N.tolist(), shifts_N.tolist(), strict=True):
        target_V[shift:] = x_DV[source, : vocab - shift]
        target_V[:shift] = x_DV[source, vocab - shift :]
    return labels_NK.view(*logits.shape[:-1], labels_per_row).to(logits.device)
