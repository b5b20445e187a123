"""Why a function is wrong: what its numbers would be right for, found by computing that and comparing.

Shapes: N rows, V vocabulary.
"""

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from compiled_logprobs.check.cases import IGNORE_INDEX
from compiled_logprobs.check.function import Function
from compiled_logprobs.check.probe import ROWS, Got, Probe, Raised
from compiled_logprobs.check.readings import CLOSE, COARSELY, LOSS, TOLERANCES, imprecision, log_probs_of, read, same
from compiled_logprobs.problem import Problem, results_of, short_name

NUMBER_A_TOKEN = "a number a token is expected, as torch's losses give with reduction='none'"
ALWAYS = {
    "outside_write": "writes beyond what it may: a kernel without a mask at the end of a row, or strided rows taken "
    "for contiguous ones",
    "version_counter": "writes the gradient over the logits without telling autograd, so that others who saved them "
    "read it as logits; bump the version counter",
    "stale_result": "hands out memory that a later call writes again; return a tensor of its own",
    "grad_mode_bits": "takes another path where a gradient is needed, so that ratios of new to old probability do not "
    "start at exactly 1",
}
"""What a failed check says by itself."""

VALUES = frozenset({"log_prob_error", "log_prob_rmse"})
GRADIENT = frozenset({"gradient_flows", "gradient_error", "gradient_rmse", "gradient_sign", "gradient_row_sum"})


def likely_causes(
    function: Function, problem: Problem, failed: frozenset[str], device: torch.device, seed: int, ignore_index: bool
) -> list[str]:
    """What is probably wrong with a function that failed the checks `failed` on `problem`; the first explains most.

    It is called a few times more, with ordinary inputs. Where nothing is recognised the list is empty.
    """
    probe = Probe(function, problem._replace(masked_logits=False, inplace_backward=False), device, seed)
    causes: list[str] = []
    try:
        causes += _about_calling(probe, failed, ignore_index)
        causes += _about_kind(probe, failed)
        overwrites = [*_about_inputs(probe, failed)]
        remembers = [] if overwrites else [*_about_state(probe, failed)]
        causes += overwrites + remembers
        if remembers:  # what its numbers are then tells nothing
            return causes
        causes += _about_values(probe, failed)
        if not overwrites and probe.formula_is_right:  # otherwise what follows would tell only what comes of that
            for about in (_about_gradient, _about_others, _about_nan):
                causes += about(probe, failed)
        causes += _about_ignored(probe, failed)
        failed -= {"stale_result", "grad_mode_bits"} if overwrites else set()  # which are consequences
    except Raised as raised:
        if not causes and "outside_write" not in failed:  # where a write that goes nowhere here has been seen
            causes.append(f"raises for an ordinary input: {raised}")
    causes += [words for name, words in ALWAYS.items() if name in failed]
    return list(dict.fromkeys(causes))


def _about_calling(probe: Probe, failed: frozenset[str], ignore_index: bool) -> Iterator[str]:
    if "runs" not in failed:
        return
    if probe.raises(probe.logits, probe.labels) is not None:
        for what, *arguments in (
            ("logits and labels the other way round", "labels", "logits"),
            ("a batch of sequences", "logits[None]", "labels[None]"),
        ):
            other = replace(probe, function=probe.function.called_with(*arguments))
            if other.raises(other.logits, other.labels) is None:
                yield f'takes {what}: say --call "{other.function.call}"'
                return
        return
    raised = probe.raises(probe.logits, probe.some_ignored) if ignore_index else None
    if raised is not None:
        yield (
            f"has no ignored labels, and raises {raised.partition(':')[0]} for those of {IGNORE_INDEX}: mask them "
            "first, or leave them out of the check with --no-ignore-index"
        )
    for count, what in ((0, "an empty batch"), (1, "a batch of one row")):
        raised = probe.raises(probe.logits[:count], probe.labels[:count])
        if raised is not None:
            yield f"raises for {what} ({raised})"


