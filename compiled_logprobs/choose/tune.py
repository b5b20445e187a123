"""Measure which backend is fastest: on demand, or at the first call of a problem. Of a stale decision, what changed."""

import dataclasses
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch

from compiled_logprobs.backends import EAGER, backends_for, get_backend, is_built_in
from compiled_logprobs.choose import memory
from compiled_logprobs.choose.memory import Choice, Undecided
from compiled_logprobs.choose.rule import Context, context_of, describe, is_settled, stored, walk
from compiled_logprobs.choose.staleness import changed, holds
from compiled_logprobs.decision import Decision, Evidence
from compiled_logprobs.errors import ProfileError, nothing_can_serve_after, say, warn
from compiled_logprobs.machine.environment import environment_at, fingerprint_of
from compiled_logprobs.policy import BUDGET_VARIABLE, checked_budget, is_rank, policy
from compiled_logprobs.problem import Problem, bucket, of_logits
from compiled_logprobs.store import user_store
from compiled_logprobs.store.files import Store
from compiled_logprobs.tuning.headway import Headway, headway_of
from compiled_logprobs.tuning.process import Event, WorkerLost
from compiled_logprobs.tuning.tally import GET_READY_S
from compiled_logprobs.tuning.tuner import Tuner, TuningFailed, alone_on, compile_apart

WAIT_S = 600.0
"""How long measuring on demand waits for another process that measures on the same device."""
LONGER = 3.0
"""Times as long as it took before, a problem that was left undecided may take when it is measured again."""
LONGEST_S = 600.0
"""What that comes to at most, unless more is asked for."""


# On demand


def tune_all(
    problems: Sequence[Problem],
    device: torch.device,
    *,
    store: Store | None = None,
    names: Sequence[str] | None = None,
    budget_s: float | None = None,
    again: bool = False,
    must_store: bool = True,
    on_event: Callable[[Event], None] = lambda event: None,
) -> Iterator[Decision | TuningFailed]:
    """Decide each bucket of `problems`, and store it: no question of mode, ranks or the process's budget.

    Args:
        problems: those of the same bucket are decided once.
        device: where.
        store: where to; by default the user's.
        names: of the backends to measure beside eager.
        budget_s: seconds for the rounds of each problem, after its candidates were compiled and checked; by default
            what the policy says. Fewer rows are timed where the rounds would take longer. One that was left undecided
            gets three times what it took then, up to 600 s, if that is more.
        again: measure what that store holds already, too. Else a decision there is kept, unless it is undecided, had a
            short check, lacks one of `names`, or something has changed since.
        must_store: whether to measure nothing where it cannot be stored; else a warning says that it was not.
        on_event: told what happens.

    Yields:
        For each bucket the decision, or why there is none, as soon as it is known.

    Raises:
        ProfileError: there is something to measure, and it could not be stored, as `must_store` asks.
    """
    store = user_store() if store is None else store
    seconds = policy().budget_s if budget_s is None else checked_budget(budget_s, "budget_s")

    def look_up() -> Decision | None:
        return None if again else current(store, problem, device, asked)

    with Tuner(device, on_event=on_event) as tuner:
        for problem in dict.fromkeys(map(bucket, problems)):
            asked = backends_for(problem) if names is None else [EAGER, *names]
            result: Decision | TuningFailed | None = look_up()
            standing = store.read(fingerprint_of(device), problem)
            limit = seconds if standing is None else limit_again(standing, seconds)
            undecided = standing is not None and not standing.is_decided
            known = result is not None
            on_event(
                {"event": "problem", "problem": problem, "known": known, "budget_s": limit, "undecided": undecided}
            )
            if result is None:
                if must_store:
                    store.require_writable()
                with alone_on(device, WAIT_S) as is_alone:
                    if is_alone:  # while this waited, another process may have decided it
                        result = look_up() or _decide_and_store(tuner, problem, asked, limit, store, device, again)
                    else:
                        reason = f"another process has been measuring on {device} for {WAIT_S:g} s; wait for its end"
                        result = TuningFailed(reason)
            memory.MEMORY.forget(problem)  # this process may have chosen something else before
            yield result


def tune(
    problems: Sequence[Problem], device: torch.device, *, budget_s: float | None = None, again: bool = False
) -> list[Decision]:
    """All that `tune_all` yields; raises the first failure, when what came before is stored."""
    decisions = []
    for result in tune_all(problems, device, budget_s=budget_s, again=again, must_store=False):
        if isinstance(result, TuningFailed):
            raise result
        decisions.append(result)
    return decisions


def current(store: Store, problem: Problem, device: torch.device, asked: Collection[str]) -> Decision | None:
    """What `store` holds of `problem`, unless it is undecided or less than what is asked for, or something has changed
    since."""
    decision = store.read(fingerprint_of(device), problem)
    if (
        decision is None
        or not decision.is_decided
        or decision.short_check
        or not decision.candidates.keys() >= set(asked)
    ):
        return None
    return decision if holds(decision, decision.chosen) and not changed(decision) else None


