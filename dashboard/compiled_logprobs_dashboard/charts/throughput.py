"""Charts of throughput: a rate against N or V with its band, the share of the roof, and the first call's cost."""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from compiled_logprobs_dashboard.charts import across, categories, in_rgb, interval, line_of, name_of, new_figure
from compiled_logprobs_dashboard.looks import NEUTRAL, Look, looks, plain_in_chart

TITLES = {"rows": "N, rows (logarithmic)", "vocab": "V, vocabulary (logarithmic)"}
RATES = {"gbps": "GB/s, of the bytes that must move", "tokens": "tokens (rows) a second"}
ROOFS = {"read": "measured read", "copy": "measured copy", "in_place": "measured in place"}


def rate(
    points: pd.DataFrame,
    along: str,
    column: str,
    roofs: Mapping[str, tuple[float, float]] | None = None,
    *,
    among: Iterable[str] = (),
) -> go.Figure:
    """A rate along N or V, with the middle 60 % of the calls as a band; `roofs` are spans of measured GB/s."""
    roofs = roofs or {}
    ends = [points[column].max(), points[f"{column}_high"].max(), *(high for _, high in roofs.values())]
    figure = _along(points, along, RATES[column], ends)
    for name, look, part in _each(points, along, column, among):
        banded = part[part[f"{column}_low"].notna() & part[f"{column}_high"].notna()]
        if len(banded) > 1:
            figure.add_scatter(
                x=[*banded[along], *banded[along][::-1]],
                y=[*banded[f"{column}_high"], *banded[f"{column}_low"][::-1]],
                fill="toself",
                fillcolor=in_rgb(look.colour, 0.2),
                line={"width": 0},
                mode="lines",
                name=f"{name}, middle 60 % of the calls",
                legendgroup=name,
                showlegend=False,
                hoverinfo="skip",
            )
        bars = None  # but of a single point, whose band would have no width
        if len(part) == 1 and part[f"{column}_low"].notna().all():
            bars = interval(part[column], part[f"{column}_low"], part[f"{column}_high"], look.colour)
        line = _line(part, along, column, name, look)
        figure.add_trace(line.update(legendgroup=name, error_y=bars))
    for number, (kind, (low, high)) in enumerate(roofs.items()):
        span = f"{low:.3g}" if f"{low:.3g}" == f"{high:.3g}" else f"{low:.3g} to {high:.3g}"
        # They are often as high as one another: one is named at the left, above, and the other at the right, below.
        place = (
            {"textposition": "end", "yanchor": "top"} if number % 2 else {"textposition": "start", "yanchor": "bottom"}
        )
        label = {"text": f"{ROOFS[kind]}, {span} GB/s", **place}
        figure.add_hline(y=high, line={"dash": "dot", "color": NEUTRAL}, label=label)
    return figure


def share(points: pd.DataFrame, along: str, *, among: Iterable[str] = ()) -> go.Figure:
    """Per cent of the roof: the time of the bytes at the measured bandwidth over that of a call; hollow above 100."""
    figure = _along(points, along, "% of the measured roof", [100.0, points["percent"].max()])
    for name, look, part in _each(points, along, "percent", among):
        figure.add_trace(_line(part, along, "percent", name, look))
    label = {"text": "100 %: the bandwidth measured on this device", "textposition": "start"}
    return figure.add_hline(y=100, line={"dash": "dash", "color": NEUTRAL}, label=label)


def first_calls(points: pd.DataFrame, *, among: Iterable[str] = ()) -> go.Figure:
    """Seconds of the first call of each backend of one decision, with the calls after which it has paid."""
    part = points[points["first_call_seconds"].notna()].sort_values("first_call_seconds")
    named = looks(points["backend"], among)
    labels = [name_of(name, named[name]) for name in part["backend"]]
    title = "seconds of the first call, compiling included"
    figure = new_figure(
        90 + 44 * max(1, len(part)),
        xaxis={"title": {"text": title}, "rangemode": "tozero"},
        yaxis=categories(labels[::-1]),
    )
    return figure.add_bar(
        x=part["first_call_seconds"],
        y=labels,
        orientation="h",
        marker={"color": [named[name].colour for name in part["backend"]]},
        text=[_paid(row.first_call_seconds, row.pays_after) for row in part.itertuples()],
        hoverinfo="text",
        name="first call, s",
    )


def _each(
    points: pd.DataFrame, along: str, column: str, among: Iterable[str]
) -> Iterator[tuple[str, Look, pd.DataFrame]]:
    """What a backend is called, how it looks, and its points; of those that have any."""
    for backend, look in looks(points["backend"], among).items():
        part = points[(points["backend"] == backend) & points[column].notna()].sort_values(along)
        if len(part):
            yield name_of(backend, look), look, part


def _line(part: pd.DataFrame, along: str, column: str, name: str, look: Look) -> go.Scatter:
    """Of points above the roof only an outline: they are no speed that the device is known to have."""
    symbols = [f"{look.symbol}-open" if percent > 100 else look.symbol for percent in part["percent"]]
    marker = {"symbol": symbols, "line": {"width": 2, "color": look.colour}}
    hover = [_hover(row._asdict(), column) for row in part.itertuples(index=False)]
    return line_of(part[along], part[column], name, look, marker=marker, hovertext=hover, hoverinfo="text")


def _paid(seconds: float, calls: float) -> str:
    return f"{seconds:.2g} s" + ("" if pd.isna(calls) else f", paid after {calls:,.0f} call{'' if calls == 1 else 's'}")


def _hover(point: Mapping[str, Any], column: str) -> str:
    lines = [
        f"{plain_in_chart(point['backend'], 40)}: N {point['rows']}, V {point['vocab']}",
        f"{point['gbps']:.4g} GB/s, {point['tokens']:,.4g} tokens/s",
    ]
    if column != "percent" and pd.notna(point[f"{column}_low"]):
        lines.append(f"middle 60 % of the calls: {point[f'{column}_low']:.4g} to {point[f'{column}_high']:.4g}")
    if pd.notna(point["percent"]):
        lines.append(f"{point['percent']:.0f} % of the measured roof")
    if point["timed_rows"] != point["rows"]:
        lines.append(f"timed with {point['timed_rows']} rows")
    if point["note"]:
        lines.append(plain_in_chart(point["note"], 200))
    return "<br>".join(lines)


def _along(points: pd.DataFrame, along: str, title: str, ends: list[float]) -> go.Figure:
    """From 0 to a little above the largest of `ends`, so that there is room for what is written over a line."""
    highest = max((end for end in ends if math.isfinite(end)), default=1.0)
    upward = {"title": {"text": title}, "range": [0, 1.12 * highest]}
    return new_figure(400, xaxis=across(points[along], TITLES[along]), yaxis=upward)
