"""The landing page's charts: the winner map, and the ranking with intervals."""

from collections.abc import Iterable
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from compiled_logprobs_dashboard.data import MOST_BACKENDS
from compiled_logprobs_dashboard.looks import NEUTRAL, Look, looks, plain_in_chart

CLEAR = "rgba(0,0,0,0)"
OTHERS = Look(NEUTRAL, "…", "square", "solid")
"""Of the backends that win the fewest squares, where they are too many to be told apart."""
SQUARE = 48
"""Pixels a side; smaller where there are many."""
NEAR_ONE = 0.2
"""Of a speed-up, whose figure would then be crossed by the line of the baseline."""
STRONG = 0.65
"""Opacity from which a letter has to stand out against the square's colour rather than the page's."""


def winner_map(
    table: pd.DataFrame, rows: int | None = None, vocab: int | None = None, *, among: Iterable[str] = ()
) -> go.Figure:
    """`winners.winners` as squares over N and V: colour and letter the backend, opacity its margin, ties hollow.

    Squares are points, since only points can be clicked; each carries [N, V] as `customdata`.

    Args:
        table: one row a square.
        rows: N of the decision that is shown, whose square gets a frame.
        vocab: V of the same.
        among: all backends that there are, see `palette.looks`.
    """
    figure = go.Figure()
    across = [str(one) for one in sorted(table["rows"].unique())]
    up = [str(one) for one in sorted(table["vocab"].unique())]
    side = max(10, min(SQUARE, 900 // max(1, len(across)), 620 // max(1, len(up)) + 6))
    counts = table["backend"].value_counts()  # most first; what is not measured has none
    own, rest = list(counts.index[:MOST_BACKENDS]), list(counts.index[MOST_BACKENDS:])
    drawn = [(look, [name], plain_in_chart(name, 30)) for name, look in looks(own, among).items()]
    if rest:
        drawn.append((OTHERS, rest, f"{len(rest)} others"))
    for look, names, shown in drawn:
        for state, title in (("won", shown), ("tie", f"{shown}, tie"), ("alone", f"{shown}, nothing else ran")):
            part = table[table["backend"].isin(names) & (table["state"] == state)]
            strong = part["opacity"] >= STRONG
            for number, group in enumerate(group for group in (part[strong], part[~strong]) if len(group)):
                trace = _squares(group, look, side, hollow=state == "tie")
                trace.update(name=f"{look.letter} {title}", legendgroup=f"{shown} {state}", showlegend=number == 0)
                figure.add_trace(trace)
    missing = table[table["state"] == "unmeasured"]
    if len(missing):
        figure.add_trace(
            go.Scatter(
                x=missing["rows"].astype(str),
                y=missing["vocab"].astype(str),
                mode="markers+text",
                name="· not measured",
                text=["·"] * len(missing),
                marker={"symbol": "square", "size": side, "color": "rgba(138,143,152,0.25)"},
                unselected={"marker": {"opacity": 1.0}},
                customdata=missing[["rows", "vocab"]].to_numpy().tolist(),
                hovertext=[f"N {row.rows}, V {row.vocab}: not measured" for row in missing.itertuples()],
                hoverinfo="text",
            )
        )
    if rows is not None and str(rows) in across and str(vocab) in up:
        figure.add_trace(
            go.Scatter(
                x=[str(rows)],
                y=[str(vocab)],
                mode="markers",
                name="shown above",
                marker={"symbol": "square-open", "size": side + 9, "color": NEUTRAL, "line": {"width": 3}},
                hoverinfo="skip",
                customdata=[[rows, vocab]],
            )
        )
    figure.update_layout(
        height=max(240, 150 + (side + 8) * len(up)),
        margin={"l": 10, "r": 10, "t": 10, "b": 10},
        paper_bgcolor=CLEAR,
        plot_bgcolor=CLEAR,
        dragmode=False,
        clickmode="event+select",
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "itemclick": False, "itemdoubleclick": False},
        xaxis={"title": {"text": "N, rows"}, "type": "category", "categoryorder": "array", "categoryarray": across},
        yaxis={"title": {"text": "V, vocabulary"}, "type": "category", "categoryorder": "array", "categoryarray": up},
    )
    figure.update_xaxes(showgrid=False, fixedrange=True)
    figure.update_yaxes(showgrid=False, fixedrange=True, automargin=True)
    return figure


def _squares(part: pd.DataFrame, look: Look, side: int, *, hollow: bool) -> go.Scatter:
    """Of one backend, all drawn strongly or all faintly: there, the page's own colour of text can be read, and here it cannot."""
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
            "color": [f"rgba({red},{green},{blue},{1.0 if hollow else one:.2f})" for one in part["opacity"]],
            "line": {"width": 3 if hollow else 1, "color": look.colour},
        },
        customdata=part[["rows", "vocab"]].to_numpy().tolist(),
        hovertext=[_hover(row._asdict()) for row in part.itertuples(index=False)],
        hoverinfo="text",
        unselected={"marker": {"opacity": 1.0}},
    )


