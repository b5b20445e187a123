"""This library beside the idioms that people use today: `python -m benchmarks.peers`, from a checkout.

One process, the same tensors, all candidates in every round. Exit codes: 0 done; 1 one of this library's own candidates
was wrong or failed; 2 it could not run, and standard error says why; 130 interrupted, and shows what was done by then.
"""

import itertools
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.text import Text

from benchmarks import chart, tables
from benchmarks.candidates import AUTO, Contender, candidates
from benchmarks.measure import measure
from benchmarks.results import COLUMNS, Cell
from benchmarks.targets import targets
from compiled_logprobs import autotune, tune
from compiled_logprobs.choose.explain import explain_problem
from compiled_logprobs.cli.output import print_environment, print_json
from compiled_logprobs.errors import InputError, LogProbsError
from compiled_logprobs.machine import clock
from compiled_logprobs.machine.environment import environment_of
from compiled_logprobs.machine.nvml import Watch, telemetry
from compiled_logprobs.policy import policy
from compiled_logprobs.problem import MODES, Problem, as_it_lies
from compiled_logprobs.tuning import presets

DONE, WRONG, COULD_NOT_RUN, INTERRUPTED = 0, 1, 2, 130
SHAPES = ("2048x32000", "512x151936", "256x151936", "256x262144", "4096x32", "1x151936")
DTYPES = ("float32", "bfloat16")
KINDS: dict[str, dict[str, Any]] = {**MODES, "entropy": {"entropy": True}}
STDOUT = "-"
PROFILE_BUDGET_S = 60.0
"""As `compiled-logprobs profile` has it."""

