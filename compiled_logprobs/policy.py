"""What `backend="auto"` may do: whether it may measure, for how long, and which backends it may admit.

The environment variables `COMPILED_LOGPROBS_MODE` and `COMPILED_LOGPROBS_BUDGET_S` set it for a process, as they are
when it is first asked for; `autotune` sets it for a block.
"""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Literal, NamedTuple, get_args

from torch import distributed

from compiled_logprobs.errors import InputError

Mode = Literal["tune", "lookup", "off"]

MODE_VARIABLE = "COMPILED_LOGPROBS_MODE"
BUDGET_VARIABLE = "COMPILED_LOGPROBS_BUDGET_S"
BUDGET_S = 20.0
"""Seconds that the rounds of a problem may take where `auto` tunes it by itself."""
PROBLEMS_A_PROCESS = 3
"""After how many such budgets, compiling and checking included, a process begins to measure nothing more."""


class Policy(NamedTuple):
    """What holds at present."""

    mode: Mode = "tune"
    budget_s: float = BUDGET_S
    row_invariant: bool = False
    require_hit: bool = False


_POLICY: ContextVar[Policy | None] = ContextVar("compiled_logprobs_policy", default=None)


def policy() -> Policy:
    """Of the innermost `autotune` block, else as the environment variables said when this was first asked."""
    return _POLICY.get() or _of_process()


@contextmanager
def autotune(
    mode: Mode | None = None,
    *,
    budget_s: float | None = None,
    row_invariant: bool | None = None,
    require_hit: bool | None = None,
) -> Iterator[None]:
    """Set what `backend="auto"` may do, for this thread or task, until the block ends. The rest stays as it is.

    with autotune("lookup", require_hit=True):
        log_probs = log_probs_from_logits(logits, labels)

    Args:
        mode: "tune" measures a new problem at its first call, where that is possible; "lookup" uses what is stored and
            never measures; "off" uses neither, but the default rule alone.
        budget_s: seconds that timing a problem may take, once its backends are compiled and checked, which may take a
            minute; all of it in the first process that comes to such a problem on a machine; a process that has spent
            three times as much in all measures nothing more. Default 20.
        row_invariant: admit only backends that declare the same bits for a row whatever N it came with, and let one
            serve all calls of a kind (device, vocabulary, dtype, labels a row, masked or not), with the gradient or
            entropy and without: then old and new log-probabilities of the same weights are equal, and their ratios
            start at exactly 1. That one is the first in the list of `backends()` that can run all of them and passes
            the check of its rows here. What was measured does not count, so that all ranks and processes choose the
            same, whatever they call first.
        require_hit: raise ProfileError for a problem that no profile decides, instead of measuring it or guessing.
            Problems with fewer than 2^20 logits, which are served by rule, need no profile.

    Raises:
        InputError: the mode is none of these, the budget is no number of seconds, or a switch neither True nor False.
    """
    before = policy()
    changed = Policy(
        before.mode if mode is None else _checked_mode(mode, "mode"),
        before.budget_s if budget_s is None else checked_budget(budget_s, "budget_s"),
        before.row_invariant if row_invariant is None else _checked_switch(row_invariant, "row_invariant"),
        before.require_hit if require_hit is None else _checked_switch(require_hit, "require_hit"),
    )
    token = _POLICY.set(changed)
    try:
        yield
    finally:
        _POLICY.reset(token)


@cache
def _of_process() -> Policy:
    """Read once: on the way of every call, looking into the environment would cost more than all the rest."""
    mode, budget = os.environ.get(MODE_VARIABLE), os.environ.get(BUDGET_VARIABLE)
    return Policy(
        _checked_mode(mode, MODE_VARIABLE) if mode else "tune",
        checked_budget(budget, BUDGET_VARIABLE) if budget else BUDGET_S,
    )


def is_rank() -> bool:
    """Whether this process is one of several ranks, or is to be: such a one never measures by itself."""
    size = os.environ.get("WORLD_SIZE", "")
    return (size.isdigit() and int(size) > 1) or (distributed.is_available() and distributed.is_initialized())


def _checked_mode(mode: str, name: str) -> Mode:
    if mode not in get_args(Mode):
        raise InputError(f"got {name}={mode!r}; {', '.join(get_args(Mode))} are valid. Set it to one of them.")
    return mode  # type: ignore[return-value]  # it is one of them


def _checked_switch(switch: object, name: str) -> bool:
    if not isinstance(switch, bool):
        raise InputError(f"got {name}={switch!r}; True and False are valid. Set it to one of them.")
    return switch


def checked_budget(budget: float | str, name: str) -> float:
    """`budget` as seconds. Raises InputError, which calls it `name`, for what is none."""
    try:
        seconds = float(budget)
    except (TypeError, ValueError):
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise InputError(f"got {name}={budget!r}; a number of seconds, 0 or more, is valid, e.g. {BUDGET_S:g}.")
    return seconds
