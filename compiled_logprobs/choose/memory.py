"""What this process knows of choices: one object, which tests replace and a fork renews."""

import os
import threading
import time
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from compiled_logprobs.backends import EAGER
from compiled_logprobs.backends.base import AnyBackend
from compiled_logprobs.decision import Decision
from compiled_logprobs.policy import Policy
from compiled_logprobs.problem import FROM_HIDDEN, RESULTS, Problem, as_it_lies, bucket
from compiled_logprobs.tuning.headway import Headway

GUESSES = ("near", "related", "default rule", "meanwhile")
"""The sources of choices without a decision for exactly this bucket of N."""
READY_S = 10.0
"""How long what is ready serves a call that is not to wait for the compiler, before the others are asked again."""
_MOST_HOT = 4096


class Choice(NamedTuple):
    """What serves a call now."""

    backend: str
    source: str
    """Where the choice comes from: "tuned here", "ranks", a store such as "user store", "small", "near", "related",
    "default rule", "meanwhile", "row invariant" or "set aside"."""
    decision: Decision | None = None
    stale: str | None = None
    """What has changed since the decision was measured, though its choice can still be used."""
    until: float | None = None
    """When to choose anew, in seconds of `time.monotonic`; None: never."""
    unmeasured: str | None = None
    """Why nothing was measured, where the rule came to ask for that."""


class Served(NamedTuple):
    """What the last forward of a problem took."""

    backend: tuple[str, Any]
    policy: Policy | None
    """Under which it was chosen; None where the next call chooses anew."""


class Undecided(NamedTuple):
    """Measuring at a call that came to no decision."""

    reason: str
    headway: Headway
    getting_ready: threading.Thread | None
    """What goes on in the background, to compile and check."""
    until: float
    """Before then, in seconds of `time.monotonic`, no call waits for what is not ready."""

    @property
    def why(self) -> str:
        """The reason, and what goes on meanwhile."""
        goes_on = self.getting_ready is not None and self.getting_ready.is_alive()
        return f"{self.reason}; the rest is compiled in the background" if goes_on else self.reason

    def is_getting_ready(self) -> bool:
        return time.monotonic() < self.until or (self.getting_ready is not None and self.getting_ready.is_alive())


