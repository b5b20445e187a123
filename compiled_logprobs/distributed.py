"""Agreement between ranks: one of them measures, and all hold the same decision afterwards, or the baseline.

Every rank goes through the same collectives in the same order, whatever fails on any of them.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import distributed

from compiled_logprobs import decisions
from compiled_logprobs.decisions import Served
from compiled_logprobs.errors import InputError, LogProbsError
from compiled_logprobs.policy import Policy
from compiled_logprobs.problem import Problem
from compiled_logprobs.records import Decision
from compiled_logprobs.tuning.serving import tuned


def tune_together(
    problems: Sequence[Problem], device: torch.device, group: Any, *, budget_s: float | None, again: bool
) -> list[Decision]:
    """Measure on the first rank of `group`, whose processes all call this with the same problems; see `tune`."""
    asked = _gather([tuple(problem) for problem in problems], device, group)
    if any(one != asked[0] for one in asked):
        raise InputError(
            f"got other problems on rank {next(i for i, one in enumerate(asked) if one != asked[0])} of the group than on "
            "its first; the same on all ranks are valid. Pass the same ones, in the same order."
        )
    found: list[Decision] | str = []
    interrupted: BaseException | None = None
    if distributed.get_rank(group) == 0:
        try:
            found = tuned(problems, device, budget_s=budget_s, again=again)
        except Exception as error:  # noqa: BLE001  the others wait to hear of it, whatever it is
            found = f"{type(error).__name__}: {error}"
        except BaseException as error:  # noqa: BLE001  so do they of an interruption, before it goes on here
            found, interrupted = f"{type(error).__name__} on the rank that measures", error
    told: list[Any] = [found]
    distributed.broadcast_object_list(told, group=group, group_src=0, device=_place(device, group))
    found = told[0]
    if interrupted is not None:
        raise interrupted
    if isinstance(found, str):
        raise LogProbsError(f"the first rank of the group decided nothing: {found}")
    holds = _gather([_why_not_here(one, device) for one in found], device, group)
    agreed = []
    for index, decision in enumerate(found):
        reasons = [f"rank {rank}: {answers[index]}" for rank, answers in enumerate(holds) if answers[index] is not None]
        agreed.append(_baseline(decision, "; ".join(reasons)) if reasons else decision)
        decisions.remember_decision(agreed[-1])
    return agreed


def _why_not_here(decision: Decision, device: torch.device) -> str | None:
    """Why this rank cannot hold `decision`; None if it can."""
    here, there = decisions.fingerprint_of(device), decision.environment.get("fingerprint")
    if here != there:
        return f"its environment is {here}, not {there}"
    if decisions.usable(Served(decision.chosen, "tuned here", decision), Policy()) is None:
        return f"backend {decision.chosen!r} cannot run there, or has other code"
    return None


def _baseline(decision: Decision, reasons: str) -> Decision:
    """`decision` for its baseline: what every rank has."""
    candidates = dict(decision.candidates)
    if decision.chosen != decision.baseline:
        candidates[decision.chosen] = replace(
            decision.winner, outcome="unavailable", reason=f"not on all ranks: {reasons}"
        )
    reason = f"the ranks differ, and the baseline is what all of them have ({reasons})"
    candidates[decision.baseline] = replace(candidates[decision.baseline], outcome="chosen", reason=reason)
    return replace(decision, chosen=decision.baseline, code="RANKS_DIFFER", reason=reason, candidates=candidates)


def _gather(value: Any, device: torch.device, group: Any) -> list[Any]:
    found: list[Any] = [None] * distributed.get_world_size(group)
    if _place(device, group).type == "cuda":
        torch.cuda.set_device(device)  # which all_gather_object goes by
    distributed.all_gather_object(found, value, group=group)
    return found


def _place(device: torch.device, group: Any) -> torch.device:
    """Where objects travel: NCCL has no way for those of the CPU."""
    return device if distributed.get_backend(group) == "nccl" else torch.device("cpu")
