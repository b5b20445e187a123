"""Why `backend="auto"` takes the backend that it takes, for people and for programs."""

import math
from dataclasses import dataclass
from typing import Any

import torch

from compiled_logprobs.backends import EAGER
from compiled_logprobs.choose import rule as decisions
from compiled_logprobs.choose.neighbours import Neighbour, neighbours
from compiled_logprobs.choose.rule import Served
from compiled_logprobs.choose.serving import why_no_hit, why_no_tuning
from compiled_logprobs.choose.view import view
from compiled_logprobs.decision import Candidate, Decision
from compiled_logprobs.machine.environment import fingerprint_of
from compiled_logprobs.policy import Policy
from compiled_logprobs.problem import Problem, bucket, is_small, problem_to_dict

_WHERE = {
    "small": "fewer than 2^20 logits, and no profile decides it: eager by rule, since a launch costs more than the work",
    "tuned here": "measured by this process",
    "ranks": "agreed between the ranks by tune(group=...)",
    "user store": "stored in the user's profiles",
    "project profiles": "stored in the profiles of the current folder",
    "bundled profiles": "stored in the profiles that came with the package",
    "nearest": "stored for another number of rows, the nearest that was measured",
    "default rule": "by the default rule: the first that can run it and passes a short check here; nothing was measured",
    "set aside": "the backend that served it failed, and is set aside in this process",
}


@dataclass(frozen=True)
class Explanation:
    """What serves a call, and why. `str()` is for people."""

    problem: Problem
    backend: str | None
    """None where the next call will find out."""
    source: str | None
    """Where the choice comes from; one of `compiled_logprobs.choose.rule.Source`, None where there is none yet."""
    why: str
    decision: Decision | None
    """The measurement behind the choice, if there is one."""
    stale: str | None
    """What has changed since that measurement."""
    differs: dict[str, tuple[object, object]]
    """Facts of the environment that were others then (there, here); those that decide a profile's validity cannot be."""
    measured_rows: tuple[int, ...]
    """N for which profiles of this environment hold a decision of the same problem."""
    nearest: tuple[Neighbour, ...]
    """The stored decisions whose keys differ in the fewest fields, where none is for exactly this one."""
    set_aside: dict[str, str]
    """What the backends raised that failed on such a call in this process, and do not serve it any more."""

    def to_dict(self) -> dict[str, Any]:
        """For programs: plain values only."""
        return {
            "problem": problem_to_dict(self.problem),
            "bucket_rows": bucket(self.problem).rows,
            "backend": self.backend,
            "source": self.source,
            "why": self.why,
            "decision": None if self.decision is None else self.decision.to_dict(),
            "stale": self.stale,
            "differs": {name: list(both) for name, both in self.differs.items()},
            "measured_rows": list(self.measured_rows),
            "nearest": [one.to_dict() for one in self.nearest],
            "set_aside": self.set_aside,
        }

    def __str__(self) -> str:
        details = self.problem.details()
        lines = [
            f"{self.problem}{f' ({details})' if details else ''}: {self.backend or 'not decided yet'}",
            f"  {self.why}",
        ]
        if self.measured_rows:
            lines.append(f"  profiles hold it for N of {', '.join(map(str, self.measured_rows))}")
        if self.stale:
            lines.append(f"  stale: {self.stale}")
        lines += [f"  set aside: {name} raised {error}" for name, error in self.set_aside.items()]
        lines += [f"  near: {one}" for one in self.nearest]
        if self.decision is not None:
            lines += _of_decision(self.decision)
        lines += [f"  {name} was {there} then, and is {here} here" for name, (there, here) in self.differs.items()]
        return "\n".join(lines)


def explain_problem(problem: Problem, device: torch.device, under: Policy) -> Explanation:
    """What the next call of `problem` on `device` takes; nothing is measured or checked to find out."""
    asked, problem = problem, decisions.posed(problem, under)
    known, still_open = _known(problem, device, under)
    decision = None if known is None else known.decision
    takes = None if still_open else known
    is_exact = decision is not None and decision.problem == bucket(problem)
    return Explanation(
        problem=asked,
        backend=None if takes is None else takes.name,
        source=None if takes is None else takes.source,
        why=still_open if takes is None else _WHERE[takes.source],
        decision=decision,
        stale=None if known is None else known.stale,
        differs={} if decision is None else decisions.what_differs(decision, device),
        measured_rows=_measured_rows(problem, device),
        nearest=() if is_exact else tuple(neighbours(problem, device, under)),
        set_aside=decisions.failures(asked) | decisions.failures(problem),
    )


