"""Verdicts: what one call returned and did, held against float64 and against what plain torch makes of the same input.

Shapes: N rows, n of them compared, V vocabulary, K labels a row; R the leading dimensions, one or two, whose product is N.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from compiled_logprobs.backends import EAGER, get_backend
from compiled_logprobs.check.cases import IGNORE_INDEX, Arena, Case, fill_nothing, labels_for
from compiled_logprobs.check.report import Errors, Notes
from compiled_logprobs.decision import Kind
from compiled_logprobs.operation.autograd import compute
from compiled_logprobs.operation.reference import Reference, reference
from compiled_logprobs.problem import Problem

EPS = torch.finfo(torch.float32).eps
BUDGET = 2.0
"""How many times the error of eager a backend may make."""
EAGER_CEILING = 64.0
"""How many times eps(float32) times the row's largest |x| eager may be off: what its own summation order costs at V = 2^18."""
CHECKED_ELEMENTS = 2**24
"""Larger inputs are compared with the reference on `SAMPLED_ROWS` rows, the first and the last among them."""
SAMPLED_ROWS = 64
FEWEST_ROWS_FOR_A_MEAN = 4
YARDSTICK_ELEMENTS = 2**22
"""How many logits tell how far eager is off on ordinary rows."""

Yardstick = dict[str, float]
"""What `eager_yardstick` returns."""


@dataclass
class Results:
    """What a call returned, and the gradient that came of it."""

    log_probs: Tensor
    entropy: Tensor | None
    gradient: Tensor | None = None

    def detached(self) -> "Results":
        return self._mapped(Tensor.detach)

    def copied(self) -> "Results":
        return self._mapped(Tensor.clone)

    def same_bits(self, other: "Results") -> bool:
        """Whether log-probabilities and entropies are the same, as far as both have them."""
        if self.entropy is not None and other.entropy is not None and not same_bits(self.entropy, other.entropy):
            return False
        return same_bits(self.log_probs, other.log_probs)

    def _mapped(self, change: Callable[[Tensor], Tensor]) -> "Results":
        tensors = self.log_probs, self.entropy, self.gradient
        log_probs, *others = (None if tensor is None else change(tensor) for tensor in tensors)
        assert log_probs is not None
        return Results(log_probs, *others)


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

    def solve(self) -> None:
        """Compute the truth, and what eager makes of the same rows."""
        vocab = self.problem.vocab
        logits = self.arena.logits.reshape(-1, vocab)[self.sample]
        labels = self.labels.reshape(-1, self.problem.labels_per_row)[self.sample]
        t = self.temperature
        t = t.reshape(-1)[self.sample] if isinstance(t, Tensor) else t
        g = self.grad_log_probs.reshape(-1, self.problem.labels_per_row)[self.sample]
        h = None if self.grad_entropy is None else self.grad_entropy.reshape(-1)[self.sample]
        self.true = reference(
            logits,
            labels,
            t,
            ignore_index=IGNORE_INDEX,
            grad_log_probs=g if self.problem.needs_grad else None,
            grad_entropy=h if self.problem.needs_grad else None,
        )
        logits.requires_grad_(self.problem.needs_grad)
        log_probs, entropy = compute(
            get_backend(EAGER), logits, labels, t, ignore_index=IGNORE_INDEX, entropy=self.problem.entropy
        )
        out = self.problem.out_dtype
        log_probs, entropy = log_probs.to(out), None if entropy is None else entropy.to(out)
        self.eager = Results(log_probs, entropy).detached()
        if self.problem.needs_grad:
            self.eager.gradient = gradient_of(logits, log_probs, entropy, g, h)


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


def gradient_of(
    logits: Tensor, log_probs: Tensor, entropy: Tensor | None, grad_log_probs: Tensor, grad_entropy: Tensor | None
) -> Tensor:
    outputs, upstream = [log_probs], [grad_log_probs.to(log_probs.dtype)]
    if entropy is not None and grad_entropy is not None:
        outputs.append(entropy)
        upstream.append(grad_entropy.to(entropy.dtype))
    return torch.autograd.grad(outputs, [logits], upstream)[0]


