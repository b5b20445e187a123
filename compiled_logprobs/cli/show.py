"""`show`, `explain` and `doctor`: what is stored, what serves a problem and why, and what this machine can run."""

from typing import Annotated, Any

import torch
import typer

from compiled_logprobs.backends import backends, why_not
from compiled_logprobs.choose.explain import explain_problem
from compiled_logprobs.cli.options import AsJson, Folder, Where, device_of, reported_errors
from compiled_logprobs.cli.output import Column, print_decisions, print_environment, print_json, print_line, print_table
from compiled_logprobs.decision import Decision
from compiled_logprobs.machine.environment import cpp_compiler_version, environments, without_paths
from compiled_logprobs.policy import policy
from compiled_logprobs.problem import MODES, Layout, Problem, Temperature, as_it_lies, short_name
from compiled_logprobs.store import stores
from compiled_logprobs.store.files import Store
from compiled_logprobs.tuning import presets

SAMPLE_ROWS, SAMPLE_VOCAB = 4096, 151936
"""What `doctor` asks the backends about: a batch of an RL post-training step with Qwen's vocabulary."""


def show(
    folder: Folder = None,
    every: Annotated[
        bool, typer.Option("--all", help="Also those of other environments, which are not used on this machine.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show the stored decisions: winner, speed-up, memory, sign check and share of bandwidth of each problem."""
    with reported_errors():
        where = stores() if folder is None else {str(folder): Store(folder)}
        here = {environment.fingerprint() for environment in environments()}
        decisions: dict[tuple[str, Problem], tuple[Decision, str]] = {}
        for label, asked in where.items():
            for environment, decision in asked.decisions():
                if (every or environment in here) and decision.chosen in backends():
                    decisions.setdefault((environment, decision.problem), (decision, label))
    if as_json:
        listed = [
            {"environment_fingerprint": environment, "from": label, **decision.to_dict()}
            for (environment, _), (decision, label) in decisions.items()
        ]
        print_json({"decisions": listed})
        return
    for environment in dict.fromkeys(environment for environment, _ in decisions):
        rows = [value for key, value in decisions.items() if key[0] == environment]
        rows.sort(key=lambda row: _order(row[0].problem))
        print_decisions(f"Environment {environment}{'' if environment in here else ', not this machine'}", rows)
    if not decisions:
        print_line("No decisions are stored for this machine. `compiled-logprobs profile` measures some.")


def _order(problem: Problem) -> tuple[Any, ...]:
    return problem.vocab, short_name(problem.dtype), *problem[6:], problem.rows


def explain(
    vocab: Annotated[str, typer.Option(help="V: a number or a model's name.")] = "qwen3",
    rows: Annotated[str, typer.Option(help="N: how many positions.")] = "512",
    dtype: Annotated[str, typer.Option(help="Of the logits: float32, bfloat16 or float16.")] = "bfloat16",
    mode: Annotated[str, typer.Option(help="forward, backward or inplace.")] = "backward",
    labels_per_row: Annotated[int, typer.Option(min=1, help="K.")] = 1,
    temperature: Annotated[Temperature, typer.Option()] = "none",
    masked: Annotated[bool, typer.Option("--masked", help="Whole regions of the vocabulary are -inf.")] = False,
    layout: Annotated[Layout, typer.Option(help="How the logits lie.")] = "flat",
    device: Where = None,
    as_json: AsJson = False,
) -> None:
    """Say which backend serves a problem here, why, and what became of the others. Nothing is measured."""
    with reported_errors():
        where = device_of(device)
        asked = Problem(
            where.type,
            presets.rows_of(rows),
            presets.vocab_of(vocab),
            presets.dtype_of(dtype),
            labels_per_row=labels_per_row,
            temperature=temperature,
            masked_logits=masked,
            layout=layout,
            **MODES[presets.mode_of(mode)],
        )
        explanation = explain_problem(as_it_lies(asked), where, policy())
    if as_json:
        print_json(explanation.to_dict())
    else:
        print_line(str(explanation))


def doctor(as_json: AsJson = False) -> None:
    """Show this machine, the versions on it, and which backends can run here, or why not."""
    here = environments()
    compiler = cpp_compiler_version()
    problems = [
        Problem(device_type, SAMPLE_ROWS, SAMPLE_VOCAB, dtype, needs_grad=True)
        for device_type in dict.fromkeys(environment.device_type for environment in here)
        for dtype in (torch.float32, torch.bfloat16)
    ]
    asked = [(name, problem, why_not(name, problem)) for name in backends() for problem in problems]
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
    rows = [(name, str(problem), "yes" if reason is None else f"no: {reason}") for name, problem, reason in answers]
    print_table("Backends", ["backend", "problem", Column("can run", folds=True)], rows)