def _about_kind(probe: Probe, failed: frozenset[str]) -> Iterator[str]:
    got = probe.run()
    first = got.first()
    if first is None:
        kind = "None" if got.result is None else f"a {type(got.result).__name__}"
        yield f"returns {kind}, and no tensor: return the log-probability of each label, [N] in float32"
        return
    if isinstance(got.result, (tuple, list)):
        kinds = [str(list(x.shape)) if isinstance(x, Tensor) else type(x).__name__ for x in got.result]
        results = f"{len(kinds)} results ({', '.join(kinds)})"
        yield f"returns {results} where one is expected: wrap it, and return the one that is meant"
    shape = list(first.shape)
    if first.ndim == 0:
        truth = log_probs_of(got.model, probe.labels, probe.temperature)
        for what, total in (("mean", truth.mean()), ("sum", truth.sum())):
            for of, sign in (("losses", -1), ("log-probabilities", 1)):
                if same(first.detach().double(), sign * total, COARSELY / 2):
                    yield f"returns the {what} of the {of} over the batch, where {NUMBER_A_TOKEN}"
                    return
        yield f"returns one number for the whole batch, where {NUMBER_A_TOKEN}"
    elif shape == [ROWS, 1]:
        yield "keeps a trailing dimension of 1: squeeze it"
    elif shape == [ROWS - 1]:
        shifted = log_probs_of(got.model[:-1], probe.labels[1:], probe.temperature)
        for words, sign in (("", 1), (", and returns the loss", -1)):
            if same(sign * first.detach().double(), shifted, 4 * COARSELY):
                yield f"shifts the labels itself, so that logits [N, V] and labels [N] give N - 1 results{words}"
                return
        yield "returns one result too few"
    elif shape != [ROWS]:
        yield f"returns {shape} for {ROWS} labels"
    if "dtype" in failed and first.dtype != torch.float32:
        step = torch.finfo(first.dtype).eps * 8 if first.dtype.is_floating_point else math.nan
        steps = f", which has steps of {step:.2g} nats at -10" if first.dtype.itemsize == 2 else ""
        yield f"returns {short_name(first.dtype)}{steps}: give float32"


def _about_values(probe: Probe, failed: frozenset[str]) -> Iterator[str]:
    got = probe.run()
    rows = got.rows()
    if rows is None:
        return
    reading = read(probe.sign * rows, got.model, probe.labels, probe.temperature)
    probe.formula_is_right = reading is not None and not reading.words
    if reading is None:
        return
    for words in reading.words:
        log_prob = "returns the log-probability: negative where a loss must be positive. Say --returns log_prob"
        yield log_prob if probe.sign < 0 and words == LOSS else words
    first = got.first()
    if not reading.words and failed & VALUES and first is not None and first.dtype.itemsize > 2:
        # A result in half precision says so by its dtype.
        yield from imprecision(probe.sign * rows, got.model, probe.labels, probe.temperature)
    if not reading.words and "log_prob_sign" in failed:
        yield "lets rounding carry a log-probability above 0, where a token is certain: clamp it"


def _about_state(probe: Probe, failed: frozenset[str]) -> Iterator[str]:
    if not failed & VALUES:
        return
    memory = probe.logits.clone()

    def numbers() -> Tensor:
        with torch.no_grad():
            result = probe.call(memory, probe.labels.clone())
        rows = Got(result, memory, memory).rows()
        return torch.empty(0) if rows is None else rows.clone()

    calls = [numbers() for _ in range(4)]
    memory.copy_(probe.new_logits())
    other = numbers()
    if not len(calls[0]) or not len(other):
        return
    if not all(same(rows, calls[0], CLOSE) for rows in calls):
        yield "gives other numbers when it is called again with the same input: it remembers something"
    elif torch.equal(other, calls[0]):  # probabilities may all be near 0, and so near one another
        yield "gives the old result for new values in the same memory: it remembers results by address or shape"


def _about_gradient(probe: Probe, failed: frozenset[str]) -> Iterator[str]:
    if not failed & GRADIENT or failed & (VALUES | {"log_prob_sign"}):
        return  # where the values are wrong, so is their gradient, and for the same reason
    got = probe.run()
    first = got.first()
    if first is None or first.numel() != ROWS:
        return
    if not first.requires_grad:
        yield "is detached from the logits: no gradient flows (a detach, a no_grad, or a kernel without backward)"
        return
    upstream = torch.randn(ROWS, generator=probe.generator, device=probe.device)
    (gradient,) = torch.autograd.grad(first.reshape(-1), got.model, upstream.to(first.dtype))
    gradient = probe.sign * gradient.double()
    t = probe.temperature
    probabilities = (got.model.detach().double() / t).softmax(-1)
    at_label = torch.zeros_like(probabilities).scatter(-1, probe.labels[:, None], 1.0)
    true = (at_label - probabilities) / t
    g = upstream.double()[:, None]
    readings = {
        "": true * g,
        "is of the loss: its sign is the wrong way round": -true * g,
        "takes the upstream gradient for 1": true,
        "leaves out the softmax: it is at the label alone": at_label / t * g,
        "is 0 everywhere": torch.zeros_like(true),
        "lacks the division by the temperature": true * t * g,
        "divides by the temperature twice": true / t * g,
    }
    fitting = (
        words for tolerance in TOLERANCES for words, values in readings.items() if same(gradient, values, tolerance)
    )
    if words := next(fitting, ""):
        yield f"the values are right, and the gradient {words}"


