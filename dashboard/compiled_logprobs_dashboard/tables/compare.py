"""Two profiles side by side, where both measured the same problem; and what one problem took over versions and time."""

from collections import Counter
from typing import NamedTuple

import numpy as np
import pandas as pd

from compiled_logprobs.decision import MEASURED
from compiled_logprobs.machine.environment import MATCHED
from compiled_logprobs.problem import Problem
from compiled_logprobs_dashboard.data import profile_facts, same_but_rows
from compiled_logprobs_dashboard.index import Tables
from compiled_logprobs_dashboard.looks import plain_line

WINNER = "the winner of each"
PROBLEM = (
    *("rows", "vocab", "dtype", "out_dtype", "labels_per_row", "needs_grad", "entropy", "temperature", "masked_logits"),
    *("inplace_backward", "layout", "aligned"),
)
"""What two decisions share that are for the same problem, on whichever device."""
_NOT_FACTS = ("source", "environment", "device", "here", "decisions", "measured_at")


def differences(tables: Tables, one: tuple[str, str], other: tuple[str, str]) -> pd.DataFrame:
    """What differs between two profiles: fact, this, that, and decides: whether it makes another environment. Those first."""
    here, there = profile_facts(tables, *one), profile_facts(tables, *other)
    kinds = {str(facts.get("device_type")) for facts in (here, there)}
    deciding = {"device_type", *(name for kind in kinds for name in MATCHED.get(kind, MATCHED["cpu"]))}
    rows = [
        {"fact": name, "this": _text(here.get(name)), "that": _text(there.get(name)), "decides": name in deciding}
        for name in here
        if name not in _NOT_FACTS and here.get(name) != there.get(name)
    ]
    found = pd.DataFrame(rows, columns=["fact", "this", "that", "decides"])
    return found.sort_values("decides", ascending=False, kind="stable", ignore_index=True)


def _text(value: object) -> str:
    if value is None:
        return "not known"
    return (
        f"{value:g}"
        if isinstance(value, float) and abs(value) < 1e6
        else f"{value:.0f}"
        if isinstance(value, float)
        else str(value)
    )


class Matched(NamedTuple):
    """Two profiles, problem by problem."""

    table: pd.DataFrame
    """One row a problem that both decided: problem, mode, rows, vocab, dtype, winner_this, winner_that, backend_this and
    backend_that (those whose times are held against each other), seconds_this and seconds_that (a call of N rows), ratio (that
    profile's seconds over this one's: above 1, this is faster), low and high (the noise band), verdict."""
    only_this: int
    only_that: int
    """Decisions of problems that the other profile has none for; they are in no figure."""
    untimed: int
    """Problems that both decided but where one did not time the backend."""


def matched(tables: Tables, one: tuple[str, str], other: tuple[str, str], backend: str = WINNER) -> Matched:
    """The problems that both profiles decided, with the times of `backend` or of each one's winner."""
    this, that = (_with_times(tables, *profile, backend) for profile in (one, other))
    both = this.merge(that, on=list(PROBLEM), suffixes=("_this", "_that"))
    timed = both[both["per_row_this"].gt(0) & both["per_row_that"].gt(0)].copy()
    for side in ("this", "that"):
        timed[f"seconds_{side}"] = timed[f"per_row_{side}"] * timed["rows"]
    timed["ratio"] = timed["per_row_that"] / timed["per_row_this"]
    width = np.hypot(timed["noise_this"], timed["noise_that"])
    timed["low"], timed["high"] = timed["ratio"] * np.exp(-width), timed["ratio"] * np.exp(width)
    timed["verdict"] = np.select(
        [width.isna(), timed["low"] > 1, timed["high"] < 1],
        ["noise not known", "this is faster", "that is faster"],
        "within noise",
    )
    columns = [
        *(
            "problem_this",
            "mode_this",
            "rows",
            "vocab",
            "dtype",
            "chosen_this",
            "chosen_that",
            "backend_this",
            "backend_that",
        ),
        *("seconds_this", "seconds_that", "ratio", "low", "high", "verdict"),
    ]
    names = {"problem_this": "problem", "mode_this": "mode", "chosen_this": "winner_this", "chosen_that": "winner_that"}
    table = timed[columns].rename(columns=names).sort_values(["mode", "dtype", "vocab", "rows"], ignore_index=True)
    return Matched(table, len(this) - len(both), len(that) - len(both), len(both) - len(timed))


