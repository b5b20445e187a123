"""The gate ("sign check"): whether a backend, or any function, keeps the contract on this device.

The truth is `compiled_logprobs.operation.reference`; the budget for an error is what plain torch itself makes of the same input.

Shapes: N rows, V vocabulary, K labels a row; R the leading dimensions, one or two, whose product is N.
"""

import math
import random
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from compiled_logprobs.backends import get_backend, require_backend, why_not
from compiled_logprobs.check.cases import IGNORE_INDEX, Case, cases, fill_nothing
from compiled_logprobs.check.function import Function, Returns
from compiled_logprobs.check.report import Check, Findings, Stop
from compiled_logprobs.check.verdicts import (
    Inputs,
    Outcome,
    Yardstick,
    eager_yardstick,
    gradient_of,
    judge,
    judge_memory,
    make_inputs,
    same_bits,
)
from compiled_logprobs.decision import CaseEvidence
from compiled_logprobs.errors import InputError, nothing_can_serve_after
from compiled_logprobs.machine.clock import free_memory
from compiled_logprobs.operation.autograd import compute
from compiled_logprobs.problem import Problem, bucket, collapse, layout_of, short_name

INVARIANCE_ELEMENTS = 2**24
"""Logits of the input whose rows are compared with the same rows among fewer, unless a quarter of the free memory holds less."""
BYTES_OF_MANY = 65
"""What it takes for each of these logits, the comparison with float64 included (measured with eager on a CPU)."""


@dataclass(frozen=True)
class CheckReport:
    """What the gate found."""

    subject: str
    problems: tuple[Problem, ...]
    checks: tuple[Check, ...]
    """One a check and problem."""
    seed: int
    """Of the inputs: `check_backend(..., seed=report.seed)` makes the same ones."""
    repeatable: bool | None = None
    """Whether the same call gave the same bits twice. Recorded; neither is a failure."""
    row_invariant: bool | None = None
    """Whether a row had the same bits in batches of different N. A failure only of a backend that declares it."""
    cases: tuple[tuple[CaseEvidence, ...], ...] = ()
    """For each of `problems`: the same checks for each kind of input, and how the errors spread."""
    causes: tuple[str, ...] = ()
    """What is probably wrong, the first likely to explain most; empty where nothing is, or nothing is recognised."""

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    @property
    def reasons(self) -> list[str]:
        """The names of the checks that failed, each once."""
        return list(dict.fromkeys(check.name for check in self.checks if not check.passed))

    def to_dict(self) -> dict[str, Any]:
        """For programs: plain values only, and None where a figure is not finite."""

        def number(value: float | None) -> float | None:
            return value if value is not None and math.isfinite(value) else None

        return {
            "subject": self.subject,
            "passed": self.passed,
            "reasons": self.reasons,
            "seed": self.seed,
            "causes": list(self.causes),
            "repeatable": self.repeatable,
            "row_invariant": self.row_invariant,
            "checks": [
                {
                    "name": check.name,
                    "meaning": check.meaning,
                    "problem": str(check.problem),
                    "options": check.problem.details(),
                    "passed": check.passed,
                    "figure": number(check.figure),
                    "limit": number(check.limit),
                    "detail": check.detail,
                }
                for check in self.checks
            ],
            "cases": [
                {"problem": str(problem), "options": problem.details(), **asdict(case)}
                for problem, cases in zip(self.problems, self.cases, strict=True)
                for case in cases
            ],
        }


