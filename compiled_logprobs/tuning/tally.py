"""From the events of the worker program to a decision: what they have said so far of one problem."""

import math
import random
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timezone
from statistics import median
from typing import Any

import torch

from compiled_logprobs.backends import backends_for
from compiled_logprobs.decision import (
    PLAIN,
    TIME,
    Candidate,
    CaseEvidence,
    Check,
    Decision,
    Evidence,
    Outcome,
    from_plain,
)
from compiled_logprobs.machine.clock import MIB
from compiled_logprobs.machine.environment import environment_at
from compiled_logprobs.problem import Problem
from compiled_logprobs.tuning.headway import MOST_CUTS, Headway
from compiled_logprobs.tuning.process import Event
from compiled_logprobs.tuning.statistics import BEHIND, fewest_rounds, select, speedup_over

GET_READY_S = 60.0
"""How long all candidates together may take to be imported, compiled and checked where no budget may be exceeded."""
RESERVE_S = 1.0
"""Of a budget that must not be exceeded, what is kept for ending."""
STUCK = 10
"""How many times as long as its longest a timed call may take before it, and not the budget, is to blame for no end."""


class Tally:
    """One problem under way. It hears every event, and decides when all is said.

    Args:
        problem: the top of its bucket.
        names: of the candidates, the baseline first.
        incumbent: the candidate that has served so far.
        budget_s: for the rounds, after `GET_READY_S` for what comes before; None where each step only has the limit
            after which it is taken for hanging.
        in_all: whether the budget is for all of it, what comes before the rounds included.
        headway: of earlier processes. What has passed the check there has passed it; a candidate that took all their
            time is out, and a decision without it serves until it is tried again.
    """

    def __init__(
        self,
        problem: Problem,
        names: Sequence[str],
        incumbent: str | None,
        budget_s: float | None = None,
        *,
        in_all: bool = False,
        headway: Headway | None = None,
    ) -> None:
        self.problem, self.incumbent, self.budget_s, self.in_all = problem, incumbent, budget_s, in_all
        self._left = [math.inf] * 2 if budget_s is None else [GET_READY_S, budget_s]
        """Seconds before the rounds, and in them, when the present part began."""
        self.in_rounds, self._part_began = False, time.monotonic()
        """Whether all candidates are compiled and checked; and since when."""
        self.seed = random.SystemRandom().randrange(2**31)
        self.candidates = {name: Candidate("failed", "it was not measured") for name in names}
        self.alive = list(names)
        self.with_plain = True
        self._seconds: dict[str, list[float]] = {}
        self._host_seconds: dict[str, list[float]] = {}
        self._cases: dict[str, tuple[CaseEvidence, ...]] = {}
        self._behind: dict[str, str] = {}
        """Candidates that are timed no further, as these others are far ahead of them."""
        self._checked_rows: dict[str, int] = {}
        self._short_of_memory: set[str] = set()
        self._measured_rows = self._proven_rows = 0
        self._measured_vocab = problem.vocab
        self._full_bytes: int | None = None
        reason = "the time was over before it was asked for"
        self._circumstances: dict[str, Any] = {"bandwidth": {}, "telemetry": None, "telemetry_reason": reason}
        if headway is not None and budget_s is not None:
            self._recall(headway)
        self.begin()

    def _recall(self, headway: Headway) -> None:
        for event in (event for said in headway.said.values() if "checked" in said for event in said.values()):
            if event["candidate"] in self.alive:
                self.hear(event)
        out = {name: count for name, count in headway.cut.items() if name in self.alive and count >= MOST_CUTS}
        if len(out) < len(self.alive):  # else none would ever be tried again
            for name, count in out.items():
                self.lose(name, "timeout", f"it was not ready in time in {count} processes")

    def begin(self) -> None:
        """Forget the rounds: a new worker program starts, and its rounds are compared with no other's."""
        self.candidate: str | None = None
        self.step, self._step_began = "start", time.monotonic()
        self._seconds.clear()
        self._host_seconds.clear()
        self._bring_back(list(self._behind))
        self._enter(in_rounds=False)

    @property
    def ends(self) -> float:
        """When the present part has to end, by `time.monotonic`."""
        return self._part_began + self._left[self.in_rounds or self.in_all]

    @property
    def passed(self) -> list[str]:
        """The candidates that have passed the check."""
        return [name for name in self.alive if self.candidates[name].checks]

    @property
    def rounds_s(self) -> float:
        """Seconds that the budget leaves for rounds."""
        return max(0.0, (self.ends - time.monotonic() if self.in_all else self._left[True]) - RESERVE_S)

    def hear(self, event: Event) -> None:
        kind, name = event["event"], event.get("candidate", "")
        if kind == "step":
            self.candidate, self.step, self._step_began = name, event["step"], time.monotonic()
            if self.step == "inputs":
                self._enter(in_rounds=True)
        elif kind == "loaded":
            self._note(name, fingerprint=event["fingerprint"])
        elif kind == "lost":
            self.lose(name, event["outcome"], event["reason"])
        elif kind == "first_call":
            self._note(name, first_call_seconds=event["seconds"])
        elif kind == "evidence":
            self._cases[name] = from_plain(event["cases"], tuple[CaseEvidence, ...])
        elif kind == "checked":
            self._checked_rows[name] = event["rows"]
            if event["fewer_for_memory"]:
                self._short_of_memory.add(name)
            checks = from_plain(event["checks"], tuple[Check, ...])
            self._note(name, checks=checks, repeatable=event["repeatable"], row_invariant=event["row_invariant"])
        elif kind == "measuring":
            self._seconds.clear()  # of what there was no time for
            self._host_seconds.clear()
            self._measured_rows = self._proven_rows = event["rows"]
            self._measured_vocab = event["vocab"]
        elif kind == "proven":
            self._proven_rows, self._full_bytes = event["rows"], event["bytes"]
        elif kind == "memory":
            self._note(name, extra_bytes=event["bytes"], extra_multiple=event["multiple"])
        elif kind == "round":
            for name, seconds in event["seconds"].items():
                self._seconds.setdefault(name, []).append(seconds)
            for name, seconds in event["host_seconds"].items():
                self._host_seconds.setdefault(name, []).append(seconds)
            if event["plain"] is None:
                self._seconds.pop(PLAIN, None)
            else:
                self._seconds.setdefault(PLAIN, []).append(event["plain"])
        elif kind == "behind":
            self.alive.remove(name)
            self._behind[name] = event["other"]
        elif kind == "circumstances":
            self._circumstances = {key: event[key] for key in self._circumstances}
            for name, percent in event["percent"].items():
                self._note(name, percent_of_bandwidth=percent)

    def lose(self, name: str, outcome: Outcome, reason: str) -> None:
        self.alive.remove(name)
        self._note(name, outcome=outcome, reason=reason)
        self._bring_back([behind for behind, other in self._behind.items() if other == name])

    def lose_program(self, outcome: Outcome, reason: str) -> bool:
        """Have the loss of the program cost the candidate at work; False if there is none.

        Where plain `log_softmax` was at work, its line goes.
        """
        if self.step == "time" and self.candidate is None:
            self.with_plain = False
            return True
        if self.candidate in self.alive:
            self.lose(self.candidate, outcome, f"{self.step}: {reason}")
        return self.candidate is not None  # one that was out already is not in the next program

    def times(self) -> dict[str, list[float]]:
        """Seconds by candidate and round, of those that ran in every round."""
        return {name: self._seconds[name] for name in self.alive if name in self._seconds}

    def has_enough_rounds(self) -> bool:
        times = self.times()
        return self.step == "time" and bool(times) and min(map(len, times.values())) >= fewest_rounds(len(times))

    def is_stuck(self) -> bool:
        """Whether a timed call takes far longer than all before it, so that the budget is not to blame."""
        if self.step != "time" or self.candidate is None:
            return False
        longest = max(self._seconds.get(self.candidate, ()), default=0.0)
        return time.monotonic() - self._step_began > RESERVE_S + STUCK * longest

    def doing(self) -> str:
        return f"at the step {self.step!r}" + (f" of {self.candidate!r}" if self.candidate else "")

    def what_ended(self) -> str:
        """Where `ends` is over, in words."""
        if self.in_rounds or self.in_all:
            return f"the budget of {self.budget_s:.3g} s"
        return f"the {GET_READY_S:g} s for importing, compiling and checking"

    def decide(self, device: torch.device, *, short: bool, tuning_seconds: float) -> tuple[Decision, Evidence]:
        """Choose by the rounds, of which there are some."""
        times = self.times()
        selection = select(
            times,
            incumbent=self.incumbent,
            extra_bytes={name: self.candidates[name].extra_bytes for name in times},
            final=True,
        )
        assert selection is not None
        plain = self._seconds.get(PLAIN)
        verdicts = selection.verdicts | self._verdicts_of_behind(times)
        times = {name: self._seconds[name] for name in verdicts}
        for name, verdict in verdicts.items():
            self._note(
                name,
                outcome=verdict.outcome,
                reason=verdict.reason,
                speedup=verdict.speedup,
                speedup_over_plain=speedup_over(plain[: len(times[name])], times[name], len(times)) if plain else None,
                seconds=median(times[name]),
                host_seconds=median(self._host_seconds[name]) if name in self._host_seconds else None,
            )
        reason, chosen = selection.reason, selection.chosen
        if chosen in self._short_of_memory:
            reason += f"; checked with {self._checked_rows[chosen]} rows, for which there was memory"
        parts = [f"{self._measured_rows} rows"] if self._measured_rows < self.problem.rows else []
        parts += [f"{self._measured_vocab} columns"] if self._measured_vocab < self.problem.vocab else []
        if parts:
            reason += f"; measured with {' and '.join(parts)}, for which there was time and memory"
        if self.problem.memory_limit is not None:
            taken = self.candidates[chosen].extra_bytes if self._full_bytes is None else self._full_bytes
            if taken is not None and (not parts or self._full_bytes is not None):
                reason += f"; of {self.problem.memory_limit / MIB:.1f} MiB it takes {taken / MIB:.1f}"
        measured_at = datetime.now(timezone.utc).strftime(TIME)
        decision = Decision(
            problem=self.problem,
            chosen=chosen,
            code=selection.code,
            reason=reason,
            candidates=self.candidates,
            left_out=tuple(name for name in backends_for(self.problem) if name not in self.candidates),
            baseline=next(iter(times)),
            plain_seconds=median(plain) if plain else None,
            rounds=selection.rounds,
            settled=selection.settled,
            measured_rows=self._measured_rows,
            proven_rows=self._proven_rows,
            checked_rows=self._checked_rows.get(chosen, 0),
            short_check=short,
            environment=environment_at(device).to_dict(),
            seed=self.seed,
            measured_at=measured_at,
            tuning_seconds=tuning_seconds,
            measured_vocab=None if self._measured_vocab == self.problem.vocab else self._measured_vocab,
            **self._circumstances,
        )
        seconds = times if plain is None else {**times, PLAIN: plain}
        host_seconds = {name: series for name, series in self._host_seconds.items() if name in times}
        return decision, Evidence(self.seed, measured_at, seconds, self._cases, host_seconds)

    def _verdicts_of_behind(self, times: dict[str, list[float]]) -> dict[str, Candidate]:
        """Of those that were timed in the first rounds alone, beside the baseline in the same."""
        baseline, verdicts = next(iter(times.values())), {}
        for name, other in self._behind.items():
            series = self._seconds[name]
            speedup = speedup_over(baseline[: len(series)], series, len(times))
            reason = f"slower than {other} by more than {BEHIND - 1:.0%}"
            reason += f" in the first {len(series)} rounds, and timed no further"
            verdicts[name] = Candidate("slower", reason, speedup=speedup)
        return verdicts

    def _bring_back(self, names: Sequence[str]) -> None:
        """Have those that were behind run again: only the rounds that they have had count for all."""
        common = min((len(self._seconds[name]) for name in names if name in self._seconds), default=None)
        if common is not None:
            for series in (*self._seconds.values(), *self._host_seconds.values()):
                del series[common:]
        for name in names:
            del self._behind[name]
        self.alive = [name for name in self.candidates if name in (*self.alive, *names)]

    def _enter(self, *, in_rounds: bool) -> None:
        now = time.monotonic()
        self._left[self.in_rounds or self.in_all] -= now - self._part_began
        self.in_rounds, self._part_began = in_rounds, now

    def _note(self, name: str, **fields: Any) -> None:
        self.candidates[name] = replace(self.candidates[name], **fields)
