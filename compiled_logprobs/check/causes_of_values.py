"""Why log-probabilities are wrong: for ordinary inputs, for some labels, at other levels, with infinities.

Shapes: N rows, V vocabulary.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from compiled_logprobs.check.cases import BLOCK_EDGES
from compiled_logprobs.check.probe import ROWS, Got, Probe
from compiled_logprobs.check.readings import (
    CLOSE,
    COARSELY,
    LOG_PROB,
    LOSS,
    OF_FLOAT32,
    imprecision,
    log_probs_of,
    read,
    same,
)

VALUES = frozenset({"log_prob_error", "log_prob_rmse"})
FAR, NEAR = 1e4, 200.0
"""How far rows are shifted: exponentials overflow or vanish at both, and half precision has no digits at the first."""
AHEAD = 150.0
"""How far one logit is ahead of all others: their probabilities are below what float32 has."""


def about_values(probe: Probe, failed: frozenset[str]) -> Iterator[str]:
    """What the log-probabilities of ordinary rows are instead, and where those are right, of others."""
    got = probe.run()
    rows = got.rows()
    if rows is None:
        return
    rows = probe.sign * rows
    reading = read(rows, got.model, probe.labels, probe.temperature)
    probe.formula_is_right = reading is not None and not reading.words
    if reading is None:
        yield from _about_filters(probe)
        yield from _about_the_last_rows(rows, log_probs_of(got.model, probe.labels, probe.temperature))
        return
    for words in reading.words:
        yield LOG_PROB if probe.sign < 0 and words == LOSS else words
    if reading.words:
        return
    first, coarse = got.first(), list[str]()
    if failed & VALUES and first is not None and first.dtype.itemsize > 2:
        # A result in half precision says so by its dtype.
        coarse = list(imprecision(rows, got.model, probe.labels, probe.temperature))
    yield from coarse
    if failed & (VALUES | {"nan_pattern", "log_prob_sign"}) and not coarse:
        error = float((rows - _truth(probe, got.model)).abs().max())
        unlike_others = [
            *_about_no_gradient(probe),
            *_about_few_rows(probe),
            *_about_odd_labels(probe, error),
            *_about_levels(probe),
        ]
        yield from unlike_others
        if not unlike_others:
            yield from _about_certain_tokens(probe)


def _about_few_rows(probe: Probe) -> Iterator[str]:
    truth = _truth(probe, probe.logits)
    for count in range(1, 9):
        rows = probe.run(probe.logits[:count], probe.labels[:count]).rows()
        if rows is not None and not same(probe.sign * rows, truth[:count], COARSELY / 3):
            size = "one row" if count == 1 else f"{count} rows"
            yield f"gives other numbers in a batch of {size}, for which it takes another path"
            return


def _about_certain_tokens(probe: Probe) -> Iterator[str]:
    """Labels that are likelier than all others, by far and by little."""
    top = probe.logits.amax(-1, keepdim=True).float()
    by_far, by_little = (
        probe.logits.scatter(-1, probe.labels[:, None], (top + ahead).to(probe.problem.dtype)) for ahead in (30.0, 1.0)
    )
    rows = probe.run(by_far).rows()
    if rows is None:
        return
    largest, smallest = float((probe.sign * rows).max()), float((probe.sign * rows).min())
    if 0 < largest < CLOSE:
        yield "lets rounding carry a log-probability above 0, where a token is certain: clamp it"
    elif largest < -OF_FLOAT32 and largest - smallest < OF_FLOAT32:
        yield f"cuts log-probabilities off above {largest:.4g}: likelier tokens have no gradient"
    rows = probe.run(by_little).rows()
    if rows is not None and not bool(rows.any()):
        yield "gives 0 for the most likely token, however likely it is: takes it for certain"


def _about_no_gradient(probe: Probe) -> Iterator[str]:
    with torch.no_grad():
        rows = Got(probe.call(probe.logits.clone(), probe.labels.clone()), probe.logits, probe.logits).rows()
    if rows is None or same(probe.sign * rows, _truth(probe, probe.logits), 4 * COARSELY):
        return
    gives = "0" if not rows.any() else "other numbers"
    yield f"is right where a gradient is needed, and gives {gives} where none is"


def _about_odd_labels(probe: Probe, error: float) -> Iterator[str]:
    """Labels at the ends and at block edges, where ordinary ones are off by no more than `error`."""
    vocab = probe.problem.vocab
    labels = [*range(4), *(edge + side for edge in BLOCK_EDGES for side in (-1, 0, 1)), vocab - 2, vocab - 1]
    asked = torch.tensor(sorted({label for label in labels if 0 <= label < vocab}), device=probe.device)
    logits = probe.logits[torch.arange(len(asked), device=probe.device) % ROWS]
    rows, truth = probe.run(logits, asked).rows(), _truth(probe, logits, asked)
    if rows is None or not bool(rows.isfinite().all()):
        return
    rows = probe.sign * rows
    wrong = (rows - truth).abs() > max(4 * error, CLOSE * float(truth.abs().max()))
    if not bool(wrong.any()) or bool(wrong.all()):
        return
    zero = wrong & (rows == 0)
    if bool(zero.any()):
        yield f"gives 0 for label {_listed(asked[zero])}: takes it for one to ignore"
        return
    log_p = torch.log_softmax(logits.double() / probe.temperature, -1)
    nearest = (log_p - rows[:, None]).abs().min(-1)
    if bool((nearest.values[wrong] < OF_FLOAT32 * truth.abs().max()).all()):
        yield f"reads label {_listed(asked[wrong])} as token {_listed(nearest.indices[wrong])}"


def _listed(numbers: Tensor) -> str:
    first = [str(int(number)) for number in numbers[:3]]
    return " and ".join(first) + (" and others" if len(numbers) > 3 else "")


def _about_levels(probe: Probe) -> Iterator[str]:
    """Rows far above and far below 0, where exponentials overflow and vanish; and one logit far above the others."""

    def gives(shift: Tensor) -> tuple[Tensor | None, bool]:
        logits = (probe.logits.float() + shift).to(probe.problem.dtype)
        rows = probe.run(logits).rows()
        right = rows is not None and same(probe.sign * rows, _truth(probe, logits), 4 * COARSELY)
        return rows, right

    level = torch.full((ROWS, 1), FAR, device=probe.device)
    (up, up_is_right), (down, down_is_right) = gives(level), gives(-level)
    alternating = level * (1 - 2 * (torch.arange(ROWS, device=probe.device)[:, None] % 2))
    if up is None or down is None:
        return
    if not up_is_right and not down_is_right:
        near, near_is_right = gives(level / FAR * NEAR)
        if not near_is_right and near is not None and not bool(near.isfinite().all()):
            yield f"does not subtract the largest logit before it takes exponentials: rows at {NEAR:g} overflow"
    elif not down_is_right:
        if bool(down.isfinite().all()):
            lowered = (probe.logits.float() - level).to(probe.problem.dtype).double() / probe.temperature
            total = lowered.gather(-1, probe.labels[:, None]).squeeze(-1) - probe.sign * down
            if float((total - total[0]).abs().max()) < 4 * COARSELY:  # all rows have what is common to all, and no more
                yield (
                    "masks columns that are not there with a finite number, which counts where all logits are far "
                    "below it: mask with -inf"
                )
        else:
            yield "takes the largest logit to be 0 or more, as where a maximum starts at 0: start with -inf"
    elif up_is_right and not gives(alternating)[1]:
        yield "subtracts the largest logit of the batch, not of each row: rows far below it have a sum of 0"
    if up_is_right and down_is_right:
        vocab = probe.problem.vocab

        def gives_ahead(columns: Tensor) -> tuple[Tensor | None, bool]:
            ahead = torch.zeros_like(probe.logits, dtype=torch.float32)
            return gives(ahead.scatter_(-1, columns[:, None], AHEAD))

        rows, right = gives_ahead((probe.labels + 1 + vocab // 2) % vocab)
        if rows is None or right:
            return
        rows = probe.sign * rows
        ends = (torch.full_like(probe.labels, column) for column in (0, vocab - 1))
        if any(gives_ahead(columns)[1] for columns in ends):
            yield "subtracts the largest logit of a part of the columns, not of the whole row: exponentials overflow"
        elif not bool(rows.isfinite().all()):
            yield "takes the logarithm of a probability that has rounded to 0: use log_softmax"
        elif float(rows.max() - rows.min()) < CLOSE * float(rows.abs().max()):
            yield f"cuts log-probabilities off below {float(rows.max()):.5g}: less likely tokens have no gradient"


def _about_filters(probe: Probe) -> Iterator[str]:
    """What a sampler leaves of the vocabulary; the label that is most likely is certainly left."""
    most = probe.logits.argmax(-1)
    rows, truth = probe.run(labels=most).rows(), _truth(probe, probe.logits, most)
    if rows is None or not bool(rows.isfinite().all()):
        return
    p = torch.softmax(probe.logits.double() / probe.temperature, -1).sort(-1, descending=True).values.cumsum(-1)
    mass = (truth - probe.sign * rows).exp()
    near = (p - mass[:, None]).abs().min(-1)
    if bool((mass > 1 - CLOSE).any()) or bool((near.values > CLOSE).any()):
        return
    counts = near.indices + 1
    if bool((counts == counts[0]).all()):
        yield f"normalises over the {int(counts[0])} largest logits alone, as after top-k sampling"
        return
    before = p.gather(-1, (counts - 2).clamp(min=0)[:, None]).squeeze(-1) * (counts > 1)
    share = round(float(mass.min()), 2)
    if bool((before <= share + CLOSE).all() and (mass >= share - CLOSE).all()):
        yield f"normalises over the tokens that make up {share:g} of the probability alone, as after top-p sampling"


def _about_the_last_rows(rows: Tensor, truth: Tensor) -> Iterator[str]:
    right = (rows - truth).abs() <= CLOSE * truth.abs().max()
    count = int(right.sum())
    if 0 < count < len(rows) and bool(right[:count].all()):
        gives = "gives 0 for" if not bool(rows[count:].any()) else "is wrong for"
        yield f"{gives} the last rows, from row {count} of {len(rows)} on: a chunk or a block of rows is left out"


def _truth(probe: Probe, logits: Tensor, labels: Tensor | None = None) -> Tensor:
    return log_probs_of(logits, probe.labels if labels is None else labels, probe.temperature)


def about_nan(probe: Probe, failed: frozenset[str]) -> Iterator[str]:
    """Rows that hold NaN or infinities."""
    if "nan_pattern" not in failed:
        return
    logits = probe.logits.clone()
    logits[0, 5] = math.nan
    logits[1] = -math.inf
    logits[2, probe.labels[2]] = -math.inf
    if probe.raises(logits, probe.labels):
        return
    entropy = probe.run(logits, asked="entropy").other() if probe.problem.entropy else None
    if entropy is not None and bool(entropy[2].isnan()):
        yield "gives NaN as the entropy where a logit is -inf: 0 times infinity, which has to count 0"
    rows = probe.run(logits).rows()
    if rows is None:
        return
    if bool(rows[0].isfinite()):
        yield "makes a number of a row that holds NaN, which hides where it came from"
    if bool(rows[1].isfinite()) or bool(rows[2].isfinite()):
        yield "makes a number of a label at -inf, or of a row that is all -inf: a clamp, or a large number for infinity"
    elif bool(rows[2].isnan()):
        yield "gives NaN for a label at -inf, whose log-probability is -inf: 0 times infinity on the way"
    if probe.has_masked_logits:
        vocab = probe.problem.vocab
        logits = probe.logits.clone()
        logits[:, : vocab * 3 // 4] = -math.inf
        rows = probe.run(logits, torch.full_like(probe.labels, vocab - 1)).rows()
        if rows is not None and bool(rows.isnan().any()):
            yield "gives NaN where a whole block of columns is -inf: -inf minus a maximum of -inf"
