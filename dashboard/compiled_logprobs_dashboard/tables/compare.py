"""Two profiles side by side, where both measured the same problem; and what one problem took over versions and time."""

from collections import Counter
from typing import NamedTuple

import numpy as np
import pandas as pd

from compiled_logprobs.decision import MEASURED
from compiled_logprobs.machine.environment import MATCHED, as_matched
from compiled_logprobs.problem import Problem
from compiled_logprobs_dashboard.frames import Frames, Profile, same_but_rows
from compiled_logprobs_dashboard.looks import plain_line

WINNER = "the winner of each"
HISTORY = ["measured_at", "torch", "triton", "source", "environment", "backend", "chosen", "ms", "low", "high", "label"]
_NOT_FACTS = ("source", "environment", "device", "here", "decisions", "measured_at")


def differences(frames: Frames, one: Profile, other: Profile) -> pd.DataFrame:
    """What differs between two profiles: fact, this, that, and decides (does it make another environment)."""
    here, there = frames.facts(one), frames.facts(other)
    kinds = {str(facts.get("device_type")) for facts in (here, there)}
    deciding = {"device_type", *(name for kind in kinds for name in MATCHED.get(kind, MATCHED["cpu"]))}
    rows = [
        {
            "fact": name,
            "this": _text(here.get(name)),
            "that": _text(there.get(name)),
            "decides": name in deciding and as_matched(name, here.get(name)) != as_matched(name, there.get(name)),
        }
        for name in here
        if name not in _NOT_FACTS and here.get(name) != there.get(name)
    ]
    found = pd.DataFrame(rows, columns=["fact", "this", "that", "decides"])
    return found.sort_values("decides", ascending=False, kind="stable", ignore_index=True)


def _text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:g}" if abs(value) < 1e6 else f"{value:.0f}"
    return "not known" if value is None else str(value)


class Matched(NamedTuple):
    """Two profiles, problem by problem."""

    table: pd.DataFrame
    """One row a problem that both decided: problem, mode, rows, vocab, dtype, winner_this, winner_that, backend_this
    and backend_that (those whose times are held against each other), seconds_this and seconds_that (a call of N rows),
    ratio (that profile's seconds over this one's: above 1, this is faster), low and high (the noise band), verdict."""
    only_this: int
    only_that: int
    """Decisions of problems that the other profile has none for; they are in no figure."""
    untimed: int
    """Problems that both measured, but where one did not time the backend or has no winner."""


def matched(frames: Frames, one: Profile, other: Profile, backend: str = WINNER) -> Matched:
    """The problems that both profiles decided, with the times of `backend` or of each one's winner."""
    this, that = (_with_times(frames, profile, backend) for profile in (one, other))
    both = this.merge(that, on="asked", suffixes=("_this", "_that"))
    timed = both[both["per_row_this"].gt(0) & both["per_row_that"].gt(0)].copy()
    for side in ("this", "that"):
        timed[f"seconds_{side}"] = timed[f"per_row_{side}"] * timed["rows_this"]
    timed["ratio"] = timed["per_row_that"] / timed["per_row_this"]
    width = np.hypot(timed["noise_this"], timed["noise_that"])
    timed["low"], timed["high"] = timed["ratio"] * np.exp(-width), timed["ratio"] * np.exp(width)
    timed["verdict"] = np.select(
        [width.isna(), timed["low"] > 1, timed["high"] < 1],
        ["noise not known", "this is faster", "that is faster"],
        "within noise",
    )
    names = {"name_this": "problem", **{f"{name}_this": name for name in ("mode", "rows", "vocab", "dtype")}}
    names |= {f"{name}_{side}": f"{title}_{side}" for name, title in _OF_BOTH.items() for side in ("this", "that")}
    table = timed.rename(columns=names)[[*names.values(), "ratio", "low", "high", "verdict"]]
    table = table.sort_values(["mode", "dtype", "vocab", "rows"], ignore_index=True)
    return Matched(table, len(this) - len(both), len(that) - len(both), len(both) - len(timed))


_OF_BOTH = {"chosen": "winner", "backend": "backend", "seconds": "seconds"}


