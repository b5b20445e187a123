"""Readings of a function's numbers: what they would be right for, of all that is commonly got wrong.

Shapes: N rows, V vocabulary.
"""

import math
from collections.abc import Callable, Iterator
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

CLOSE = 1e-4
"""Relative to the largest: numbers that near are the same ones, but for rounding in float32."""
COARSELY = 0.015
"""The same, where something was rounded to half precision on the way."""
TOLERANCES = (1e-6, 1e-5, CLOSE, COARSELY, 4 * COARSELY)
"""Tried in this order, so that a reading that fits better comes before a simpler one."""
OF_FLOAT32 = 3e-6
"""More than float32 leaves of a log-probability that is computed with care."""
BLOCKS = (16384, 8192, 4096, 2048, 1024)

LOSS = (
    "returns the loss: positive where a log-probability must be negative. Negate it, or, if a loss is what it is for, "
    "say --returns loss"
)


class Reading(NamedTuple):
    """One way to read the numbers."""

    words: tuple[str, ...]
    """How that differs from what was asked; nothing where it does not."""
    values: Tensor
    """[N] float64: what they would be."""


def read(rows: Tensor, logits: Tensor, labels: Tensor, temperature: float) -> Reading | None:
    """The reading that fits the numbers [N] of logits [N, V] and labels [N] best and is simplest; None if none does."""
    readings = list(_readings(logits.detach().double(), labels, temperature))
    fitting = (reading for tolerance in TOLERANCES for reading in readings if same(rows, reading.values, tolerance))
    best, right = next(fitting, None), readings[0]
    # Something else has to fit much better, where both do: a few columns left out make little difference.
    if best is not None and same(rows, right.values, TOLERANCES[-1]):
        apart = [float((rows - reading.values).abs().max()) for reading in (right, best)]
        return right if apart[0] < 4 * apart[1] else best
    return best


def imprecision(rows: Tensor, logits: Tensor, labels: Tensor, temperature: float) -> Iterator[str]:
    """What the errors of a formula that is nearly right look like."""
    truth = log_probs_of(logits, labels, temperature)
    off, size = rows - truth, float(truth.abs().max())
    factor = float(rows @ truth / (truth @ truth))
    towards_mean = torch.log_softmax(logits.detach().double() / temperature, -1).mean(-1) - truth
    smoothing = float(off @ towards_mean / (towards_mean @ towards_mean))
    if float(off.abs().max()) <= OF_FLOAT32 * size:
        return
    if same(rows, factor * truth, OF_FLOAT32):
        yield f"returns {factor:.6g} times the log-probability"
    elif smoothing > 0 and same(off, smoothing * towards_mean, OF_FLOAT32):
        yield f"smooths the labels, by {smoothing:.2g}"
    elif float(off.abs().max()) > CLOSE / 2 * size:
        yield "computes in half precision, or as coarsely: convert to float32 first"
    else:
        yield "loses digits that float32 has, as where a large number is added and taken away again"


def log_probs_of(logits: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """[N] float64: the truth."""
    return torch.log_softmax(logits.detach().double() / temperature, -1).gather(-1, labels[:, None]).squeeze(-1)


def same(got: Tensor, expected: Tensor, tolerance: float) -> bool:
    """Whether all are finite and no further apart than that, relative to the largest or to 1."""
    if got.shape != expected.shape or not bool(got.isfinite().all()) or not bool(expected.isfinite().all()):
        return False
    return float((got - expected).abs().max()) <= tolerance * max(1.0, float(expected.abs().max()))


def _readings(x_NV: Tensor, labels: Tensor, t: float) -> Iterator[Reading]:
    """All combinations of what can be wrong, the simplest first."""
    temperatures = {
        "": t,
        "ignores the temperature": 1.0,
        "divides by the temperature twice": t * t,
        "multiplies by the temperature instead of dividing": 1 / t,
    }
    tokens = {
        "": labels,
        "takes the label of the next row: the labels are shifted once too often": labels.roll(-1),
        "takes the label of the row before: the labels are not shifted, or shifted the wrong way": labels.roll(1),
    }
    vocab = x_NV.shape[1]
    widths = {"": vocab} | {
        f"leaves out the last columns, from {width} on": width
        for width in dict.fromkeys(vocab // block * block for block in BLOCKS)
        if 0 < width < vocab
    }
    forms: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "": lambda picked, total: picked - total,
        LOSS: lambda picked, total: total - picked,
        "returns the probability, not its logarithm": lambda picked, total: (picked - total).exp(),
        "returns logarithms to base 2": lambda picked, total: (picked - total) / math.log(2),
        "returns the label's logit: the log of the sum is not subtracted": lambda picked, total: picked,
    }
    totals = {(s, w): (x_NV[:, :w] / s).logsumexp(-1) for s in temperatures.values() for w in widths.values()}
    choices = product(temperatures.items(), tokens.items(), widths.items(), forms.items())
    simplest_first = sorted(choices, key=lambda choice: sum(bool(words) for words, _ in choice))
    for (a, s), (b, y), (c, w), (d, form) in simplest_first:
        picked = x_NV.gather(-1, y[:, None]).squeeze(-1) / s
        yield Reading(tuple(words for words in (d, a, b, c) if words), form(picked, totals[s, w]))
    words = ("divides the log-probabilities by the temperature, and not the logits",)
    yield Reading(words, log_probs_of(x_NV, labels, 1.0) / t)
