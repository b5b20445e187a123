"""Charts of the sign check: how the errors spread by kind of input, and as shares of the values of one input."""

from collections.abc import Iterable

import pandas as pd
import plotly.graph_objects as go

from compiled_logprobs.decision import QUANTILES
from compiled_logprobs_dashboard.looks import NEUTRAL, looks, plain_in_chart, plain_line
from compiled_logprobs_dashboard.tables.sign_check import KINDS, QUANTILE, UNITS

CLEAR = "rgba(0,0,0,0)"
LANE = 0.22
"""Between two backends of one input, where inputs lie 1 apart."""
HIGHEST = 3000
"""Pixels of all lanes together: with many backends, they lie closer."""
EXACT = 1e-17
"""Where errors of 0 are drawn, which a logarithmic axis cannot hold."""


def ranges(errors: pd.DataFrame, what: str, *, among: Iterable[str] = ()) -> go.Figure:
    """By kind of input and backend: thin the errors of all values, thick the middle 90 per cent, the median, and the limit.

    Args:
        errors: `evidence.errors` of one dtype and kind of result.
        what: which kind that is.
        among: all backends that there are, see `palette.looks`.
    """
    figure = go.Figure()
    inputs = list(dict.fromkeys(errors["input"]))
    place = {name: number for number, name in enumerate(inputs)}
    named = looks(errors["backend"], among)
    for lane, (name, look) in enumerate(named.items()):
        part = errors[(errors["backend"] == name) & errors["q100"].notna()]
        if part.empty:
            continue
        shown = f"{look.letter} {plain_in_chart(name, 30)}"
        up = part["input"].map(place) + LANE * (lane - (len(named) - 1) / 2)
        for low, high, width in (("q0", "q100", 1.5), ("q5", "q95", 6)):
            xs: list[float | None] = []
            ys: list[float | None] = []
            for left, right, y in zip(_drawable(part[low]), _drawable(part[high]), up, strict=True):
                xs += [left, right, None]
                ys += [y, y, None]
            figure.add_trace(
                go.Scatter(
                    x=xs,
                    y=ys,
                    mode="lines",
                    line={"color": look.colour, "width": width},
                    legendgroup=name,
                    showlegend=False,
                    hoverinfo="skip",
                    name=f"{shown}, {low[1:]} to {high[1:]} %",
                )
            )
        figure.add_trace(
            go.Scatter(
                x=_drawable(part["q50"]),
                y=up,
                mode="markers",
                name=f"{shown}, median",
                legendgroup=name,
                marker={
                    "symbol": look.symbol,
                    "size": 10,
                    "color": look.colour,
                    "line": {"width": 1, "color": "#ffffff"},
                },
                hovertext=[_hover(row._asdict()) for row in part.itertuples(index=False)],
                hoverinfo="text",
            )
        )
        with_limit = part[part["limit"] > 0]
        figure.add_trace(
            go.Scatter(
                x=with_limit["limit"],
                y=up[with_limit.index],
                mode="markers",
                marker={"symbol": "line-ns-open", "size": 13, "color": NEUTRAL, "line": {"width": 3}},
                name="limit of the largest",
                legendgroup="limit",
                showlegend=lane == 0,
                hovertext=[f"limit {one:.3g}" for one in with_limit["limit"]],
                hoverinfo="text",
            )
        )
    figure.update_layout(
        height=140 + min(max(30, 16 * len(named)), HIGHEST // max(1, len(inputs))) * max(1, len(inputs)),
        margin={"l": 10, "r": 10, "t": 10, "b": 10},
        paper_bgcolor=CLEAR,
        plot_bgcolor=CLEAR,
        legend={"orientation": "h", "y": -0.15},
    )
    figure.update_xaxes(**_error_axis(what))
    figure.update_yaxes(
        tickmode="array",
        tickvals=list(place.values()),
        ticktext=[plain_in_chart(one, 40) for one in inputs],
        range=[len(inputs) - 0.4, -0.6],
        automargin=True,
        fixedrange=True,
        zeroline=False,
    )
    return figure


def shares(errors: pd.DataFrame, what: str, *, among: Iterable[str] = ()) -> go.Figure:
    """The share of the values whose error is at most so large, a line a backend, for one dtype, input and kind of result."""
    figure = go.Figure()
    for name, look in looks(errors["backend"], among).items():
        for row in errors[errors["backend"] == name].dropna(subset=["q100"]).itertuples(index=False):
            figure.add_trace(
                go.Scatter(
                    x=_drawable(pd.Series([getattr(row, one) for one in QUANTILE])),
                    y=[100 * share for share in QUANTILES],
                    mode="lines+markers",
                    name=f"{look.letter} {plain_in_chart(name, 30)}",
                    line={"color": look.colour, "dash": look.dash, "width": 2},
                    marker={"symbol": look.symbol, "size": 8, "color": look.colour},
                    hovertemplate="%{y:g} % of the errors are at most %{x:.3g}<extra>%{fullData.name}</extra>",
                )
            )
            if row.limit > 0:
                figure.add_vline(x=row.limit, line={"dash": "dash", "color": look.colour, "width": 1})
    figure.update_layout(
        height=360,
        margin={"l": 10, "r": 10, "t": 10, "b": 10},
        paper_bgcolor=CLEAR,
        plot_bgcolor=CLEAR,
        legend={"orientation": "h", "y": -0.3},
    )
    figure.update_xaxes(**_error_axis(what))
    figure.update_yaxes(title={"text": "% of the values"}, range=[-3, 103], fixedrange=True)
    return figure


def in_words(errors: pd.DataFrame, what: str) -> str:
    """What `ranges` shows."""
    found = errors.dropna(subset=["q100"])
    if found.empty:
        return "No errors are stored."
    parts = []
    for name, part in found.groupby("backend", sort=False):
        worst = part.loc[part["q100"].idxmax()]
        parts.append(
            f"{plain_line(name, 40)} at most {worst['q100']:.3g}, with the input {plain_line(worst['input'], 40)!r}"
        )
    return f"Absolute errors of the {KINDS[what]} against float64, {UNITS[what]}: {'; '.join(parts)}."


def _drawable(values: "pd.Series[float]") -> list[float | None]:
    return [None if pd.isna(one) else max(float(one), EXACT) for one in values]


def _error_axis(what: str) -> dict[str, object]:
    return {
        "type": "log",
        "title": {"text": f"absolute error of the {KINDS[what]}, {UNITS[what]}<br>(logarithmic; exact at {EXACT:g})"},
        "exponentformat": "power",
        "fixedrange": True,
    }


def _hover(one: dict[str, object]) -> str:
    limit = "" if pd.isna(one["limit"]) else f", limit {one['limit']:.3g}"
    return (
        f"{plain_in_chart(one['backend'], 40)}, {plain_in_chart(one['input'], 40)}<br>{one['count']} values: median "
        f"{one['q50']:.3g}, 95 % up to {one['q95']:.3g}, largest {one['q100']:.3g}{limit}"
    )
