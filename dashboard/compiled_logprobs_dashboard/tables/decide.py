"""What the page Decide says: of a decision the sentence, the ranking, why the others lost, and what a memory cap
would change; of a profile, what serves each N and V.

Every figure is one of `Decision`; here they are only put into words and order.
"""

import itertools
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from compiled_logprobs.backends import BUILT_IN, EAGER, backends, target_of
from compiled_logprobs.choose.explain import candidate_figures
from compiled_logprobs.decision import MEASURED, Candidate, Decision, Speedup, speedup_in_words
from compiled_logprobs.errors import InputError
from compiled_logprobs.machine.environment import environments
from compiled_logprobs.problem import Problem, results_of, short_name
from compiled_logprobs.tuning.presets import FIELDS
from compiled_logprobs_dashboard.frames import Frames, Profile, against, published
from compiled_logprobs_dashboard.looks import UNDECIDED, looks, outcome, plain_line
from compiled_logprobs_dashboard.runs import Request

SAME = 0.05
"""Multiples of the logits; memory that differs by less is called the same."""
FAINTEST, FULL_AT = 0.35, 2.0
"""Opacity of a margin of none; the margin, as a ratio of times, from which a square is drawn in full."""
MOST_SQUARES = 100_000
MOST_ROWS, MOST_VOCABS = 40, 24
"""Squares a side that can still be told apart and hit; what is farthest from the selected shape is left out."""
SQUARE = ["rows", "vocab", "state", "backend", "margin", "opacity", "runner_up"]
SQUARE += ["speedup", "low", "high", "against", "key", "stale"]


def sentence(decision: Decision) -> str:
    """Which backend to use, how much faster it is, what memory it takes, and whether it is right. Plain text."""
    if not decision.is_decided:
        return plain_line(speedup_in_words(decision)).replace("undecided", "Undecided", 1)
    winner = decision.winner
    parts = [
        _speed(decision),
        _memory(decision),
        f"{winner.checks_passed} of {len(winner.checks)} checks" if winner.checks else "checks not stored",
    ]
    if winner.percent_of_bandwidth is not None:
        parts.append(f"{winner.percent_of_bandwidth:.0f} % of measured bandwidth")
    return f"Use {plain_line(decision.chosen, 40)}: {', '.join(parts)}"


def _speed(decision: Decision) -> str:
    winner, baseline = decision.winner, plain_line(decision.baseline, 40)
    parts = [plain_line(decision.reason)] if decision.chosen == decision.baseline else []
    if (speedup := winner.speedup_over_plain) is not None:
        parts.append(_faster(speedup, against(decision)))
    if decision.chosen != decision.baseline and winner.speedup is not None:
        beside = f"{winner.speedup.median:.2f}x {baseline}"  # the second of two figures, in brief
        parts.append(beside if parts else _faster(winner.speedup, baseline))
    return ", ".join(parts) or f"its speed against {baseline} is not known"


def _faster(speedup: Speedup, than: str) -> str:
    words = "faster than" if speedup.median >= 1 else "the speed of"
    band = "" if speedup.low is None or speedup.high is None else f" ({speedup.low:.2f} to {speedup.high:.2f})"
    return f"{speedup.median:.2f}x {words} {than}{band}"


def _memory(decision: Decision) -> str:
    mine, theirs = decision.winner.extra_multiple, decision.candidates[decision.baseline].extra_multiple
    if mine is None:
        return "extra memory not measured"
    if decision.chosen == decision.baseline or theirs is None:
        return f"{mine:.2f}x the logits of extra memory"
    baseline = plain_line(decision.baseline, 40)
    if abs(theirs - mine) < SAME:
        return f"as much memory as {baseline}"
    return f"{abs(theirs - mine):.1f}x the logits {'less' if mine < theirs else 'more'} memory"


class Figure(NamedTuple):
    """One of the four figures under the sentence."""

    label: str
    value: str
    beside: str
    """What it is to be compared with; empty where there is nothing."""
    meaning: str


