"""Which backend serves a problem. The first of these that has an answer:

1. what was decided earlier in this process;
2. a stored decision for exactly this bucket of N: the user's store, the project's profiles, the bundled ones;
3. for small problems, where N * V is under 2^20 and a launch costs more than the work: eager;
4. tuning, where it is possible (`compiled_logprobs.tuning`, a layer above);
5. a stored decision for the nearest bucket of N of the same problem;
6. the default rule: the first built-in backend that can run the problem and passes a short check on this machine.

A decision is used only while the backend that it chose is registered, can run the problem, and has the code that was measured.
"""

import math
from collections.abc import Iterator
from datetime import datetime, timezone
from typing import Literal, NamedTuple

import torch
from torch import distributed

from compiled_logprobs.backends import BUILT_IN, EAGER, backends, code_of, is_loaded, target_of, why_not
from compiled_logprobs.backends.base import Backend
from compiled_logprobs.choose.view import view
from compiled_logprobs.decision import Decision
from compiled_logprobs.errors import ProfileError
from compiled_logprobs.machine.environment import environment_at, fingerprint_of
from compiled_logprobs.policy import Policy
from compiled_logprobs.problem import Problem, as_it_lies, bucket, nearest_first
from compiled_logprobs.store.files import Store, pass_over

Source = Literal[
    "small",
    "tuned here",
    "ranks",
    "user store",
    "project profiles",
    "bundled profiles",
    "nearest",
    "default rule",
    "set aside",
]
TRANSIENT = ("failed", "oom", "timeout", "crashed")
"""Outcomes that may have had a cause outside of the candidate, such as a full disk: they do not hold for ever."""
RETRY_S = 24 * 3600.0
"""After which a decision with such an outcome is stale."""
GUESSED = ("nearest", "default rule")
"""The sources of what serves N without a decision of its own."""
HITS = ("small", "tuned here", "ranks", "user store", "project profiles", "bundled profiles")
"""The sources that `require_hit` accepts."""


class Served(NamedTuple):
    """A backend's name, and where the choice comes from."""

    name: str
    source: Source
    decision: Decision | None = None
    stale: str | None = None
    """What has changed since the decision was measured, though its choice can still be used."""


_served: dict[tuple[Problem, str, bool], Served] = {}
"""By what `_key` says."""
_decided: dict[Problem, Served] = {}
"""What was tuned in this process, by bucket, whether or not it could be stored."""
_set_aside: dict[tuple[str, Problem], str] = {}
"""What went wrong, by the name of the backend and the bucket that it failed on."""
_hot: dict[tuple[Problem, Policy], str] = {}
"""What `_served` comes to for exact problems, so that a call pays for one look into a dictionary."""
_MOST_HOT = 4096
_is_in_group = distributed.is_initialized if distributed.is_available() else lambda: False
_was_in_group = False
"""When that was last looked at."""


def known(problem: Problem, policy: Policy) -> str | None:
    """The name of the backend that served exactly this before, and still does."""
    _start_anew_in_a_group()
    return _hot.get((problem, policy))


def keep(problem: Problem, policy: Policy, name: str) -> None:
    """Let `known` answer `name`."""
    if len(_hot) >= _MOST_HOT:
        _hot.clear()  # N that never comes twice
    _hot[problem, policy] = name


def served(problem: Problem, policy: Policy) -> Served | None:
    """What serves `problem` in this process; None if that is still to be found out."""
    _start_anew_in_a_group()
    answer = _served.get(_key(problem, policy))
    return None if answer is None or (policy.require_hit and not _is_hit(answer)) else answer


def _start_anew_in_a_group() -> None:
    """Where this process has joined a process group, let go of what it found alone: other ranks may have found something else."""
    global _was_in_group
    is_in_group = _is_in_group()
    if is_in_group and not _was_in_group:
        for problem, answer in list(_decided.items()):
            if answer.source == "tuned here":
                _decided.pop(problem, None)
        _served.clear()
        _hot.clear()
    _was_in_group = is_in_group


def _key(problem: Problem, policy: Policy) -> tuple[Problem, str, bool]:
    """What shares an answer: a bucket of N; or, where rows have to be invariant, all N, with the gradient and without."""
    shared = _kind(problem) if policy.row_invariant else bucket(problem)
    return shared, policy.mode, policy.row_invariant


def _kind(problem: Problem) -> Problem:
    """What one backend serves all of, where rows have to be invariant."""
    return posed(problem, Policy(row_invariant=True))._replace(rows=0)


def posed(problem: Problem, policy: Policy) -> Problem:
    """The problem whose decision serves `problem`: itself, or, where rows have to be invariant, the one with the gradient.

    Old log-probabilities come from one call without the gradient and of many rows, new ones from another with it and of few:
    they are equal only if one backend gives both.
    """
    if not policy.row_invariant:
        return problem
    return as_it_lies(problem._replace(needs_grad=True, inplace_backward=False, layout="flat", aligned=True))


