"""How each backend scales with N or V: time, rates, share of the roof and memory, and what idioms that people use take.

The roof is the bandwidth that was measured on the same device, in the same run. Nothing is held against a data sheet.
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd

from compiled_logprobs.decision import Candidate, Decision
from compiled_logprobs.errors import ProfileError
from compiled_logprobs.machine.bandwidth import minimum_bytes
from compiled_logprobs.machine.environment import environments
from compiled_logprobs.problem import Problem, as_it_lies, bucket, bytes_of_results, mode_name, short_name
from compiled_logprobs.store.files import LIMIT, read_bytes
from compiled_logprobs_dashboard.frames import Frames, Profile
from compiled_logprobs_dashboard.looks import plain_line
from compiled_logprobs_dashboard.tables.overview import by_gravity

Axis = Literal["rows", "vocab"]
MOST = 40
"""Decisions in a chart; of more, those nearest to the selected shape."""
BAND = (20, 80)
"""Per cents of the calls that took less than the ends of a band: the middle 60 per cent lie in it."""
PEERS = "peers*.json"
"""Results of `python -m benchmarks.peers --json FILE` at the root of a store."""
KINDS = {"forward": "forward", "backward": "backward", "inplace": "inplace", "forward, entropy": "entropy"}
"""What the benchmarks call a mode."""
COLUMNS = {
    **dict.fromkeys(("backend", "state", "note"), str),
    **dict.fromkeys(("rows", "vocab"), "int64"),
    **dict.fromkeys(("seconds", "seconds_low", "seconds_high", "bytes", "percent", "memory", "least"), float),
    "is_peer": bool,
}
"""state: measured, wrong, or another outcome; seconds of a call of all rows, with the ends of its band; bytes that a
call must move; memory: logits and extra memory at the peak of a call of all rows; least: what no backend can do
without."""


class Scaling(NamedTuple):
    """Along N or V, of one profile and kind of call."""

    points: pd.DataFrame
    """One row a decision and candidate: `COLUMNS`. Figures that are not known are NaN."""
    left_out: list[str]
    """Why something is not among them, in words."""
    roof: float
    """Bytes a second that were measured on the device; NaN where they were not."""


def scaling(frames: Frames, profile: Profile, problem: Problem, along: Axis) -> Scaling:
    """The points along one axis, the other being as in `problem`, or the nearest that there is."""
    keys, dropped = keys_along(frames, profile, problem, along)
    left_out = [f"of {dropped + len(keys)} decisions, the {len(keys)} nearest are shown"] if dropped else []
    rows: list[dict[str, Any]] = []
    for key in keys:
        try:
            decision = frames.decision(key)
            evidence = frames.evidence(key, decision)
        except ProfileError as error:
            left_out.append(plain_line(error))
            continue
        for name, candidate in decision.candidates.items():
            if candidate.measured_at is not None and decision.timed != decision.problem:
                where = f"{plain_line(name, 40)} at N {decision.problem.rows:,}"
                left_out.append(f"{where}: timed for an earlier decision, with unknown rows")
            elif candidate.outcome not in ("unavailable", "unsupported"):  # which is as expected
                rows.append(_point(decision, name, candidate, evidence.seconds if evidence else {}))
    rows += _peers(frames, profile, problem, along, sorted({row["rows"] for row in rows}))
    kind = "read" if not problem.needs_grad else "in_place" if problem.inplace_backward else "copy"
    roofs = frames.decisions.loc[keys, f"bandwidth_{kind}"].dropna()
    return Scaling(pd.DataFrame(rows, columns=list(COLUMNS)).astype(COLUMNS), left_out, float(roofs.median()))


def keys_along(frames: Frames, profile: Profile, problem: Problem, along: Axis) -> tuple[list[int], int]:
    """Keys of the decisions along an axis, by rising N or V, and how many more there are.

    Along V, those for the bucket of N are taken; where none is, those of the nearest N.
    """
    found = frames.of(profile)
    found = found[(found["mode"] == mode_name(as_it_lies(problem))) & (found["dtype"] == short_name(problem.dtype))]
    if along == "rows":
        found = found[found["vocab"] == problem.vocab]
    elif len(found):
        top = bucket(problem).rows
        nearest = min(found["rows"].unique(), key=lambda one: (abs(math.log(max(1, one) / top)), one))
        found = found[found["rows"] == nearest]
    found = found.drop_duplicates([along])
    far = np.abs(np.log(found[along].clip(lower=1) / getattr(problem, along)))
    near = found.iloc[np.argsort(far, kind="stable")[:MOST]].sort_values(along)
    return [int(key) for key in near["key"]], len(found) - len(near)


def _point(decision: Decision, name: str, candidate: Candidate, times: dict[str, list[float]]) -> dict[str, Any]:
    problem, failed = decision.problem, by_gravity(check.name for check in candidate.checks if not check.passed)
    is_wrong = bool(failed) or candidate.outcome == "wrong"
    is_timed = candidate.measured and not is_wrong
    scale = problem.rows * problem.vocab / (decision.timed.rows * decision.timed.vocab)
    # Of an earlier decision, the times that lie beside this one are none of its.
    series = times.get(name, []) if candidate.measured_at is None and is_timed else []
    low, high = np.percentile(series, BAND) * scale if len(series) else (math.nan, math.nan)
    note = ", ".join(failed) if failed else "" if is_timed else candidate.reason
    if is_timed and scale != 1:
        note = f"timed with {decision.timed_in_words}"
    entry = {"backend": name, "note": plain_line(note, 200), "seconds_low": low, "seconds_high": high}
    entry |= {"state": "wrong" if is_wrong else "measured" if is_timed else candidate.outcome, "is_peer": False}
    entry |= {"percent": candidate.percent_of_bandwidth if is_timed else None}
    seconds = candidate.seconds * scale if is_timed and candidate.seconds else None
    return entry | _figures(problem, seconds, candidate.extra_multiple if is_timed else None)


def _figures(problem: Problem, seconds: float | None, extra: float | None) -> dict[str, Any]:
    logits, given = logits_bytes(problem), problem.hidden is None  # else there are none, and products take the time
    memory = None if extra is None else logits * (given + extra)
    figures = {"seconds": seconds, "bytes": minimum_bytes(problem) if given else None, "memory": memory}
    least = logits + least_bytes(problem) if given else None
    return {"rows": problem.rows, "vocab": problem.vocab, **figures, "least": least}


def _peers(
    frames: Frames, profile: Profile, problem: Problem, along: Axis, n: Sequence[int]
) -> Iterator[dict[str, Any]]:
    """What idioms that people use took, where a results file of this environment lies in a store."""
    wanted: dict[str, Any] = {"mode": KINDS.get(mode_name(as_it_lies(problem))), "dtype": short_name(problem.dtype)}
    wanted |= {"kind": "peer"} | ({"vocab": problem.vocab} if along == "rows" else {})
    for path in (path for store in frames.stores.values() for path in sorted(store.root.glob(PEERS))):
        try:
            told = json.loads(read_bytes(path, 16 * LIMIT) or b"{}")
            if told["environment"]["fingerprint"] != profile.environment:
                continue
            for row in told["rows"]:
                is_told = row["outcome"] in ("measured", "wrong") and (along == "rows" or row["rows"] in n)
                if wanted.items() <= row.items() and is_told:
                    of = problem._replace(rows=int(row["rows"]), vocab=int(row["vocab"]))
                    seconds = float(row["ms"]) / 1e3 if row["outcome"] == "measured" else None
                    figures = _figures(of, seconds, None if seconds is None else row.get("extra_multiple"))
                    fixed = {"state": row["outcome"], "note": "by benchmarks.peers", "is_peer": True}
                    yield {"backend": str(row["candidate"]), **fixed, **figures}
        except (ProfileError, ValueError, KeyError, TypeError, AttributeError):
            continue  # a file of another form


def least_bytes(problem: Problem) -> int:
    """What every backend needs beside the logits: the results, and the gradient unless it goes over the logits."""
    results = problem.rows * bytes_of_results(problem)
    return results + (logits_bytes(problem) if problem.needs_grad and not problem.inplace_backward else 0)


def logits_bytes(problem: Problem) -> int:
    """Of the logits alone."""
    return problem.rows * problem.vocab * problem.dtype.itemsize


def capacity(frames: Frames, profile: Profile) -> float | None:
    """The device's memory in bytes: what the profile says, else this machine's if it is the same environment."""
    here = (one.memory_bytes for one in environments() if one.fingerprint() == profile.environment)
    known = frames.facts(profile).get("memory_bytes") or next(here, None)
    return float(known) if known and known > 0 else None


def largest(points: pd.DataFrame, free: float) -> pd.DataFrame:
    """The largest N that fits into `free` bytes: backend and rows, by the memory at the largest N that was measured.

    Memory grows with N; who was wrong at a larger one is left out. What else is held has to be taken off before.
    """
    last = points[points["memory"].notna()].sort_values("rows").drop_duplicates("backend", keep="last")
    wrong = points[points["state"] == "wrong"].groupby("backend")["rows"].max()
    last = last[~(last["backend"].map(wrong) > last["rows"])]
    fits = pd.DataFrame({"backend": last["backend"], "rows": (free / (last["memory"] / last["rows"])).floordiv(1)})
    return fits.sort_values("rows", ascending=False, kind="stable", ignore_index=True)


def in_words(points: pd.DataFrame, along: Axis, values: "pd.Series[float]", words: Callable[[float], str]) -> str:
    """What a chart of `values` shows, in a sentence or two."""
    letter, parts = "N" if along == "rows" else "V", []
    for name, part in points.assign(value=values).dropna(subset=["value"]).groupby("backend", sort=False):
        last = part.loc[part[along].idxmax()]
        parts.append(f"{plain_line(name, 40)} {words(last['value'])} at {letter} {last[along]:,}")
    bad = sorted({plain_line(name, 40) for name in points.loc[points["state"] == "wrong", "backend"]})
    wrong = f" Wrong somewhere, and not drawn there: {', '.join(bad)}." if bad else ""
    return (f"By {letter}, at the largest: {'; '.join(parts)}." if parts else "No figure of it was measured.") + wrong
