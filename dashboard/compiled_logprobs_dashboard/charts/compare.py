"""The charts of the page Compare: ratios of two profiles with their noise, and a shape's times over versions."""

from collections.abc import Iterable

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from compiled_logprobs_dashboard.charts import categories, interval, line_of, name_of, new_figure
from compiled_logprobs_dashboard.looks import BAD, DOUBTFUL, GOOD, NEUTRAL, looks, plain_in_chart

MOST = 40
"""Rows that can be told apart; those that differ most are shown."""
VERDICTS = {
    "this is faster": ("▲ this is faster", GOOD, "triangle-right"),
    "that is faster": ("▼ that is faster", BAD, "triangle-left"),
    "within noise": ("≈ within noise", NEUTRAL, "circle-open"),
    "noise not known": ("? noise not known", DOUBTFUL, "x"),
}


def ratios(table: pd.DataFrame) -> go.Figure:
    """`tables.compare.matched`: that profile's seconds over this one's, with the noise band, one row a problem."""
    shown = table.iloc[np.log(table["ratio"]).abs().sort_values(ascending=False, kind="stable").index[:MOST]]
    shown = shown.sort_values("ratio", kind="stable")
    labels: dict[int, str] = {}
    for number, name in shown["problem"].items():
        label = plain_in_chart(name, 60)
        while label in labels.values():  # cut off, or called the same by a foreign file: each has a line of its own
            label += " ·"
        labels[number] = label
    figure = new_figure(140 + 24 * max(3, len(shown)))
    for verdict, (name, colour, symbol) in VERDICTS.items():
        part = shown[shown["verdict"] == verdict]
        if part.empty:
            continue
        figure.add_scatter(
            x=part["ratio"],
            y=[labels[number] for number in part.index],
            mode="markers",
            name=name,
            marker={"color": colour, "symbol": symbol, "size": 12, "line": {"width": 2, "color": colour}},
            error_x=interval(part["ratio"], part["low"], part["high"], colour),
            hovertemplate="%{y}<br>%{x:.2f}x<extra></extra>",
        )
    figure.add_vline(x=1.0, line={"dash": "dash", "color": NEUTRAL})
    title = "That profile's time over this one's: right of 1, this is faster"
    return figure.update_layout(
        xaxis={"title": {"text": title}, "type": "log", "dtick": "D1"}, yaxis=categories(list(labels.values()))
    )


def history(table: pd.DataFrame, *, among: Iterable[str] = ()) -> go.Figure:
    """`tables.compare.history`: milliseconds of each backend by the time of measuring, with the noise band."""
    order = [plain_in_chart(label, 90) for label in dict.fromkeys(table["label"])]
    figure = new_figure(
        380, xaxis=categories(order), yaxis={"title": {"text": "a call, ms"}, "rangemode": "tozero"}, showlegend=True
    )
    for name, look in looks(table["backend"], among).items():
        part = table[table["backend"] == name]
        figure.add_trace(
            line_of(
                [plain_in_chart(label, 90) for label in part["label"]],
                part["ms"],
                name_of(name, look),
                look,
                error_y=interval(part["ms"], part["low"], part["high"], look.colour),
                hovertemplate="%{x}<br>%{y:.3g} ms<extra></extra>",
            )
        )
    return figure
