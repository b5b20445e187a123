"""The charts of the page Compare: ratios of two profiles with their noise, and a shape's times over versions."""

from collections.abc import Iterable

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from compiled_logprobs_dashboard.looks import BAD, DOUBTFUL, GOOD, NEUTRAL, looks, plain_in_chart

CLEAR = "rgba(0,0,0,0)"
MOST = 40
"""Rows that can be told apart; those that differ most are shown."""
VERDICTS = {
    "this is faster": ("▲ this is faster", GOOD, "triangle-right"),
    "that is faster": ("▼ that is faster", BAD, "triangle-left"),
    "within noise": ("≈ within noise", NEUTRAL, "circle-open"),
    "noise not known": ("? noise not known", DOUBTFUL, "x"),
}


def ratios(table: pd.DataFrame) -> go.Figure:
    """`comparison.matched`: that profile's seconds over this one's, with the noise band, one row a problem."""
    shown = table.iloc[np.log(table["ratio"]).abs().sort_values(ascending=False, kind="stable").index[:MOST]]
    shown = shown.sort_values("ratio", kind="stable")
    labels: dict[int, str] = {}
    for number, name in shown["problem"].items():
        label = plain_in_chart(name, 60)
        while label in labels.values():  # cut off, or called the same by a foreign file: each has a line of its own
            label += " ·"
        labels[number] = label
    figure = go.Figure()
    for verdict, (name, colour, symbol) in VERDICTS.items():
        part = shown[shown["verdict"] == verdict]
        if part.empty:
            continue
        figure.add_trace(
            go.Scatter(
                x=part["ratio"],
                y=[labels[number] for number in part.index],
                mode="markers",
                name=name,
                marker={"color": colour, "symbol": symbol, "size": 12, "line": {"width": 2, "color": colour}},
                error_x={
                    "type": "data",
                    "symmetric": False,
                    "array": (part["high"] - part["ratio"]).fillna(0),
                    "arrayminus": (part["ratio"] - part["low"]).fillna(0),
                    "color": colour,
                },
                hovertemplate="%{y}<br>%{x:.2f}x<extra></extra>",
            )
        )
    figure.add_vline(x=1.0, line={"dash": "dash", "color": NEUTRAL})
    figure.update_layout(
        height=140 + 24 * max(3, len(shown)),
        margin={"l": 10, "r": 20, "t": 10, "b": 10},
        paper_bgcolor=CLEAR,
        plot_bgcolor=CLEAR,
        legend={"orientation": "h", "y": 1.08},
        xaxis={
            "title": {"text": "That profile's time over this one's: right of 1, this is faster"},
            "type": "log",
            "dtick": "D1",
        },
        yaxis={
            "type": "category",
            "categoryorder": "array",
            "categoryarray": list(labels.values()),
            "automargin": True,
        },
    )
    return figure


def history(table: pd.DataFrame, *, among: Iterable[str] = ()) -> go.Figure:
    """`comparison.history`: milliseconds of each backend, in the order in which they were measured, with the noise band."""
    figure = go.Figure()
    order = [plain_in_chart(one, 90) for one in dict.fromkeys(table["label"])]
    for name, look in looks(table["backend"], among).items():
        part = table[table["backend"] == name]
        figure.add_trace(
            go.Scatter(
                x=[plain_in_chart(one, 90) for one in part["label"]],
                y=part["ms"],
                mode="lines+markers",
                name=f"{look.letter} {plain_in_chart(name, 30)}",
                line={"color": look.colour, "dash": look.dash},
                marker={"color": look.colour, "symbol": look.symbol, "size": 11},
                error_y={
                    "type": "data",
                    "symmetric": False,
                    "array": (part["high"] - part["ms"]).fillna(0),
                    "arrayminus": (part["ms"] - part["low"]).fillna(0),
                    "color": look.colour,
                },
                hovertemplate="%{x}<br>%{y:.3g} ms<extra></extra>",
            )
        )
    figure.update_layout(
        height=380,
        margin={"l": 10, "r": 20, "t": 10, "b": 10},
        paper_bgcolor=CLEAR,
        plot_bgcolor=CLEAR,
        legend={"orientation": "h", "y": 1.12},
        xaxis={"type": "category", "categoryorder": "array", "categoryarray": order, "automargin": True},
        yaxis={"title": {"text": "a call, ms"}, "rangemode": "tozero"},
    )
    return figure
