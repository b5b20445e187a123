"""Charts of memory: what each backend takes beside the logits, and how that grows with N up to what the device has."""

from collections.abc import Iterable

import pandas as pd
import plotly.graph_objects as go

from compiled_logprobs_dashboard.charts.throughput import CLEAR, across
from compiled_logprobs_dashboard.looks import NEUTRAL, looks, plain_in_chart

MIB, GIB = 2**20, 2**30


def bars(points: pd.DataFrame, *, among: Iterable[str] = ()) -> go.Figure:
    """Extra memory of each backend of one decision, in MiB and multiples of the logits, behind it the least that is possible."""
    part = points.sort_values("extra_bytes")
    named = looks(points["backend"], among)
    labels = [f"{named[name].letter} {plain_in_chart(name, 30)}" for name in part["backend"]]
    figure = go.Figure()
    figure.add_trace(
        go.Bar(
            x=part["extra_bytes"] / MIB,
            y=labels,
            orientation="h",
            marker={"color": [named[name].colour for name in part["backend"]]},
            text=[f"{row.extra_bytes / MIB:,.0f} MiB, {row.extra_multiple:.2f} x logits" for row in part.itertuples()],
            textposition="auto",
            insidetextanchor="start",  # the mark of the least possible stands near the end
            hoverinfo="text",
            name="extra memory at its peak, MiB",
        )
    )
    figure.add_trace(
        go.Scatter(
            x=part["least_bytes"] / MIB,
            y=labels,
            mode="markers",
            marker={"symbol": "line-ns-open", "size": 30, "color": NEUTRAL, "line": {"width": 4}},
            hovertext=[f"the least possible: {one / MIB:,.0f} MiB" for one in part["least_bytes"]],
            hoverinfo="text",
            name="the least possible: results and gradient, MiB",
        )
    )
    figure.update_layout(
        height=140 + 46 * max(1, len(part)),
        margin={"l": 10, "r": 20, "t": 10, "b": 10},
        paper_bgcolor=CLEAR,
        plot_bgcolor=CLEAR,
        legend={"orientation": "h", "y": -0.4},
        xaxis={"title": {"text": "MiB beside the logits, at the peak of a call"}, "rangemode": "tozero"},
        yaxis={"type": "category", "categoryorder": "array", "categoryarray": labels[::-1], "automargin": True},
    )
    figure.update_xaxes(fixedrange=True)
    figure.update_yaxes(fixedrange=True)
    return figure


def growth(
    points: pd.DataFrame, capacity_bytes: float | None, free_bytes: float | None, *, among: Iterable[str] = ()
) -> go.Figure:
    """Logits and extra memory by N, a line a backend, with the least possible and what the device has.

    Args:
        points: `data_memory.memory`.
        capacity_bytes: of the device; None where it is not known, and then no line is drawn.
        free_bytes: what of it is left for this, likewise.
        among: all backends that there are, see `palette.looks`.
    """
    figure = go.Figure()
    least = points.drop_duplicates("timed_rows").sort_values("timed_rows")
    figure.add_trace(
        go.Scatter(
            x=least["timed_rows"],
            y=(least["logits_bytes"] + least["least_bytes"]) / GIB,
            mode="lines+markers",
            marker={"symbol": "line-ew-open", "size": 10},
            line={"color": NEUTRAL, "dash": "dot", "width": 2},
            name="the least possible",
            hovertemplate="N %{x}: %{y:.3g} GiB at least<extra></extra>",
        )
    )
    for name, look in looks(points["backend"], among).items():
        part = points[points["backend"] == name].drop_duplicates("timed_rows").sort_values("timed_rows")
        figure.add_trace(
            go.Scatter(
                x=part["timed_rows"],
                y=(part["logits_bytes"] + part["extra_bytes"]) / GIB,
                mode="lines+markers",
                name=f"{look.letter} {plain_in_chart(name, 30)}",
                line={"color": look.colour, "dash": look.dash, "width": 2},
                marker={"symbol": look.symbol, "size": 10, "color": look.colour},
                hovertext=[
                    f"{plain_in_chart(name, 30)}, N {row.timed_rows}: logits {row.logits_bytes / GIB:.3g} GiB, extra "
                    f"{row.extra_bytes / GIB:.3g} GiB ({row.extra_multiple:.2f} x)"
                    for row in part.itertuples()
                ],
                hoverinfo="text",
            )
        )
    for size, what in ((capacity_bytes, "the device has"), (free_bytes, "left for this")):
        if size is not None and (what == "the device has" or size != capacity_bytes):
            label = {
                "text": f"{what} {size / GIB:.3g} GiB",
                "textposition": "start",
                "yanchor": "top",
                "font": {"size": 11},
            }
            figure.add_hline(y=size / GIB, line={"dash": "dash", "color": NEUTRAL}, label=label)
    figure.update_layout(
        height=400,
        margin={"l": 10, "r": 10, "t": 20, "b": 10},
        paper_bgcolor=CLEAR,
        plot_bgcolor=CLEAR,
        legend={"orientation": "h", "y": -0.25},
    )
    figure.update_xaxes(**across(points["timed_rows"], "N, rows that were timed (logarithmic)"))
    figure.update_yaxes(
        title={"text": "GiB, logits included (logarithmic)"}, type="log", automargin=True, fixedrange=True
    )
    return figure
