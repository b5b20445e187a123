"""Verdicts: what one call returned and did, held against float64 and against what plain torch makes of the same input.

Shapes: N rows, n of them compared, V vocabulary, K labels a row; R one or two leading dimensions, whose product is N.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from compiled_logprobs.check.cases import IGNORE_INDEX, Arena, Case, labels_for
from compiled_logprobs.check.function import Function, Subject
from compiled_logprobs.check.report import Errors, Notes, Stop
from compiled_logprobs.decision import Kind
from compiled_logprobs.errors import nothing_can_serve_after
from compiled_logprobs.operation.contract import Upstream, in_dtype
from compiled_logprobs.operation.reference import reference
from compiled_logprobs.problem import Problem, accumulation_dtype, results_of, short_name

EPS = torch.finfo(torch.float32).eps
BUDGET = 2.0
"""How many times the error of plain torch a backend may make."""
PLAIN_CEILING = 64.0
"""How many times eps(float32) times the row's largest |x| plain torch may be off: what its sums cost at V = 2^18."""
CHECKED_ELEMENTS = 2**24
"""Larger inputs are compared with the reference on `SAMPLED_ROWS` rows, the first and the last among them."""
SAMPLED_ROWS = 64
FEWEST_ROWS_FOR_A_MEAN = 4
YARDSTICK_ELEMENTS = 2**22
"""How many logits tell how far plain torch is off on ordinary rows."""


DIFFERENTIABLE = Upstream._fields
OF_ROWS: tuple[Kind, ...] = ("entropy", "logsumexp", "sum_p_squared")
"""Numbers that are returned one a row."""


class Returned(NamedTuple):
    """What a call returned, and the gradient that came of it."""

    log_probs: Tensor
    entropy: Tensor | None = None
    logsumexp: Tensor | None = None
    argmax: Tensor | None = None
    sum_p_squared: Tensor | None = None
    gradient: Tensor | None = None

    @property
    def results(self) -> list[Tensor]:
        """All but the gradient, in the order in which they are returned."""
        return [tensor for tensor in self[:-1] if tensor is not None]

    def each(self, change: Callable[[Tensor], Tensor]) -> "Returned":
        """All of them changed so."""
        return Returned(*(None if tensor is None else change(tensor) for tensor in self))  # type: ignore[arg-type]


class CaseInputs:
    """One case, ready to run: fresh inputs of one kind, with the truth about them."""

    def __init__(self, case: Case, problem: Problem, yardstick: dict[str, float], generator: torch.Generator) -> None:
        device = generator.device
        self.case, self.problem, self.yardstick = case, problem, yardstick
        self.arena = Arena(case, problem, device)
        self.arena.refill(generator)
        rows = tuple(self.arena.logits.shape[:-1])
        self.labels = labels_for(case, rows, problem, generator)
        self.temperature: float | Tensor = 1.0
        if problem.temperature == "number":
            self.temperature = float(torch.empty((), device=device).uniform_(0.5, 2.0, generator=generator))
        elif problem.temperature == "per_token":
            self.temperature = torch.empty(rows, device=device).uniform_(0.5, 2.0, generator=generator)
        self.upstream = {"log_probs": torch.randn(self.labels.shape, generator=generator, device=device)}
        """The gradients that come from above, by the name of the result."""
        for name in DIFFERENTIABLE[1:]:
            if getattr(problem, name) and case.through_others:
                self.upstream[name] = torch.randn(rows, generator=generator, device=device)
        count = math.prod(rows)
        self.sample = torch.arange(count, device=device)
        """Which rows, of N, are compared with the reference."""
        if count * problem.vocab > CHECKED_ELEMENTS and count > SAMPLED_ROWS:
            inner = 1 + torch.randperm(count - 2, generator=generator, device=device)[: SAMPLED_ROWS - 2]
            self.sample = torch.cat([self.sample[:1], inner.sort().values, self.sample[-1:]])
        t = self.temperature
        self.row_temperature = self.sampled(t, 1) if isinstance(t, Tensor) else t
        self.solve()

    def sampled(self, tensor: Tensor, columns: int) -> Tensor:
        """[n, columns]: the compared rows of a tensor [R, columns] or, with one column, [R]."""
        return tensor.reshape(-1, columns)[self.sample]

    def solve(self) -> None:
        """Compute the truth, and what plain torch makes of the same rows."""
        problem = self.problem
        logits = self.sampled(self.arena.logits, problem.vocab)
        labels = self.sampled(self.labels, problem.labels_per_row)
        t = self.row_temperature.squeeze(-1) if isinstance(self.row_temperature, Tensor) else self.row_temperature
        self.scale = row_scale(logits, self.row_temperature)
        upstream: dict[str, Any] = {}
        if problem.needs_grad:
            upstream = {
                f"grad_{name}": grad.flatten(0, -2 if name == "log_probs" else -1)
                for name, grad in self.upstream.items()
            }
            upstream = {name: grad[self.sample] for name, grad in upstream.items()}
        self.true = reference(logits, labels, t, ignore_index=IGNORE_INDEX, **upstream)
        # What comes from above a result has its dtype.
        rounded = {name: grad.to(problem.out_dtype) for name, grad in upstream.items()}
        dtype = accumulation_dtype(problem.dtype)
        plain = reference(logits, labels, t, ignore_index=IGNORE_INDEX, dtype=dtype, **rounded)
        asked = {name: in_dtype(getattr(plain, name), problem.out_dtype) for name in names_of(problem)}
        gradient = None if plain.gradient is None else plain.gradient.to(problem.dtype)
        self.plain = Returned(**asked, gradient=gradient)


