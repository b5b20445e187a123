"""`tune(group=...)`: the first rank measures, and all ranks hold its decisions, or all of them eager.

The answer is one cell of the group's store, written once, by `compare_set`: the decisions of the first rank, or "over"
by whichever rank failed or ran out of patience first. Every rank obeys what is there, also one that comes late. No
collective is called: one that times out would end the group.
"""

import contextlib
import json
import time
from collections.abc import Callable
from datetime import datetime, timezone
from typing import Any

import torch
from torch import distributed

from compiled_logprobs.backends import EAGER, backends, code_of
from compiled_logprobs.choose import memory
from compiled_logprobs.choose.rule import holds
from compiled_logprobs.choose.tune import tune
from compiled_logprobs.decision import TIME, Candidate, Decision
from compiled_logprobs.errors import InputError, LogProbsError, warn
from compiled_logprobs.machine.environment import environment_at, fingerprint_of
from compiled_logprobs.policy import checked_budget, policy
from compiled_logprobs.problem import Problem, bucket, problem_name

PATIENCE_S = 300.0
"""How long a rank waits for each problem beyond its budget: the first has to import, compile and check."""

Asked = Callable[[], tuple[list[Problem], torch.device]]


def tune_together(asked: Asked, group: Any, *, budget_s: float | None, again: bool) -> list[Decision]:
    """Decide the problems that `asked` returns, on all ranks of `group`; see `api.functions.tune`."""
    if not distributed.is_available() or not isinstance(group, distributed.ProcessGroup):
        raise InputError(
            f"got group={group!r:.80}; a process group of torch.distributed that this process belongs to is valid, "
            "e.g. torch.distributed.group.WORLD. On a rank outside of it, do not call."
        )
    if not hasattr(group, "get_group_store"):
        raise LogProbsError(
            f"got torch {torch.__version__}, whose process groups do not give their store; newer releases do. Upgrade, "
            "or call tune(...) without group on one process, and give all ranks its profiles."
        )
    rank, store = group.rank(), group.get_group_store()
    # The n-th calls of all ranks share a cell. The store counts them: it may have been another group's before.
    cell = f"compiled_logprobs/{group.size()}/{store.add(f'compiled_logprobs/{group.size()}/of rank {rank}', 1)}"
    problems: list[Problem] | None = None
    try:
        seconds = policy().budget_s if budget_s is None else checked_budget(budget_s, "budget_s")
        given, device = asked()
        problems = list(dict.fromkeys(map(bucket, given)))
        if rank == 0:
            decisions = tune(problems, device, budget_s=seconds, again=again)
            answer = {
                "problems": [problem_name(problem) for problem in problems],
                "environment": fingerprint_of(device),
                "decisions": [decision.to_json().decode() for decision in decisions],
            }
        else:
            within = (seconds + PATIENCE_S) * len(problems)
            answer = _wait(store, cell, within) or {"over": f"rank {rank} waited for {within:g} s"}
        answer = _write(store, cell, answer)
    except BaseException as error:  # the others wait to hear of it, whatever it is
        answer = {"over": f"rank {rank}: {type(error).__name__}: {error}"}
        with contextlib.suppress(RuntimeError):  # of a store that does not answer
            answer = _write(store, cell, answer)
        if problems is None or not isinstance(error, Exception):  # wrong arguments; an interruption
            raise
    return _hold(answer, problems, device, rank)


def _write(store: Any, cell: str, answer: dict[str, Any]) -> dict[str, Any]:
    """What the cell holds: `answer`, unless something was there already."""
    written: dict[str, Any] = json.loads(store.compare_set(cell, "", json.dumps(answer)))
    return written


def _wait(store: Any, cell: str, within: float) -> dict[str, Any] | None:
    """What the cell holds; None if nothing is there in time."""
    ends, pause = time.monotonic() + within, 0.01
    while not store.check([cell]):
        if time.monotonic() > ends:
            return None
        time.sleep(pause)
        pause = min(1.0, 2 * pause)
    answer: dict[str, Any] = json.loads(store.get(cell))
    return answer


def _hold(answer: dict[str, Any], problems: list[Problem], device: torch.device, rank: int) -> list[Decision]:
    """Let the decisions of `answer` serve from now on; eager, where they cannot."""
    names = [problem_name(problem) for problem in problems]
    if "over" not in answer and answer["problems"] != names:
        raise InputError(
            f"got the problems {', '.join(names)} on rank {rank} of the group; the same as on its first are valid, "
            f"which are {', '.join(answer['problems'])}. Pass the same ones, in the same order."
        )
    reason = answer.get("over")
    if reason is None and answer["environment"] != fingerprint_of(device):
        here, there = fingerprint_of(device), answer["environment"]
        reason = f"rank {rank} is in environment {here}, the first in {there}; `compiled-logprobs doctor` shows them"
    decisions: list[Decision] = []
    reasons: dict[Problem, str] = {}
    for index, problem in enumerate(problems):
        decision = None if reason else Decision.from_json(answer["decisions"][index].encode())
        if decision is None or not holds(decision, decision.chosen):
            unusable = decision and f"backend {decision.chosen!r} cannot run on rank {rank}, or has other code"
            reasons[problem] = reason or unusable or ""
            decision = _baseline(problem, reasons[problem], device)
        decisions.append(decision)
        memory.MEMORY.remember_decision(decision, "ranks")
    if reasons:
        told = "; for ".join(f"{problem}: {reason}" for problem, reason in reasons.items())
        warn(
            f"rank {rank} of the group holds {EAGER} for {told}.\n"
            "Call tune(..., group=...) again on all ranks when that is mended."
        )
    return decisions


def _baseline(problem: Problem, reason: str, device: torch.device) -> Decision:
    """What a rank holds where there is no other decision: nothing was measured for it."""
    return Decision(
        problem=problem,
        chosen=EAGER,
        code="RANKS_DIFFER",
        reason=f"it is what all ranks have: {reason}",
        candidates={EAGER: Candidate("chosen", "the baseline", code_of(EAGER))},
        left_out=tuple(name for name in backends() if name != EAGER),
        baseline=EAGER,
        plain_seconds=None,
        rounds=0,
        settled=False,
        measured_rows=0,
        proven_rows=0,
        checked_rows=0,
        short_check=True,
        environment=environment_at(device).to_dict(),
        bandwidth={},
        telemetry=None,
        telemetry_reason="nothing was measured",
        seed=0,
        measured_at=datetime.now(timezone.utc).strftime(TIME),
        tuning_seconds=0.0,
    )