def check_backend(
    name_or_callable: str | Callable[..., Any],
    problem: Problem | None = None,
    *,
    short: bool = False,
    ignore_index: bool = True,
    device: str | None = None,
    seed: int | None = None,
    vocab: int | None = None,
    call: str | None = None,
    returns: Returns = "log_prob",
) -> CheckReport:
    """Hold a backend, or any function of logits and labels, against the contract.

    Args:
        name_or_callable: a registered backend's name; or a function that takes logits [N, V], labels [N] int64 and whichever
            of `temperature`, `ignore_index`, `return_entropy`, `masked_logits`, `inplace_backward`, `out_dtype` its
            signature names, and returns log-probabilities [N] (with `return_entropy=True` also the entropy [N]).
        problem: what to check it for; by default a few small problems in float32 and bfloat16 with what it supports.
        short: fewer inputs, for a check right before the first use.
        ignore_index: whether labels of -100 are among the inputs.
        device: where the inputs lie, e.g. "cuda:1"; by default where `problem` says, or the accelerator if there is one.
        seed: of the inputs; fresh at random by default.
        vocab: V of the default problems; by default one that is off every block size.
        call: how to call a function that takes something else than (logits, labels): an expression of Python such as
            "f(labels, logits, temp=temperature)" or "f(logits[None], targets=labels[None], reduction='none')", where f is the
            function. It may name the options above, and only those in it are tried. A batch dimension of 1 in the results is
            taken away.
        returns: what the function's numbers are: "log_prob", or "loss" for minus that.

    Returns:
        A `CheckReport`; `.passed`, and if not, `.reasons`, and in `.causes` what is probably wrong.

    Raises:
        InputError: the function cannot be called like this, `call` is no such expression, or `vocab` comes with a problem.
        BackendUnavailable: the named backend is unknown, or cannot run the problem here.
    """
    # Not from torch's generator, whose numbers belong to the caller.
    seed = random.SystemRandom().randrange(2**31) if seed is None else seed
    subject = _subject(name_or_callable, call, returns)
    if vocab is not None and (vocab < 2 or problem is not None):
        raise InputError(
            f"got vocab={vocab}{'' if problem is None else f' beside {problem}'}; 2 or more is valid, without a problem."
        )
    place = torch.device(device or (_default_device() if problem is None else problem.device_type))
    problems = (
        subject.default_problems(_default_problem(place.type, vocab)) if problem is None else [subject.within(problem)]
    )
    checks: list[Check] = []
    by_case: list[tuple[CaseEvidence, ...]] = []
    causes: dict[str, list[Problem]] = {}
    recorded = _Recorded()

    def check_all() -> None:
        for one in problems:
            findings = Findings(one)
            _check(subject, one, findings, recorded, short, ignore_index, torch.Generator(place).manual_seed(seed))
            checks.extend(findings.checks())
            by_case.append(tuple(findings.cases()))
            if problem is None or isinstance(subject, Function):
                for cause in _causes(subject, one, by_case[-1], place, seed, ignore_index):
                    causes.setdefault(cause, []).append(one)

    _in_a_fresh_context(check_all, place)
    return CheckReport(
        subject.name,
        tuple(problems),
        tuple(checks),
        seed,
        recorded.repeatable,
        recorded.row_invariant,
        tuple(by_case),
        tuple(_of_dtypes(cause, of, problems) for cause, of in causes.items()),
    )


def _subject(given: str | Callable[..., Any], call: str | None, returns: Returns) -> "_Subject":
    if not isinstance(given, str):
        return Function(given, call, returns)
    if call is not None or returns != "log_prob":
        raise InputError(
            f"got backend {given!r} with call={call!r} and returns={returns!r}; these say how a function is to be called, "
            "which is known of a backend. Leave them out."
        )
    return _Named(given)


def _causes(
    subject: "_Subject",
    problem: Problem,
    cases: tuple[CaseEvidence, ...],
    device: torch.device,
    seed: int,
    ignore_index: bool,
) -> list[str]:
    """What is probably wrong, if anything is."""
    failed = frozenset(check.name for case in cases for check in case.checks if not check.passed)
    if not failed:
        return []
    from compiled_logprobs.check.causes import likely_causes  # which few processes need

    function = subject if isinstance(subject, Function) else Function(subject.as_function(problem))
    found = likely_causes(function, problem, failed, device, seed, ignore_index)
    wrong_in = [case.case for case in cases if not all(check.passed for check in case.checks)]
    if not found and len(wrong_in) < len(cases):
        more = f" and {len(wrong_in) - 4} more" if len(wrong_in) > 4 else ""
        found = [f"right for ordinary inputs, and wrong for these: {', '.join(wrong_in[:4])}{more}"]
    return found


def _of_dtypes(cause: str, of: list[Problem], among: list[Problem]) -> str:
    """`cause`, with the dtypes of the logits that it was seen with, unless these are all."""
    seen = list(dict.fromkeys(short_name(one.dtype) for one in of))
    return cause if len(seen) == len({one.dtype for one in among}) else f"with {' and '.join(seen)} logits: {cause}"


def _in_a_fresh_context(work: Callable[[], None], device: torch.device) -> None:
    """Run `work` as if nothing surrounded it: inference mode, hooks on saved tensors, autocast, a default device.

    All of these belong to a thread. Anomaly mode does not, and would take the NaN that is among the inputs for a mistake.
    """

    def run() -> None:
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            work()

    with torch.autograd.set_detect_anomaly(False), ThreadPoolExecutor(1) as thread:
        thread.submit(run).result()


def _default_device() -> str:
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return "cpu" if accelerator is None else accelerator.type


def _default_problem(device_type: str, vocab: int | None) -> Problem:
    """By default, V is odd and off every block size; flash-attn needs three blocks for it."""
    return Problem(device_type, rows=48, vocab=vocab or 32771, dtype=torch.float32, needs_grad=True)


