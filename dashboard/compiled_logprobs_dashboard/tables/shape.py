"""What one shape's decision says: the sentence, the ranking, and how to call and measure it.

Every figure is one of `Decision`; here they are only put into words and order.
"""

from collections.abc import Iterable
from typing import Any

import pandas as pd

from compiled_logprobs.backends import EAGER, backends, is_built_in, target_of
from compiled_logprobs.decision import Candidate, Decision, speedup_in_words
from compiled_logprobs.errors import InputError
from compiled_logprobs.machine.environment import environments
from compiled_logprobs.problem import Problem, results_of, short_name
from compiled_logprobs.tuning.presets import FIELDS
from compiled_logprobs_dashboard.frames import against, ends, published
from compiled_logprobs_dashboard.humanize import significant, size, times
from compiled_logprobs_dashboard.looks import UNDECIDED, WRONG, looks, outcome, plain_line
from compiled_logprobs_dashboard.runs import Request
from compiled_logprobs_dashboard.tables.overview import by_gravity

RANKING = {
    **dict.fromkeys(("name", "backend", "outcome", "checks"), str),
    **dict.fromkeys(("ms", "speed-up", "low", "high", "over eager", "tokens", "roof", "MiB", "multiple"), float),
    "why": str,
}


def sentence(decision: Decision) -> str:
    """Which backend to use, how much faster it is, and whether it is right. Plain text."""
    if not decision.is_decided:
        return plain_line(speedup_in_words(decision)).replace("undecided", "Undecided", 1)
    winner = decision.winner
    speedup, speed = published(decision, winner), plain_line(decision.reason)
    if speedup is not None and against(decision) != decision.chosen:
        verb = "faster than" if speedup.median >= 1 else "the speed of"
        speed = f"{times(speedup.median, speedup.low, speedup.high)} {verb} {plain_line(against(decision), 40)}"
    return f"Use {plain_line(decision.chosen, 40)}: {speed}, {rightness(decision)}"


def rightness(decision: Decision) -> str:
    """Whether what serves is right."""
    winner = decision.winner
    if not winner.checks:
        return "and whether it is right is not stored"
    passed = f"passed {winner.checks_passed} of {len(winner.checks)} checks"
    if winner.checks_passed < len(winner.checks):
        failed = by_gravity({one.name for one in winner.checks if not one.passed})
        return f"and it is {WRONG} WRONG: {', '.join(failed)}"
    return f"and it is right: {passed}" + (" (the short ones)" if decision.short_check else "")


def ranking(decision: Decision, among: Iterable[str] = ()) -> pd.DataFrame:
    """One row a candidate, the one that serves first, then by speed, then those that were not timed: `RANKING`.

    `name` is as it is stored, and `backend` as it can be shown; `speed-up` with `low` and `high` is over
    `frames.against`, `over eager` over the baseline; tokens a second; `roof` in per cent; `multiple` of the logits.
    """
    look = looks(decision.candidates, among)
    rows = []
    for name, candidate in sorted(decision.candidates.items(), key=lambda item: _rank(decision, *item)):
        speedup, is_itself = published(decision, candidate), name == decision.baseline and not decision.is_decided
        failed = by_gravity({check.name for check in candidate.checks if not check.passed})
        is_open = not decision.is_decided and candidate.outcome in ("chosen", "tie")
        checks = f"✓ {candidate.checks_passed} of {len(candidate.checks)}" if candidate.checks else "not run"
        rows.append(
            {
                "name": name,
                "backend": f"{look[name].letter}  {plain_line(name, 60)}",
                "outcome": UNDECIDED if is_open else outcome(candidate.outcome),
                "ms": None if candidate.seconds is None else candidate.seconds * 1e3,
                **dict(zip(("speed-up", "low", "high"), ends(speedup), strict=True)),
                "over eager": None if is_itself or candidate.speedup is None else candidate.speedup.median,
                "tokens": None if not candidate.seconds else decision.timed.rows / candidate.seconds,
                "roof": candidate.percent_of_bandwidth,
                "MiB": None if candidate.extra_bytes is None else candidate.extra_bytes / 2**20,
                "multiple": candidate.extra_multiple,
                "checks": f"{WRONG} {', '.join(failed)}" if failed else checks,
                "why": plain_line(candidate.reason if name != decision.chosen else decision.reason, 500),
            }
        )
    table = pd.DataFrame(rows, columns=list(RANKING)).astype(RANKING)
    for column in ("ms", "tokens", "MiB"):
        table[column] = significant(table[column])
    return table


def trade_off(decision: Decision) -> tuple[pd.DataFrame, list[str]]:
    """What each backend took of time and memory: backend, seconds, bytes; and why others are not among them."""
    rows, left_out = [], []
    for name, one in decision.candidates.items():
        is_right = one.measured and one.checks_passed == len(one.checks)
        if is_right and one.seconds and one.extra_bytes is not None:
            rows.append((name, one.seconds, max(1024, one.extra_bytes)))
        elif one.outcome not in ("unavailable", "unsupported"):
            left_out.append(f"{plain_line(name, 40)}, {outcome(one.outcome)}: {plain_line(one.reason, 200)}")
    return pd.DataFrame(rows, columns=["backend", "seconds", "bytes"]), left_out