def _known(problem: Problem, device: torch.device, under: Policy) -> tuple[Served | None, str]:
    """What is known of it, and, where that does not serve the next call, what happens there instead."""
    known = decisions.served(problem, under)
    if known is not None:
        return known, ""
    known = None if under.mode == "off" else decisions.stored(problem, device, under)
    no_tuning = why_no_tuning(problem, device, under)
    if known is not None and (known.stale is None or no_tuning is not None):
        return known, _what_is_checked(known, problem, under)
    if under.require_hit and not is_small(problem):
        return None, f"the next call raises ProfileError: {why_no_hit(problem, under)}"
    if no_tuning is None:
        again = "" if known is None else " again, since what is known of it is stale"
        return known, f"the next call measures it{again}, within its budget"
    if is_small(problem) and not under.row_invariant:
        return Served(EAGER, "small"), ""
    known = None if under.mode == "off" else decisions.nearest(problem, device, under)
    if known is not None:
        return known, _what_is_checked(known, problem, under)
    return None, f"the next call takes the default rule; it does not measure, because {no_tuning}"


def _what_is_checked(known: Served, problem: Problem, under: Policy) -> str:
    """What the next call does before it takes `known`; empty where it does nothing."""
    if not under.row_invariant or decisions.tells_of_rows(known, problem):
        return ""
    names = " and ".join(dict.fromkeys((known.name, EAGER)))
    return (
        f"the next call checks whether the rows of {names} depend on N, which nothing that was measured tells, and takes the "
        "first whose do not"
    )


def _measured_rows(problem: Problem, device: torch.device) -> tuple[int, ...]:
    top, environment = bucket(problem), fingerprint_of(device)
    rows: set[int] = set()
    for store in view(environment).values():
        rows.update(other.rows for other in store.near(environment, top))
        if store.read(environment, top) is not None:
            rows.add(top.rows)
    return tuple(sorted(rows))


def _of_decision(decision: Decision) -> list[str]:
    how = "short check" if decision.short_check else "full check"
    at = "" if decision.measured_rows == decision.problem.rows else f", timed with {decision.measured_rows} rows"
    lines = [f"  {decision.code}: {decision.reason}"]
    if decision.rounds:
        measured = f"measured {decision.measured_at} at N = {decision.problem.rows}{at}"
        lines.append(f"  {measured}: {decision.rounds} rounds, {how}")
    width = max(map(len, decision.candidates))
    # The fastest first; then, in the order of their names, those that were not timed.
    for name, candidate in sorted(decision.candidates.items(), key=lambda item: (item[1].seconds or math.inf, item[0])):
        lines.append(f"  {name:{width}}  {candidate.outcome}: {candidate.reason}")
        figures = candidate_figures(decision, name)
        if figures:
            lines.append(f"  {'':{width}}  {figures}")
    return lines


def candidate_figures(decision: Decision, name: str) -> str:
    """The figures of one candidate, in words; empty where nothing was measured."""
    candidate: Candidate = decision.candidates[name]
    parts = []
    if candidate.seconds is not None:
        parts.append(f"{candidate.seconds * 1e3:.3g} ms a call")
    if candidate.speedup is not None and name != decision.baseline:
        parts.append(f"{candidate.speedup} the speed of {decision.baseline}")
    if candidate.extra_multiple is not None:
        parts.append(f"{candidate.extra_multiple:.2f} x the logits of extra memory")
    if candidate.percent_of_bandwidth is not None:
        parts.append(f"{candidate.percent_of_bandwidth:.0f} % of bandwidth")
    if candidate.checks:
        worst = candidate.worst_error
        of_budget = "" if worst is None else f", at most {worst:.0%} of the error that is allowed"
        parts.append(f"{candidate.checks_passed} of {len(candidate.checks)} checks{of_budget}")
    if candidate.row_invariant is not None:
        parts.append("row invariant" if candidate.row_invariant else "rows depend on N")
    if candidate.measured_at is not None:
        parts.append(f"measured {candidate.measured_at}, and unchanged since")
    if candidate.first_call_seconds is not None:
        pays = decision.calls_to_pay(name)
        then = f", paid for after {pays:.0f} calls" if pays is not None else ""
        parts.append(f"first call {candidate.first_call_seconds:.2g} s{then}")
    return ", ".join(parts)
