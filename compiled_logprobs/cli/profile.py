"""`profile` measures a grid of problems and stores what was decided; `verify` measures stored decisions again."""

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, TypeVar

import torch
import typer
from rich.text import Text

from compiled_logprobs.backends import registered_names
from compiled_logprobs.choose import verify as verification
from compiled_logprobs.choose.tune import tune_all
from compiled_logprobs.cli.calls import calls_of
from compiled_logprobs.cli.options import (
    COULD_NOT_RUN,
    INTERRUPTED,
    PASSED,
    WRONG,
    AsJson,
    Folder,
    Shown,
    Where,
    backend_name_of,
    device_of,
    progress_of,
    reported_errors,
)
from compiled_logprobs.cli.output import print_decisions, print_json, print_line, print_verifications
from compiled_logprobs.cli.problems import Asked, completed_by, split, takes_problems
from compiled_logprobs.cli.progress import Progress
from compiled_logprobs.decision import Decision
from compiled_logprobs.errors import LogProbsError, ProfileError
from compiled_logprobs.machine.environment import fingerprint_of
from compiled_logprobs.problem import Problem, bucket
from compiled_logprobs.store import stores, user_store
from compiled_logprobs.store.files import Store
from compiled_logprobs.tuning import presets

BUDGET_S = 60.0
Result = TypeVar("Result", bound=Decision | verification.Verification | LogProbsError)


@takes_problems
def profile(
    asked: Asked,
    preset: Annotated[
        str,
        typer.Option(
            metavar="|".join(presets.PRESETS),
            autocompletion=completed_by(lambda: presets.PRESETS),
            help="The grid, of which the options above replace parts.",
        ),
    ] = "standard",
    backend: Annotated[
        list[str] | None,
        typer.Option(
            show_default=False,
            metavar="NAME",
            autocompletion=completed_by(registered_names),
            help="Measure only these, beside eager: names, or package.module:Class of your own. By default all.",
        ),
    ] = None,
    device: Where = None,
    budget: Annotated[
        float | None,
        typer.Option(
            min=1.0,
            show_default=False,
            help="Seconds for timing each problem, once all is compiled and checked; fewer rows are timed where it "
            f"would take longer. By default {BUDGET_S:.0f}, with the preset rl {presets.PRESETS['rl'].budget_s:.0f}. "
            "What was left undecided before gets three times what it took then, up to 600, if that is more.",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(show_default=False, help="Folder to store in; by default the user's profiles.")
    ] = None,
    again: Annotated[bool, typer.Option("--again", help="Measure also what is stored there already.")] = False,
    progress: Shown = "bar",
    as_json: AsJson = False,
) -> None:
    """Measure which backend is fastest, and store it.

    What is finished is stored, also if you interrupt it; what is stored already is not measured again, unless it was
    left undecided.
    """
    with reported_errors():
        where = device_of(device)
        problems = list(dict.fromkeys(map(bucket, presets.grid(where.type, preset, **asked))))
        names = [backend_name_of(text) for text in split(backend)] or None
        store = user_store() if out is None else Store(out)
        shown = progress_of(progress, as_json)
        seconds = presets.PRESETS[preset].budget_s if budget is None else budget
        tuned = tune_all(problems, where, store=store, names=names, budget_s=seconds, again=again, on_event=shown.event)
        results, interrupted = _follow(tuned, problems, where, shown)
    decisions = [result for result in results if isinstance(result, Decision)]
    decided = [decision for decision in decisions if decision.is_decided]
    fingerprint = fingerprint_of(where)
    stored = sum(store.read(fingerprint, decision.problem) == decision for decision in decisions)
    failed = [str(result) for result in results if not isinstance(result, Decision)]
    if as_json:
        listed = [decision.to_dict() for decision in decisions]
        print_json({"decisions": listed, "stored": stored, "failed": failed, "interrupted": interrupted})
    elif progress != "jsonl":
        if decisions:
            print_decisions(f"Winners on {where}, environment {fingerprint}", [(d, "") for d in decisions])
        for reason in failed:
            print_line(f"not decided: {reason}")
        open_ = len(decisions) - len(decided)
        doubt = f", {open_} undecided (run profile again: they get more time)" if open_ else ""
        print_line(
            f"{len(decided)} of {len(problems)} problems decided{doubt}, {stored} of them stored in {store.root}"
        )
        for line in calls_of(decision.problem for decision in decided):
            print_line(Text(line) if line.startswith(" ") else line)  # code is not folded
    wrong = any(candidate.outcome == "wrong" for decision in decisions for candidate in decision.candidates.values())
    if interrupted or stored < len(problems):
        raise typer.Exit(INTERRUPTED if interrupted else COULD_NOT_RUN)
    raise typer.Exit(WRONG if wrong else PASSED)


def _follow(
    running: Iterable[Result], problems: list[Problem], where: torch.device, shown: Progress
) -> tuple[list[Result], bool]:
    """The result of each problem, and whether it was interrupted before the last."""
    results: list[Result] = []
    interrupted = False
    began = time.monotonic()
    with shown:
        shown.start(problems, str(where), fingerprint_of(where))
        try:
            for result in running:
                results.append(result)
                shown.result(result)
        except KeyboardInterrupt:
            interrupted = True
        shown.end(len(results), time.monotonic() - began, interrupted=interrupted)
    return results, interrupted


@takes_problems
def verify(
    asked: Asked,
    device: Where = None,
    budget: Annotated[float, typer.Option(min=1.0, help="Seconds for timing each problem.")] = BUDGET_S,
    folder: Folder = None,
    backend: Annotated[
        list[str] | None,
        typer.Option(
            show_default=False,
            metavar="NAME",
            help="package.module:Class of a backend of your own that decisions may have chosen.",
        ),
    ] = None,
    progress: Shown = "bar",
    as_json: AsJson = False,
) -> None:
    """Check and time the stored winners again.

    They are timed beside the baseline, as when they were chosen. Nothing stored changes.

    Exit code 1 if a winner is wrong, does not get through, or has lost its advantage: the interval of its speed-up
    lies below 1.03, or by more than 3 % below the one that is stored, twice. Exit code 2 if nothing could be
    verified.
    """
    with reported_errors():
        for text in split(backend):
            backend_name_of(text)
        where = device_of(device)
        shown = progress_of(progress, as_json)
        searched = stores() if folder is None else {str(folder): Store(folder)}
        stored = verification.stored_decisions(searched, where, **asked)
        if not stored:
            raise ProfileError(
                f"no decision is stored for {where} in environment {fingerprint_of(where)} that was asked for, and "
                "one or more are valid. `compiled-logprobs profile` measures some; `compiled-logprobs show --all` "
                "lists all."
            )
        running = verification.verify(stored, where, budget_s=budget, on_event=shown.event)
        results, interrupted = _follow(running, [decision.problem for decision, _ in stored], where, shown)
    failures = sum(result.is_failure for result in results)
    verified = failures + sum(result.outcome == "holds" for result in results)
    if as_json:
        print_json({"decisions": [result.to_dict() for result in results], "interrupted": interrupted})
    elif progress != "jsonl":
        print_verifications(f"Winners on {where}, environment {fingerprint_of(where)}", results)
        print_line(f"{verified} of {len(stored)} decisions verified, {verified - failures} of them hold")
        if failures:
            print_line("`compiled-logprobs profile --again` measures those that do not hold anew.")
    if interrupted:
        raise typer.Exit(INTERRUPTED)
    raise typer.Exit(WRONG if failures else PASSED if verified else COULD_NOT_RUN)
