"""What a decision rests on: the seconds of every round, and what the check found in every case. It is stored beside the decision.

Shapes: N rows, V vocabulary, K labels a row.
"""

import json
import math
from collections.abc import Collection
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

from compiled_logprobs.errors import ProfileError

QUANTILES = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)
"""The shares of the errors that `Spread.quantiles` are the upper ends of."""

Kind = Literal["log_prob", "entropy", "gradient"]
Number = float | Literal["nan", "inf", "-inf"]
"""As JSON can hold it."""


@dataclass(frozen=True)
class CaseCheck:
    """The verdict of one check on one kind of input."""

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
    """Of V: the label whose log-probability it is, or the logit whose gradient; None for an entropy, which is a row's."""
    got: Number
    true: Number
    """In float64."""
    error: float | None
    """None where it is NaN or infinite and float64 is not, or the other way round."""


@dataclass(frozen=True)
class Spread:
    """How far the values of one kind were off: log-probabilities and entropies in nats, the gradient in its own unit."""

    what: Kind
    count: int
    """Of the errors that these are quantiles of: of all values that are finite and not ignored; of a gradient, of a sample."""
    quantiles: tuple[float, ...]
    """Of the absolute errors, at `QUANTILES`; the last is the largest of all values."""
    worst: tuple[Token, ...]
    """The largest errors, largest first; none where there is no error."""


@dataclass(frozen=True)
class CaseFindings:
    """What the check found with one kind of input."""

    case: str
    """The kind of input, such as 'shifted up by 1e4'."""
    rows: int
    checks: tuple[CaseCheck, ...]
    """Of those that the input put to the test."""
    errors: tuple[Spread, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values, without what is as it is by default, since there are hundreds a decision; see `Evidence.from_record`."""
        return {
            "case": self.case,
            "rows": self.rows,
            "checks": [_short(one) for one in self.checks],
            "errors": [
                {
                    "what": one.what,
                    "count": one.count,
                    "quantiles": [_rounded(value, 4) for value in one.quantiles],
                    "worst": [
                        {
                            "row": token.row,
                            "token": token.token,
                            "got": _rounded(token.got, 9),
                            "true": _rounded(token.true, 9),
                            "error": _rounded(token.error, 4),
                        }
                        for token in one.worst
                    ],
                }
                for one in self.errors
            ],
        }


@dataclass(frozen=True)
class Evidence:
    """What is stored beside a decision."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    """By candidate and round."""
    cases: dict[str, tuple[CaseFindings, ...]] = field(default_factory=dict)
    """By candidate, of those that got as far as the check."""

    def record(self) -> dict[str, Any]:
        """What a profile stores of it."""
        return {
            "seconds": self.seconds,
            "cases": {name: [case.to_dict() for case in cases] for name, cases in self.cases.items()},
        }

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> "Evidence":
        """What `record` gave. Raises ProfileError for anything that it does not return: the file may be foreign."""
        from pydantic import ValidationError

        try:
            found = _adapter().validate_json(json.dumps(record), strict=True)
        except ValidationError as error:
            first = error.errors()[0]
            raise ProfileError(
                f"its evidence has no valid {'.'.join(map(str, first['loc']))}: {first['msg']}"
            ) from None
        return found  # type: ignore[no-any-return]

    def with_cases_of(self, earlier: "Evidence", names: Collection[str]) -> "Evidence":
        """The same, with what the check found of `names` at an earlier time."""
        carried = {name: cases for name, cases in earlier.cases.items() if name in names and name not in self.cases}
        return Evidence(self.seconds, {**self.cases, **carried})


def number(value: float) -> Number:
    """As JSON can hold it."""
    return value if math.isfinite(value) else "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"


def _short(check: CaseCheck) -> dict[str, Any]:
    short: dict[str, Any] = {"name": check.name}
    if not check.passed:
        short |= {"passed": False, "detail": check.detail}
    if check.figure is not None:
        short["figure"] = _rounded(check.figure, 6)
    if check.limit is not None:
        short["limit"] = _rounded(check.limit, 6)
    return short


def _rounded(value: Any, digits: int) -> Any:
    """To so many significant digits: the others are no news, and there are thousands of values."""
    return float(f"{value:.{digits}g}") if isinstance(value, float) else value


@cache
def _adapter() -> Any:
    from pydantic import TypeAdapter  # takes longer to import than most processes need it

    return TypeAdapter(Evidence)
