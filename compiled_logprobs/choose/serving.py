"""Where nothing is known about a problem yet: look it up, measure it, or take the default rule; and measuring on demand."""

import contextlib
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch

from compiled_logprobs.backends import BUILT_IN, EAGER, backends, why_not
from compiled_logprobs.check.run import INVARIANCE_ELEMENTS, check_backend
from compiled_logprobs.choose import rule as decisions
from compiled_logprobs.choose.neighbours import neighbours
from compiled_logprobs.choose.renewal import decide
from compiled_logprobs.choose.rule import Served
from compiled_logprobs.decision import Decision, Evidence
from compiled_logprobs.errors import BackendUnavailable, ProfileError, is_out_of_memory, nothing_can_serve_after
from compiled_logprobs.machine.clock import MIB, free_memory
from compiled_logprobs.machine.environment import environment_at, fingerprint_of
from compiled_logprobs.policy import BUDGET_VARIABLE, PROBLEMS_A_PROCESS, Policy, checked_budget, is_rank, policy
from compiled_logprobs.problem import Problem, bucket, is_small
from compiled_logprobs.store import user_store
from compiled_logprobs.store.files import Store
from compiled_logprobs.tuning.process import Event
from compiled_logprobs.tuning.tuner import Tuner, TuningFailed, alone_on

LEAST_FREE = 2048 * MIB
"""Memory of an accelerator that has to be free, beside `COPIES` of the logits, for tuning to begin by itself."""
COPIES = 3
WAIT_S = 600.0
"""How long tuning on demand waits for another process that measures on the same device."""


class _Short(NamedTuple):
    passed: bool
    row_invariant: bool | None


_short_checks: dict[tuple[str, Problem, bool], _Short] = {}
"""What the short check found, for problems of any N, and whether rows had to be invariant."""
_lock = threading.RLock()
_forked = False
_spent_s = 0.0
"""Of this process's time, what tuning by itself has taken."""


def _after_fork() -> None:
    global _forked, _lock
    _forked, _lock = True, threading.RLock()  # another thread may have held the old one


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def serve(problem: Problem, device: torch.device, under: Policy) -> str:
    """The name of the backend that serves `problem` on `device`: known, or found out and then known.

    Raises:
        ProfileError: a profile has to decide, and none does.
        BackendUnavailable: rows have to be invariant, and no backend's are, or the one whose are cannot run this call.
        And out of memory, as it is, where that has to be found out.
    """
    answer = decisions.served(problem, under)
    if answer is None or (under.row_invariant and answer.source == "set aside"):
        with _lock:
            known = decisions.served(problem, under)  # another thread may have been quicker
            answer = known or _find_out(decisions.posed(problem, under), device, under)
            if answer is None:
                return EAGER  # there is no room for the check now; there may be at the next call
            if under.row_invariant:
                answer = _with_invariant_rows(answer, decisions.posed(problem, under), device, under)
            if answer != known:
                decisions.remember(problem, under, answer)
    name = answer.name
    reason = None if name == EAGER else why_not(name, problem)  # of this very N, where the decision is for a bucket
    if reason is not None and under.row_invariant:
        raise BackendUnavailable(
            f"backend {name!r}, which serves such problems with row_invariant=True in this process, cannot run "
            f"{problem}{_options(problem)}: {reason}. Set row_invariant=False, or pose all of them so that it can."
        )
    if reason is not None:
        name = EAGER
    decisions.keep(problem, under, name)
    return name


