"""Measure the candidates of a problem and decide: in the worker program, within a budget, alone on the device."""

import contextlib
import json
import math
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import cuda

from compiled_logprobs.backends import BUILT_IN, EAGER, backends, target_of
from compiled_logprobs.backends.base import Backend
from compiled_logprobs.decision import Candidate, Check, Decision, Evidence, Outcome, Speedup
from compiled_logprobs.errors import LogProbsError
from compiled_logprobs.machine.environment import environment_at, fingerprint_of
from compiled_logprobs.problem import Problem, bucket, problem_to_dict
from compiled_logprobs.tuning.process import Event, Worker, WorkerLost
from compiled_logprobs.tuning.statistics import Interval, fewest_rounds, look

LIMITS_S = {
    "import": 120.0,
    "compile": 180.0,
    "check": 180.0,
    "memory": 60.0,
    "time": 60.0,
    "inputs": 120.0,
    "full size": 120.0,
}
"""How long one step may take before it is taken for hanging."""
START_S = 120.0
"""How long the worker program may take to start: it imports torch."""
GRACE_S = 1.0
"""How much longer than in the program that crashed a candidate has to last alone."""
RESERVE_S = 1.0
"""Of a budget that must not be exceeded, what is kept for ending."""
SHARE = 0.25
"""Of what is left of such a budget, what a step of a third party's backend may take."""
ONCE = ("import", "compile", "check", "memory")
"""The steps that a candidate goes through once."""
STUCK = 10
"""How many times as long as its longest a timed call may take before it, and not the budget, is to blame for no end."""


class TuningFailed(LogProbsError):
    """Nothing was decided; the message says why."""


@dataclass
class _Found:
    """What is known so far of one candidate."""

    outcome: Outcome | None = None
    reason: str = ""
    fields: dict[str, Any] = field(default_factory=dict)
    times: list[float] = field(default_factory=list)
    cases: list[dict[str, Any]] = field(default_factory=list)
    checked_rows: int = 0
    fewer_for_memory: bool = False
    """Whether that would have been more rows, had there been more memory."""


