"""The one chart of a shape: how each backend scales with N or V, in the figure that is asked for."""

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import pandas as pd
import plotly.graph_objects as go

from compiled_logprobs_dashboard.charts import across, cross, interval, line_of, name_of, new_figure, upward
from compiled_logprobs_dashboard.humanize import duration, percent, rate, size
from compiled_logprobs_dashboard.looks import BAD, NEUTRAL, looks, plain_in_chart

TITLES = {"rows": "N, tokens (logarithmic)", "vocab": "V, vocabulary (logarithmic)"}
GREY: dict[str, Any] = {"color": NEUTRAL, "dash": "dot"}


class Metric(NamedTuple):
    """A figure that can be drawn."""

    title: str
    words: Callable[[float], str]
    is_logarithmic: bool = False


METRICS = {
    "time": Metric("time of a call (logarithmic)", duration, is_logarithmic=True),
    "tokens/s": Metric("tokens a second", lambda value: rate(value, "tokens")),
    "GB/s": Metric("bytes that must move, a second", lambda value: rate(value, "B")),
    "% of roof": Metric("share of the measured bandwidth", percent),
    "memory": Metric("memory at the peak, logits included (logarithmic)", size, is_logarithmic=True),
}


def values_of(points: pd.DataFrame, metric: str) -> tuple["pd.Series[float]", "pd.Series[float]", "pd.Series[float]"]:
    """The figure of each point, with the ends of its band."""
    if metric == "time":
        return points["seconds"], points["seconds_low"], points["seconds_high"]
    if metric in ("tokens/s", "GB/s"):
        amount = points["rows"] if metric == "tokens/s" else points["bytes"]
        return amount / points["seconds"], amount / points["seconds_high"], amount / points["seconds_low"]
    none = pd.Series(math.nan, points.index)
    return points["percent" if metric == "% of roof" else "memory"], none, none


def scaling(
    points: pd.DataFrame,
    along: str,
    metric: str,
    *,
    roof: float = math.nan,
    capacity: float | None = None,
    among: Iterable[str] = (),
) -> go.Figure:
    """`tables.scaling.scaling` along N or V. Where a backend was wrong, its line is broken, and a red cross says so.

    `roof` is in bytes a second, `capacity` the bytes that are free.
    """
    points = points.assign(**dict(zip(("y", "y_low", "y_high"), values_of(points, metric), strict=True)))
    about, ends = METRICS[metric], [*points["y"], *points["y_high"], roof if metric == "GB/s" else None]
    ends += [*points["least"], capacity] if metric == "memory" else [100.0] if metric == "% of roof" else []
    axis = upward(ends, about.title, about.words, log=about.is_logarithmic, base=2 if metric == "memory" else 10)
    figure = new_figure(400, xaxis=across(points[along], TITLES[along]), yaxis=axis, showlegend=True)
    places = pd.DataFrame({along: sorted(points[along].unique())})
    ours, bad = points[~points["is_peer"]], points[points["state"] == "wrong"]
    named = looks(ours["backend"].unique(), among)
    for name, look in named.items():
        mine = ours[ours["backend"] == name]
        part = places.merge(mine.drop_duplicates(along), on=along, how="left")  # a gap where nothing was measured
        if part["y"].notna().any():
            over = part["percent"].gt(100) & (metric in ("GB/s", "% of roof"))
            symbols, line = [look.symbol + "-open" * is_over for is_over in over], {"width": 2, "color": look.colour}
            marker: dict[str, Any] = {"symbol": symbols, "line": line}
            bars = interval(part["y"], part["y_low"], part["y_high"], look.colour)
            more = {"marker": marker, "error_y": bars if part["y_low"].notna().any() else None, **_told(part)}
            figure.add_trace(line_of(part[along], part["y"], name_of(name, look), look, **more))
        if metric == "memory" and capacity is not None and along == "rows" and mine["memory"].notna().any():
            _to_the_limit(figure, mine, capacity, look.colour)
    for number, (name, peer) in enumerate(points[points["is_peer"]].groupby("backend")):
        part = places.merge(peer.drop_duplicates(along), on=along, how="left")
        line = {"color": NEUTRAL, "width": 1, "dash": ("dot", "dash", "longdash", "dashdot")[number % 4]}
        marker = {"symbol": number % 30 + 100, "color": NEUTRAL, "size": 8}
        title = f"{plain_in_chart(name, 40)} (peer)"
        figure.add_scatter(x=part[along], y=part["y"], name=title, line=line, marker=marker, **_told(part))
    if len(bad):
        letters = [named[name].letter if name in named else "peer" for name in bad["backend"]]
        figure.add_trace(cross(bad[along], letters, points["y"], **_told(bad)))
    if metric == "memory":
        least = points.drop_duplicates(along).sort_values(along)
        figure.add_scatter(x=least[along], y=least["least"], mode="lines", name="the least possible", line=GREY)
    for value, words in (
        (capacity if metric == "memory" else None, f"free on this device: {size(capacity)}"),
        (roof if metric == "GB/s" and math.isfinite(roof) else None, f"measured on this device: {rate(roof, 'B')}"),
        (100.0 if metric == "% of roof" else None, "measured on this device"),
    ):
        if value is not None:
            label = {"text": words, "textposition": "start", "yanchor": "bottom"}
            figure.add_hline(y=value, line=GREY | {"color": BAD if metric == "memory" else NEUTRAL}, label=label)
    return figure