def why_no_tuning(problem: Problem, device: torch.device, under: Policy) -> str | None:
    """Why the first call of `problem` does not measure by itself; None if it does."""
    if under.mode != "tune":
        return f"the mode is {under.mode!r}"
    if under.require_hit:
        return "require_hit=True forbids it"
    if is_small(problem):
        return "it has fewer than 2^20 logits"
    if not _others_can_run(problem):
        return "only eager can run it"
    if device.type not in ("cpu", "cuda"):
        return f"nothing is measured on {device.type}"
    if _forked:
        return "this process is a forked child of another"
    if is_rank():
        return "this process is one of several ranks; call tune(..., group=...) on all of them"
    if device.type != "cpu":
        needed = COPIES * problem.rows * problem.vocab * problem.dtype.itemsize + LEAST_FREE
        free = free_memory(device) or 0
        if free < needed:
            return f"{free / 2**30:.1f} GiB of the device's memory are free, and {needed / 2**30:.1f} GiB are needed"
    if _budget_left(under) <= 0:
        return f"the process has used up its {PROBLEMS_A_PROCESS * under.budget_s:g} s for measuring"
    if decisions.is_settled(problem, device):
        return "it has been measured already, and what was chosen may not serve now"
    return None


def why_no_hit(problem: Problem, under: Policy) -> str:
    """What the first call of `problem` says where a profile has to decide, and none does."""
    if under.mode == "off":
        return (
            "the mode is 'off', in which no profile is looked at, and require_hit=True asks for one. "
            "Set the mode to 'lookup' or 'tune', or set require_hit=False."
        )
    return (
        f"no profile decides {bucket(problem)}{_options(problem)}, and require_hit=True forbids to measure "
        "or guess. Run `compiled-logprobs profile` or tune(...) for it on this machine, or set require_hit=False."
    )


def tune_all(
    problems: Sequence[Problem],
    device: torch.device,
    *,
    store: Store | None = None,
    names: list[str] | None = None,
    budget_s: float | None = None,
    again: bool = False,
    must_store: bool = True,
    on_event: Callable[[Event], None] = lambda event: None,
) -> Iterator[Decision | TuningFailed]:
    """Decide each bucket of `problems`, and store it, on demand: no question of mode, ranks or the process's budget.

    Args:
        problems: those of the same bucket are decided once.
        device: where.
        store: where to; by default the user's.
        names: of the backends to measure beside eager.
        budget_s: seconds for each problem; by default what the policy says. N shrinks where the rounds would take longer.
        again: measure what that store holds already, too. Else a decision there is kept, unless it had a short check, lacks
            one of `names`, or something has changed since.
        must_store: whether to measure nothing where it cannot be stored; else a warning says that it was not.
        on_event: told what happens.

    Yields:
        For each bucket the decision, or why there is none, as soon as it is known.

    Raises:
        ProfileError: there is something to measure, and it could not be stored, as `must_store` asks.
    """
    store = user_store() if store is None else store
    seconds = policy().budget_s if budget_s is None else checked_budget(budget_s, "budget_s")
    asked = backends() if names is None else [EAGER, *names]
    with Tuner(device, on_event=on_event) as tuner:
        for problem in dict.fromkeys(map(bucket, problems)):
            known = None if again else current(store, problem, device, asked)
            on_event({"event": "problem", "problem": problem, "known": known is not None})
            if known is not None:
                decisions.forget(problem)  # this process may have found something else before it was stored
                yield known
                continue
            if must_store:
                store.require_writable()
            with alone_on(device, WAIT_S) as alone:
                found: Decision | TuningFailed
                # While this waited, another process may have decided it.
                known = None if again else current(store, problem, device, asked)
                if known is not None:
                    decisions.forget(problem)
                    found = known
                elif alone:
                    found = _decided_by(tuner, problem, asked, seconds, store, device, again)
                else:
                    found = TuningFailed(
                        f"another process has been measuring on {device} for {WAIT_S:g} s; wait for its end"
                    )
            yield found


def tuned(
    problems: Sequence[Problem], device: torch.device, *, budget_s: float | None = None, again: bool = False
) -> list[Decision]:
    """What `tune_all` yields, all of it; raises the first failure, when what came before is stored."""
    decided = []
    for found in tune_all(problems, device, budget_s=budget_s, again=again, must_store=False):
        if isinstance(found, TuningFailed):
            raise found
        decided.append(found)
    return decided


