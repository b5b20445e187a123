"""How much a decision for one problem says of another: the order in which `near` and `related` ask decisions.

The nearest, of those whose backend can run the problem, is one for an N within 4x before one for an N beyond that; then
of the same entropy, asked for or not; then of the most other results alike; then of as many labels a row, else of the
smallest ratio; then of the same layout, else of the next one to it (flat, rows, slice); then of the same kind of
temperature, else of the next one to it (none, a number, one a token); then of the same alignment; then of the smallest
ratio of both N. All else has to be the same: device, vocabulary, dtypes, gradient, in place or not, masked or not.
"""

import math
from typing import get_args

from compiled_logprobs.problem import RESULTS, Layout, Problem, Temperature

NEAR = 4
"""The ratio of two N up to which a decision for one says more of the other than the kind of call does."""


def distance(problem: Problem, other: Problem) -> tuple[float, ...]:
    """How far a decision for `other`, of the same family, is from `problem`: the order of this module's docstring.

    Of two that are as far, the one of the smaller N is the nearer, then of fewer labels, then of the simpler layout.
    """
    layouts, temperatures = get_args(Layout), get_args(Temperature)
    layout, temperature = layouts.index(other.layout), temperatures.index(other.temperature)
    return (
        is_far(problem, other),
        problem.entropy != other.entropy,
        sum(getattr(problem, name) != getattr(other, name) for name in RESULTS),
        abs(math.log(max(1, other.labels_per_row) / max(1, problem.labels_per_row))),
        abs(layout - layouts.index(problem.layout)),
        abs(temperature - temperatures.index(problem.temperature)),
        problem.aligned != other.aligned,
        abs(math.log(max(1, other.rows) / max(1, problem.rows))),
        *(other.rows, other.labels_per_row, layout, temperature),
    )


def is_far(problem: Problem, other: Problem) -> bool:
    """Whether a decision for `other` says less of `problem` than one for another kind of call at a nearer N."""
    return max(other.rows, problem.rows) > NEAR * min(other.rows, problem.rows)
