"""Which backend serves a problem: what is known so far in this process, else the default rule.

The default rule: eager where N * V is under 2^20, where a launch costs more than the work; otherwise the first of `PREFERENCE`
that can run the problem and passes a short gate on this machine, which `compiled_logprobs.tuning` runs.
"""

from compiled_logprobs.problem import Problem

EAGER = "eager"
PREFERENCE = ("compiled", "flash_attn", EAGER)
SMALL = 2**20
"""Logits; below it the default rule says eager."""

_served: dict[Problem, str] = {}
_set_aside: set[tuple[str, Problem]] = set()


def bucket(problem: Problem) -> Problem:
    """`problem` with N rounded up to half an octave (1, 2, 3, 4, 6, 8, 12, ...), so that nearby N share a decision."""
    rows = problem.rows
    octave = 1 << max(0, rows.bit_length() - 1)
    top = next(n for n in (octave, octave * 3 // 2, octave * 2) if n >= rows)
    return problem._replace(rows=top)


def lookup(problem: Problem) -> str | None:
    """The name of the backend that serves `problem`; None if that is still to be decided."""
    if problem.rows * problem.vocab < SMALL:
        return EAGER
    return _served.get(bucket(problem))


def remember(problem: Problem, name: str) -> None:
    """Let `name` serve `problem` and its bucket from now on, in this process."""
    _served[bucket(problem)] = name


def candidates(problem: Problem) -> list[str]:
    """The default rule's backends for `problem`, best first, without those that failed on it."""
    return [name for name in PREFERENCE if (name, bucket(problem)) not in _set_aside]


def set_aside(name: str, problem: Problem) -> None:
    """No longer let `name` serve `problem` and its bucket in this process."""
    _set_aside.add((name, bucket(problem)))
    _served[bucket(problem)] = EAGER
