"""Tables of the sign check: what each check came to for each backend, dtype and kind of input, how the errors spread,
which tokens are most off.

All of it was found by the gate when the decision was made, and is stored; nothing is checked here.
"""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import pandas as pd

from compiled_logprobs.check.report import MEANING
from compiled_logprobs.decision import QUANTILES, Candidate, Decision, Evidence
from compiled_logprobs.errors import ProfileError
from compiled_logprobs_dashboard.frames import Frames, Profile, Shape, dtypes, look_up
from compiled_logprobs_dashboard.looks import VERDICTS, plain_line

ALL = "all inputs"
"""Stands for the worst over all kinds of input."""
CHECKS = ["backend", "dtype", "input", "check", "verdict", "figure", "limit", "detail"]
QUANTILE = [f"q{round(share * 100)}" for share in QUANTILES]
ERRORS = ["backend", "dtype", "input", "what", "count", "limit", *QUANTILE]
TOKENS = ["backend", "dtype", "input", "what", "row", "token", "got", "float64", "error"]
KINDS = {
    "log_prob": "log-probability",
    "entropy": "entropy",
    "logsumexp": "logsumexp",
    "sum_p_squared": "sum of squared probabilities",
    "gradient": "gradient",
}
"""What the kinds of results are called."""
UNITS = dict.fromkeys(KINDS, "nats") | {"sum_p_squared": "1", "gradient": "of the gradient's unit"}


class Checked(NamedTuple):
    """One decision: of one dtype."""

    dtype: str
    decision: Decision
    evidence: Evidence
    exact: bool
    """Whether it is for the N that was asked for, and not the nearest."""
    missing: str
    """Why there are no details; empty where there are."""


def gather(frames: Frames, profile: Profile, shape: Shape) -> tuple[list[Checked], list[str]]:
    """For each dtype of a profile what serves `shape` but for its dtype; and why one cannot be read."""
    checked, broken = [], []
    stored = set(frames.of(profile)["dtype"])
    for dtype in (name for name in dtypes(frames) if name in stored):
        says = look_up(frames, profile, shape._replace(dtype=dtype))
        if says.key is None:
            continue
        try:
            decision = frames.decision(says.key)
        except ProfileError as error:
            broken.append(f"{dtype}: {plain_line(error)}")
            continue
        evidence, missing = frames.evidence(says.key, decision), ""
        if evidence is None:
            evidence, missing = Evidence(0, ""), "nothing that can be read is stored beside the decision"
        elif not evidence.cases:
            missing = "what is stored beside the decision tells only times"
        checked.append(Checked(dtype, decision, evidence, decision.problem == says.problem, missing))
    return checked, broken


def overview(found: Iterable[Checked]) -> pd.DataFrame:
    """The worst over all inputs, a row for each backend, dtype and check: `CHECKS`, with `ALL` as input."""
    rows = []
    for checked in found:
        names = _in_order({check.name for each in checked.decision.candidates.values() for check in each.checks})
        for backend, candidate in checked.decision.candidates.items():
            checks = _by_name(candidate.checks)
            rows += [_row(backend, checked.dtype, ALL, name, checks.get(name), candidate) for name in names]
    return _table(rows, CHECKS)


def by_input(found: Iterable[Checked]) -> pd.DataFrame:
    """The same for each kind of input. What an input does not put to the test, for no backend, has no row.

    A backend that did not get as far as the check has one row an input, of the check that every call returns.
    """
    rows = []
    for checked in found:
        cases = checked.evidence.cases
        asked: dict[str, set[str]] = {}
        for by_case in cases.values():
            for case in by_case:
                asked.setdefault(case.case, set()).update(check.name for check in case.checks)
        for backend, candidate in checked.decision.candidates.items():
            if candidate.checks and backend not in cases:
                continue  # it was checked, and the details are not there
            told = {case.case: _by_name(case.checks) for case in cases.get(backend, ())}
            rows += [
                _row(backend, checked.dtype, case, name, told.get(case, {}).get(name), candidate)
                for name in _in_order(set().union(*asked.values()))
                for case in asked
                if name in asked[case] and (told or name == "runs")
            ]
    return _table(rows, CHECKS)


def _by_name(checks: Iterable[Any]) -> dict[str, Any]:
    """Where a foreign file has one twice, that which failed."""
    found: dict[str, Any] = {}
    for check in checks:
        if check.name not in found or not check.passed:
            found[check.name] = check
    return found


def _row(backend: str, dtype: str, case: str, name: str, check: Any, candidate: Candidate) -> dict[str, Any]:
    return {
        "backend": backend,
        "dtype": dtype,
        "input": case,
        "check": name,
        "verdict": _verdict(check, candidate),
        "figure": getattr(check, "figure", None),
        "limit": getattr(check, "limit", None),
        "detail": plain_line(check.detail if check is not None else _why_not_run(candidate)),
    }


def _verdict(check: Any, candidate: Candidate) -> str:
    if check is not None:
        return "pass" if check.passed else "fail"
    if candidate.outcome in ("unsupported", "unavailable"):
        return "unsupported"
    if candidate.outcome in ("failed", "crashed", "timeout", "oom"):
        return "error"
    return "not run"


def _why_not_run(candidate: Candidate) -> str:
    if candidate.outcome == "wrong":
        return f"not run, since another check had failed: {candidate.reason}"
    if candidate.measured:
        return "no verdict of it is stored"
    return f"{candidate.outcome}: {candidate.reason}"