def _decided_by(
    tuner: Tuner,
    problem: Problem,
    asked: Sequence[str],
    seconds: float,
    store: Store,
    device: torch.device,
    again: bool,
) -> Decision | TuningFailed:
    """What `tuner` finds, which is stored before the next one that waits for the device looks there."""
    environment = fingerprint_of(device)
    standing = decisions.decision_in(store, environment, problem)
    foreign = None if standing else decisions.unregistered_choice(store, environment, problem)
    if foreign is not None and not again:
        return TuningFailed(
            f"the decision that is stored chose backend {foreign!r}, which is not registered here, and would be lost; "
            "register it, or measure again (again=True, --again)"
        )
    if standing is not None:  # it is not to end up with fewer candidates than it had
        asked = [*asked, *(name for name in standing.candidates if name not in asked)]
    try:
        decision, evidence = decide(tuner, problem, seconds, standing=standing, names=asked, again=again)
    except TuningFailed as error:
        return error
    decisions.remember_decision(decision)
    publish(store, decision, evidence, device)
    return decision


def _find_out(problem: Problem, device: torch.device, under: Policy) -> Served | None:
    found = None if under.mode == "off" else decisions.stored(problem, device, under)
    if found is not None and (found.stale is None or why_no_tuning(problem, device, under) is not None):
        return found
    if under.require_hit and not is_small(problem):
        near = neighbours(problem, device, under, most=1) if under.mode != "off" else []
        raise ProfileError(
            "\n".join([why_no_hit(problem, under), *(f"Nearest in the profiles: {one}" for one in near)])
        )
    if why_no_tuning(problem, device, under) is None:
        measured = _tune_by_itself(problem, device, under, None if found is None else found.decision)
        if measured is not None:
            return measured
    if is_small(problem) and not under.row_invariant:
        return found or Served(EAGER, "small")
    if under.mode != "off":
        found = found or decisions.nearest(problem, device, under)
    return found or _default_rule(problem, device, under)


def _tune_by_itself(problem: Problem, device: torch.device, under: Policy, standing: Decision | None) -> Served | None:
    global _spent_s
    began = time.monotonic()
    seconds = min(under.budget_s, _budget_left(under))
    say(
        f"measuring which backend is fastest for {bucket(problem)}{_options(problem)}, for at most {seconds:.0f} s "
        "(COMPILED_LOGPROBS_MODE=lookup prevents it)"
    )
    try:
        with alone_on(device, seconds) as alone:
            if decisions.is_settled(problem, device):  # while this waited, another process has decided it
                return decisions.stored(problem, device, under)
            if not alone:
                raise TuningFailed("another process was measuring on this device all the time")
            with Tuner(device, short=True) as tuner:
                left = seconds - (time.monotonic() - began)
                decision, evidence = decide(tuner, problem, left, standing=standing, strict=True)
            decisions.remember_decision(decision)
            store = user_store()
            # What others have registered may serve them well.
            if decisions.unregistered_choice(store, fingerprint_of(device), decision.problem) is None:
                publish(store, decision, evidence, device)  # before the next one that waits looks there
    except (TuningFailed, OSError, RuntimeError) as error:  # the last two: no room for another process or thread
        if nothing_can_serve_after(error):
            raise
        say(
            f"not decided: {error}. The default rule serves it in this process; `compiled-logprobs profile` or a larger "
            f"{BUDGET_VARIABLE} gives it more time"
        )
        return None
    finally:
        _spent_s += time.monotonic() - began
    say(f"{decision.chosen} serves it: {decision.reason}")
    return decisions.stored(problem, device, under)


def _with_invariant_rows(answer: Served, problem: Problem, device: torch.device, under: Policy) -> Served:
    """`answer`, or eager in its place; where no profile tells it of such problems, the short check has to find their rows
    invariant: as where eager stands in for another, or ranks have agreed upon a problem without the gradient.
    """
    for name in dict.fromkeys((answer.name, EAGER)):
        one = answer._replace(name=name)
        if decisions.tells_of_rows(one, problem):
            return one
        if why_not(name, problem) is None:
            found = _short_check(name, problem, device, under)
            if found.passed and found.row_invariant:
                return one
    raise _none_is_invariant(problem, list(dict.fromkeys((answer.name, EAGER))))


