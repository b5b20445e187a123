"""Which backend serves a call, and why: the steps, in order. `auto` walks them, `explain` prints the walk.

1. remembered  what this process chose for the same bucket of N before
2. stored      a decision for exactly this bucket: measured here, agreed between ranks, or kept in a store
3. small       fewer than 2^20 logits: the first backend of the list that is ready without compiling
4. near        the decision for the same problem at the nearest other N, however far
5. measure     time the backends, where that is allowed
6. related     the decision for the nearest kind of problem, where nothing could be measured
7. default     the first backend of the list that can run the problem and passes a short check

Each step returns a `Choice`, or the reason why it has none. A decision counts while the backend that it chose is
registered, can run the problem, and has the code that was measured. One that least regret settled, and not the rounds,
counts for its own bucket only. Where rows have to be invariant, `invariant` stands for steps 2 to 7.

What is nearest, for `near` and `related`, says `distance`. A backend that was checked for another kind of problem
passes the short check for that of the call, too, before it serves it.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch

from compiled_logprobs.backends import EAGER, backends_for, built_in_for, get_backend, is_built_in, why_not
from compiled_logprobs.check.run import INVARIANCE_ELEMENTS, check_backend
from compiled_logprobs.choose import memory
from compiled_logprobs.choose.distance import distance
from compiled_logprobs.choose.memory import GUESSES, Choice, Memory, family_of, key_of, kind_of
from compiled_logprobs.choose.staleness import changed, holds, why_not_holds
from compiled_logprobs.decision import Decision
from compiled_logprobs.errors import is_out_of_memory, warn
from compiled_logprobs.machine.clock import MIB, free_memory
from compiled_logprobs.machine.environment import fingerprint_of
from compiled_logprobs.policy import PROBLEMS_A_PROCESS, Policy, is_rank
from compiled_logprobs.problem import RESULTS, Problem, bucket, is_small
from compiled_logprobs.store import stores
from compiled_logprobs.store.files import Store

NO_ROOM_S = 60.0
"""How long eager serves where memory was too short for a check, until the check is tried again."""
LEAST_FREE = 2048 * MIB
"""Memory of an accelerator that has to be free, beside `COPIES` of the logits, for a call to measure."""
COPIES = 3


class Pending(NamedTuple):
    """What the next call does in order to choose, where a walk only looks."""

    reason: str
    decision: Decision | None = None
    stale: str | None = None
    unmeasured: str | None = None


class Context(NamedTuple):
    """What the steps go by."""

    problem: Problem
    policy: Policy
    device: torch.device
    environment: str
    """The fingerprint whose decisions count."""
    stores: Mapping[str, Store]
    """In the order in which they are asked."""
    memory: Memory
    tune: Callable[["Context", Decision | None], Choice | str] | None = None
    """Tunes the problem, given the decision that is stale; None: the walk only looks, and neither measures nor
    checks."""
    is_here: bool = True
    """Whether the environment is this process's: else its decisions are taken as they are."""


Step = Callable[[Context], Choice | Pending | str]


def context_of(
    problem: Problem,
    device: torch.device,
    policy: Policy,
    tune: Callable[[Context, Decision | None], Choice | str] | None = None,
) -> Context:
    """Of a call in this process."""
    return Context(problem, policy, device, fingerprint_of(device), stores(), memory.MEMORY, tune)


def walk(context: Context) -> Iterator[tuple[str, Choice | Pending | str]]:
    """The name and the outcome of each step, up to the first that is not a reason to go on."""
    unmeasured = None
    for name, step in steps(context.policy).items():
        outcome = step(context)
        if name == "measure" and isinstance(outcome, str):
            unmeasured = outcome
        elif unmeasured is not None and not isinstance(outcome, str):
            outcome = outcome._replace(unmeasured=unmeasured)
        yield name, outcome
        if not isinstance(outcome, str):
            return


def steps(policy: Policy) -> dict[str, Step]:
    """Those that `policy` allows, in order."""
    if policy.row_invariant:
        return {"remembered": remembered, "invariant": invariant}
    return {name: step for name, step in STEPS.items() if not policy.require_hit or name in HITS}