def _is_hit(answer: Served) -> bool:
    """Whether a profile decided it, were it that the backend failed since."""
    return answer.source in HITS or (answer.source == "set aside" and answer.decision is not None)


def remember(problem: Problem, policy: Policy, answer: Served) -> None:
    """Let `answer` serve `problem` and its bucket under `policy` from now on, in this process."""
    _served[_key(problem, policy)] = answer
    _hot.clear()


def remember_decision(decision: Decision, source: Source = "tuned here") -> None:
    """Let `decision`, just measured or agreed upon, stand before every stored one, in this process."""
    _decided[decision.problem] = Served(decision.chosen, source, decision)
    forget(decision.problem)
    if source == "ranks":
        kind = _kind(decision.problem)
        for key in [key for key in list(_served) if key[2] and key[0] == kind]:
            _served.pop(key, None)


def forget(problem: Problem) -> None:
    """Look for what serves `problem` and its bucket anew at the next call, and all N of it that have no decision of their own.

    Those served by a guess might be served by another one now; and on ranks, which come to them in different order, they
    would be served by different ones for good. What serves all N, since rows have to be invariant, stays: old and new
    log-probabilities are to come from one backend.
    """
    top = bucket(problem)
    for key, answer in list(_served.items()):  # a list, since other threads may add to it meanwhile
        there, _, invariant = key
        guessed = answer.source in GUESSED and there._replace(rows=top.rows) == top
        if not invariant and (there == top or guessed):
            _served.pop(key, None)
    _hot.clear()


def candidates(problem: Problem) -> list[str]:
    """The default rule's backends for `problem`, best first, without those that failed on it."""
    return [name for name in BUILT_IN if (name, bucket(problem)) not in _set_aside]


def set_aside(name: str, problem: Problem, error: BaseException) -> bool:
    """No longer let `name`, which raised `error`, serve `problem` and its bucket in this process.

    Returns:
        Whether this is the first time for such problems, whatever their N.
    """
    top = bucket(problem)
    first = not any(other == name and there._replace(rows=top.rows) == top for other, there in list(_set_aside))
    _set_aside[name, top] = f"{type(error).__name__}: {error}"
    _hot.clear()
    for (there, mode, invariant), answer in list(_served.items()):
        if answer.name == name and there == _key(top, Policy(row_invariant=invariant))[0]:
            _served[there, mode, invariant] = Served(EAGER, "set aside", answer.decision)
    return first


def failures(problem: Problem) -> dict[str, str]:
    """The backends that are set aside for `problem` and its bucket in this process, and what each raised."""
    return {name: why for (name, top), why in list(_set_aside.items()) if top == bucket(problem)}


def stored(problem: Problem, device: torch.device, policy: Policy) -> Served | None:
    """The decision for exactly the bucket of `problem`, by this process or a profile, if it can be used here.

    Where rows have to be invariant, that for the largest N that has one: what serves all N must not depend on which comes first,
    for other ranks may begin with another. And where ranks have agreed upon anything of that kind, it is that, since what each
    finds beside it is its own.
    """
    top, environment = bucket(problem), fingerprint_of(device)
    tops = [top]
    if policy.row_invariant:
        if (agreed := _agreed_for_all_rows(top)) is not None:
            return usable(agreed, policy) or _in_place_of(agreed)
        near = (other for store in view(environment).values() for other in store.near(environment, top))
        same = (other for other in list(_decided) if other._replace(rows=top.rows) == top)
        tops = sorted({top, *near, *same}, key=lambda other: -other.rows)
    for other in tops:
        decided = _decided.get(other)
        if decided and ((here := usable(decided, policy)) or (here := _in_place_of(decided))):
            return here
    for other in tops:
        for answer in _exact(other, environment):
            if here := usable(answer, policy):
                return here
    return None


def _agreed_for_all_rows(problem: Problem) -> Served | None:
    """What ranks agreed upon that has to serve all N of such problems, with the gradient and without: that of this very kind
    before others, such as one without the gradient alone, and of the same kind that of the largest N.
    """
    kind = _kind(problem)
    agreed = [other for other, one in list(_decided.items()) if one.source == "ranks" and _kind(other) == kind]
    first = min(agreed, key=lambda other: (other._replace(rows=0) != kind, -other.rows, other), default=None)
    return None if first is None else _decided.get(first)


def tells_of_rows(answer: Served, problem: Problem) -> bool:
    """Whether `answer` rests on a check, of problems like this one, that found the rows of its backend to be invariant."""
    if answer.decision is None or answer.decision.problem._replace(rows=problem.rows) != problem:
        return False
    found = answer.decision.candidates.get(answer.name)
    return found is not None and found.measured and found.row_invariant is True


