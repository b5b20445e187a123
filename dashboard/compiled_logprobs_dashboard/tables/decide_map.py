"""The winner map's table: for one profile, mode and dtype, what serves each N and V."""

import itertools

import numpy as np
import pandas as pd

from compiled_logprobs.decision import MEASURED
from compiled_logprobs_dashboard.data import MOST_BACKENDS, in_profile
from compiled_logprobs_dashboard.index import Tables
from compiled_logprobs_dashboard.looks import plain_line

FAINTEST, FULL_AT = 0.35, 2.0
"""Opacity of a margin of none; the margin, as a ratio of times, from which a square is drawn in full."""
MOST_SQUARES = 100_000
MOST_ROWS, MOST_VOCABS = 40, 24
"""Squares a side that can still be told apart and hit; what is farthest from the selected shape is left out."""

COLUMNS = [
    "rows",
    "vocab",
    "state",
    "backend",
    "margin",
    "opacity",
    "runner_up",
    "speedup",
    "low",
    "high",
    "key",
    "stale",
]


def winners(tables: Tables, source: str, environment: str, mode: str, dtype: str) -> pd.DataFrame:
    """One row for each pair of an N and a V that occur.

    Returns:
        rows, vocab; state: "won", "tie" (another cannot be told from it), "alone" (nothing else got through) or "unmeasured";
        backend, which serves; margin, its speed-up over the runner-up's; opacity, from that; runner_up; speedup over the baseline
        with low and high; key of the decision; stale. What is unmeasured has no more than rows and vocab, and is left out where
        there would be more than `MOST_SQUARES`: a few thousand decisions, each of an N and a V of its own, make millions.
    """
    found = in_profile(tables, source, environment)
    found = found[(found["mode"] == mode) & (found["dtype"] == dtype)]
    # Options that have no name beside the mode's cannot differ: the mode says all of them. Alignment follows from V.
    found = found.drop_duplicates(["rows", "vocab"], keep="first")
    if found.empty:
        return pd.DataFrame(columns=COLUMNS)
    timed = tables.candidates[tables.candidates["key"].isin(found["key"])]
    timed = timed[timed["outcome"].isin(MEASURED)]
    chosen = timed[timed["chosen"]].set_index("key")
    # By the speed-up, a ratio within rounds: seconds of a candidate that an earlier decision measured are of another run.
    others = timed[~timed["chosen"]].assign(parted=timed["outcome"] != "tie")
    others = others.sort_values(["parted", "speedup"], ascending=[True, False], kind="stable")
    second = others.drop_duplicates("key").set_index("key")
    ties = set(others.loc[~others["parted"], "key"])

    table = found[["rows", "vocab", "key", "chosen", "stale"]].rename(columns={"chosen": "backend"})
    for column, name in (("speedup", "speedup"), ("speedup_low", "low"), ("speedup_high", "high")):
        table[name] = table["key"].map(chosen[column])
    table["runner_up"] = table["key"].map(second["backend"])
    table["margin"] = table["speedup"] / table["key"].map(second["speedup"])
    tied, alone = table["key"].isin(ties), table["runner_up"].isna()
    table["state"] = np.select([tied, alone], ["tie", "alone"], default="won")
    table["opacity"] = opacity(table["margin"])
    if table["rows"].nunique() * table["vocab"].nunique() > MOST_SQUARES:
        return table[COLUMNS].reset_index(drop=True)
    everywhere = pd.MultiIndex.from_tuples(
        itertools.product(sorted(table["rows"].unique()), sorted(table["vocab"].unique())), names=["rows", "vocab"]
    )
    whole = table.set_index(["rows", "vocab"]).reindex(everywhere).reset_index()
    whole["state"] = whole["state"].fillna("unmeasured")
    return whole[COLUMNS]


def opacity(margin: "pd.Series[float]") -> "pd.Series[float]":
    """From `FAINTEST`, for no margin, to 1, for `FULL_AT` and more; as much for an unknown one as for none."""
    share = np.log(margin.clip(lower=1.0, upper=FULL_AT)) / np.log(FULL_AT)
    return FAINTEST + (1 - FAINTEST) * share.fillna(0.0)


def around(table: pd.DataFrame, rows: int, vocab: int) -> pd.DataFrame:
    """The part of `table` that is nearest to a shape, where it is too large to be drawn."""
    for column, value, most in (("rows", rows, MOST_ROWS), ("vocab", vocab, MOST_VOCABS)):
        values = table[column].unique()
        if len(values) > most:
            near = sorted(values, key=lambda one: abs(np.log(max(one, 1) / max(value, 1))))[:most]
            table = table[table[column].isin(near)]
    return table.reset_index(drop=True)


def in_words(table: pd.DataFrame) -> str:
    """How many squares each backend serves, as the map's text."""
    if table.empty:
        return "Nothing was measured in this mode and dtype."
    counts = table["backend"].value_counts()
    own, rest = counts[:MOST_BACKENDS], counts[MOST_BACKENDS:]
    measured = ", ".join(f"{plain_line(name)} {count}" for name, count in own.items())
    measured += f", {len(rest)} others {rest.sum()}" if len(rest) else ""
    ties, missing = (int((table["state"] == state).sum()) for state in ("tie", "unmeasured"))
    hollow = f" Ties, drawn hollow: {ties}." if ties else ""
    grey = f" Not measured, drawn grey: {missing}." if missing else ""
    return f"Winner by N and V, {len(table)} square{'' if len(table) == 1 else 's'}: {measured}.{hollow}{grey}"
