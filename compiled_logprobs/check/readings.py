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
WITH_CARE = 5e-7
"""Relative to the largest: what float32 leaves of a log-probability as torch computes it, at most."""
OF_FLOAT32 = 3e-6
"""More than float32 leaves of a log-probability that is computed with care."""
HALVES = torch.bfloat16, torch.float16
BLOCKS = (16384, 8192, 4096, 2048, 1024)
SHARDS = (2, 4, 8)
"""Ranks that a vocabulary is commonly split over."""
ROWS_OF_A_FIT = 6
"""As many as it takes to find one number."""

LESS_EXACT = (
    "loses digits that float32 has, as where a large number is added and taken away again, or a long sum is added up "
    "one by one, which torch does along a dimension that is not the last"
)
LOSS = (
    "returns the loss: positive where a log-probability must be negative, as abs() leaves it. Negate it, or, if a loss "
    'is what it is for, say returns="loss" (--returns loss)'
)
LOG_PROB = (
    'returns the log-probability: negative where a loss must be positive. Say returns="log_prob" (--returns log_prob)'
)


class Reading(NamedTuple):
    """One way to read the numbers."""

    words: tuple[str, ...]
    """How that differs from what was asked; nothing where it does not."""
    values: Tensor
    """[N] float64: what they would be."""


def read(rows: Tensor, logits: Tensor, labels: Tensor, temperature: float) -> Reading | None:
    """The reading that fits the numbers [N] of logits [N, V] and labels [N] best and is simplest; None if none does."""
    x_NV = logits.detach().double()
    readings = list(_readings(x_NV, labels, temperature))
    right = readings[0]
    # What has a number in it that is found to fit has to fit well, and as well as the results' own dtype allows.
    well = COARSELY if any(torch.equal(rows, rows.to(half).double()) for half in HALVES) else CLOSE
    readings += (each for each in _measured(rows, x_NV, labels, temperature) if same(rows, each.values, well))
    if not any(same(rows, reading.values, well) for reading in readings):
        readings += (each for each in _searched(rows, x_NV, labels, temperature) if same(rows, each.values, well))
    fitting = (reading for tolerance in TOLERANCES for reading in readings if same(rows, reading.values, tolerance))
    best = next(fitting, None)
    # Something else has to fit much better, where both do: a few columns left out make little difference.
    if best is not None and same(rows, right.values, TOLERANCES[-1]):
        apart = [float((rows - reading.values).abs().max()) for reading in (right, best)]
        # What is measured on the numbers fits rounding, too.
        return right if apart[0] < 4 * apart[1] or apart[0] <= OF_FLOAT32 * float(right.values.abs().max()) else best
    return best


def imprecision(rows: Tensor, logits: Tensor, labels: Tensor, temperature: float) -> Iterator[str]:
    """What the errors of a formula that is nearly right look like."""
    truth = log_probs_of(logits, labels, temperature)
    off, size = rows - truth, float(truth.abs().max())
    if float(off.abs().max()) <= WITH_CARE * size:
        return
    words = _about_the_temperature(rows, logits, labels, temperature)
    if words := words or _about_columns(off, logits.detach().double() / temperature):
        yield words
    elif half := next((half for half in HALVES if _is_rounded(rows, half, logits, labels, temperature)), None):
        yield f"rounds its results to {_name(half)}: keep them in float32"
    elif half := _half_of_the_quotient(rows, logits, labels, temperature):
        yield f"rounds the logits divided by the temperature to {_name(half)}: convert them to float32 before"
    elif float(off.abs().max()) > CLOSE / 2 * size:
        yield "computes in half precision, or as coarsely: convert to float32 first"
    else:
        yield LESS_EXACT


def _about_the_temperature(rows: Tensor, logits: Tensor, labels: Tensor, temperature: float) -> str:
    """Whether another one, next to the one that is asked for, explains all."""
    x_NV, few = logits.detach().double(), slice(ROWS_OF_A_FIT)

    def distance(number: float) -> float:
        return float((log_probs_of(x_NV[few], labels[few], number) - rows[few]).square().sum())

    best = _minimum(distance, 0.99 * temperature, 1.01 * temperature)
    explained, truth = (log_probs_of(x_NV, labels, number) for number in (best, temperature))
    fits = same(rows, explained, OF_FLOAT32) and not same(rows, truth, 4 * OF_FLOAT32)
    return f"divides the logits by {best:.5g}, where the temperature is {temperature:g}" if fits else ""


