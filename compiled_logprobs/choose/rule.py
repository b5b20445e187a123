"""Which backend serves a call, and why: the steps, in order. `auto` walks them, `explain` prints the walk.

1. remembered  what this process chose for the same bucket of N before
2. stored      a decision for exactly this bucket: measured here, agreed between ranks, or kept in a store
3. small       fewer than 2^20 logits, where a launch costs more than the work: eager
4. near        a decision for the same problem at an N within 4x
5. measure     time the backends, where that is allowed
6. related     a decision for the same problem at any N, where nothing may be measured
7. default     the first backend of the list that can run the problem and passes a short check

Each step returns a `Choice`, or the reason why it has none. A decision counts only while the backend that it chose is
registered, can run the problem, and has the code that was measured. Where rows have to be invariant, `invariant` stands
for steps 2 to 7.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime, timedelta, timezone
from typing import NamedTuple

import torch

from compiled_logprobs.backends import BUILT_IN, EAGER, backends, code_of, get_backend, is_loaded, target_of, why_not
from compiled_logprobs.backends.base import Backend
from compiled_logprobs.check.run import INVARIANCE_ELEMENTS, check_backend
from compiled_logprobs.choose import memory
from compiled_logprobs.choose.memory import GUESSES, Choice, Memory, key_of, kind_of
from compiled_logprobs.decision import TIME, Decision
from compiled_logprobs.errors import BackendUnavailable, LogProbsError, ProfileError, is_out_of_memory, warn
from compiled_logprobs.machine.clock import MIB, free_memory
from compiled_logprobs.machine.environment import fingerprint_of
from compiled_logprobs.policy import PROBLEMS_A_PROCESS, Policy, is_rank
from compiled_logprobs.problem import Problem, bucket, is_small, nearest_first
from compiled_logprobs.store import stores
from compiled_logprobs.store.files import Store

NEAR = 4
"""The ratio of two N up to which a decision for one says enough of the other."""
TRANSIENT = ("failed", "oom", "timeout", "crashed")
"""Outcomes that may have had a cause outside of the candidate, such as a full disk."""
TRANSIENT_FOR = timedelta(days=1)
"""How long they count."""
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


def small(context: Context) -> Choice | str:
    """Eager, for few logits."""
    return Choice(EAGER, "small") if is_small(context.problem) else "it has 2^20 logits or more"


def near(context: Context) -> Choice | str:
    """A decision for an N within `NEAR`."""
    return _at_other_rows(context, NEAR, "near") or f"no profile decides an N within {NEAR}x of it"


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
    """A decision for any N, the nearest first; a stale one of this very N before."""
    exact = _exact(context)
    if not isinstance(exact, str):
        return exact
    return _at_other_rows(context, math.inf, "related") or "no profile decides another N of it"


def default(context: Context) -> Choice | Pending | str:
    """The first of the built-in backends that can run the problem and passes a short check."""
    if context.tune is None:
        return Pending(
            f"the next call takes the first of {', '.join(BUILT_IN)} that can run it and passes a short check"
        )
    top = bucket(context.problem)
    for name in BUILT_IN:
        if name == EAGER or (name, top) in context.memory.set_aside or why_not(name, context.problem) is not None:
            continue
        try:
            if _passes(context, name, context.problem):
                return Choice(name, "default rule")
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return Choice(EAGER, "default rule", until=time.monotonic() + NO_ROOM_S)
    return Choice(EAGER, "default rule")


def invariant(context: Context) -> Choice | Pending | str:
    """The first backend that declares invariant rows and passes the check of them; it serves all calls of a kind.

    It is chosen by what is hardest to run of that kind, and by nothing that is stored: so neither the call that comes
    first nor what was measured decides it, and all ranks choose the same.
    """
    hardest = kind_of(context.problem)._replace(
        rows=max(1, INVARIANCE_ELEMENTS // context.problem.vocab),
        needs_grad=True,
        entropy=True,
        temperature="per_token",
    )
    failed = {name for name, other in list(context.memory.set_aside) if kind_of(other) == kind_of(hardest)}
    for name in backends():
        if name in failed or why_not(name, hardest) is not None or not get_backend(name).row_invariant:
            continue
        if context.tune is None:
            return Pending(f"the next call checks {name}, which declares invariant rows, and takes it if it passes")
        if _passes(context, name, hardest):
            return Choice(name, "row invariant")
    return "no backend that can run it declares rows whose bits do not depend on N, and passes the check of them"


STEPS: dict[str, Step] = {step.__name__: step for step in (remembered, stored, small, near, measure, related, default)}
HITS = ("remembered", "stored", "small")
"""The steps that `require_hit` allows."""


def refusal(context: Context) -> LogProbsError:
    """What the call raises where no step has a choice."""
    problem, policy = context.problem, context.policy
    if policy.row_invariant:
        return BackendUnavailable(
            f"got {describe(problem)} with row_invariant=True, and no backend that can run such calls declares rows "
            "whose bits do not depend on N and passes the check of them. Set row_invariant=False, or keep N the same."
        )
    if policy.mode == "off":
        return ProfileError(
            "the mode is 'off', in which no profile is looked at, and require_hit=True asks for one. "
            "Set the mode to 'lookup' or 'tune', or set require_hit=False."
        )
    return ProfileError(
        f"no profile decides {describe(bucket(problem))}, and require_hit=True forbids to measure or guess. "
        "Run `compiled-logprobs profile` or tune(...) for it on this machine, or set require_hit=False."
    )


def describe(problem: Problem) -> str:
    """With its options in words."""
    details = problem.details()
    return f"{problem}{f' ({details})' if details else ''}"


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
        needed = COPIES * problem.rows * problem.vocab * problem.dtype.itemsize + LEAST_FREE
        free = free_memory(device) or 0
        if free < needed:
            return f"{free / 2**30:.1f} GiB of the device's memory are free, and {needed / 2**30:.1f} GiB are needed"
    if budget_left(context) <= 0:
        return f"the process has used up its {PROBLEMS_A_PROCESS * policy.budget_s:g} s for measuring"
    if is_settled(context):
        return "it has been measured already, and what was chosen may not serve now"
    return None


def budget_left(context: Context) -> float:
    """Seconds that calls of this process may still spend on measuring."""
    return PROBLEMS_A_PROCESS * context.policy.budget_s - context.memory.spent_s


def is_settled(context: Context) -> bool:
    """Whether a decision for the bucket still holds, though its choice may not serve at present."""
    decisions = (choice.decision for choice in _decisions(context, bucket(context.problem)))
    return any(decision and holds(decision, decision.chosen) and not changed(decision) for decision in decisions)


def holds(decision: Decision, backend: str) -> bool:
    """Whether `backend` is what was measured, and can run here."""
    return why_not_holds(decision, backend) is None


def why_not_holds(decision: Decision, name: str) -> str | None:
    """Why `backend` is not what was measured, or cannot run here; None if it is and can."""
    if name not in backends():
        return f"it chose backend {name!r:.80}, which is not registered here"
    if code_of(name) != decision.candidates[name].fingerprint:
        return f"backend {name!r} has changed since it was measured"
    reason = why_not(name, decision.problem)
    return None if reason is None else f"backend {name!r} cannot run here: {reason}"


def changed(decision: Decision) -> dict[str, str]:
    """How today's candidates differ from those that were measured, by name. None is imported to find out."""
    reasons = {name: _how_it_changed(decision, name) for name in backends() if name not in decision.left_out}
    return {name: f"backend {name!r} {reason}" for name, reason in reasons.items() if reason is not None}