def remembered(context: Context) -> Choice | str:
    """What this process chose before."""
    choice = context.memory.choices.get(key_of(context.problem, context.policy))
    if choice is None or (choice.until is not None and choice.until <= time.monotonic()):
        return "this process has not chosen for it yet"
    is_guess = choice.source in GUESSES or (choice.source == "set aside" and choice.decision is None)
    if context.policy.require_hit and is_guess:
        return f"it was served by a guess ({choice.source}), and require_hit=True asks for a decision"
    return choice


def stored(context: Context) -> Choice | str:
    """A decision for exactly the bucket of the problem."""
    choice = _exact(context)
    if isinstance(choice, str) or choice.stale is None or why_not_measure(context) is not None:
        return choice
    return f"stale: {choice.stale}"


def small(context: Context) -> Choice | Pending | str:
    """The first of the built-in backends that is ready without compiling, which few logits would never pay for."""
    if not is_small(context.problem):
        return "it has 2^20 logits or more"
    if not context.is_here:
        return Pending(
            f"a call takes the first of {', '.join(built_in_for(context.problem))} that is ready without compiling"
        )
    ready = (
        Choice(name, "small") for name in _able(context) if get_backend(name, context.problem).is_warm(context.problem)
    )
    passing = (choice for choice in ready if is_checked(context, choice) is not False)
    return next(passing, Choice(EAGER, "small"))


def near(context: Context) -> Choice | str:
    """The decision for the same problem at another N: it serves at once, since a first call is not to wait for more."""
    top = bucket(context.problem)
    others = [other for other in nearest(context) if other._replace(rows=top.rows) == top]
    for choice in _choices_for(context, others):
        # What is stale is measured rather than guessed from.
        if choice.stale is None or why_not_measure(context) is not None:
            return choice._replace(source="near")
    return "no profile decides the same problem at another N"


def measure(context: Context) -> Choice | Pending | str:
    """Time the backends now."""
    reason = why_not_measure(context)
    if reason is not None:
        return reason
    standing = _exact(context)
    decision, stale = (None, None) if isinstance(standing, str) else (standing.decision, standing.stale)
    if context.tune is not None:
        return context.tune(context, decision)
    again = "" if decision is None else " again, since what is stored of it is stale"
    return Pending(f"the next call measures it{again}, within its budget", decision, stale)


def related(context: Context) -> Choice | str:
    """The decision for the nearest kind of problem; a stale one of this very kind before."""
    exact = _exact(context)
    if not isinstance(exact, str):
        return exact
    choices = (choice._replace(source="related") for choice in _choices_for(context, nearest(context)))
    return _first_that_passes(context, choices) or "no profile decides a problem like it"


def default(context: Context) -> Choice | Pending | str:
    """The first of the built-in backends that can run the problem and passes a short check."""
    if context.tune is None:
        return Pending(
            f"the next call takes the first of {', '.join(built_in_for(context.problem))} that can run it and passes a "
            "short check"
        )
    choice = _first_that_passes(context, (Choice(name, "default rule") for name in _able(context)))
    return choice or Choice(EAGER, "default rule")


