"""Draw the run: reward above, log-probabilities below. Needs plotly; for a PNG also chromium."""

import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from plotly.graph_objects import Figure, Scatter
from plotly.subplots import make_subplots

from compiled_logprobs.errors import LogProbsError
from examples.reinforce.train import Curve

LINES = (("#0072B2", "solid", 5), ("#E69F00", "dot", 3), ("#D55E00", "solid", 3))
"""Colour, dash and width of each way: two that lie on each other are both seen."""
WIDTH, HEIGHT = 960, 620
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def draw(curves: Sequence[Curve]) -> Figure:
    """Draw both panels, one line a way."""
    titles = ("Reward: share of the text that is words", "Mean log-probability of what was written, nats a byte")
    chart = make_subplots(rows=2, cols=1, shared_xaxes=True, subplot_titles=titles, vertical_spacing=0.11)
    for curve, (colour, dash, width) in zip(curves, LINES, strict=True):
        for row, values in enumerate((curve.reward, curve.log_prob), start=1):
            line = Scatter(
                x=list(range(len(values))),
                y=values,
                name=curve.way,
                legendgroup=curve.way,
                showlegend=row == 1,
                line={"color": colour, "dash": dash, "width": width},
            )
            chart.add_trace(line, row=row, col=1)
    highest = max(max(curve.log_prob) for curve in curves)
    chart.add_hrect(y0=0.0, y1=max(highest * 1.15, 0.5), fillcolor="#D55E00", opacity=0.1, line_width=0, row=2, col=1)
    above = "above 0, where no log-probability can be"
    chart.add_annotation(text=above, x=1.0, y=0.3, xref="x domain", yref="y2", xanchor="right", showarrow=False)
    chart.update_yaxes(rangemode="tozero", row=1, col=1)
    chart.update_xaxes(title_text="step", row=2, col=1)
    chart.update_layout(
        template="plotly_white",
        legend={"orientation": "h", "yanchor": "bottom", "y": 1.08},
        margin={"l": 60, "r": 20, "t": 90, "b": 50},
    )
    return chart


def write_html(chart: Figure, file: Path) -> None:
    """Write a page that holds all it needs."""
    file.parent.mkdir(parents=True, exist_ok=True)
    chart.write_html(file, include_plotlyjs=True)


def write_png(chart: Figure, file: Path) -> None:
    """Write a picture of that page. Raise LogProbsError where no browser is installed, or it draws nothing."""
    browser = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if browser is None:
        raise LogProbsError(
            f"got --png; a browser draws it, and none of {', '.join(BROWSERS)} is installed. Leave it out."
        )
    file.parent.mkdir(parents=True, exist_ok=True)
    chart = Figure(chart).update_layout(width=WIDTH, height=HEIGHT)
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "chart.html"
        page.write_text(
            f'<body style="margin:0">{chart.to_html(full_html=False, config={"displayModeBar": False})}</body>'
        )
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"]
        options += [f"--user-data-dir={folder}/profile", "--force-device-scale-factor=2", "--virtual-time-budget=10000"]
        options += [f"--window-size={WIDTH},{HEIGHT}", f"--screenshot={file.resolve()}", page.as_uri()]
        done = subprocess.run([browser, *options], capture_output=True, text=True, timeout=120, check=False)
    if done.returncode or not file.is_file():
        raise LogProbsError(f"{browser} drew nothing: {done.stderr.strip()[-500:]}")
