"""Verdicts: what one call returned and did, held against float64 and against what plain torch makes of the same input.

Shapes: N rows, n of them compared, V vocabulary, K labels a row; R one or two leading dimensions, whose product is N.
"""

import math
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from compiled_logprobs.check.cases import Case
from compiled_logprobs.check.inputs import PLAIN_CEILING, CaseInputs, Returned
from compiled_logprobs.check.report import Errors, Notes
from compiled_logprobs.decision import Kind
from compiled_logprobs.operation.reference import Reference
from compiled_logprobs.problem import Problem, results_of

EPS = torch.finfo(torch.float32).eps
BUDGET = 2.0
"""How many times the error of plain torch a backend may make."""
FEWEST_ROWS_FOR_A_MEAN = 4
YARDSTICK_LOGITS, YARDSTICK_ROWS = 2**22, 64
"""How many logits, in how many rows at most, tell how far plain torch is off on ordinary rows."""
OF_ROWS: tuple[Kind, ...] = ("entropy", "logsumexp", "sum_p_squared")
"""Numbers that are returned one a row."""


class Judged(Protocol):
    """Inputs with the truth about them, of logits or of hidden states."""

    problem: Problem
    yardstick: dict[str, float]
    ceiling: float
    labels: Tensor
    ignored: Tensor
    upstream: dict[str, Tensor]
    sample: Tensor
    scale: Tensor
    row_temperature: float | Tensor
    true: Reference
    plain: Returned

    @property
    def case(self) -> Case: ...

    def sampled(self, tensor: Tensor, columns: int) -> Tensor: ...


def judge(inputs: Judged, results: Returned, notes: Notes) -> None:
    """Hold the results of a call against the truth."""
    problem, case = inputs.problem, inputs.case
    largest = float(results.log_probs.nan_to_num(nan=-1.0).max()) if results.log_probs.numel() else 0.0
    log_probs, true = inputs.sampled(results.log_probs, problem.labels_per_row).double(), inputs.true.log_probs
    ordinary = case.rows > 1 and not case.special and not case.largest_is_the_label
    flipped = ordinary and torch.allclose(log_probs, -true, rtol=1e-2, atol=1e-2)
    hint = "; this is +cross entropy: negate it" if flipped and largest > 0 else ""
    notes.add("log_prob_sign", largest <= 0.0, f"largest log-probability {largest:.4g}{hint}", largest)
    ignored = inputs.ignored
    zero = results.log_probs[ignored] == 0
    notes.add("ignored_rows", bool(zero.all()), "an ignored label does not give 0")
    for name in results_of(problem):
        expected = -1 if name == "argmax" else 0
        right = getattr(results, name)[ignored.all(-1)] == expected
        notes.add("ignored_rows", bool(right.all()), f"the {name} of an ignored row is not {expected}")
    if results.entropy is not None:
        smallest = float(results.entropy.nan_to_num(nan=1.0).min()) if results.entropy.numel() else 0.0
        notes.add("entropy_sign", smallest >= 0.0, f"smallest entropy {smallest:.4g}", -smallest)
    if results.argmax is not None:
        _judge_argmax(inputs, results.argmax, notes)
    if results.gradient is not None:
        gradient = inputs.sampled(results.gradient, problem.vocab)
        all_ignored = inputs.sampled(ignored, problem.labels_per_row).all(-1)
        zero = gradient[all_ignored] == 0
        notes.add("ignored_rows", bool(zero.all()), "the gradient of an ignored row is not 0")
        _judge_silence(inputs, log_probs, gradient, notes)
        _judge_gradient_sign(inputs, gradient, notes)
    for errors, plain, scale in _errors(inputs, results):
        if errors.got.numel():
            notes.add("nan_pattern", errors.fits_pattern, f"{errors.what} is NaN or infinite elsewhere than in float64")
            notes.add_errors(errors)
            judge_errors(errors, plain, scale, inputs, notes)


