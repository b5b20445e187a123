"""What a run has done so far, from the events that it writes: problems, decisions, failures, and how long the rest may take."""

import contextlib
import json
import statistics
import threading
from collections import deque
from dataclasses import dataclass, field, replace
from typing import Any

from compiled_logprobs.cli.output import short, speedup_in_words
from compiled_logprobs.decision import Decision
from compiled_logprobs.errors import ProfileError
from compiled_logprobs.problem import Problem, problem_from_dict
from compiled_logprobs_dashboard.runs import Job, Status, is_running

LOG_LINES = 200
CHUNK_BYTES = 2**22
"""Read at most this much at a time: a run's events are some megabytes, at most."""
NEARLY = 0.95
"""How much of a problem counts as done at most, before it is."""
STEPS = {
    "import": "loading",
    "compile": "first calls of",
    "check": "checking",
    "inputs": "making inputs",
    "memory": "measuring the memory of",
    "time": "timing",
    "full size": "looking at all rows of",
}
"""The worker program's words for what it does, in people's."""


@dataclass(frozen=True)
class Loss:
    """A problem without a decision, or a candidate that failed."""

    problem: Problem | None
    backend: str | None
    """None for the whole problem."""
    outcome: str
    reason: str


@dataclass
class Seen:
    """What the events told so far."""

    problems: list[Problem] = field(default_factory=list)
    """All that the run is to decide."""
    current: Problem | None = None
    """What it is at; None before the first, between two, and after the last."""
    doing: str = ""
    """In words."""
    rounds: int = 0
    decisions: list[Decision] = field(default_factory=list)
    """Those that were known already among them."""
    measured: int = 0
    """How many decisions this run measured."""
    losses: list[Loss] = field(default_factory=list)
    log: deque[str] = field(default_factory=lambda: deque(maxlen=LOG_LINES))
    ended: dict[str, Any] | None = None
    """The last event, `end`."""
    known: bool = False
    """Whether the problem that it is at is stored already."""

    @property
    def finished(self) -> int:
        """How many problems are over, decided or not."""
        return len(self.decisions) + sum(loss.backend is None for loss in self.losses)

    def hear(self, event: dict[str, Any]) -> None:
        """Take in one event. Raises KeyError, TypeError, ValueError or ProfileError for one that is none of a run's."""
        hear = getattr(self, f"_hear_{event['event']}", None)
        if hear is not None:
            hear(event)

    def _hear_start(self, event: dict[str, Any]) -> None:
        self.problems = [problem_from_dict(fields) for fields in event["problems"]]
        self.log.append(f"{len(self.problems)} problems on {event['device']}, environment {event['environment']}")

    def _hear_problem(self, event: dict[str, Any]) -> None:
        self.current, self.rounds = problem_from_dict(event["problem"]), 0
        self.known = bool(event["known"])
        self.doing = "is stored already" if self.known else "waiting for the device"
        self.log.append(f"{event['index']} of {event['total']}: {short(self.current)}")

    def _hear_step(self, event: dict[str, Any]) -> None:
        if event["step"] != "time":  # there are many a second
            self.doing = f"{STEPS.get(event['step'], event['step'])} {event['candidate'] or ''}".strip()

    def _hear_checked(self, event: dict[str, Any]) -> None:
        passed = sum(bool(check["passed"]) for check in event["checks"])
        self.log.append(f"  {event['candidate']}: {passed} of {len(event['checks'])} checks passed")

    def _hear_lost(self, event: dict[str, Any]) -> None:
        self.log.append(f"  {event['candidate']}: {event['outcome']}: {event['reason']}")
        if event["outcome"] not in ("unavailable", "unsupported"):  # as expected on many machines
            self.losses.append(Loss(self.current, event["candidate"], event["outcome"], event["reason"]))

    def _hear_measuring(self, event: dict[str, Any]) -> None:
        self.doing = f"timing, {event['rows']} rows"

    def _hear_round(self, event: dict[str, Any]) -> None:
        self.rounds += 1
        self.doing = f"timing {', '.join(event['seconds'])}: round {self.rounds}"

    def _hear_decision(self, event: dict[str, Any]) -> None:
        decision = Decision.from_json(json.dumps(event["decision"]).encode())
        self.decisions.append(decision)
        self.measured += not self.known
        self.log.append(f"  {'stored already' if self.known else 'decided'}: {speedup_in_words(decision)}")
        self.current = None

    def _hear_failed(self, event: dict[str, Any]) -> None:
        self.losses.append(Loss(self.current, None, "not decided", event["reason"]))
        self.log.append(f"  not decided: {event['reason']}")
        self.current = None

    def _hear_end(self, event: dict[str, Any]) -> None:
        self.ended, self.current = event, None
        how = "interrupted" if event["interrupted"] else "finished"
        self.log.append(f"{how} after {event['done']} of {event['total']} problems, {event['seconds']:.0f} s")


class Following:
    """Reads a run's events as they are written. Several tabs may share one."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self._seen = Seen()
        self._offset = 0
        self._lock = threading.Lock()

    def seen(self) -> Seen:
        """What is known now, as a copy; what the last line lacks of its end is left for the next time."""
        with self._lock:
            with contextlib.suppress(OSError), self.job.events.open("rb") as file:
                file.seek(self._offset)
                while chunk := file.read(CHUNK_BYTES):
                    whole = chunk.rfind(b"\n") + 1
                    if not whole and len(chunk) == CHUNK_BYTES:  # no event is that long
                        whole = len(chunk)
                    self._offset = file.seek(self._offset + whole)
                    for line in chunk[:whole].splitlines():
                        self._hear(line)
                    if not whole:
                        break
            return replace(
                self._seen, decisions=self._seen.decisions[:], losses=self._seen.losses[:], log=self._seen.log.copy()
            )

    def _hear(self, line: bytes) -> None:
        try:
            event = json.loads(line)
            if isinstance(event, dict):
                self._seen.hear(event)
        except (KeyError, TypeError, ValueError, ProfileError, RecursionError) as error:
            self._seen.log.append(f"a line that is no event of a run is left out: {type(error).__name__}")

    def status(self) -> Status:
        """How the run stands."""
        if is_running(self.job):
            return "stopping" if self.job.is_cancelled else "running"
        ended = self.seen().ended
        if ended is None:
            return "cancelled" if self.job.is_cancelled else "died"
        return "cancelled" if ended["interrupted"] else "finished"


@dataclass(frozen=True)
class Outlook:
    """How far a run is."""

    share: float
    """Of all problems, 0 to 1."""
    seconds_left: float | None
    """None where there is nothing to go by."""
    measured: bool
    """Whether that rests on what this run took so far; else on the budget, which is about the most."""


def outlook(seen: Seen, budget_s: float, elapsed_s: float) -> Outlook:
    """How far the run is, and how long the rest may take.

    Args:
        seen: its events.
        budget_s: seconds that it may take for a problem.
        elapsed_s: seconds since its start.
    """
    total = len(seen.problems)
    if not total:
        return Outlook(0.0, None, measured=False)
    took = [one.tuning_seconds for one in seen.decisions[-seen.measured :]] if seen.measured else []
    each = statistics.fmean(took) if took else budget_s
    left = total - seen.finished
    into = min(NEARLY * each, max(0.0, elapsed_s - sum(took))) if seen.current is not None else 0.0
    share = min(1.0, (seen.finished + into / each) / total) if each > 0 else seen.finished / total
    return Outlook(share, max(0.0, left * each - into), measured=bool(took))