def _with_times(tables: Tables, source: str, environment: str, backend: str) -> pd.DataFrame:
    """The decisions of a profile with backend, per_row (seconds) and noise, the logarithm of a ratio."""
    found = tables.decisions
    found = found[(found["environment"] == environment) & (found["source"] == source)]
    timed = tables.candidates[tables.candidates["key"].isin(found["key"])]
    timed = timed[timed["outcome"].isin(MEASURED)]
    # The baseline has no interval of its own, and a candidate's holds the noise of both: the widest one speaks for all.
    width = (
        np.log(
            timed["speedup_high"].where(timed["speedup_low"] > 0) / timed["speedup_low"].where(timed["speedup_low"] > 0)
        )
        / 2
    )
    noise = width.where(timed["speedup_low"] != timed["speedup_high"]).groupby(timed["key"]).max()
    taken = timed[timed["chosen"]] if backend == WINNER else timed[timed["backend"] == backend]
    taken = _measured_with(found, taken).set_index("key")
    found = found[[*PROBLEM, "key", "problem", "mode", "chosen", "measured_rows"]].copy()
    found["backend"] = found["key"].map(taken["backend"])
    found["per_row"] = found["key"].map(taken["seconds"]) / found["measured_rows"]
    found["noise"] = found["key"].map(noise)
    return found.drop_duplicates(list(PROBLEM))


def _measured_with(decisions: pd.DataFrame, candidates: pd.DataFrame) -> pd.DataFrame:
    """Those of `candidates` that were measured with their decision: how many rows an earlier one timed is not stored."""
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


def backends_of(tables: Tables, one: tuple[str, str], other: tuple[str, str]) -> list[str]:
    """What was timed in either."""
    timed = tables.candidates[tables.candidates["outcome"].isin(MEASURED)]
    mine = (timed["source"] == one[0]) & (timed["environment"] == one[1])
    theirs = (timed["source"] == other[0]) & (timed["environment"] == other[1])
    return sorted(timed.loc[mine | theirs, "backend"].unique())


def history(tables: Tables, problem: Problem, device: str) -> pd.DataFrame:
    """What each backend took for `problem` on `device`, whatever the versions and the source.

    Returns:
        One row a decision and timed candidate, oldest first: measured_at, torch, triton, source, environment, backend, chosen,
        ms (a call of N rows), low and high (its noise band), label (a place on an axis).
    """
    found = tables.decisions[tables.decisions["device"] == device]
    found = same_but_rows(found, problem)
    found = found[found["rows"] == problem.rows]
    timed = tables.candidates[tables.candidates["key"].isin(found["key"]) & tables.candidates["outcome"].isin(MEASURED)]
    timed = _measured_with(found, timed)
    facts = tables.environments[["source", "environment", "torch", "triton"]]
    table = timed[
        ["key", "source", "environment", "backend", "chosen", "seconds", "speedup_low", "speedup_high", "measured_at"]
    ]
    table = table.merge(found[["key", "measured_rows"]], on="key").merge(facts, on=["source", "environment"])
    scale = problem.rows / table["measured_rows"]
    table["ms"] = table["seconds"] * scale * 1e3
    known = table["speedup_low"].where((table["speedup_low"] > 0) & (table["speedup_low"] < table["speedup_high"]))
    width = (np.log(table["speedup_high"] / known) / 2).groupby(table["key"]).transform("max")
    table["low"], table["high"] = table["ms"] * np.exp(-width), table["ms"] * np.exp(width)
    # The same decision may lie in several sources: once is enough.
    table = table.drop_duplicates(["environment", "backend", "measured_at", "ms"])
    table["label"] = _labels(table)
    columns = [
        "measured_at",
        "torch",
        "triton",
        "source",
        "environment",
        "backend",
        "chosen",
        "ms",
        "low",
        "high",
        "label",
    ]
    return table.sort_values(["measured_at", "backend"], kind="stable", ignore_index=True)[columns]


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
