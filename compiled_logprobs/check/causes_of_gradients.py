"""Why the gradient of log-probabilities is wrong, where their values are right.

Shapes: N rows, V vocabulary.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from compiled_logprobs.check.cases import IGNORE_INDEX
from compiled_logprobs.check.causes_of_values import VALUES
from compiled_logprobs.check.probe import ROWS, Probe, Raised
from compiled_logprobs.check.readings import CLOSE, COARSELY, HALVES, TOLERANCES, same
from compiled_logprobs.problem import short_name

GRADIENT = frozenset({"gradient_flows", "gradient_error", "gradient_rmse", "gradient_sign", "gradient_row_sum"})
BEGINNING = "the values are right, and the gradient"
FACTOR = "has a factor in each row"
"""What is said where nothing more definite fits: so has, nearly, what smooths the labels."""


def about_gradient(probe: Probe, failed: frozenset[str]) -> Iterator[str]:
    """What the gradient of ordinary rows is instead; and beside ignored labels."""
    if not failed & (GRADIENT | {"ignored_rows"}) or failed & (VALUES | {"log_prob_sign"}):
        return  # where the values are wrong, so is their gradient, and for the same reason
    got = probe.run()
    first = got.first()
    if first is None or first.numel() != ROWS:
        return
    if not first.requires_grad:
        yield "is detached from the logits: no gradient flows (a detach, a no_grad, or a kernel without backward)"
        return
    upstream = torch.randn(ROWS, generator=probe.generator, device=probe.device)
    gradient = probe.sign * probe.gradient(first, got, upstream)
    words = _reading(gradient, upstream, probe)
    if words:
        yield f"{BEGINNING} {words}"
    elif words is not None:  # right for labels that all count
        yield from _about_ignored(probe, upstream)


def _reading(gradient: Tensor, upstream: Tensor, probe: Probe) -> str | None:
    """What it is; nothing where it is right, and None where it is not recognised."""
    x, t, vocab = probe.logits.double() / probe.temperature, probe.temperature, probe.problem.vocab
    p = x.softmax(-1)
    at_label = torch.zeros_like(p).scatter(-1, probe.labels[:, None], 1.0)
    true = (at_label - p) / t
    g = upstream.double()[:, None]

    def share(direction: Tensor) -> float:
        """How much of it there is beside the right gradient."""
        return float(((gradient - true * g) * direction).sum() / direction.square().sum())

    readings = {
        "": true * g,
        "is of the loss: its sign is the wrong way round": -true * g,
        "takes the upstream gradient for 1": true,
        "takes the first row's upstream gradient for all": true * g[0],
        "takes the mean of the upstream gradient for all of it": true * g.mean(),
        "leaves out the softmax: it is at the label alone": at_label / t * g,
        "is 0 everywhere": torch.zeros_like(true),
        "lacks the division by the temperature": true * t * g,
        "divides by the temperature twice": true / t * g,
    }
    if bool(gradient.masked_fill(at_label > 0, 0.0).any()):  # however small beside what is at the label
        del readings["leaves out the softmax: it is at the label alone"]
    if words := _first_that_fits(gradient, readings):
        return words
    is_right = words == ""
    is_rounded = probe.problem.dtype == torch.float32 and torch.equal(gradient, gradient.bfloat16().double())
    if is_right and is_rounded:
        return "is rounded to bfloat16, whatever the logits are"
    exact = is_right and probe.problem.dtype == torch.float32
    of_upstream = "" if is_right and not exact else _about_upstream(gradient, true, upstream.double(), exact=exact)
    if of_upstream and not of_upstream.startswith(FACTOR):
        return of_upstream
    if words := _about_zeros(gradient, true * g, probe):
        return words
    measured = {f"is {1 + share(true * g):.4g} times the right one": (1 + share(true * g)) * true * g}
    of_z_loss = -2 * x.logsumexp(-1, keepdim=True) * p / t * g
    for what, direction in (
        ("smooths the labels, by {:.2g}", (1 / vocab - at_label) / t * g),
        ("smooths the labels, by {:.2g}, of which the others get nothing", -at_label / t * g),
        ("is also that of a z-loss, {:.3g} times the square of the logsumexp", of_z_loss),
    ):
        if share(direction) > 0:
            measured[what.format(share(direction))] = true * g + share(direction) * direction
    words = _first_that_fits(gradient, measured) or ""
    if words and is_right:  # what is measured on the numbers fits rounding, too
        off = [float((gradient - values).abs().max()) for values in (true * g, measured[words])]
        words = "" if off[0] < 4 * off[1] or off[0] < CLOSE * float(true.abs().max()) else words
    return words or of_upstream or ("" if is_right else None)


def _first_that_fits(gradient: Tensor, readings: dict[str, Tensor]) -> str | None:
    fitting = (
        words for tolerance in TOLERANCES for words, values in readings.items() if same(gradient, values, tolerance)
    )
    return next(fitting, None)


def _about_upstream(gradient: Tensor, true: Tensor, upstream: Tensor, *, exact: bool) -> str:
    """What it takes for the upstream gradient, where each row is right but for a number of its own."""
    taken = (gradient * true).sum(-1) / true.square().sum(-1)
    largest = float(taken.abs().max())
    for half in HALVES if exact else ():
        rounded, off = upstream.to(half).double(), (taken - upstream).abs().max()
        if float((taken - rounded).abs().max()) < min(CLOSE, float(off) / 8):
            return f"rounds the upstream gradient to {short_name(half)}: keep it in float32"
    if exact or not same(gradient, true * taken[:, None], COARSELY):
        return ""
    readings = {
        "takes the upstream gradient without its sign": upstream.abs(),
        "takes the sign alone of the upstream gradient": upstream.sign(),
        "leaves out a negative upstream gradient: it is clamped at 0": upstream.clamp(min=0.0),
        "leaves out a positive upstream gradient: it is clamped at 0": upstream.clamp(max=0.0),
        f"clamps the upstream gradient to {largest:.3g}": upstream.clamp(-largest, largest),
    }
    factors = taken / upstream
    least, most = float(factors.min()), float(factors.max())
    words = f"{FACTOR}, {least:.3g} to {most:.3g}, as where it is clipped"
    words = words if most - least > COARSELY * abs(most) else ""
    return next((words for words, values in readings.items() if same(taken, values, COARSELY)), words)


def _about_zeros(gradient: Tensor, true: Tensor, probe: Probe) -> str:
    """Whether it is right where it is not 0."""
    lost = (gradient == 0) & (true.abs() > torch.finfo(probe.problem.dtype).smallest_normal)
    if not bool(lost.any()) or not same(gradient, true.masked_fill(lost, 0.0), COARSELY):
        return ""
    largest, smallest = float(true[lost].abs().max()), float(true[~lost].abs().min())
    if largest <= smallest * (1 + COARSELY):
        return f"is 0 where it is small, below {largest:.2g}: that is left out, and adds up"
    return f"is 0 in a part of the columns, {int(lost.sum(-1).double().mean())} of {true.shape[1]} in a row"


def _about_ignored(probe: Probe, upstream: Tensor) -> Iterator[str]:
    got = probe.run(labels=probe.some_ignored)
    first, ignored = got.first(), probe.some_ignored == IGNORE_INDEX
    if first is None or first.numel() != ROWS or not first.requires_grad:
        return
    gradient = probe.gradient(first, got, upstream)
    if bool(gradient[ignored].any()) and not bool(first.detach()[ignored].any()):
        yield f"gives labels of {IGNORE_INDEX} a gradient, though their result is 0"
    if not bool(gradient.any()):
        yield f"{BEGINNING} is 0 everywhere as soon as one label is ignored"
    first = probe.run(labels=torch.full_like(probe.labels, IGNORE_INDEX)).first()
    if first is not None and not first.requires_grad:
        yield "is detached from the logits where all labels are ignored: a backward raises then"


def about_backward(probe: Probe, asked: str) -> str | None:
    """What the backward of this result raises, if it does; of the log-probabilities where none is asked."""
    got = probe.run(asked=asked)
    result = got.other() if asked else got.first()
    if result is None or not result.requires_grad:
        return None
    try:
        probe.gradient(result, got, torch.ones(result.numel(), device=probe.device))
    except Raised as raised:
        return str(raised)
    return None
