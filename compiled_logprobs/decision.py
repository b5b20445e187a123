"""What tuning a problem found: the decision, and what became of every candidate. This is what profiles hold."""

import json
import math
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from functools import cache
from typing import Any, Literal

from compiled_logprobs.errors import ProfileError
from compiled_logprobs.problem import Problem, problem_to_dict

Outcome = Literal[
    "chosen", "slower", "tie", "wrong", "failed", "oom", "timeout", "crashed", "unavailable", "unsupported"
]
MEASURED = ("chosen", "slower", "tie")
"""The outcomes of candidates that passed the check and were timed."""


@dataclass(frozen=True)
class Speedup:
    """The baseline's seconds over a candidate's: above 1 is faster."""

    low: float | None
    """End of the confidence interval; None where the rounds are too few to give one."""
    median: float
    """Of the ratios within a round."""
    high: float | None

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return f"{self.median:.2f}x"
        return f"{self.median:.2f}x ({self.low:.2f} to {self.high:.2f})"


@dataclass(frozen=True)
class CheckResult:
    """The verdict of one check of the gate."""

    name: str
    passed: bool
    figure: float | None
    """The worst that was seen; None where the check has no figure, or it is not finite."""
    limit: float | None
    detail: str


@dataclass(frozen=True)
class Candidate:
    """What became of one backend."""

    outcome: Outcome
    reason: str
    fingerprint: str | None = None
    """Of the backend as it was; None where it could not be loaded."""
    speedup: Speedup | None = None
    seconds: float | None = None
    """Median of the timed calls, forward and, where the problem needs the gradient, backward."""
    first_call_seconds: float | None = None
    """Of the first call, compiling included, as far as it was not spared that by the compiler's cache or by other problems that
    were measured before in the same run."""
    extra_bytes: int | None = None
    """Peak memory beyond the logits, results and their gradient included; None where it cannot be measured."""
    extra_multiple: float | None = None
    """The same, as a multiple of the logits' size."""
    percent_of_bandwidth: float | None = None
    """Time that the bytes which must move take at the bandwidth measured here, in per cent of `seconds`."""
    checks: tuple[CheckResult, ...] = ()
    repeatable: bool | None = None
    row_invariant: bool | None = None
    """As the check found them; None where it did not get there."""
    measured_at: str | None = None
    """UTC, where it was measured for an earlier decision and has not changed since; None where with this one."""

    @property
    def measured(self) -> bool:
        return self.outcome in MEASURED

    @property
    def worst_error(self) -> float | None:
        """The largest figure of a check as a share of its limit; None where no check has both."""
        both = [(check.figure, check.limit) for check in self.checks]
        return max((abs(figure) / limit for figure, limit in both if figure is not None and limit), default=None)

    @property
    def checks_passed(self) -> int:
        return sum(check.passed for check in self.checks)


@dataclass(frozen=True)
class Record:
    """What is stored of a decision; the problem stands beside it, as the key."""

    chosen: str
    code: str
    """Why, in one word, such as FASTER_CLEAR."""
    reason: str
    """Why, in a sentence."""
    candidates: dict[str, Candidate]
    left_out: tuple[str, ...]
    """Backends that were registered, but that the run was not asked about."""
    baseline: str
    """What `speedup` compares with: eager, unless it could not be measured."""
    rounds: int
    settled: bool
    """Whether more rounds could not have changed the choice."""
    measured_rows: int
    """N of the inputs that were timed: less than the problem's where time or memory was short."""
    proven_rows: int
    """N of the largest result of the chosen backend of which a few rows were held against float64."""
    checked_rows: int
    """N of the largest input of the check."""
    short_check: bool
    """Whether the check had its fewer inputs, as where `auto` tunes by itself."""
    environment: dict[str, str | int | float | None]
    """All facts of the environment, as they were; only some of them make its fingerprint."""
    bandwidth: dict[str, float]
    """Bytes a second that this device reached, by kind of access, and the size of the buffer."""
    telemetry: dict[str, str | int | float | tuple[str, ...] | None] | None
    """Clocks and throttling while timing; None where nothing reports them."""
    telemetry_reason: str | None
    """Why nothing does."""
    seed: int
    measured_at: str
    """UTC, as in 2026-11-24T07:00:00Z."""
    tuning_seconds: float


@dataclass(frozen=True)
class Decision(Record):
    """The backend that serves a problem and all N of its bucket, and why."""

    problem: Problem = field(kw_only=True)
    """The top of its bucket of N."""

    @property
    def winner(self) -> Candidate:
        return self.candidates[self.chosen]

    def calls_to_pay(self, name: str) -> float | None:
        """After how many calls `name`, first call included, has taken less time than the baseline; None if never."""
        candidate, baseline = self.candidates[name], self.candidates[self.baseline]
        first, seconds, slow = candidate.first_call_seconds, candidate.seconds, baseline.seconds
        if candidate.measured_at is not None and candidate.speedup is not None and seconds is not None:
            slow = seconds * candidate.speedup.median  # as the baseline was then
        if first is None or seconds is None or slow is None or slow <= seconds:
            return None
        # They were timed at `measured_rows`; a call at the full N saves in proportion.
        saved = (slow - seconds) * self.problem.rows / self.measured_rows
        calls = first / saved if saved > 0 else math.inf
        return max(1.0, math.ceil(calls)) if math.isfinite(calls) else None

    def best_row_invariant(self) -> str | None:
        """The fastest candidate whose rows do not depend on N; None if there is none."""
        if self.winner.row_invariant:
            return self.chosen
        fit = {name: c for name, c in self.candidates.items() if c.measured and c.row_invariant}
        return min(fit, key=lambda name: fit[name].seconds or math.inf, default=None)

    def to_dict(self) -> dict[str, Any]:
        """For programs: plain values only; what a profile stores, and what follows from it."""
        fields = self.record()
        for name, candidate in fields["candidates"].items():
            candidate["worst_error"] = self.candidates[name].worst_error
            candidate["calls_to_pay"] = self.calls_to_pay(name)
        return {"problem": problem_to_dict(self.problem), **fields}

    def record(self) -> dict[str, Any]:
        """What a profile stores of it."""
        fields = asdict(self)
        del fields["problem"]
        return fields

    @classmethod
    def from_record(cls, problem: Problem, record: dict[str, Any]) -> "Decision":
        """What `record` gave. Raises ProfileError for anything that it does not return: the file may be foreign."""
        from pydantic import ValidationError

        try:
            known = _adapter().validate_json(json.dumps(record), strict=True)
        except ValidationError as error:
            first = error.errors()[0]
            raise ProfileError(
                f"its decision has no valid {'.'.join(map(str, first['loc']))}: {first['msg']}"
            ) from None
        for name, what in ((known.chosen, "chosen"), (known.baseline, "baseline")):
            if name not in known.candidates or not known.candidates[name].measured:
                raise ProfileError(f"its {what} backend {name!r:.80} is not among those that it measured")
        if known.measured_rows < 1:
            raise ProfileError(f"it was measured with {known.measured_rows} rows; valid is 1 or more")
        return cls(problem=problem, **vars(known))


def moment(measured_at: str) -> datetime | None:
    """When that was; None where it has not the form that `Record.measured_at` has, as a foreign file may not."""
    try:
        return datetime.strptime(measured_at, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=timezone.utc)
    except ValueError:
        return None


@cache
def _adapter() -> Any:
    from pydantic import TypeAdapter  # takes longer to import than most processes need it

    return TypeAdapter(Record)