def _in_order(names: Iterable[str]) -> list[str]:
    """As the gate goes through them; what a later release added comes last."""
    order = {name: place for place, name in enumerate(MEANING)}
    return sorted(names, key=lambda name: (order.get(name, len(order)), name))


def has_failed(table: pd.DataFrame) -> "pd.Series[bool]":
    """Of `overview` or `by_input`: which verdicts are failures."""
    return table["verdict"].isin(["fail", "error"])


class Matrix(NamedTuple):
    """Verdicts as glyph and word; what no verdict was asked of is empty."""

    shown: pd.DataFrame
    """The keys first, then a column for each check or input."""
    keys: pd.DataFrame
    """What the rows of `shown` are of: backend, dtype, and check where the columns are inputs."""
    across: dict[str, str]
    """The check or input that a column of `shown` stands for."""


def matrix(table: pd.DataFrame, rows: list[str], column: str) -> Matrix:
    """Spread `overview` or `by_input`: the values of `rows` down, those of `column` across, in the table's order."""
    shown = table.assign(verdict=table["verdict"].map(VERDICTS))
    wide = shown.pivot_table(index=rows, columns=column, values="verdict", aggfunc="first", sort=False)
    values = list(dict.fromkeys(table[column]))
    wide = wide.reindex(columns=_in_order(values) if column == "check" else values).fillna("")
    keys = wide.index.to_frame(index=False)
    across: dict[str, str] = {}
    for value in wide.columns:
        name = plain_line(value, 60)
        while name in across or name in _HEADS.values():  # a check is called dtype; foreign names may be anything
            name += " ·"
        across[name] = value
    heads = keys.map(lambda one: plain_line(one, 60)).rename(columns=_HEADS)
    body = wide.set_axis(list(across), axis=1).reset_index(drop=True)
    return Matrix(pd.concat([heads, body], axis=1), keys, across)


_HEADS = {"backend": "backend", "dtype": "logits", "check": "check"}
"""What the first columns are called."""


def errors(found: Iterable[Checked]) -> pd.DataFrame:
    """How the errors spread, a row for each backend, dtype, input and kind of result: `ERRORS`."""
    rows = []
    for checked in found:
        for backend, by_case in checked.evidence.cases.items():
            for case in by_case:
                limits = {check.name: check.limit for check in case.checks}
                for spread in case.errors:
                    known = len(spread.quantiles) == len(QUANTILE)
                    rows.append(
                        {
                            "backend": backend,
                            "dtype": checked.dtype,
                            "input": case.case,
                            "what": spread.what,
                            "count": spread.count,
                            "limit": limits.get(f"{spread.what}_error"),
                            **(dict(zip(QUANTILE, spread.quantiles, strict=True)) if known else {}),
                        }
                    )
    return _table(rows, ERRORS)


def tokens(found: Iterable[Checked]) -> pd.DataFrame:
    """The tokens that are most off, the worst first: `TOKENS`. An error that is no number counts as the largest."""
    rows = [
        {
            "backend": backend,
            "dtype": checked.dtype,
            "input": case.case,
            "what": spread.what,
            "row": token.row,
            "token": token.token,
            "got": str(token.got),
            "float64": str(token.true),
            "error": math.inf if token.error is None else token.error,
        }
        for checked in found
        for backend, by_case in checked.evidence.cases.items()
        for case in by_case
        for spread in case.errors
        for token in spread.worst
    ]
    table = _table(rows, TOKENS)
    return table.sort_values("error", ascending=False, kind="stable", ignore_index=True)


def recorded(found: Iterable[Checked]) -> pd.DataFrame:
    """What is no verdict: whether a backend repeats its bits, and whether a row's depend on N."""
    words = {True: "yes", False: "no", None: "not tried"}
    return pd.DataFrame(
        [
            {
                "backend": plain_line(backend, 60),
                "dtype": checked.dtype,
                "repeatable": words[candidate.repeatable],
                "row invariant": words[candidate.row_invariant],
            }
            for checked in found
            for backend, candidate in checked.decision.candidates.items()
            if candidate.checks
        ],
        columns=["backend", "dtype", "repeatable", "row invariant"],
    )


def without_details(found: Iterable[Checked]) -> dict[str, list[str]]:
    """Backends that were checked, but of which no details are stored, by dtype."""
    lacking = {
        checked.dtype: [
            name
            for name, each in checked.decision.candidates.items()
            if each.checks and name not in checked.evidence.cases
        ]
        for checked in found
    }
    return {dtype: names for dtype, names in lacking.items() if names}


def in_words(table: pd.DataFrame) -> str:
    """How many verdicts of each kind there are."""
    counts = table["verdict"].value_counts().to_dict()
    told = [f"{counts[verdict]} {words}" for verdict, words in VERDICTS.items() if verdict in counts]
    return f"{len(table)} verdicts: {', '.join(told)}." if told else "No verdicts."


def _table(rows: list[dict[str, Any]], columns: list[str]) -> pd.DataFrame:
    kinds = dict.fromkeys(("figure", "limit", "error", *QUANTILE), "float64")
    kinds |= dict.fromkeys(("row", "token", "count"), "Int64")
    return pd.DataFrame(rows, columns=columns).astype({name: kind for name, kind in kinds.items() if name in columns})
