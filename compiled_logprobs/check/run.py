"""The check ("sign check"): whether a backend, or any function, keeps the contract on this device.

The truth is `compiled_logprobs.operation.reference`; the budget for an error is what plain torch itself makes of the
same input.
"""

import math
import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from contextlib import nullcontext, suppress
from dataclasses import replace
from threading import Thread
from typing import Any

import torch
from torch import Tensor

from compiled_logprobs.arguments import check_problem, checked_device, find_private
from compiled_logprobs.backends import backends
from compiled_logprobs.check.calls import call_once
from compiled_logprobs.check.cases import IGNORE_INDEX, Case, alike, cases, same_bits
from compiled_logprobs.check.causes import likely_causes
from compiled_logprobs.check.causes_from_hidden import causes_from_hidden
from compiled_logprobs.check.causes_of_values import VALUES
from compiled_logprobs.check.function import Function, NamedBackend, Returns, Subject
from compiled_logprobs.check.hidden_cases import cases_from_hidden
from compiled_logprobs.check.hidden_function import FAMILIAR_VOCAB, HiddenFunction, NamedHiddenBackend
from compiled_logprobs.check.hidden_run import HiddenSubject, can_embed, check_from_hidden, of_embedded_logits
from compiled_logprobs.check.inputs import CaseInputs, Returned
from compiled_logprobs.check.over_ranks import FunctionOverRanks
from compiled_logprobs.check.process_state import Recompiles, draws_random_numbers, modes, restore_modes
from compiled_logprobs.check.readings import LESS_EXACT
from compiled_logprobs.check.report import CheckReport, Notes, ProblemReport, Refused, Stop
from compiled_logprobs.check.verdicts import judge, plain_yardstick, wide_yardstick
from compiled_logprobs.check.ways import check_ways
from compiled_logprobs.errors import InputError, nothing_can_serve_after
from compiled_logprobs.machine.clock import free_memory
from compiled_logprobs.problem import RESULTS, Problem, bucket, layout_of, results_of, short_name

INVARIANCE_ELEMENTS = 2**24
"""Logits of the input with many rows, unless a quarter of the free memory holds less."""
BYTES_OF_MANY = 65
"""What it takes for each of these logits, the comparison with float64 included (measured with eager on a CPU)."""
LITTLE = 2.0
"""How many times its limit an error is that tells of rounding alone."""

