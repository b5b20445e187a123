"""Log-probabilities from hidden states beside what people use today: `python -m benchmarks.hidden`, from a checkout.

All take turns in one process, on the same tensors, and the ratios are those of one round.
"""

import json
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Annotated, Any

import torch
import typer
from rich.text import Text
from torch import Tensor
from torch.nn import functional

from compiled_logprobs import autotune, log_probs_from_hidden, tune
from compiled_logprobs.backends import backends, why_not
from compiled_logprobs.cli.output import Column, print_line, print_table
from compiled_logprobs.decision import PLAIN
from compiled_logprobs.machine.clock import MIB, extra_peak_bytes, flush_cache
from compiled_logprobs.operation.plain import plain_from_hidden
from compiled_logprobs.problem import Problem, bucket
from compiled_logprobs.tuning import presets

TORCH = "F.linear_cross_entropy"
PRODUCT = "the product itself"
AUTO, OFF = "auto", "auto, off"
BESIDE, WITHIN_LIMIT, FORWARD, HALF_IGNORED = 1.05, 1.25, 1.1, 0.6
"""At most, as many times as long: as the fastest of plain torch and torch's own function; the same under a limit; as
the product, forward alone, by chunks; with half of the rows ignored, as with none."""
MORE_ROWS = 8
"""How many times the rows extra memory is measured with, too."""

Call = Callable[[], Any]
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def hidden(
    rows: Annotated[int, typer.Option(help="N.")] = 512,
    size: Annotated[int, typer.Option("--hidden", help="H.")] = 1024,
    vocab: Annotated[int, typer.Option(help="V.")] = 151936,
    dtype: Annotated[list[str] | None, typer.Option(show_default=False, help="By default float32, bfloat16.")] = None,
    rounds: Annotated[int, typer.Option(min=2, help="For each comparison.")] = 7,
    measured: Annotated[bool, typer.Option("--tune/--no-tune", help="Whether to decide for auto first.")] = True,
    json_file: Annotated[Path | None, typer.Option("--json", show_default=False, help="File for all figures.")] = None,
) -> None:
    """Time log_probs_from_hidden by auto and by each backend's name, with and without a limit of memory, on a CPU."""
    figures: list[dict[str, Any]] = []
    for name in dtype or ["float32", "bfloat16"]:
        figures += _figures(Problem("cpu", rows, vocab, presets.dtype_of(name), hidden=size), rounds, measured)
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps({"threads": torch.get_num_threads(), "figures": figures}, indent=2) + "\n")


def _figures(forward: Problem, rounds: int, measured: bool) -> list[dict[str, Any]]:
    """All of one dtype, printed as they are known."""
    problem = forward._replace(needs_grad=True, weight_grad=True)
    limited = problem._replace(memory_limit=problem.rows * problem.vocab)
    limited = limited if _able(limited) else limited._replace(memory_limit=2**25)  # where the logits are small
    if measured:
        for one in (problem, limited, forward):
            if bucket(one).rows * one.vocab >= 2**20:
                (decision,) = tune([one])
                print_line(f"{one}, {one.details() or 'forward'}: {decision.chosen} ({decision.reason})")
    at, half = _Arguments(problem), _Arguments(problem, ignored=0.5)
    beside: dict[str, Call] = {PLAIN: at.plain}
    if hasattr(functional, "linear_cross_entropy"):
        beside[TORCH] = at.torch
    shared = dict(at.calls(problem))
    both = dict.fromkeys((AUTO, OFF), BESIDE)
    found = _compare("forward + backward", problem, {**beside, **shared}, rounds, beside, both)
    within = dict(at.calls(limited))
    what = f"within {limited.memory_limit / MIB:.0f} MiB" if limited.memory_limit else ""
    found += _compare(what, problem, {**beside, **within}, rounds, beside, dict.fromkeys((AUTO, OFF), WITHIN_LIMIT))
    alone: dict[str, Call] = {PRODUCT: at.product, **dict(at.calls(forward))}
    chunks = dict.fromkeys((name for name in alone if name.startswith("chunked")), FORWARD)
    found += _compare("forward alone", problem, alone, rounds, [PRODUCT], chunks)
    ignored: dict[str, Call] = {AUTO: shared[AUTO], "auto, half ignored": partial(half.run, AUTO, problem)}
    limits = {"auto, half ignored": HALF_IGNORED}
    found += _compare("half of the rows ignored", problem, ignored, rounds, [AUTO], limits)
    return found + _memory(problem)


def _able(problem: Problem) -> list[str]:
    return [name for name in backends(from_hidden=True) if why_not(name, problem) is None]


