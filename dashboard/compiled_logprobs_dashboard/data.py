"""What the pages ask of the tables: which profiles and shapes there are, what serves a shape, and the record behind a row."""

from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch

from compiled_logprobs.decision import Decision, Evidence
from compiled_logprobs.errors import ProfileError
from compiled_logprobs.problem import (
    MODES,
    Problem,
    as_it_lies,
    bucket,
    is_small,
    nearest_first,
    problem_from_dict,
    short_name,
)
from compiled_logprobs.store.files import VERSION, Store, read_decision
from compiled_logprobs.tuning.presets import DTYPES, MODELS
from compiled_logprobs_dashboard.index import Tables
from compiled_logprobs_dashboard.looks import plain_line

MOST = 2**31 - 1
"""Rows or vocabulary, as the command line takes them."""
MOST_BACKENDS = 20
"""That one table or chart shows: more cannot be told apart. Whoever leaves some out says how many."""
_OPTIONS = (
    *("device_type", "dtype", "out_dtype", "labels_per_row", "needs_grad", "entropy", "temperature", "masked_logits"),
    *("inplace_backward", "layout", "aligned"),
)
_TORCH = {short_name(dtype): dtype for dtype in (*DTYPES, torch.float64)}


class Shape(NamedTuple):
    """What is asked for: a problem, but for the device."""

    mode: str
    """One of `profiling.MODES`, or the options in words."""
    dtype: str
    """Of the logits."""
    rows: int
    """N."""
    vocab: int
    """V."""


class Answer(NamedTuple):
    """What a profile says of a shape."""

    kind: Literal["exact", "nearest", "rule", "none"]
    """Exact: decided for this bucket of N. Nearest: for another N. Rule: too small to need a profile. None: not measured."""
    problem: Problem
    """That is asked about, at the top of its bucket."""
    key: int | None
    """Of the decision, where there is one."""


# What there is


def profile_labels(tables: Tables) -> dict[str, tuple[str, str]]:
    """Source and environment of each profile by what people call it: this machine's first, then that of the most decisions."""
    order = {source.name: place for place, source in enumerate(tables.sources)}
    found = tables.environments.assign(order=tables.environments["source"].map(order))
    found = found.sort_values(["here", "order", "decisions"], ascending=[False, True, False], kind="stable")
    labels: dict[str, tuple[str, str]] = {}
    for device, source, environment in found[["device", "source", "environment"]].itertuples(index=False):
        start = f"{plain_line(device, 60)} · {source} · "
        label = start + environment[:8]
        labels[start + environment if label in labels else label] = source, environment
    return labels


def profile_facts(tables: Tables, source: str, environment: str) -> dict[str, Any]:
    """The row of a profile in `tables.environments`; None for a fact that is missing."""
    found = tables.environments
    found = found[(found["source"] == source) & (found["environment"] == environment)]
    return {} if found.empty else {name: None if pd.isna(value) else value for name, value in found.iloc[0].items()}


def in_profile(tables: Tables, source: str, environment: str) -> pd.DataFrame:
    """The decisions of one profile."""
    found = tables.decisions
    return found[(found["environment"] == environment) & (found["source"] == source)]


def modes(tables: Tables) -> list[str]:
    """The modes that have a name, and those that are stored."""
    return list(dict.fromkeys([*MODES, *sorted(tables.decisions["mode"].unique())]))


def dtypes(tables: Tables) -> list[str]:
    """The dtypes that a run measures, and those that are stored."""
    return list(dict.fromkeys([*map(short_name, DTYPES), *sorted(tables.decisions["dtype"].unique())]))


def first_shape(tables: Tables, source: str, environment: str) -> Shape:
    """The shape of a profile to begin with: of a training step with a large vocabulary, as far as it was measured."""
    found = in_profile(tables, source, environment)
    wanted = {"mode": "backward", "dtype": "bfloat16", "vocab": MODELS["qwen3"]}
    for column, value in wanted.items():
        narrower = found[found[column] == value]
        found = found if narrower.empty else narrower
    if found.empty:
        return Shape("backward", "bfloat16", 512, MODELS["qwen3"])
    row = found.sort_values(["rows", "measured_at"]).iloc[-1]
    return Shape(row["mode"], row["dtype"], min(max(1, int(row["rows"])), MOST), min(max(1, int(row["vocab"])), MOST))


# What serves a shape


def problem_of(tables: Tables, source: str, environment: str, shape: Shape) -> Problem:
    """The problem that `shape` is on the device of a profile."""
    found = tables.environments
    found = found[(found["source"] == source) & (found["environment"] == environment)]
    device = found["device_type"].iloc[0] if len(found) and isinstance(found["device_type"].iloc[0], str) else "cpu"
    if shape.mode in MODES:
        return as_it_lies(Problem(device, shape.rows, shape.vocab, _TORCH[shape.dtype], **MODES[shape.mode]))
    like = tables.decisions[tables.decisions["mode"] == shape.mode]
    same = like[like["environment"] == environment]
    row = (like if same.empty else same).iloc[0]
    return _problem(row)._replace(
        device_type=device, rows=shape.rows, vocab=shape.vocab, dtype=_TORCH[shape.dtype], aligned=bool(row["aligned"])
    )