class _Named:
    """A registered backend, called through `compute` as the public functions do."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._backend = get_backend(name)
        self.row_invariant = self._backend.row_invariant

    def within(self, problem: Problem) -> Problem:
        require_backend(self.name, problem)
        return problem

    def default_problems(self, one: Problem) -> list[Problem]:
        found = []
        for plain in (one, one._replace(dtype=torch.bfloat16, layout="rows", aligned=False)):
            with_temperature = plain._replace(temperature="number")
            richest_first = (with_temperature._replace(entropy=True), with_temperature, plain)
            found += [p for p in richest_first if why_not(self.name, p) is None][:1]
        if not found:
            require_backend(self.name, one)  # raises
        return found

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


_Subject = _Named | Function


@dataclass
class _Recorded:
    repeatable: bool | None = None
    row_invariant: bool | None = None

    def saw_repeat(self, equal: bool) -> None:
        self.repeatable = equal and self.repeatable is not False

    def saw_rows(self, equal: bool) -> None:
        self.row_invariant = equal and self.row_invariant is not False


def _check(
    subject: _Subject,
    problem: Problem,
    findings: Findings,
    recorded: _Recorded,
    short: bool,
    ignore_index: bool,
    generator: torch.Generator,
) -> None:
    yardstick = eager_yardstick(problem, generator)
    for case in cases(problem, short=short, foreign=isinstance(subject, Function)):
        if not ignore_index:
            case = replace(case, ignored=0.0)
        inputs = make_inputs(case, problem, yardstick, generator)
        findings.begin(case)
        try:
            _run_case(subject, inputs, findings, recorded, generator)
        except Stop:
            if case.rows or not isinstance(subject, Function):
                return  # what follows would only repeat it
    with suppress(Stop):
        _record_many_rows(subject, problem, yardstick, findings, recorded, generator)


def _run_case(
    subject: _Subject, inputs: Inputs, findings: Findings, recorded: _Recorded, generator: torch.Generator
) -> None:
    problem = inputs.problem
    first = _run(subject, inputs, findings, with_gradient=False)
    judge(inputs, first, findings)
    kept = Outcome(first.log_probs.clone(), None if first.entropy is None else first.entropy.clone())
    gradient = kept_gradient = None
    if problem.needs_grad:
        second = _run(subject, inputs, findings, with_gradient=True)
        judge(inputs, second, findings)
        gradient = second.gradient
        kept_gradient = None if gradient is None else gradient.clone()
        same = same_bits(second.log_probs, kept.log_probs) and (
            kept.entropy is None or second.entropy is None or same_bits(second.entropy, kept.entropy)
        )
        findings.add("grad_mode_bits", same, f"{inputs.case.name}: the bits differ")
    if inputs.case.name != "normal":
        return

    again = _run(subject, inputs, findings, with_gradient=False)
    recorded.saw_repeat(same_bits(again.log_probs, kept.log_probs))
    # Other values in the same memory: a result remembered by address or by shape shows itself.
    inputs.arena.refill(generator)
    inputs.solve()
    other = _run(subject, inputs, findings, with_gradient=problem.needs_grad)
    judge(inputs, other, findings)
    findings.add("stale_result", same_bits(first.log_probs, kept.log_probs), "a later call changed an earlier result")
    if gradient is not None and kept_gradient is not None:
        same = same_bits(gradient, kept_gradient)
        findings.add("stale_result", same, "a later call changed an earlier gradient")
    _record_rows(subject, inputs, other, (1, 2), findings, recorded)


def _record_rows(
    subject: _Subject, inputs: Inputs, whole: Outcome, counts: Iterable[int], findings: Findings, recorded: _Recorded
) -> None:
    """Whether the first rows alone have the bits that they have among all, in `whole`."""
    logits, labels, t = inputs.arena.logits, inputs.labels, inputs.temperature
    log_probs, entropy = whole.log_probs.clone(), None if whole.entropy is None else whole.entropy.clone()
    for count in sorted({count for count in counts if 0 < count < len(logits)}):
        try:
            part = subject(logits[:count], labels[:count], t[:count] if isinstance(t, Tensor) else t, inputs.problem)
        except (Exception, SystemExit) as error:  # whatever a backend raises is its verdict
            if nothing_can_serve_after(error):
                raise
            findings.require("runs", False, f"{count} of the rows alone: {type(error).__name__}: {error}")
        parts: tuple[Tensor, ...] = (part,) if isinstance(part, Tensor) else tuple(part)
        same = same_bits(parts[0], log_probs[:count])
        if entropy is not None and len(parts) > 1:
            same = same and same_bits(parts[1], entropy[:count])
        recorded.saw_rows(same)
        # A single row of strided ones lies as if it were contiguous, which is another problem, and may be another kernel.
        if subject.row_invariant and layout_of(collapse(logits[:count])) == layout_of(collapse(logits)):
            name = inputs.case.name
            findings.add(
                "row_invariance", same, f"{name}: the first {count} of {len(logits)} rows have other bits alone"
            )


def _record_many_rows(
    subject: _Subject,
    problem: Problem,
    yardstick: Yardstick,
    findings: Findings,
    recorded: _Recorded,
    generator: torch.Generator,
) -> None:
    """The same with as many rows as the bucket has, or as time and memory allow: kernels change with N."""
    free = free_memory(generator.device)
    most = INVARIANCE_ELEMENTS if free is None else min(INVARIANCE_ELEMENTS, free // (4 * BYTES_OF_MANY))
    rows = min(bucket(problem).rows, max(1, most // problem.vocab))
    case = Case(f"{rows} rows, all and some", rows, fill_nothing, ignored=0.0)
    inputs = make_inputs(case, problem._replace(needs_grad=False, inplace_backward=False), yardstick, generator)
    findings.begin(case)
    whole = _run(subject, inputs, findings, with_gradient=False)
    judge(inputs, whole, findings)
    count = len(inputs.arena.logits)
    _record_rows(subject, inputs, whole, (1, 2, 7, 64, count // 2, count - 1), findings, recorded)


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


def _run(subject: _Subject, inputs: Inputs, findings: Findings, *, with_gradient: bool) -> Outcome:
    """Call the subject once; find out whether the results are what they should be in kind, and what it did to memory."""
    problem, case, arena = inputs.problem, inputs.case, inputs.arena
    labels, t = inputs.labels.clone(), inputs.temperature
    t = t.clone() if isinstance(t, Tensor) else t
    logits = arena.logits
    if with_gradient:
        model = torch.zeros((), device=logits.device, requires_grad=True)
        logits = _NotALeaf.apply(model, logits)  # type: ignore[no-untyped-call]  # torch's gap
    gradient = None
    version = logits._version
    try:
        with torch.set_grad_enabled(with_gradient):
            result = subject(logits, labels, t, problem)
        outcome = _typed(result, inputs, findings)
        if with_gradient:
            flows = outcome.log_probs.requires_grad
            findings.require("gradient_flows", flows, f"{case.name}: the log-probabilities do not require a gradient")
            flows = outcome.entropy is None or outcome.entropy.requires_grad
            findings.require("gradient_flows", flows, f"{case.name}: the entropy does not require a gradient")
            gradient = gradient_of(
                logits, outcome.log_probs, outcome.entropy, inputs.grad_log_probs, inputs.grad_entropy
            )
    except Stop:
        raise
    except (Exception, SystemExit) as error:  # whatever a backend raises is its verdict
        if nothing_can_serve_after(error):
            raise
        judge_memory(inputs, logits, version, labels, t, gradient, findings)
        findings.require("runs", False, f"{case.name}: {type(error).__name__}: {error}")
    findings.add("runs", True)
    judge_memory(inputs, logits, version, labels, t, gradient, findings)
    if gradient is not None:
        fits = gradient.shape == logits.shape
        findings.require("shape", fits, f"{case.name}: gradient {list(gradient.shape)}, expected {list(logits.shape)}")
        right = gradient.dtype == problem.dtype
        findings.add("dtype", right, f"{case.name}: gradient {short_name(gradient.dtype)}")
        gradient = gradient.clone() if problem.inplace_backward else gradient
        if arena.logits_changed():
            arena.restore()
    return replace(
        outcome,
        log_probs=outcome.log_probs.detach(),
        entropy=None if outcome.entropy is None else outcome.entropy.detach(),
        gradient=gradient,
    )


def _typed(result: Any, inputs: Inputs, findings: Findings) -> Outcome:
    problem, case = inputs.problem, inputs.case
    parts = tuple(result) if isinstance(result, tuple) else (result,)
    kinds = all(isinstance(part, Tensor) for part in parts) and len(parts) == (2 if problem.entropy else 1)
    findings.require("result_type", kinds, f"{case.name}: got {', '.join(type(part).__name__ for part in parts)}")
    expected = (inputs.labels.shape, inputs.labels.shape[:-1])
    for part, shape in zip(parts, expected, strict=False):
        fits = part.shape == shape
        findings.require("shape", fits, f"{case.name}: got {list(part.shape)}, expected {list(shape)}")
        right = part.dtype == problem.out_dtype
        findings.add(
            "dtype", right, f"{case.name}: got {short_name(part.dtype)}, expected {short_name(problem.out_dtype)}"
        )
    return Outcome(parts[0], parts[1] if problem.entropy else None)
