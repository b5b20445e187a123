"""Verdicts: what one call returned and did, held against float64 and against what plain torch makes of the same input.

Shapes: N rows, n of them compared, V vocabulary, K labels a row; R one or two leading dimensions, whose product is N.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from compiled_logprobs.backends import EAGER, get_backend
from compiled_logprobs.check.cases import IGNORE_INDEX, Arena, Case, labels_for
from compiled_logprobs.check.report import Errors, Notes
from compiled_logprobs.operation.autograd import compute
from compiled_logprobs.operation.reference import Reference, reference
from compiled_logprobs.problem import Problem

EPS = torch.finfo(torch.float32).eps
BUDGET = 2.0
"""How many times the error of eager a backend may make."""
EAGER_CEILING = 64.0
"""How many times eps(float32) times the row's largest |x| eager may be off: what its sums cost at V = 2^18."""
CHECKED_ELEMENTS = 2**24
"""Larger inputs are compared with the reference on `SAMPLED_ROWS` rows, the first and the last among them."""
SAMPLED_ROWS = 64
FEWEST_ROWS_FOR_A_MEAN = 4
YARDSTICK_ELEMENTS = 2**22
"""How many logits tell how far eager is off on ordinary rows."""

Yardstick = dict[str, float]
"""What `eager_yardstick` returns."""


class Results(NamedTuple):
    """What a call returned, and the gradient that came of it."""

    log_probs: Tensor
    entropy: Tensor | None
    gradient: Tensor | None = None

    def detached(self) -> "Results":
        return Results(*(None if tensor is None else tensor.detach() for tensor in self))  # type: ignore[arg-type]

    def copied(self) -> "Results":
        return Results(*(None if tensor is None else tensor.clone() for tensor in self))  # type: ignore[arg-type]


@dataclass
class CaseInputs:
    """One case, ready to run."""

    case: Case
    problem: Problem
    arena: Arena
    labels: Tensor
    temperature: float | Tensor
    grad_log_probs: Tensor
    grad_entropy: Tensor | None
    sample: Tensor
    """Indices of the rows, of N, that are compared with the reference."""
    yardstick: Yardstick
    true: Reference = field(init=False)
    eager: Results = field(init=False)

    def sampled(self, tensor: Tensor, columns: int) -> Tensor:
        """[n, columns]: the compared rows of a tensor [R, columns] or, with one column, [R]."""
        return tensor.reshape(-1, columns)[self.sample]

    def solve(self) -> None:
        """Compute the truth, and what eager makes of the same rows."""
        problem, t, h = self.problem, self.temperature, self.grad_entropy
        logits = self.sampled(self.arena.logits, problem.vocab)
        labels = self.sampled(self.labels, problem.labels_per_row)
        t = self.sampled(t, 1).squeeze(-1) if isinstance(t, Tensor) else t
        g = self.sampled(self.grad_log_probs, problem.labels_per_row)
        h = None if h is None else self.sampled(h, 1).squeeze(-1)
        upstream = {"grad_log_probs": g, "grad_entropy": h} if problem.needs_grad else {}
        self.true = reference(logits, labels, t, ignore_index=IGNORE_INDEX, **upstream)
        logits.requires_grad_(problem.needs_grad)
        eager = get_backend(EAGER)
        log_probs, entropy = compute(eager, logits, labels, t, ignore_index=IGNORE_INDEX, entropy=problem.entropy)
        results = Results(log_probs.to(problem.out_dtype), None if entropy is None else entropy.to(problem.out_dtype))
        gradient = gradient_of(logits, results, g, h) if problem.needs_grad else None
        self.eager = results.detached()._replace(gradient=gradient)


def make_inputs(case: Case, problem: Problem, yardstick: Yardstick, generator: torch.Generator) -> CaseInputs:
    """Fresh inputs of one kind, with the truth about them."""
    device = generator.device
    arena = Arena(case, problem, device)
    arena.refill(generator)
    rows = tuple(arena.logits.shape[:-1])
    labels = labels_for(case, rows, problem, generator)
    temperature: float | Tensor = 1.0
    if problem.temperature == "number":
        temperature = float(torch.empty((), device=device).uniform_(0.5, 2.0, generator=generator))
    elif problem.temperature == "per_token":
        temperature = torch.empty(rows, device=device).uniform_(0.5, 2.0, generator=generator)
    count = math.prod(rows)
    sample = torch.arange(count, device=device)
    if count * problem.vocab > CHECKED_ELEMENTS and count > SAMPLED_ROWS:
        inner = 1 + torch.randperm(count - 2, generator=generator, device=device)[: SAMPLED_ROWS - 2]
        sample = torch.cat([sample[:1], inner.sort().values, sample[-1:]])
    inputs = CaseInputs(
        case,
        problem,
        arena,
        labels,
        temperature,
        torch.randn(labels.shape, generator=generator, device=device),
        torch.randn(rows, generator=generator, device=device) if problem.entropy and case.through_entropy else None,
        sample,
        yardstick,
    )
    inputs.solve()
    return inputs


