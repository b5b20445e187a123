"""A run as one HTML page, drawn by plotly: speed as a share of a bare read, and extra memory, by mode and problem."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from statistics import median

from benchmarks.results import Cell, Result
from compiled_logprobs.errors import InputError
from compiled_logprobs.problem import short_name

COLOURS = {
    True: ("#0b3c8c", "#1f77d0", "#6aaef0", "#17a398", "#7fd1b9"),
    False: ("#d1495b", "#edae49", "#9a6b4f", "#8f8f8f", "#c77dba", "#5b5b5b", "#c9c9c9"),
}
"""This library's, in blue and green, and the peers'."""


def require_plotly() -> None:
    """Before hours of measuring, and not after."""
    if find_spec("plotly") is None:
        raise InputError(
            "got --html; the chart needs plotly, which is not installed. Install the extra that has it "
            "(pip install -e '.[dashboard]'), or leave out --html."
        )


def write_chart(cells: Sequence[Cell], file: Path) -> None:
    """Write the page, which holds all that it needs, to `file`."""
    from plotly.graph_objects import Bar
    from plotly.subplots import make_subplots

    modes = list(dict.fromkeys(cell.mode for cell in cells))
    titles = [f"{mode}: {what}" for mode in modes for what in ("% of a bare read", "extra memory, x logits")]
    figure = make_subplots(rows=len(titles), cols=1, subplot_titles=titles, vertical_spacing=0.25 / len(titles))
    everybody = {one.name: one for cell in cells for one in cell.results.values()}
    shown: set[str] = set()
    for index, mode in enumerate(modes):
        for name, colour in _colours(everybody).items():
            done = [(cell, cell.results[name]) for cell in cells if cell.mode == mode and cell.has(name)]
            if not done:
                continue
            problems = [_problem(cell) for cell, _ in done]
            hover = [_hover(cell, one) for cell, one in done]
            shares = [cell.percent_of_read(name) for cell, _ in done]
            memory = [None if one.extra_bytes is None else one.extra_bytes / cell.logits_bytes for cell, one in done]
            for row, values in enumerate((shares, memory), start=2 * index + 1):
                bar = Bar(
                    x=problems,
                    y=values,
                    hovertext=hover,
                    hoverinfo="text",
                    name=name,
                    legendgroup=name,
                    showlegend=name not in shown,
                    marker_color=colour,
                )
                figure.add_trace(bar, row=row, col=1)
                shown.add(name)
    figure.update_layout(
        title="compiled_logprobs and the idioms that people use today",
        barmode="group",
        template="plotly_white",
        height=120 + 320 * len(titles),
    )
    figure.write_html(file, include_plotlyjs=True)


def _colours(everybody: dict[str, Result]) -> dict[str, str]:
    colours: dict[str, str] = {}
    for ours, palette in COLOURS.items():
        names = [name for name, one in everybody.items() if one.ours is ours]
        colours |= {name: palette[index % len(palette)] for index, name in enumerate(names)}
    return colours


def _problem(cell: Cell) -> str:
    return f"{cell.problem.rows} x {cell.problem.vocab}<br>{short_name(cell.problem.dtype)}"


def _hover(cell: Cell, one: Result) -> str:
    seconds = median(one.seconds)
    extra = "" if one.extra_bytes is None else f"<br>{one.extra_bytes / 2**20:.1f} MiB of extra memory"
    return (
        f"{one.label}<br>{cell.problem}<br>{seconds * 1e3:.3g} ms, {cell.billions_per_s(seconds):.3g}·10⁹ logits/s, "
        f"{cell.percent_of_read(one.name):.0f} % of a bare read{extra}<br>RMSE {one.error_rmse:.1e}"
    )
