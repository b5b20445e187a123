"""`tune(group=...)`: the first rank measures, and all ranks hold its decisions, or all of them eager.

The answer is one cell of the group's store, written once, by `compare_set`: the decisions of the first rank, or "over"
by whichever rank failed or ran out of patience first. Every rank obeys what is there, also one that comes late. No
collective is called: one that times out would end the group.
"""

import contextlib
import json
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import distributed

from compiled_logprobs.arguments import find_private
from compiled_logprobs.backends import EAGER
from compiled_logprobs.choose import memory
from compiled_logprobs.choose.memory import Choice
from compiled_logprobs.choose.staleness import holds
from compiled_logprobs.choose.tune import tune
from compiled_logprobs.decision import Decision
from compiled_logprobs.errors import InputError, LogProbsError, warn
from compiled_logprobs.machine.environment import fingerprint_of
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
    find_store = getattr(distributed.ProcessGroup, "get_group_store", None) or find_private(
        "torch.distributed.distributed_c10d._get_process_group_store",
        None,  # torch 2.8 and older
    )
    if find_store is None:
        raise LogProbsError(
            f"got torch {torch.__version__}, whose process groups do not give their store; newer releases do. Upgrade, "
            "or call tune(...) without group on one process, and give all ranks its profiles."
        )
    rank, store = group.rank(), find_store(group)
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
    over = answer.get("over")
    if over is None and answer["environment"] != fingerprint_of(device):
        here, there = fingerprint_of(device), answer["environment"]
        over = f"rank {rank} is in environment {here}, the first in {there}; `compiled-logprobs doctor` shows them"
    decisions: list[Decision] = []
    reasons: dict[Problem, str] = dict.fromkeys(problems, over) if over else {}
    for text in [] if over else answer["decisions"]:
        decision = Decision.from_json(text.encode())
        if holds(decision, decision.chosen):
            decisions.append(decision)
            memory.MEMORY.hold(decision.problem, Choice(decision.chosen, "ranks", decision))
        else:
            reasons[decision.problem] = f"backend {decision.chosen!r} cannot run on rank {rank}, or has other code"
    for problem, reason in reasons.items():
        memory.MEMORY.hold(problem, Choice(EAGER, "ranks", unmeasured=reason))
    if reasons:
        warn(
            f"rank {rank} of the group holds {EAGER} for "
            f"{'; for '.join(f'{problem}: {reason}' for problem, reason in reasons.items())}.\n"
            "Call tune(..., group=...) again on all ranks when that is mended."
        )
    return decisions
