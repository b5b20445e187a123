"""How the command line shows what the library returns: tables and lines on standard output."""

import csv
import json
import os
import sys
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from rich.console import Console
from rich.text import Text

from compiled_logprobs.choose.verify import Verification
from compiled_logprobs.cli.calls import options_of
from compiled_logprobs.decision import PLAIN, Decision, Speedup, short, speedup_in_words, winner_in_words
from compiled_logprobs.machine.environment import Environment
from compiled_logprobs.problem import Problem, problem_to_dict, short_name
from compiled_logprobs.store.transfer import Imported

GAP = "  "
NARROW = 24
"""What a column that folds takes at least."""


class Column(NamedTuple):
    """Of a table."""

    name: str
    drop: int = 0
    """Where the terminal is too narrow, whole columns go, that of the largest number first; 0 always stays."""
    right: bool = False
    """Whether it holds numbers, which end below one another."""
    folds: bool = False
    """Whether a cell may go on in the next line: for sentences, in the last column."""


SHAPE = (Column("rows", right=True), Column("vocab", right=True), Column("dtype"), Column("mode"), Column("options"))
FIGURES = (
    *(Column("winner"), Column("speed-up", right=True), Column("interval", 1), Column("over eager", 2, right=True)),
    *(Column("a call", 4, right=True), Column("of the host", 8, right=True), Column("sign check", 3)),
    *(Column("extra memory", 6, right=True), Column("bandwidth", 7, right=True), Column("from", 5)),
)


def print_table(title: str, columns: Sequence[Column | str], rows: Iterable[Sequence[str | Text]]) -> None:
    """Aligned text without boxes, the same in a terminal and in a pipe. No number and no name is ever cut.

    Where the terminal is too narrow, whole columns go, and a last line names them. A column without content is not
    shown. A row without cells is an empty line.
    """
    wanted = [Column(column) if isinstance(column, str) else column for column in columns]
    table = [[Text(cell) if isinstance(cell, str) else cell for cell in row] for row in rows]
    shown = [index for index in range(len(wanted)) if any(row and row[index] for row in table)]
    table.insert(0, [Text(column.name, "bold") for column in wanted])
    sizes = [max(row[index].cell_len for row in table if row) for index in range(len(wanted))]
    least = [min(size, NARROW) if column.folds else size for size, column in zip(sizes, wanted, strict=True)]
    room, dropped = _width(), []
    while sum(least[index] + len(GAP) for index in shown) > room + len(GAP) and any(wanted[i].drop for i in shown):
        dropped.append(max(shown, key=lambda index: wanted[index].drop))
        shown.remove(dropped[-1])
    lines = [Text(f"\n{title}", "bold")]
    for row in table:
        line = Text()
        for index in shown if row else ():
            line.append(GAP if line else "")
            padding = Text(" " * (sizes[index] - row[index].cell_len))
            if wanted[index].folds:
                under, size = " " * line.cell_len, max(NARROW, room - line.cell_len)
                pieces = textwrap.wrap(row[index].plain, size, break_long_words=False, break_on_hyphens=False)
                line.append(f"\n{under}".join(pieces), row[index].style)
            else:
                line.append(padding + row[index] if wanted[index].right else row[index] + padding)
        line.rstrip()
        lines.append(line)
    if dropped:
        names = ", ".join(wanted[index].name for index in sorted(dropped))
        lines.append(Text(_folded(f"A wider terminal also shows: {names}."), "dim"))
    print_line(Text("\n").join(lines))


def print_csv(decisions: Iterable[tuple[str, Decision, str]]) -> None:
    """A line for each decision, with its environment and where it comes from; nothing where there is none.

    Of one that is undecided no figures, since they would be those of nobody.
    """
    of_decision = ("is_decided", "baseline", "rounds", "code", "measured_at")
    of_winner = (
        *("seconds", "host_seconds", "extra_bytes", "extra_multiple", "percent_of_bandwidth"),
        *("checks_passed", "worst_error"),
    )
    writer = None
    for environment, decision, source in decisions:
        winner = decision.winner if decision.is_decided else None
        row = {"environment": environment, "from": source, **problem_to_dict(decision.problem)}
        row |= {"chosen": winner_in_words(decision), **{name: getattr(decision, name) for name in of_decision}}
        for name in ("speedup_over_plain", "speedup"):
            speedup = getattr(winner, name, None)
            row |= {f"{name}_{end}": getattr(speedup, end, None) for end in ("low", "median", "high")}
        row |= {name: getattr(winner, name, None) for name in of_winner}
        if writer is None:
            writer = csv.DictWriter(sys.stdout, [*row], lineterminator="\n")
            writer.writeheader()
        writer.writerow(row)


def print_line(text: str | Text) -> None:
    """Without markup, since messages hold brackets. A string is folded where the terminal ends, between words."""
    if isinstance(text, str):
        text = Text("\n".join(map(_folded, text.split("\n"))))
    console = Console(color_system=None if os.environ.get("NO_COLOR") else "auto")  # of rich's it keeps bold
    console.print(text, soft_wrap=True)


def _folded(line: str) -> str:
    under = " " * (len(line) - len(line.lstrip()) + 2)
    return textwrap.fill(line, _width(), subsequent_indent=under, break_long_words=False, break_on_hyphens=False)


def print_json(result: dict[str, Any]) -> None:
    print(json.dumps(result, indent=2, allow_nan=False))