def _errors(inputs: Judged, results: Returned) -> Iterator[tuple[Errors, Tensor, Tensor]]:
    """Of each kind of result, what plain torch returns as well, and [n, 1] what an eps(float32) is relative to."""
    problem, true, plain = inputs.problem, inputs.true, inputs.plain
    x_scale = inputs.scale
    log_probs = inputs.sampled(results.log_probs, problem.labels_per_row)
    labels = inputs.sampled(inputs.labels, problem.labels_per_row)
    kept = ~inputs.sampled(inputs.ignored, problem.labels_per_row)

    def at_least_the_largest(errors: Errors) -> Tensor:
        return x_scale.double().clamp(min=float(errors.truth.abs().max()) if errors.truth.numel() else 0.0)

    errors = Errors("log_prob", log_probs, true.log_probs, kept, inputs.sample, labels)
    yield errors, plain.log_probs, at_least_the_largest(errors)
    kept_rows = kept.any(-1, keepdim=True)
    for name in OF_ROWS:
        if (result := getattr(results, name)) is None:
            continue
        errors = Errors(name, inputs.sampled(result, 1), getattr(true, name)[:, None], kept_rows, inputs.sample)
        # A sum of squares is off by twice what its logarithms are, relative to itself.
        scale = 2 * x_scale * errors.truth if name == "sum_p_squared" else at_least_the_largest(errors)
        yield errors, getattr(plain, name)[:, None], scale
    if results.gradient is not None and plain.gradient is not None and true.gradient is not None:
        gradient = inputs.sampled(results.gradient, problem.vocab)
        # Of a row that is NaN, logsumexp's own gradient is NaN in some places only; that is warning enough.
        gradient = gradient.masked_fill(gradient.isnan().any(-1, keepdim=True), torch.nan)
        factors = {"log_probs": 1.0, "entropy": 1 + math.log(problem.vocab), "logsumexp": 1.0}
        upstream = torch.zeros_like(x_scale)
        for result_name, grad in inputs.upstream.items():
            columns = problem.labels_per_row if result_name == "log_probs" else 1
            upstream = upstream + inputs.sampled(grad, columns).abs().sum(-1, keepdim=True) * factors[result_name]
        scale = x_scale * (upstream / inputs.row_temperature)
        yield Errors("gradient", gradient, true.gradient, kept_rows, inputs.sample), plain.gradient, scale.double()


