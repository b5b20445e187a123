"""Tables of throughput: bytes and tokens a second of each backend, against N and against V, and how near that is to the
roof.

The roof is the bandwidth that was measured on the same device, in the same run. Nothing is held against a data sheet.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd

from compiled_logprobs.decision import Decision, short
from compiled_logprobs.errors import ProfileError
from compiled_logprobs.machine.bandwidth import backward_bytes, forward_bytes, minimum_bytes
from compiled_logprobs.problem import Problem, bucket
from compiled_logprobs_dashboard.frames import Frames, Profile, Shape, problem_of
from compiled_logprobs_dashboard.looks import plain_line

Axis = Literal["rows", "vocab"]
MOST = 40
"""Decisions in a chart; of more, those nearest to the selected shape."""
LOW, HIGH = 20, 80
"""Per cents of the calls that took less than the ends of a band: the middle 60 per cent lie in it."""
COLUMNS = {
    **dict.fromkeys(("backend", "note"), str),
    **dict.fromkeys(("key", "rows", "vocab", "timed_rows"), "int64"),
    "chosen": bool,
    **dict.fromkeys(("seconds", "gbps", "gbps_low", "gbps_high", "tokens", "tokens_low", "tokens_high"), float),
    **dict.fromkeys(("percent", "first_call_seconds", "pays_after"), float),
}


class Throughput(NamedTuple):
    """Of one profile, mode and dtype."""

    points: pd.DataFrame
    """One row a decision and timed candidate: the columns of `COLUMNS`. Figures that are not known are NaN."""
    left_out: list[str]
    """Why a decision or candidate is not among them, in words."""


def throughput(frames: Frames, profile: Profile, shape: Shape, along: Axis, cache_bytes: float | None) -> Throughput:
    """The points along one axis, the other being as in `shape`.

    `cache_bytes` are of the device's last cache; None where it is not known.
    """
    keys, dropped = keys_along(frames, profile, shape, along)
    left_out = [f"of {dropped + len(keys)} decisions, the {len(keys)} nearest are shown"] if dropped else []
    rows: list[dict[str, Any]] = []
    for key in keys:
        try:
            decision = frames.decision(key)
            evidence = frames.evidence(key, decision)
        except ProfileError as error:
            left_out.append(plain_line(error))
            continue
        more, why = _points(key, decision, evidence.seconds if evidence else {}, cache_bytes)
        rows += more
        left_out += why
    return Throughput(pd.DataFrame(rows, columns=list(COLUMNS)).astype(COLUMNS), left_out)


def keys_along(frames: Frames, profile: Profile, shape: Shape, along: Axis) -> tuple[list[int], int]:
    """Keys of the decisions along an axis, by rising N or V, and how many more there are.

    Along V, those for the bucket of N are taken; where none is, those of the nearest N.
    """
    found = frames.of(profile)
    found = found[(found["mode"] == shape.mode) & (found["dtype"] == shape.dtype)]
    other: Axis = "vocab" if along == "rows" else "rows"
    if found.empty:
        return [], 0
    if along == "rows":
        found = found[found["vocab"] == shape.vocab]
    else:
        top = bucket(problem_of(frames, profile, shape)).rows
        values = found["rows"].unique()
        nearest = min(values, key=lambda one: (abs(math.log(max(1, one) / top)), one))
        found = found[found["rows"] == nearest]
    found = found.drop_duplicates([along, other])
    wanted = getattr(shape, along)
    near = found.iloc[np.argsort(np.abs(np.log(found[along].clip(lower=1) / wanted)), kind="stable")[:MOST]]
    return [int(key) for key in near.sort_values(along)["key"]], len(found) - len(near)


def _points(
    key: int, decision: Decision, times: dict[str, list[float]], cache_bytes: float | None
) -> tuple[list[dict[str, Any]], list[str]]:
    timed = decision.timed
    if timed.hidden is not None:
        return [], [f"{short(timed)}: from hidden states it is products that take the time, and not moving bytes"]
    size = minimum_bytes(timed)
    points, left_out = [], []
    for name, candidate in decision.candidates.items():
        if not candidate.measured or candidate.seconds is None or not candidate.seconds > 0:
            continue
        if candidate.measured_at is not None and timed != decision.problem:
            left_out.append(
                f"{plain_line(name, 40)} at N {decision.problem.rows}: it was timed for an earlier decision, and with "
                "how many rows is not stored"
            )
            continue
        # Of an earlier decision, the times that lie beside this one are none of its.
        series = times.get(name, []) if candidate.measured_at is None else []
        low, high = np.percentile(series, [LOW, HIGH]) if len(series) else (math.nan, math.nan)
        percent = math.nan if candidate.percent_of_bandwidth is None else candidate.percent_of_bandwidth
        points.append(
            {
                "backend": name,
                "note": why_above(percent, timed, cache_bytes),
                "key": key,
                "rows": decision.problem.rows,
                "vocab": decision.problem.vocab,
                "timed_rows": timed.rows,
                "chosen": name == decision.chosen,
                "seconds": candidate.seconds,
                **_rates("gbps", size / 1e9, candidate.seconds, low, high),
                **_rates("tokens", timed.rows, candidate.seconds, low, high),
                "percent": percent,
                "first_call_seconds": _or_nan(candidate.first_call_seconds),
                "pays_after": _or_nan(decision.calls_to_pay(name)),
            }
        )
    return points, left_out


def _rates(name: str, amount: float, seconds: float, low: float, high: float) -> dict[str, float]:
    """A slow call is the low end of a rate."""
    return {name: amount / seconds, f"{name}_low": amount / high, f"{name}_high": amount / low}


def why_above(percent: float, timed: Problem, cache_bytes: float | None) -> str:
    """Why a point is above the roof, or near to what a cache holds; empty where there is nothing to say."""
    logits = timed.rows * timed.vocab * timed.dtype.itemsize
    fits = cache_bytes is not None and logits <= cache_bytes
    if not percent > 100:
        return f"cache-resident: the logits ({logits / 2**20:.0f} MiB) fit into the last cache" if fits else ""
    if fits:
        return (
            f"above the roof: the logits ({logits / 2**20:.0f} MiB) fit into the last cache, so that not all bytes "
            "came from memory"
        )
    if timed.needs_grad:
        return (
            "above the roof: part of what moves did not come from memory, such as logits that forward had left in "
            "the cache for backward, or the bandwidth was measured at a slower moment"
        )
    return (
        "above the roof: the bandwidth was measured at a slower moment, or part of the logits was in a cache; it is no "
        "sign that the device can do more than it can"
    )


def roofs(frames: Frames, keys: Sequence[int]) -> dict[str, tuple[float, float]]:
    """The bandwidths measured with these decisions, in GB/s, lowest and highest; without those that are not known."""
    found = frames.decisions.loc[list(keys)]
    kinds = ["read"]  # and what backward is held against
    if found["needs_grad"].any():
        kinds.append("in_place" if found["inplace_backward"].all() else "copy")
    spans = {}
    for kind in kinds:
        values = found[f"bandwidth_{kind}"].dropna()
        values = values[np.isfinite(values) & (values > 0)]
        if len(values):
            spans[kind] = float(values.min()) / 1e9, float(values.max()) / 1e9
    return spans


def bytes_model(problem: Problem) -> str:
    """How many bytes a call must move, in words and figures: what GB/s counts."""
    forward, backward = forward_bytes(problem), backward_bytes(problem)
    logits = problem.rows * problem.vocab * problem.dtype.itemsize
    parts = [
        f"N x V x {problem.dtype.itemsize} bytes of logits = {_bytes(logits)}",
        f"forward reads them once, with labels and results {_bytes(forward)}",
    ]
    if backward:
        parts.append(f"backward reads them again and writes their gradient, {_bytes(backward)}")
    return "; ".join(parts) + f"; in all {_bytes(forward + backward)} a call of {problem.rows} rows"


def _bytes(size: float) -> str:
    return f"{size / 1e9:.3g} GB" if size >= 1e9 else f"{size / 1e6:.3g} MB"


def in_words(points: pd.DataFrame, along: Axis, column: str, unit: str) -> str:
    """What a chart of `column` shows, in a sentence or two."""
    if points.empty:
        return "Nothing was measured here."
    parts = []
    for name, part in points.dropna(subset=[column]).groupby("backend", sort=False):
        best = part.loc[part[column].idxmax()]
        parts.append(f"{plain_line(name, 40)} up to {best[column]:.4g} {unit} at {_LETTER[along]} {best[along]}")
    return f"By {_LETTER[along]}: {'; '.join(parts)}." if parts else "No figure of it was measured."


_LETTER: dict[Axis, str] = {"rows": "N", "vocab": "V"}


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value
