"""What was measured: seconds by round, memory and error of each candidate, and what follows from them."""

import math
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Literal

from benchmarks.candidates import READ
from compiled_logprobs.machine.bandwidth import minimum_bytes
from compiled_logprobs.problem import Problem, short_name
from compiled_logprobs.tuning.statistics import Interval, interval

CONFIDENCE = 0.95
"""Of the interval around one ratio."""

COLUMNS = {
    "ms": "milliseconds a call, the median over the rounds; each call starts with a cold cache and frees what it made",
    "host_ms": "milliseconds until the call returned, the median; on a GPU the device may still be at work",
    "billions_of_logits_per_s": "N times V over the first of these",
    "percent_of_read": "time of a bare read of the logits (amax, in the same rounds) in per cent of the candidate's",
    "percent_of_copy": "time of moving the bytes that must be moved, at the speed of a copy, in per cent of it",
    "extra_bytes": "peak of the memory in use over what was there before the call; results and their gradient count",
    "extra_multiple": "the same, as a multiple of the logits",
    "error_max": "largest distance of a log-probability from float64, in nats, over some rows",
    "error_rmse": "root of the mean square of these distances",
    "times_as_fast_as": "a peer's time over the candidate's: median of the ratios within a round, and a 95 % interval",
}
"""What the figures of a row mean."""


@dataclass
class Result:
    """What came of one candidate; figures only where the outcome is 'measured'."""

    name: str
    ours: bool
    note: str = ""
    """What `auto` took, or in what way a figure is not like the others'."""
    outcome: Literal["measured", "wrong", "failed", "oom", "unavailable"] = "measured"
    reason: str = ""
    """Of the outcome; of a measured `auto`, why it took what it took."""
    seconds: list[float] = field(default_factory=list)
    """One a round."""
    host_seconds: list[float] = field(default_factory=list)
    """Of the same rounds: until the call returned."""
    extra_bytes: int | None = None
    """None where memory cannot be measured."""
    error_max: float = math.nan
    error_rmse: float = math.nan

    @property
    def measured(self) -> bool:
        return self.outcome == "measured"

    @property
    def sound(self) -> bool:
        """Whether nothing went wrong: what cannot run here has done nothing wrong."""
        return self.outcome in ("measured", "unavailable")

    @property
    def label(self) -> str:
        return f"{self.name} ({self.note})" if self.note else self.name


@dataclass(frozen=True)
class Cell:
    """All candidates on one problem."""

    problem: Problem
    mode: str
    results: dict[str, Result]
    read_seconds: list[float]
    """Of the bare read, one a round; none where there was no memory for the logits."""
    copy_bytes_per_s: float
    """Of a copy within the device's memory; bytes read and bytes written."""

    @property
    def logits_bytes(self) -> int:
        return self.problem.rows * self.problem.vocab * self.problem.dtype.itemsize

    def measured(self, *, ours: bool) -> list[Result]:
        return [one for one in self.results.values() if one.measured and one.ours is ours]

    def has(self, *names: str) -> bool:
        """Whether all of these were measured."""
        return all(name in self.results and self.results[name].measured for name in names)

    def times_as_fast(self, name: str, other: str) -> Interval:
        """How many times as fast `name` is as `other`, by pairs of the same round."""
        return _ratio(self.results[other].seconds, self.results[name].seconds)

    def percent_of_read(self, name: str) -> float:
        return 100 * _ratio(self.read_seconds, self.results[name].seconds).median

    def percent_of_copy(self, seconds: float) -> float:
        return 100 * minimum_bytes(self.problem) / self.copy_bytes_per_s / seconds

    def billions_per_s(self, seconds: float) -> float:
        return self.problem.rows * self.problem.vocab / seconds / 1e9

    def to_rows(self) -> list[dict[str, Any]]:
        """For programs: a flat row for the bare read and for each candidate; None where there is no figure."""
        problem = self.problem
        where = {
            "rows": problem.rows,
            "vocab": problem.vocab,
            "dtype": short_name(problem.dtype),
            "device": problem.device_type,
            "mode": self.mode,
        }
        rows: list[dict[str, Any]] = []
        if self.read_seconds:
            read = median(self.read_seconds)
            bare = {"ms": read * 1e3, "billions_of_logits_per_s": self.billions_per_s(read), "percent_of_read": 100.0}
            bare_read = {"candidate": READ, "kind": "read", "outcome": "measured", "seconds": self.read_seconds}
            rows.append({**where, **bare_read, **bare})
        return rows + [{**where, **self._row(one)} for one in self.results.values()]

    def _row(self, one: Result) -> dict[str, Any]:
        row: dict[str, Any] = {
            "candidate": one.name,
            "kind": "ours" if one.ours else "peer",
            "note": one.note,
            "outcome": one.outcome,
            "reason": one.reason,
        }
        if not one.measured:
            return row
        seconds, extra = median(one.seconds), one.extra_bytes
        return row | {
            "ms": seconds * 1e3,
            "host_ms": median(one.host_seconds) * 1e3,
            "billions_of_logits_per_s": self.billions_per_s(seconds),
            "percent_of_read": self.percent_of_read(one.name),
            "percent_of_copy": self.percent_of_copy(seconds),
            "extra_bytes": extra,
            "extra_multiple": None if extra is None else extra / self.logits_bytes,
            "error_max": one.error_max,
            "error_rmse": one.error_rmse,
            "times_as_fast_as": {
                peer.name: {
                    name: value if 0 < value < math.inf else None  # without an interval
                    for name, value in self.times_as_fast(one.name, peer.name)._asdict().items()
                }
                for peer in self.measured(ours=False)
                if peer is not one
            },
            "seconds": one.seconds,
        }


def _ratio(above: list[float], below: list[float]) -> Interval:
    # One that is far slower than others has only the first rounds.
    logs = [math.log(a / b) for a, b in zip(above, below, strict=False)]
    low, middle, high = interval(logs, CONFIDENCE)
    # With too few rounds for an interval its ends are 0 and infinite.
    return Interval(math.exp(low), math.exp(middle), math.exp(high))