def _with_times(frames: Frames, profile: Profile, backend: str) -> pd.DataFrame:
    """The decisions of a profile with asked (the problem, on any device), backend, per_row (seconds) and noise."""
    decided = frames.of(profile)
    timed = frames.candidates[frames.candidates["key"].isin(decided["key"])]
    timed = timed[timed["outcome"].isin(MEASURED)]
    # The baseline has no interval of its own, and a candidate's holds the noise of both: the widest one speaks for all.
    noise = _width(timed).where(timed["ratio_low"] != timed["ratio_high"]).groupby(timed["key"]).max()
    won = timed["chosen"] & timed["key"].isin(decided.loc[decided["is_decided"], "key"])
    taken = timed[won] if backend == WINNER else timed[timed["backend"] == backend]
    taken = _measured_with(decided, taken).set_index("key")
    columns = ["key", "name", "mode", "rows", "vocab", "dtype", "chosen"]
    return (
        decided[columns]
        .assign(
            chosen=decided["chosen"].where(decided["is_decided"], "undecided"),
            asked=[problem._replace(device_type="") for problem in decided["problem"]],
            backend=decided["key"].map(taken["backend"]),
            per_row=decided["key"].map(taken["seconds"]) / decided["measured_rows"],
            noise=decided["key"].map(noise),
        )
        .drop_duplicates("asked")
    )


def _width(timed: pd.DataFrame) -> "pd.Series[float]":
    """Half of the interval of a ratio's logarithm; missing where it is not known."""
    low = timed["ratio_low"].where(timed["ratio_low"] > 0)
    return np.log(timed["ratio_high"].where(low.notna()) / low) / 2


def _measured_with(decisions: pd.DataFrame, candidates: pd.DataFrame) -> pd.DataFrame:
    """Drop candidates that an earlier decision measured: how many rows it timed is not stored."""
    moments = candidates["key"].map(decisions.set_index("key")["measured_at"])
    return candidates[candidates["measured_at"] == moments]


def in_words(found: Matched) -> str:
    """The comparison in a sentence."""
    table = found.table
    if table.empty:
        return "No problem was timed in both."
    counts = table["verdict"].value_counts()
    middle = float(np.exp(np.log(table["ratio"]).median()))
    parts = ", ".join(f"{name} in {count}" for name, count in counts.items())
    return f"Of {len(table)} problems that both timed: {parts}. Median ratio {middle:.2f}: above 1, this one is faster."


def backends_of(frames: Frames, one: Profile, other: Profile) -> list[str]:
    """What was timed in either."""
    timed = frames.candidates[frames.candidates["outcome"].isin(MEASURED)]
    keys = pd.concat([frames.of(one)["key"], frames.of(other)["key"]])
    return sorted(timed.loc[timed["key"].isin(keys), "backend"].unique())


def history(frames: Frames, problem: Problem, device: str) -> pd.DataFrame:
    """What each backend took for `problem` on `device`, whatever the versions and the source.

    Returns:
        One row a decision and timed candidate, oldest first: measured_at, torch, triton, source, environment, backend,
        chosen, ms (a call of N rows), low and high (its noise band), label (a place on an axis).
    """
    decided = same_but_rows(frames.decisions[frames.decisions["device"] == device], problem)
    decided = decided[decided["rows"] == problem.rows]
    timed = frames.candidates[frames.candidates["key"].isin(decided["key"])]
    timed = _measured_with(decided, timed[timed["outcome"].isin(MEASURED)])
    table = timed.merge(decided[["key", "source", "environment", "measured_rows", "is_decided"]], on="key")
    table["chosen"] &= table["is_decided"]
    table = table.merge(frames.environments[["source", "environment", "torch", "triton"]], on=["source", "environment"])
    table["ms"] = table["seconds"] * problem.rows / table["measured_rows"] * 1e3
    width = _width(table).where(table["ratio_low"] < table["ratio_high"]).groupby(table["key"]).transform("max")
    table["low"], table["high"] = table["ms"] * np.exp(-width), table["ms"] * np.exp(width)
    # The same decision may lie in several sources: once is enough.
    table = table.drop_duplicates(["environment", "backend", "measured_at", "ms"])
    table["label"] = _labels(table)
    return table.sort_values(["measured_at", "backend"], kind="stable", ignore_index=True)[HISTORY]


def _labels(table: pd.DataFrame) -> list[str]:
    """A place on an axis for each row: its day and torch, and as much more as tells its measurement from the others."""
    kept = table[["measured_at", "torch", "environment", "source"]].itertuples(index=False, name=None)
    rows = [(at, plain_line(torch, 20) if isinstance(torch, str) else "not known", *rest) for at, torch, *rest in kept]
    labels: dict[tuple[str, ...], str] = {}
    for form in ("{0:.10}, torch {1}", "{0:.10}, torch {1} ({2:.4})", "{0:.19}, torch {1} ({2}, {3})"):
        texts = {one: form.format(*one) for one in rows if one not in labels}
        counts = Counter(texts.values())
        labels |= {one: text for one, text in texts.items() if counts[text] == 1}
    return [labels.get(one) or texts[one] for one in rows]
