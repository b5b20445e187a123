"""One rank of a process group: goes through scenarios, one after another, and writes what came of each, as JSON.

python -m tests.helpers.rank FOLDER SCENARIO...

RANK, WORLD_SIZE and METHOD (where to meet) say which one; the last scenario may kill ranks.
"""

import json
import os
import signal
import sys
import time
import warnings
from importlib import import_module
from pathlib import Path

import torch
from torch import distributed

import compiled_logprobs as clp
from compiled_logprobs import Problem
from compiled_logprobs.choose import group, tune
from tests.helpers.stored_decisions import decided, evidence_of, measured

registry = import_module("compiled_logprobs.backends")
FOLDER = Path(sys.argv[1])
RANK = int(os.environ["RANK"])
PATIENCE_S = 1.0
"""In the place of minutes, where ranks wait in vain."""
BUDGET_S = 1.0


class Made:
    """In the place of `Tuner`: decides at once, after `beforehand`."""

    short = True

    def __init__(self, beforehand=lambda: None) -> None:
        self._beforehand = beforehand

    def __call__(self, *_, **__) -> "Made":
        return self

    def __enter__(self) -> "Made":
        return self

    def __exit__(self, *_) -> None: ...

    def decide(self, problem, seconds, *, names, **_):
        self._beforehand()
        decision = decided(problem, "right", candidates={name: measured(name) for name in ("eager", "right")})
        return decision, evidence_of(decision)


def tune_and_call(number: int, **changes) -> dict:
    """What `tune(group=...)` comes to on this rank, and what serves a call afterwards, which has to be right."""
    problem = Problem("cpu", 1024, 1031 + 2 * number, torch.float32, aligned=False)
    told: dict = {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            decisions = clp.tune([problem._replace(**changes)], budget_s=BUDGET_S, group=distributed.group.WORLD)
            told["decisions"] = [decision.to_json().decode() for decision in decisions]
        except clp.LogProbsError as error:
            return {"error": f"{type(error).__name__}: {error}"}
    told["warned"] = [str(warning.message) for warning in caught if warning.category is RuntimeWarning]
    logits, labels = torch.randn(problem.rows, problem.vocab), torch.randint(problem.vocab, (problem.rows,))
    out = clp.log_probs_from_logits(logits, labels)
    true = logits.double().log_softmax(-1).gather(-1, labels[:, None])[:, 0]
    assert (out - true).abs().max() < 1e-5, "wrong"
    explanation = clp.explain(logits, labels)
    return {**told, "backend": explanation.backend, "source": explanation.source}


def agree() -> dict:
    """With a real measurement."""
    return tune_and_call(0)


def first_fails() -> dict:
    def fail():
        raise OSError("the disk is gone")

    tune.Tuner = Made(fail)  # type: ignore[misc]
    return tune_and_call(1)


def other_problems() -> dict:
    tune.Tuner = Made()  # type: ignore[misc]
    return tune_and_call(2, masked_logits=RANK == 1)


def first_is_late() -> dict:
    group.PATIENCE_S = PATIENCE_S
    tune.Tuner = Made(lambda: time.sleep(BUDGET_S + PATIENCE_S + 2))  # type: ignore[misc]
    return tune_and_call(3)


def another_is_killed() -> dict:
    """Which keeps nobody."""
    tune.Tuner = Made()  # type: ignore[misc]
    if RANK == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return tune_and_call(4)


def first_is_killed() -> dict:
    group.PATIENCE_S = PATIENCE_S
    tune.Tuner = Made(lambda: os.kill(os.getpid(), signal.SIGKILL))  # type: ignore[misc]
    return tune_and_call(5)


def main() -> None:
    signal.alarm(200)  # rather than to hang: the test says what is missing
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", rank=RANK, world_size=int(os.environ["WORLD_SIZE"]), init_method=os.environ["METHOD"]
    )
    registry._targets.clear()
    registry._targets.update(eager=registry.BUILT_IN["eager"], right="tests.helpers.backends_for_tuning:Right")
    real = tune.Tuner, group.PATIENCE_S
    for name in sys.argv[2:]:
        tune.Tuner, group.PATIENCE_S = real  # type: ignore[misc]
        told = globals()[name]()
        (FOLDER / f"{name} of rank {RANK}").write_text(json.dumps(told))
    os._exit(0)  # with ranks that were killed, there is nobody to leave the group with


main()
