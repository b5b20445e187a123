"""How the command line shows what the library returns: tables and lines on standard output."""

import json
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from compiled_logprobs.check.report import MEANING, CheckReport
from compiled_logprobs.choose.verify import Verification
from compiled_logprobs.decision import PLAIN, Decision, short
from compiled_logprobs.machine.environment import Environment
from compiled_logprobs.problem import Problem, mode_name, short_name
from compiled_logprobs.store.transfer import Imported

WIDTH_ELSEWHERE = 180


def print_report(report: CheckReport) -> None:
    """A table for each problem that was checked, and a last line with the verdict."""
    for result in report.results:
        details = result.problem.details()
        table = new_table(
            f"{report.subject}: {result.problem}{f' ({details})' if details else ''}",
            *("check", "verdict", "worst", "limit", "what it demands"),
        )
        for check in result.checks:
            verdict = Text("passed", "green") if check.passed else Text("wrong", "bold red")
            table.add_row(check.name, verdict, _figure(check.figure), _figure(check.limit), MEANING[check.name])
        console().print(table)
    print_line(f"Seed {report.seed}")
    for result in report.results:
        for check in result.checks:
            if not check.passed:
                print_line(f"  {check.name} ({short_name(result.problem.dtype)}): {check.detail}")
    for cause in report.causes:
        print_line(f"likely cause: {cause}")
    count = len(report.checks)
    outcome = f"passed {count} of {count} checks" if report.passed else f"wrong: {', '.join(report.reasons)}"
    print_line(f"{report.subject}: {outcome}")


def print_environment(environment: Environment) -> None:
    """Its facts, and which of them have to be the same elsewhere for measurements to count there."""
    table = new_table(f"{environment.device_type}, environment {environment.fingerprint()}", "fact", "found", "matched")
    matched = environment.matched()
    for name, value in environment.to_dict().items():
        if name != "fingerprint" and value is not None:
            shown = f"{value / 2**30:.1f} GiB" if name == "memory_bytes" else str(value)
            table.add_row(name.removesuffix("_bytes").replace("_", " "), Text(shown), "yes" if name in matched else "")
    console().print(table)


def print_decisions(title: str, decisions: list[tuple[Decision, str]]) -> None:
    """A row for each decision, with a last cell for where it comes from unless all of these are empty."""
    with_source = any(source for _, source in decisions)
    table = new_table(
        title,
        *("rows", "vocabulary", "dtype", "mode", "winner", f"over {PLAIN}", "over eager", "a call"),
        *("extra memory", "sign check", "bandwidth", *(["from"] if with_source else [])),
    )
    for column in (0, 1, 7, 10):
        table.columns[column].justify = "right"
    for decision, source in decisions:
        problem, winner = decision.problem, decision.winner
        table.add_row(
            *_cells(problem),
            Text(decision.chosen),
            str(winner.speedup_over_plain or "not timed"),
            _speedup(decision, interval=False),
            "" if winner.seconds is None else f"{winner.seconds * 1e3:.3g} ms",
            _memory(winner.extra_bytes, winner.extra_multiple),
            f"{winner.checks_passed} of {len(winner.checks)}",
            "" if winner.percent_of_bandwidth is None else f"{winner.percent_of_bandwidth:.0f} %",
            *([Text(source)] if with_source else []),
        )
    console().print(table)
    print_line(f"Speed-ups are over {PLAIN} and gather, which people use today, and over eager, both timed beside it.")
    lost = [
        (name, candidate, decision.problem)
        for decision, _ in decisions
        for name, candidate in decision.candidates.items()
        if candidate.outcome in ("wrong", "failed", "oom", "timeout", "crashed")
    ]
    for name, candidate, problem in lost:
        print_line(f"{name}: {candidate.outcome} on {short(problem)}: {candidate.reason}")
    if any(decision.measured_rows < decision.problem.rows for decision, _ in decisions):
        print_line("Where time or memory was short, fewer rows were timed; --json says where.")


def print_imported(imported: list[Imported]) -> None:
    """A line for each decision of an archive, and for what was passed over."""
    for item in imported:
        what = item.name if item.decision is None else f"{short(item.decision.problem)}: {item.decision.chosen}"
        print_line(printable(f"{item.fate}: {what:.200}: {item.why:.400}"))


def print_verifications(title: str, verifications: list[Verification]) -> None:
    """A row for each decision, and a line for each that does not hold."""
    table = new_table(title, "rows", "vocabulary", "dtype", "mode", "winner", "then", "now", "decision", "from")
    for verification in verifications:
        decision = verification.decision
        table.add_row(
            *_cells(decision.problem),
            Text(printable(decision.chosen)),
            _speedup(decision),
            "" if verification.speedup is None else str(verification.speedup),
            Text(verification.outcome, "bold red" if verification.is_failure else ""),
            Text(verification.source),
        )
    console().print(table)
    for verification in verifications:
        if verification.outcome != "holds":
            print_line(f"{verification.outcome}: {verified_in_words(verification)}")


def verified_in_words(verification: Verification) -> str:
    """The problem, its winner, and what was found out about it."""
    return printable(f"{short(verification.decision.problem)}: {verification.decision.chosen}: {verification.why}")


def print_line(text: str) -> None:
    """Unwrapped, so that programs can find it, and without markup, since messages hold brackets."""
    console().print(Text(text), soft_wrap=True)


def print_json(result: dict[str, Any]) -> None:
    print(json.dumps(result, indent=2, allow_nan=False))


def console() -> Console:
    """As wide as the terminal; where there is none, so wide that tables keep one line a row."""
    usual = Console()
    return usual if usual.is_terminal else Console(width=WIDTH_ELSEWHERE)


def new_table(title: str, *columns: str) -> Table:
    return Table(*columns, title=Text(title), title_justify="left", title_style="bold", box=SIMPLE_HEAD)


def _cells(problem: Problem) -> tuple[str, ...]:
    return str(problem.rows), str(problem.vocab), short_name(problem.dtype), mode_name(problem)


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


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value + 0.0:.3g}"  # the sum makes 0 of -0