class _NotALeaf(torch.autograd.Function):
    """Gives `logits` a gradient function, as if a model had computed them, in the memory that they have."""

    @staticmethod
    def forward(ctx: Any, model: Tensor, logits: Tensor) -> Tensor:
        # Not a view: autograd watches views more closely than it watches what a model returns.
        return logits.new_empty(0).set_(
            logits.untyped_storage(), logits.storage_offset(), logits.shape, logits.stride()
        )

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None]:
        return None, None


def call_once(subject: Subject, inputs: CaseInputs, notes: Notes, *, with_gradient: bool) -> Returned:
    """Call the subject once. Raises Stop where the results are not what they should be in kind."""
    problem, arena = inputs.problem, inputs.arena
    labels, t = inputs.labels.clone(), inputs.temperature
    t = t.clone() if isinstance(t, Tensor) else t
    logits, gradient, raised = arena.logits, None, ""
    if with_gradient:
        model = torch.zeros((), device=logits.device, requires_grad=True)
        logits = _NotALeaf.apply(model, logits)  # type: ignore[no-untyped-call]  # torch's gap
    version = logits._version
    try:
        with torch.set_grad_enabled(with_gradient):
            results = _typed(subject, subject(logits, labels, t, problem), inputs, notes)
        if with_gradient:
            for name in DIFFERENTIABLE:
                tensor, what = getattr(results, name), "log-probabilities do" if name == "log_probs" else f"{name} does"
                flows = tensor is None or tensor.requires_grad
                notes.require("gradient_flows", flows, f"the {what} not require a gradient")
            gradient = gradient_of(logits, results, inputs.upstream)
    except Stop:
        raise
    except (Exception, SystemExit) as error:  # whatever a backend raises is its verdict
        if nothing_can_serve_after(error):
            raise
        raised = f"{type(error).__name__}: {error}"
    changed = arena.logits_changed()
    may_overwrite = problem.inplace_backward and gradient is not None
    notes.add("inputs_changed", may_overwrite or not changed, "the logits were overwritten")
    notes.add("inputs_changed", torch.equal(labels, inputs.labels), "the labels were overwritten")
    same = torch.equal(torch.as_tensor(t), torch.as_tensor(inputs.temperature))
    notes.add("inputs_changed", same, "the temperature was overwritten")
    if may_overwrite:
        announced = logits._version > version
        notes.add("version_counter", announced or not changed, "the logits changed, their version did not")
    notes.add("outside_write", not arena.surroundings_changed(), "memory beside the logits was written")
    notes.require("runs", not raised, raised)
    if gradient is not None:
        fits = gradient.shape == logits.shape
        notes.require("shape", fits, f"gradient {list(gradient.shape)}, expected {list(logits.shape)}")
        notes.add("dtype", gradient.dtype == problem.dtype, f"gradient {short_name(gradient.dtype)}")
        gradient = gradient.clone() if problem.inplace_backward else gradient
        if changed:
            arena.restore()
    return results.each(Tensor.detach)._replace(gradient=gradient)


