"""The stored decisions that are nearest to a problem, and how their keys differ from its own, field by field."""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch

from compiled_logprobs.backends import code_of
from compiled_logprobs.choose import rule as decisions
from compiled_logprobs.choose.view import view
from compiled_logprobs.decision import Decision
from compiled_logprobs.machine.environment import MATCHED, environment_at
from compiled_logprobs.policy import Policy
from compiled_logprobs.problem import Problem, bucket, problem_to_dict
from compiled_logprobs.store import stores


@dataclass(frozen=True)
class Neighbour:
    """A stored decision, and what of its key is not that of the problem."""

    store: str
    """Such as 'user store'."""
    environment: str
    """Its fingerprint."""
    problem: Problem
    differs: dict[str, tuple[Any, Any]]
    """By field of the problem or fact of the environment, or by backend, whose code belongs to the key: there, and here."""
    unusable: str | None = None
    """Why it cannot serve, though nothing of its key differs but N."""

    def __str__(self) -> str:
        parts = [f"{name} is {there} there, and {here} here" for name, (there, here) in self.differs.items()]
        parts += [self.unusable] if self.unusable else []
        return f"{self.problem} ({self.store}): {'; '.join(parts) or 'nothing differs'}"

    def to_dict(self) -> dict[str, Any]:
        """For programs: plain values only."""
        return {
            "store": self.store,
            "environment": self.environment,
            "problem": problem_to_dict(self.problem),
            "differs": {name: list(both) for name, both in self.differs.items()},
            "unusable": self.unusable,
        }


def neighbours(problem: Problem, device: torch.device, under: Policy, most: int = 3) -> list[Neighbour]:
    """The `most` stored decisions whose keys differ from that of `problem` on `device` in the fewest fields, nearest first.

    Of those that differ in as many fields, that of the nearest N comes first. A decision for exactly this key is among them:
    if it cannot be used under this policy, the backends that have changed or `unusable` tell why.
    """
    top, here = bucket(problem), environment_at(device)
    facts = here.to_dict()
    found: list[tuple[float, Neighbour]] = []
    for label, store in stores().items():
        environments = store.environments()
        for fingerprint, other in store.problems():
            differs = _fields_that_differ(other, top)
            if fingerprint != here.fingerprint():
                there = environments.get(fingerprint, {})
                names = MATCHED.get(device.type, MATCHED["cpu"])
                differs |= {name: (there.get(name), facts[name]) for name in names if there.get(name) != facts[name]}
            distance = len(differs) + _octaves(other, top) / 1000
            found.append((distance, Neighbour(label, fingerprint, other, differs)))
    found.sort(key=lambda one: one[0])
    return [_with_backends(one, here.fingerprint(), under) for _, one in found[:most]]


def _fields_that_differ(there: Problem, here: Problem) -> dict[str, tuple[Any, Any]]:
    a, b = problem_to_dict(there), problem_to_dict(here)
    return {name: (a[name], b[name]) for name in a if a[name] != b[name]}


def _octaves(one: Problem, other: Problem) -> float:
    return abs(math.log2(max(1, one.rows) / max(1, other.rows)))


def _with_backends(one: Neighbour, environment: str, under: Policy) -> Neighbour:
    """`one` with the backends whose code is not what was measured, or what else is wrong, where nothing else differs but N."""
    if one.environment != environment or one.differs.keys() - {"rows"}:
        return one
    decision = decisions.decision_in(stores()[one.store], environment, one.problem)
    if decision is None:
        return replace(one, unusable="it cannot be read, or chose a backend that is not registered here")
    changed = {
        f"backend {name}": (decision.candidates[name].fingerprint, code_of(name))
        for name in decision.candidates
        if name in decisions.changed(decision) or (name == decision.chosen and not decisions.holds(decision, name))
    }
    return replace(one, differs=one.differs | changed, unusable=_why_unusable(one, decision, environment, under))


def _why_unusable(one: Neighbour, decision: Decision, environment: str, under: Policy) -> str | None:
    name = decision.best_row_invariant() if under.row_invariant else decision.chosen
    if name is None:
        return "no backend there has rows whose bits do not depend on N, which row_invariant=True asks for"
    if name in decisions.failures(one.problem):
        return f"backend {name!r}, which it chose, failed in this process and is set aside"
    seen = view(environment).get(one.store)  # a folder of profiles may have come later, too
    if seen is None or seen.read(environment, one.problem) is None:
        return "it was stored after this rank's first look at the profiles"
    return None
