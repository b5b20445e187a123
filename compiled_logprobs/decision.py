"""The answer: which backend serves a problem, what became of every candidate, and the evidence that this rests on.

There is one form of it, from the worker's events to the file on disk and back: these classes, and their fields as JSON.

Shapes: N rows, V vocabulary, K labels a row.
"""

import math
from collections.abc import Collection
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from datetime import datetime, timezone
from typing import Any, Literal, TypeVar

import msgspec

from compiled_logprobs.errors import ProfileError
from compiled_logprobs.problem import Problem, mode_name, problem_from_dict, problem_to_dict

Outcome = Literal[
    "chosen", "slower", "tie", "wrong", "failed", "oom", "timeout", "crashed", "unavailable", "unsupported"
]
MEASURED = ("chosen", "slower", "tie")
"""The outcomes of candidates that passed the check and were timed."""
MARGIN = 0.03
"""How much faster than the baseline a candidate has to be: what is less is not worth another backend."""
PLAIN = "log_softmax"
"""What plain `log_softmax` and `gather` are called in `Evidence.seconds`; no backend may have that name."""
QUANTILES = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)
"""The shares of the errors that `Spread.quantiles` are the upper ends of."""
TIME = "%Y-%m-%dT%H:%M:%SZ"
"""The form of `measured_at`: UTC."""

Kind = Literal[
    "log_prob",
    "entropy",
    "logsumexp",
    "sum_p_squared",
    "gradient",
    "hidden_gradient",
    "weight_gradient",
    "bias_gradient",
]
Number = float | Literal["nan", "inf", "-inf"]
"""As JSON can hold it."""

Class = TypeVar("Class")


@dataclass(frozen=True)
class Speedup:
    """Another's seconds over a candidate's: above 1 is faster."""

    low: float | None
    """End of the confidence interval; None where the rounds are too few to give one."""
    median: float
    """Of the ratios within a round."""
    high: float | None

    @property
    def may_be_faster(self) -> bool:
        """Whether the rounds leave it possible, by the margin."""
        return self.high is None or self.high > 1.0 + MARGIN

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return f"{self.median:.2f}x"
        return f"{self.median:.2f}x ({self.low:.2f} to {self.high:.2f})"


@dataclass(frozen=True)
class Check:
    """The result of one check: of a candidate, the worst over all inputs; of a case, on that kind of input."""

    name: str
    passed: bool = True
    figure: float | None = None
    """The worst that was seen; None where the check has no figure, or it is not finite."""
    limit: float | None = None
    detail: str = ""


@dataclass(frozen=True)
class Token:
    """A value that was off."""

    row: int
    """Of N."""
    token: int | None
    """Of V: the label whose log-probability it is, or the logit whose gradient; None for an entropy, which is a
    row's."""
    got: Number
    true: Number
    """In float64."""
    error: float | None
    """None where it is NaN or infinite and float64 is not, or the other way round."""


@dataclass(frozen=True)
class Spread:
    """How far the values of one kind were off: log-probabilities and entropies in nats, the gradient in its own
    unit."""

    what: Kind
    count: int
    """Of the errors that these are quantiles of: of all values that are finite and not ignored; of a gradient, a
    sample."""
    quantiles: tuple[float, ...]
    """Of the absolute errors, at `QUANTILES`; the last is the largest of all values."""
    worst: tuple[Token, ...]
    """The largest errors, largest first; none where there is no error."""


@dataclass(frozen=True)
class CaseEvidence:
    """What the check saw with one kind of input."""

    case: str
    """The kind of input, such as 'shifted up by 1e4'."""
    rows: int
    checks: tuple[Check, ...]
    """Those that the input put to the test."""
    errors: tuple[Spread, ...] = ()


@dataclass(frozen=True)
class Evidence:
    """What a decision rests on. It is stored in a file beside the decision, with the same seed and time."""

    seed: int
    measured_at: str
    seconds: dict[str, list[float]] = field(default_factory=dict)
    """By candidate, and of `PLAIN`, one a round."""
    cases: dict[str, tuple[CaseEvidence, ...]] = field(default_factory=dict)
    """By candidate, of those that got as far as the check."""
    host_seconds: dict[str, list[float]] = field(default_factory=dict)
    """Until the same calls of `seconds` returned, by candidate; none on a CPU, where these are the same."""

    def with_cases_of(self, earlier: "Evidence", names: Collection[str]) -> "Evidence":
        """The same, with what the check saw of `names` at an earlier time."""
        carried = {name: cases for name, cases in earlier.cases.items() if name in names and name not in self.cases}
        return replace(self, cases={**self.cases, **carried})

    def to_json(self) -> bytes:
        """Without what is as it is by default, since there are hundreds of checks a decision."""
        return msgspec.json.encode(_without_defaults(self)) + b"\n"

    @classmethod
    def from_json(cls, data: bytes) -> "Evidence":
        """What `to_json` gave. Raises ProfileError for anything else: the file may be foreign."""
        return from_plain(parse_json(data), cls)