def limit_again(standing: Decision, seconds: float) -> float:
    """Seconds to measure again for, where `seconds` are asked for: more if they could not decide it before."""
    return seconds if standing.is_decided else max(seconds, min(LONGER * standing.tuning_seconds, LONGEST_S))


def _decide_and_store(
    tuner: Tuner,
    problem: Problem,
    asked: Collection[str],
    seconds: float,
    store: Store,
    device: torch.device,
    again: bool,
) -> Decision | TuningFailed:
    """Before the next one that waits for the device looks there."""
    standing = store.read(fingerprint_of(device), problem)
    if standing is not None:  # it is not to end up with fewer candidates than it had
        asked = {*asked, *standing.candidates}
    try:
        headway = headway_of(fingerprint_of(device), problem)
        decision, evidence = decide(
            tuner, problem, seconds, standing=standing, names=asked, again=again, headway=headway
        )
    except TuningFailed as error:
        return error
    memory.MEMORY.hold(problem, Choice(decision.chosen, "tuned here", decision))
    publish(store, decision, evidence, device)
    return decision


def publish(store: Store, decision: Decision, evidence: Evidence, device: torch.device) -> None:
    """Store `decision` with its evidence; a warning says if that fails."""
    environment = environment_at(device)
    carried = [name for name, candidate in decision.candidates.items() if candidate.measured_at is not None]
    try:
        before = store.read(environment.fingerprint(), decision.problem) if carried else None
        if before and (earlier := store.evidence(environment.fingerprint(), before)):
            evidence = evidence.with_cases_of(earlier, carried)
        store.publish(environment, decision, evidence)
    except ProfileError as error:
        warn(f"{error}\nWhat was measured holds in this process only.")


# By the first call of a problem


def tune_in_call(context: Context, standing: Decision | None) -> Choice | str:
    """Decide the problem of a call, for which the process has budget left; `standing` is stale. Where it fails, why.

    The first process that comes to such a problem would wait for the compiler most of all. There the budget is for all
    of it. What is not decided in that time is left to the next process, which goes on where this one ends.
    """
    began, seconds = time.monotonic(), context.policy.budget_s
    problem, device, known = context.problem, context.device, context.memory
    headway, thread = headway_of(context.environment, problem), None
    in_all, seconds = headway.is_first, headway.budget(seconds)
    limit = f"at most {GET_READY_S:.0f} s to compile and check them, then {seconds:g} s to time them"
    if in_all:
        limit = f"{seconds:g} s to compile, check and time them, the first time on this machine"
    say(
        f"measuring which backend is fastest for {describe(bucket(problem))}: {limit} "
        "(COMPILED_LOGPROBS_MODE=lookup prevents it)"
    )
    try:
        with alone_on(device, seconds) as is_alone:
            if is_settled(context):  # while this waited, another process has decided it
                return _as_stored(context)
            if not is_alone:
                raise TuningFailed("another process was measuring on this device all the time")
            headway.read()  # who had the lock may have been at the same kind of problem
            with Tuner(device, short=True) as tuner:
                left = max(0.0, began + seconds - time.monotonic()) if in_all else seconds
                try:
                    decision, evidence = decide(
                        tuner, problem, left, standing=standing, strict=True, in_all=in_all, headway=headway
                    )
                finally:
                    thread = tuner.getting_ready
            known.hold(decision.problem, Choice(decision.chosen, "tuned here", decision))
            if decision.settled or not in_all:  # else the next process measures, for longer
                publish(user_store(), decision, evidence, device)  # before the next one that waits looks there
    except (TuningFailed, OSError, RuntimeError) as error:  # the last two: no room for another process or thread
        if nothing_can_serve_after(error):
            raise
        until = time.monotonic() + in_all * memory.READY_S
        tried = Undecided(f"measuring came to no decision: {error}", headway, thread, until)
        known.undecided[bucket(problem)] = tried
        first = ", at first by what is ready, while the rest is compiled in the background" if thread else ""
        again = "" if headway.path is None else "The next process goes on with it; "
        say(
            f"not decided: {error}. The default rule serves it in this process{first}. {again}"
            f"`compiled-logprobs profile` or a larger {BUDGET_VARIABLE} gives it more time"
        )
        return tried.why
    finally:
        known.spent_s += time.monotonic() - began
    more = "" if decision.is_decided else "; `compiled-logprobs profile` gives it more time"
    say(f"{decision.chosen} serves it: {decision.reason}{more}")
    return _as_stored(context)


