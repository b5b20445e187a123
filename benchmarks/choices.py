"""How far the autotuner's choices can be trusted on this machine: `python -m benchmarks.choices`, from a checkout.

Three questions, each answered by real measurements: do identical candidates tie; is a candidate found that is a little
faster; and do two tunes of the same problem agree, with what regret against an exhaustive search. Nothing is stored
outside of a temporary folder.
"""

import json
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from compiled_logprobs import backends
from compiled_logprobs.backends import get_backend, why_not
from compiled_logprobs.backends.base import Backend
from compiled_logprobs.backends.eager import Eager
from compiled_logprobs.choose.tune import tune_all
from compiled_logprobs.operation.contract import Inputs, Results, Wanted
from compiled_logprobs.problem import Problem, as_it_lies
from compiled_logprobs.store.files import Store
from compiled_logprobs.tuning.rounds import Measurement
from compiled_logprobs.tuning.statistics import LOOKS, Selection, select
from compiled_logprobs.tuning.tuner import TuningFailed

CPU = torch.device("cpu")
SMALL = Problem("cpu", 512, 4096, torch.float32)
"""So fast that hundreds of tunes take minutes, and so many logits that the work and not the call counts."""
EXTRA = 0.02
"""Of its rows, what the slowed baseline computes twice; with the second call it takes some 5 % longer."""
PROBLEMS = [
    as_it_lies(Problem("cpu", rows, vocab, dtype, needs_grad=grad))
    for rows, vocab in ((64, 151936), (2048, 4096), (256, 32000))
    for dtype in (torch.float32, torch.bfloat16)
    for grad in (False, True)
]
LEAST_ROUNDS = 60
"""Of the exhaustive search, whose medians are taken for the truth."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class Slowed(Eager):
    """The baseline with some rows more to compute."""

    def forward(self, inputs: Inputs, wanted: Wanted) -> Results:
        more = max(1, round(EXTRA * len(inputs.logits)))
        super().forward(inputs._replace(logits=inputs.logits[:more], labels=inputs.labels[:more]), wanted)
        return super().forward(inputs, wanted)


@app.command()
def choices(
    seeds: Annotated[
        int, typer.Option(min=0, help="Of the tunes of identical candidates, and of one a little faster.")
    ] = 100,
    budget: Annotated[float, typer.Option(min=1, help="Seconds for a tune of each of the twelve problems.")] = 20.0,
    json_file: Annotated[Path | None, typer.Option("--json", show_default=False, help="File for all figures.")] = None,
) -> None:
    """Measure how far the autotuner's choices can be trusted on this machine."""
    say = Console().print
    report: dict[str, Any] = {"seeds": seeds}
    if seeds:
        same = [_choose({"eager": Eager(), "a": Eager(), "b": Eager()}, seed) for seed in range(seeds)]
        ties = sum(all(v.outcome != "slower" for v in one.verdicts.values()) for one in same)
        report["identical"] = {"ties": ties, "baseline": sum(one.chosen == "eager" for one in same)}
        say(f"identical candidates: a tie in {ties} of {seeds}, the baseline kept in {report['identical']['baseline']}")

        faster = [_choose({"eager": Slowed(), "a": Eager(), "b": Slowed()}, seed) for seed in range(seeds)]
        winners = Counter(one.chosen for one in faster)
        speedups = [one.verdicts["a"].speedup for one in faster]
        speedup = median(each.median for each in speedups if each is not None)
        report["a little faster"] = {"found": winners["a"], "speedup": speedup, "chosen": dict(winners)}
        say(f"one that is {speedup:.3f}x as fast: found in {winners['a']} of {seeds}; chosen: {dict(winners)}")

    with tempfile.TemporaryDirectory() as folder:
        tunes = [_tune(Store(Path(folder, name)), budget) for name in ("first", "second")]
    rows: list[dict[str, Any]] = []
    for problem in PROBLEMS:
        chosen = [tune.get(problem) for tune in tunes]
        seconds = _exhaustive(problem)
        best = min(seconds, key=lambda name: seconds[name])
        regrets = [seconds[name] / seconds[best] - 1 if name else None for name in chosen]
        rows.append(
            {"problem": str(problem), "details": problem.details(), "chosen": chosen, "best": best, "regrets": regrets}
        )
        say(f"{problem}{', gradient' if problem.needs_grad else ''}: {chosen}, best {best}, regret {regrets}")
    all_regrets: list[float] = [regret for row in rows for regret in row["regrets"] if regret is not None]
    report |= {
        "problems": rows,
        "agree": sum(row["chosen"][0] == row["chosen"][1] is not None for row in rows),
        "median_regret": median(all_regrets),
        "worst_regret": max(all_regrets),
    }
    say(
        f"two tunes agree in {report['agree']} of {len(rows)}; regret {report['median_regret']:.1%} median, "
        f"{report['worst_regret']:.1%} worst"
    )
    if json_file is not None:
        json_file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def _choose(candidates: Mapping[str, Backend], seed: int) -> Selection:
    """What the measurement and the statistics of tuning make of `candidates`, in this process."""
    measurement = Measurement(SMALL, candidates, seed=seed, look_at_results=False)
    for done in measurement.rounds(LOOKS[-1]):
        selection = select(measurement.times(), final=done == LOOKS[-1])
        if selection is not None:
            return selection
    raise AssertionError("the last look decides")


def _tune(store: Store, budget: float) -> dict[Problem, str]:
    results = tune_all(PROBLEMS, CPU, store=store, budget_s=budget)
    return {one.problem: one.chosen for one in results if not isinstance(one, TuningFailed)}


def _exhaustive(problem: Problem) -> dict[str, float]:
    """Median seconds of every backend that can run it, over many rounds at the full N."""
    able = {name: get_backend(name) for name in backends() if why_not(name, problem) is None}
    measurement = Measurement(problem, able)
    for _ in measurement.rounds(LEAST_ROUNDS):
        pass
    return {name: median(seconds) for name, seconds in measurement.times().items()}


if __name__ == "__main__":
    app(prog_name="python -m benchmarks.choices")