@dataclass(frozen=True)
class Candidate:
    """What became of one backend."""

    outcome: Outcome
    reason: str
    fingerprint: str | None = None
    """Of the backend as it was; None where it could not be loaded."""
    speedup: Speedup | None = None
    """Over the baseline."""
    speedup_over_plain: Speedup | None = None
    """Over plain `log_softmax` and `gather`; None where these could not be timed."""
    seconds: float | None = None
    """Median of the timed calls, forward and, where the problem needs the gradient, backward."""
    host_seconds: float | None = None
    """Median of the time until the same calls returned; None on a CPU, where it is the same."""
    first_call_seconds: float | None = None
    """Of the first call, compiling included, as far as it was not spared that by the compiler's cache or by other
    problems that were measured before in the same run."""
    extra_bytes: int | None = None
    """Peak memory beyond the logits, results and their gradient included; from hidden states, beyond arguments, results
    and gradients; None where it cannot be measured."""
    extra_multiple: float | None = None
    """The same, as a multiple of the logits' size."""
    percent_of_bandwidth: float | None = None
    """Time that the bytes which must move take at the bandwidth measured here, in per cent of `seconds`."""
    checks: tuple[Check, ...] = ()
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
class Decision:
    """The backend that serves a problem and all N of its bucket, and why. Its fields are those of the file."""

    problem: Problem
    """The top of its bucket of N."""
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
    plain_seconds: float | None
    """Median of plain `log_softmax` and `gather`, timed in the same rounds; None where they could not be."""
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
    """Of the inputs."""
    measured_at: str
    """UTC, as in 2026-11-24T07:00:00Z."""
    tuning_seconds: float
    measured_vocab: int | None = None
    """V of the inputs that were timed, from hidden states, where it was less than the problem's; None: all."""

    @property
    def timed(self) -> Problem:
        """What was timed: the problem, or a part of it."""
        return self.problem._replace(rows=self.measured_rows, vocab=self.measured_vocab or self.problem.vocab)

    @property
    def timed_in_words(self) -> str:
        """Such as '512 rows and 12288 columns'; empty where all was timed."""
        part, whole = self.timed, self.problem
        words = [f"{part.rows} rows"] if part.rows < whole.rows else []
        return " and ".join(words + ([f"{part.vocab} columns"] if part.vocab < whole.vocab else []))

    @property
    def winner(self) -> Candidate:
        return self.candidates[self.chosen]

    @property
    def is_decided(self) -> bool:
        """Whether the rounds could tell which is fastest. Else what is chosen serves by least regret, its own bucket of
        N alone, and a longer run decides."""
        return self.code != "LEAST_REGRET"

    def calls_to_pay(self, name: str) -> float | None:
        """After how many calls `name`, first call included, has taken less time than the baseline; None if never."""
        candidate, baseline = self.candidates[name], self.candidates[self.baseline]
        first, seconds, slow = candidate.first_call_seconds, candidate.seconds, baseline.seconds
        if candidate.measured_at is not None and candidate.speedup is not None and seconds is not None:
            slow = seconds * candidate.speedup.median  # as the baseline was then
        if first is None or seconds is None or slow is None or slow <= seconds:
            return None
        # A call of the whole saves in proportion.
        parts = self.problem.rows * self.problem.vocab / (self.timed.rows * self.timed.vocab)
        saved = (slow - seconds) * parts
        calls = first / saved if saved > 0 else math.inf
        return max(1.0, math.ceil(calls)) if math.isfinite(calls) else None

    def to_dict(self) -> dict[str, Any]:
        """For programs: the fields as plain values, and what follows from them."""
        plain = {**self._plain(), "is_decided": self.is_decided}
        for name, candidate in plain["candidates"].items():
            candidate["worst_error"] = self.candidates[name].worst_error
            candidate["calls_to_pay"] = self.calls_to_pay(name)
        return plain

    def to_json(self) -> bytes:
        """The content of its file."""
        return msgspec.json.format(msgspec.json.encode(self._plain()), indent=2) + b"\n"

    @classmethod
    def from_json(cls, data: bytes) -> "Decision":
        """What `to_json` gave. Raises ProfileError for anything else: the file may be foreign."""
        plain = parse_json(data)
        if isinstance(plain, dict) and "problem" in plain:
            plain["problem"] = problem_from_dict(plain["problem"])
        decision = from_plain(plain, cls)
        for name, what in ((decision.chosen, "chosen"), (decision.baseline, "baseline")):
            if name not in decision.candidates or not decision.candidates[name].measured:
                raise ProfileError(f"its {what} backend {name!r:.80} is not among those that it measured")
        if decision.timed.rows < 1 or decision.timed.vocab < 1:
            part = f"{decision.timed.rows} rows and {decision.timed.vocab} columns"
            raise ProfileError(f"it was measured with {part}; valid is 1 or more")
        return decision

    def _plain(self) -> dict[str, Any]:
        return {**asdict(self), "problem": problem_to_dict(self.problem)}


