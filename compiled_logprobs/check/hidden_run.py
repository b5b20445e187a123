"""The part of the check that only functions from hidden states have: their own cases, and the three gradients."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from compiled_logprobs.check.calls import from_a_model, kept_modes, typed
from compiled_logprobs.check.cases import QWEN, Case
from compiled_logprobs.check.function import Function
from compiled_logprobs.check.hidden_cases import HiddenCase, HiddenCaseInputs
from compiled_logprobs.check.hidden_function import HiddenArguments, HiddenFunction, NamedHiddenBackend
from compiled_logprobs.check.inputs import DIFFERENTIABLE, Returned
from compiled_logprobs.check.report import Errors, Notes, Refused, Stop
from compiled_logprobs.check.verdicts import judge, judge_errors
from compiled_logprobs.decision import Kind
from compiled_logprobs.errors import nothing_can_serve_after
from compiled_logprobs.problem import FROM_HIDDEN, Problem, short_name

HiddenSubject = HiddenFunction | NamedHiddenBackend
"""What is checked from hidden states."""
ROWS_OF_LOGITS = 48
"""At most so many rows of logits are embedded: the hidden size has to be as many."""
COLUMNS_OF_LOGITS = 2**14
"""At most about so many columns, which lie as all do: a case takes as long as it has logits, and all of a larger
vocabulary is a case of its own."""
SAFE_LIMIT = 2**26
"""Bytes that a function may take beside its arguments which says nothing of its least."""
SMALLEST_LARGE = 2**14
"""Of vocabularies."""
GRADIENTS: dict[str, Kind] = {"hidden": "hidden_gradient", "weight": "weight_gradient", "bias": "bias_gradient"}


def of_embedded_logits(problem: Problem, *, frozen: bool) -> Problem:
    """What is asked of logits that are embedded, of a function for `problem`."""
    neither: dict[str, Any] = {name: Problem._field_defaults[name] for name in FROM_HIDDEN}
    vocab = problem.vocab if problem.vocab < 2 * COLUMNS_OF_LOGITS else COLUMNS_OF_LOGITS + problem.vocab % 128
    return problem._replace(
        **neither,
        rows=min(problem.rows, ROWS_OF_LOGITS),
        vocab=vocab,
        needs_grad=problem.needs_grad and not frozen,
        layout="flat",
        aligned=True,
        masked_logits=False,
        inplace_backward=False,
    )


def can_embed(case: Case, problem: Problem) -> bool:
    """Whether logits of this kind can be: one that is not finite would spoil its whole column, as 0 * NaN is NaN.

    Large vocabularies take long: there is one, where nothing is asked for but log-probabilities. Many rows are among
    the operation's own cases.
    """
    is_quick = case.vocab is None or case.vocab < SMALLEST_LARGE or (case.vocab == QWEN and not problem.entropy)
    return is_quick and case.rows <= ROWS_OF_LOGITS and not (case.special or case.strided) and case.column_step == 1


def check_from_hidden(
    subject: HiddenSubject,
    problem: Problem,
    chosen: list[HiddenCase],
    notes: Notes,
    generator: torch.Generator,
    tell: Callable[[str], None],
) -> None:
    """Run the cases of the operation's own."""
    for case in chosen:
        tell(f"{problem}: {case.name}")
        limit = _memory_limit(subject, case, problem)
        if case.limit is not None and limit is None:
            continue
        if isinstance(subject, NamedHiddenBackend) and not subject.takes(case.posed(problem)):
            continue
        inputs = HiddenCaseInputs(case, problem, generator)
        notes.begin(case)
        try:
            _check_case(subject, inputs, notes, limit)
        except Refused:
            continue
        except Stop:
            if case.rows:
                return  # what follows would only repeat it


def _memory_limit(subject: HiddenSubject, case: HiddenCase, problem: Problem) -> int | None:
    if case.limit is None:
        return None
    if isinstance(subject, HiddenFunction):
        return int(SAFE_LIMIT * case.limit)
    own = problem._replace(rows=case.rows, vocab=case.columns, hidden=case.hidden or problem.hidden)
    least = subject.least_memory(own._replace(memory_limit=None))
    return None if least is None else int(least * case.limit)