def meanwhile(context: Context, choice: Choice) -> Choice:
    """`choice`; for a while another one, where a decision chose what no process has compiled for such a problem yet.

    No call is to wait for that, on a CPU: it is compiled in the background. An accelerator's memory is the caller's. A
    walk that only looks starts nothing.
    """
    problem, device, name = context.problem, context.device, choice.backend
    may_start = context.policy.mode == "tune" and not (context.policy.require_hit or context.memory.is_forked)
    if choice.decision is None or not is_built_in(name) or not may_start or is_rank():
        return choice
    backend, key = get_backend(name, problem), (name, problem._replace(rows=0))
    if backend.is_warm(problem):
        return choice
    thread = context.memory.compiling.get(key)
    if thread is None:
        headway = headway_of(context.environment, problem, begins=False)
        if context.tune is None or headway.has_compiled(name):
            return choice
        if device.type != "cpu":
            say(f"{name}, which serves {describe(problem)}, is compiled in this call, the first time on this machine")
            headway.note_compiled(name, backend.fingerprint())
            return choice
        try:
            thread = context.memory.compiling[key] = compile_apart(problem, name, device, headway)
        except (WorkerLost, OSError, RuntimeError):  # no room for another process or thread
            return choice
        say(
            f"{name}, which serves {describe(problem)}, is compiled in the background, and another one serves meanwhile"
        )
    if not thread.is_alive():
        return choice
    times = {other: each.seconds for other, each in choice.decision.candidates.items() if each.seconds is not None}
    passed = (other for other in sorted(times, key=times.__getitem__) if holds(choice.decision, other))
    ready = (other for other in passed if get_backend(other, problem).is_warm(problem))
    return Choice(next(ready, EAGER), "meanwhile", choice.decision, until=time.monotonic() + memory.READY_S)


def _as_stored(context: Context) -> Choice | str:
    return stored(context._replace(policy=context.policy._replace(mode="lookup")))  # be it stale again


# Only what has changed


def decide(
    tuner: Tuner,
    problem: Problem,
    seconds: float,
    *,
    standing: Decision | None,
    names: Collection[str] | None = None,
    again: bool = False,
    strict: bool = False,
    in_all: bool = False,
    headway: Headway | None = None,
) -> tuple[Decision, Evidence]:
    """What `tuner` decides, given the decision that stands: only what has changed is measured, beside incumbent and
    baseline.

    If nothing that changed beats the incumbent, and that still beats the baseline, what was slower then is slower now.
    Otherwise all candidates are measured.

    Args:
        tuner, problem, seconds, names, strict, in_all, headway: as in `Tuner.decide`.
        standing: the earlier decision for the same bucket, if there is one.
        again: measure all of them, changed or not; so does `in_all`, since there is no time to do it afterwards.

    Raises:
        TuningFailed: no decision came about.
    """
    asked = list(backends_for(problem) if names is None else names)
    has_served = standing is not None and standing.is_decided and holds(standing, standing.chosen)
    incumbent = standing.chosen if standing is not None and has_served else None
    due = [] if standing is None or again or in_all else _due(standing, asked, tuner.short)
    options: dict[str, Any] = {
        "strict": strict,
        "in_all": in_all,
        "headway": headway,
        "incumbent": incumbent,
        "logits_backend": logits_backend_for(problem, tuner.device),
    }
    if standing is None or incumbent is None or not due:
        return tuner.decide(problem, seconds, names=asked, **options)

    decision, evidence = tuner.decide(problem, seconds, names=[*due, incumbent], **options)
    if decision.chosen in (*due, incumbent) and decision.baseline == standing.baseline:
        return _with_what_stands(decision, standing), evidence
    return tuner.decide(problem, seconds, names=asked, **options)


def logits_backend_for(problem: Problem, device: torch.device) -> str | None:
    """From hidden states: the backend that serves the logits of `problem`, as far as that is known without measuring or
    checking; it is what candidates are handed. None where it is not known, or there is no need of any."""
    if problem.hidden is None:
        return None
    under = policy()
    under = under._replace(mode="off" if under.mode == "off" else "lookup", require_hit=False, row_invariant=False)
    *_, (_, outcome) = walk(context_of(of_logits(problem, problem.rows), device, under))
    return outcome.backend if isinstance(outcome, Choice) else None


def _due(standing: Decision, asked: Collection[str], short: bool) -> list[str]:
    """The candidates to measure, without the choice that stands; none where all have to be."""
    due = {*changed(standing), *(name for name in asked if name not in standing.candidates)} & set(asked)
    is_comparable = standing.baseline == EAGER and EAGER not in due
    if not standing.settled or not is_comparable or (standing.short_check and not short):
        return []
    return [name for name in backends_for(standing.problem) if name in due and name != standing.chosen]


def _with_what_stands(decision: Decision, standing: Decision) -> Decision:
    """`decision` with the candidates of `standing` that it did not measure."""
    carried = {
        name: dataclasses.replace(candidate, measured_at=candidate.measured_at or standing.measured_at)
        for name, candidate in standing.candidates.items()
        if name not in decision.candidates and name in backends_for(decision.problem)
    }
    return dataclasses.replace(
        decision,
        candidates=decision.candidates | carried,
        left_out=tuple(name for name in decision.left_out if name not in carried),
    )