def _width() -> int:
    """Of the terminal, or as the variable COLUMNS says; unlimited elsewhere, where a row has to be one line."""
    usual = Console()
    return usual.width if usual.is_terminal or os.environ.get("COLUMNS") else sys.maxsize


def print_environment(environment: Environment) -> None:
    """Its facts, and which of them have to be the same elsewhere for measurements to count there."""
    matched = environment.matched()
    rows = [
        (
            name.removesuffix("_bytes").replace("_", " "),
            "yes" if name in matched else "",
            f"{value / 2**30:.1f} GiB" if name == "memory_bytes" else str(value),
        )
        for name, value in environment.to_dict().items()
        if name != "fingerprint" and value is not None
    ]
    print_table(
        f"{environment.device_type}, environment {environment.fingerprint()}",
        ["fact", "matched", Column("found", folds=True)],
        rows,
    )


def print_decisions(title: str, decisions: Sequence[tuple[Decision, str]]) -> None:
    """A row for each decision, with a last cell for where it comes from."""
    print_table(title, [*SHAPE, *FIGURES], [_cells(decision, source) for decision, source in decisions])
    untimed = any(decision.is_decided and decision.winner.speedup_over_plain is None for decision, _ in decisions)
    beside = "; all were timed side by side" if not untimed else ", which are not timed where they would take too long"
    print_line(f"Speed-ups are over {PLAIN} and gather{beside}.")
    lost = [
        (name, candidate, decision.problem)
        for decision, _ in decisions
        for name, candidate in decision.candidates.items()
        if candidate.outcome in ("wrong", "failed", "oom", "timeout", "crashed")
    ]
    for decision, _ in decisions:
        if not decision.is_decided:
            print_line(f"{short(decision.problem)}: {speedup_in_words(decision)}")
    for name, candidate, problem in lost:
        print_line(f"{name}: {candidate.outcome} on {short(problem)}: {candidate.reason}")
    if any(decision.timed != decision.problem for decision, _ in decisions):
        print_line("Where time or memory was short, fewer rows or columns were timed; --json says where.")


def print_imported(imported: list[Imported]) -> None:
    """A line for each decision of an archive, and for what was passed over."""
    for item in imported:
        what = item.name if item.decision is None else f"{short(item.decision.problem)}: {item.decision.chosen}"
        print_line(printable(f"{item.fate}: {what:.200}: {item.why:.400}"))


def print_verifications(title: str, verifications: Sequence[Verification]) -> None:
    """A row for each decision, and a line for each that does not hold."""
    print_table(
        title,
        [*SHAPE, "winner", Column("then", 2), Column("now", 1), "decision", Column("from", 3)],
        [
            (
                *_shape(verification.decision.problem),
                printable(winner_in_words(verification.decision)),
                _speedup(verification.decision) if verification.decision.is_decided else "",
                "" if verification.speedup is None else str(verification.speedup),
                Text(verification.outcome, "bold red" if verification.is_failure else ""),
                verification.source,
            )
            for verification in verifications
        ],
    )
    for verification in verifications:
        if verification.outcome != "holds":
            print_line(f"{verification.outcome}: {verified_in_words(verification)}")


def verified_in_words(verification: Verification) -> str:
    """The problem, its winner if it has one, and what came out about it."""
    decision = verification.decision
    words = [short(decision.problem), *([decision.chosen] if decision.is_decided else []), verification.why]
    return printable(": ".join(words))


def _cells(decision: Decision, source: str) -> tuple[str | Text, ...]:
    """The row of a decision; of one that is undecided no figures, since they would be those of nobody."""
    shape = _shape(decision.problem)
    if not decision.is_decided:
        return *shape, Text("undecided", "yellow"), *[""] * 8, source
    winner = decision.winner
    return (
        *(*shape, decision.chosen, *_times(winner.speedup_over_plain), _speedup(decision, interval=False)),
        *("" if time is None else f"{time * 1e3:.3g} ms" for time in (winner.seconds, winner.host_seconds)),
        f"{winner.checks_passed} of {len(winner.checks)}",
        _memory(winner.extra_bytes, winner.extra_multiple),
        "" if winner.percent_of_bandwidth is None else f"{winner.percent_of_bandwidth:.0f} %",
        source,
    )


def _shape(problem: Problem) -> tuple[str, ...]:
    """The cells below `SHAPE`."""
    return str(problem.rows), str(problem.vocab), short_name(problem.dtype), problem.mode, options_of(problem)


def _times(speedup: Speedup | None) -> tuple[str, str]:
    """A speed-up, and its interval."""
    if speedup is None:
        return "not timed", ""
    return f"{speedup.median:.2f}x", "" if speedup.low is None else f"{speedup.low:.2f} to {speedup.high:.2f}"


def _speedup(decision: Decision, *, interval: bool = True) -> str:
    speedup = decision.winner.speedup
    if decision.chosen == decision.baseline or speedup is None:
        return "baseline"
    text = str(speedup) if interval else f"{speedup.median:.2f}x"
    return text + ("" if decision.baseline == "eager" else f" over {decision.baseline}")


def printable(text: str) -> str:
    """It may quote a file that comes from anywhere, and a terminal obeys some characters."""
    return "".join(character if character.isprintable() else "?" for character in text)


def _memory(size: int | None, multiple: float | None) -> str:
    if size is None:
        return "not measured"
    return f"{size / 2**20:.0f} MiB" + ("" if multiple is None else f", {multiple:.2f} x logits")