def _typed(subject: Subject, result: Any, inputs: CaseInputs, notes: Notes) -> Returned:
    problem = inputs.problem
    parts = tuple(result) if isinstance(result, tuple) else (result,)
    names = names_of(problem)
    kinds = all(isinstance(part, Tensor) for part in parts) and len(parts) == len(names)
    notes.require("result_type", kinds, f"got {', '.join(type(part).__name__ for part in parts)}")
    for name, part in zip(names, parts, strict=True):
        of_labels = name == "log_probs"
        shape = inputs.labels.shape if of_labels else inputs.labels.shape[:-1]
        own = -1 if isinstance(subject, Function) and of_labels else None  # which has no K labels a row
        sizes = f"got {list(part.shape[:own])}, expected {list(shape[:own])}"
        notes.require("shape", part.shape == shape, sizes)
        dtype = torch.int64 if name == "argmax" else problem.out_dtype
        notes.add("dtype", part.dtype == dtype, f"got {short_name(part.dtype)}, expected {short_name(dtype)}")
    return Returned(**dict(zip(names, parts, strict=True)))


def names_of(problem: Problem) -> tuple[str, ...]:
    """Of the results that a call returns, in order."""
    return ("log_probs", *results_of(problem))


def gradient_of(logits: Tensor, results: Returned, upstream: Mapping[str, Tensor]) -> Tensor:
    """The gradient in the logits that comes of these upstream gradients."""
    outputs = {name: getattr(results, name) for name in upstream}
    gradients = [grad.to(outputs[name].dtype) for name, grad in upstream.items()]
    return torch.autograd.grad([*outputs.values()], [logits], gradients)[0]


def judge(inputs: CaseInputs, results: Returned, notes: Notes) -> None:
    """Hold the results of a call against the truth."""
    problem, case = inputs.problem, inputs.case
    largest = float(results.log_probs.nan_to_num(nan=-1.0).max()) if results.log_probs.numel() else 0.0
    log_probs, true = inputs.sampled(results.log_probs, problem.labels_per_row).double(), inputs.true.log_probs
    flipped = case.rows > 1 and not case.special and torch.allclose(log_probs, -true, rtol=1e-2, atol=1e-2)
    hint = "; this is +cross entropy: negate it" if flipped and largest > 0 else ""
    notes.add("log_prob_sign", largest <= 0.0, f"largest log-probability {largest:.4g}{hint}", largest)
    ignored = inputs.labels == IGNORE_INDEX
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
        _judge_gradient_sign(inputs, gradient, notes)
    for errors, plain, scale in _errors(inputs, results):
        if errors.got.numel():
            notes.add("nan_pattern", errors.fits_pattern, f"{errors.what} is NaN or infinite elsewhere than in float64")
            notes.add_errors(errors)
            _judge_errors(errors, plain, scale, inputs, notes)


def _errors(inputs: CaseInputs, results: Returned) -> Iterator[tuple[Errors, Tensor, Tensor]]:
    """Of each kind of result, what plain torch returns as well, and [n, 1] what an eps(float32) is relative to."""
    problem, true, plain = inputs.problem, inputs.true, inputs.plain
    x_scale = inputs.scale
    log_probs = inputs.sampled(results.log_probs, problem.labels_per_row)
    labels = inputs.sampled(inputs.labels, problem.labels_per_row)
    kept = labels != IGNORE_INDEX

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
        upstream = inputs.sampled(inputs.upstream["log_probs"], problem.labels_per_row).abs().sum(-1, keepdim=True)
        for name, factor in (("entropy", 1 + math.log(problem.vocab)), ("logsumexp", 1)):
            if name in inputs.upstream:
                upstream = upstream + inputs.sampled(inputs.upstream[name], 1).abs() * factor
        scale = x_scale * (upstream / inputs.row_temperature)
        yield Errors("gradient", gradient, true.gradient, kept_rows, inputs.sample), plain.gradient, scale.double()