def gradient_of(logits: Tensor, results: Results, grad_log_probs: Tensor, grad_entropy: Tensor | None) -> Tensor:
    """The gradient in the logits that comes of these upstream gradients."""
    outputs, upstream = [results.log_probs], [grad_log_probs.to(results.log_probs.dtype)]
    if results.entropy is not None and grad_entropy is not None:
        outputs.append(results.entropy)
        upstream.append(grad_entropy.to(results.entropy.dtype))
    return torch.autograd.grad(outputs, [logits], upstream)[0]


def judge(inputs: CaseInputs, results: Results, notes: Notes) -> None:
    """Hold the results of a call against the truth."""
    problem, case = inputs.problem, inputs.case
    largest = float(results.log_probs.nan_to_num(nan=-1.0).max()) if results.log_probs.numel() else 0.0
    log_probs, true = inputs.sampled(results.log_probs, problem.labels_per_row).double(), inputs.true.log_probs
    flipped = case.rows > 1 and not case.special and torch.allclose(log_probs, -true, rtol=1e-2, atol=1e-2)
    hint = "; this is +cross entropy: negate it" if flipped and largest > 0 else ""
    notes.add("log_prob_sign", largest <= 0.0, f"largest log-probability {largest:.4g}{hint}", largest)
    ignored = inputs.labels == IGNORE_INDEX
    zero = bool((results.log_probs[ignored] == 0).all())
    notes.add("ignored_rows", zero, "an ignored label does not give 0")
    if results.entropy is not None:
        smallest = float(results.entropy.nan_to_num(nan=1.0).min()) if results.entropy.numel() else 0.0
        notes.add("entropy_sign", smallest >= 0.0, f"smallest entropy {smallest:.4g}", -smallest)
    if results.gradient is not None:
        gradient = inputs.sampled(results.gradient, problem.vocab)
        all_ignored = inputs.sampled(ignored, problem.labels_per_row).all(-1)
        zero = bool((gradient[all_ignored] == 0).all())
        notes.add("ignored_rows", zero, "the gradient of an ignored row is not 0")
        _judge_gradient_sign(inputs, gradient, notes)
    for errors, eager, scale in _errors(inputs, results):
        if errors.got.numel():
            notes.add("nan_pattern", errors.fits_pattern, f"{errors.what} is NaN or infinite elsewhere than in float64")
            notes.add_errors(errors)
            _judge_errors(errors, eager, scale, inputs, notes)


def _errors(inputs: CaseInputs, results: Results) -> Iterator[tuple[Errors, Tensor, Tensor]]:
    """Of each kind of result, eager's results as well, and [n, 1] the size that an eps(float32) is relative to."""
    problem, true, eager = inputs.problem, inputs.true, inputs.eager
    x_scale = _scale_of(inputs)
    log_probs = inputs.sampled(results.log_probs, problem.labels_per_row)
    labels = inputs.sampled(inputs.labels, problem.labels_per_row)
    kept = labels != IGNORE_INDEX

    def at_least_the_largest(errors: Errors) -> Tensor:
        return x_scale.double().clamp(min=float(errors.truth.abs().max()) if errors.truth.numel() else 0.0)

    errors = Errors("log_prob", log_probs, true.log_probs, kept, inputs.sample, labels)
    yield errors, eager.log_probs, at_least_the_largest(errors)
    kept_rows = kept.any(-1, keepdim=True)
    if results.entropy is not None and eager.entropy is not None:
        entropy = inputs.sampled(results.entropy, 1)
        errors = Errors("entropy", entropy, true.entropy[:, None], kept_rows, inputs.sample)
        yield errors, eager.entropy[:, None], at_least_the_largest(errors)
    if results.gradient is not None and eager.gradient is not None and true.gradient is not None:
        gradient = inputs.sampled(results.gradient, problem.vocab)
        # Of a row that is NaN, logsumexp's own gradient is NaN in some places only; that is warning enough.
        gradient = gradient.masked_fill(gradient.isnan().any(-1, keepdim=True), torch.nan)
        upstream = inputs.sampled(inputs.grad_log_probs, problem.labels_per_row).abs().sum(-1, keepdim=True)
        if inputs.grad_entropy is not None:
            upstream = upstream + inputs.sampled(inputs.grad_entropy, 1).abs() * (1 + math.log(problem.vocab))
        scale = x_scale * (upstream / _row_temperature(inputs))
        yield Errors("gradient", gradient, true.gradient, kept_rows, inputs.sample), eager.gradient, scale.double()


