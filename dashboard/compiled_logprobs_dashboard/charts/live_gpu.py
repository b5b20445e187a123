"""Lines of what the machine did in the last minutes."""

import pandas as pd
import plotly.graph_objects as go

from compiled_logprobs_dashboard.charts import new_figure
from compiled_logprobs_dashboard.looks import BACKENDS, plain_in_chart

COLOURS = (*(look.colour for look in BACKENDS.values()), "#56B4E9", "#D55E00")
DASHES = ("solid", "dash", "dot", "dashdot")
SHORTEST = pd.Timedelta(seconds=30)
"""Along the axis, so that a first look is not told in parts of milliseconds."""


def line(table: pd.DataFrame, column: str, title: str, unit: str, *, top: float | None = None) -> go.Figure:
    """`column` of `tables.live_gpu.history` over time, up to `top`, a line for each device that tells it."""
    figure = new_figure(260)
    for place, (device, rows) in enumerate(table.groupby("device", sort=True)):
        if rows[column].notna().any():
            figure.add_scatter(
                x=rows["at"],
                y=rows[column],
                name=plain_in_chart(str(device)),
                mode="lines+markers",  # so that a single look is seen, too
                marker={"size": 3},
                line={"color": COLOURS[place % len(COLOURS)], "dash": DASHES[place % len(DASHES)]},
                connectgaps=False,
                hovertemplate="%{y:.4g} " + unit + "<extra>%{fullData.name}</extra>",
            )
    last = table["at"].max()
    figure.update_xaxes(range=[min(table["at"].min(), last - SHORTEST), last] if len(table) else None)
    figure.update_yaxes(title=f"{title}, {unit}", range=[0, top] if top else None, rangemode="tozero")
    return figure.update_layout(showlegend=len(figure.data) > 1)
