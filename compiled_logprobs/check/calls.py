"""One call of a backend or of a function: what it returns, in kind, and what it does to memory.

Shapes: N rows, V vocabulary, K labels a row; R the leading dimensions, one or two, whose product is N.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from compiled_logprobs.backends import get_backend, require_backend, why_not
from compiled_logprobs.check.cases import IGNORE_INDEX
from compiled_logprobs.check.function import Function
from compiled_logprobs.check.report import Notes, Stop
from compiled_logprobs.check.verdicts import CaseInputs, Results, gradient_of
from compiled_logprobs.errors import nothing_can_serve_after
from compiled_logprobs.operation.autograd import compute
from compiled_logprobs.problem import Problem, short_name


class NamedBackend:
    """A registered backend, called through `compute` as the public functions do."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._backend = get_backend(name)
        self.row_invariant = self._backend.row_invariant

    def within(self, problem: Problem) -> Problem:
        """`problem`. Raises BackendUnavailable where the backend cannot run it."""
        require_backend(self.name, problem)
        return problem

    def default_problems(self, plain: Problem) -> list[Problem]:
        """`plain` in float32, and misaligned in bfloat16, each with the most that the backend has."""
        problems = []
        for bare in (plain, plain._replace(dtype=torch.bfloat16, layout="rows", aligned=False)):
            tempered = bare._replace(temperature="number")
            richest_first = (tempered._replace(entropy=True), tempered, bare)
            problems += [problem for problem in richest_first if why_not(self.name, problem) is None][:1]
        if not problems:
            require_backend(self.name, plain)  # raises
        return problems

    def __call__(self, logits: Tensor, labels: Tensor, temperature: float | Tensor, problem: Problem) -> Any:
        log_probs, entropy = compute(
            self._backend,
            logits,
            labels,
            temperature,
            ignore_index=IGNORE_INDEX,
            entropy=problem.entropy,
            inplace_backward=problem.inplace_backward,
        )
        log_probs = log_probs.to(problem.out_dtype)
        return (log_probs, entropy.to(problem.out_dtype)) if entropy is not None else log_probs

    def as_function(self, problem: Problem) -> Callable[..., Any]:
        """The same as a function of logits [N, V] and labels [N], with the options that `problem` has."""

        def function(logits: Tensor, labels: Tensor, temperature: float = 1.0, return_entropy: bool = False) -> Any:
            result = self(logits, labels.unsqueeze(-1), temperature, problem._replace(entropy=return_entropy))
            return (result[0].squeeze(-1), result[1]) if isinstance(result, tuple) else result.squeeze(-1)

        return function


Subject = NamedBackend | Function
"""What is checked."""


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


def call_once(subject: Subject, inputs: CaseInputs, notes: Notes, *, with_gradient: bool) -> Results:
    """Call the subject once. Raises Stop where the results are not what they should be in kind."""
    problem, arena = inputs.problem, inputs.arena
    labels, t = inputs.labels.clone(), inputs.temperature
    t = t.clone() if isinstance(t, Tensor) else t
    logits = arena.logits
    if with_gradient:
        model = torch.zeros((), device=logits.device, requires_grad=True)
        logits = _NotALeaf.apply(model, logits)  # type: ignore[no-untyped-call]  # torch's gap
    gradient, raised = None, ""
    version = logits._version
    try:
        with torch.set_grad_enabled(with_gradient):
            results = _typed(subject(logits, labels, t, problem), inputs, notes)
        if with_gradient:
            for what, tensor in (("log-probabilities do", results.log_probs), ("entropy does", results.entropy)):
                flows = tensor is None or tensor.requires_grad
                notes.require("gradient_flows", flows, f"the {what} not require a gradient")
            gradient = gradient_of(logits, results, inputs.grad_log_probs, inputs.grad_entropy)
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
    if isinstance(t, Tensor) and isinstance(inputs.temperature, Tensor):
        notes.add("inputs_changed", torch.equal(t, inputs.temperature), "the temperature was overwritten")
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
    return results.detached()._replace(gradient=gradient)


def _typed(result: Any, inputs: CaseInputs, notes: Notes) -> Results:
    problem = inputs.problem
    parts = tuple(result) if isinstance(result, tuple) else (result,)
    kinds = all(isinstance(part, Tensor) for part in parts) and len(parts) == (2 if problem.entropy else 1)
    notes.require("result_type", kinds, f"got {', '.join(type(part).__name__ for part in parts)}")
    expected, dtype = (inputs.labels.shape, inputs.labels.shape[:-1]), problem.out_dtype
    for part, shape in zip(parts, expected, strict=False):
        notes.require("shape", part.shape == shape, f"got {list(part.shape)}, expected {list(shape)}")
        notes.add("dtype", part.dtype == dtype, f"got {short_name(part.dtype)}, expected {short_name(dtype)}")
    return Results(parts[0], parts[1] if problem.entropy else None)