def _rank(decision: Decision, name: str, candidate: Candidate) -> tuple[bool, float, str]:
    """The chosen one first, then by speed-up: seconds that an earlier decision measured are of another run."""
    return name != decision.chosen, -speed(candidate), name


def speed(candidate: Candidate) -> float:
    """The speed-up over the baseline; 0 where it was not timed."""
    return 0.0 if candidate.speedup is None else candidate.speedup.median


def under_cap(decision: Decision, cap_bytes: float, rows: int) -> tuple[str | None, str]:
    """The backend to take for `rows` rows where `cap_bytes` are free beside the logits, and why; None if none fits.

    The one that serves if it fits, else the fastest of those that passed the check and fit. Extra memory is taken to
    grow with N: its multiple of the logits stays.
    """
    logits = rows * decision.problem.vocab * decision.problem.dtype.itemsize
    timed = {name: one for name, one in decision.candidates.items() if one.measured}
    need = {name: one.extra_multiple * logits for name, one in timed.items() if one.extra_multiple is not None}
    fit = {name: number for name, number in need.items() if number <= cap_bytes}
    unknown = ", ".join(plain_line(name, 40) for name in timed if name not in need)
    note = f"; of {unknown} the memory is not known" if unknown else ""
    if decision.chosen in fit:
        return decision.chosen, f"it takes {size(fit[decision.chosen])} beside the logits and fits{note}"
    if not fit:
        return None, f"the least that one takes beside the logits is {size(min(need.values(), default=None))}{note}"
    fastest = max(fit, key=lambda name: speed(decision.candidates[name]))
    lost = f"{plain_line(decision.chosen, 40)} takes {size(need.get(decision.chosen))}"
    return fastest, f"{lost}; of those that fit it is the fastest, with {size(fit[fastest])}{note}"


# How to call it, and to measure it


def request_for(decision: Decision) -> Request | None:
    """The run that measures this decision again; None where only a call can have its options."""
    problem = decision.problem
    others = [name for name in decision.candidates if name != EAGER and name.isidentifier()]  # else not registered
    if not decision.left_out and all(map(is_built_in, others)):
        others = []
    names = tuple(map(where_from, others))
    return request_of(problem, backends=names, again=decision.is_decided)  # what is not is measured in any case


def request_of(problem: Problem, **more: Any) -> Request | None:
    """The run that measures `problem`; None where no option of the command line poses it."""
    values: dict[str, Any] = {name: getattr(problem, field) for name, field in FIELDS.items()}
    usual = Problem._field_defaults
    values = {name: (value,) for name, value in values.items() if value != usual.get(FIELDS[name])}
    if problem.hidden is not None and problem.needs_grad:
        values["weight_grad"] = (problem.weight_grad,)
    values |= {"dtypes": (short_name(problem.dtype),)}
    request = Request(problem.device_type, **values, **more)
    try:
        posed = request.problems() == [problem]
    except InputError:
        return None
    return request if posed else None  # its result has another dtype, or its rows are aligned in another way


def command(decision: Decision) -> str | None:
    """The command that measures this decision again; None where only a call can have its options."""
    request, problem = request_for(decision), decision.problem
    threads = decision.environment.get("cpu_threads")
    ours = next(one for one in environments() if one.device_type == "cpu").cpu_threads
    start = f"OMP_NUM_THREADS={threads} " if problem.device_type == "cpu" and threads != ours and threads else ""
    return None if request is None else start + request.command_line()


def where_from(name: str) -> str:
    """How the command line finds that backend: by its name or, where this process knows it, by its place."""
    target = target_of(name) if not is_built_in(name) and name in backends() else name
    return target if isinstance(target, str) else name


def snippet(problem: Problem, name: str | None) -> str:
    """How a program calls the library for `problem`."""
    of_hidden, kind = problem.hidden is not None, short_name(problem.dtype)
    call = "log_probs_from_hidden" if of_hidden else "log_probs_from_logits"
    given = ["hidden", "weight", "labels"] if of_hidden else ["logits", "labels"]
    what = f"logits: [{problem.rows}, {problem.vocab}] {kind}"
    if of_hidden:
        what = f"hidden: [{problem.rows}, {problem.hidden}], weight: [{problem.vocab}, {problem.hidden}] {kind}"
    given += ["temperature=temperature"] if problem.temperature != "none" else []
    given += [f"return_{name}=True" for name in results_of(problem)]
    given += [f"{name}=True" for name in ("masked_logits", "inplace_backward") if getattr(problem, name)]
    given += [f"{name}={name}" for name in ("bias", "softcap") if getattr(problem, name)]
    given += [] if problem.memory_limit is None else [f"memory_limit={problem.memory_limit}"]
    given += [] if problem.out_dtype.itemsize == 4 else ["out_dtype=None"]
    serves = "" if name is None else f": {plain_line(name, 40)} serves"
    lines = [f"from compiled_logprobs import {call}", "", f"# {what} on {plain_line(problem.device_type)}{serves}"]
    lines.append(f"{', '.join(('log_probs', *results_of(problem)))} = {call}({', '.join(given)})")
    return "\n".join([*lines, *(["(-log_probs.mean()).backward()"] if problem.needs_grad else [])])