def judge_memory(
    inputs: CaseInputs,
    logits: Tensor,
    version: int,
    labels: Tensor,
    temperature: float | Tensor,
    gradient: Tensor | None,
    notes: Notes,
) -> None:
    case, arena = inputs.case, inputs.arena
    may_overwrite = inputs.problem.inplace_backward and gradient is not None
    changed = arena.logits_changed()
    announced = logits._version > version
    notes.add("inputs_changed", may_overwrite or not changed, f"{case.name}: the logits were overwritten")
    notes.add("inputs_changed", torch.equal(labels, inputs.labels), f"{case.name}: the labels were overwritten")
    if isinstance(temperature, Tensor) and isinstance(inputs.temperature, Tensor):
        kept = torch.equal(temperature, inputs.temperature)
        notes.add("inputs_changed", kept, f"{case.name}: the temperature was overwritten")
    if may_overwrite:
        notes.add(
            "version_counter", announced or not changed, f"{case.name}: the logits changed, their version did not"
        )
    around = arena.surroundings_changed()
    notes.add("outside_write", not around, f"{case.name}: memory beside the logits was written")


def judge(inputs: CaseInputs, results: Results, notes: Notes) -> None:
    """Hold the results of a call against the truth."""
    problem, case = inputs.problem, inputs.case
    largest = float(results.log_probs.nan_to_num(nan=-1.0).max()) if results.log_probs.numel() else 0.0
    true = inputs.true
    log_probs = results.log_probs.reshape(-1, problem.labels_per_row)[inputs.sample]
    flipped = (
        case.rows > 1 and not case.special and torch.allclose(log_probs.double(), -true.log_probs, rtol=1e-2, atol=1e-2)
    )
    hint = "; this is +cross entropy: negate it" if flipped and largest > 0 else ""
    notes.add("log_prob_sign", largest <= 0.0, f"{case.name}: largest log-probability {largest:.4g}{hint}", largest)
    ignored = inputs.labels == IGNORE_INDEX
    zero = bool((results.log_probs[ignored] == 0).all())
    notes.add("ignored_rows", zero, f"{case.name}: an ignored label does not give 0")

    if results.entropy is not None:
        smallest = float(results.entropy.nan_to_num(nan=1.0).min()) if results.entropy.numel() else 0.0
        notes.add("entropy_sign", smallest >= 0.0, f"{case.name}: smallest entropy {smallest:.4g}", -smallest)
    if results.gradient is not None:
        gradient = results.gradient.reshape(-1, problem.vocab)[inputs.sample]
        all_ignored = ignored.reshape(-1, problem.labels_per_row).all(-1)[inputs.sample]
        zero = bool((gradient[all_ignored] == 0).all())
        notes.add("ignored_rows", zero, f"{case.name}: the gradient of an ignored row is not 0")
        _judge_gradient_sign(inputs, gradient, notes)
    for comparison in _comparisons(inputs, results):
        if comparison.got.numel():
            _judge_values(comparison, inputs, notes)


class _Comparison(NamedTuple):
    """One kind of result of the n compared rows, [n, C]."""

    what: Kind
    got: Tensor
    true: Tensor
    eager: Tensor
    scale: Tensor
    """[n, 1]: the size that an eps(float32) is relative to."""
    counted: Tensor
    """[n, C] or [n, 1]: where it is no ignored label's."""
    tokens: Tensor | None = None
    """[n, C]: which of V it belongs to, where that is not its column."""