class Tuner:
    """Decides problems one after another, on one device, in one worker program that is replaced where it is lost.

    A context manager, which ends the program. Nothing is stored here.

    Args:
        device: where to measure.
        short: whether the check has its fewer inputs.
        on_event: told each event of the worker program as it comes, but not the evidence, which is long; and `program_lost`. No
            time between two of them is longer than the longest of `LIMITS_S` and `START_S`, but for moments.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        short: bool = False,
        on_event: Callable[[Event], None] = lambda event: None,
    ) -> None:
        self._first_calls: dict[tuple[str, Problem], float] = {}
        self.short = short
        self._device, self._on_event = device, on_event
        self._worker: Worker | None = None
        self._is_reused = False
        self._guests: dict[str, float] = {}
        """When the program imported each of the third parties' backends that are in it, whatever became of them since."""

    def __enter__(self) -> "Tuner":
        return self

    def __exit__(self, *_: object) -> None:
        self._end_worker()

    def decide(
        self,
        problem: Problem,
        seconds: float,
        *,
        strict: bool = False,
        names: Sequence[str] | None = None,
        incumbent: str | None = None,
    ) -> tuple[Decision, Evidence]:
        """Measure the bucket of `problem`; returns the decision, and what it rests on.

        Args:
            problem: what to decide.
            seconds: for all of it; N shrinks where the rounds would take longer.
            strict: whether to end when they are over, whatever is under way: at the price, perhaps, of no decision. Else each
                step only has the limit after which it is taken for hanging, and what was spent on a program that was lost
                does not count.
            names: of the backends to measure; the baseline is always among them. By default all that are registered.
            incumbent: the backend that has served so far, which only a clear win replaces.

        Raises:
            TuningFailed: no decision came about.
        """
        began = time.monotonic()
        asked = backends() if names is None else names
        in_order = [EAGER, *(name for name in backends() if name in asked and name != EAGER)]
        ends = began + seconds if strict else math.inf
        work = _Work(bucket(problem), in_order, incumbent, ends)
        while True:
            try:
                self._run(work, seconds)
                break
            except WorkerLost as error:
                guests = self._end_worker()
                self._on_event({"event": "program_lost", "outcome": error.outcome, "reason": error.reason})
                over = time.monotonic() >= work.ends
                if work.step == "start" and self._is_reused and not over:
                    continue  # it has ended between two problems: a new one takes its place
                if error.outcome == "crashed" and guests.keys() - {work.candidate}:
                    self._find_who_crashed(work, guests, error, seconds)
                    over = time.monotonic() >= work.ends
                    if not over:
                        continue
                # That the budget ends is no candidate's fault; a crash is, also then, and so is a call that does not return.
                elif work.candidate in work.alive() and (not over or error.outcome == "crashed" or work.is_stuck()):
                    work.lose(work.candidate, error.outcome, f"{work.step}: {error.reason}")
                if over:
                    if work.has_enough_rounds():
                        break
                    raise TuningFailed(f"the budget of {seconds:.3g} s ended {work.doing()}") from error
                if work.candidate is None:
                    foreign = [name for name in work.alive() if name not in BUILT_IN]
                    if not foreign:
                        raise TuningFailed(f"the worker program was lost {work.doing()}: {error.reason}") from error
                    for name in foreign:  # one of them has done harm before, perhaps
                        work.lose(name, "failed", f"the worker program was lost with it in there: {error.reason}")
            except BaseException:
                self._end_worker()  # it may be in the middle of something
                raise
        cases = {name: found.cases for name, found in work.found.items() if found.cases}
        decision = self._decision(work, time.monotonic() - began)
        fields = {"seed": decision.seed, "measured_at": decision.measured_at, "seconds": work.times(), "cases": cases}
        return decision, Evidence.from_json(json.dumps(fields).encode())

    def _find_who_crashed(self, work: "_Work", guests: dict[str, float], error: WorkerLost, seconds: float) -> None:
        """Have a crash cost whom it is to cost, where that need not be the one at work: what others started, such as a thread,
        outlives their steps.

        Whoever may have done it runs in a program of its own, beside the baseline, that lives as long as the one that crashed.
        Those that were out already need not: they are not in the next program.

        Args:
            guests: the third parties' backends in the program that crashed, and for how many seconds each was in there.
        """
        candidate, alive = work.candidate, work.alive()
        those_out = guests.keys() - set(alive)
        possible = [name for name in alive if name == candidate or name in guests]
        suspects = sorted(set(possible) - work.trusted, key=lambda name: (name != candidate, possible.index(name)))
        if len(suspects) > 1 or those_out:
            for name in suspects:
                if time.monotonic() >= work.ends:
                    break
                if not self._lasts_alone(work, name, seconds, guests.get(name, 0.0)):
                    return
                if name == candidate and those_out:
                    return
            else:
                if those_out:
                    return
            suspects = []
        if not suspects:  # each has lasted alone, or there was no time to see
            suspects = [candidate] if candidate in guests and candidate in alive else [*guests.keys() & set(alive)]
        for name in suspects:
            where = work.step if name == candidate else f"with it in the program, {work.doing()}"
            work.lose(name, "crashed", f"{where}: {error.reason}")

    def _lasts_alone(self, work: "_Work", name: str, seconds: float, age: float) -> bool:
        """Whether `name` gets through a program of its own; if not, it is out.

        Args:
            age: how many seconds it has to be in there.
        """
        alone = _Work(work.problem, list(dict.fromkeys((EAGER, name))), None, work.ends)
        is_through = False
        try:
            self._run(alone, seconds)
            is_through = True
            left = min(self._guests.get(name, -math.inf) + age + GRACE_S, work.ends) - time.monotonic()
            if left > 0.0 and self._worker is not None:
                self._worker.next_event(within=min(left, LIMITS_S["time"]))
        except WorkerLost as error:
            if error.outcome == "crashed":
                is_at_work = alone.candidate == name and not is_through
                where = alone.step if is_at_work else "in a program with the baseline alone"
                alone.lose(name, "crashed", f"{where}: {error.reason}")
            elif alone.candidate == name and not is_through and time.monotonic() < work.ends:
                alone.lose(name, "timeout", f"{alone.step}: {error.reason}")
        finally:
            self._end_worker()
        work.take_over(alone, name)
        return work.found[name].outcome is None

    def _run(self, work: "_Work", seconds: float) -> None:
        """Have the worker program measure what is left of the candidates."""
        work.begin()
        self._is_reused = self._worker is not None
        if self._worker is None:
            self._worker = Worker()
            # That it is ready: to start takes seconds, which its own clock does not see.
            self._on_event(self._next_event(self._worker, work))
        self._worker.send(
            {
                "problem": problem_to_dict(work.problem),
                "device": str(self._device),
                "threads": torch.get_num_threads(),
                "candidates": [
                    [name, None if isinstance(target_of(name), Backend) else target_of(name)] for name in work.alive()
                ],
                "checked": [name for name, found in work.found.items() if found.fields.get("checks")],
                "incumbent": work.incumbent,
                "simplicity": simplicity(),
                "short": self.short,
                "seconds": max(0.0, min(seconds, work.ends - RESERVE_S - time.monotonic())),
                "strict": math.isfinite(work.ends),
                "seed": work.seed,
            }
        )
        while True:
            event = self._next_event(self._worker, work)
            work.hear(event)
            if work.step == "import" and work.candidate is not None and work.candidate not in BUILT_IN:
                self._guests.setdefault(work.candidate, time.monotonic())
            if event["event"] == "first_call":  # a later problem of the same kind finds its code compiled
                name = event["candidate"]
                key = name, work.problem._replace(rows=0)
                seconds_then = self._first_calls.setdefault(key, event["seconds"])
                work.found[name].fields["first_call_seconds"] = seconds_then
            if event["event"] != "evidence":
                self._on_event(event)
            if event["event"] == "started" and event["environment"] != fingerprint_of(self._device):
                raise TuningFailed("the worker program finds itself in another environment than this process")
            if event["event"] == "done":
                return

    @staticmethod
    def _next_event(worker: Worker, work: "_Work") -> Event:
        left = work.ends - time.monotonic()
        if work.candidate is not None and work.candidate not in BUILT_IN and work.step in ONCE:
            left *= SHARE  # if it hangs, the others are to have their turn
        return worker.next_event(within=min(LIMITS_S.get(work.step, START_S), left))

    def _end_worker(self) -> dict[str, float]:
        """For how many seconds each third party's backend was in the program."""
        if self._worker is not None:
            self._worker.end()
            self._worker = None
        ended = time.monotonic()
        guests = {name: ended - began for name, began in self._guests.items()}
        self._guests.clear()
        return guests

    def _decision(self, work: "_Work", seconds: float) -> Decision:
        times = work.times()
        if not times:
            fates = "; ".join(f"{name}: {one.outcome}: {one.reason}" for name, one in work.found.items())
            raise TuningFailed(f"no backend could be measured: {fates}")
        sizes = {name: work.found[name].fields.get("extra_bytes") for name in times}
        baseline = next(iter(times))
        by = partial(
            look, times, baseline=baseline, incumbent=work.incumbent, simplicity=simplicity(), extra_bytes=sizes
        )
        selection = by() or by(final=True)
        assert selection is not None
        candidates = {}
        for name, found in work.found.items():
            if name not in times:
                candidates[name] = Candidate(found.outcome or "failed", found.reason, **found.fields)
                continue
            verdict = selection.verdicts[name]
            candidates[name] = Candidate(
                verdict.outcome,
                verdict.reason,
                speedup=speedup_of(verdict.speedup),
                seconds=median(times[name]),
                **found.fields,
            )
        reason, chosen = selection.reason, work.found[selection.chosen]
        if chosen.fewer_for_memory:
            reason += f"; checked with {chosen.checked_rows} rows, for which there was memory"
        if work.measured_rows < work.problem.rows:
            reason += f"; measured with {work.measured_rows} rows, for which there was time and memory"
        return Decision(
            problem=work.problem,
            chosen=selection.chosen,
            code=selection.code,
            reason=reason,
            candidates=candidates,
            left_out=tuple(name for name in backends() if name not in candidates),
            baseline=baseline,
            plain_seconds=None,
            rounds=selection.rounds,
            settled=selection.settled,
            measured_rows=work.measured_rows,
            proven_rows=work.proven_rows,
            checked_rows=chosen.checked_rows,
            short_check=self.short,
            environment=environment_at(self._device).to_dict(),
            seed=work.seed,
            measured_at=datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
            tuning_seconds=seconds,
            **work.circumstances,
        )