def _none_is_invariant(problem: Problem, tried: Sequence[str]) -> BackendUnavailable:
    return BackendUnavailable(
        f"no backend that can run {problem}{_options(problem)} has rows whose bits do not depend on N, which "
        f"row_invariant=True asks for. Tried: {', '.join(tried)}. Set row_invariant=False, or keep N the same."
    )


def _default_rule(problem: Problem, device: torch.device, under: Policy) -> Served | None:
    """None if there is no memory to find out; where rows have to be invariant, that is raised, since nothing can serve."""
    names = decisions.candidates(problem)
    if is_small(problem) and not under.row_invariant:  # whose first answer stands for large ones, too
        names.sort(key=lambda name: name != EAGER)
    try:
        for name in names:
            if name == EAGER and not under.row_invariant:
                return Served(EAGER, "default rule")
            if why_not(name, problem) is not None:
                continue
            found = _short_check(name, problem, device, under)
            if found.passed and (found.row_invariant or not under.row_invariant):
                return Served(name, "default rule")
    except Exception as error:
        if under.row_invariant or not is_out_of_memory(error):
            raise
        return None
    raise _none_is_invariant(problem, names)


def _short_check(name: str, problem: Problem, device: torch.device, under: Policy) -> _Short:
    """Where one answer is to stand for all N: with all rows that the check can take, whatever N comes first."""
    key = name, problem._replace(rows=0), under.row_invariant
    if key not in _short_checks:
        rows = max(1, INVARIANCE_ELEMENTS // problem.vocab) if under.row_invariant else problem.rows
        report = check_backend(name, problem._replace(rows=rows), short=True, device=str(device))
        _short_checks[key] = _Short(report.passed, report.row_invariant)
    return _short_checks[key]


def current(store: Store, problem: Problem, device: torch.device, asked: Sequence[str]) -> Decision | None:
    """What `store` holds of `problem`, unless it is less than what is asked for, or something has changed since."""
    decision = decisions.decision_in(store, fingerprint_of(device), problem)
    if decision is None or decision.short_check or not decision.candidates.keys() >= set(asked):
        return None
    found = decisions.usable(Served(decision.chosen, "user store", decision), Policy())
    return decision if found is not None and found.stale is None else None


def publish(store: Store, decision: Decision, evidence: Evidence, device: torch.device) -> None:
    """Store `decision` with what it rests on; a warning says if that fails."""
    environment = environment_at(device)
    try:
        store.publish(environment, decision, _with_carried_cases(store, environment.fingerprint(), decision, evidence))
    except ProfileError as error:
        warnings.warn(f"{error}\nWhat was measured holds in this process only.", RuntimeWarning, stacklevel=2)


def _with_carried_cases(store: Store, environment: str, decision: Decision, evidence: Evidence) -> Evidence:
    """`evidence` with what an earlier check found of the candidates that `decision` took over from what is stored."""
    carried = {name: one for name, one in decision.candidates.items() if one.measured_at is not None}
    if not carried:
        return evidence
    stored = store.read(environment, decision.problem)
    beside = None if stored is None else store.evidence(environment, stored)
    if stored is None or beside is None:
        return evidence
    before = stored.candidates
    return evidence.with_cases_of(beside, [n for n in carried if n in before and before[n].checks == carried[n].checks])


def _others_can_run(problem: Problem) -> bool:
    """Whether another backend than eager may; those of third parties are not imported to find out."""
    return any(name not in BUILT_IN or why_not(name, problem) is None for name in backends() if name != EAGER)


def _budget_left(under: Policy) -> float:
    return PROBLEMS_A_PROCESS * under.budget_s - _spent_s


def _options(problem: Problem) -> str:
    details = problem.details()
    return f" ({details})" if details else ""


def say(text: str) -> None:
    """To whoever waits for it."""
    if sys.stderr is not None:
        with contextlib.suppress(OSError, ValueError):  # nobody reads it any more: it is closed, or its pipe is
            sys.stderr.write(f"compiled_logprobs: {text}\n")
            sys.stderr.flush()
