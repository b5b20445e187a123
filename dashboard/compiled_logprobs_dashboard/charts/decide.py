"""The landing page's charts: the winner map, and the ranking with intervals."""

from collections.abc import Iterable
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from compiled_logprobs_dashboard.charts import categories, in_rgb, interval, new_figure
from compiled_logprobs_dashboard.looks import NEUTRAL, Look, looks, plain_in_chart

SQUARE = 48
"""Pixels a side; smaller where there are many."""
NEAR_ONE = 0.2
"""Of a speed-up, whose figure would then be crossed by the line at 1."""
STRONG = 0.65
"""Opacity from which a letter has to stand out against the square's colour rather than the page's."""


def winner_map(
    table: pd.DataFrame, rows: int | None = None, vocab: int | None = None, *, among: Iterable[str] = ()
) -> go.Figure:
    """`tables.decide.winners` as squares over N and V: colour and letter the backend, opacity its margin, ties hollow.

    Squares are points, since only points can be clicked; each carries [N, V] as `customdata`.

    `rows` and `vocab` are those of the decision that is shown, whose square gets a frame.
    """
    across = [str(value) for value in sorted(table["rows"].unique())]
    up = [str(value) for value in sorted(table["vocab"].unique())]
    side = max(10, min(SQUARE, 900 // max(1, len(across)), 620 // max(1, len(up)) + 6))
    figure = new_figure(
        max(240, 150 + (side + 8) * len(up)),
        dragmode=False,
        clickmode="event+select",
        legend={"itemclick": False, "itemdoubleclick": False},
        xaxis=categories(across, "N, rows", showgrid=False),
        yaxis=categories(up, "V, vocabulary", showgrid=False),
    )
    counts = table["backend"].value_counts()  # most first; what is not measured has none
    for name, look in looks(counts.index, among).items():
        shown = plain_in_chart(name, 30)
        for state, title in (("won", shown), ("tie", f"{shown}, tie"), ("alone", f"{shown}, nothing else ran")):
            part = table[(table["backend"] == name) & (table["state"] == state)]
            strong = part["opacity"] >= STRONG
            for number, group in enumerate(group for group in (part[strong], part[~strong]) if len(group)):
                trace = _squares(group, look, side, hollow=state == "tie")
                trace.update(name=f"{look.letter} {title}", legendgroup=f"{shown} {state}", showlegend=number == 0)
                figure.add_trace(trace)
    for state, letter, title in (("undecided", "?", "undecided"), ("unmeasured", "·", "not measured")):
        part = table[table["state"] == state]
        if part.empty:
            continue
        figure.add_scatter(
            x=part["rows"].astype(str),
            y=part["vocab"].astype(str),
            mode="markers+text",
            name=f"{letter} {title}",
            text=[letter] * len(part),
            marker={"symbol": "square", "size": side, "color": in_rgb(NEUTRAL, 0.25)},
            unselected={"marker": {"opacity": 1.0}},
            customdata=part[["rows", "vocab"]].to_numpy().tolist(),
            hovertext=[f"N {row.rows}, V {row.vocab}: {title}" for row in part.itertuples()],
            hoverinfo="text",
        )
    if rows is not None and str(rows) in across and str(vocab) in up:
        figure.add_scatter(
            x=[str(rows)],
            y=[str(vocab)],
            mode="markers",
            name="shown above",
            marker={"symbol": "square-open", "size": side + 9, "color": NEUTRAL, "line": {"width": 3}},
            hoverinfo="skip",
            customdata=[[rows, vocab]],
        )
    return figure


def _squares(part: pd.DataFrame, look: Look, side: int, *, hollow: bool) -> go.Scatter:
    """Draw squares of one backend, all strong or all faint: on faint ones the page's own text colour is readable."""
    red, green, blue = (int(look.colour[start : start + 2], 16) for start in (1, 3, 5))
    font: dict[str, Any] = {"size": max(8, side // 2)}
    if hollow:
        font |= {"color": look.colour}
    elif part["opacity"].min() >= STRONG:
        font |= {"color": "#ffffff" if 0.299 * red + 0.587 * green + 0.114 * blue < 120 else "#101418"}
    return go.Scatter(
        x=part["rows"].astype(str),
        y=part["vocab"].astype(str),
        mode="markers+text",
        text=[look.letter] * len(part),
        textfont=font,
        marker={
            "symbol": "square-open" if hollow else "square",
            "size": side,
            # In the colour, so that a click, which sets the opacity of points, does not change it.
            "color": [in_rgb(look.colour, 1.0 if hollow else opacity) for opacity in part["opacity"]],
            "line": {"width": 3 if hollow else 1, "color": look.colour},
        },
        customdata=part[["rows", "vocab"]].to_numpy().tolist(),
        hovertext=[_hover(row._asdict()) for row in part.itertuples(index=False)],
        hoverinfo="text",
        unselected={"marker": {"opacity": 1.0}},
    )


def _hover(square: dict[str, Any]) -> str:
    lines = [f"N {square['rows']}, V {square['vocab']}: {plain_in_chart(square['backend'], 40)}"]
    if pd.notna(square["speedup"]):
        has_band = pd.notna(square["low"]) and pd.notna(square["high"])
        band = f" ({square['low']:.2f} to {square['high']:.2f})" if has_band else ""
        lines.append(f"{square['speedup']:.2f}x the speed of {plain_in_chart(square['against'], 40)}{band}")
    if pd.notna(square["runner_up"]):
        tie = "a tie with" if square["state"] == "tie" else f"{square['margin']:.2f}x as fast as"
        lines.append(f"{tie} {plain_in_chart(square['runner_up'], 40)}")
    else:
        lines.append("nothing else got through")
    if pd.notna(square["stale"]):
        lines.append(f"stale: {plain_in_chart(square['stale'])}")
    return "<br>".join(lines)


def ranking(board: pd.DataFrame, against: str, *, among: Iterable[str] = ()) -> go.Figure:
    """`tables.decide.leaderboard`: each timed candidate's speed-up over `against`, with its interval."""
    timed = board[board["speedup"].notna()]
    named = looks(board["name"], among)
    labels = [f"{named[row.name].letter}  {plain_in_chart(row.backend, 30)}" for row in timed.itertuples()]
    title = f"Speed over {plain_in_chart(against, 40)}, with its interval"
    figure = new_figure(
        110 + 60 * max(1, len(timed)),
        showlegend=False,
        xaxis={"title": {"text": title}, "rangemode": "tozero"},
        yaxis=categories(labels[::-1], range=[-0.5, len(labels) - 0.3]),
    )
    for label, row in zip(labels, timed.itertuples(), strict=True):
        look = named[row.name]
        middle, low, high = (pd.Series([value]) for value in (row.speedup, row.low, row.high))
        figure.add_scatter(
            x=[row.speedup],
            y=[label],
            mode="markers+text",
            name=plain_in_chart(row.backend, 30),
            text=[f"{row.speedup:.2f}x"],
            textposition="top right" if abs(row.speedup - 1) < NEAR_ONE else "top center",  # clear of the line at 1
            marker={"symbol": look.symbol, "size": 14, "color": look.colour},
            error_x={**interval(middle, low, high, look.colour), "thickness": 3},
            hovertext=[plain_in_chart(f"{row.backend}: {row.outcome}, {row.speedup:.2f}x")],
            hoverinfo="text",
        )
    return figure.add_vline(x=1.0, line={"dash": "dash", "color": NEUTRAL})


def ranking_in_words(board: pd.DataFrame, against: str) -> str:
    """The ranking's text."""
    timed = board[board["speedup"].notna()]
    parts = [f"{row.backend} {row.speedup:.2f}x" for row in timed.itertuples()]
    rest = len(board) - len(timed)
    return f"Speed over {against}: {', '.join(parts) or 'nothing was timed'}." + (
        f" {rest} more {'was' if rest == 1 else 'were'} not timed." if rest else ""
    )