def plain_yardstick(problem: Problem, generator: torch.Generator) -> dict[str, float]:
    """How far plain torch is off on ordinary rows, by the name of the check, in eps(float32) times the row's scale.

    On the few rows of a case it may be right by luck, and a backend that is as good on the average must not be stopped
    for it.
    """
    rows = min(SAMPLED_ROWS, max(8, YARDSTICK_ELEMENTS // problem.vocab))
    plain = problem._replace(layout="flat", aligned=True, masked_logits=False)
    inputs = CaseInputs(Case("ordinary rows", rows, ignored=0.0), plain, {}, generator)
    yardstick: dict[str, float] = {}
    for errors, _, scale in _errors(inputs, inputs.plain):
        relative = errors.error / (EPS * scale)
        yardstick |= {f"{errors.what}_error": float(relative.max()), f"{errors.what}_rmse": _rms(relative)}
    return yardstick


def _judge_errors(errors: Errors, plain: Tensor, scale: Tensor, inputs: CaseInputs, notes: Notes) -> None:
    """Whether they are within the budget; what the dtype of the result rounds comes on top."""
    rows, error, plain_error = len(errors.got), errors.error, errors.of(plain)
    info = torch.finfo(errors.got.dtype)  # below its smallest normal number, a dtype rounds to multiples of eps * tiny
    rounding = info.eps * errors.truth.abs().amax(-1, keepdim=True).clamp(min=info.tiny)
    floor, ceiling = BUDGET * EPS * scale, PLAIN_CEILING * EPS * scale + rounding

    def limits(name: str, of_plain: float, scatter: float = 0.0) -> Tensor:
        ordinary = inputs.yardstick.get(name, 0.0) * EPS * scale * (1.0 + scatter)
        budget = BUDGET * ordinary.clamp(min=of_plain)
        return torch.maximum(torch.minimum(budget, ceiling), floor)

    name = f"{errors.what}_error"
    largest = limits(name, float(plain_error.max()))
    worst = int((error / largest.clamp(min=1e-300)).amax(-1).argmax())
    notes.add_figure(name, float(error[worst].max()), float(largest[worst]))
    if rows >= FEWEST_ROWS_FOR_A_MEAN:  # which scatters where rows are few, and of one says what its largest says
        name = f"{errors.what}_rmse"
        notes.add_figure(name, _rms(error), float(limits(name, _rms(plain_error), rows**-0.5).max()))


def _rms(error: Tensor) -> float:
    return float(error.square().mean().sqrt())


def row_scale(logits: Tensor, temperature: float | Tensor) -> Tensor:
    """[n, 1]: the largest finite |x| of each row [n, V], x = logits / temperature; at least 1."""
    logits = logits.float()
    largest = logits.nan_to_num(0.0, 0.0, 0.0).abs().amax(-1, keepdim=True) if len(logits) else logits[:, :1]
    return (largest / temperature).clamp(min=1.0)


def _judge_argmax(inputs: CaseInputs, argmax: Tensor, notes: Notes) -> None:
    """Every row, exactly: of equal maxima the first one counts."""
    got, true = inputs.sampled(argmax, 1).squeeze(-1), inputs.true.argmax
    wrong = (got != true).nonzero()
    row = int(wrong[0]) if len(wrong) else 0
    detail = f"row {int(inputs.sample[row])}: got {int(got[row])}, expected {int(true[row])}" if len(wrong) else ""
    notes.add("argmax", not len(wrong), detail)


def _judge_gradient_sign(inputs: CaseInputs, gradient: Tensor, notes: Notes) -> None:
    """In the direction of the upstream gradient, where all of it comes from one label a row."""
    if inputs.case.special or len(inputs.upstream) > 1 or inputs.problem.labels_per_row != 1:
        return
    vocab = inputs.problem.vocab
    gradient = gradient.float()
    upstream, labels = inputs.sampled(inputs.upstream["log_probs"], 1), inputs.sampled(inputs.labels, 1)
    kept = (labels != IGNORE_INDEX).squeeze(-1)
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
