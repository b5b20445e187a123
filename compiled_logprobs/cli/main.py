"""The command line: reads arguments, calls the library, prints what it returns.

Exit codes: 0 passed; 1 something is wrong; 2 it could not run, and standard error says why; 130 interrupted.
"""

import time
from collections.abc import Callable
from enum import Enum
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, get_args

import torch
import typer
from rich.text import Text

from compiled_logprobs.backends import backends, why_not
from compiled_logprobs.check.run import CheckReport, check_backend
from compiled_logprobs.choose import rule as decisions
from compiled_logprobs.choose.explain import explain_problem
from compiled_logprobs.choose.serving import tune_all
from compiled_logprobs.cli import dashboard as cli_dashboard
from compiled_logprobs.cli.options import (
    COULD_NOT_RUN,
    INTERRUPTED,
    PASSED,
    WRONG,
    AsJson,
    Dtype,
    Mode,
    Rows,
    Vocab,
    Where,
    backend_name_of,
    busy,
    device_of,
    one_of,
    progress_of,
    reported_errors,
    split,
    subject_of,
)
from compiled_logprobs.cli.output import (
    console,
    new_table,
    print_decisions,
    print_environment,
    print_inspection,
    print_json,
    print_line,
    print_report,
)
from compiled_logprobs.cli.profiles import add_to
from compiled_logprobs.cli.progress import Progress
from compiled_logprobs.decision import Decision
from compiled_logprobs.errors import BackendUnavailable, InputError, LogProbsError
from compiled_logprobs.machine.environment import (
    Environment,
    cpp_compiler_version,
    environments,
    fingerprint_of,
    without_paths,
)
from compiled_logprobs.policy import policy
from compiled_logprobs.problem import MODES, Layout, Problem, Temperature, as_it_lies, bucket, short_name
from compiled_logprobs.store import stores, user_store
from compiled_logprobs.store.files import Store
from compiled_logprobs.tuning import presets as profiling
from tests.gpu_code import inspection
from tests.gpu_code.data_sheets import GPUS, gpu_for

PROFILE_BUDGET_S = 60.0
SAMPLE_ROWS, SAMPLE_VOCAB = 4096, 151936
"""What `doctor` asks the backends about: a batch of an RL post-training step with Qwen's vocabulary."""

