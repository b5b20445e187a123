"""How people call it, beside one forward and one backward: each way with ordinary inputs and its own verdict.

Shapes: as in inputs.py.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from compiled_logprobs.check.calls import begin_call, call_without_gradient, gradient_of
from compiled_logprobs.check.cases import Case
from compiled_logprobs.check.function import Function, Subject
from compiled_logprobs.check.inputs import CaseInputs, Returned
from compiled_logprobs.check.report import Notes, Stop
from compiled_logprobs.check.verdicts import judge
from compiled_logprobs.errors import nothing_can_serve_after
from compiled_logprobs.problem import Problem

ROWS = 3

Outcome = list[tuple[CaseInputs, Returned]]
"""What is to be judged."""


class Way(NamedTuple):
    """A way to call it, for a gradient."""

    case: Case
    run: Callable[[Subject, CaseInputs, Notes, torch.Generator], Outcome]
    applies: Callable[[Problem], bool] = lambda problem: True


def _begun(subject: Subject, inputs: CaseInputs, notes: Notes) -> tuple[Tensor, Returned, Returned]:
    """The logits, what was returned, and the same without its graph."""
    logits, results = begin_call(subject, inputs, notes)
    return logits, results, results.each(Tensor.detach)


def _second_backward(subject: Subject, inputs: CaseInputs, notes: Notes, generator: torch.Generator) -> Outcome:
    logits, results, values = _begun(subject, inputs, notes)
    gradient_of(logits, results, inputs.upstream, retain_graph=True)
    return [(inputs, values._replace(gradient=gradient_of(logits, results, inputs.upstream)))]


def _expanded(subject: Subject, inputs: CaseInputs, notes: Notes, generator: torch.Generator) -> Outcome:
    one = torch.ones((), dtype=inputs.problem.out_dtype, device=generator.device)
    inputs.upstream = {name: one.expand(grad.shape) for name, grad in inputs.upstream.items()}
    return _one_backward(subject, inputs, notes)


def _through(name: str) -> Callable[..., Outcome]:
    def run(subject: Subject, inputs: CaseInputs, notes: Notes, generator: torch.Generator) -> Outcome:
        inputs.upstream = {name: inputs.upstream[name]}
        return _one_backward(subject, inputs, notes)

    return run


def _one_backward(subject: Subject, inputs: CaseInputs, notes: Notes) -> Outcome:
    inputs.solve()
    logits, results, values = _begun(subject, inputs, notes)
    return [(inputs, values._replace(gradient=gradient_of(logits, results, inputs.upstream)))]


def _two_forwards(subject: Subject, inputs: CaseInputs, notes: Notes, generator: torch.Generator) -> Outcome:
    both = inputs, CaseInputs(inputs.case, inputs.problem, inputs.yardstick, generator)
    begun = [_begun(subject, each, notes) for each in both]
    return [
        (each, values._replace(gradient=gradient_of(logits, results, each.upstream)))
        for each, (logits, results, values) in zip(both, begun, strict=True)
    ]


def _scaled(subject: Subject, inputs: CaseInputs, notes: Notes, generator: torch.Generator) -> Outcome:
    factors = torch.tensor([2.0**-18, 1.0, 2.0**10], device=generator.device)  # of the rows
    inputs.upstream = {
        name: grad.sign() * (factors.unsqueeze(-1) if name == "log_probs" else factors)
        for name, grad in inputs.upstream.items()
    }
    return _one_backward(subject, inputs, notes)


def _autocast(subject: Subject, inputs: CaseInputs, notes: Notes, generator: torch.Generator) -> Outcome:
    if not isinstance(subject, Function):  # whose own calls leave it
        return []
    with torch.autocast(generator.device.type, torch.bfloat16):
        logits, results, values = _begun(subject, inputs, notes)
    return [(inputs, values._replace(gradient=gradient_of(logits, results, inputs.upstream)))]


def _frozen(subject: Subject, inputs: CaseInputs, notes: Notes, generator: torch.Generator) -> Outcome:
    with torch.enable_grad():
        results = call_without_gradient(subject, inputs, notes)
    for what in subject.overwritten():
        notes.add("inputs_changed", False, f"the {what} overwritten")
    return [(inputs, results)]


def _inference(subject: Subject, inputs: CaseInputs, notes: Notes, generator: torch.Generator) -> Outcome:
    if not isinstance(subject, Function):
        return []
    with torch.inference_mode():
        return [(inputs, call_without_gradient(subject, inputs, notes).each(Tensor.clone))]


def _logits_changed(subject: Subject, inputs: CaseInputs, notes: Notes, generator: torch.Generator) -> Outcome:
    logits, results, values = _begun(subject, inputs, notes)
    values = values.each(Tensor.clone)
    logits.detach().mul_(-0.5)
    try:
        gradient = gradient_of(logits, results, inputs.upstream)
    except RuntimeError as error:  # as autograd says it, and as it should be
        if nothing_can_serve_after(error):
            raise
        return []
    return [(inputs, values._replace(gradient=gradient))]


def _not_in_place(problem: Problem) -> bool:
    return not problem.inplace_backward


def _case(name: str, mistake: str, *, may_refuse: bool = False) -> Case:
    return Case(name, ROWS, ignored=0.0, mistake=mistake, may_refuse=may_refuse)


WAYS = (
    Way(
        _case(
            "a second backward",
            "the second backward of a retained graph is wrong: the first one changes what forward kept for it",
            may_refuse=True,
        ),
        _second_backward,
        _not_in_place,
    ),
    Way(
        _case(
            "an expanded upstream gradient",
            "reads the upstream gradient of .sum().backward(), one number with strides of 0, as if it were contiguous",
        ),
        _expanded,
    ),
    *(
        Way(
            _case(
                f"a gradient through the {name} alone",
                f"the gradient is wrong where it comes through the {name} alone, and none through the "
                "log-probabilities",
            ),
            _through(name),
            lambda problem, name=name: getattr(problem, name),  # type: ignore[misc]  # binds the name of this turn
        )
        for name in ("entropy", "logsumexp")
    ),
    Way(
        _case(
            "two forwards before a backward",
            "keeps what backward needs in one place for all calls, where the next forward replaces it: keep it in ctx",
        ),
        _two_forwards,
    ),
    Way(
        _case(
            "small and large upstream gradients",
            "the gradient is wrong where the upstream gradient is small, as of a mean over many tokens, or large, as "
            "of a loss that is scaled: keep it in float32, and clip nothing",
        ),
        _scaled,
        lambda problem: problem.labels_per_row == 1,
    ),
    Way(
        _case("under autocast", "does not take autocast, under which what it multiplies is bfloat16: disable it there"),
        _autocast,
        lambda problem: problem.dtype == torch.bfloat16,
    ),
    Way(
        _case(
            "logits that require no gradient", "is wrong for logits that require no gradient, where gradients are on"
        ),
        _frozen,
        lambda problem: problem.dtype == torch.float32,
    ),
    Way(
        _case("in inference mode", "is wrong in torch.inference_mode()"),
        _inference,
        lambda problem: problem.dtype == torch.float32,
    ),
    Way(
        _case(
            "logits changed before the backward",
            "takes the gradient of logits that were changed in place after the forward, without a word: keep them by "
            "save_for_backward, which raises then",
        ),
        _logits_changed,
        _not_in_place,
    ),
)


def check_ways(
    subject: Subject, problem: Problem, yardstick: dict[str, float], notes: Notes, generator: torch.Generator
) -> None:
    """Call it in all the ways that apply."""
    for way in WAYS if problem.needs_grad and problem.rows else ():
        if not way.applies(problem):
            continue
        inputs = CaseInputs(way.case, problem, yardstick, generator)
        notes.begin(way.case)
        try:
            for each, results in way.run(subject, inputs, notes, generator):
                judge(each, results, notes)
        except Stop:
            continue
        except (Exception, SystemExit) as error:  # whatever is raised is its verdict
            if nothing_can_serve_after(error):
                raise
            said = f"{type(error).__name__}: {error}"
            if way.case.may_refuse and isinstance(subject, Function):
                notes.refuse(said)
            else:
                notes.add("runs", False, said)
