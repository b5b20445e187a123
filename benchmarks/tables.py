"""The tables that people read: for each shape what was measured and the ratios to the peers, and then the targets."""

import math
from collections.abc import Sequence
from itertools import groupby
from statistics import median

from rich.text import Text

from benchmarks.candidates import READ
from benchmarks.results import COLUMNS, Cell, Result
from benchmarks.targets import Target
from compiled_logprobs.cli.output import Column, print_line, print_table
from compiled_logprobs.problem import short_name
from compiled_logprobs.tuning.statistics import Interval

TITLES = {
    "ms": "ms",
    "host_ms": "host ms",
    "billions_of_logits_per_s": "10^9 logits/s",
    "percent_of_read": "% of read",
    "percent_of_copy": "% of copy",
    "extra_bytes": "extra MiB",
    "extra_multiple": "x logits",
    "error_max": "max error",
    "error_rmse": "RMSE",
}


def print_cells(cells: Sequence[Cell]) -> None:
    """The cells of one shape have to follow one another."""
    for (rows, vocab), group in groupby(cells, key=lambda cell: (cell.problem.rows, cell.problem.vocab)):
        some = list(group)
        _print_figures(f"{rows} x {vocab}", some)
        _print_ratios(f"{rows} x {vocab}: times as fast as", some)
        for line in dict.fromkeys(_in_words(one) for cell in some for one in cell.results.values() if one.reason):
            print_line(f"  {line}")


def print_legend() -> None:
    for column, meaning in COLUMNS.items():
        print_line(f"{TITLES.get(column, column.replace('_', ' '))}: {meaning}")


def print_targets(rows: Sequence[Target]) -> None:
    cells = []
    for one in rows:
        met = {True: Text("yes", "green"), False: Text("no", "bold red"), None: Text("not measured")}[one.met]
        wanted = f"{'at least' if one.at_least else 'at most'} {one.limit:g}"
        reached = "" if one.reached is None else f"{one.reached:.3g}"
        cells.append((one.what, wanted, reached, met, one.where))
    print_table("Targets", ["target", "wanted", "reached", "met", Column("worst at, or with", folds=True)], cells)


def _print_figures(title: str, cells: list[Cell]) -> None:
    rows: list[tuple[str | Text, ...]] = []
    for cell in cells:
        where = short_name(cell.problem.dtype), cell.mode
        if cell.read_seconds:
            read = median(cell.read_seconds)
            bare = (f"{read * 1e3:.3g}", "", f"{cell.billions_per_s(read):.3g}", "100")
            rows.append((*where, f"{READ}, the bare read", *bare, *[""] * (len(TITLES) - len(bare))))
        done = [*cell.measured(ours=True), *cell.measured(ours=False)]
        done.sort(key=lambda one: median(one.seconds))
        rows += [(*where, _label(one), *_figures(cell, one)) for one in done]
        lost = [one for one in cell.results.values() if not one.sound]
        rows += [(*where, _label(one), Text(one.outcome, "bold red"), *[""] * (len(TITLES) - 1)) for one in lost]
        rows.append(())
    figures = [Column(name, drop, right=True) for drop, name in enumerate(TITLES.values())]
    print_table(title, ["dtype", "mode", "candidate", *figures], rows)


def _print_ratios(title: str, cells: list[Cell]) -> None:
    peers = list(dict.fromkeys(one.name for cell in cells for one in cell.measured(ours=False)))
    if not peers:
        return
    rows: list[tuple[str | Text, ...]] = []
    for cell in cells:
        for one in cell.measured(ours=True):
            ratios = [_ratio(cell.times_as_fast(one.name, peer)) if cell.has(peer) else "" for peer in peers]
            rows.append((short_name(cell.problem.dtype), cell.mode, _label(one), *ratios))
        rows.append(())
    print_table(title, ["dtype", "mode", "candidate", *peers], rows)


def _in_words(one: Result) -> str:
    return f"{one.label}: {one.reason}" if one.measured else f"{one.name}: {one.outcome}: {one.reason}"


def _label(one: Result) -> Text:
    return Text(one.label, "bold" if one.ours else "")


def _figures(cell: Cell, one: Result) -> list[str]:
    seconds, extra = median(one.seconds), one.extra_bytes
    return [
        f"{seconds * 1e3:.3g}",
        f"{median(one.host_seconds) * 1e3:.3g}",
        f"{cell.billions_per_s(seconds):.3g}",
        f"{cell.percent_of_read(one.name):.3g}",
        f"{cell.percent_of_copy(seconds):.3g}",
        "" if extra is None else f"{extra / 2**20:.1f}",
        "" if extra is None else f"{extra / cell.logits_bytes:.3f}",
        f"{one.error_max:.1e}",
        f"{one.error_rmse:.1e}",
    ]


def _ratio(ratio: Interval) -> str:
    if not math.isfinite(ratio.high):
        return f"{ratio.median:.2f}"
    return f"{ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f})"