NOTHING_ELSE: dict[str, Any] = dict.fromkeys(RESULTS, False)
"""Fields of a problem that asks for log-probabilities alone."""


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
    group: Any = None,
    from_hidden: bool = False,
    tell: Callable[[str], None] | None = None,
) -> CheckReport:
    """Hold a backend, or any function of logits and labels, or of hidden states, against the contract.

    Args:
        name_or_callable: a registered backend's name; or a function that takes logits [N, V], labels [N] int64 and
            whichever of the options of `log_probs_from_logits` but `backend` its signature names, and returns
            log-probabilities [N], with any `return_...=True` a tuple of them and what that asks for, each [N]. With
            `from_hidden` it takes hidden [N, H], weight [V, H], labels [N], and options of `log_probs_from_hidden`.
        problem: what to check it for; by default a few small problems in each dtype with what it supports.
        short: fewer inputs, for a check right before the first use.
        ignore_index: whether labels of -100 are among the inputs.
        device: where the inputs lie, e.g. "cuda:1"; by default where `problem` says, or the accelerator if there is
            one.
        seed: of the inputs; fresh at random by default.
        vocab: V of the default problems; by default one that is off every block size, and a few rows of those that
            models have.
        call: how to call a function that takes something else than (logits, labels), such as
            "f(labels, logits, temp=temperature)" or "f(logits[None], targets=labels[None], reduction='none')": one
            expression of these names: f, the function, which it has to call, logits, labels, and the options above,
            of which only those in it are tried. A batch dimension of 1 in the results is taken away.
        returns: what the function's numbers are: "log_prob", or "loss" for minus that.
        group: a process group of torch.distributed, all of whose ranks call this alike, with a function that takes the
            rank's columns of the logits, of which all have as many, and labels of the whole vocabulary. It is held to
            the numbers of the whole, on all ranks, and not asked for argmax, nor for a gradient in place.
        from_hidden: whether a function, or a backend of a name that both lists have, takes hidden states and the output
            layer's weight. A problem with a hidden size says so, too.
        tell: called with what is being checked, at each step.

    Returns:
        A `CheckReport`; `.passed`, and if not, `.reasons`, and in `.causes` what is probably wrong.

    Raises:
        InputError: the function cannot be called like this, `call` is no such expression, the problem or the device is
            wrong, or `vocab` comes with a problem.
        BackendUnavailable: the named backend is unknown, or cannot run the problem here.
    """
    # Not from torch's generator, whose numbers belong to the caller.
    seed = random.SystemRandom().randrange(2**31) if seed is None else seed
    if problem is not None:
        check_problem(problem)
    is_from_hidden = _is_from_hidden(name_or_callable, problem, from_hidden)
    subject = _subject(name_or_callable, call, returns, group, is_from_hidden)
    ranks = subject.group.size() if isinstance(subject, FunctionOverRanks) else 1
    if isinstance(subject, FunctionOverRanks):
        seed = int(subject.told(seed)[0])
    if vocab is not None and (vocab < 2 or problem is not None):
        raise InputError(
            f"got vocab={vocab}{f' beside {problem}' if problem else ''}; 2 or more is valid, without a problem."
        )
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    default = "cpu" if accelerator is None else accelerator.type
    elsewhere = problem is None and vocab is None and ranks == 1
    place = checked_device(device or (default if problem is None else problem.device_type))
    # By default, V is odd and off every block size; flash-attn needs three blocks for it.
    width = -(-(FAMILIAR_VOCAB if is_from_hidden else 32771) // ranks) | 1
    plain = Problem(place.type, rows=48, vocab=vocab or width * ranks, dtype=torch.float32, needs_grad=True)
    problems = subject.default_problems(plain) if problem is None else [subject.within(problem)]
    recompiles = Recompiles()

    def said(doing: str) -> None:
        recompiles.allow()
        if tell is not None:
            tell(doing)

    yardsticks: dict[Problem, dict[str, float]] = {}  # by what makes another one

    def examine(checked: Problem) -> tuple[Notes, ProblemReport, list[str]]:
        notes = Notes()
        with torch.cuda.device(place) if place.type == "cuda" else nullcontext():
            generator = torch.Generator(place).manual_seed(seed)
            if isinstance(subject, HiddenSubject):
                embedded = of_embedded_logits(checked, frozen=subject.frozen)
                chosen = _cases(subject, embedded, short, ignore_index, elsewhere)
                chosen = [case for case in chosen if can_embed(case, embedded)]
                _check(subject, embedded, chosen, notes, generator, short, said, yardsticks)
                own = cases_from_hidden(
                    checked,
                    short=short,
                    foreign=isinstance(subject, Function),
                    options=subject.options,
                    elsewhere=elsewhere,
                    ignore_index=ignore_index,
                )
                check_from_hidden(subject, checked, own, notes, generator, said)
            else:
                chosen = _cases(subject, checked, short, ignore_index, elsewhere)
                _check(subject, checked, chosen, notes, generator, short, said, yardsticks)
            result = notes.report(checked)
            if not all(check.passed for check in result.checks):
                said(f"{checked}: likely causes")
            return notes, result, _causes(subject, result, notes, place, seed, ignore_index)

    outcomes: Future[list[tuple[Notes, ProblemReport, list[str]]]] = Future()

    def examine_all() -> None:
        kept = modes(place)
        try:
            with recompiles:
                results = [examine(checked) for checked in problems]
        except BaseException as error:  # noqa: BLE001 - raised again where they are waited for
            restore_modes(kept, place)
            outcomes.set_exception(error)
        else:
            restore_modes(kept, place)  # as looking for causes may leave them
            outcomes.set_result(results)

    if torch.version.cuda is not None and not torch.cuda.is_available():
        # torch 2.11 keeps an object of the first thread that compiles so, and crashes once that thread has ended.
        find_private("torch._C._ensureCUDADeviceGuardSet", bool)()
    # As if nothing surrounded it: inference mode, hooks on saved tensors, autocast and a default device belong to a
    # thread. Anomaly mode does not, and would take the NaN that is among the inputs for a mistake. An interrupt does
    # not wait for the thread, whose function may hang.
    with torch.autograd.set_detect_anomaly(False):
        Thread(target=examine_all, daemon=True).start()
        all_notes, results, causes = zip(*outcomes.result(), strict=True)
    return CheckReport(
        subject.name,
        results,
        seed,
        min((same for notes in all_notes for same in notes.repeats), default=None),
        min((same for notes in all_notes for same in notes.rows_alone), default=None),
        _each_once(causes, problems),
        _each_once([result.refused for result in results], problems),
    )


def _is_from_hidden(given: str | Callable[..., Any], problem: Problem | None, said: bool) -> bool:
    """Whether it takes hidden states: as is said, as the problem says, or as there is no other backend of that name."""
    if problem is None:
        return said or (given in backends(from_hidden=True) and given not in backends())
    if said and problem.hidden is None:
        raise InputError(f"got from_hidden=True for {problem}, which has no hidden size; hidden=64 is valid in it.")
    return problem.hidden is not None


def _subject(
    given: str | Callable[..., Any], call: str | None, returns: Returns, group: Any, from_hidden: bool
) -> Subject:
    if from_hidden and group is not None:
        raise InputError("got hidden states and a group; either is valid: over ranks, functions of logits are checked.")
    if not isinstance(given, str):
        if group is not None:
            return FunctionOverRanks(given, group, call, returns)
        return HiddenFunction(given, call, returns) if from_hidden else Function(given, call, returns)
    if group is not None:
        raise InputError(
            f"got backend {given!r} with a group; a function is valid beside it. A backend computes one rank's columns "
            "and knows of no others: leave the group out, or pass a function that calls log_probs_from_logits with it."
        )
    if call is not None or returns != "log_prob":
        raise InputError(
            f"got backend {given!r} with call={call!r} and returns={returns!r}; these say how a function is called, "
            "which is known of a backend. Leave them out."
        )
    return NamedHiddenBackend(given) if from_hidden else NamedBackend(given)


def _causes(
    subject: Subject, result: ProblemReport, notes: Notes, device: torch.device, seed: int, ignore_index: bool
) -> list[str]:
    """What is probably wrong, if anything is."""
    failed = frozenset(check.name for check in result.checks if not check.passed)
    if isinstance(subject, FunctionOverRanks):  # all ranks look for causes, or none
        failed = frozenset().union(*subject.told(failed))
    if not failed:
        return []
    function = subject if isinstance(subject, Function) else subject.as_function(result.problem)
    causes: list[str] = []
    if isinstance(function, HiddenFunction):
        causes = causes_from_hidden(function, result.problem, failed, device, seed)
    causes = causes or likely_causes(function, result.problem, failed, device, seed, ignore_index)
    over = [check.figure / check.limit if check.figure and check.limit else math.inf for check in result.checks]
    over = [times for times, check in zip(over, result.checks, strict=True) if not check.passed]
    if not causes and failed & VALUES and max(over) < LITTLE:
        return [f"{LESS_EXACT}. Here it is {max(over):.2g} times the limit"]
    wrong_in = [case.case for case in result.cases if not all(check.passed for check in case.checks)]
    mistakes = [case.mistake for case in notes.cases if case.name in wrong_in]
    named = Counter(mistake for mistake in mistakes if mistake).most_common(2)
    is_one = bool(named) and (len(named) == 1 or named[0][1] > named[1][1])
    # An input of another kind may show the same mistake by chance, as a dominant logit does a label that is certain.
    if not causes and is_one and mistakes.count("") <= len(mistakes) / 2:
        return [named[0][0]]
    if not causes and len(wrong_in) < len(result.cases):
        more = f" and {len(wrong_in) - 4} more" if len(wrong_in) > 4 else ""
        if "normal" in wrong_in:
            what = "wrong for ordinary inputs, in a way that is not recognised. In all, wrong for these"
        else:
            what = "right for ordinary inputs, and wrong for these"
        causes = [f"{what}: {', '.join(wrong_in[:4])}{more}"]
    return causes


def _each_once(causes: Sequence[Sequence[str]], problems: list[Problem]) -> tuple[str, ...]:
    """Those of all problems, with the dtypes of the logits that one was seen with, unless these are all."""
    dtypes, words = [short_name(problem.dtype) for problem in problems], []
    for cause in dict.fromkeys(cause for of_problem in causes for cause in of_problem):
        seen = dict.fromkeys(dtype for dtype, of_problem in zip(dtypes, causes, strict=True) if cause in of_problem)
        words.append(cause if len(seen) == len(set(dtypes)) else f"with {' and '.join(seen)} logits: {cause}")
    return tuple(words)


def _cases(subject: Subject, problem: Problem, short: bool, ignore_index: bool, elsewhere: bool) -> list[Case]:
    foreign = isinstance(subject, Function)
    options = subject.options if isinstance(subject, Function) else ()
    chosen = cases(problem, short=short, foreign=foreign, options=options, elsewhere=elsewhere)
    if ignore_index:
        return chosen
    return [replace(case, ignored=0.0) for case in chosen if case.ignored < 1.0 and case.ignore_index == IGNORE_INDEX]


def _check(
    subject: Subject,
    problem: Problem,
    chosen: list[Case],
    notes: Notes,
    generator: torch.Generator,
    short: bool,
    tell: Callable[[str], None],
    yardsticks: dict[Problem, dict[str, float]],
) -> None:
    alike = problem._replace(temperature="none", inplace_backward=False, layout="flat", aligned=True)
    if alike not in yardsticks:
        yardsticks[alike] = plain_yardstick(problem, generator)
    yardstick = yardsticks[alike]
    what = f"{problem}{f' ({details})' if (details := problem.details()) else ''}"
    for case in chosen:
        tell(f"{what}: {case.name}")
        inputs = CaseInputs(case, problem, wide_yardstick() if case.is_gross else yardstick, generator)
        notes.begin(case)
        try:
            _check_case(subject, inputs, notes, generator, short)
        except Refused:
            continue
        except Stop:
            if case.rows or not isinstance(subject, Function):
                return  # what follows would only repeat it
    if isinstance(subject, FunctionOverRanks):
        return  # what follows asks what a rank's memory and threads allow, which may be other numbers of calls
    if not short:
        tell(f"{what}: ways of calling")
        check_ways(subject, problem, yardstick, notes, generator)
    tell(f"{what}: all rows and some")
    with suppress(Stop):
        # The truth of as many rows has been asked of a function already.
        judged = short or not isinstance(subject, Function)
        _check_many_rows(subject, problem, yardstick, notes, generator, judged)


def _check_case(subject: Subject, inputs: CaseInputs, notes: Notes, generator: torch.Generator, short: bool) -> None:
    needs_grad = inputs.problem.needs_grad
    first = call_once(subject, inputs, notes, with_gradient=False)
    judge(inputs, first, notes)
    kept = first.each(Tensor.clone)
    earlier = {"result": (first.log_probs, kept.log_probs)}
    if needs_grad:
        second = call_once(subject, inputs, notes, with_gradient=True)
        judge(inputs, second, notes)
        if second.gradient is not None:
            earlier["gradient"] = second.gradient, second.gradient.clone()
        same = all(map(same_bits, second.results, kept.results))
        notes.add("grad_mode_bits", same, "the bits differ")
    if inputs.case.name != "normal":
        return

    again = call_once(subject, inputs, notes, with_gradient=False)
    notes.repeats.append(same_bits(again.log_probs, kept.log_probs))
    # Other values in the same memory: a result remembered by address or by shape shows itself.
    inputs.arena.refill(generator)
    inputs.solve()
    other = call_once(subject, inputs, notes, with_gradient=needs_grad)
    judge(inputs, other, notes)
    for what, (tensor, copy) in earlier.items():
        notes.add("stale_result", same_bits(tensor, copy), f"a later call changed an earlier {what}")
    _check_rows_alone(subject, inputs, other, (1, 2), notes)
    if not short:
        draws = draws_random_numbers(
            lambda: call_once(subject, inputs, notes, with_gradient=needs_grad), generator.device
        )
        notes.add("random_state", not draws, "a call changed the state of a generator of torch, Python or NumPy")


def _check_many_rows(
    subject: Subject,
    problem: Problem,
    yardstick: dict[str, float],
    notes: Notes,
    generator: torch.Generator,
    judged: bool,
) -> None:
    """Compare few rows with as many as the bucket has, or as time and memory allow: kernels change with N."""
    free = free_memory(generator.device)
    most = INVARIANCE_ELEMENTS if free is None else min(INVARIANCE_ELEMENTS, free // (4 * BYTES_OF_MANY))
    rows = min(bucket(problem).rows, max(1, most // problem.vocab))
    case = Case(f"{rows} rows, all and some", rows, ignored=0.0)
    problem = problem._replace(needs_grad=False, inplace_backward=False)
    inputs = CaseInputs(case, problem, yardstick, generator, solved=judged)
    notes.begin(case)
    whole = call_once(subject, inputs, notes, with_gradient=False)
    if judged:
        judge(inputs, whole, notes)
    count = len(inputs.arena.logits)
    _check_rows_alone(subject, inputs, whole, (1, 2, 7, 64, count // 2, count - 1), notes)
    if subject.row_invariant and results_of(problem):
        inputs.problem = inputs.problem._replace(**NOTHING_ELSE)
        bare = call_once(subject, inputs, notes, with_gradient=False)
        same = same_bits(bare.log_probs, whole.log_probs)
        notes.add("row_invariance", same, "log-probabilities have other bits where nothing else is asked for")


def _check_rows_alone(
    subject: Subject, inputs: CaseInputs, whole: Returned, counts: Iterable[int], notes: Notes
) -> None:
    """Whether the first rows alone have the bits that they have among all, in `whole`."""
    logits, labels, t = inputs.arena.logits, inputs.labels, inputs.temperature
    whole = whole.each(Tensor.clone)
    for count in sorted({count for count in counts if 0 < count < len(logits)}):
        try:
            with torch.no_grad():
                part = subject(
                    logits[:count], labels[:count], t[:count] if isinstance(t, Tensor) else t, inputs.problem
                )
        except (Exception, SystemExit) as error:  # whatever a backend raises is its verdict
            if nothing_can_serve_after(error):
                raise
            notes.require("runs", False, f"{count} of the rows alone: {type(error).__name__}: {error}")
        parts: tuple[Tensor, ...] = (part,) if isinstance(part, Tensor) else tuple(part)
        same = all(map(same_bits, parts, [result[:count] for result in whole.results]))
        notes.rows_alone.append(same)
        if not same:
            gross = not alike(parts[0], whole.log_probs[:count])
            notes.add("log_prob_error", not gross, f"the first {count} of {len(logits)} rows alone give other numbers")
        # A single row of strided ones lies as if it were contiguous: another problem, and perhaps another kernel.
        if subject.row_invariant and layout_of(logits[:count]) == layout_of(logits):
            notes.add("row_invariance", same, f"the first {count} of {len(logits)} rows have other bits alone")
