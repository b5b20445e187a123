"""What each check came to: for all decisions of a profile, and of one decision and backend with its inputs and tokens.

All of it was found by the check when the decision was made, and is stored; nothing is checked here.
"""

import math

import pandas as pd

from compiled_logprobs.check.report import MEANING
from compiled_logprobs.decision import Candidate, Evidence
from compiled_logprobs_dashboard.frames import Frames, Profile
from compiled_logprobs_dashboard.humanize import of_limit, short_number
from compiled_logprobs_dashboard.looks import WRONG, plain_line
from compiled_logprobs_dashboard.tables.overview import SIGNS

KINDS = {"log_prob": "log-probability", "sum_p_squared": "sum of p²"}
"""What kinds of results are called, where that is not their name."""
INPUTS = ["input", "verdict", "worst", "limit", "of the limit", "detail"]
TOKENS = ["input", "of", "row", "token", "got", "float64", "error", "of the limit"]
LOST = {"lost": ("failed", "crashed", "timeout", "oom"), "cannot run": ("unavailable", "unsupported")}
"""Columns of `matrix` beside the checks, and the outcomes that they count."""
PASSED, FAILED = "✓ passed", f"{WRONG} WRONG"


def counts(frames: Frames, profile: Profile) -> pd.DataFrame:
    """How often each backend passed and failed each check: backend, check, passed, failed; failures of signs first."""
    rows: dict[tuple[str, str], list[int]] = {}
    groups = frames.candidates_of(profile).groupby(["backend", "passed", "failed"]).size()
    for (backend, *both), count in groups.items():
        for place, names in enumerate(both):
            for name in names:
                rows.setdefault((backend, name), [0, 0])[place] += count
    columns, order = ["backend", "check", "passed", "failed"], {name: at for at, name in enumerate(MEANING)}
    table = pd.DataFrame([(*key, *found) for key, found in rows.items()], columns=columns)
    sign = table["check"].isin(SIGNS) & (table["failed"] > 0)
    table = table.assign(sign=sign, place=table["check"].map(order).fillna(len(order)))
    by, rising = ["sign", "failed", "place", "backend"], [False, False, True, True]
    return table.sort_values(by, ascending=rising, kind="stable", ignore_index=True)[columns]


def matrix(frames: Frames, profile: Profile, found: pd.DataFrame) -> pd.DataFrame:
    """A row a backend, the worst first; `LOST`, and a column a check: signs, then what failed, then the others."""
    pairs = zip(found["passed"], found["failed"], strict=True)
    cells = found.assign(cell=[f"{WRONG} {bad:,} of {good + bad:,}" if bad else f"✓ {good:,}" for good, bad in pairs])
    failing, places = found.groupby("check")["failed"].sum(), list(dict.fromkeys([*SIGNS, *MEANING]))
    place = {name: places.index(name) if name in places else 99 for name in failing.index}
    order = {name: (name not in SIGNS, -bad, place[name]) for name, bad in failing.items()}
    outcomes = frames.candidates_of(profile).groupby(["backend", "outcome"]).size().unstack(fill_value=0)
    lost = {of: outcomes.reindex(columns=names, fill_value=0).sum(axis=1).astype(int) for of, names in LOST.items()}
    wide = cells.pivot(index="backend", columns="check", values="cell")[sorted(order, key=order.__getitem__)]
    failed = found.groupby("backend")["failed"].sum().reindex(outcomes.index).fillna(0)
    worst = failed.sort_values(ascending=False, kind="stable").index
    return pd.DataFrame(lost).join(wide).fillna("").loc[worst]


def where(frames: Frames, profile: Profile, backend: str, check: str) -> pd.DataFrame:
    """The decisions in which `backend` was held to `check`: key, verdict, N, V, dtype, mode; failures first."""
    mine = frames.candidates_of(profile)
    mine = mine[mine["backend"] == backend]
    failed, passed = (mine[column].map(lambda names: check in names).astype(bool) for column in ("failed", "passed"))
    mine = mine.assign(verdict=failed.map({True: FAILED, False: PASSED}), good=~failed)[failed | passed]
    table = mine.merge(frames.of(profile)[["key", "rows", "vocab", "dtype", "mode"]], on="key")
    table = table.sort_values(["good", "mode", "dtype", "vocab", "rows"], kind="stable", ignore_index=True)
    columns = ["key", "verdict", "rows", "vocab", "dtype", "mode"]
    return table[columns].rename(columns={"rows": "N", "vocab": "V"})


def by_input(candidate: Candidate, evidence: Evidence | None, backend: str, check: str) -> pd.DataFrame:
    """What one check came to, the worst over all inputs and for each kind of input, failures first: `INPUTS`."""
    found = [("all inputs", one) for one in candidate.checks]
    cases = () if evidence is None else evidence.cases.get(backend, ())
    found += [(case.case, one) for case in cases for one in case.checks]
    rows = []
    for case, one in sorted((pair for pair in found if pair[1].name == check), key=lambda pair: pair[1].passed):
        verdict, share = PASSED if one.passed else FAILED, of_limit(one.figure, one.limit)
        worst, limit = (None if value is None else short_number(value) for value in (one.figure, one.limit))
        rows.append((plain_line(case, 60), verdict, worst, limit, share, plain_line(one.detail, 400)))
    return pd.DataFrame(rows, columns=INPUTS)


def tokens(evidence: Evidence | None, backend: str) -> pd.DataFrame:
    """The values that are most off, the worst first: `TOKENS`. An error that is no number counts as the largest."""
    rows = []
    for case in () if evidence is None else evidence.cases.get(backend, ()):
        limits = {check.name: check.limit for check in case.checks}
        for spread in case.errors:
            kind = KINDS.get(spread.what, spread.what)
            for token in spread.worst:
                error = math.inf if token.error is None else token.error
                share = "no number" if token.error is None else of_limit(error, limits.get(f"{spread.what}_error"))
                what = (plain_line(case.case, 60), kind, token.row, token.token, str(token.got), str(token.true))
                rows.append((*what, error, share))
    table = pd.DataFrame(rows, columns=TOKENS).astype({"row": "Int64", "token": "Int64", "error": float})
    table = table.sort_values("error", ascending=False, kind="stable", ignore_index=True)
    return table.assign(error=table["error"].map(short_number))