class _Arguments:
    """Hidden states [N, H] that make their labels [N] likely, a weight [V, H] and an upstream gradient [N]."""

    def __init__(self, problem: Problem, ignored: float = 0.0) -> None:
        n, h, v = problem.rows, problem.hidden or 1, problem.vocab
        generator = torch.Generator().manual_seed(0)
        self.labels = torch.randint(v, (n,), generator=generator)
        self.weight = torch.randn(v, h, generator=generator).to(problem.dtype)
        noise = torch.randn(n, h, generator=generator)
        states = self.weight[self.labels] * (12.0 / h) + noise * (2.0 / h**0.5)
        self.hidden = states.to(problem.dtype)
        self.labels[: int(ignored * n)] = -100
        self.upstream = torch.randn(n, generator=generator)

    def calls(self, problem: Problem) -> dict[str, Call]:
        """By auto and by the name of each backend that can."""
        return {name: partial(self.run, name, problem) for name in (AUTO, OFF, *_able(problem))}

    def run(self, name: str, problem: Problem) -> Any:
        backend, limit = "auto" if name in (AUTO, OFF) else name, problem.memory_limit
        with autotune("off" if name == OFF else "lookup"):
            return self._graded(
                lambda hidden, weight: log_probs_from_hidden(
                    hidden, weight, self.labels, memory_limit=limit, backend=backend
                ),
                problem.needs_grad,
            )

    def plain(self) -> Any:
        labels = self.labels.unsqueeze(-1)
        return self._graded(
            lambda hidden, weight: plain_from_hidden(hidden, weight, labels, None, 1.0, softcap=None)[0].squeeze(-1)
        )

    def torch(self) -> Any:
        compute = functional.linear_cross_entropy  # from 2.13 on
        return self._graded(lambda hidden, weight: -compute(hidden, weight, self.labels, reduction="none"))

    def product(self) -> Tensor:
        return functional.linear(self.hidden, self.weight)

    def _graded(self, function: Callable[[Tensor, Tensor], Any], needs_grad: bool = True) -> Any:
        """Its result and, with a gradient, those of hidden states and weight."""
        hidden, weight = (x.detach().requires_grad_(needs_grad) for x in (self.hidden, self.weight))
        result = function(hidden, weight)
        if not needs_grad:
            return result
        return result, torch.autograd.grad(result, [hidden, weight], self.upstream.to(result.dtype))


def _compare(
    what: str, problem: Problem, calls: dict[str, Call], rounds: int, others: Any, limits: dict[str, float]
) -> list[dict[str, Any]]:
    """The figures of each call beside the fastest of `others`."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for count in range(rounds + 1):
        for name, call in random.sample(list(calls.items()), len(calls)):
            flush_cache("cpu")
            began = perf_counter()
            result = call()
            taken = perf_counter() - began
            del result
            if count:  # the first round compiles, checks and chooses
                seconds[name].append(taken)
    best = min(others, key=lambda name: median(seconds[name]))
    figures = [
        {
            "what": what,
            "problem": str(problem),
            "name": name,
            "seconds": median(times),
            "times_as_long": median(mine / other for mine, other in zip(times, seconds[best], strict=True)),
            "against": best,
            "limit": limits.get(name),
        }
        for name, times in seconds.items()
    ]
    table = [
        (
            *(str(one["name"]), f"{one['seconds']:.3f}", f"{one['times_as_long']:.3f}"),
            *("" if one["limit"] is None else f"{one['limit']:.2f}", _met(one)),
        )
        for one in figures
    ]
    numbers = [Column(name, right=True) for name in ("s", f"x {best}", "at most")]
    title = f"{problem}: {what}, {torch.get_num_threads()} threads"
    print_table(title, ["candidate", *numbers, "met"], table)
    return figures


def _met(figure: dict[str, Any]) -> Text:
    if figure["limit"] is None:
        return Text("")
    return Text("yes", "green") if figure["times_as_long"] <= figure["limit"] else Text("no", "bold red")


def _memory(problem: Problem) -> list[dict[str, Any]]:
    """What each takes beside arguments, results and gradients, with its rows and with `MORE_ROWS` times as many."""
    figures: list[dict[str, Any]] = []
    for rows in (problem.rows, MORE_ROWS * problem.rows):
        asked = problem._replace(rows=rows)
        at = _Arguments(asked)
        returned = (at.hidden.numel() + at.weight.numel()) * problem.dtype.itemsize + rows * 4
        for name in _able(asked):
            if not name.startswith("chunked") and rows > problem.rows:
                continue  # all logits at once, of so many rows
            call = partial(at.run, name, asked)
            call()
            peak = extra_peak_bytes(call, "cpu")
            taken = None if peak is None else max(0, peak - returned)
            figures.append({"what": "memory", "problem": str(asked), "name": name, "rows": rows, "extra_bytes": taken})
    table = [
        (str(one["rows"]), str(one["name"]), "" if one["extra_bytes"] is None else f"{one['extra_bytes'] / MIB:.0f}")
        for one in figures
    ]
    columns: list[Column | str] = [Column("rows", right=True), "candidate", Column("MiB", right=True)]
    print_table(f"{problem}: extra memory, forward + backward", columns, table)
    return figures


if __name__ == "__main__":
    app(prog_name="python -m benchmarks.hidden")