def _problem(row: "pd.Series[Any]") -> Problem:
    fields = {name: row[name].item() if isinstance(row[name], np.generic) else row[name] for name in Problem._fields}
    return problem_from_dict(fields)


def answer(tables: Tables, source: str, environment: str, shape: Shape) -> Answer:
    """What a profile says of `shape`, by the library's own rules: its bucket of N, then the small, then the nearest N."""
    asked = problem_of(tables, source, environment, shape)
    top = bucket(asked)
    like = same_but_rows(in_profile(tables, source, environment), top)
    exact = like[like["rows"] == top.rows]
    if len(exact):
        return Answer("exact", top, int(exact["key"].iloc[0]))
    if is_small(asked):
        return Answer("rule", top, None)
    by_rows = {top._replace(rows=int(rows)): int(key) for rows, key in zip(like["rows"], like["key"], strict=True)}
    near = nearest_first(top, by_rows)
    return Answer("nearest", top, by_rows[near[0]]) if near else Answer("none", top, None)


def same_but_rows(decisions: pd.DataFrame, problem: Problem) -> pd.DataFrame:
    """Those of `decisions` that are for `problem` but for N."""
    found = decisions[decisions["vocab"] == problem.vocab]
    for name in _OPTIONS:
        value = getattr(problem, name)
        found = found[found[name] == (short_name(value) if isinstance(value, torch.dtype) else value)]
    return found


# What stands behind a row


def row(tables: Tables, key: int) -> "pd.Series[Any]":
    """The row of a decision."""
    return tables.decisions.iloc[tables.decisions["key"].searchsorted(key)]


def candidates(tables: Tables, key: int) -> pd.DataFrame:
    """The candidates of a decision."""
    keys = tables.candidates["key"]
    return tables.candidates.iloc[keys.searchsorted(key) : keys.searchsorted(key, side="right")]


def decision(tables: Tables, key: int) -> Decision:
    """The decision behind a row, with all that is stored of it. Raises ProfileError if its file is gone or broken since."""
    path = path_of(tables, key)
    found = read_decision(path)
    if found is None:
        raise ProfileError(f"{path.name} is no longer there. Load the page again.")
    return found


def foremost(decision: Decision, *, failures_first: bool = False) -> tuple[Decision, int]:
    """`decision` with at most `MOST_BACKENDS` candidates, and how many that leaves out.

    The chosen one, the baseline, then by speed; with `failures_first`, what has failed a check or broke down comes before these.
    """

    def rank(name: str) -> tuple[bool, bool, float, str]:
        one = decision.candidates[name]
        failed = failures_first and not one.measured and one.outcome not in ("unavailable", "unsupported")
        return (
            name not in (decision.chosen, decision.baseline),
            not failed,
            0.0 if one.speedup is None else -one.speedup.median,
            name,
        )

    names = set(sorted(decision.candidates, key=rank)[:MOST_BACKENDS])
    part = {name: one for name, one in decision.candidates.items() if name in names}
    return replace(decision, candidates=part), len(decision.candidates) - len(part)


def foremost_in(table: pd.DataFrame) -> tuple[pd.DataFrame, int]:
    """The rows of `table` of at most `MOST_BACKENDS` backends, and how many others it has.

    Those that were chosen most often, then those with the most rows.
    """
    by = table.groupby("backend", sort=True)["chosen"].agg(["sum", "size"])
    names = by.sort_values(["sum", "size"], ascending=False, kind="stable").index[:MOST_BACKENDS]
    return table[table["backend"].isin(names)], len(by) - len(names)


def evidence(tables: Tables, key: int) -> Evidence | None:
    """What the decision behind a row rests on, as it is stored beside it; None where it is not, or is another's."""
    found = row(tables, key)
    stored = read_decision(path_of(tables, key))
    return None if stored is None else Store(root_of(tables, found["source"])).evidence(found["environment"], stored)


def times(tables: Tables, key: int) -> dict[str, list[float]]:
    """Seconds of every round, by candidate; empty where they are not stored."""
    found = evidence(tables, key)
    return {} if found is None else found.seconds


def path_of(tables: Tables, key: int) -> Path:
    """The file of a decision."""
    found = row(tables, key)
    environment, name = str(found["file"]).split("/")
    return root_of(tables, found["source"]) / VERSION / environment / "decisions" / name


def root_of(tables: Tables, source: str) -> Path:
    """The folder of a source."""
    return next(one.root for one in tables.sources if one.name == source)


def drawn(figure: go.Figure) -> pd.DataFrame:
    """What the traces of `figure` show, one row a point."""
    parts = []
    for trace in figure.data:
        x, y = (list(values) if values is not None else [] for values in (trace.x, trace.y))
        length = min(len(x) or len(y), len(y) or len(x))
        parts.append(
            pd.DataFrame(
                {
                    "name": [_as_text(trace.name or "")] * length,
                    "x": [_as_text(one) for one in (x or range(length))[:length]],
                    "y": [_as_text(one) for one in (y or range(length))[:length]],
                }
            )
        )
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=["name", "x", "y"])


def _as_text(drawn: object) -> str:
    """What a chart shows for a text that `plain_in_chart` made fit for it: a table takes none for markup."""
    return plain_line(unescape(str(drawn)))