app = typer.Typer(
    help="Log-probabilities of labels from logits: find out which backend is right and fastest on this machine.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Run the command line."""
    app(prog_name="compiled-logprobs")


class Returned(str, Enum):
    """What the numbers of a function are."""

    log_prob = "log_prob"
    loss = "loss"


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
    """Log-probabilities of labels from logits: find out which backend is right and fastest on this machine."""


@app.command()
def check(
    target: Annotated[
        str | None,
        typer.Argument(
            show_default=False,
            help="A backend's name, or package.module:function for anyone's function of logits [N, V] and labels [N], which "
            "may lie in the current directory. Without it, every backend is checked.",
        ),
    ] = None,
    signature: Annotated[
        str | None,
        typer.Option(
            show_default=False,
            help="What the function takes, if not (logits, labels): the arguments of a call, such as "
            "\"labels, logits, temp=temperature, reduction='none'\". logits, labels, temperature, ignore_index, "
            "return_entropy, masked_logits, inplace_backward and out_dtype stand for their values; logits[None] and "
            "labels[None] add a batch dimension.",
        ),
    ] = None,
    returns: Annotated[
        Returned, typer.Option(help="What the function's numbers are: log-probabilities, or losses.")
    ] = Returned.log_prob,
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
    """Check sign, values and gradient of backends, or of anyone's function, against float64 on this machine.

    What is wrong is told with its likely cause.
    """
    reports: list[CheckReport] = []
    unavailable: dict[str, str] = {}
    with reported_errors():
        if device is Device.cuda and not torch.cuda.is_available():
            raise InputError("got --device cuda; torch sees no CUDA or ROCm device here. Use --device cpu.")
        device_type = None if device is None else device.value
        subjects: list[str | Callable[..., Any]] = [*backends()] if target is None else [subject_of(target)]
        for subject in subjects:
            try:
                with busy(f"checking {target or subject}"):
                    report = check_backend(
                        subject,
                        ignore_index=ignore_index,
                        device=device_type,
                        seed=seed,
                        signature=signature,
                        returns=returns.value,
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


@app.command()
def profile(
    preset: Annotated[
        str, typer.Option(help=f"{', '.join(profiling.PRESETS)}: the grid, of which the next options replace parts.")
    ] = "standard",
    vocab: Vocab = None,
    rows: Rows = None,
    dtype: Dtype = None,
    mode: Mode = None,
    backend: Annotated[
        list[str] | None,
        typer.Option(
            show_default=False,
            help="Measure only these, beside eager: names, or package.module:Class of your own. By default all.",
        ),
    ] = None,
    device: Where = None,
    budget: Annotated[
        float, typer.Option(min=1.0, help="Seconds for each problem; fewer rows are timed where it would take longer.")
    ] = PROFILE_BUDGET_S,
    out: Annotated[
        Path | None, typer.Option(show_default=False, help="Folder to store in; by default the user's profiles.")
    ] = None,
    again: Annotated[bool, typer.Option("--again", help="Measure also what is stored there already.")] = False,
    progress: Annotated[
        str, typer.Option(help="bar, jsonl (events on standard output, one a line, and no table), or none.")
    ] = "bar",
    as_json: AsJson = False,
) -> None:
    """Measure which backend is fastest for a grid of problems, store it, and show the winners.

    What is finished is stored, also if you interrupt it; what is stored already is not measured again.
    """
    with reported_errors():
        where = device_of(device)
        problems = profiling.grid(
            where.type,
            preset,
            vocabs=[profiling.vocab_of(text) for text in split(vocab)],
            rows=[profiling.rows_of(text) for text in split(rows)],
            dtypes=[profiling.dtype_of(text) for text in split(dtype)],
            modes=[profiling.mode_of(text) for text in split(mode)],
        )
        problems = list(dict.fromkeys(map(bucket, problems)))
        names = [backend_name_of(text) for text in split(backend)] or None
        store = user_store() if out is None else Store(out)
        shown = progress_of(progress, as_json)
        found, interrupted = _profile(problems, where, store, names, budget, again, shown)
    decided = [one for one in found if isinstance(one, Decision)]
    fingerprint = fingerprint_of(where)
    stored = sum((store.read(fingerprint, one.problem) or {}).get("seed") == one.seed for one in decided)
    failed = [str(one) for one in found if not isinstance(one, Decision)]
    if as_json:
        print_json(
            {
                "decisions": [one.to_dict() for one in decided],
                "stored": stored,
                "failed": failed,
                "interrupted": interrupted,
            }
        )
    elif progress != "jsonl":
        if decided:
            print_decisions(f"Winners on {where}, environment {fingerprint}", [(d, "") for d in decided])
        for reason in failed:
            print_line(f"not decided: {reason}")
        print_line(f"{len(decided)} of {len(problems)} problems decided, {stored} of them stored in {store.root}")
    if interrupted:
        raise typer.Exit(INTERRUPTED)
    if stored < len(problems):
        raise typer.Exit(COULD_NOT_RUN)
    wrong = any(candidate.outcome == "wrong" for one in decided for candidate in one.candidates.values())
    raise typer.Exit(WRONG if wrong else PASSED)


@app.command()
def explain(
    vocab: Annotated[str, typer.Option(help="V: a number or a model's name.")] = "qwen3",
    rows: Annotated[str, typer.Option(help="N: how many positions.")] = "512",
    dtype: Annotated[str, typer.Option(help="Of the logits: float32, bfloat16 or float16.")] = "bfloat16",
    mode: Annotated[str, typer.Option(help="forward, backward, inplace or entropy.")] = "backward",
    labels_per_row: Annotated[int, typer.Option(min=1, help="K.")] = 1,
    temperature: Annotated[str, typer.Option(help="none, number or per_token.")] = "none",
    masked: Annotated[bool, typer.Option("--masked", help="Whole regions of the vocabulary are -inf.")] = False,
    layout: Annotated[str, typer.Option(help="flat, rows or other.")] = "flat",
    device: Where = None,
    as_json: AsJson = False,
) -> None:
    """Say which backend serves a problem here, why, and what became of the others. Nothing is measured."""
    with reported_errors():
        where = device_of(device)
        asked = Problem(
            where.type,
            profiling.rows_of(rows),
            profiling.vocab_of(vocab),
            profiling.dtype_of(dtype),
            labels_per_row=labels_per_row,
            temperature=one_of(temperature, "temperature", get_args(Temperature)),
            masked_logits=masked,
            layout=one_of(layout, "layout", get_args(Layout)),
            **MODES[profiling.mode_of(mode)],
        )
        explanation = explain_problem(as_it_lies(asked), where, policy())
    if as_json:
        print_json(explanation.to_dict())
    else:
        print_line(str(explanation))


@app.command()
def show(
    store: Annotated[
        Path | None,
        typer.Option(show_default=False, help="Folder of profiles; by default all that are used, each shape once."),
    ] = None,
    every: Annotated[
        bool, typer.Option("--all", help="Also those of other environments, which are not used on this machine.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show the stored decisions: winner, speed-up, memory, sign check and share of bandwidth of each problem."""
    with reported_errors():
        where = stores() if store is None else {str(store): Store(store)}
        here = {environment.fingerprint() for environment in environments()}
        found: dict[tuple[str, Problem], tuple[Decision, str]] = {}
        for label, one in where.items():
            for environment, problem, _ in one.records():
                if every or environment in here:
                    decision = decisions.decision_in(one, environment, problem)
                    if decision is not None:
                        found.setdefault((environment, problem), (decision, label))
    if as_json:
        print_json(
            {
                "decisions": [
                    {"environment_fingerprint": environment, "from": label, **decision.to_dict()}
                    for (environment, _), (decision, label) in found.items()
                ]
            }
        )
        return
    for environment in dict.fromkeys(environment for environment, _ in found):
        rows = [value for key, value in found.items() if key[0] == environment]
        rows.sort(
            key=lambda row: (
                row[0].problem.vocab,
                short_name(row[0].problem.dtype),
                *row[0].problem[6:],
                row[0].problem.rows,
            )
        )
        print_decisions(f"Environment {environment}{'' if environment in here else ', not this machine'}", rows)
    if not found:
        print_line("No decisions are stored for this machine. `compiled-logprobs profile` measures some.")


add_to(app)  # here, for the order in which help lists them


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
        print_json(
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
        print_environment(environment)
    print_line(f"C++ compiler, for torch.compile on the CPU: {compiler or 'none found'}")
    table = new_table("Backends", "backend", "problem", "can run")
    for name, problem, reason in answers:
        table.add_row(name, Text(str(problem)), "yes" if reason is None else Text(f"no: {reason}"))
    console().print(table)


@app.command()
def inspect(
    arch: Annotated[
        str | None,
        typer.Option(
            show_default=False,
            help=f"What to compile for: {', '.join(dict.fromkeys(one.arch for one in GPUS))}; by default that of --gpu.",
        ),
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            show_default=False,
            help=f"Whose data sheet to use: {', '.join(one.name for one in GPUS)}; by default the first of the arch, or H100.",
        ),
    ] = None,
    rows: Annotated[str, typer.Option(help="N: how many positions.")] = "8192",
    vocab: Annotated[str, typer.Option(help="V: a number or a model's name.")] = "151936",
    dtype: Annotated[str, typer.Option(help="Of the logits: float32, bfloat16 or float16.")] = "bfloat16",
    grad: Annotated[bool, typer.Option("--grad", help="Backward as well.")] = False,
    entropy: Annotated[bool, typer.Option("--entropy", help="With the entropy.")] = False,
    inplace: Annotated[
        bool, typer.Option("--inplace", help="Backward as well, with the gradient over the logits.")
    ] = False,
    labels_per_row: Annotated[int, typer.Option(min=1, help="K.")] = 1,
    as_json: AsJson = False,
) -> None:
    """Show what the compiled backend does on a GPU, from the code generated for it. Needs no GPU; nothing is measured."""
    with reported_errors():
        described = gpu_for(arch, gpu)
        problem = Problem(
            "cuda",
            profiling.rows_of(rows),
            profiling.vocab_of(vocab),
            profiling.dtype_of(dtype),
            labels_per_row=labels_per_row,
            needs_grad=grad or inplace,
            entropy=entropy,
            inplace_backward=inplace,
        )
        with busy(f"generating and assembling kernels for {described.arch}"):
            found = inspection.inspect(problem, described)
    if as_json:
        print_json(found.to_dict())
    else:
        print_inspection(found)


cli_dashboard.add_to(app)


def _sample_problems(found: list[Environment]) -> list[Problem]:
    device_types = dict.fromkeys(environment.device_type for environment in found)
    return [
        Problem(device_type, SAMPLE_ROWS, SAMPLE_VOCAB, dtype, needs_grad=True)
        for device_type in device_types
        for dtype in (torch.float32, torch.bfloat16)
    ]


def _profile(
    problems: list[Problem],
    where: torch.device,
    store: Store,
    names: list[str] | None,
    budget: float,
    again: bool,
    shown: Progress,
) -> tuple[list[Decision | LogProbsError], bool]:
    """What came of each problem, and whether it was interrupted before the last."""
    found: list[Decision | LogProbsError] = []
    began = time.monotonic()
    with shown:
        shown.start(problems, str(where), fingerprint_of(where))
        try:
            for one in tune_all(
                problems, where, store=store, names=names, budget_s=budget, again=again, on_event=shown.event
            ):
                found.append(one)
                shown.result(one)
        except KeyboardInterrupt:
            shown.end(len(found), time.monotonic() - began, interrupted=True)
            return found, True
        shown.end(len(found), time.monotonic() - began, interrupted=False)
    return found, False