def _check_case(subject: HiddenSubject, inputs: HiddenCaseInputs, notes: Notes, limit: int | None) -> None:
    case, needs_grad = inputs.case, inputs.problem.needs_grad
    given = inputs.arguments(memory_limit=limit, with_gradient=needs_grad)
    if subject.frozen:
        for x in (given.weight, given.bias):
            if x is not None:
                x.requires_grad_(False)
    given = given._replace(hidden=from_a_model(given.hidden) if given.hidden.requires_grad else given.hidden)
    asked = [name for name in GRADIENTS if (x := getattr(given, name)) is not None and x.requires_grad]
    gradients: list[dict[str, Any]] = []
    raised = ""
    try:
        with torch.set_grad_enabled(needs_grad):
            with kept_modes(given.hidden.device, notes):
                result = subject.from_hidden(given, inputs.problem)
            results = typed(subject, result, inputs, notes)
        if asked:
            gradients = _gradients(given, asked, results, inputs, notes)
    except Stop:
        raise
    except (Exception, SystemExit) as error:  # whatever a backend raises is its verdict
        if nothing_can_serve_after(error):
            raise
        raised = f"{type(error).__name__}: {error}"
    for what in subject.overwritten():
        notes.add("inputs_changed", False, f"the {what} overwritten")
    if raised and case.may_refuse and isinstance(subject, Function):
        notes.refuse(raised)
        raise Refused
    notes.require("runs", not raised, raised)
    judge(inputs, results.each(Tensor.detach), notes)
    for found in gradients:
        _judge_gradients(found, inputs, notes)
    for name in ("weight", "bias"):
        x = getattr(given, name)
        gets = x is not None and not x.requires_grad and x.grad is not None
        notes.add("frozen_gradient", not gets, f"the {name} has one")


def _gradients(
    given: HiddenArguments, asked: list[str], results: Returned, inputs: HiddenCaseInputs, notes: Notes
) -> list[dict[str, Any]]:
    for name in DIFFERENTIABLE:
        tensor = getattr(results, name)
        what = "log-probabilities do" if name == "log_probs" else f"{name} does"
        flows = tensor is None or tensor.requires_grad
        notes.require("gradient_flows", flows, f"the {what} not require a gradient")
    outputs = [getattr(results, name) for name in inputs.upstream]
    upstream = [grad.to(output.dtype) for grad, output in zip(inputs.upstream.values(), outputs, strict=True)]
    leaves, found = [getattr(given, name) for name in asked], []
    for is_last in [False, True] if inputs.case.twice else [True]:
        gradients = torch.autograd.grad(outputs, leaves, upstream, retain_graph=not is_last, allow_unused=True)
        found.append(dict(zip(asked, gradients, strict=True)))
    return found


def _judge_gradients(found: dict[str, Any], inputs: HiddenCaseInputs, notes: Notes) -> None:
    for name, gradient in found.items():
        what, true = GRADIENTS[name], getattr(inputs.gradients, name)
        notes.add("gradient_flows", gradient is not None, f"none comes to the {name}")
        if gradient is None:
            continue
        fits = gradient.shape == true.shape
        notes.require("shape", fits, f"{what.replace('_', ' ')} {list(gradient.shape)}, expected {list(true.shape)}")
        notes.add("dtype", gradient.dtype == inputs.problem.dtype, f"{name}'s gradient {short_name(gradient.dtype)}")
        if name == "hidden":
            zero = gradient[inputs.ignored.all(-1)] == 0
            notes.add("ignored_rows", bool(zero.all()), "the gradient in the hidden states of an ignored row is not 0")
        gradient, true, plain = (
            x.unsqueeze(-1) if x.ndim == 1 else x for x in (gradient, true, getattr(inputs.plain_gradients, name))
        )
        if not gradient.numel():
            continue
        rows = torch.arange(len(gradient), device=gradient.device)
        errors = Errors(what, gradient, true, torch.ones_like(rows, dtype=torch.bool).unsqueeze(-1), rows)
        notes.add("nan_pattern", errors.fits_pattern, f"the {what} is NaN or infinite elsewhere than in float64")
        notes.add_errors(errors)
        largest = float(inputs.scale.max()) if len(inputs.scale) else 1.0
        # Of what is 0 throughout, a limit that is no more than that.
        size = true.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
        scale = largest * size * torch.ones_like(true[:, :1])
        # Chunks are products of their own, each of which rounds: the mean square tells how often.
        slack = torch.finfo(inputs.problem.dtype).eps * float(true.abs().max())
        judge_errors(errors, plain, scale, inputs, notes, slack)