class _Work:
    """One problem under way: what the worker program has said so far."""

    def __init__(self, problem: Problem, names: Sequence[str], incumbent: str | None, ends: float) -> None:
        self.problem, self.incumbent, self.ends = problem, incumbent, ends
        self.found = {name: _Found() for name in names}
        self.seed = random.SystemRandom().randrange(2**31)
        self.measured_rows = self.proven_rows = 0
        self.trusted = {EAGER}
        """Those that have lasted in a program of their own."""
        self.circumstances: dict[str, Any] = {"bandwidth": {}, "telemetry": None, "telemetry_reason": _NOT_REACHED}
        self.candidate: str | None = None
        self.step, self.step_began = "start", time.monotonic()

    def begin(self) -> None:
        """A worker program starts on it; its rounds are compared with no other's."""
        self.candidate, self.step, self.step_began = None, "start", time.monotonic()
        for found in self.found.values():
            found.times.clear()

    def alive(self) -> list[str]:
        return [name for name, found in self.found.items() if found.outcome is None]

    def times(self) -> dict[str, list[float]]:
        return {name: self.found[name].times for name in self.alive() if self.found[name].times}

    def has_enough_rounds(self) -> bool:
        times = self.times()
        return self.step == "time" and bool(times) and len(next(iter(times.values()))) >= fewest_rounds(len(times))

    def is_stuck(self) -> bool:
        """Whether a timed call has taken far longer than all before it, so that it is not for the budget that it did not end."""
        if self.step != "time" or self.candidate is None:
            return False
        longest = max(self.found[self.candidate].times, default=0.0)
        return time.monotonic() - self.step_began > RESERVE_S + STUCK * longest

    def lose(self, name: str, outcome: Outcome, reason: str) -> None:
        self.found[name].outcome, self.found[name].reason = outcome, reason

    def take_over(self, other: "_Work", name: str) -> None:
        """What `other` has found out about a candidate; its rounds, which are compared with no others, are left."""
        self.found[name] = other.found[name]
        self.found[name].times.clear()
        if self.found[name].outcome is None:
            self.trusted.add(name)

    def doing(self) -> str:
        return f"at the step {self.step!r}" + (f" of {self.candidate!r}" if self.candidate else "")

    def hear(self, event: Event) -> None:
        kind, name = event["event"], event.get("candidate", "")
        if kind == "step":
            self.candidate, self.step, self.step_began = name, event["step"], time.monotonic()
        elif kind == "loaded":
            self.found[name].fields["fingerprint"] = event["fingerprint"]
        elif kind == "lost":
            self.lose(name, event["outcome"], event["reason"])
        elif kind == "evidence":
            self.found[name].cases = event["cases"]
        elif kind == "checked":
            self.found[name].checked_rows = event["rows"]
            self.found[name].fewer_for_memory = event["fewer_for_memory"]
            self.found[name].fields.update(
                checks=tuple(Check(**check) for check in event["checks"]),
                repeatable=event["repeatable"],
                row_invariant=event["row_invariant"],
            )
        elif kind == "measuring":
            self.measured_rows = self.proven_rows = event["rows"]
        elif kind == "proven":
            self.proven_rows = event["rows"]
        elif kind == "memory":
            self.found[name].fields.update(extra_bytes=event["bytes"], extra_multiple=event["multiple"])
        elif kind == "round":
            for name, seconds in event["seconds"].items():
                self.found[name].times.append(seconds)
        elif kind == "circumstances":
            self.circumstances = {key: event[key] for key in ("bandwidth", "telemetry", "telemetry_reason")}
            for name, percent in event["percent"].items():
                self.found[name].fields["percent_of_bandwidth"] = percent


