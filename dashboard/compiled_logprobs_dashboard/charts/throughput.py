"""Charts of throughput: a rate against N or V with its band, the share of the measured roof, and what the first call costs."""

import math
from collections.abc import Iterable, Mapping

import pandas as pd
import plotly.graph_objects as go

from compiled_logprobs_dashboard.looks import NEUTRAL, Look, looks, plain_in_chart

CLEAR = "rgba(0,0,0,0)"
TITLES = {"rows": "N, rows (logarithmic)", "vocab": "V, vocabulary (logarithmic)"}
RATES = {"gbps": "GB/s, of the bytes that must move", "tokens": "tokens (rows) a second"}
ROOFS = {"read": "measured read", "copy": "measured copy", "in_place": "measured in place"}
MOST_TICKS = 12


def rate(
    points: pd.DataFrame,
    along: str,
    column: str,
    roofs: Mapping[str, tuple[float, float]] | None = None,
    *,
    among: Iterable[str] = (),
) -> go.Figure:
    """`roof.throughput` as a line a backend; its band is the middle 60 per cent of the calls.

    Args:
        points: columns backend, rows, vocab, and `column` with `_low` and `_high`.
        along: "rows" or "vocab", the axis across.
        column: "gbps" or "tokens".
        roofs: bandwidths to draw as lines, GB/s: lowest and highest that was measured.
        among: all backends that there are, see `palette.looks`.
    """
    figure = go.Figure()
    for name, look in looks(points["backend"], among).items():
        part = points[(points["backend"] == name) & points[column].notna()].sort_values(along)
        if part.empty:
            continue
        shown = f"{look.letter} {plain_in_chart(name, 30)}"
        known = part[part[f"{column}_low"].notna() & part[f"{column}_high"].notna()]
        if len(known) > 1:
            figure.add_trace(
                go.Scatter(
                    x=[*known[along], *known[along][::-1]],
                    y=[*known[f"{column}_high"], *known[f"{column}_low"][::-1]],
                    fill="toself",
                    fillcolor=_faint(look.colour),
                    line={"width": 0},
                    mode="lines",
                    name=f"{shown}, middle 60 % of the calls",
                    legendgroup=name,
                    showlegend=False,
                    hoverinfo="skip",
                )
            )
        figure.add_trace(
            go.Scatter(
                x=part[along],
                y=part[column],
                mode="lines+markers",
                name=shown,
                legendgroup=name,
                line={"color": look.colour, "dash": look.dash, "width": 2},
                marker=_marks(part, look),
                error_y=_bars(part, column, look.colour),
                hovertext=[_hover(row._asdict(), column) for row in part.itertuples(index=False)],
                hoverinfo="text",
            )
        )
    for number, (kind, (low, high)) in enumerate((roofs or {}).items()):
        span = f"{low:.3g}" if f"{low:.3g}" == f"{high:.3g}" else f"{low:.3g} to {high:.3g}"
        label = {"text": f"{ROOFS[kind]}, {span} GB/s", "font": {"size": 11}}
        # They are often as high as one another: one is named at the left, above, and the other at the right, below.
        place = (
            {"textposition": "end", "yanchor": "top"} if number % 2 else {"textposition": "start", "yanchor": "bottom"}
        )
        figure.add_hline(y=high, line={"dash": "dot", "color": NEUTRAL}, label={**label, **place})
    ends = [points[column].max(), points[f"{column}_high"].max(), *(high for _, high in (roofs or {}).values())]
    _lay_out(figure, points, along, RATES[column], ends)
    return figure


def share(points: pd.DataFrame, along: str, *, among: Iterable[str] = ()) -> go.Figure:
    """Per cent of the roof: the time that the bytes take at the measured bandwidth, of the time of a call. Above 100: hollow."""
    figure = go.Figure()
    for name, look in looks(points["backend"], among).items():
        part = points[(points["backend"] == name) & points["percent"].notna()].sort_values(along)
        if part.empty:
            continue
        figure.add_trace(
            go.Scatter(
                x=part[along],
                y=part["percent"],
                mode="lines+markers",
                name=f"{look.letter} {plain_in_chart(name, 30)}",
                line={"color": look.colour, "dash": look.dash, "width": 2},
                marker=_marks(part, look),
                hovertext=[_hover(row._asdict(), "percent") for row in part.itertuples(index=False)],
                hoverinfo="text",
            )
        )
    figure.add_hline(
        y=100,
        line={"dash": "dash", "color": NEUTRAL},
        label={"text": "100 %: the bandwidth measured on this device", "textposition": "start", "font": {"size": 11}},
    )
    _lay_out(figure, points, along, "% of the measured roof", [100.0, points["percent"].max()])
    return figure