def yardstick_rows(vocab: int) -> int:
    """How many rows tell how far plain torch is off."""
    return min(YARDSTICK_ROWS, max(8, YARDSTICK_LOGITS // vocab))


def plain_yardstick(problem: Problem, generator: torch.Generator) -> dict[str, float]:
    """How far plain torch is off on ordinary rows, by the name of the check, in eps(float32) times the row's scale.

    On the few rows of a case it may be right by luck, and a backend that is as good on the average must not be stopped
    for it.
    """
    rows = yardstick_rows(problem.vocab)
    plain = problem._replace(layout="flat", aligned=True, masked_logits=False)
    inputs = CaseInputs(Case("ordinary rows", rows, ignored=0.0), plain, {}, generator)
    yardstick: dict[str, float] = {}
    for errors, _, scale in _errors(inputs, inputs.plain):
        relative = errors.error / (EPS * scale).clamp(min=1e-300)
        yardstick |= {f"{errors.what}_error": float(relative.max()), f"{errors.what}_rmse": _rms(relative)}
    return yardstick


def judge_errors(
    errors: Errors, plain: Tensor, scale: Tensor, inputs: Judged, notes: Notes, slack: float = 0.0
) -> None:
    """Whether they are within the budget; what the dtype of the result rounds comes on top.

    Args:
        slack: what the largest error may be more, as of sums that round several times.
    """
    rows, error, plain_error = len(errors.got), errors.error, errors.of(plain)
    info = torch.finfo(errors.got.dtype)  # below its smallest normal number, a dtype rounds to multiples of eps * tiny
    rounding = info.eps * errors.truth.abs().amax(-1, keepdim=True).clamp(min=info.tiny)
    floor, ceiling = BUDGET * EPS * scale, inputs.ceiling * EPS * scale + rounding

    def limits(name: str, of_plain: float, scatter: float = 0.0) -> Tensor:
        ordinary = inputs.yardstick.get(name, 0.0) * EPS * scale * (1.0 + scatter)
        budget = BUDGET * ordinary.clamp(min=of_plain)
        return torch.maximum(torch.minimum(budget, ceiling), floor)

    name = f"{errors.what}_error"
    largest = limits(name, float(plain_error.max())) + slack
    worst = int((error / largest.clamp(min=1e-300)).amax(-1).argmax())
    notes.add_figure(name, float(error[worst].max()), float(largest[worst]))
    if rows >= FEWEST_ROWS_FOR_A_MEAN:  # which scatters where rows are few, and of one says what its largest says
        name = f"{errors.what}_rmse"
        notes.add_figure(name, _rms(error), float(limits(name, _rms(plain_error), rows**-0.5).max()))


def wide_yardstick() -> dict[str, float]:
    """For inputs on which a mistake is gross, and plain torch's own error is not worth finding out."""
    kinds = ("log_prob", *OF_ROWS, "gradient")
    return dict.fromkeys((f"{what}_{of}" for what in kinds for of in ("error", "rmse")), PLAIN_CEILING)


def _rms(error: Tensor) -> float:
    return float(error.square().mean().sqrt())


def _judge_argmax(inputs: Judged, argmax: Tensor, notes: Notes) -> None:
    """Every row, exactly: of equal maxima the first one counts."""
    got, true = inputs.sampled(argmax, 1).squeeze(-1), inputs.true.argmax
    wrong = (got != true).nonzero()
    row = int(wrong[0]) if len(wrong) else 0
    detail = f"row {int(inputs.sample[row])}: got {int(got[row])}, expected {int(true[row])}" if len(wrong) else ""
    notes.add("argmax", not len(wrong), detail)


def _judge_silence(inputs: Judged, log_probs: Tensor, gradient: Tensor, notes: Notes) -> None:
    """Where nothing comes from above, nothing goes below; a NaN does not, either, unless the row has one before."""
    silent = log_probs.isfinite().all(-1)
    for name, grad in inputs.upstream.items():
        columns = inputs.problem.labels_per_row if name == "log_probs" else 1
        silent &= (inputs.sampled(grad, columns) == 0).all(-1)
    silent &= ~inputs.sampled(inputs.ignored, inputs.problem.labels_per_row).all(-1)
    if not inputs.case.special and bool(silent.any()):
        notes.add("zero_upstream", bool((gradient[silent] == 0).all()), "a gradient where none comes from above")


def _judge_gradient_sign(inputs: Judged, gradient: Tensor, notes: Notes) -> None:
    """In the direction of the upstream gradient, where all of it comes from one label a row."""
    if inputs.case.special or list(inputs.upstream) != ["log_probs"] or inputs.problem.labels_per_row != 1:
        return
    vocab = inputs.problem.vocab
    gradient = gradient.float()
    upstream, labels = inputs.sampled(inputs.upstream["log_probs"], 1), inputs.sampled(inputs.labels, 1)
    kept = ~inputs.sampled(inputs.ignored, 1).squeeze(-1)
    gradient, upstream, labels = gradient[kept], upstream[kept], labels[kept]
    if not len(gradient):
        return
    along = gradient * upstream.sign()
    at_label = along.gather(-1, labels)
    elsewhere = along.scatter(-1, labels, 0.0)
    # A probability of 1 may round to a little more, by as much as a log-probability may be off.
    scale = EPS * upstream.abs() * inputs.scale[kept]
    right = bool((at_label >= -BUDGET * scale).all() and (elsewhere <= 0).all())
    ends = float(at_label.min()), float(elsewhere.max())
    notes.add("gradient_sign", right, f"smallest at a label {ends[0]:.3g}, largest elsewhere {ends[1]:.3g}")
    # Rounding of the dtype at every entry, and what the error budget of each probability adds up to.
    size = gradient.double().abs().sum(-1)
    info = torch.finfo(inputs.problem.dtype)
    limits = info.eps * (size + vocab * info.tiny) + PLAIN_CEILING * scale.squeeze(-1)
    sums = gradient.double().sum(-1).abs()
    worst = int((sums / limits.clamp(min=1e-300)).argmax())
    notes.add_figure("gradient_row_sum", float(sums[worst]), float(limits[worst]))