def figures(decision: Decision) -> list[Figure]:
    """Time, memory, bandwidth and checks of the chosen backend."""
    winner, baseline = decision.winner, decision.candidates[decision.baseline]
    at = f" Timed with {decision.timed_in_words}." if decision.timed_in_words else ""
    is_baseline = decision.chosen == decision.baseline
    grad = ", forward and backward" if decision.problem.needs_grad else ""
    host = "" if winner.host_seconds is None else f" The host takes {duration(winner.host_seconds)} a call."
    name = plain_line(decision.baseline, 40)
    return [
        Figure(
            f"A call, N {decision.measured_rows}",
            duration(winner.seconds),
            "the baseline" if is_baseline else f"{name}: {duration(baseline.seconds)}",
            f"Median of the timed calls{grad}.{host}{at}",
        ),
        Figure(
            "Extra memory",
            size(winner.extra_bytes),
            "" if winner.extra_multiple is None else f"{winner.extra_multiple:.2f} x logits",
            f"Peak beyond the logits, results and their gradient included.{at}",
        ),
        Figure(
            "Bandwidth",
            "not measured" if winner.percent_of_bandwidth is None else f"{winner.percent_of_bandwidth:.0f} %",
            "of what was measured on this device" if winner.percent_of_bandwidth is not None else "",
            "Time that the bytes which must move take at the bandwidth measured on the device, in per cent of that "
            "of a call. Above 100 where the logits fit into its cache.",
        ),
        Figure(
            "Checks passed",
            f"{winner.checks_passed} of {len(winner.checks)}" if winner.checks else "not stored",
            "" if winner.worst_error is None else f"worst error {winner.worst_error:.0%} of its limit",
            "Sign, values and gradient against float64, before anything was timed."
            + (" The short check, as where auto measures by itself." if decision.short_check else ""),
        ),
    ]


def leaderboard(decision: Decision, among: Iterable[str] = ()) -> pd.DataFrame:
    """One row a candidate, the chosen one first, then by speed, then those that were not timed.

    `name` is as it is stored, and `backend` as it can be shown; `speedup` with `low` and `high` is over
    `frames.against`, and `ratio` over the baseline; `among` are all backends that there are, see `looks.looks`.
    """
    look = looks(decision.candidates, among)
    rows = []
    for name, candidate in sorted(decision.candidates.items(), key=lambda item: _rank(decision, *item)):
        speedup = published(decision, candidate)
        is_itself = name == decision.baseline and not decision.is_decided
        rows.append(
            {
                "name": name,
                "backend": plain_line(name, 60),
                "letter": look[name].letter,
                "outcome": _outcome(decision, candidate),
                "ms": None if candidate.seconds is None else candidate.seconds * 1e3,
                "speedup": None if speedup is None else speedup.median,
                "low": None if speedup is None else speedup.low,
                "high": None if speedup is None else speedup.high,
                "ratio": None if is_itself or candidate.speedup is None else candidate.speedup.median,
                "extra_mib": None if candidate.extra_bytes is None else candidate.extra_bytes / 2**20,
                "extra_multiple": candidate.extra_multiple,
                "percent_of_bandwidth": candidate.percent_of_bandwidth,
                "checks": f"{candidate.checks_passed} of {len(candidate.checks)}" if candidate.checks else "not run",
                "first_call_s": candidate.first_call_seconds,
                "pays_after": decision.calls_to_pay(name) if candidate.measured else None,
            }
        )
    table = pd.DataFrame(rows)
    numbers = [column for column in table if column not in ("name", "backend", "letter", "outcome", "checks")]
    return table.astype(dict.fromkeys(numbers, float))


def _outcome(decision: Decision, candidate: Candidate) -> str:
    is_open = not decision.is_decided and candidate.outcome in ("chosen", "tie")
    return UNDECIDED if is_open else outcome(candidate.outcome)


def _rank(decision: Decision, name: str, candidate: Candidate) -> tuple[bool, float, str]:
    """The chosen one first, then by speed-up: seconds that an earlier decision measured are of another run."""
    return name != decision.chosen, -speed(candidate), name


def speed(candidate: Candidate) -> float:
    """The speed-up over the baseline; 0 where it was not timed."""
    return 0.0 if candidate.speedup is None else candidate.speedup.median


def why_lost(decision: Decision) -> pd.DataFrame:
    """One row a candidate that was not chosen: what became of it, why, in the words of the tuner, and its figures."""
    rows = [
        {
            "backend": plain_line(name, 60),
            "outcome": _outcome(decision, candidate),
            "why": plain_line(candidate.reason, 500),
            "figures": candidate_figures(decision, name) or "nothing was measured",
        }
        for name, candidate in sorted(decision.candidates.items(), key=lambda item: _rank(decision, *item))
        if name != decision.chosen
    ]
    return pd.DataFrame(rows, columns=["backend", "outcome", "why", "figures"])


class WhatIf(NamedTuple):
    """What a cap on the extra memory changes."""

    name: str | None
    """Of the backend to take; None where none fits."""
    why: str


