"""One call of what is checked: what it returned, and what else it did.

Shapes: V vocabulary, K labels a row; R one or two leading dimensions.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from compiled_logprobs.check.function import Function, NamedBackend, Subject
from compiled_logprobs.check.inputs import DIFFERENTIABLE, CaseInputs, Returned, names_of
from compiled_logprobs.check.over_ranks import FunctionOverRanks
from compiled_logprobs.check.process_state import modes, restore_modes
from compiled_logprobs.check.report import Notes, Refused, Stop
from compiled_logprobs.check.verdicts import Judged
from compiled_logprobs.errors import nothing_can_serve_after
from compiled_logprobs.problem import short_name


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


def from_a_model(logits: Tensor) -> Tensor:
    """The same values in the same memory, with a gradient function."""
    model = torch.zeros((), device=logits.device, requires_grad=True)
    return _NotALeaf.apply(model, logits)  # type: ignore[no-any-return, no-untyped-call]  # torch's gap


def begin_call(subject: Subject, inputs: CaseInputs, notes: Notes) -> tuple[Tensor, Returned]:
    """Call the subject for a gradient: the logits that it got, as a model would give them, and what it returned."""
    logits, labels = from_a_model(inputs.arena.logits), inputs.fresh_labels()
    with torch.enable_grad():
        results = _called(subject, logits, labels, inputs.temperature, inputs, notes)
    return logits, typed(subject, results, inputs, notes)


def call_without_gradient(subject: Subject, inputs: CaseInputs, notes: Notes) -> Returned:
    """Call the subject, in the mode that holds, with logits that require no gradient."""
    results = _called(subject, inputs.arena.logits, inputs.fresh_labels(), inputs.temperature, inputs, notes)
    return typed(subject, results, inputs, notes).each(Tensor.detach)


def call_once(subject: Subject, inputs: CaseInputs, notes: Notes, *, with_gradient: bool) -> Returned:
    """Call the subject once. Raises Stop where the results are not what they should be in kind."""
    problem, arena = inputs.problem, inputs.arena
    labels, t = inputs.fresh_labels(), inputs.temperature
    t = t.clone() if isinstance(t, Tensor) else t
    logits, gradient, raised = arena.logits, None, ""
    if with_gradient:
        logits = from_a_model(logits)
    version = logits._version
    try:
        with torch.set_grad_enabled(with_gradient):
            results = typed(subject, _called(subject, logits, labels, t, inputs, notes), inputs, notes)
        if with_gradient:
            for name in DIFFERENTIABLE:
                tensor, what = getattr(results, name), "log-probabilities do" if name == "log_probs" else f"{name} does"
                flows = tensor is None or tensor.requires_grad
                notes.require("gradient_flows", flows, f"the {what} not require a gradient")
            upstream = {name: grad.clone() for name, grad in inputs.upstream.items()}
            gradient = gradient_of(logits, results, upstream)
            kept = all(torch.equal(grad, inputs.upstream[name]) for name, grad in upstream.items())
            notes.add("inputs_changed", kept, "the upstream gradient was overwritten")
    except Stop:
        raise
    except (Exception, SystemExit) as error:  # whatever a backend raises is its verdict
        if nothing_can_serve_after(error):
            raise
        raised = f"{type(error).__name__}: {error}"
    changed = arena.logits_changed()
    may_overwrite = problem.inplace_backward and gradient is not None
    notes.add("inputs_changed", may_overwrite or not changed, "the logits were overwritten")
    for what in subject.overwritten():
        notes.add("inputs_changed", False, f"the {what} overwritten")
    notes.add("inputs_changed", torch.equal(labels, inputs.labels), "the labels were overwritten")
    same = torch.equal(torch.as_tensor(t), torch.as_tensor(inputs.temperature))
    notes.add("inputs_changed", same, "the temperature was overwritten")
    if may_overwrite:
        announced = logits._version > version
        notes.add("version_counter", announced or not changed, "the logits changed, their version did not")
    notes.add("outside_write", not arena.surroundings_changed(), "memory beside the logits was written")
    is_accident = bool(inputs.case.accident) and inputs.case.accident in raised
    if raised and inputs.case.may_refuse and not is_accident and isinstance(subject, Function):
        notes.refuse(raised)
        raise Refused
    notes.require("runs", not raised, raised)
    if isinstance(subject, FunctionOverRanks):
        notes.add("same_on_ranks", not subject.differs, "a rank returned other bits than another")
    if isinstance(subject, NamedBackend):
        notes.add("own_memory", not subject.shared, f"the {subject.shared} shares memory with the stats")
    if gradient is not None:
        fits = gradient.shape == logits.shape
        notes.require("shape", fits, f"gradient {list(gradient.shape)}, expected {list(logits.shape)}")
        notes.add("dtype", gradient.dtype == problem.dtype, f"gradient {short_name(gradient.dtype)}")
        gradient = gradient.clone() if problem.inplace_backward else gradient
        if changed:
            arena.restore()
    return results.each(Tensor.detach)._replace(gradient=gradient)


def _called(
    subject: Subject, logits: Tensor, labels: Tensor, t: float | Tensor, inputs: CaseInputs, notes: Notes
) -> Any:
    with kept_modes(logits.device, notes):
        return subject(logits, labels, t, inputs.problem, inputs.case.ignore_index)


@contextmanager
def kept_modes(device: torch.device, notes: Notes) -> Iterator[None]:
    """Put torch's modes back after a call, and note down which it has changed."""
    before = modes(device)
    try:
        yield
    finally:
        changed = restore_modes(before, device)
        notes.add("modes", not changed, f"a call changed {' and '.join(changed)}")


def typed(subject: Subject, result: Any, inputs: Judged, notes: Notes) -> Returned:
    """The results by name. Notes down where their types, shapes and dtypes are not those that were asked for."""
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
        is_here = part.device == inputs.labels.device
        notes.require("result_type", is_here, f"got one on {part.device}, expected {inputs.labels.device}")
        dtype = torch.int64 if name == "argmax" else problem.out_dtype
        notes.add("dtype", part.dtype == dtype, f"got {short_name(part.dtype)}, expected {short_name(dtype)}")
    return Returned(**dict(zip(names, parts, strict=True)))


def gradient_of(
    logits: Tensor, results: Returned, upstream: Mapping[str, Tensor], *, retain_graph: bool = False
) -> Tensor:
    """The gradient in the logits that comes of these upstream gradients."""
    outputs = {name: getattr(results, name) for name in upstream}
    gradients = [grad.to(outputs[name].dtype) for name, grad in upstream.items()]
    return torch.autograd.grad([*outputs.values()], [logits], gradients, retain_graph=retain_graph)[0]
