"""What a profile run has told so far, from the events that it writes: how far it is, its decisions, and what failed."""

import contextlib
import copy
import json
import statistics
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from compiled_logprobs.decision import Decision, speedup_in_words
from compiled_logprobs.errors import ProfileError
from compiled_logprobs.problem import Problem, problem_from_dict
from compiled_logprobs_dashboard.humanize import in_one_line

LOG_LINES = 200
NEARLY = 0.95
"""How much of a problem counts as done at most, before it is."""
UNABLE = ("unavailable", "unsupported")
"""The outcomes that are as expected on many machines."""
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
    """Those that were stored already among them."""
    measured: int = 0
    """How many decisions this run measured."""
    losses: list[Loss] = field(default_factory=list)
    log: deque[str] = field(default_factory=lambda: deque(maxlen=LOG_LINES))
    end: dict[str, Any] | None = None
    """The last event."""
    is_stored: bool = False
    """Whether the problem that it is at is stored already."""
    offset: int = 0
    """Bytes of the events that were read."""

    @property
    def finished(self) -> int:
        """How many problems are over, decided or not."""
        return len(self.decisions) + sum(loss.backend is None for loss in self.losses)

    def copy(self) -> "Seen":
        """One that does not change any more."""
        kept = {name: copy.copy(getattr(self, name)) for name in ("decisions", "losses", "log")}
        return Seen(**{**vars(self), **kept})

    def read(self, events: Path) -> None:
        """Take in what was written since; what the last line lacks of its end is left for the next time."""
        with contextlib.suppress(OSError), events.open("rb") as file:
            file.seek(self.offset)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self.offset += len(line)
                try:
                    self.hear(json.loads(line))
                except (AttributeError, KeyError, TypeError, ValueError, ProfileError, RecursionError) as error:
                    self.log.append(f"a line that is no event of a run is left out: {type(error).__name__}")

    def hear(self, event: dict[str, Any]) -> None:
        """Take in one event. Raises one of several errors for what is none of a run's."""
        hear = getattr(self, f"_hear_{event['event']}", None)
        if hear is not None:
            hear(event)

    def _hear_start(self, event: dict[str, Any]) -> None:
        self.problems = [problem_from_dict(fields) for fields in event["problems"]]
        self.log.append(f"{len(self.problems)} problems on {event['device']}, environment {event['environment']}")

    def _hear_problem(self, event: dict[str, Any]) -> None:
        self.current, self.rounds = problem_from_dict(event["problem"]), 0
        self.is_stored = bool(event["known"])
        self.doing = "is stored already" if self.is_stored else "waiting for the device"
        self.log.append(f"{event['index']} of {event['total']}: {in_one_line(self.current)}")

    def _hear_step(self, event: dict[str, Any]) -> None:
        if event["step"] != "time":  # there are many a second
            self.doing = f"{STEPS.get(event['step'], event['step'])} {event['candidate'] or ''}".strip()

    def _hear_checked(self, event: dict[str, Any]) -> None:
        passed = sum(bool(check["passed"]) for check in event["checks"])
        self.log.append(f"  {event['candidate']}: {passed} of {len(event['checks'])} checks passed")

    def _hear_lost(self, event: dict[str, Any]) -> None:
        self.log.append(f"  {event['candidate']}: {event['outcome']}: {event['reason']}")
        if event["outcome"] not in UNABLE:
            self.losses.append(Loss(self.current, event["candidate"], event["outcome"], event["reason"]))

    def _hear_measuring(self, event: dict[str, Any]) -> None:
        self.doing = f"timing, {event['rows']} rows"

    def _hear_round(self, event: dict[str, Any]) -> None:
        self.rounds += 1
        self.doing = f"timing {', '.join(event['seconds'])}: round {self.rounds}"

    def _hear_decision(self, event: dict[str, Any]) -> None:
        decision = Decision.from_json(json.dumps(event["decision"]).encode())
        self.decisions.append(decision)
        self.measured += not self.is_stored
        self.log.append(f"  {'stored already' if self.is_stored else 'measured'}: {speedup_in_words(decision)}")
        self.current = None

    def _hear_failed(self, event: dict[str, Any]) -> None:
        self.losses.append(Loss(self.current, None, "not decided", event["reason"]))
        self.log.append(f"  not decided: {event['reason']}")
        self.current = None

    def _hear_end(self, event: dict[str, Any]) -> None:
        how = "interrupted" if event["interrupted"] else "finished"
        self.log.append(f"{how} after {event['done']} of {event['total']} problems, {event['seconds']:.0f} s")
        self.end, self.current = event, None


class Outlook(NamedTuple):
    """How far a run is."""

    share: float
    seconds_left: float | None
    """By what this run took so far, else by the limit."""


def outlook(seen: Seen, limit_s: float, elapsed_s: float) -> Outlook:
    """How far the run is `elapsed_s` after its start, and how long the rest may take: `limit_s` a problem at first."""
    total = len(seen.problems)
    if not total:
        return Outlook(0.0, None)
    took = [decision.tuning_seconds for decision in seen.decisions[-seen.measured :]] if seen.measured else []
    each = statistics.fmean(took) if took else limit_s
    left = total - seen.finished
    into = min(NEARLY * each, max(0.0, elapsed_s - sum(took))) if seen.current is not None else 0.0
    share = min(1.0, (seen.finished + into / each) / total) if each > 0 else seen.finished / total
    return Outlook(share, max(0.0, left * each - into))
