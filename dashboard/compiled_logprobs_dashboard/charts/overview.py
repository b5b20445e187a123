"""The overview's charts: winner maps side by side, ratios of profiles, and a shape's times over dates."""

from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from compiled_logprobs.tuning.presets import MODELS
from compiled_logprobs_dashboard.charts import categories, in_rgb, interval, line_of, name_of, new_figure, upward
from compiled_logprobs_dashboard.humanize import duration
from compiled_logprobs_dashboard.looks import BAD, DOUBTFUL, GOOD, NEUTRAL, WRONG, Look, looks, plain_in_chart

ACROSS = 4
"""Maps side by side."""
SIDE, BETWEEN = 24, 74
"""Pixels of a square; and between two maps, one below the other, for the marks of an axis and the next title."""
STRONG = 0.65
"""Opacity from which a letter has to stand out against the square's colour rather than the page's."""
MOST = 40
"""Rows of a comparison that can be told apart; those that differ most are shown."""
VERDICTS = {
    "slower": ("▲ slower", BAD, "triangle-right"),
    "faster": ("▼ faster", GOOD, "triangle-left"),
    "within noise": ("≈ within noise", NEUTRAL, "circle-open"),
    "noise not known": ("? noise not known", DOUBTFUL, "x"),
}


def winner_maps(maps: Sequence[tuple[str, str, pd.DataFrame]], *, among: Iterable[str] = ()) -> go.Figure:
    """`tables.overview.maps` as squares over N and V: colour and letter the backend, opacity its margin, ties hollow.

    Where a backend was wrong, the square is framed in red and has a cross. Squares are points, since only points can
    be clicked; each carries the key of its decision.
    """
    wide = min(ACROSS, len(maps))
    starts = range(0, len(maps), wide)
    heights = [(SIDE + 4) * max(part["vocab"].nunique() for _, _, part in maps[at : at + wide]) for at in starts]
    inside = sum(heights) + BETWEEN * (len(heights) - 1)
    legend = {"itemclick": False, "itemdoubleclick": False, "y": 1 + 36 / inside}
    still = {"dragmode": False, "clickmode": "event+select", "margin": {"t": 72, "b": 70}}
    figure = new_figure(inside + 142, legend=legend, **still).set_subplots(
        rows=len(heights),
        cols=wide,
        subplot_titles=[f"{_folded(plain_in_chart(mode, 60))}, {plain_in_chart(dtype, 20)}" for mode, dtype, _ in maps],
        horizontal_spacing=0.09 if wide > 1 else 0,
        vertical_spacing=BETWEEN / inside if len(heights) > 1 else 0,
        row_heights=heights,
    )
    figure.update_annotations(font_size=12)
    backends = pd.concat([part["backend"] for _, _, part in maps]).dropna()
    named, shown = looks(backends.value_counts().index, among), set[str]()
    labels = {str(vocab): f"{name} {vocab // 1000}k" for name, vocab in MODELS.items()}
    for place, (_, _, part) in enumerate(maps):
        at = {"row": place // wide + 1, "col": place % wide + 1}
        across, up = ([str(value) for value in sorted(part[name].unique())] for name in ("rows", "vocab"))
        title, words = "N, tokens" if at["row"] == len(heights) else None, [labels.get(v, f"{int(v):,}") for v in up]
        figure.update_xaxes(categories(across, title, showgrid=False, automargin=False), **at)
        ends = [-0.5, len(up) - 0.5]  # without room beside them, so that no two squares touch
        figure.update_yaxes(categories(up, showgrid=False, tickvals=up, ticktext=words, range=ends), **at)
        for trace in _traces(part, named):
            trace.showlegend = trace.legendgroup not in shown
            shown.add(trace.legendgroup)
            figure.add_trace(trace, **at)
    return figure


def _folded(mode: str) -> str:
    """On two lines where it is long."""
    first, *rest = mode.split(", ")
    return mode if len(mode) < 34 or not rest else f"{', '.join([first, *rest[:-1]])},<br>{rest[-1]}"


def _traces(part: pd.DataFrame, named: dict[str, Look]) -> Iterable[go.Scatter]:
    for name, look in named.items():
        mine = part[part["backend"] == name]
        for (hollow, strong), group in mine.groupby([mine["state"] == "tie", mine["opacity"] >= STRONG]):
            yield _squares(group, look, plain_in_chart(name, 30) + ", tie" * hollow, hollow=hollow, strong=strong)
    if len(undecided := part[part["state"] == "undecided"]):
        yield _squares(undecided, Look(DOUBTFUL, "?", "square", "solid"), "undecided", hollow=True, strong=False)
    if len(bad := part[part["wrong"] != ""]):
        name, cross = f"{WRONG} WRONG: a backend failed a check there", {"color": BAD, "size": 15, "weight": 900}
        marker = {"symbol": "square-open", "size": SIDE, "color": BAD, "line": {"width": 3, "color": BAD}}
        more = {"marker": marker, "text": [WRONG] * len(bad), "textfont": cross, "textposition": "top right"}
        yield _points(bad, name, more)


def _squares(part: pd.DataFrame, look: Look, name: str, *, hollow: bool, strong: bool) -> go.Scatter:
    """Squares of one backend, all strong or all faint: on faint ones the page's own text colour is readable."""
    red, green, blue = (int(look.colour[start : start + 2], 16) for start in (1, 3, 5))
    font: dict[str, Any] = {"size": SIDE // 2}
    if hollow:
        font |= {"color": look.colour}
    elif strong:
        font |= {"color": "#ffffff" if 0.299 * red + 0.587 * green + 0.114 * blue < 120 else "#101418"}
    # In the colour, so that a click, which sets the opacity of points, does not change it.
    colours = [in_rgb(look.colour, 1.0 if hollow else opacity) for opacity in part["opacity"]]
    line = {"width": 2 if hollow else 1, "color": look.colour}
    marker = {"symbol": "square-open" if hollow else "square", "size": SIDE, "color": colours, "line": line}
    more = {"marker": marker, "text": [look.letter] * len(part), "textfont": font}
    return _points(part, f"{look.letter} {name}", more)


def _points(part: pd.DataFrame, name: str, more: dict[str, Any]) -> go.Scatter:
    where = {"x": part["rows"].astype(str), "y": part["vocab"].astype(str), "customdata": part["key"].tolist()}
    told = {"hovertext": [plain_in_chart(text, 400) for text in part["hover"]], "hoverinfo": "text"}
    still = {"unselected": {"marker": {"opacity": 1.0}}, "mode": "markers+text", "cliponaxis": False}
    return go.Scatter(name=name, legendgroup=name, **where, **told, **still, **more)


def changes(table: pd.DataFrame, base: str) -> go.Figure:
    """`tables.compare.matched`: how much more or less time than on `base`, in per cent, worst at the top."""
    shown = table.head(MOST).iloc[::-1]
    labels: dict[int, str] = {}
    for number, row in shown.iterrows():
        side = f" · {row['side']}" if table["side"].nunique() > 1 else ""
        label = plain_in_chart(f"{row['problem']}{side}", 90)
        while label in labels.values():  # cut off, or called the same by a foreign file: each has a line of its own
            label += " ·"
        labels[number] = label
    title = f"time against {plain_in_chart(base, 60)}, % (right: slower)"
    figure = new_figure(120 + 24 * max(3, len(shown)), xaxis={"title": {"text": title}, "ticksuffix": " %"})
    figure.update_yaxes(categories(list(labels.values())))
    for verdict, (name, colour, symbol) in VERDICTS.items():
        part = shown[shown["verdict"] == verdict]
        if len(part):
            marker = {"color": colour, "symbol": symbol, "size": 12, "line": {"width": 2, "color": colour}}
            bars = interval(part["change"], part["low"], part["high"], colour)
            hover = {"error_x": bars, "hovertemplate": "%{y}<br>%{x:+.1f} %<extra></extra>", "mode": "markers"}
            figure.add_scatter(x=part["change"], y=[labels[at] for at in part.index], name=name, marker=marker, **hover)
    return figure.add_vline(x=0, line={"dash": "dash", "color": NEUTRAL})


def trend(table: pd.DataFrame, *, among: Iterable[str] = ()) -> go.Figure:
    """`tables.compare.history`: a call's time of each backend by the date of measuring, with its noise."""
    axis = upward([*table["seconds"], *table["high"]], "time of a call", duration, log=False)
    table = table.assign(label=table["label"].map(lambda label: plain_in_chart(label, 90)))
    figure = new_figure(340, xaxis=categories(list(dict.fromkeys(table["label"]))), yaxis=axis, showlegend=True)
    for name, look in looks(table["backend"], among).items():
        part = table[table["backend"] == name]
        bars = interval(part["seconds"], part["low"], part["high"], look.colour)
        hover = {"hovertext": part["seconds"].map(duration), "hoverinfo": "text+name", "error_y": bars}
        figure.add_trace(line_of(part["label"], part["seconds"], name_of(name, look), look, **hover))
    return figure