def trade_off(points: pd.DataFrame, limit: int | None, *, among: Iterable[str] = ()) -> go.Figure:
    """`tables.shape.trade_off`: what each backend takes of time and memory, beside what the call may take."""
    ends, title = [*points["bytes"], limit], "memory beside arguments, results and gradients (logarithmic)"
    x, y = upward(ends, title, size, log=True, base=2), upward(points["seconds"], "time", duration, log=False)
    figure = new_figure(300, xaxis=x, yaxis=y, showlegend=True)
    for name, look in looks(points["backend"], among).items():
        part = points[points["backend"] == name]
        told = [f"{plain_in_chart(name, 40)}: {duration(row.seconds)}, {size(row.bytes)}" for row in part.itertuples()]
        style = {"mode": "markers", "marker": {"symbol": look.symbol, "color": look.colour, "size": 13}}
        figure.add_scatter(
            x=part["bytes"], y=part["seconds"], name=name_of(name, look), hovertext=told, hoverinfo="text", **style
        )
    if limit is not None:
        label = {"text": f"limit: {size(limit)}", "textposition": "end", "textangle": 0, "xanchor": "right"}
        figure.add_vline(x=limit, line=GREY | {"color": BAD}, label=label)
    return figure


def _to_the_limit(figure: go.Figure, mine: pd.DataFrame, capacity: float, colour: str) -> None:
    """Go on, as the last point has it, to where the memory is full; not where more rows were wrong."""
    last = mine[mine["memory"].notna()].sort_values("rows").iloc[-1]
    full = capacity / (last["memory"] / last["rows"])
    if full > last["rows"] and not mine.loc[mine["state"] == "wrong", "rows"].gt(last["rows"]).any():
        line, words = {"color": colour, "dash": "dot", "width": 1}, ["", f"full at N {full:,.0f}"]
        told = {"hovertext": words, "hoverinfo": "text", "mode": "lines", "showlegend": False}
        figure.add_scatter(x=[last["rows"], full], y=[last["memory"], capacity], line=line, **told)


def _told(part: pd.DataFrame) -> dict[str, Any]:
    return {"hovertext": [_hover(row._asdict()) for row in part.itertuples(index=False)], "hoverinfo": "text"}


def _hover(point: dict[str, Any]) -> str:
    if pd.isna(point["backend"]):
        return ""
    state = "" if point["state"] == "measured" else f", {point['state'].upper()}"
    lines = [f"{plain_in_chart(point['backend'], 40)}: N {point['rows']:,.0f}, V {point['vocab']:,.0f}{state}"]
    if point["seconds"] > 0:
        tokens, moved = point["rows"] / point["seconds"], point["bytes"] / point["seconds"]
        lines.append(f"{duration(point['seconds'])} a call, {rate(tokens, 'tokens')}, {rate(moved, 'B')}")
    if pd.notna(point["percent"]):
        why = ", from a cache or measured at another moment" if point["percent"] > 100 else ""
        lines.append(f"{percent(point['percent'])} of the measured bandwidth{why}")
    lines += [f"{size(point['memory'])} at the peak"] if pd.notna(point["memory"]) else []
    return "<br>".join([*lines, *([plain_in_chart(point["note"], 200)] if point["note"] else [])])
