"""Numbers for people: one form for each kind of figure, on every page. What is not known is said so, and never 0."""

import math
import re
from datetime import datetime

import pandas as pd

from compiled_logprobs.decision import short
from compiled_logprobs.problem import Problem

NOT_KNOWN = "not measured"
_DECIMAL = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def short_number(value: float) -> str:
    """Three digits and no exponent, but for what is smaller than a thousandth."""
    size = abs(value)
    return f"{value:,.0f}" if size >= 999.5 else f"{value:.3g}"


def duration(seconds: float | None) -> str:
    """Such as 30.2 ms; what is longer than minutes as an estimate."""
    if seconds is None or not math.isfinite(seconds):
        return NOT_KNOWN
    if seconds >= 90:
        return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:,.1f} h"
    unit, factor = next(((u, f) for u, f in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)) if seconds >= f), ("ns", 1e-9))
    return f"{short_number(seconds / factor)} {unit}"


def size(number: float | None) -> str:
    """Bytes, such as 2.5 GiB."""
    if number is None or not math.isfinite(number):
        return NOT_KNOWN
    for unit, factor in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(number) >= factor:
            return f"{short_number(number / factor)} {unit}"
    return f"{number:.0f} bytes"


def rate(per_second: float | None, unit: str) -> str:
    """Such as 3.04 Mtokens/s, or 3 TB/s for the unit B."""
    if per_second is None or not math.isfinite(per_second):
        return NOT_KNOWN
    factor, prefix = next(((factor, letter) for factor, letter in _DECIMAL if abs(per_second) >= factor), (1.0, ""))
    return f"{short_number(per_second / factor)} {prefix}{unit}/s"


def times(ratio: float | None, low: float | None = None, high: float | None = None) -> str:
    """A ratio with its interval, such as 8.00x (7.60 to 8.40)."""
    if ratio is None or not math.isfinite(ratio):
        return NOT_KNOWN
    has_ends = low is not None and high is not None and math.isfinite(low) and math.isfinite(high)
    return f"{ratio:.2f}x" + (f" ({low:.2f} to {high:.2f})" if has_ends else "")


def percent(value: float | None) -> str:
    return NOT_KNOWN if value is None or not math.isfinite(value) else f"{value:,.0f} %"


def of_limit(figure: float | None, limit: float | None) -> str:
    """How much of what is allowed an error makes; how often it holds it where it is more."""
    if figure is None or limit is None or not math.isfinite(figure) or not math.isfinite(limit):
        return ""
    if not limit:
        return "0 is allowed" if figure else ""
    share = abs(figure) / limit
    if share <= 1:
        return f"{100 * share:.0f} % of the limit"
    factor, word = next(((f, w) for f, w in ((1e9, " billion"), (1e6, " million")) if share >= f), (1.0, ""))
    often = f"{short_number(share / factor)}{word}" if share < 1e12 else "over a trillion"
    return f"{often} times the limit"


def days_since(measured_at: "pd.Series[str]", now: datetime) -> "pd.Series[float]":
    """Whole days; missing where it is no date."""
    then = pd.to_datetime(measured_at, format="%Y-%m-%dT%H:%M:%SZ", utc=True, errors="coerce")
    return (now - then).dt.total_seconds().floordiv(86400).clip(lower=0)


def age(measured_at: str, now: datetime) -> str:
    """How long ago that was; empty where it is no date."""
    days = days_since(pd.Series([measured_at]), now).iloc[0]
    return "" if pd.isna(days) else "today" if days < 1 else f"{days:.0f} day{'' if days == 1 else 's'} ago"


def significant(values: "pd.Series[float]", digits: int = 3) -> "pd.Series[float]":
    """Rounded to so many digits, for a column that is to be sorted."""
    return values.map(lambda value: float(f"{value:.{digits}g}") if math.isfinite(value) else math.nan)


def in_one_line(problem: Problem) -> str:
    """Such as '512 x 151,936 bfloat16 on cpu, backward'."""
    return re.sub(r"\d{4,}", lambda found: f"{int(found[0]):,}", short(problem))


def plural(count: int, word: str) -> str:
    """Such as '1 decision' and '5,000 decisions'."""
    return f"{count:,} {word}{'' if count == 1 else 's'}"