Several = list[str] | None

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def peers(
    shape: Annotated[
        Several,
        typer.Option(
            show_default=False,
            help=f"ROWSxVOCAB; by default {', '.join(SHAPES)}. Options like this one take several, as often as you "
            "name them or with commas.",
        ),
    ] = None,
    dtype: Annotated[Several, typer.Option(show_default=False, help=f"By default {', '.join(DTYPES)}.")] = None,
    mode: Annotated[
        Several,
        typer.Option(
            show_default=False,
            help="forward; entropy (forward with it); backward (forward and backward); inplace (the gradient over the "
            "logits: the idioms cannot, and show their ordinary backward). By default all.",
        ),
    ] = None,
    only: Annotated[Several, typer.Option(show_default=False, help="Names of candidates; by default all.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Of timing, at most; from six on there are intervals.")] = 30,
    seconds: Annotated[
        float, typer.Option(min=0, help="After which, on one problem, no further round begins, once there are six.")
    ] = 8.0,
    device: Annotated[
        str | None, typer.Option(show_default=False, help="cpu, cuda, cuda:1, ...; by default the GPU if there is one.")
    ] = None,
    tuned: Annotated[
        bool,
        typer.Option(
            "--tune/--no-tune",
            help="Measure for auto before, and store it in your profiles, as `compiled-logprobs profile` does; or "
            "leave auto to the profiles that are there.",
        ),
    ] = True,
    json_file: Annotated[
        str | None,
        typer.Option("--json", show_default=False, help="File for all figures; - prints them in place of tables."),
    ] = None,
    html: Annotated[Path | None, typer.Option(show_default=False, help="File for a chart; needs plotly.")] = None,
) -> None:
    """Measure this library beside the idioms that people use today: the same tensors, in shuffled rounds."""
    with _reported_errors():
        where = _device(device)
        problems = [
            (as_it_lies(Problem(where.type, *_shape(text), presets.dtype_of(name), **KINDS[kind])), kind)
            for text, name, kind in itertools.product(
                _split(shape) or SHAPES, _split(dtype) or DTYPES, map(_kind_of, _split(mode) or KINDS)
            )
        ]
        chosen = _chosen(_split(only))
        if html is not None:
            chart.require_plotly()
            _require_writable(html)
        if json_file not in (None, STDOUT):
            _require_writable(Path(json_file))
    provider = telemetry(where)
    with Watch(provider) as watch:
        cells, interrupted = _run(problems, chosen, where, rounds, seconds, tuned)

    seen = watch.summary()
    report = {
        "environment": environment_of(where).to_dict(),
        "settings": {"rounds": rounds, "seconds": seconds, "tuned": tuned, "threads": torch.get_num_threads()},
        "columns": COLUMNS,
        "rows": [row for cell in cells for row in cell.to_rows()],
        "targets": [{**asdict(one), "met": one.met} for one in targets(cells)],
        "telemetry": None if seen is None else asdict(seen),
        "telemetry_reason": provider.reason,
        "interrupted": interrupted,
    }
    if json_file == STDOUT:
        print_json(report)
    else:
        print_environment(environment_of(where))
        tables.print_cells(cells)
        tables.print_legend()
        tables.print_targets(targets(cells))
        if json_file is not None:
            Path(json_file).write_text(json.dumps(report, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    if html is not None and cells:
        chart.write_chart(cells, html)
    if interrupted:
        raise typer.Exit(INTERRUPTED)
    lost = any(one.ours and not one.sound for cell in cells for one in cell.results.values())
    raise typer.Exit(WRONG if lost else DONE)


def _run(
    problems: Sequence[tuple[Problem, str]],
    chosen: Sequence[Contender],
    device: torch.device,
    rounds: int,
    seconds: float,
    tuned: bool,
) -> tuple[list[Cell], bool]:
    """What came of each problem, and whether it was interrupted before the last."""
    cells: list[Cell] = []
    try:
        for number, (problem, mode) in enumerate(problems, start=1):
            _say(f"[{number}/{len(problems)}] {problem}, {mode}")
            not_tuned = _tune(problem, device) if tuned and any(one.name == AUTO for one in chosen) else None
            with autotune("lookup"):  # what auto does by itself would be in the way of the clock
                cell = measure(problem, mode, chosen, device, rounds=rounds, seconds=seconds)
                takes = explain_problem(problem, device, policy())
            auto = cell.results.get(AUTO)
            if auto is not None and auto.measured:
                auto.note = f"took {takes.backend}"
                auto.reason = f"not tuned: {not_tuned}; {takes.why}" if not_tuned else takes.why
            cells.append(cell)
    except KeyboardInterrupt:
        return cells, True
    return cells, False


def _tune(problem: Problem, device: torch.device) -> str | None:
    """Let auto decide, unless a profile of the user's has it already; returns why it could not."""
    try:
        tune(problem, device=device, budget_s=PROFILE_BUDGET_S)
    except LogProbsError as error:
        return str(error)
    return None


def _shape(text: str) -> tuple[int, int]:
    rows, x, vocab = text.partition("x")
    if not x:
        raise InputError(f"got --shape {text!r}; ROWSxVOCAB is valid, e.g. {SHAPES[1]} or 512xqwen3. Correct it.")
    return presets.rows_of(rows), presets.vocab_of(vocab)


def _chosen(names: Sequence[str]) -> list[Contender]:
    contenders = candidates()
    unknown = [name for name in names if name not in contenders]
    if unknown:
        raise InputError(f"got --only {unknown[0]}; {', '.join(contenders)} are valid. Name some of them.")
    return [one for name, one in contenders.items() if not names or name in names]


def _device(text: str | None) -> torch.device:
    name = text or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        raise InputError(f"got --device {name}, which torch cannot use here; cpu is always valid. Use it.") from error
    return clock.measurable(device)


def _require_writable(file: Path) -> None:
    """Before hours of measuring, and not after."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.open("a").close()
    except OSError as error:
        raise InputError(f"got the file {file}, which cannot be written: {error}. Name another one.") from error


def _kind_of(text: str) -> str:
    if text not in KINDS:
        raise InputError(f"got mode {text!r}; {', '.join(KINDS)} are valid. Name one of them.")
    return text


def _split(texts: Several) -> list[str]:
    return [part.strip() for text in texts or [] for part in text.split(",")]


def _say(text: str) -> None:
    Console(stderr=True).print(Text(text), soft_wrap=True)


@contextmanager
def _reported_errors() -> Iterator[None]:
    try:
        yield
    except LogProbsError as error:
        _say(f"{type(error).__name__}: {error}")
        raise typer.Exit(COULD_NOT_RUN) from None


if __name__ == "__main__":
    app(prog_name="python -m benchmarks.peers")