@dataclass
class Memory:
    """All that this process knows of choices."""

    hot: dict[Problem, Served] = field(default_factory=dict)
    """What `choices` come to for exact problems, so that a call pays for one look into a dictionary."""
    cold: dict[Problem, Served] = field(default_factory=dict)
    """What `hot` held before it was last emptied: recomputations of those forwards may be to come."""
    choices: dict[tuple[Problem, str, bool], Choice] = field(default_factory=dict)
    decided: dict[Problem, Choice] = field(default_factory=dict)
    """What was measured here or agreed between ranks, by bucket, whether or not it could be stored."""
    set_aside: dict[tuple[str, Problem], str] = field(default_factory=dict)
    """What a backend raised, by its name and the bucket."""
    checks: dict[tuple[str, Problem, bool], bool] = field(default_factory=dict)
    """Whether a backend passed the short check, for problems of any N."""
    warmed: set[tuple[str, Problem]] = field(default_factory=set)
    """What `warm` ran, by the backend's name, wherever the logits may start: nothing is left to compile."""
    undecided: dict[Problem, Undecided] = field(default_factory=dict)
    """What measuring at a call came to without a decision, by bucket."""
    compiling: dict[tuple[str, Problem], threading.Thread] = field(default_factory=dict)
    """What compiles a backend in the background, by its name, for problems of any N."""
    warned: set[str] = field(default_factory=set)
    """Backends that profiles chose and that are not registered, as far as the user was told."""
    spent_s: float = 0.0
    """Seconds that calls have spent measuring."""
    is_forked: bool = False
    lock: Any = field(default_factory=threading.RLock)  # whose type has no public name

    def is_warm(self, name: str, backend: AnyBackend, problem: Problem) -> bool:
        """Whether `backend`, called `name`, runs `problem` in a capture: by its own word, or since `warm` ran it."""
        return (name, problem) in self.warmed or backend.is_warm(problem)

    def keep(self, problem: Problem, policy: Policy | None, backend: tuple[str, Any]) -> None:
        """Let `hot` answer for exactly this problem, and note what its last forward took."""
        if len(self.hot) >= _MOST_HOT:
            self.cool()  # N that never comes twice
        self.hot[problem] = Served(backend, policy)

    def cool(self) -> None:
        """Let every next call look into `choices`; what the last forwards took stays known."""
        before, self.hot = self.hot, {}
        self.cold = {**self.cold, **before} if len(self.cold) < _MOST_HOT else before

    def last_forward(self, problem: Problem, had_gradient: bool = True) -> tuple[str, Any] | None:
        """What the last forward of `problem` took, preferably one that `had_gradient`, if it does; None if there was
        none."""
        asked = problem, problem._replace(needs_grad=False, inplace_backward=False)
        for each in asked if had_gradient else reversed(asked):
            if (served := self.hot.get(each) or self.cold.get(each)) is not None:
                return served.backend
        return None

    def remember(self, problem: Problem, policy: Policy, choice: Choice) -> None:
        """Let `choice` serve `problem` and its bucket under `policy` from now on."""
        self.choices[key_of(problem, policy)] = choice
        self.cool()

    def hold(self, problem: Problem, choice: Choice) -> None:
        """Let `choice` stand before every stored decision for `problem`, the top of its bucket."""
        self.decided[problem] = choice
        self.forget(problem)

    def forget(self, problem: Problem) -> None:
        """Choose anew at the next call, for the bucket of `problem` and all of its family that a guess has served."""
        top = bucket(problem)
        for key, choice in list(self.choices.items()):  # a list, since other threads may add to it
            asked, _, is_invariant = key
            is_guess = choice.source in GUESSES and family_of(asked) == family_of(top)
            if not is_invariant and (asked == top or is_guess):
                self.choices.pop(key, None)
        self.cool()

    def undecided_of(self, problem: Problem) -> Undecided | None:
        """What measuring came to for the bucket of `problem`; or at another N, as long as that is getting ready."""
        top = bucket(problem)
        if top in self.undecided:
            return self.undecided[top]
        for other, tried in list(self.undecided.items()):
            if other._replace(rows=top.rows) == top and tried.is_getting_ready():
                return tried._replace(reason=f"at {other.rows} rows {tried.reason}")
        return None

    def put_aside(self, backend: str, problem: Problem, error: BaseException) -> bool:
        """Let `backend`, which raised `error`, not serve the bucket of `problem`; whether that is new, at any N."""
        top = bucket(problem)
        alike = [other for name, other in list(self.set_aside) if name == backend]
        is_first = all(other._replace(rows=top.rows) != top for other in alike)
        self.set_aside[backend, top] = f"{type(error).__name__}: {error}"
        self.cool()
        for key, choice in list(self.choices.items()):
            asked, _, is_invariant = key
            if choice.backend == backend and is_invariant and asked == kind_of(top):
                self.choices.pop(key, None)
            elif choice.backend == backend and asked == top:
                self.choices[key] = Choice(EAGER, "set aside", choice.decision)
        return is_first

    def failures(self, problem: Problem) -> dict[str, str]:
        """The backends that are set aside for the bucket of `problem`, and what each raised."""
        return {name: error for (name, top), error in list(self.set_aside.items()) if top == bucket(problem)}


MEMORY = Memory()
"""Of this process. Tests replace it, and a fork does."""


def key_of(problem: Problem, policy: Policy) -> tuple[Problem, str, bool]:
    """What shares a choice: a bucket of N; or, where rows have to be invariant, a kind of calls."""
    return kind_of(problem) if policy.row_invariant else bucket(problem), policy.mode, policy.row_invariant


def family_of(problem: Problem) -> Problem:
    """What a decision for one says something of all of: any N, results, labels, layout, temperature and alignment."""
    asked_alike: dict[str, Any] = dict.fromkeys(RESULTS, False)
    return problem._replace(rows=0, labels_per_row=1, layout="flat", temperature="none", aligned=True, **asked_alike)


def kind_of(problem: Problem) -> Problem:
    """What one backend serves all of where rows are invariant: any N, gradient, results, temperature, layout."""
    kept = ("device_type", "vocab", "dtype", "labels_per_row", "masked_logits", *FROM_HIDDEN)
    return as_it_lies(Problem(rows=0, **{name: getattr(problem, name) for name in kept}))


def _after_fork() -> None:
    global MEMORY
    MEMORY = replace(MEMORY, is_forked=True, lock=threading.RLock())  # another thread may have held the old one


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