def _comparisons(inputs: CaseInputs, results: Results) -> Iterator[_Comparison]:
    problem, true, eager = inputs.problem, inputs.true, inputs.eager
    x_scale = _row_scale(inputs)
    log_probs = results.log_probs.reshape(-1, problem.labels_per_row)[inputs.sample]
    labels = inputs.labels.reshape(-1, problem.labels_per_row)[inputs.sample]
    kept = labels != IGNORE_INDEX
    yield _Comparison("log_prob", log_probs, true.log_probs, eager.log_probs, x_scale, kept, labels)
    kept_rows = kept.any(-1, keepdim=True)
    if results.entropy is not None and eager.entropy is not None:
        entropy = results.entropy.reshape(-1, 1)[inputs.sample]
        yield _Comparison("entropy", entropy, true.entropy[:, None], eager.entropy[:, None], x_scale, kept_rows)
    if results.gradient is not None and eager.gradient is not None and true.gradient is not None:
        gradient = results.gradient.reshape(-1, problem.vocab)[inputs.sample]
        # Of a row that is NaN, logsumexp's own gradient is NaN in some places only; that is warning enough.
        gradient = gradient.masked_fill(gradient.isnan().any(-1, keepdim=True), torch.nan)
        upstream = inputs.grad_log_probs.abs().reshape(-1, problem.labels_per_row).sum(-1)
        if inputs.grad_entropy is not None:
            upstream = upstream + inputs.grad_entropy.reshape(-1).abs() * (1 + math.log(problem.vocab))
        scale = x_scale * (upstream[inputs.sample, None] / _row_temperature(inputs))
        yield _Comparison("gradient", gradient, true.gradient, eager.gradient, scale, kept_rows)


