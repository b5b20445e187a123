"""`check`: whether backends, or anyone's function, give the right numbers on this machine."""

from collections.abc import Callable
from typing import Annotated, Any, Literal

import typer

from compiled_logprobs.backends import backends
from compiled_logprobs.check.report import CheckReport
from compiled_logprobs.check.run import check_backend
from compiled_logprobs.cli.options import COULD_NOT_RUN, PASSED, WRONG, AsJson, Where, busy, reported_errors, subject_of
from compiled_logprobs.cli.output import print_json, print_line, print_report
from compiled_logprobs.cli.problems import completed_by
from compiled_logprobs.errors import BackendUnavailable


def check(
    target: Annotated[
        str | None,
        typer.Argument(
            show_default=False,
            autocompletion=completed_by(backends),
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
            "return_entropy, masked_logits, inplace_backward and out_dtype, which are then tried. With f(logits[None], "
            "labels[None]) the results lose the batch dimension again.",
        ),
    ] = None,
    returns: Annotated[
        Literal["log_prob", "loss"],
        typer.Option(help="What the function's numbers are: log-probabilities, or losses."),
    ] = "log_prob",
    vocab: Annotated[
        int | None, typer.Option(show_default=False, min=2, help="Size of the vocabulary; by default 32771.")
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
    as_json: AsJson = False,
) -> None:
    """Check backends, or anyone's function, against float64.

    Sign, values and gradient are checked on this machine. What is wrong is told with its likely cause.
    """
    reports: list[CheckReport] = []
    unavailable: dict[str, str] = {}
    with reported_errors():
        subjects: list[str | Callable[..., Any]] = [*backends()] if target is None else [subject_of(target)]
        for subject in subjects:
            try:
                with busy(f"checking {target or subject}"):
                    report = check_backend(
                        subject,
                        ignore_index=ignore_index,
                        device=device,
                        seed=seed,
                        vocab=vocab,
                        call=call,
                        returns=returns,
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
                    print_report(report)
    if as_json:
        print_json({"reports": [report.to_dict() for report in reports], "unavailable": unavailable})
    if not reports:
        raise typer.Exit(COULD_NOT_RUN)
    raise typer.Exit(PASSED if all(report.passed for report in reports) else WRONG)