_NOT_REACHED = "the time was over before it was asked for"


def simplicity() -> dict[str, int]:
    """Plain torch first, then the others that come with the package, as they are listed. Of third parties' nothing is known:
    they are not named, so that all of them count as equally simple, in whatever order they were registered.
    """
    return {name: rank for rank, name in enumerate(sorted(BUILT_IN, key=lambda name: name != EAGER))}


def speedup_of(found: Interval) -> Speedup:
    """As it is stored, without infinite ends."""
    bounded = found.low > 0.0 and math.isfinite(found.high)
    return Speedup(found.low if bounded else None, found.median, found.high if bounded else None)


def name_of(device: torch.device) -> str:
    """What tells `device` from every other of this machine, for all its processes."""
    if device.type != "cuda":
        return device.type
    return str(getattr(cuda.get_device_properties(device), "uuid", device.index))


@contextlib.contextmanager
def alone_on(device: torch.device, within: float) -> Iterator[bool]:
    """Hold the lock of `device` that all processes of this machine share; False if another holds it for too long."""
    from filelock import FileLock, Timeout

    try:
        lock = FileLock(Path(tempfile.gettempdir(), f"compiled-logprobs-{name_of(device)}.lock"), mode=0o666)
        lock.acquire(timeout=within)
    except Timeout:
        yield False
        return
    except OSError:  # no place for a lock, or one of another user: then there is no order
        yield True
        return
    try:
        yield True
    finally:
        lock.release()
