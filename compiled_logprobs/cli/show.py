"""`show`, `explain` and `doctor`: what is stored, what serves a problem and why, and what this machine can run."""

import math
from collections.abc import Callable
from typing import Annotated, Any, Literal

import torch
import typer

from compiled_logprobs.backends import backends_for, why_not
from compiled_logprobs.choose.explain import explain_problem
from compiled_logprobs.choose.staleness import holds
from compiled_logprobs.cli.options import AsJson, Folder, Where, device_of, reported_errors
from compiled_logprobs.cli.output import (
    Column,
    print_csv,
    print_decisions,
    print_environment,
    print_json,
    print_line,
    print_table,
)
from compiled_logprobs.cli.problems import Asked, takes_problems
from compiled_logprobs.decision import Decision, winner_in_words
from compiled_logprobs.errors import InputError
from compiled_logprobs.machine.environment import cpp_compiler_version, environments, without_paths
from compiled_logprobs.policy import policy
from compiled_logprobs.problem import Problem, short_name
from compiled_logprobs.store import stores
from compiled_logprobs.store.files import Store
from compiled_logprobs.tuning import presets

USUAL: Asked = {"rows": [512], "dtypes": [torch.bfloat16], "modes": ["backward"]}
"""What `explain` is about where nothing is named, with the vocabulary of the preset quick."""
SAMPLE_ROWS, SAMPLE_VOCAB, SAMPLE_HIDDEN = 4096, 151936, 1024
"""What `doctor` asks the backends about: a batch of an RL post-training step with Qwen's vocabulary, whose smallest
model has that hidden size."""


@takes_problems
def show(
    asked: Asked,
    sort: Annotated[
        Literal["problem", "rows", "winner", "speed-up", "time", "age"],
        typer.Option(help="By the problem, its rows or its winner; largest speed-up, shortest time or oldest first."),
    ] = "problem",
    folder: Folder = None,
    every: Annotated[
        bool, typer.Option("--all", help="Also those of other environments, which are not used on this machine.")
    ] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV, one line a decision, for spreadsheets.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show the stored decisions.

    Of each its winner, speed-up, memory, sign check and share of bandwidth.
    """
    with reported_errors():
        if as_csv and as_json:
            raise InputError("got --csv and --json; one of them is valid. Leave one out.")
        where = stores() if folder is None else {str(folder): Store(folder)}
        here = {environment.fingerprint() for environment in environments()}
        first: dict[tuple[str, Problem], tuple[Decision, str]] = {}
        for label, store in where.items():
            for environment, decision in store.decisions():
                is_used = (every or environment in here) and decision.chosen in backends_for(decision.problem)
                if is_used and presets.is_among(decision.problem, **asked):
                    first.setdefault((environment, decision.problem), (decision, label))
        stored = [(environment, *value) for (environment, _), value in first.items()]
        stored.sort(key=lambda row: ORDERS[sort](row[1]))
    if as_json:
        listed = [{"environment_fingerprint": where, "from": label, **one.to_dict()} for where, one, label in stored]
        print_json({"decisions": listed})
    elif as_csv:
        print_csv(stored)
    else:
        for environment in dict.fromkeys(environment for environment, _, _ in stored):
            rows_there = [(decision, label) for where, decision, label in stored if where == environment]
            print_decisions(
                f"Environment {environment}{'' if environment in here else ', not this machine'}", rows_there
            )
        used = [decision for where, decision, _ in stored if where in here]
        if gone := sum(not holds(decision, decision.chosen) for decision in used):
            print_line(
                f"{gone} of these {len(used)} no longer count{'s' if gone == 1 else ''} here: the winner has changed "
                "since, or cannot run. `compiled-logprobs profile` measures again, and `explain` says why."
            )
        if not stored:
            print_line("No such decision is stored for this machine. `compiled-logprobs profile` measures some.")


def _by_problem(decision: Decision) -> tuple[Any, ...]:
    problem = decision.problem
    return problem.vocab, short_name(problem.dtype), *map(str, problem[4:]), problem.rows


ORDERS: dict[str, Callable[[Decision], Any]] = {
    "problem": _by_problem,
    "rows": lambda decision: (decision.problem.rows, _by_problem(decision)),
    "winner": lambda decision: (winner_in_words(decision), _by_problem(decision)),
    "speed-up": lambda decision: (
        -(over.median if decision.is_decided and (over := decision.winner.speedup_over_plain) else 0.0)
    ),
    "time": lambda decision: (decision.winner.seconds if decision.is_decided else None) or math.inf,
    "age": lambda decision: decision.measured_at,
}
"""What `show` sorts by; what has no such figure, as the undecided, comes last."""


@takes_problems
def explain(
    asked: Asked,
    device: Where = None,
    as_json: AsJson = False,
) -> None:
    """Say which backend serves a call here, and why.

    Nothing is measured. What is not named is taken as: --vocab qwen3 --rows 512 --dtype bf16 --mode backward, and
    none of the rest.
    """
    with reported_errors():
        where = device_of(device)
        named = {name: values for name, values in asked.items() if values}
        problems = presets.grid(where.type, "quick", **{**USUAL, **named})
        explanations = [explain_problem(problem, where, policy()) for problem in problems]
    if as_json:
        first, *others = [explanation.to_dict() for explanation in explanations]
        print_json({"explanations": [first, *others]} if others else first)
    else:
        print_line("\n\n".join(map(str, explanations)))


def doctor(as_json: AsJson = False) -> None:
    """Show this machine and which backends can run here.

    With the versions on it, and why a backend cannot.
    """
    here = environments()
    compiler = cpp_compiler_version()
    problems = [
        Problem(device_type, SAMPLE_ROWS, SAMPLE_VOCAB, dtype, needs_grad=True)
        for device_type in dict.fromkeys(environment.device_type for environment in here)
        for dtype in (torch.float32, torch.bfloat16)
    ]
    kinds = [problems, [problem._replace(hidden=SAMPLE_HIDDEN, weight_grad=True) for problem in problems]]
    asked = [
        (name, problem, why_not(name, problem)) for kind in kinds for name in backends_for(kind[0]) for problem in kind
    ]
    answers = [(name, problem, reason and without_paths(reason)) for name, problem, reason in asked]
    if as_json:
        print_json(
            {
                "environments": [environment.to_dict() for environment in here],
                "cpp_compiler": compiler,
                "backends": [
                    {"name": name, "problem": str(problem), "can_run": reason is None, "why_not": reason}
                    for name, problem, reason in answers
                ],
            }
        )
        return
    for environment in here:
        print_environment(environment)
    print_line(f"C++ compiler, for torch.compile on the CPU: {compiler or 'none found'}")
    for title, is_kind in (("Backends", False), ("Backends, from hidden states", True)):
        asked_of = [answer for answer in answers if (answer[1].hidden is not None) == is_kind]
        sizes = str(asked_of[0][1]).partition(f" {short_name(asked_of[0][1].dtype)}")[0]
        rows = [
            (name, f"{short_name(one.dtype)} on {one.device_type}", "yes" if reason is None else f"no: {reason}")
            for name, one, reason in asked_of
        ]
        print_table(f"{title}, {sizes}", ["backend", "problem", Column("can run", folds=True)], rows)