def nearest(problem: Problem, device: torch.device, policy: Policy) -> Served | None:
    """The decision for the bucket nearest to that of `problem`, of the same problem but for N, if it can be used here."""
    top, environment = bucket(problem), fingerprint_of(device)
    found = {other for store in view(environment).values() for other in store.near(environment, top)}
    found |= set(_decided)
    for other in nearest_first(top, found):
        for answer in (*([_decided[other]] if other in _decided else []), *_exact(other, environment)):
            here = usable(answer, policy)
            if here is None or (here.name, top) in _set_aside:
                here = _in_place_of(answer)
            if here is not None:
                return here._replace(source="nearest")
    return None


def _in_place_of(answer: Served) -> Served | None:
    """What serves where `answer`, which this process holds, cannot be used; None where others may know.

    What ranks have agreed upon ends the search: what each would find after it is its own, and may differ. All have eager.
    """
    return answer._replace(name=EAGER) if answer.source == "ranks" else None


def is_settled(problem: Problem, device: torch.device) -> bool:
    """Whether a decision for the bucket of `problem` still holds, though what it chose may not be allowed to serve at present."""
    top = bucket(problem)
    answers = (*([_decided[top]] if top in _decided else []), *_exact(top, fingerprint_of(device)))
    found = [answer.decision for answer in answers if answer.decision is not None]
    return any(holds(one, one.chosen) and _what_changed(one) is None for one in found)


def what_differs(decision: Decision, device: torch.device) -> dict[str, tuple[object, object]]:
    """The facts of the environment that were others when `decision` was measured: there, and here."""
    here = environment_at(device).to_dict()
    return {
        name: (decision.environment.get(name), value)
        for name, value in here.items()
        if decision.environment.get(name) != value
    }


def _exact(top: Problem, environment: str) -> Iterator[Served]:
    """What the stores hold for `top`, as far as it can be read."""
    for label, store in view(environment).items():
        decision = decision_in(store, environment, top)
        if decision is not None:
            yield Served(decision.chosen, label, decision)  # type: ignore[arg-type]  # the labels are sources


def decision_in(store: Store, environment: str, problem: Problem) -> Decision | None:
    """The decision that `store` holds for exactly this; None, with a warning, for one that cannot be used."""
    decision = _readable(store, environment, problem)
    if decision is None or decision.chosen in backends():
        return decision
    unknown = ProfileError(
        f"it chose the backend {decision.chosen!r:.80}, which is not registered here; "
        f"registered are {', '.join(backends())}"
    )
    remedy = "Register that one with register_backend, or delete the file"
    pass_over(store.path(environment, problem), unknown, remedy)
    return None


def unregistered_choice(store: Store, environment: str, problem: Problem) -> str | None:
    """The backend that a decision in `store` chose, if only another process has registered it."""
    decision = _readable(store, environment, problem)
    return None if decision is None or decision.chosen in backends() else decision.chosen


def _readable(store: Store, environment: str, problem: Problem) -> Decision | None:
    return store.read(environment, problem)


def usable(answer: Served, policy: Policy) -> Served | None:
    """`answer`, which has a decision, as it holds here and now; None if it does not."""
    decision = answer.decision
    assert decision is not None
    name = decision.best_row_invariant() if policy.row_invariant else decision.chosen
    if name is None or (name, decision.problem) in _set_aside or not holds(decision, name):
        return None
    return answer._replace(name=name, stale=_what_changed(decision))


def holds(decision: Decision, name: str) -> bool:
    """Whether the backend called `name` is what was measured, and can run here."""
    known = decision.candidates[name].fingerprint
    return name in backends() and code_of(name) == known and why_not(name, decision.problem) is None


def changed(decision: Decision) -> dict[str, str]:
    """How today's candidates differ from those that were measured, by name. None is imported to find out."""
    return {
        name: f"backend {name!r} {why}"
        for name in backends()
        if name not in decision.left_out and (why := _how_it_changed(decision, name))
    }


def _what_changed(decision: Decision) -> str | None:
    return next(iter(changed(decision).values()), None)


def _how_it_changed(decision: Decision, name: str) -> str | None:
    if name not in decision.candidates:
        return "was registered after this was measured"
    known = decision.candidates[name]
    if known.outcome in TRANSIENT and _age_s(known.measured_at or decision.measured_at) > RETRY_S:
        return f"{known.outcome} when this was measured, which may have had a cause that is gone"
    if name not in BUILT_IN and not is_loaded(name):
        return None
    if known.outcome in ("unavailable", "unsupported"):
        can_now = not _is_known_here_only(name) and why_not(name, decision.problem) is None
        return "could not run this when it was measured, and can now" if can_now else None
    return "has changed since this was measured" if code_of(name) != known.fingerprint else None


def _age_s(measured_at: str) -> float:
    try:
        measured = datetime.strptime(measured_at, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=timezone.utc)
    except ValueError:  # a foreign file may say anything
        return math.inf
    return (datetime.now(timezone.utc) - measured).total_seconds()


def _is_known_here_only(name: str) -> bool:
    """Whether no other process can import it, so that it is never measured."""
    target = target_of(name)
    return isinstance(target, Backend) or target.startswith("__main__:")
