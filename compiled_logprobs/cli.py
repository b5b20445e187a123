"""The command line: reads arguments, calls the library, prints what it returns.

Exit codes: 0 passed; 1 something is wrong; 2 it could not run, and standard error says why.
"""

import contextlib
import json
import sys
import traceback
from collections.abc import Callable, Iterator
from enum import Enum
from importlib import import_module
from importlib.metadata import version
from itertools import groupby
from typing import Annotated, Any

import torch
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from compiled_logprobs.backends import backends, register_backend, why_not
from compiled_logprobs.backends.base import Backend
from compiled_logprobs.environment import Environment, cpp_compiler_version, environments, without_paths
from compiled_logprobs.errors import BackendUnavailable, InputError, LogProbsError
from compiled_logprobs.problem import Problem, short_name
from compiled_logprobs.tuning.gate import CheckReport, check_backend

PASSED, WRONG, COULD_NOT_RUN = 0, 1, 2
WIDTH_ELSEWHERE = 160
SAMPLE_ROWS, SAMPLE_VOCAB = 4096, 151936
"""What `doctor` asks the backends about: a batch of an RL post-training step with Qwen's vocabulary."""

app = typer.Typer(
    help="Log-probabilities of labels from logits: check backends and functions, and see what this machine can run.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Run the command line."""
    app(prog_name="compiled-logprobs")


class Device(str, Enum):
    """Where to check."""

    cpu = "cpu"
    cuda = "cuda"


def _show_version(asked: bool) -> None:
    if asked:
        print(f"compiled-logprobs {version('compiled-logprobs')}")
        raise typer.Exit


@app.callback()
def options(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and leave.")
    ] = False,
) -> None:
    """Log-probabilities of labels from logits: check backends and functions, and see what this machine can run."""


AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object, for programs.")]


