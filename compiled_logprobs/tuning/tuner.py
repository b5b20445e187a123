"""Decide which backend serves a problem that nothing is known about."""

import torch

from compiled_logprobs import decisions
from compiled_logprobs.backends import why_not
from compiled_logprobs.errors import nothing_can_serve_after
from compiled_logprobs.problem import Problem
from compiled_logprobs.tuning.gate import check_backend

_passed: dict[tuple[str, Problem], bool] = {}
"""What the short gate found, for problems of any N: its inputs have few rows."""


def serve(problem: Problem, device: torch.device) -> str:
    """The name of the backend that serves `problem` on `device`: known, or found by the default rule and then known."""
    known = decisions.lookup(problem)
    if known is not None:
        return known
    try:
        name = next(
            (name for name in decisions.candidates(problem) if _can_serve(name, problem, device)), decisions.EAGER
        )
    except Exception as error:
        if isinstance(error, torch.AcceleratorError) or not nothing_can_serve_after(error):
            raise
        return decisions.EAGER  # there is no room for the gate now; there may be at the next call
    decisions.remember(problem, name)
    return name


def _can_serve(name: str, problem: Problem, device: torch.device) -> bool:
    if name == decisions.EAGER:
        return True
    if why_not(name, problem) is not None:
        return False
    key = name, problem._replace(rows=0)
    if key not in _passed:
        _passed[key] = check_backend(name, problem, short=True, device=str(device)).passed
    return _passed[key]