def _about_columns(off: Tensor, x_NV: Tensor) -> str:
    """Which few columns the sum lacks, or has twice, where that explains by how much each row [N] is off."""
    lacking = 1.0 - (-off).exp()  # of the sum
    rounding = 2 * torch.finfo(torch.float32).eps * float(x_NV.abs().max())
    if float(lacking.abs().max()) < 8 * rounding:
        return ""
    p = torch.softmax(x_NV, -1)
    first = p.cumsum(-1)
    readings = {
        "leaves out column {0}": p - lacking[:, None],
        "counts column {0} twice": p + lacking[:, None],
        "leaves out the first columns, up to {0}": first - lacking[:, None],
        "leaves out the last columns, from {1} on": 1.0 - first - lacking[:, None],
    }
    for words, unexplained in readings.items():
        nearest = unexplained.abs().amax(0).min(0)
        if float(nearest.values) <= rounding:
            return words.format(int(nearest.indices), int(nearest.indices) + 1)
    low, high = float(lacking.min()), float(lacking.max())
    if high < -40 * rounding:
        return f"adds {-high:.2g} to {-low:.2g} of the sum to it: some columns are counted twice"
    if low > 40 * rounding:
        return (
            f"loses a part of the sum, {low:.2g} to {high:.2g} of it: columns or small exponentials are left out, or "
            "it is added up in half precision"
        )
    return ""