@app.command()
def check(
    target: Annotated[
        str | None,
        typer.Argument(
            show_default=False,
            help="A backend's name, or package.module:function for a function of (logits, labels) of your own, which may "
            "lie in the current directory. Without it, every backend is checked.",
        ),
    ] = None,
    device: Annotated[
        Device | None, typer.Option(show_default=False, help="Where to check; by default on the GPU if there is one.")
    ] = None,
    ignore_index: Annotated[
        bool,
        typer.Option(
            "--ignore-index/--no-ignore-index", help="Whether labels of -100, which count 0, are among the inputs."
        ),
    ] = True,
    seed: Annotated[
        int | None, typer.Option(show_default=False, min=0, help="Of the inputs; by default fresh at random.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check sign, values and gradient of backends, or of a function of your own, against float64 on this machine."""
    reports: list[CheckReport] = []
    unavailable: dict[str, str] = {}
    with _reported_errors():
        if device is Device.cuda and not torch.cuda.is_available():
            raise InputError("got --device cuda; torch sees no CUDA or ROCm device here. Use --device cpu.")
        device_type = None if device is None else device.value
        subjects: list[str | Callable[..., Any]] = [*backends()] if target is None else [_subject(target)]
        for subject in subjects:
            try:
                with _busy(f"checking {target or subject}"):
                    report = check_backend(subject, ignore_index=ignore_index, device=device_type, seed=seed)
            except BackendUnavailable as error:
                if target is not None:
                    raise
                unavailable[str(subject)] = str(error)
                if not as_json:
                    _line(str(error).splitlines()[0])
            else:
                reports.append(report)
                if not as_json:
                    _print_report(report)
    if as_json:
        _print_json({"reports": [report.to_dict() for report in reports], "unavailable": unavailable})
    if not reports:
        raise typer.Exit(COULD_NOT_RUN)
    raise typer.Exit(PASSED if all(report.passed for report in reports) else WRONG)


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Show this machine, the versions on it, and which backends can run here, or why not."""
    found = environments()
    compiler = cpp_compiler_version()
    answers = [
        (name, problem, reason if reason is None else without_paths(reason))
        for name in backends()
        for problem in _sample_problems(found)
        for reason in [why_not(name, problem)]
    ]
    if as_json:
        _print_json(
            {
                "environments": [environment.to_dict() for environment in found],
                "cpp_compiler": compiler,
                "backends": [
                    {"name": name, "problem": str(problem), "can_run": reason is None, "why_not": reason}
                    for name, problem, reason in answers
                ],
            }
        )
        return
    for environment in found:
        _print_environment(environment)
    _line(f"C++ compiler, for torch.compile on the CPU: {compiler or 'none found'}")
    table = _table("Backends", "backend", "problem", "can run")
    for name, problem, reason in answers:
        table.add_row(name, Text(str(problem)), "yes" if reason is None else Text(f"no: {reason}"))
    _console().print(table)


def _subject(target: str) -> str | Callable[..., Any]:
    """What `target` names: a registered backend, or something that is imported."""
    if target in backends():
        return target
    module_name, colon, attribute = target.partition(":")
    if not (module_name and colon and attribute):
        raise InputError(
            f"got target {target!r}; a backend's name ({', '.join(backends())}) or package.module:function is valid."
        )
    sys.path.insert(0, "")
    try:
        with _busy(f"importing {module_name}"):
            found: Any = import_module(module_name)
        for name in attribute.split("."):
            found = getattr(found, name)
    except (Exception, SystemExit) as error:  # a foreign module may do anything when it is imported
        raise InputError(
            f"got target {target!r}, which cannot be imported: {type(error).__name__}: {error}. Valid is a module that "
            "Python finds from the current directory, a colon and the function's name; install what the module needs."
        ) from error
    if isinstance(found, Backend) or (isinstance(found, type) and issubclass(found, Backend)):
        register_backend(found.name, target)
        return found.name
    if not callable(found):
        raise InputError(f"got target {target!r}, which is of type {type(found).__name__}; a function is valid.")
    return found  # type: ignore[no-any-return]  # narrowed to a callable from Any


@contextlib.contextmanager
def _busy(doing: str) -> Iterator[None]:
    """Say on a terminal what takes so long. What foreign code prints goes to standard error: the other is for results."""
    with Console(stderr=True).status(doing), contextlib.redirect_stdout(sys.stderr):
        yield


@contextlib.contextmanager
def _reported_errors() -> Iterator[None]:
    """Print what went wrong on standard error, and exit; not with Python's code for it, which here means 'wrong'."""
    try:
        yield
    except LogProbsError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        raise typer.Exit(COULD_NOT_RUN) from None
    except Exception:  # noqa: BLE001  a mistake in this library
        traceback.print_exc()
        raise typer.Exit(COULD_NOT_RUN) from None


def _sample_problems(found: list[Environment]) -> list[Problem]:
    device_types = dict.fromkeys(environment.device_type for environment in found)
    return [
        Problem(device_type, SAMPLE_ROWS, SAMPLE_VOCAB, dtype, needs_grad=True)
        for device_type in device_types
        for dtype in (torch.float32, torch.bfloat16)
    ]


def _print_report(report: CheckReport) -> None:
    for problem, checks in groupby(report.checks, key=lambda one: one.problem):
        details = problem.details()
        table = _table(
            f"{report.subject}: {problem}{f' ({details})' if details else ''}",
            *("check", "verdict", "worst", "limit", "what it demands"),
        )
        for one in checks:
            verdict = Text("passed", "green") if one.passed else Text("wrong", "bold red")
            table.add_row(one.name, verdict, _figure(one.figure), _figure(one.limit), one.meaning)
        _console().print(table)
    repeatable = _recorded("repeatable", report.repeatable)
    _line(f"Recorded: {repeatable}, {_recorded('row invariant', report.row_invariant)}; seed {report.seed}")
    wrong = [one for one in report.checks if not one.passed]
    for one in wrong:
        _line(f"  {one.name} ({short_name(one.problem.dtype)}): {one.detail}")
    if wrong:
        _line(f"{report.subject}: wrong: {', '.join(report.reasons)}")
    else:
        _line(f"{report.subject}: passed {len(report.checks)} of {len(report.checks)} checks")


def _print_environment(environment: Environment) -> None:
    table = _table(f"{environment.device_type}, environment {environment.fingerprint()}", "fact", "found", "matched")
    matched = environment.matched()
    for name, value in environment.to_dict().items():
        if name != "fingerprint" and value is not None:
            shown = f"{value / 2**30:.1f} GiB" if name == "memory_bytes" else str(value)
            table.add_row(name.removesuffix("_bytes").replace("_", " "), Text(shown), "yes" if name in matched else "")
    _console().print(table)


def _console() -> Console:
    """As wide as the terminal; where there is none, so wide that tables keep one line a row."""
    console = Console()
    return console if console.is_terminal else Console(width=WIDTH_ELSEWHERE)


def _table(title: str, *columns: str) -> Table:
    return Table(*columns, title=Text(title), title_justify="left", title_style="bold", box=SIMPLE_HEAD)


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value + 0.0:.3g}"  # the sum makes 0 of -0


def _recorded(what: str, value: bool | None) -> str:
    if value is None:
        return f"{what} not tried"
    return what if value else f"not {what}"


def _line(text: str) -> None:
    """Unwrapped, so that programs can find it, and without markup, since messages hold brackets."""
    _console().print(Text(text), soft_wrap=True)


def _print_json(result: dict[str, Any]) -> None:
    print(json.dumps(result, indent=2, allow_nan=False))