def under_cap(decision: Decision, cap_bytes: float, rows: int) -> WhatIf:
    """The backend to take for `rows` rows where at most `cap_bytes` of extra memory are free.

    The chosen one if it fits, else the fastest of those that passed the check and fit. Extra memory is taken to grow
    with N: its multiple of the logits stays.
    """
    need = needed(decision, rows)
    fit = {name: size for name, size in need.items() if size <= cap_bytes}
    unknown = [name for name, candidate in decision.candidates.items() if candidate.measured and name not in need]
    note = f" Of {', '.join(plain_line(name, 40) for name in unknown)} the memory is not known." if unknown else ""
    if decision.chosen in fit:
        return WhatIf(decision.chosen, f"it takes {size(fit[decision.chosen])} and fits.{note}")
    if not fit:
        least = min(need.values(), default=None)
        return WhatIf(None, f"none fits; the least that one takes is {size(least)}.{note}")
    fastest = max(fit, key=lambda name: speed(decision.candidates[name]))
    lost = need.get(decision.chosen)
    why = "the chosen one may not fit" if lost is None else f"{plain_line(decision.chosen, 40)} takes {size(lost)}"
    return WhatIf(fastest, f"{why}; of those that fit it is the fastest, with {size(fit[fastest])}.{note}")


def needed(decision: Decision, rows: int) -> dict[str, float]:
    """Bytes of extra memory of each candidate that was timed, for `rows` rows."""
    problem = decision.problem
    logits = rows * problem.vocab * problem.dtype.itemsize
    return {
        name: candidate.extra_multiple * logits
        for name, candidate in decision.candidates.items()
        if candidate.measured and candidate.extra_multiple is not None
    }


def command(decision: Decision) -> str | None:
    """The command that measures this decision again; None where only a call can have its options."""
    problem = decision.problem
    others = [name for name in decision.candidates if name != EAGER and name.isidentifier()]  # else not registered
    if not decision.left_out and all(name in BUILT_IN for name in others):
        others = []
    values: dict[str, Any] = {name: getattr(problem, field) for name, field in FIELDS.items()}
    usual = Problem._field_defaults
    values = {name: (value,) for name, value in values.items() if value != usual.get(FIELDS[name])}
    if problem.hidden is not None and problem.needs_grad:
        values["weight_grad"] = (problem.weight_grad,)
    values |= {"dtypes": (short_name(problem.dtype),), "backends": tuple(map(where_from, others))}
    request = Request(problem.device_type, again=decision.is_decided, **values)  # what is not is measured in any case
    try:
        if request.problems() != [problem]:  # its result has another dtype, or its rows are aligned in another way
            return None
    except InputError:
        return None
    threads = decision.environment.get("cpu_threads")
    ours = next(one for one in environments() if one.device_type == "cpu").cpu_threads
    start = f"OMP_NUM_THREADS={threads} " if problem.device_type == "cpu" and threads != ours and threads else ""
    return start + request.command_line()


def where_from(name: str) -> str:
    """How the command line finds that backend: by its name or, where this process knows it, by its place."""
    target = target_of(name) if name not in BUILT_IN and name in backends() else name
    return target if isinstance(target, str) else name


def of_others(decision: Decision) -> list[str]:
    """Names in `command` of which only the program that registered them knows where they come from."""
    names = [name for name in decision.candidates if name.isidentifier() and name not in BUILT_IN]
    return [name for name in names if where_from(name) == name]


def snippet(problem: Problem, name: str | None) -> str:
    """How a program calls the library for `problem`."""
    options = [
        "temperature=temperature" if problem.temperature != "none" else "",
        *(f"return_{name}=True" for name in results_of(problem)),
        "masked_logits=True" if problem.masked_logits else "",
        "inplace_backward=True" if problem.inplace_backward else "",
        "" if problem.out_dtype.itemsize == 4 else "out_dtype=None",
    ]
    arguments = ", ".join(["logits", "labels", *(option for option in options if option)])
    result = ", ".join(("log_probs", *results_of(problem)))
    takes = "" if name is None else f"  # takes {plain_line(name, 40)} for this shape"
    shape = (
        f"# logits: [{problem.rows}, {problem.vocab}] {short_name(problem.dtype)} on {plain_line(problem.device_type)}"
    )
    after = ["(-log_probs.mean()).backward()"] if problem.needs_grad else []
    return "\n".join(
        [
            "from compiled_logprobs import log_probs_from_logits",
            "",
            shape,
            f"{result} = log_probs_from_logits({arguments}){takes}",
            *after,
        ]
    )


def age(measured_at: str, now: Any) -> str:
    """How long ago that was, in words; empty where it is not known."""
    then = pd.to_datetime(measured_at, format="%Y-%m-%dT%H:%M:%SZ", utc=True, errors="coerce")
    if pd.isna(then):
        return ""
    days = (now - then).days
    return "today" if days < 1 else f"{days} day{'' if days == 1 else 's'} ago"


def duration(seconds: float | None) -> str:
    """In the unit that suits it."""
    if seconds is None or not math.isfinite(seconds):
        return "not measured"
    for unit, factor in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= factor:
            return f"{seconds / factor:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def size(number: float | None) -> str:
    """Bytes, in the unit that suits them."""
    if number is None or not math.isfinite(number):
        return "not measured"
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(number) >= factor:
            return f"{number / factor:.3g} {unit}"
    return f"{number:.0f} bytes"


