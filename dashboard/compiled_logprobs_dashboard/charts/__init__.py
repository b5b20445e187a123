"""Turn tables into figures: pure functions, a file for each page. Here is the template that all charts share."""

import math
from collections.abc import Callable, Iterable
from html import unescape
from typing import Any

import pandas as pd
import plotly.graph_objects as go
import plotly.io

from compiled_logprobs_dashboard.looks import BAD, WRONG, Look, plain_in_chart, plain_line

TEMPLATE = "compiled_logprobs"
MOST_TICKS = 12
_AXIS = {"automargin": True}

# No background of its own, so that a chart fits light and dark; the page adds its fonts and lines.
plotly.io.templates[TEMPLATE] = go.layout.Template(
    layout={
        "margin": {"l": 10, "r": 20, "t": 20, "b": 10},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom"},
        "hovermode": "closest",
        "xaxis": _AXIS,
        "yaxis": _AXIS,
    },
    data={"scatter": [{"line": {"width": 2}, "marker": {"size": 11}}], "bar": [{"textposition": "auto"}]},
)


def new_figure(height: int, **layout: Any) -> go.Figure:
    """An empty figure in the house's template."""
    return go.Figure(layout={"template": TEMPLATE, "height": height, **layout})


def name_of(backend: object, look: Look) -> str:
    """What a backend is called in a chart: its letter and its name."""
    return f"{look.letter} {plain_in_chart(backend, 30)}"


def line_of(x: Any, y: Any, name: str, look: Look, **options: Any) -> go.Scatter:
    """Points of one backend, and the line through them, as it is drawn everywhere; `marker` adds to how points look."""
    marker = {"symbol": look.symbol, "color": look.colour, **options.pop("marker", {})}
    line = {"color": look.colour, "dash": look.dash, **options.pop("line", {})}
    return go.Scatter(x=x, y=y, mode="lines+markers", name=name, line=line, marker=marker, connectgaps=False, **options)


def cross(at: "pd.Series[Any]", letters: list[str], values: "pd.Series[float]", **options: Any) -> go.Scatter:
    """Red crosses where backends of these letters were wrong, at the least of `values`, which are drawn."""
    style = {"marker": {"symbol": "x", "size": 14, "color": BAD}, "textfont": {"color": BAD}}
    style |= {"mode": "markers+text", "textposition": "top center", "cliponaxis": False}
    bottom = float(values.min()) if values.notna().any() else 1.0
    name = f"{WRONG} WRONG there, so not drawn"
    return go.Scatter(x=at, y=[bottom] * len(at), text=letters, name=name, **style, **options)


def interval(middle: Any, low: Any, high: Any, colour: str) -> dict[str, Any]:
    """Bars from `low` to `high` around points; none where these are not known."""
    up, down = (pd.Series(ends).fillna(0) for ends in (high - middle, middle - low))
    return {"type": "data", "symmetric": False, "array": up, "arrayminus": down, "color": colour}


def categories(values: list[str], title: str | None = None, **more: Any) -> dict[str, Any]:
    """An axis of texts, in this order."""
    return {"title": {"text": title}, "type": "category", "categoryorder": "array", "categoryarray": values, **more}


def across(values: "pd.Series[int]", title: str) -> dict[str, Any]:
    """A logarithmic axis with marks at the values themselves, or at some of them where they are many or near."""
    marks: list[int] = []
    for value in sorted({int(value) for value in values if value > 0}):
        if not marks or value > 1.06 * marks[-1]:  # such as 128256 and 129280, whose texts would lie on one another
            marks.append(value)
    marks = marks[:: -(-len(marks) // MOST_TICKS)] if marks else marks
    ticks = {"tickmode": "array", "tickvals": marks, "ticktext": [f"{mark:,}" for mark in marks]}
    return {"type": "log", "title": {"text": title}, **ticks}


def upward(
    values: Iterable[float | None], title: str, words: Callable[[float], str], *, log: bool, base: int = 10
) -> dict[str, Any]:
    """An axis that holds `values`, with marks at round numbers, in `words`; from 0 where it is not `log`."""
    known = [float(value) for value in values if value is not None and 0 < value < math.inf] or [1.0]
    if log:
        low, high = (math.log(end(known), base) for end in (min, max))
        powers = range(math.floor(low), math.ceil(high) + 1)
        steps = (1, 2, 5) if base == 10 and len(powers) < 5 else (1,)
        marks = [step * float(base) ** power for power in powers[:: 1 + len(powers) // 9] for step in steps]
    else:
        top = 1.12 * max(known)
        step = 10.0 ** math.floor(math.log10(top / 2))
        step *= next(factor for factor in (1, 2, 5, 10) if top / (step * factor) <= 7)
        marks = [step * number for number in range(int(top / step) + 1)]
    ticks = {"tickmode": "array", "tickvals": marks, "ticktext": ["0" if not mark else words(mark) for mark in marks]}
    return {"title": {"text": title}, **ticks, **({"type": "log"} if log else {"range": [0, 1.12 * max(known)]})}


def in_rgb(colour: str, opacity: float) -> str:
    """A colour such as #0072B2 with an opacity."""
    red, green, blue = (int(colour[start : start + 2], 16) for start in (1, 3, 5))
    return f"rgba({red},{green},{blue},{opacity:.2f})"


def drawn(figure: go.Figure) -> pd.DataFrame:
    """What the traces of `figure` show, one row a point."""
    rows = []
    for trace in figure.data:
        x, y = (list(values) if values is not None else [] for values in (trace.x, trace.y))
        length = min(len(x) or len(y), len(y) or len(x))
        points = zip((x or range(length))[:length], (y or range(length))[:length], strict=True)
        # A table takes no text for markup, and shows what `plain_in_chart` made fit for a chart as it was.
        rows += [[plain_line(unescape(str(value))) for value in (trace.name or "", *point)] for point in points]
    return pd.DataFrame(rows, columns=["name", "x", "y"])
