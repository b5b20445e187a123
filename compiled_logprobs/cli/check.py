"""`check`: whether backends, or anyone's function, give the right numbers on this machine."""

import contextlib
import io
import sys
from collections.abc import Callable, Iterator
from itertools import product
from typing import Annotated, Any, Literal

import typer
from rich.text import Text

from compiled_logprobs.backends import backends, registered_names
from compiled_logprobs.check.report import MEANING, CheckReport
from compiled_logprobs.check.run import check_backend
from compiled_logprobs.cli.options import (
    COULD_NOT_RUN,
    PASSED,
    WRONG,
    AsJson,
    Where,
    busy,
    reported_errors,
    subject_of,
)
from compiled_logprobs.cli.output import Column, print_json, print_line, print_table, printable
from compiled_logprobs.cli.problems import completed_by, split
from compiled_logprobs.decision import Check
from compiled_logprobs.errors import BackendUnavailable
from compiled_logprobs.problem import Problem, short_name
from compiled_logprobs.tuning.presets import vocab_of

FIRST_LINES = 10
"""Of what a function prints; it is called some hundred times."""

COLUMNS: list[Column | str] = ["check", "verdict", Column("worst", right=True), Column("limit", right=True)]


def check(
    target: Annotated[
        str | None,
        typer.Argument(
            show_default=False,
            autocompletion=completed_by(registered_names),
            help="A backend's name, or package.module:function for anyone's function of logits [N, V] and labels [N], "
            "which may lie in the current directory. Without it, every backend is checked.",
        ),
    ] = None,
    call: Annotated[
        str | None,
        typer.Option(
            show_default=False,
            help="How to call the function, if not as f(logits, labels): an expression such as "
            "\"f(labels, logits, temp=temperature, reduction='none')\". It may name temperature, ignore_index, "
            "return_entropy, return_logsumexp, return_argmax, return_sum_p_squared, masked_logits, inplace_backward "
            "and out_dtype, which are then tried. With f(logits[None], labels[None]) the results lose the batch "
            "dimension again. From hidden states it is f(hidden, weight, labels), and may also name bias, logit_scale, "
            "softcap and memory_limit.",
        ),
    ] = None,
    returns: Annotated[
        Literal["log_prob", "loss"],
        typer.Option(help="What the function's numbers are: log-probabilities, or losses."),
    ] = "log_prob",
    from_hidden: Annotated[
        bool,
        typer.Option(
            "--from-hidden",
            help="The function takes hidden [N, H], weight [V, H] and labels [N] instead of logits, and its gradients "
            "in all of them are checked.",
        ),
    ] = False,
    vocab: Annotated[
        list[str] | None,
        typer.Option(
            show_default=False,
            metavar="V|MODEL[,...]",
            help="Sizes of the vocabulary, or models such as qwen3, one after another; by default 32771 (8209 from "
            "hidden states), and a few rows of those that models have.",
        ),
    ] = None,
    device: Where = None,
    ignore_index: Annotated[
        bool,
        typer.Option(
            "--ignore-index/--no-ignore-index", help="Whether labels of -100, which count 0, are among the inputs."
        ),
    ] = True,
    seed: Annotated[
        int | None, typer.Option(show_default=False, min=0, help="Of the inputs; by default fresh at random.")
    ] = None,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Show each check for each kind of logits, and what it demands.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Check backends, or anyone's function, against float64.

    Sign, values and gradient are checked on this machine. What is wrong is told with its likely cause.
    """
    reports: list[CheckReport] = []
    unavailable: dict[str, str] = {}
    with reported_errors():
        subjects: list[tuple[str | Callable[..., Any], bool]]
        if target is None:
            subjects = [(name, hidden) for hidden in (False, True) for name in backends(from_hidden=hidden)]
            subjects = [(name, hidden) for name, hidden in subjects if hidden or not from_hidden]
        else:
            subjects = [(subject_of(target), from_hidden)]
        sizes: list[int | None] = [*dict.fromkeys(vocab_of(text) for text in split(vocab))]
        for (subject, is_from_hidden), size in product(subjects, sizes or [None]):
            at_size = f" at a vocabulary of {size}" if len(sizes) > 1 else ""
            try:
                with busy(f"checking {target or subject}{at_size}") as tell, first_lines():
                    report = check_backend(
                        subject,
                        ignore_index=ignore_index,
                        device=device,
                        seed=seed,
                        vocab=size,
                        call=call,
                        returns=returns,
                        from_hidden=is_from_hidden,
                        tell=tell,
                    )
            except BackendUnavailable as error:
                if target is not None:
                    raise
                unavailable[str(subject)] = str(error)
                if not as_json:
                    print_line(str(error).splitlines()[0])
            else:
                reports.append(report)
                if not as_json:
                    if len(sizes) > 1:
                        print_line(f"With a vocabulary of {size}:")
                    print_report(report, verbose=verbose, brief=target is None)
    if as_json:
        print_json({"reports": [report.to_dict() for report in reports], "unavailable": unavailable})
    elif not verbose:
        print_line("-v shows each check for each kind of logits, and what it demands.")
    if not reports:
        raise typer.Exit(COULD_NOT_RUN)
    raise typer.Exit(PASSED if all(report.passed for report in reports) else WRONG)


@contextlib.contextmanager
def first_lines() -> Iterator[None]:
    """Let foreign code print a few lines, on standard error."""
    lines = 0

    class FirstLines(io.TextIOBase):
        def write(self, text: str) -> int:
            nonlocal lines
            if lines < FIRST_LINES:
                sys.stderr.write(text)
            lines += text.count("\n")
            return len(text)

    with contextlib.redirect_stdout(FirstLines()):
        yield
    if lines > FIRST_LINES:
        sys.stderr.write(f"... and {lines - FIRST_LINES} lines more that it prints\n")


def print_report(report: CheckReport, *, verbose: bool, brief: bool) -> None:
    """The verdict first, with cause and reasons where something is wrong; then a table, or one for each problem.

    Args:
        report: what to print.
        verbose: whether every check is shown, for every problem.
        brief: whether the verdict is enough where all has passed.
    """
    print_line("\n".join(map(printable, str(report).splitlines())))
    by_name: dict[str, list[tuple[Problem, Check]]] = {}
    for result in report.results:
        for check in result.checks:
            by_name.setdefault(check.name, []).append((result.problem, check))
    worst = {name: max(by_name[name], key=lambda pair: _badness(pair[1])) for name in MEANING if name in by_name}
    problems = [result.problem for result in report.results]
    for name in report.reasons:
        wrong = dict.fromkeys(short_name(problem.dtype) for problem, check in by_name[name] if not check.passed)
        only = f" ({', '.join(wrong)})" if len(wrong) < len({problem.dtype for problem in problems}) else ""
        print_line(f"  {name}{only}: {printable(' '.join(worst[name][1].detail.split()))}")
    if verbose:
        for result in report.results:
            details = result.problem.details()
            rows = [(*_cells(check), MEANING[check.name]) for check in result.checks]
            title = f"{report.subject}: {result.problem}{f' ({details})' if details else ''}"
            print_table(title, [*COLUMNS, Column("what it demands", folds=True)], rows)
        print_line(f"--seed {report.seed} repeats these inputs.")
    elif not (brief and report.passed):
        shown = [(problem, check) for problem, check in worst.values() if check.limit is not None or not check.passed]
        rows = [(*_cells(check, "" if report.passed else None), _kind(problem, problems)) for problem, check in shown]
        print_table("The worst of each check", [*COLUMNS, Column("logits", folds=True)], rows)
        others = len(worst) - len(shown)
        print_line(f"and {others} checks without a limit passed; --seed {report.seed} repeats these inputs.")


def _badness(check: Check) -> tuple[bool, float]:
    return not check.passed, check.figure / check.limit if check.figure is not None and check.limit else 0.0


def _cells(check: Check, verdict: str | Text | None = None) -> tuple[str | Text, ...]:
    """Those below `COLUMNS`; of its own verdict unless another is given."""
    if verdict is None:
        verdict = Text("passed", "green") if check.passed else Text("wrong", "bold red")
    figures = ("" if value is None else f"{value + 0.0:.3g}" for value in (check.figure, check.limit))  # 0, not -0
    return check.name, verdict, *figures


def _kind(problem: Problem, problems: list[Problem]) -> str:
    """Its dtype, and the options that not all of the problems with that dtype have."""
    same = [other.details().split(", ") for other in problems if other.dtype == problem.dtype]
    own = [word for word in problem.details().split(", ") if not all(word in words for words in same)]
    return ", ".join([short_name(problem.dtype), *own])