def invariant(context: Context) -> Choice | Pending | str:
    """The first backend that declares invariant rows and passes the check of them; it serves all calls of a kind.

    It is chosen by what is hardest to run of that kind, and by nothing that is stored: so neither the call that comes
    first nor what was measured decides it, and all ranks choose the same.
    """
    everything: dict[str, Any] = dict.fromkeys(RESULTS, True)
    hardest = kind_of(context.problem)._replace(
        rows=max(1, INVARIANCE_ELEMENTS // context.problem.vocab),
        needs_grad=True,
        temperature="per_token",
        **everything,
    )
    failed = {name for name, other in list(context.memory.set_aside) if kind_of(other) == kind_of(hardest)}
    for name in backends_for(hardest):
        if name in failed or why_not(name, hardest) is not None or not get_backend(name, hardest).row_invariant:
            continue
        if context.tune is None:
            return Pending(f"the next call checks {name}, which declares invariant rows, and takes it if it passes")
        if _passes(context, name, hardest):
            return Choice(name, "row invariant")
    return "no backend that can run it declares rows whose bits do not depend on N, and passes the check of them"


STEPS: dict[str, Step] = {step.__name__: step for step in (remembered, stored, small, near, measure, related, default)}
HITS = ("remembered", "stored", "small")
"""The steps that `require_hit` allows."""


def nearest(context: Context) -> list[Problem]:
    """The others with a decision that says something of the problem, by `distance`; no file is opened."""
    if context.policy.mode == "off":
        return []
    top = bucket(context.problem)
    others = {other for store in context.stores.values() for other in store.alike(context.environment, top)}
    alike = [other for other in others | set(context.memory.decided) if family_of(other) == family_of(top)]
    return sorted((other for other in alike if other != top), key=lambda other: distance(top, other))


def is_checked(context: Context, choice: Choice) -> bool | None:
    """Whether the backend of `choice` has passed the check for this kind of problem, at any N; None: it was not asked.

    Eager is not asked, and neither is another machine's.
    """
    decision, problem = choice.decision, context.problem
    if choice.backend == EAGER or not context.is_here:
        return True
    if decision is not None and decision.problem._replace(rows=problem.rows) == problem:
        return True
    tried = context.memory.undecided_of(problem)
    if tried is not None and choice.backend in tried.headway.passed:
        return True
    return context.memory.checks.get((choice.backend, problem._replace(rows=0), False))


def describe(problem: Problem) -> str:
    """With its options in words."""
    return f"{problem} ({details})" if (details := problem.details()) else str(problem)


def why_not_measure(context: Context) -> str | None:
    """Why the first call of the problem does not measure by itself; None if it does."""
    problem, device, policy = context.problem, context.device, context.policy
    if policy.mode != "tune":
        return f"the mode is {policy.mode!r}"
    if policy.require_hit:
        return "require_hit=True forbids it"
    if is_small(problem):
        return "it has fewer than 2^20 logits"
    if not _others_can_run(problem):
        return "only eager can run it"
    if device.type not in ("cpu", "cuda"):
        return f"nothing is measured on {device.type}"
    if context.memory.is_forked:
        return "this process is a forked child of another"
    if is_rank():
        return "this process is one of several ranks; call tune(..., group=...) on all of them"
    if device.type != "cpu":
        needed = COPIES * _elements(problem) * problem.dtype.itemsize + LEAST_FREE
        free = free_memory(device) or 0
        if free < needed:
            return f"{free / 2**30:.1f} GiB of the device's memory are free, and {needed / 2**30:.1f} GiB are needed"
    if budget_left(context) <= 0:
        return f"the process has used up its {PROBLEMS_A_PROCESS * policy.budget_s:g} s for measuring"
    if is_settled(context):
        return "it has been measured already, without a choice that may serve now"
    if (tried := context.memory.undecided_of(problem)) is not None:
        return tried.why
    return None


def _elements(problem: Problem) -> int:
    """Of the logits; from hidden states of the weight, since fewer logits are timed where memory is short."""
    return (problem.rows if problem.hidden is None else problem.hidden) * problem.vocab


def budget_left(context: Context) -> float:
    """Seconds that calls of this process may still have spent on measuring when another one begins to."""
    return PROBLEMS_A_PROCESS * context.policy.budget_s - context.memory.spent_s


def is_settled(context: Context) -> bool:
    """Whether a decision for the bucket still holds, though its choice may not serve at present."""
    decisions = (choice.decision for choice in choices_of(context, bucket(context.problem)))
    return any(decision and holds(decision, decision.chosen) and not changed(decision) for decision in decisions)


def choices_of(context: Context, top: Problem) -> Iterator[Choice]:
    """The choices for exactly `top`, whether or not they can be used; those of ranks may have no decision."""
    if context.policy.mode == "off":
        return
    if (choice := context.memory.decided.get(top)) is not None:
        yield choice
    for source, store in context.stores.items():
        if (decision := store.read(context.environment, top)) is not None:
            yield Choice(decision.chosen, source, decision)


def _exact(context: Context) -> Choice | str:
    """The first decision for the bucket that can be used, be it stale."""
    if context.policy.mode == "off":
        return "the mode is 'off'"
    reasons = []
    for choice in choices_of(context, bucket(context.problem)):
        outcome = _usable(context, choice)
        if isinstance(outcome, Choice):
            return outcome
        reasons.append(outcome)
    return "; ".join(reasons) or "no profile decides it"


def _choices_for(context: Context, others: Iterable[Problem]) -> Iterator[Choice]:
    """What the decisions for `others` choose, as far as they decide and can be used for this problem."""
    for other in others:
        for choice in choices_of(context, other):
            outcome = _usable(context, choice)
            if isinstance(outcome, str) or outcome.decision is None or not outcome.decision.is_decided:
                continue
            if not context.is_here or why_not(outcome.backend, context.problem) is None:
                yield outcome


def _usable(context: Context, choice: Choice) -> Choice | str:
    """`choice`, which has a decision, as it holds now; else why it does not."""
    decision, name = choice.decision, choice.backend
    if decision is None:
        return choice
    if not context.is_here:
        return choice
    is_set_aside = any((name, top) in context.memory.set_aside for top in (decision.problem, bucket(context.problem)))
    if is_set_aside:
        reason: str | None = f"backend {name!r}, which it chose, failed in this process and is set aside"
    else:
        reason = why_not_holds(decision, name)
    if reason is None:
        return choice._replace(stale=next(iter(changed(decision).values()), None))
    if choice.source == "ranks":  # what each rank would find beside it may differ
        return choice._replace(backend=EAGER)
    is_registered = name in backends_for(decision.problem)
    cannot_run = not is_registered or why_not(name, decision.problem) is not None
    if cannot_run and not is_set_aside and name not in context.memory.warned:
        context.memory.warned.add(name)
        remedy = "Mend that" if is_registered else "Register it with register_backend"
        warn(
            f"a decision of the {choice.source} is passed over: {reason}. Another backend serves. {remedy}, or delete "
            f"the decision for {decision.problem}."
        )
    return f"{choice.source}: {reason}"


def _able(context: Context) -> Iterator[str]:
    """The built-in backends that can run the problem, without those that failed on such."""
    failed = context.memory.failures(context.problem)
    names = built_in_for(context.problem)
    return (name for name in names if name not in failed and why_not(name, context.problem) is None)


def _others_can_run(problem: Problem) -> bool:
    """Whether another backend than eager may; those of third parties are not imported to find out."""
    others = (name for name in backends_for(problem) if name != EAGER)
    return any(not is_built_in(name) or why_not(name, bucket(problem)) is None for name in others)


def _first_that_passes(context: Context, choices: Iterable[Choice]) -> Choice | None:
    """The first whose backend passes the short check, which a walk that only looks leaves open; eager for a while where
    memory is too short for the check, or where what is not ready is compiled and checked in the background."""
    tried = context.memory.undecided_of(context.problem)
    for choice in choices:
        passes = is_checked(context, choice)
        if passes is None and context.tune is not None:
            if tried is not None and tried.is_getting_ready():
                return Choice(EAGER, "default rule", until=time.monotonic() + memory.READY_S)
            try:
                passes = _passes(context, choice.backend, context.problem)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                return Choice(EAGER, "default rule", until=time.monotonic() + NO_ROOM_S)
        if passes is not False:
            return choice
    return None


def _passes(context: Context, name: str, problem: Problem) -> bool:
    """Whether the backend called `name` passes the short check; asked once for all N, of which `problem` is the first.

    Where rows have to be invariant it is asked by itself: then it comes with the most rows that the check compares.
    """
    key = name, problem._replace(rows=0), context.policy.row_invariant
    if key not in context.memory.checks:
        report = check_backend(name, problem, short=True, device=str(context.device))
        context.memory.checks[key] = report.passed
    return context.memory.checks[key]
