"""The overview's charts: winner maps side by side, ratios of profiles, and a shape's times over dates."""

from collections.abc import Iterable, Sequence
from textwrap import wrap
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from compiled_logprobs.tuning.presets import MODELS
from compiled_logprobs_dashboard.charts import categories, cross, in_rgb, interval, line_of, name_of, new_figure, upward
from compiled_logprobs_dashboard.humanize import duration
from compiled_logprobs_dashboard.looks import BAD, DOUBTFUL, GOOD, NEUTRAL, WRONG, Look, looks, plain_in_chart

ACROSS = 4
"""Maps side by side."""
SIDE, MARKS, LINE, WIDE = 24, 44, 15, 26
"""Pixels of a square, of an axis' marks, and of a line of a title; and letters of that, which four fit beside."""
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
    be clicked; each carries the key of its decision. Maps in a row share the axis of V.
    """
    wide = min(ACROSS, len(maps))
    vocabs = [pd.concat([part["vocab"] for _, _, part in maps[at : at + wide]]) for at in range(0, len(maps), wide)]
    ups = [[str(vocab) for vocab in sorted(set(column))] for column in vocabs]
    titles = [wrap(f"{mode}, {dtype}", WIDE, max_lines=3, placeholder="…") for mode, dtype, _ in maps]
    heights, over = [(SIDE + 4) * len(up) for up in ups], LINE * max(map(len, titles))
    inside = sum(heights) + (MARKS + over) * (len(heights) - 1)
    legend = {"itemclick": False, "itemdoubleclick": False, "y": 1 + (over + 8) / inside}
    still = {"dragmode": False, "clickmode": "event+select", "margin": {"t": over + 48, "b": 58, "r": 36}}
    figure = new_figure(inside + over + 106, legend=legend, **still).set_subplots(
        rows=len(heights),
        cols=wide,
        subplot_titles=["<br>".join(map(plain_in_chart, lines)) for lines in titles],
        horizontal_spacing=0.03 if wide > 1 else 0,
        vertical_spacing=(MARKS + over) / inside if len(heights) > 1 else 0,
        row_heights=heights,
    )
    figure.update_annotations(font_size=12)
    backends = pd.concat([part["backend"] for _, _, part in maps]).dropna()
    named, shown = looks(backends.value_counts().index, among), set[str]()
    labels = {str(vocab): f"{name} {vocab // 1000}k" for name, vocab in MODELS.items()}
    for place, (_, _, part) in enumerate(maps):
        at = {"row": place // wide + 1, "col": place % wide + 1}
        across, up = [str(value) for value in sorted(part["rows"].unique())], ups[place // wide]
        title, words = "N, tokens" if at["row"] == len(heights) else None, [labels.get(v, f"{int(v):,}") for v in up]
        marks: dict[str, Any] = {"tickvals": across, "automargin": False}
        marks["ticktext"] = [f"{int(value):,}" for value in across]
        figure.update_xaxes(categories(across, title, showgrid=False, **marks), **at)
        marks = {"ticktext": words, "tickvals": up, "showticklabels": at["col"] == 1}
        ends = [-0.5, len(up) - 0.5]  # without room beside them, so that no two squares touch
        figure.update_yaxes(categories(up, showgrid=False, range=ends, **marks), **at)
        for trace in _traces(part, named):
            trace.showlegend = trace.legendgroup not in shown
            shown.add(trace.legendgroup)
            figure.add_trace(trace, **at)
    return figure


def _traces(part: pd.DataFrame, named: dict[str, Look]) -> Iterable[go.Scatter]:
    for name, look in named.items():
        mine = part[part["backend"] == name]
        for (hollow, strong), group in mine.groupby([mine["state"] == "tie", mine["opacity"] >= STRONG]):
            yield _squares(group, look, plain_in_chart(name, 30) + ", tie" * hollow, hollow=hollow, strong=strong)
    if len(undecided := part[part["state"] == "undecided"]):
        yield _squares(undecided, Look(DOUBTFUL, "?", "square", "solid"), "undecided", hollow=True, strong=False)
    if len(bad := part[part["wrong"] != ""]):
        marker = {"symbol": "square-open", "size": SIDE + 2, "color": BAD, "line": {"width": 4, "color": BAD}}
        yield _points(bad, f"{WRONG} WRONG: a backend failed a check there", {"marker": marker, "mode": "markers"})


def _squares(part: pd.DataFrame, look: Look, name: str, *, hollow: bool, strong: bool) -> go.Scatter:
    """Squares of one backend, all strong or all faint: on faint ones the page's own text colour is readable."""
    red, green, blue = (int(look.colour[start : start + 2], 16) for start in (1, 3, 5))
    font: dict[str, Any] = {"size": SIDE // 2 - 1, "weight": 700}
    if hollow:
        font |= {"color": look.colour}
    elif strong:
        font |= {"color": "#ffffff" if 0.299 * red + 0.587 * green + 0.114 * blue < 120 else "#101418"}
    # In the colour, so that a click, which sets the opacity of points, does not change it.
    colours = [in_rgb(look.colour, 1.0 if hollow else opacity) for opacity in part["opacity"]]
    line = {"width": 2 if hollow else 1, "color": look.colour}
    marker = {"symbol": "square-open" if hollow else "square", "size": SIDE, "color": colours, "line": line}
    letters = [look.letter + WRONG * bool(wrong) for wrong in part["wrong"]]
    return _points(part, f"{look.letter} {name}", {"marker": marker, "text": letters, "textfont": font})


def _points(part: pd.DataFrame, name: str, more: dict[str, Any]) -> go.Scatter:
    where = {"x": part["rows"].astype(str), "y": part["vocab"].astype(str), "customdata": part["key"].tolist()}
    told = {"hovertext": [plain_in_chart(text, 400) for text in part["hover"]], "hoverinfo": "text"}
    still = {"unselected": {"marker": {"opacity": 1.0}}, "mode": "markers+text", "cliponaxis": False}
    return go.Scatter(name=name, legendgroup=name, **where, **told, **{**still, **more})


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
    """`tables.compare.history`: a call's time of each backend by date, with its noise; where it was wrong, a cross."""
    axis = upward([*table["seconds"], *table["high"]], "time of a call", duration, log=False)
    table = table.assign(label=table["label"].map(lambda label: plain_in_chart(label, 90)))
    places, named = table[["label"]].drop_duplicates(), looks(table["backend"], among)
    figure = new_figure(340, xaxis=categories(list(places["label"])), yaxis=axis, showlegend=True)
    for name, look in named.items():
        part = places.merge(table[table["backend"] == name], on="label", how="left")
        bars = interval(part["seconds"], part["low"], part["high"], look.colour)
        hover = {"hovertext": part["seconds"].map(duration), "hoverinfo": "text+name", "error_y": bars}
        figure.add_trace(line_of(part["label"], part["seconds"], name_of(name, look), look, **hover))
    if len(bad := table[table["is_wrong"]]):
        letters = [named[name].letter for name in bad["backend"]]
        figure.add_trace(cross(bad["label"], letters, 0 * table["seconds"], hoverinfo="x+text+name"))
    return figure
