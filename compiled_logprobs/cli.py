"""The command line: reads arguments, calls the library, prints what it returns.

Exit codes: 0 passed; 1 something is wrong; 2 it could not run, and standard error says why; 130 interrupted.
"""

import contextlib
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from enum import Enum
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, get_args

import torch
import typer
from rich.console import Console
from rich.text import Text

from compiled_logprobs import decisions, inspection, profiling
from compiled_logprobs.backends import backends, register_backend, why_not
from compiled_logprobs.backends.base import Backend
from compiled_logprobs.data_sheets import GPUS, gpu_for
from compiled_logprobs.environment import Environment, cpp_compiler_version, environments, without_paths
from compiled_logprobs.errors import BackendUnavailable, InputError, LogProbsError
from compiled_logprobs.explanation import explain_problem
from compiled_logprobs.policy import policy
from compiled_logprobs.printing import (
    console,
    new_table,
    print_decisions,
    print_environment,
    print_inspection,
    print_json,
    print_line,
    print_report,
)
from compiled_logprobs.problem import Layout, Problem, Temperature, as_it_lies, short_name
from compiled_logprobs.progress import Bar, JsonLines, Progress, Silence
from compiled_logprobs.records import Decision
from compiled_logprobs.store import Store, stores, user_store
from compiled_logprobs.tuning.gate import CheckReport, check_backend
from compiled_logprobs.tuning.serving import tune_all

PASSED, WRONG, COULD_NOT_RUN, INTERRUPTED = 0, 1, 2, 130
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


Vocab = Annotated[
    list[str] | None,
    typer.Option(
        show_default=False,
        help=f"V: a number or a model ({', '.join(profiling.MODELS)}). Options like this one take several, as often as you "
        "name them or with commas.",
    ),
]
Rows = Annotated[list[str] | None, typer.Option(show_default=False, help="N: how many positions.")]
Dtype = Annotated[
    list[str] | None, typer.Option(show_default=False, help="Of the logits: float32, bfloat16 or float16.")
]
Mode = Annotated[
    list[str] | None,
    typer.Option(
        show_default=False,
        help="forward; backward (forward and backward); inplace (the gradient over the logits); entropy (forward with it).",
    ),
]
Where = Annotated[
    str | None,
    typer.Option("--device", show_default=False, help="cpu, cuda, cuda:1, ...; by default the GPU if there is one."),
]


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
    with _reported_errors():
        where = _device(device)
        problems = profiling.grid(
            where.type,
            preset,
            vocabs=[profiling.vocab_of(text) for text in _split(vocab)],
            rows=[profiling.rows_of(text) for text in _split(rows)],
            dtypes=[profiling.dtype_of(text) for text in _split(dtype)],
            modes=[profiling.mode_of(text) for text in _split(mode)],
        )
        problems = list(dict.fromkeys(map(decisions.bucket, problems)))
        names = [_backend_name(text) for text in _split(backend)] or None
        store = user_store() if out is None else Store(out)
        shown = _progress(progress, as_json)
        found, interrupted = _profile(problems, where, store, names, budget, again, shown)
    decided = [one for one in found if isinstance(one, Decision)]
    fingerprint = decisions.fingerprint_of(where)
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
    with _reported_errors():
        where = _device(device)
        asked = Problem(
            where.type,
            profiling.rows_of(rows),
            profiling.vocab_of(vocab),
            profiling.dtype_of(dtype),
            labels_per_row=labels_per_row,
            temperature=_one_of(temperature, "temperature", get_args(Temperature)),
            masked_logits=masked,
            layout=_one_of(layout, "layout", get_args(Layout)),
            **profiling.MODES[profiling.mode_of(mode)],
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
    with _reported_errors():
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
    with _reported_errors():
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
        with _busy(f"generating and assembling kernels for {described.arch}"):
            found = inspection.inspect(problem, described)
    if as_json:
        print_json(found.to_dict())
    else:
        print_inspection(found)


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
    except BrokenPipeError:  # whoever read the output has gone, and what is still to be flushed has nowhere to go
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(INTERRUPTED) from None
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
        shown.start(problems, str(where), decisions.fingerprint_of(where))
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


def _progress(kind: str, as_json: bool) -> Progress:
    kinds: dict[str, type[Progress]] = {"bar": Bar, "jsonl": JsonLines, "none": Silence}
    if kind not in kinds:
        raise InputError(f"got --progress {kind}; {', '.join(kinds)} are valid. Name one of them.")
    if kind == "jsonl" and as_json:
        raise InputError(
            "got --progress jsonl and --json, which both write to standard output; one is valid. Leave one out."
        )
    return kinds[kind]()


def _split(texts: list[str] | None) -> list[str]:
    parts = [part.strip() for text in texts or [] for part in text.split(",")]
    if not all(parts):
        raise InputError(
            f"got {', '.join(map(repr, texts or []))}, in which a value is empty; e.g. 64,512 is valid. Fill it in."
        )
    return parts


def _backend_name(text: str) -> str:
    subject = _subject(text)
    if not isinstance(subject, str):
        raise InputError(f"got --backend {text}, which is a function; a Backend is valid. `check` takes functions.")
    return subject


def _one_of(text: str, what: str, valid: tuple[str, ...]) -> Any:
    if text not in valid:
        raise InputError(f"got {what} {text!r}; {', '.join(valid)} are valid. Name one of them.")
    return text


def _device(text: str | None) -> torch.device:
    """The device that was asked for, if it is here; by default the accelerator, else the CPU."""
    if text is None:
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(text)
    except RuntimeError as error:
        raise InputError(f"got --device {text}; cpu, cuda or cuda:0 is valid. Name one of them.") from error
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type != "cuda":
        raise InputError(f"got --device {text}; profiles are measured on cpu and cuda. Name one of them.")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if (device.index or 0) >= count:
        raise InputError(
            f"got --device {text}; torch sees {count} CUDA or ROCm devices here. Use one of them, or --device cpu."
        )
    return torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