def eager_yardstick(problem: Problem, generator: torch.Generator) -> Yardstick:
    """How far eager is off on ordinary rows, by the name of the check, in units of eps(float32) times the row's scale.

    On the few rows of a case it may be right by luck, and a backend that is as good on the average must not be stopped for it.
    """
    rows = min(SAMPLED_ROWS, max(8, YARDSTICK_ELEMENTS // problem.vocab))
    plain = problem._replace(layout="flat", aligned=True, masked_logits=False)
    inputs = make_inputs(Case("ordinary rows", rows, fill_nothing, ignored=0.0), plain, {}, generator)
    found: Yardstick = {}
    for what, got, true, _, scale, *_ in _comparisons(inputs, inputs.eager):
        size = scale.double() if what == "gradient" else scale.double().clamp(min=float(true.abs().max()))
        error = (got.double() - true).abs() / (EPS * size)
        found |= {f"{what}_error": _largest(error), f"{what}_rmse": _rms(error)}
    return found


def _judge_values(comparison: _Comparison, inputs: CaseInputs, notes: Notes) -> None:
    """Errors where all is finite, and the places where it is not; what the dtype of the result rounds comes on top."""
    what, got, true, eager, scale, counted, tokens = comparison
    case = inputs.case
    rounded = true.to(got.dtype)
    pattern = torch.equal(got.isnan(), rounded.isnan()) and torch.equal(
        got.isinf() * got.sign(), rounded.isinf() * rounded.sign()
    )
    notes.add("nan_pattern", pattern, f"{case.name}: {what} is NaN or infinite elsewhere than in float64")
    finite = (true.isfinite() & got.isfinite() & rounded.isfinite()).double()
    truth = true.nan_to_num(0.0, 0.0, 0.0) * finite
    error = (got.double().nan_to_num(0.0, 0.0, 0.0) * finite - truth).abs()
    elsewhere = None if pattern else (finite == 0) & ~torch.isclose(got, rounded, rtol=0.0, atol=0.0, equal_nan=True)
    notes.add_errors(Errors(what, error, counted, finite, elsewhere, got, true, inputs.sample, tokens))
    eager_error = (eager.double().nan_to_num(0.0, 0.0, 0.0) * finite - truth).abs()
    scale = scale.double().nan_to_num(0.0, 0.0, 0.0).clamp(min=float(truth.abs().max()) if what != "gradient" else 0.0)
    info = torch.finfo(got.dtype)  # below its smallest normal number, a dtype rounds to multiples of eps * tiny
    rounding = info.eps * truth.abs().amax(-1, keepdim=True).clamp(min=info.tiny)
    floor, ceiling = BUDGET * EPS * scale, EAGER_CEILING * EPS * scale + rounding
    for name, reduce in ((f"{what}_error", _largest), (f"{what}_rmse", _rms)):
        ordinary = inputs.yardstick.get(name, 0.0) * EPS * scale
        if reduce is _rms:  # which scatters where rows are few, and of one row says what its largest error says
            if len(got) < FEWEST_ROWS_FOR_A_MEAN:
                continue
            ordinary = ordinary * (1.0 + len(got) ** -0.5)
        budget = BUDGET * torch.maximum(torch.full_like(floor, reduce(eager_error)), ordinary)
        limits = torch.maximum(torch.minimum(budget, ceiling), floor)
        if reduce is _largest:
            worst = int((error / limits.clamp(min=1e-300)).amax(-1).argmax())
            figure, limit = float(error[worst].max()), float(limits[worst])
        else:
            figure, limit = reduce(error), float(limits.max())
        notes.add(name, figure <= limit, f"{case.name}: {figure:.3g}, limit {limit:.3g}", figure, limit)


def _largest(error: Tensor) -> float:
    return float(error.max())


def _rms(error: Tensor) -> float:
    return float(error.square().mean().sqrt())


def _row_temperature(inputs: CaseInputs) -> Tensor | float:
    t = inputs.temperature
    return t.reshape(-1, 1)[inputs.sample] if isinstance(t, Tensor) else t


def _row_scale(inputs: CaseInputs) -> Tensor:
    """[n, 1]: the largest finite |x| of each row, x = logits / temperature; at least 1."""
    logits = inputs.arena.logits.reshape(-1, inputs.problem.vocab)[inputs.sample]
    largest = (
        logits.float().nan_to_num(0.0, 0.0, 0.0).abs().amax(-1, keepdim=True) if len(logits) else logits[:, :1].float()
    )
    return (largest / _row_temperature(inputs)).clamp(min=1.0)


def _judge_gradient_sign(inputs: CaseInputs, gradient: Tensor, notes: Notes) -> None:
    """In the direction of the upstream gradient, where all of it comes from one label a row."""
    if inputs.case.special or inputs.grad_entropy is not None or inputs.problem.labels_per_row != 1:
        return
    vocab = inputs.problem.vocab
    gradient = gradient.float()
    upstream = inputs.grad_log_probs.reshape(-1, 1)[inputs.sample]
    labels = inputs.labels.reshape(-1, 1)[inputs.sample]
    kept = (labels != IGNORE_INDEX).squeeze(-1)
    gradient, upstream, labels = gradient[kept], upstream[kept], labels[kept]
    if not len(gradient):
        return
    along = gradient * upstream.sign()
    at_label = along.gather(-1, labels)
    elsewhere = along.scatter(-1, labels, 0.0)
    # A probability of 1 may round to a little more, by as much as a log-probability may be off.
    scale = EPS * upstream.abs() * _row_scale(inputs)[kept]
    right = bool((at_label >= -BUDGET * scale).all() and (elsewhere <= 0).all())
    notes.add(
        "gradient_sign",
        right,
        f"{inputs.case.name}: smallest at a label {float(at_label.min()):.3g}, "
        f"largest elsewhere {float(elsewhere.max()):.3g}",
    )
    # Rounding of the dtype at every entry, and what the error budget of each probability adds up to.
    size = gradient.double().abs().sum(-1)
    info = torch.finfo(inputs.problem.dtype)
    limits = info.eps * (size + vocab * info.tiny) + EAGER_CEILING * scale.squeeze(-1)
    sums = gradient.double().sum(-1).abs()
    worst = int((sums / limits.clamp(min=1e-300)).argmax())
    figure, limit = float(sums[worst]), float(limits[worst])
    notes.add(
        "gradient_row_sum", figure <= limit, f"{inputs.case.name}: {figure:.3g}, limit {limit:.3g}", figure, limit
    )


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Whether all numbers are equal in every bit, and NaN stands where NaN stands."""
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[left.element_size()]
    left, right = (x.detach().masked_fill(x.isnan(), torch.nan).contiguous() for x in (left, right))
    return torch.equal(left.view(bits), right.view(bits))
