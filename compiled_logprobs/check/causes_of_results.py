"""Why what is returned beside log-probabilities is wrong, and the gradient through it.

Shapes: N rows, V vocabulary.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from compiled_logprobs.check.causes_of_gradients import GRADIENT
from compiled_logprobs.check.probe import Got, Probe
from compiled_logprobs.check.readings import CLOSE, COARSELY, SHARDS, log_probs_of, same
from compiled_logprobs.problem import results_of, short_name


def about_results(probe: Probe, failed: frozenset[str]) -> Iterator[str]:
    """What is returned beside the log-probabilities."""
    for name in results_of(probe.problem):
        about_it = {name, f"{name}_sign", f"{name}_error", f"{name}_rmse", "nan_pattern", "dtype"}
        if not failed & (about_it | GRADIENT):
            continue
        got = probe.run(asked=name)
        result = got.other()
        if result is None:
            continue
        what = name.replace("_", " ")
        due = torch.int64 if name == "argmax" else torch.float32
        if "dtype" in failed and result.dtype != due:
            yield f"returns the {what} as {short_name(result.dtype)}: give {short_name(due)}"
        if name == "argmax":
            yield from _about_argmax(probe)
            continue
        if words := _reading(name, got, result, probe):
            yield words
        elif name in ("entropy", "logsumexp"):
            if not result.requires_grad:
                yield f"the {what} is detached from the logits: no gradient flows through it"
            else:
                yield from _about_its_gradient(name, probe, failed)


def _reading(name: str, got: Got, result: Tensor, probe: Probe) -> str:
    """What the numbers are instead; nothing where they are right, or not recognised."""
    x, what, t = got.model.detach().double(), name.replace("_", " "), probe.temperature
    (_, true), *wrong = OF_ROWS[name](x, t)
    readings = [("", true), *wrong]
    if t != 1.0:
        readings.append(
            (f"the {what} is that of the logits before the temperature divides them", OF_ROWS[name](x, 1.0)[0][1])
        )
    for direction, step in (("before", 1), ("after", -1)):
        readings.append((f"gives each row the {what} of the row {direction}", true.roll(step)))
    if name == "entropy":
        words = "returns minus the log-probability of the label as the entropy: an estimate from one token"
        readings.append((words, -log_probs_of(x, probe.labels, t)))
    values = result.detach().double()
    fitting = (
        words
        for tolerance in (CLOSE, COARSELY)
        for words, numbers in readings
        if same(values / true, numbers / true, tolerance)
    )
    found = next(fitting, None)
    if found == "" and not same(values, true, CLOSE):
        return f"computes the {what} in half precision, or as coarsely: convert the logits to float32 first"
    return found or ""


def _about_its_gradient(name: str, probe: Probe, failed: frozenset[str]) -> Iterator[str]:
    what, logits = name.replace("_", " "), probe.logits.clone()
    if failed & GRADIENT:
        upstream = torch.randn(len(logits), generator=probe.generator, device=probe.device)
        gradient = _gradient(name, probe, logits, upstream)
        x = logits.double().requires_grad_()
        (true,) = torch.autograd.grad(OF_ROWS[name](x, probe.temperature)[0][1], x, upstream.double())
        if float(gradient.abs().max()) < CLOSE * float(true.abs().max()):
            yield f"the {what}'s gradient is 0: what comes from above it is dropped"
        elif same(gradient, -true, COARSELY):
            yield f"the {what}'s gradient has the wrong sign"
        elif probe.temperature != 1.0 and same(gradient, true * probe.temperature, COARSELY):
            yield f"the {what}'s gradient lacks the division by the temperature"
    if name == "entropy" and "nan_pattern" in failed:
        logits[0, : probe.problem.vocab // 2 : 3] = -math.inf
        entropy = probe.run(logits, asked=name).other()
        gradient = _gradient(name, probe, logits, torch.ones(len(logits), device=probe.device))
        if entropy is not None and bool(entropy.isfinite().all()) and bool(gradient.isnan().any()):
            yield (
                "the entropy's gradient is NaN where a logit is -inf, though the entropy is not: 0 times infinity, "
                "mended afterwards, where it has to be masked before"
            )


def _gradient(name: str, probe: Probe, logits: Tensor, upstream: Tensor) -> Tensor:
    """Its share of the gradient that comes through it and the log-probabilities together, as in training."""
    together, alone = probe.run(logits, asked=name), probe.run(logits, asked=name)
    (first, result), log_probs = (together.first(), together.other()), alone.first()
    assert first is not None and result is not None and log_probs is not None  # they were a moment ago
    ones = torch.ones_like(upstream)
    gradient = probe.gradient(first.reshape(-1) + result * upstream, together, ones)
    return gradient - probe.gradient(log_probs, alone, ones) if log_probs.requires_grad else gradient


Rows = list[tuple[str, Tensor]]
"""The truth, and what is commonly returned in its place."""


def _entropies(x_NV: Tensor, t: float) -> Rows:
    log_p = (x_NV / t).log_softmax(-1)
    true = -(log_p.exp() * log_p.masked_fill(log_p == -math.inf, 0.0)).sum(-1)
    return [
        ("", true),
        ("returns the sum of p log p as the entropy: negative where an entropy must be positive. Negate it", -true),
        ("returns the entropy in bits, not in nats", true / math.log(2)),
        ("divides the entropy by its largest value, log V", true / math.log(x_NV.shape[1])),
        *(
            (f"adds up the entropies of {shards} shards of the columns, of a softmax each", _added_up(x_NV / t, shards))
            for shards in SHARDS
        ),
    ]


def _added_up(x_NV: Tensor, shards: int) -> Tensor:
    total = x_NV.new_zeros(len(x_NV))
    for x in torch.split(x_NV, -(-x_NV.shape[1] // shards), -1):
        total = total - (x.softmax(-1) * x.log_softmax(-1)).nan_to_num(0.0).sum(-1)
    return total


def _logsumexps(x_NV: Tensor, t: float) -> Rows:
    x = x_NV / t
    true = x.logsumexp(-1)
    return [
        ("", true),
        ("the logsumexp lacks the maximum that was subtracted before: add it again", true - x.amax(-1)),
        ("returns minus the logsumexp", -true),
        ("returns the logsumexp to base 2", true / math.log(2)),
    ]


def _sums_of_squares(x_NV: Tensor, t: float) -> Rows:
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
    result = probe.run(-logits.abs() - 1, asked="argmax").other()
    if result is not None and bool((result > last).any()):
        yield "returns an argmax beyond the vocabulary where all logits are negative: columns added at the end win"