def number(value: float) -> Number:
    """As JSON can hold it."""
    return value if math.isfinite(value) else "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"


def moment(measured_at: str) -> datetime | None:
    """When that was; None where it has not the form of `TIME`, as in a foreign file."""
    try:
        return datetime.strptime(measured_at, TIME).replace(tzinfo=timezone.utc)
    except ValueError:
        return None


def short(problem: Problem) -> str:
    """The problem and its mode, on one line."""
    return f"{problem}, {mode_name(problem)}"


def winner_in_words(decision: Decision) -> str:
    """The backend that won, or 'undecided'."""
    return decision.chosen if decision.is_decided else "undecided"


def speedup_in_words(decision: Decision) -> str:
    """Such as 'compiled, 2.10x (2.04 to 2.15) the speed of log_softmax and gather, 1.80x (1.75 to 1.84) of eager'.

    Where it is undecided, between whom, and who serves: 'undecided: 12 rounds do not tell whether cpp (4.83x, 0.24 to
    31.85) is faster than eager; cpp serves by least regret'.
    """
    if not decision.is_decided:
        doubtful = " or ".join(
            f"{name} ({str(candidate.speedup).replace(' (', ', ').rstrip(')')})"
            for name, candidate in decision.candidates.items()
            if candidate.outcome in ("chosen", "tie") and name != decision.baseline
            if candidate.speedup is not None and candidate.speedup.may_be_faster
        )
        return (
            f"undecided: {decision.rounds} rounds do not tell whether {doubtful or 'another'} is faster than "
            f"{decision.baseline}; {decision.chosen} serves by least regret"
        )
    over_plain = decision.winner.speedup_over_plain
    parts = [] if over_plain is None else [f"{over_plain} the speed of {PLAIN} and gather"]
    if decision.chosen != decision.baseline:
        parts.append(f"{decision.winner.speedup} {'of' if parts else 'the speed of'} {decision.baseline}")
    reason = f": {decision.reason}" if decision.chosen == decision.baseline else ""
    return ", ".join([decision.chosen, *parts]) + reason


def parse_json(data: bytes) -> Any:
    """What JSON in `data` says. Raises ProfileError where it is none: the file may be foreign."""
    try:
        return msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProfileError(f"it is not JSON in UTF-8 ({error})") from None


def from_plain(plain: object, kind: type[Class]) -> Class:
    """The `kind` that plain values, as JSON has them, stand for. Raises ProfileError where they stand for none."""
    try:
        return msgspec.convert(plain, kind, dec_hook=_as_it_is)
    except msgspec.ValidationError as error:
        raise ProfileError(f"it is not valid: {error}") from None


def _as_it_is(kind: type, value: object) -> object:
    """A field of a type that JSON does not have."""
    return value


def _without_defaults(value: Any) -> Any:
    """The fields of `value`, and of what is in it, that are not as they are by default."""
    if is_dataclass(value):
        stated = [(each.name, getattr(value, each.name), each.default) for each in fields(value)]
        return {name: _without_defaults(item) for name, item, default in stated if item != default}
    if isinstance(value, dict):
        return {key: _without_defaults(item) for key, item in value.items()}
    return [_without_defaults(item) for item in value] if isinstance(value, tuple) else value
