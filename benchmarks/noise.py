"""How far a choice can be trusted where it was measured under noise: `python -m benchmarks.noise`, from a checkout.

Each tune is that of a fresh process with an empty store, while another process keeps one core busy in bursts. When the
noise has ended, all backends take turns, and the choices are held against the best of them. `--json FILE` adds a line a
tune to those that are there, and judges all of them: so many tunes can be had in parts.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer

from compiled_logprobs import backends
from compiled_logprobs.backends import get_backend, why_not
from compiled_logprobs.cli.output import Column, print_table
from compiled_logprobs.problem import Problem
from compiled_logprobs.store.files import ROOT_VARIABLE
from compiled_logprobs.tuning.rounds import Measurement

LIMIT = 1.1
"""Times as long as the best backend, what a choice may take."""
BURSTS = """
import os, random, sys, threading, time

def end():
    sys.stdin.read()
    os._exit(0)

threading.Thread(target=end, daemon=True).start()
while True:
    ends = time.monotonic() + random.uniform(0.02, float(sys.argv[1]))
    while time.monotonic() < ends:
        pass
    time.sleep(random.uniform(0.02, float(sys.argv[1])))
"""
"""A program that is busy and idle in turn, for up to so many seconds each, until whoever holds its input has ended."""
TUNE = """
import json, sys, torch
from compiled_logprobs import Problem, tune
rows, vocab, budget = sys.argv[1:]
problem = Problem("cpu", int(rows), int(vocab), torch.float32, needs_grad=True)
(decision,) = tune([problem], budget_s=float(budget))
print(json.dumps({"chosen": decision.chosen, "code": decision.code, "reason": decision.reason}))
"""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def noise(
    tunes: Annotated[int, typer.Option(min=0, help="How many, each in a process of its own.")] = 20,
    shape: Annotated[str, typer.Option(metavar="NxV", help="In float32, with the gradient.")] = "256x151936",
    budget: Annotated[float, typer.Option(min=1, help="Seconds for the rounds of a tune.")] = 20.0,
    burst: Annotated[float, typer.Option(min=0.02, help="Seconds that a burst takes at most, and a pause.")] = 2.0,
    rounds: Annotated[int, typer.Option(min=2, help="Of all backends, after the noise.")] = 30,
    json_file: Annotated[
        Path | None, typer.Option("--json", show_default=False, help="File of a line a tune, which is added to.")
    ] = None,
) -> None:
    """Tune under noise, and count the choices that are within 1.1 times of the best backend."""
    n, _, vocab = shape.partition("x")
    asked = {"shape": shape, "budget_s": budget, "burst_s": burst}
    results = [] if json_file is None else _read(json_file, asked)
    with _bursts(burst):
        for number in range(1, tunes + 1):
            results.append({**asked, **_tune(n, vocab, budget)})
            typer.echo(f"tune {number} of {tunes}: {results[-1]['chosen']}: {results[-1]['reason']}", err=True)
            if json_file is not None:
                with json_file.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(results[-1]) + "\n")
    ratios = _ratios(Problem("cpu", int(n), int(vocab), torch.float32, needs_grad=True), rounds)
    within = sum(ratios.get(result["chosen"], LIMIT + 1) <= LIMIT for result in results)
    table = [
        (
            str(number),
            result["chosen"] or "none",
            result["code"],
            f"{ratio:.2f}" if (ratio := ratios.get(result["chosen"])) else "",
        )
        for number, result in enumerate(results, 1)
    ]
    numbers = Column("tune", right=True), Column("times the best", right=True)
    print_table(f"{shape} float32, gradient", [numbers[0], "choice", "code", numbers[1]], table)
    typer.echo(f"within {LIMIT}x of the best: {within} of {len(results)}")


def _read(file: Path, asked: dict[str, Any]) -> list[dict[str, Any]]:
    """The earlier tunes of the same kind."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    earlier: list[dict[str, Any]] = [json.loads(line) for line in lines]
    return [result for result in earlier if asked.items() <= result.items()]


@contextlib.contextmanager
def _bursts(longest: float) -> Iterator[None]:
    """Keep one core busy from time to time."""
    with subprocess.Popen([sys.executable, "-c", BURSTS, str(longest)], stdin=subprocess.PIPE) as process:
        try:
            yield
        finally:
            process.kill()


def _tune(*arguments: object) -> dict[str, Any]:
    """The choice of a fresh process with an empty store; none where it came to no decision."""
    with tempfile.TemporaryDirectory() as folder:
        ran = subprocess.run(
            [sys.executable, "-c", TUNE, *map(str, arguments)],
            env={**os.environ, ROOT_VARIABLE: folder},
            capture_output=True,
            text=True,
        )
    if ran.returncode:
        return {"chosen": None, "code": "failed", "reason": ran.stderr.strip().rpartition("\n")[2]}
    result: dict[str, Any] = json.loads(ran.stdout)
    return result


def _ratios(problem: Problem, rounds: int) -> dict[str, float]:
    """How many times as long as the best each backend takes: the median over rounds in which all take turns."""
    able = {name: get_backend(name) for name in backends() if why_not(name, problem) is None}
    measurement = Measurement(problem, able)
    for _ in measurement.rounds(rounds):
        pass
    times = measurement.times()
    best = min(times.values(), key=median)
    return {name: median(a / b for a, b in zip(series, best, strict=True)) for name, series in times.items()}


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that a tune under way ends as well
    app(prog_name="python -m benchmarks.noise")
