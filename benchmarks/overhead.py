"""What a small call costs beside plain `log_softmax` and `gather`: `python -m benchmarks.overhead`, from a checkout.

On a CPU, in float32, warm: all take turns in one process, on the same tensors, and the ratios are those of one round.
"""

import json
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter_ns
from typing import Annotated, Any

import torch
import typer
from rich.text import Text
from torch import Tensor

from benchmarks.idioms import log_softmax_gather
from compiled_logprobs import autotune, backends, log_probs_from_logits
from compiled_logprobs.backends import get_backend, why_not
from compiled_logprobs.cli.output import Column, print_table
from compiled_logprobs.decision import PLAIN
from compiled_logprobs.problem import Problem

LIMITS = {(8, 4096): (2.5, 2.0), (64, 4096): (2.5, 2.0), (4096, 32): (1.5, 1.5), (1, 151936): (1.0, 1.0)}
"""By N and V: how many times as long as plain torch `auto` may take, forward, and forward and backward."""
BEHIND_US, BEFORE_US = 15.0, 15.0
"""What `auto` may take beyond the best backend by name; and before the kernel, where torch makes no graph."""
REPEATS = 3
"""Timed calls of each in a round, after one that is not; their median counts."""
CALLS = 1000
"""Whose median is the time before the kernel."""
AUTO = {"auto": "lookup", "auto, off": "off"}
"""By name: the mode."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def overhead(
    shape: Annotated[
        list[str] | None, typer.Option(metavar="NxV", show_default=False, help="By default the four with a target.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=2, help="For each shape and direction.")] = 200,
    only: Annotated[list[str] | None, typer.Option(show_default=False, help="Backends to time by name.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", show_default=False, help="File for all figures.")] = None,
) -> None:
    """Time small calls by auto and by each backend's name beside plain log_softmax and gather, on this CPU."""
    shapes = [(int(n), int(vocab)) for n, _, vocab in (text.partition("x") for text in shape or ())] or list(LIMITS)
    names = backends() if only is None else only
    rows = [row for at in shapes for grad in (False, True) for row in _rows(*at, grad, names, rounds)]
    _print(rows)
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps({"threads": torch.get_num_threads(), "rows": rows}, indent=2) + "\n")


def _rows(n: int, vocab: int, grad: bool, names: list[str], rounds: int) -> list[dict[str, Any]]:
    """The figures of one shape and direction."""
    logits, labels = torch.randn(n, vocab, requires_grad=grad), torch.randint(vocab, (n,))
    able = [name for name in names if why_not(name, Problem("cpu", n, vocab, torch.float32, needs_grad=grad)) is None]
    by_name = {name: partial(log_probs_from_logits, logits, labels, backend=name) for name in able}
    calls: dict[str, Callable[[], Any]] = {
        PLAIN: lambda: log_softmax_gather(logits, labels, False)[0],
        **dict.fromkeys(AUTO, partial(log_probs_from_logits, logits, labels)),
        **by_name,
    }
    micros = _times(calls, logits, torch.rand(n) if grad else None, rounds)
    limit = LIMITS.get((n, vocab), (None, None))[grad]
    rows: list[dict[str, Any]] = []
    for name, times in micros.items():
        row: dict[str, Any] = {"rows": n, "vocab": vocab, "gradient": grad, "name": name, "us": median(times)}
        row["times_as_long_as_plain"] = median(mine / plain for mine, plain in zip(times, micros[PLAIN], strict=True))
        if name in AUTO:
            best = min((median(micros[other]), other) for other in able)[1] if able else PLAIN
            row |= {"limit": limit, "best": best}
            row["us_behind_best"] = median(mine - other for mine, other in zip(times, micros[best], strict=True))
            row["us_before_the_kernel"] = _before_the_kernel(logits, labels, AUTO[name])
        rows.append(row)
    return rows


def _times(
    calls: dict[str, Callable[[], Any]], logits: Tensor, upstream: Tensor | None, rounds: int
) -> dict[str, list[float]]:
    """Microseconds by name and round."""

    def run(call: Callable[[], Any]) -> float:
        began = perf_counter_ns()
        result = call()
        if upstream is not None:
            torch.autograd.grad(result, logits, upstream)
        return (perf_counter_ns() - began) / 1e3

    micros: dict[str, list[float]] = {name: [] for name in calls}
    for count in range(rounds + 1):
        for name, call in random.sample(list(calls.items()), len(calls)):
            with autotune(AUTO.get(name, "lookup")):  # type: ignore[arg-type]  # a mode
                run(call)
                taken = median(run(call) for _ in range(REPEATS))
            if count:  # the first round compiles
                micros[name].append(taken)
    return micros


def _before_the_kernel(logits: Tensor, labels: Tensor, mode: str) -> float:
    """Microseconds from the call to the backend's forward, whichever `auto` takes: the median of `CALLS`."""
    began, reached = 0, []

    def noted(forward: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            reached.append((perf_counter_ns() - began) / 1e3)
            return forward(*arguments)

        return call

    able = [get_backend(name) for name in backends() if why_not(name, Problem("cpu", 1, 2, torch.float32)) is None]
    for backend in able:
        backend.forward = noted(backend.forward)  # type: ignore[method-assign]
    try:
        with autotune(mode):  # type: ignore[arg-type]  # a mode
            for _ in range(CALLS):
                began = perf_counter_ns()
                log_probs_from_logits(logits, labels)
    finally:
        for backend in able:
            del backend.forward  # of the instance, before the class's
    return median(reached)


def _print(rows: list[dict[str, Any]]) -> None:
    table: list[tuple[str | Text, ...]] = []
    for row in rows:
        limit, behind, before = (row.get(key) for key in ("limit", "us_behind_best", "us_before_the_kernel"))
        within = [
            *([] if limit is None else [row["times_as_long_as_plain"] <= limit]),
            *([] if behind is None else [behind <= BEHIND_US]),
            *([] if before is None or row["gradient"] else [before <= BEFORE_US]),
        ]
        table.append(
            (
                *(f"{row['rows']} x {row['vocab']}", "forward + backward" if row["gradient"] else "forward"),
                *(row["name"], f"{row['us']:.1f}", f"{row['times_as_long_as_plain']:.2f}"),
                *("" if limit is None else f"{limit:.2f}", "" if before is None else f"{before:.1f}"),
                "" if behind is None else f"{behind:+.1f} ({row['best']})",
                Text("yes", "green") if all(within) and within else Text("no", "bold red") if within else "",
            )
        )
    numbers = [Column(name, right=True) for name in ("us", "x plain", "at most", "us before the kernel")]
    print_table(
        f"Small calls, {torch.get_num_threads()} threads",
        ["shape", "direction", "candidate", *numbers, "us behind the best", "met"],
        table,
    )


if __name__ == "__main__":
    app(prog_name="python -m benchmarks.overhead")