def log_probs_of(logits: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """[N] float64: the truth."""
    return torch.log_softmax(logits.detach().double() / temperature, -1).gather(-1, labels[:, None]).squeeze(-1)


def same(got: Tensor, expected: Tensor, tolerance: float) -> bool:
    """Whether all are finite and no further apart than that, relative to the largest or to 1."""
    if got.shape != expected.shape or not bool(got.isfinite().all()) or not bool(expected.isfinite().all()):
        return False
    return float((got - expected).abs().max()) <= tolerance * max(1.0, float(expected.abs().max()))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _is_rounded(rows: Tensor, half: torch.dtype, logits: Tensor, labels: Tensor, temperature: float) -> bool:
    """Whether these are the right numbers, rounded to `half`; and not the right ones of rounded logits."""
    if not torch.equal(rows, rows.to(half).double()):
        return False
    step = rows.abs() * torch.finfo(half).eps
    of_exact, of_rounded = (
        bool(((rows - log_probs_of(x, labels, temperature)).abs() <= 0.51 * step).all())
        for x in (logits, logits.detach().to(half))
    )
    return of_exact and (not of_rounded or torch.equal(logits.detach().double(), logits.detach().to(half).double()))


def _half_of_the_quotient(rows: Tensor, logits: Tensor, labels: Tensor, temperature: float) -> torch.dtype | None:
    if temperature == 1.0 or logits.dtype not in HALVES:
        return None
    quotient = (logits.detach().float() / temperature).to(logits.dtype)
    return logits.dtype if same(rows, log_probs_of(quotient, labels, 1.0), OF_FLOAT32) else None


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
    yield from _of_other_sums(x_NV / t, labels)


def _of_other_sums(x_NV: Tensor, labels: Tensor) -> Iterator[Reading]:
    """What else is summed, or made of the sum."""
    picked, total, maximum = x_NV.gather(-1, labels[:, None]).squeeze(-1), x_NV.logsumexp(-1), x_NV.amax(-1)
    for direction, step in (("before", 1), ("after", -1)):
        yield Reading((f"gives each row the result of the row {direction}",), (picked - total).roll(step))
    over_rows = torch.log_softmax(x_NV, 0).gather(-1, labels[:, None]).squeeze(-1)
    yield Reading(("normalises over the rows, not over the vocabulary: the softmax has the wrong dim",), over_rows)
    words = "takes the softmax twice: what it takes for logits are probabilities by then"
    yield Reading((words,), log_probs_of(x_NV.softmax(-1), labels, 1.0))
    for half in HALVES:
        rounded = labels.to(half).double().clamp(max=x_NV.shape[1] - 1).long()
        if not torch.equal(rounded, labels):
            words = f"rounds the labels to {_name(half)}, which does not hold large integers"
            yield Reading((words,), log_probs_of(x_NV, rounded, 1.0))
    yield Reading(("takes the logarithm of the sum twice",), picked - maximum - (total - maximum).log())
    for shards in SHARDS:
        width = -(-x_NV.shape[1] // shards)
        of_shards = torch.stack([shard.logsumexp(-1) for shard in torch.split(x_NV, width, -1)], -1)
        own = of_shards.gather(-1, (labels // width)[:, None]).squeeze(-1)
        yield Reading((f"normalises over one of {shards} shards of the columns, the one with the label",), picked - own)
        words = f"adds up the maxima of {shards} shards of the columns, where the largest of them counts"
        maxima = torch.stack([shard.amax(-1) for shard in torch.split(x_NV, width, -1)], -1)
        yield Reading((words,), picked - total + maximum - maxima.sum(-1))
        yield from _of_the_other_shard(x_NV, labels, width, shards)
    yield Reading(("counts the maximum twice: in the logarithm of the sum, and beside it",), picked - total - maximum)


def _of_the_other_shard(x_NV: Tensor, labels: Tensor, width: int, shards: int) -> Iterator[Reading]:
    """A rank that takes its first column for the next one's, or for that of the one before; a label that none has then
    is taken for a logit of 0, before or after the maximum is subtracted."""
    words = f"takes the column that lies {{}} shard of {shards} from the label's: a rank's first column is not where"
    words += " it thinks"
    for which, step in (("one", width), ("minus one", -width)):
        column = labels + step
        is_here = (column >= 0) & (column < x_NV.shape[1])
        picked = x_NV.gather(-1, column.clamp(0, x_NV.shape[1] - 1)[:, None]).squeeze(-1)
        for missing in (x_NV.amax(-1), torch.zeros_like(picked)):
            yield Reading((words.format(which),), torch.where(is_here, picked, missing) - x_NV.logsumexp(-1))


def _measured(rows: Tensor, x_NV: Tensor, labels: Tensor, t: float) -> Iterator[Reading]:
    """Readings with a number in them that the rows give at once."""
    truth, total = log_probs_of(x_NV, labels, t), (x_NV / t).logsumexp(-1)
    if not bool((rows.isfinite() & truth.isfinite()).all()):
        return
    off = rows - truth
    factor = float(rows @ truth / (truth @ truth))
    if abs(factor * len(rows) - 1) < CLOSE:
        words = f"returns {factor:.4g} times the log-probability: divided by the rows, as for a mean"
    else:
        words = f"returns {factor:.6g} times the log-probability"
    yield Reading((words,), factor * truth)
    constant = float(off.median())
    times = math.exp(min(-constant, 20.0))
    whole = times > 1.5 and abs(times - round(times)) < CLOSE
    why = f", -log {round(times)}: each column is counted {round(times)} times" if whole else ""
    yield Reading((f"is off by {constant:.5g} in every row{why}",), truth + constant)
    towards_mean = torch.log_softmax(x_NV / t, -1).mean(-1) - truth
    smoothing = float(off @ towards_mean / (towards_mean @ towards_mean))
    if smoothing > 0:
        yield Reading((f"smooths the labels, by {smoothing:.2g}",), truth + smoothing * towards_mean)
    square = total.square()
    z_loss = -float(off @ square / (square @ square))
    words = f"adds a z-loss, {z_loss:.3g} times the square of the logsumexp"
    yield Reading((words,), truth - z_loss * square)
    columns = float(((truth + total - rows).exp() - total.exp()).median())
    if columns > 0.5:
        words = (
            f"counts columns that are not there, as if their logits were 0, about {columns:.0f} of them: the last "
            "block of columns lacks its mask"
        )
        yield Reading((words,), truth + total - torch.logaddexp(total, total.new_tensor(columns).log()))
    floor, ceiling = float(rows.min()), float(rows.max())
    if int((rows == floor).sum()) > 1 and ceiling <= 0:
        words = (
            f"cuts log-probabilities off below {floor:.5g}, a probability of {math.exp(floor):.3g}: tokens that are "
            "less likely have no gradient"
        )
        yield Reading((words,), truth.clamp(floor))
    lowest = int(truth.argmin())
    epsilon = float(rows[lowest].exp() - truth[lowest].exp())
    if epsilon > 0:
        words = f"adds {epsilon:.3g} to the probability before the logarithm: use log_softmax"
        yield Reading((words,), (truth.exp() + epsilon).log())


def _searched(rows: Tensor, x_NV: Tensor, labels: Tensor, t: float) -> Iterator[Reading]:
    """Readings with a number in them that has to be searched for."""
    kinds: list[tuple[str, float, float, Callable[[Tensor, float], Tensor]]] = [
        ("divides the logits by {:.4g}" + ("" if t == 1.0 else ", whatever the temperature"), 0.05, 20, torch.div),
        ("caps the logits softly, at {:.4g}", 2, 500, lambda x, cap: cap * torch.tanh(x / cap)),
        ("multiplies the logits by tanh(logit / {:.4g})", 2, 500, lambda x, cap: x * torch.tanh(x / cap)),
    ]
    few = slice(ROWS_OF_A_FIT)
    for words, low, high, change in kinds:
        x = x_NV if change is torch.div else x_NV / t

        def distance(number: float, x: Tensor = x, change: Callable[[Tensor, float], Tensor] = change) -> float:
            return float((log_probs_of(change(x[few], number), labels[few], 1.0) - rows[few]).square().sum())

        best = _minimum(distance, low, high)
        yield Reading((words.format(best),), log_probs_of(change(x, best), labels, 1.0))


def _minimum(distance: Callable[[float], float], low: float, high: float) -> float:
    """The number in this range with the least distance, by trying some and narrowing down (golden section)."""
    steps = 16
    tried = [low * (high / low) ** (i / steps) for i in range(steps + 1)]
    distances = [distance(number) for number in tried]
    best = distances.index(min(distances))
    low, high = tried[max(0, best - 1)], tried[min(steps, best + 1)]
    ratio = (math.sqrt(5) - 1) / 2
    inner = [high - ratio * (high - low), low + ratio * (high - low)]
    values = [distance(number) for number in inner]
    for _ in range(40):
        if values[0] < values[1]:
            high, inner[1], values[1] = inner[1], inner[0], values[0]
            inner[0] = high - ratio * (high - low)
            values[0] = distance(inner[0])
        else:
            low, inner[0], values[0] = inner[0], inner[1], values[1]
            inner[1] = low + ratio * (high - low)
            values[1] = distance(inner[1])
    return (low + high) / 2
