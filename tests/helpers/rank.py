"""One rank of a process group: goes through scenarios, one after another, and prints what came of each, as JSON.

RANK, WORLD_SIZE and METHOD (where to meet) say which one.
"""

import json
import os
import signal
import warnings
from importlib import import_module

import torch
from torch import distributed

import compiled_logprobs as clp
from compiled_logprobs import Problem
from compiled_logprobs.choose import group, tune
from tests.helpers.stored_decisions import FakeTuner, decided, measured

registry = import_module("compiled_logprobs.backends")
RANK = int(os.environ["RANK"])
BUDGET_S, PATIENCE_S = 1.0, 1.0


def tune_and_call(number: int) -> dict:
    """What `tune(group=...)` comes to on this rank, and what serves a call afterwards, which has to be right."""
    problem = Problem("cpu", 1024, 1031 + 2 * number, torch.float32, aligned=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        decisions = clp.tune(problem, budget_s=BUDGET_S, group=distributed.group.WORLD)
    logits, labels = torch.randn(problem.rows, problem.vocab), torch.randint(problem.vocab, (problem.rows,))
    out = clp.log_probs_from_logits(logits, labels)
    true = logits.double().log_softmax(-1).gather(-1, labels[:, None])[:, 0]
    assert (out - true).abs().max() < 1e-5, "wrong"
    explanation = clp.explain(logits, labels)
    return {
        "decisions": [decision.to_json().decode() for decision in decisions],
        "warnings": [str(warning.message) for warning in caught if warning.category is RuntimeWarning],
        "serves": [explanation.backend, explanation.source],
    }


def agree() -> dict:
    """With a real measurement."""
    return tune_and_call(0)


def another_is_killed() -> dict:
    """Which keeps nobody."""
    candidates = {name: measured(name) for name in ("eager", "right")}
    setattr(tune, "Tuner", FakeTuner(lambda problem: decided(problem, "right", candidates=candidates)))  # noqa: B010
    if RANK == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return tune_and_call(1)


def first_is_killed() -> dict:
    """While it measures."""
    group.PATIENCE_S = PATIENCE_S
    setattr(tune, "Tuner", FakeTuner(lambda problem: os.kill(os.getpid(), signal.SIGKILL)))  # noqa: B010
    return tune_and_call(2)


signal.alarm(200)  # rather than to hang: the test says what is missing
torch.set_num_threads(1)
distributed.init_process_group(
    "gloo", rank=RANK, world_size=int(os.environ["WORLD_SIZE"]), init_method=os.environ["METHOD"]
)
registry._targets.clear()
registry._targets.update(eager=registry.BUILT_IN["eager"], right="tests.helpers.backends_for_tuning:Right")
for scenario in (agree, another_is_killed, first_is_killed):
    print(json.dumps(scenario()), flush=True)
os._exit(0)  # with ranks that were killed, there is nobody to leave the group with
