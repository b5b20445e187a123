"""Deciding a problem again: only what has changed is measured, beside incumbent and baseline; the rest is carried over."""

import dataclasses
import time
from collections.abc import Sequence

from compiled_logprobs.backends import EAGER, backends
from compiled_logprobs.choose import rule as decisions
from compiled_logprobs.decision import Decision, Evidence
from compiled_logprobs.problem import Problem
from compiled_logprobs.tuning.tuner import Tuner, TuningFailed


def decide(
    tuner: Tuner,
    problem: Problem,
    seconds: float,
    *,
    standing: Decision | None,
    names: Sequence[str] | None = None,
    again: bool = False,
    strict: bool = False,
) -> tuple[Decision, Evidence]:
    """What `tuner` decides, given the decision that stands.

    If nothing that changed beats the standing choice, and it still beats the baseline, what was slower then is slower now.
    Otherwise all candidates are measured.

    Args:
        tuner, problem, seconds, names, strict: as in `Tuner.decide`.
        standing: the earlier decision for the same bucket, if there is one.
        again: measure all of them, changed or not.

    Raises:
        TuningFailed: no decision came about.
    """
    asked = backends() if names is None else names
    incumbent = standing.chosen if standing is not None and decisions.holds(standing, standing.chosen) else None
    due = [] if standing is None or again else _due(standing, asked, tuner.short)
    if standing is None or incumbent is None or not due:
        return tuner.decide(problem, seconds, strict=strict, names=asked, incumbent=incumbent)

    began = time.monotonic()
    decision, evidence = tuner.decide(problem, seconds, strict=strict, names=[*due, incumbent], incumbent=incumbent)
    if decision.chosen in (*due, incumbent) and decision.baseline == standing.baseline:
        return _with_what_stands(decision, standing), evidence
    left = seconds - (time.monotonic() - began) if strict else seconds
    if left <= 0:
        raise TuningFailed(f"the budget of {seconds:.3g} s ended when the standing choice had failed")
    return tuner.decide(problem, left, strict=strict, names=asked, incumbent=incumbent)


def _due(standing: Decision, asked: Sequence[str], short: bool) -> list[str]:
    """The candidates to measure, without the choice that stands; none where all have to be."""
    due = {*decisions.changed(standing), *(name for name in asked if name not in standing.candidates)} & set(asked)
    comparable = standing.baseline == EAGER and EAGER not in due
    if not standing.settled or not comparable or (standing.short_check and not short):
        return []
    return [name for name in backends() if name in due and name != standing.chosen]


def _with_what_stands(decision: Decision, standing: Decision) -> Decision:
    """`decision` with the candidates of `standing` that it did not measure."""
    carried = {
        name: dataclasses.replace(candidate, measured_at=candidate.measured_at or standing.measured_at)
        for name, candidate in standing.candidates.items()
        if name not in decision.candidates and name in backends()
    }
    return dataclasses.replace(
        decision,
        candidates=decision.candidates | carried,
        left_out=tuple(name for name in decision.left_out if name not in carried),
    )
