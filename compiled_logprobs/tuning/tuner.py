"""Decide which backend serves a problem that nothing is known about."""

from compiled_logprobs import backends, decisions
from compiled_logprobs.problem import Problem
from compiled_logprobs.tuning.gate import check_backend


def serve(problem: Problem) -> str:
    """The name of the backend that serves `problem`: known, or found by the default rule and then known."""
    known = decisions.lookup(problem)
    if known is not None:
        return known
    name = _first_that_passes(problem)
    decisions.remember(problem, name)
    return name


def _first_that_passes(problem: Problem) -> str:
    for name in decisions.candidates(problem):
        if name == decisions.EAGER:
            break
        if backends.why_not(name, problem) is None and check_backend(name, problem, short=True).passed:
            return name
    return decisions.EAGER