def eager_yardstick(problem: Problem, generator: torch.Generator) -> Yardstick:
    """How far eager is off on ordinary rows, by the name of the check, in units of eps(float32) times the row's scale.

    On the few rows of a case it may be right by luck, and a backend that is as good on the average must not be stopped
    for it.
    """
    rows = min(SAMPLED_ROWS, max(8, YARDSTICK_ELEMENTS // problem.vocab))
    plain = problem._replace(layout="flat", aligned=True, masked_logits=False)
    inputs = make_inputs(Case("ordinary rows", rows, ignored=0.0), plain, {}, generator)
    yardstick: Yardstick = {}
    for errors, _, scale in _errors(inputs, inputs.eager):
        relative = errors.error / (EPS * scale)
        yardstick |= {f"{errors.what}_error": float(relative.max()), f"{errors.what}_rmse": _rms(relative)}
    return yardstick


def _judge_errors(errors: Errors, eager: Tensor, scale: Tensor, inputs: CaseInputs, notes: Notes) -> None:
    """Whether they are within the budget; what the dtype of the result rounds comes on top."""
    rows, error, eager_error = len(errors.got), errors.error, errors.of(eager)
    info = torch.finfo(errors.got.dtype)  # below its smallest normal number, a dtype rounds to multiples of eps * tiny
    rounding = info.eps * errors.truth.abs().amax(-1, keepdim=True).clamp(min=info.tiny)
    floor, ceiling = BUDGET * EPS * scale, EAGER_CEILING * EPS * scale + rounding

    def limits(name: str, of_eager: float, scatter: float = 0.0) -> Tensor:
        ordinary = inputs.yardstick.get(name, 0.0) * EPS * scale * (1.0 + scatter)
        budget = BUDGET * ordinary.clamp(min=of_eager)
        return torch.maximum(torch.minimum(budget, ceiling), floor)

    name = f"{errors.what}_error"
    largest = limits(name, float(eager_error.max()))
    worst = int((error / largest.clamp(min=1e-300)).amax(-1).argmax())
    notes.add_figure(name, float(error[worst].max()), float(largest[worst]))
    if rows >= FEWEST_ROWS_FOR_A_MEAN:  # which scatters where rows are few, and of one says what its largest says
        name = f"{errors.what}_rmse"
        notes.add_figure(name, _rms(error), float(limits(name, _rms(eager_error), rows**-0.5).max()))


def _rms(error: Tensor) -> float:
    return float(error.square().mean().sqrt())


def _row_temperature(inputs: CaseInputs) -> Tensor | float:
    t = inputs.temperature
    return inputs.sampled(t, 1) if isinstance(t, Tensor) else t


def _scale_of(inputs: CaseInputs) -> Tensor:
    return row_scale(inputs.sampled(inputs.arena.logits, inputs.problem.vocab), _row_temperature(inputs))


def row_scale(logits: Tensor, temperature: float | Tensor) -> Tensor:
    """[n, 1]: the largest finite |x| of each row [n, V], x = logits / temperature; at least 1."""
    logits = logits.float()
    largest = logits.nan_to_num(0.0, 0.0, 0.0).abs().amax(-1, keepdim=True) if len(logits) else logits[:, :1]
    return (largest / temperature).clamp(min=1.0)


def _judge_gradient_sign(inputs: CaseInputs, gradient: Tensor, notes: Notes) -> None:
    """In the direction of the upstream gradient, where all of it comes from one label a row."""
    if inputs.case.special or inputs.grad_entropy is not None or inputs.problem.labels_per_row != 1:
        return
    vocab = inputs.problem.vocab
    gradient = gradient.float()
    upstream, labels = inputs.sampled(inputs.grad_log_probs, 1), inputs.sampled(inputs.labels, 1)
    kept = (labels != IGNORE_INDEX).squeeze(-1)
    gradient, upstream, labels = gradient[kept], upstream[kept], labels[kept]
    if not len(gradient):
        return
    along = gradient * upstream.sign()
    at_label = along.gather(-1, labels)
    elsewhere = along.scatter(-1, labels, 0.0)
    # A probability of 1 may round to a little more, by as much as a log-probability may be off.
    scale = EPS * upstream.abs() * _scale_of(inputs)[kept]
    right = bool((at_label >= -BUDGET * scale).all() and (elsewhere <= 0).all())
    ends = float(at_label.min()), float(elsewhere.max())
    notes.add("gradient_sign", right, f"smallest at a label {ends[0]:.3g}, largest elsewhere {ends[1]:.3g}")
    # Rounding of the dtype at every entry, and what the error budget of each probability adds up to.
    size = gradient.double().abs().sum(-1)
    info = torch.finfo(inputs.problem.dtype)
    limits = info.eps * (size + vocab * info.tiny) + EAGER_CEILING * scale.squeeze(-1)
    sums = gradient.double().sum(-1).abs()
    worst = int((sums / limits.clamp(min=1e-300)).argmax())
    notes.add_figure("gradient_row_sum", float(sums[worst]), float(limits[worst]))