def _decisions(context: Context, top: Problem) -> Iterator[Choice]:
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
    for choice in _decisions(context, bucket(context.problem)):
        outcome = _usable(context, choice)
        if isinstance(outcome, Choice):
            return outcome
        reasons.append(outcome)
    return "; ".join(reasons) or "no profile decides it"


def _at_other_rows(context: Context, within: float, source: str) -> Choice | None:
    """The decision for the nearest N, of a ratio of `within` at most."""
    top = bucket(context.problem)
    if context.policy.mode == "off":
        return None
    others = {other for store in context.stores.values() for other in store.near(context.environment, top)}
    for other in nearest_first(top, others | set(context.memory.decided)):
        if max(other.rows, top.rows) > within * min(other.rows, top.rows):
            break
        for choice in _decisions(context, other):
            outcome = _usable(context, choice)
            # What is stale is measured rather than guessed from.
            if isinstance(outcome, Choice) and (outcome.stale is None or why_not_measure(context) is not None):
                return outcome._replace(source=source)
    return None


def _usable(context: Context, choice: Choice) -> Choice | str:
    """`choice`, which has a decision, as it holds now; else why it does not."""
    decision, name = choice.decision, choice.backend
    if decision is None or not context.is_here:
        return choice
    if {(name, decision.problem), (name, bucket(context.problem))} & context.memory.set_aside.keys():
        reason: str | None = f"backend {name!r}, which it chose, failed in this process and is set aside"
    else:
        reason = why_not_holds(decision, name)
    if reason is None:
        return choice._replace(stale=next(iter(changed(decision).values()), None))
    if choice.source == "ranks":  # what each rank would find beside it may differ
        return choice._replace(backend=EAGER)
    if name not in backends() and name not in context.memory.warned:
        context.memory.warned.add(name)
        warn(
            f"a decision of the {choice.source} is passed over: {reason}. Register it with register_backend, or delete "
            f"the decision for {decision.problem}."
        )
    return f"{choice.source}: {reason}"


def _how_it_changed(decision: Decision, name: str) -> str | None:
    if name not in decision.candidates:
        return "was registered after this was measured"
    candidate = decision.candidates[name]
    a_day_ago = (datetime.now(timezone.utc) - TRANSIENT_FOR).strftime(TIME)
    if candidate.outcome in TRANSIENT and (candidate.measured_at or decision.measured_at) < a_day_ago:
        return f"{candidate.outcome} when this was measured, which may have had a cause that is gone"
    if name not in BUILT_IN and not is_loaded(name):
        return None
    if candidate.outcome in ("unavailable", "unsupported"):
        target = target_of(name)
        is_local = isinstance(target, Backend) or target.startswith("__main__:")  # so that no worker can import it
        can_now = not is_local and why_not(name, decision.problem) is None
        return "could not run this when it was measured, and can now" if can_now else None
    return "has changed since this was measured" if code_of(name) != candidate.fingerprint else None


def _others_can_run(problem: Problem) -> bool:
    """Whether another backend than eager may; those of third parties are not imported to find out."""
    return any(name not in BUILT_IN or why_not(name, problem) is None for name in backends() if name != EAGER)


def _passes(context: Context, name: str, problem: Problem) -> bool:
    """Whether the backend called `name` passes the short check; asked once for all N, of which `problem` is the first.

    Where rows have to be invariant it is asked by itself: then it comes with the most rows that the check compares.
    """
    key = name, problem._replace(rows=0), context.policy.row_invariant
    if key not in context.memory.checks:
        report = check_backend(name, problem, short=True, device=str(context.device))
        context.memory.checks[key] = report.passed
    return context.memory.checks[key]
