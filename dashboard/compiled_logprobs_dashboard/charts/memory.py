"""Charts of memory: what each backend takes beside the logits, and how that grows with N up to what the device has."""

from collections.abc import Iterable

import pandas as pd
import plotly.graph_objects as go

from compiled_logprobs_dashboard.charts import across, categories, line_of, name_of, new_figure
from compiled_logprobs_dashboard.looks import NEUTRAL, looks, plain_in_chart

MIB, GIB = 2**20, 2**30


def bars(points: pd.DataFrame, *, among: Iterable[str] = ()) -> go.Figure:
    """Extra memory of each backend of one decision, beside the least that is possible."""
    part = points.sort_values("extra_bytes")
    named = looks(points["backend"], among)
    labels = [name_of(name, named[name]) for name in part["backend"]]
    figure = new_figure(
        140 + 46 * max(1, len(part)),
        xaxis={"title": {"text": "MiB beside the logits, at the peak of a call"}, "rangemode": "tozero"},
        yaxis=categories(labels[::-1]),
    )
    figure.add_bar(
        x=part["extra_bytes"] / MIB,
        y=labels,
        orientation="h",
        marker={"color": [named[name].colour for name in part["backend"]]},
        text=[f"{row.extra_bytes / MIB:,.0f} MiB, {row.extra_multiple:.2f} x logits" for row in part.itertuples()],
        insidetextanchor="start",  # the mark of the least possible stands near the end
        hoverinfo="text",
        name="extra memory at its peak, MiB",
    )
    return figure.add_scatter(
        x=part["least_bytes"] / MIB,
        y=labels,
        mode="markers",
        marker={"symbol": "line-ns-open", "size": 30, "color": NEUTRAL, "line": {"width": 4}},
        hovertext=[f"the least possible: {least / MIB:,.0f} MiB" for least in part["least_bytes"]],
        hoverinfo="text",
        name="the least possible: results and gradient, MiB",
    )


def growth(
    points: pd.DataFrame, capacity_bytes: float | None, free_bytes: float | None, *, among: Iterable[str] = ()
) -> go.Figure:
    """Logits and extra memory by N, the least possible, and what the device has and what is free, where it is known."""
    figure = new_figure(
        400,
        xaxis=across(points["timed_rows"], "N, rows that were timed (logarithmic)"),
        yaxis={"title": {"text": "GiB, logits included (logarithmic)"}, "type": "log"},
    )
    least = points.drop_duplicates("timed_rows").sort_values("timed_rows")
    figure.add_scatter(
        x=least["timed_rows"],
        y=(least["logits_bytes"] + least["least_bytes"]) / GIB,
        mode="lines+markers",
        marker={"symbol": "line-ew-open"},
        line={"color": NEUTRAL, "dash": "dot"},
        name="the least possible",
        hovertemplate="N %{x}: %{y:.3g} GiB at least<extra></extra>",
    )
    for name, look in looks(points["backend"], among).items():
        part = points[points["backend"] == name].drop_duplicates("timed_rows").sort_values("timed_rows")
        hover = [
            f"{plain_in_chart(name, 30)}, N {row.timed_rows}: logits {row.logits_bytes / GIB:.3g} GiB, extra "
            f"{row.extra_bytes / GIB:.3g} GiB ({row.extra_multiple:.2f} x)"
            for row in part.itertuples()
        ]
        sizes = (part["logits_bytes"] + part["extra_bytes"]) / GIB
        figure.add_trace(
            line_of(part["timed_rows"], sizes, name_of(name, look), look, hovertext=hover, hoverinfo="text")
        )
    for size, what in ((capacity_bytes, "the device has"), (free_bytes, "left for this")):
        if size is not None and (what == "the device has" or size != capacity_bytes):
            label = {"text": f"{what} {size / GIB:.3g} GiB", "textposition": "start", "yanchor": "top"}
            figure.add_hline(y=size / GIB, line={"dash": "dash", "color": NEUTRAL}, label=label)
    return figure