# The winner map


def winners(frames: Frames, profile: Profile, mode: str, dtype: str) -> pd.DataFrame:
    """One row for each pair of an N and a V that occur in a profile, with that mode and dtype.

    Returns:
        The columns `SQUARE`. state: "won", "tie" (another cannot be told from it), "alone" (nothing else got through),
        "undecided" or "unmeasured"; backend, which won; margin, its speed-up over the runner-up's; opacity, from that;
        speedup over `against` with low and high; key of the decision. What is unmeasured has no more than rows and
        vocab, and is left out where there would be more than `MOST_SQUARES`: a few thousand decisions, each of an N and
        a V of its own, make millions.
    """
    decided = frames.of(profile)
    decided = decided[(decided["mode"] == mode) & (decided["dtype"] == dtype)]
    # Options that have no name beside the mode's cannot differ: the mode says all of them. Alignment follows from V.
    decided = decided.drop_duplicates(["rows", "vocab"], keep="first")
    if decided.empty:
        return pd.DataFrame(columns=SQUARE)
    timed = frames.candidates[frames.candidates["key"].isin(decided["key"])]
    timed = timed[timed["outcome"].isin(MEASURED)]
    chosen = timed[timed["chosen"]].set_index("key")
    # By the speed-up, a ratio within rounds: seconds of a candidate that an earlier decision measured are of another
    # run.
    others = timed[~timed["chosen"]].assign(parted=timed["outcome"] != "tie")
    others = others.sort_values(["parted", "ratio"], ascending=[True, False], kind="stable")
    second = others.drop_duplicates("key").set_index("key")

    table = decided[["rows", "vocab", "key", "chosen", "against", "stale"]].rename(columns={"chosen": "backend"})
    for column, name in (("speedup", "speedup"), ("speedup_low", "low"), ("speedup_high", "high")):
        table[name] = table["key"].map(chosen[column])
    table["runner_up"] = table["key"].map(second["backend"])
    table["margin"] = table["key"].map(chosen["ratio"]) / table["key"].map(second["ratio"])
    tied = table["key"].isin(others.loc[~others["parted"], "key"])
    table["state"] = np.select([tied, table["runner_up"].isna()], ["tie", "alone"], default="won")
    is_open = ~table["key"].map(decided.set_index("key")["is_decided"])
    table.loc[is_open, "state"] = "undecided"
    table.loc[is_open, ["backend", "speedup", "low", "high", "margin"]] = None
    table["opacity"] = opacity(table["margin"])
    across, up = (sorted(table[column].unique()) for column in ("rows", "vocab"))
    if len(across) * len(up) > MOST_SQUARES:
        return table[SQUARE].reset_index(drop=True)
    everywhere = pd.MultiIndex.from_tuples(itertools.product(across, up), names=["rows", "vocab"])
    whole = table.set_index(["rows", "vocab"]).reindex(everywhere).reset_index()
    whole["state"] = whole["state"].fillna("unmeasured")
    return whole[SQUARE]


def opacity(margin: "pd.Series[float]") -> "pd.Series[float]":
    """From `FAINTEST`, for no margin, to 1, for `FULL_AT` and more; as much for an unknown one as for none."""
    share = np.log(margin.clip(lower=1.0, upper=FULL_AT)) / np.log(FULL_AT)
    return FAINTEST + (1 - FAINTEST) * share.fillna(0.0)


def around(table: pd.DataFrame, rows: int, vocab: int) -> pd.DataFrame:
    """The part of `winners` that is nearest to a shape, where it is too large to be drawn."""
    for column, value, most in (("rows", rows, MOST_ROWS), ("vocab", vocab, MOST_VOCABS)):
        values = table[column].unique()
        if len(values) > most:
            near = sorted(values, key=lambda other: abs(np.log(max(other, 1) / max(value, 1))))[:most]
            table = table[table[column].isin(near)]
    return table.reset_index(drop=True)


def map_in_words(table: pd.DataFrame) -> str:
    """How many squares each backend serves, as the map's text."""
    if table.empty:
        return "Nothing was measured in this mode and dtype."
    measured = ", ".join(f"{plain_line(name)} {count}" for name, count in table["backend"].value_counts().items())
    names = {"tie": "Ties, drawn hollow", "undecided": "Undecided", "unmeasured": "Not measured, drawn grey"}
    counts = table["state"].value_counts()
    apart = "".join(f" {name}: {counts[state]}." for state, name in names.items() if state in counts)
    squares = f"{len(table)} square{'' if len(table) == 1 else 's'}"
    return f"Winner by N and V, {squares}{': ' if measured else ''}{measured}.{apart}"
