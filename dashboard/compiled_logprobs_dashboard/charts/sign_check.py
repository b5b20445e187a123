"""Charts of the sign check: how the errors spread by kind of input, and as shares of the values of one input."""

from collections.abc import Iterable
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from compiled_logprobs.decision import QUANTILES
from compiled_logprobs_dashboard.charts import line_of, name_of, new_figure
from compiled_logprobs_dashboard.looks import NEUTRAL, looks, plain_in_chart, plain_line
from compiled_logprobs_dashboard.tables.sign_check import KINDS, QUANTILE, UNITS

LANE = 0.22
"""Between two backends of one input, where inputs lie 1 apart."""
EXACT = 1e-17
"""Where errors of 0 are drawn, which a logarithmic axis cannot hold."""


def ranges(errors: pd.DataFrame, what: str, *, among: Iterable[str] = ()) -> go.Figure:
    """By input and backend, of one kind of result: thin all errors, thick the middle 90 %, median and limit."""
    inputs = list(dict.fromkeys(errors["input"]))
    place = {name: number for number, name in enumerate(inputs)}
    named = looks(errors["backend"], among)
    figure = new_figure(
        140 + max(30, 16 * len(named)) * max(1, len(inputs)),
        xaxis=_error_axis(what),
        yaxis={
            "tickmode": "array",
            "tickvals": list(place.values()),
            "ticktext": [plain_in_chart(name, 40) for name in inputs],
            "range": [len(inputs) - 0.4, -0.6],
            "zeroline": False,
        },
    )
    for lane, (name, look) in enumerate(named.items()):
        part = errors[(errors["backend"] == name) & errors["q100"].notna()]
        if part.empty:
            continue
        shown = name_of(name, look)
        up = part["input"].map(place) + LANE * (lane - (len(named) - 1) / 2)
        for low, high, width in (("q0", "q100", 1.5), ("q5", "q95", 6)):
            spans = zip(_drawable(part[low]), _drawable(part[high]), up, strict=True)
            ends = [end for left, right, y in spans for end in ((left, y), (right, y), (None, None))]
            figure.add_scatter(
                x=[x for x, _ in ends],
                y=[y for _, y in ends],
                mode="lines",
                line={"color": look.colour, "width": width},
                legendgroup=name,
                showlegend=False,
                hoverinfo="skip",
                name=f"{shown}, {low[1:]} to {high[1:]} %",
            )
        figure.add_scatter(
            x=_drawable(part["q50"]),
            y=up,
            mode="markers",
            name=f"{shown}, median",
            legendgroup=name,
            marker={"symbol": look.symbol, "color": look.colour, "line": {"width": 1, "color": "#ffffff"}},
            hovertext=[_hover(row._asdict()) for row in part.itertuples(index=False)],
            hoverinfo="text",
        )
        with_limit = part[part["limit"] > 0]
        figure.add_scatter(
            x=with_limit["limit"],
            y=up[with_limit.index],
            mode="markers",
            marker={"symbol": "line-ns-open", "size": 13, "color": NEUTRAL, "line": {"width": 3}},
            name="limit of the largest",
            legendgroup="limit",
            showlegend=lane == 0,
            hovertext=[f"limit {limit:.3g}" for limit in with_limit["limit"]],
            hoverinfo="text",
        )
    return figure


def shares(errors: pd.DataFrame, what: str, *, among: Iterable[str] = ()) -> go.Figure:
    """The share of values whose error is at most so large, a line a backend, for one dtype, input and result."""
    figure = new_figure(
        360, xaxis=_error_axis(what), yaxis={"title": {"text": "% of the values"}, "range": [-3, 103]}, showlegend=True
    )
    for name, look in looks(errors["backend"], among).items():
        for row in errors[errors["backend"] == name].dropna(subset=["q100"]).itertuples(index=False):
            figure.add_trace(
                line_of(
                    _drawable(pd.Series([getattr(row, quantile) for quantile in QUANTILE])),
                    [100 * share for share in QUANTILES],
                    name_of(name, look),
                    look,
                    hovertemplate="%{y:g} % of the errors are at most %{x:.3g}<extra>%{fullData.name}</extra>",
                )
            )
            if row.limit > 0:
                figure.add_vline(x=row.limit, line={"dash": "dash", "color": look.colour, "width": 1})
    return figure


def in_words(errors: pd.DataFrame, what: str) -> str:
    """What `ranges` shows."""
    known_errors = errors.dropna(subset=["q100"])
    if known_errors.empty:
        return "No errors are stored."
    parts = []
    for name, part in known_errors.groupby("backend", sort=False):
        worst = part.loc[part["q100"].idxmax()]
        parts.append(
            f"{plain_line(name, 40)} at most {worst['q100']:.3g}, with the input {plain_line(worst['input'], 40)!r}"
        )
    return f"Absolute errors of the {KINDS[what]} against float64, {UNITS[what]}: {'; '.join(parts)}."


def _drawable(values: "pd.Series[float]") -> list[float | None]:
    return [None if pd.isna(value) else max(float(value), EXACT) for value in values]


def _error_axis(what: str) -> dict[str, Any]:
    title = f"absolute error of the {KINDS[what]}, {UNITS[what]}<br>(logarithmic; exact at {EXACT:g})"
    return {"type": "log", "title": {"text": title}, "exponentformat": "power"}


def _hover(row: dict[str, Any]) -> str:
    limit = "" if pd.isna(row["limit"]) else f", limit {row['limit']:.3g}"
    return (
        f"{plain_in_chart(row['backend'], 40)}, {plain_in_chart(row['input'], 40)}<br>{row['count']} values: median "
        f"{row['q50']:.3g}, 95 % up to {row['q95']:.3g}, largest {row['q100']:.3g}{limit}"
    )