def first_calls(points: pd.DataFrame, *, among: Iterable[str] = ()) -> go.Figure:
    """Seconds of the first call of each backend of one decision, with the calls after which it has paid."""
    part = points[points["first_call_seconds"].notna()].sort_values("first_call_seconds")
    named = looks(points["backend"], among)
    labels = [f"{named[name].letter} {plain_in_chart(name, 30)}" for name in part["backend"]]
    figure = go.Figure(
        go.Bar(
            x=part["first_call_seconds"],
            y=labels,
            orientation="h",
            marker={"color": [named[name].colour for name in part["backend"]]},
            text=[_paid(row.first_call_seconds, row.pays_after) for row in part.itertuples()],
            textposition="auto",
            hoverinfo="text",
            name="first call, s",
        )
    )
    figure.update_layout(
        height=90 + 44 * max(1, len(part)),
        margin={"l": 10, "r": 20, "t": 10, "b": 10},
        paper_bgcolor=CLEAR,
        plot_bgcolor=CLEAR,
        xaxis={"title": {"text": "seconds of the first call, compiling included"}, "rangemode": "tozero"},
        yaxis={"type": "category", "categoryorder": "array", "categoryarray": labels[::-1], "automargin": True},
    )
    figure.update_xaxes(fixedrange=True)
    figure.update_yaxes(fixedrange=True)
    return figure


def _marks(part: pd.DataFrame, look: Look) -> dict[str, object]:
    """Of points above the roof only an outline: they are no speed that the device is known to have."""
    return {
        "symbol": [f"{look.symbol}-open" if one > 100 else look.symbol for one in part["percent"]],
        "size": 11,
        "color": look.colour,
        "line": {"width": 2, "color": look.colour},
    }


def _paid(seconds: float, calls: float) -> str:
    return f"{seconds:.2g} s" + ("" if pd.isna(calls) else f", paid after {calls:,.0f} call{'' if calls == 1 else 's'}")


def _bars(part: pd.DataFrame, column: str, colour: str) -> dict[str, object] | None:
    """Of a single point, whose band would have no width."""
    if len(part) != 1 or part[f"{column}_low"].isna().any():
        return None
    return {
        "type": "data",
        "symmetric": False,
        "array": part[f"{column}_high"] - part[column],
        "arrayminus": part[column] - part[f"{column}_low"],
        "color": colour,
    }


def _hover(one: Mapping[str, object], column: str) -> str:
    lines = [
        f"{plain_in_chart(one['backend'], 40)}: N {one['rows']}, V {one['vocab']}",
        f"{one['gbps']:.4g} GB/s, {one['tokens']:,.4g} tokens/s",
    ]
    if column != "percent" and pd.notna(one[f"{column}_low"]):
        lines.append(f"middle 60 % of the calls: {one[f'{column}_low']:.4g} to {one[f'{column}_high']:.4g}")
    if pd.notna(one["percent"]):
        lines.append(f"{one['percent']:.0f} % of the measured roof")
    if one["timed_rows"] != one["rows"]:
        lines.append(f"timed with {one['timed_rows']} rows")
    if one["note"]:
        lines.append(plain_in_chart(one["note"], 200))
    return "<br>".join(lines)


def _faint(colour: str) -> str:
    red, green, blue = (int(colour[start : start + 2], 16) for start in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.2)"


def _lay_out(figure: go.Figure, points: pd.DataFrame, along: str, title: str, ends: list[float]) -> None:
    """From 0 to a little above the largest of `ends`, so that there is room for what is written over a line."""
    highest = max((one for one in ends if math.isfinite(one)), default=1.0)
    figure.update_layout(
        height=400,
        margin={"l": 10, "r": 10, "t": 20, "b": 10},
        paper_bgcolor=CLEAR,
        plot_bgcolor=CLEAR,
        legend={"orientation": "h", "y": -0.25},
        hovermode="closest",
    )
    figure.update_xaxes(**across(points[along], TITLES[along]))
    figure.update_yaxes(title={"text": title}, range=[0, 1.12 * highest], automargin=True, fixedrange=True)


def across(values: "pd.Series[int]", title: str) -> dict[str, object]:
    """A logarithmic axis with marks at the values themselves, or at some of them where they are many."""
    marks = sorted({int(one) for one in values if one > 0})
    marks = marks[:: -(-len(marks) // MOST_TICKS)] if marks else marks
    return {
        "type": "log",
        "title": {"text": title},
        "tickmode": "array",
        "tickvals": marks,
        "ticktext": [str(one) for one in marks],
        "fixedrange": True,
    }