def _hover(one: dict[str, Any]) -> str:
    lines = [f"N {one['rows']}, V {one['vocab']}: {plain_in_chart(one['backend'], 40)}"]
    if pd.notna(one["speedup"]):
        band = "" if pd.isna(one["low"]) or pd.isna(one["high"]) else f" ({one['low']:.2f} to {one['high']:.2f})"
        lines.append(f"{one['speedup']:.2f}x the baseline's speed{band}")
    if pd.notna(one["runner_up"]):
        tie = "a tie with" if one["state"] == "tie" else f"{one['margin']:.2f}x as fast as"
        lines.append(f"{tie} {plain_in_chart(one['runner_up'], 40)}")
    else:
        lines.append("nothing else got through")
    if pd.notna(one["stale"]):
        lines.append(f"stale: {plain_in_chart(one['stale'])}")
    return "<br>".join(lines)


def ranking(board: pd.DataFrame, baseline: str, *, among: Iterable[str] = ()) -> go.Figure:
    """`verdict.leaderboard`: each timed candidate's speed-up over the baseline, with its interval."""
    timed = board[board["speedup"].notna()]
    named = looks(board["name"], among)
    figure = go.Figure()
    labels = []
    for row in timed.itertuples():
        look, name = named[row.name], plain_in_chart(row.backend, 30)
        label = f"{look.letter}  {name}"
        labels.append(label)
        known = pd.notna(row.low) and pd.notna(row.high)
        figure.add_trace(
            go.Scatter(
                x=[row.speedup],
                y=[label],
                mode="markers+text",
                name=name,
                text=[f"{row.speedup:.2f}x"],
                textposition="top right" if abs(row.speedup - 1) < NEAR_ONE else "top center",  # clear of the line at 1
                marker={"symbol": look.symbol, "size": 14, "color": look.colour},
                error_x={
                    "type": "data",
                    "symmetric": False,
                    "array": [row.high - row.speedup if known else 0],
                    "arrayminus": [row.speedup - row.low if known else 0],
                    "color": look.colour,
                    "thickness": 3,
                },
                hovertext=[plain_in_chart(f"{row.backend}: {row.outcome}, {row.speedup:.2f}x")],
                hoverinfo="text",
            )
        )
    figure.add_vline(x=1.0, line={"dash": "dash", "color": NEUTRAL})
    figure.update_layout(
        height=110 + 60 * max(1, len(timed)),
        margin={"l": 10, "r": 20, "t": 20, "b": 10},
        paper_bgcolor=CLEAR,
        plot_bgcolor=CLEAR,
        showlegend=False,
        xaxis={
            "title": {"text": f"Speed over {plain_in_chart(baseline, 30)}, with its interval"},
            "rangemode": "tozero",
        },
        yaxis={
            "type": "category",
            "categoryorder": "array",
            "categoryarray": labels[::-1],
            "range": [-0.5, len(labels) - 0.3],
            "automargin": True,
        },
    )
    figure.update_xaxes(fixedrange=True)
    figure.update_yaxes(fixedrange=True)
    return figure


def ranking_in_words(board: pd.DataFrame, baseline: str) -> str:
    """The ranking's text."""
    timed = board[board["speedup"].notna()]
    parts = [f"{row.backend} {row.speedup:.2f}x" for row in timed.itertuples()]
    rest = len(board) - len(timed)
    return f"Speed over {baseline}: {', '.join(parts) or 'nothing was timed'}." + (
        f" {rest} more {'was' if rest == 1 else 'were'} not timed." if rest else ""
    )