def _about_others(probe: Probe, failed: frozenset[str]) -> Iterator[str]:
    """What is returned beside the log-probabilities."""
    for name in results_of(probe.problem):
        if not failed & {name, f"{name}_sign", f"{name}_error", f"{name}_rmse", "gradient_flows"}:
            continue
        got = probe.run(asked=name)
        result = got.other()
        if result is None:
            continue
        x, what = got.model.detach().double(), name.replace("_", " ")
        if name in ("entropy", "logsumexp") and not result.requires_grad:
            yield f"the {what} is detached from the logits: no gradient flows through it"
        if name == "argmax":
            yield from _about_argmax(probe)
            continue
        true, *wrong = OF_ROWS[name](x, probe.temperature)
        values = result.detach().double() / true[1]
        fitting = (words for words, number in (true, *wrong) if same(values, number / true[1], COARSELY))
        if words := next(fitting, ""):
            yield words
        elif probe.temperature != 1.0 and same(values, OF_ROWS[name](x, 1.0)[0][1] / true[1], COARSELY):
            yield f"the {what} is that of the logits before the temperature divides them"


def _entropies(x_NV: Tensor, t: float) -> list[tuple[str, Tensor]]:
    """The truth, and what is commonly returned in its place."""
    true = torch.special.entr((x_NV / t).softmax(-1)).sum(-1)
    return [
        ("", true),
        ("returns the sum of p log p as the entropy: negative where an entropy must be positive. Negate it", -true),
        ("returns the entropy in bits, not in nats", true / math.log(2)),
    ]


def _logsumexps(x_NV: Tensor, t: float) -> list[tuple[str, Tensor]]:
    x = x_NV / t
    true = x.logsumexp(-1)
    return [
        ("", true),
        ("the logsumexp lacks the maximum that was subtracted before: add it again", true - x.amax(-1)),
        ("returns minus the logsumexp", -true),
    ]


def _sums_of_squares(x_NV: Tensor, t: float) -> list[tuple[str, Tensor]]:
    true = (x_NV / t).softmax(-1).square().sum(-1)
    return [
        ("", true),
        ("returns 1 minus the sum of squared probabilities", 1 - true),
        ("returns the square root of the sum of squared probabilities", true.sqrt()),
        ("returns the logarithm of the sum of squared probabilities", true.log()),
    ]


OF_ROWS = {"entropy": _entropies, "logsumexp": _logsumexps, "sum_p_squared": _sums_of_squares}


def _about_argmax(probe: Probe) -> Iterator[str]:
    logits, last = probe.logits.clone(), probe.problem.vocab - 1
    logits[:, [0, last]] = logits.amax(-1, keepdim=True)
    result = probe.run(logits, asked="argmax").other()
    if result is not None and bool((result == last).all()):
        yield "takes the last of equal maxima as the argmax, where the first counts"


def _about_ignored(probe: Probe, failed: frozenset[str]) -> Iterator[str]:
    if "ignored_rows" not in failed:
        return
    rows, ignored = probe.run(labels=probe.some_ignored).rows(), probe.some_ignored == IGNORE_INDEX
    remedy = "Mask them, or check with --no-ignore-index"
    for name in results_of(probe.problem):
        result, due = probe.run(labels=probe.some_ignored, asked=name).other(), -1 if name == "argmax" else 0
        if result is not None and bool((result[ignored] != due).any()):
            what = f"a{'n' if name[0] in 'ae' else ''} {name.replace('_', ' ')}"
            yield f"does not give {what} of {due} for labels of {IGNORE_INDEX}. {remedy}"
    if rows is None:
        return
    got, logits = rows[ignored], probe.logits[ignored]
    for words, token in (("token 0", 0), (f"token V - {-IGNORE_INDEX}", probe.problem.vocab + IGNORE_INDEX)):
        expected = log_probs_of(logits, torch.full((len(logits),), token, device=logits.device), probe.temperature)
        if same(got.abs(), expected.abs(), 4 * COARSELY):
            yield f"does not know ignored labels: {IGNORE_INDEX} counts as {words}. {remedy}"
            return
    if probe.formula_is_right and not bool((got == 0).all()):
        yield f"does not give 0 for labels of {IGNORE_INDEX}. {remedy}"


def _about_nan(probe: Probe, failed: frozenset[str]) -> Iterator[str]:
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


def _about_inputs(probe: Probe, failed: frozenset[str]) -> Iterator[str]:
    if "inputs_changed" not in failed:
        return
    got = probe.run()
    before, after, first = got.model.detach().double(), got.logits.double(), got.first()
    words = "writes over its arguments: take a copy of what is changed"
    if same(after, before, 0.0) and first is not None and first.requires_grad:
        torch.autograd.grad(first.sum(), got.model, allow_unused=True)
        if not same(got.logits.double(), before, 0.0):
            words = "writes the gradient over the logits, unasked: whoever reads them afterwards reads the gradient"
    elif same(after, before / probe.temperature, COARSELY):
        words = "divides the logits by the temperature in place: the next who reads them divides once more"
    elif same(after, before - before.amax(-1, keepdim=True), COARSELY):
        words = "subtracts the maximum from the logits in place"
    yield words
