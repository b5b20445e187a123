"""Choosing by paired rounds: which candidate, if any, is clearly faster than the baseline, and when to stop measuring.

All times are compared within a round, as logarithms of ratios: what slows a whole round down cancels. Medians and
intervals of these come from order statistics, so nothing is assumed about how the noise is distributed, and one round
with a hiccup counts no more than any other.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import median
from typing import Literal, NamedTuple

from compiled_logprobs.decision import Outcome, Speedup
from compiled_logprobs.errors import InputError

ALPHA = 0.01
"""The chance that any interval of one tuning, of a candidate against the baseline at any of the looks, misses its true
median."""
LOOKS = (20, 40, 80, 160, 320, 640, 1280)
"""After how many rounds the times are looked at; each look costs a share of `ALPHA`."""
MARGIN = 0.03
"""How much faster than the baseline a candidate has to be: what is less is not worth another backend. And how much less
memory one of two has to take, for it to be the one that takes less."""

Code = Literal[
    "ONLY_ONE",
    "FASTER_CLEAR",
    "TIE_INCUMBENT",
    "INCUMBENT_IN_DOUBT",
    "TIE_SIMPLEST",
    "TIE_LEAST_MEMORY",
    "TIE_BY_NAME",
    "BASELINE_NO_CLEAR_GAIN",
    "AMBIGUOUS_AT_BUDGET",
]


class Interval(NamedTuple):
    """A median and the ends of its confidence interval, infinite where the rounds are too few to give any."""

    low: float
    median: float
    high: float


@dataclass(frozen=True)
class Verdict:
    """What became of one candidate."""

    outcome: Outcome
    """Chosen, slower or tie."""
    speedup: Speedup
    """Over the baseline."""
    reason: str


@dataclass(frozen=True)
class Selection:
    """What was chosen, and why."""

    chosen: str
    code: Code
    reason: str
    verdicts: dict[str, Verdict]
    """One a candidate, the baseline among them."""
    rounds: int
    settled: bool
    """Whether more rounds could not have changed the choice, as far as the intervals tell."""


def interval(log_ratios: Sequence[float], confidence: float) -> Interval:
    """The median, and the narrowest pair of order statistics that holds the true one with at least `confidence`."""
    ordered = sorted(log_ratios)
    rank = _rank(len(ordered), 1.0 - confidence)
    if rank == 0:
        return Interval(-math.inf, median(ordered) if ordered else math.nan, math.inf)
    return Interval(ordered[rank - 1], median(ordered), ordered[-rank])


def speedup_over(others: Sequence[float], times: Sequence[float], candidates: int) -> Speedup:
    """How many times as fast `times` are as `others`, paired by round.

    The interval is as sure as each of those by which one of so many candidates is chosen.
    """
    logs = [math.log(ours) - math.log(theirs) for ours, theirs in zip(times, others, strict=True)]
    return _speedup(interval(logs, _confidence(candidates, LOOKS)))


def fewest_rounds(candidates: int, *, looks: Sequence[int] = LOOKS) -> int:
    """How many rounds it takes before any of `candidates`, the baseline included, can be chosen over the baseline."""
    miss = 1.0 - _confidence(candidates, looks)
    return next(rounds for rounds in range(1, 1024) if _rank(rounds, miss) > 0)


def look(
    times: Mapping[str, Sequence[float]],
    *,
    baseline: str,
    incumbent: str | None = None,
    simplicity: Mapping[str, int] | None = None,
    extra_bytes: Mapping[str, int | None] | None = None,
    looks: Sequence[int] = LOOKS,
    final: bool = False,
) -> Selection | None:
    """Choose by the rounds so far.

    A candidate may replace the baseline if its whole interval is faster by the margin. Of those that may, the one of
    the smallest median leads; those whose interval against the leader does not exclude the margin tie with it, and of
    these the incumbent is chosen, else the simplest, of equally simple ones that of the least memory, and of those that
    take as much, within the margin, the first by name. An incumbent that the rounds do not tell from the baseline, but
    that is the faster of the two by its median, counts as one that may.

    Args:
        times: seconds, by candidate and round; the same rounds for all. Only of candidates that ran in every round.
        baseline: the candidate that is kept in doubt.
        incumbent: the candidate that has served so far, which only a clear win replaces.
        simplicity: the lower, the simpler; candidates that are not named come last, all equally simple.
        extra_bytes: peak memory; what is unknown counts as the most.
        looks: the numbers of rounds at which this is asked, planned beforehand.
        final: no further round will come; this takes the place of the looks that are left.

    Returns:
        None to go on measuring: no look is due, or the rounds do not settle the choice and more are to come.
    """
    rounds = _rounds(times, baseline)
    if not final and rounds not in looks and rounds < looks[-1]:
        return None
    final = final or rounds >= looks[-1]
    bench = _Bench(times, baseline, _confidence(len(times), looks))
    ties = _Ties(incumbent, simplicity or {}, extra_bytes or {})
    clear = [name for name in times if name != baseline and bench.is_faster(name, than=baseline)]
    if incumbent is not None and incumbent in times and bench.is_in_doubt(incumbent, baseline):
        if not final:
            return None
        clear.append(incumbent)

    chosen, tied = baseline, [baseline]
    if clear:
        leader = min(clear, key=lambda name: bench.compare(name, baseline).median)
        tied = [name for name in clear if name == leader or not bench.is_faster(leader, than=name)]
        chosen = ties.preferred(tied)

    # What is still open matters only where it could change the choice: a candidate that may be faster than the chosen
    # one by the margin, or one that would be preferred to it if it proves to be faster than the baseline.
    open_ = [
        name
        for name in times
        if name != chosen
        and (
            bench.may_be_faster(name, than=chosen)
            or (
                name not in (*tied, baseline)
                and ties.preferred([name, chosen]) == name
                and bench.may_be_faster(name, than=baseline)
                and not bench.is_faster(chosen, than=name)
            )
        )
    ]
    if open_ and not final:
        return None
    code, reason = _why(chosen, baseline, ties, tied, open_, rounds)
    if chosen == incumbent and chosen != baseline and bench.is_in_doubt(chosen, baseline):
        code = "INCUMBENT_IN_DOUBT"
        reason = (
            f"served so far, and {rounds} rounds do not tell whether it is still faster than {baseline} by {MARGIN:.0%}"
        )
    if len(times) == 1:
        code, reason = "ONLY_ONE", f"nothing but {chosen} could be measured"
    elif open_ and chosen != baseline:
        reason += f"; {rounds} rounds do not tell whether {', '.join(open_)} is faster still"
    verdicts = {name: _verdict(name, chosen, baseline, bench, name in open_, reason) for name in times}
    return Selection(chosen, code, reason, verdicts, rounds, settled=not open_)


class _Bench:
    """Paired comparisons of any two candidates."""

    def __init__(self, times: Mapping[str, Sequence[float]], baseline: str, confidence: float) -> None:
        self._logs = {name: [math.log(seconds) for seconds in series] for name, series in times.items()}
        self._confidence = confidence
        self._margin = math.log1p(MARGIN)
        self._known: dict[tuple[str, str], Interval] = {}

    def compare(self, name: str, other: str) -> Interval:
        """Of the logarithm of `name`'s time over `other`'s: below 0 is faster."""
        if (name, other) not in self._known:
            differences = [a - b for a, b in zip(self._logs[name], self._logs[other], strict=True)]
            self._known[name, other] = interval(differences, self._confidence)
        return self._known[name, other]

    def is_faster(self, name: str, *, than: str) -> bool:
        """Clearly, by the margin."""
        return self.compare(name, than).high < -self._margin

    def may_be_faster(self, name: str, *, than: str) -> bool:
        """Whether the rounds so far leave it possible by the margin."""
        return self.compare(name, than).low < -self._margin

    def is_in_doubt(self, name: str, baseline: str) -> bool:
        """Whether `name` was the faster of the two, and may be by the margin, but not clearly."""
        may_be = self.may_be_faster(name, than=baseline) and not self.is_faster(name, than=baseline)
        return may_be and self.compare(name, baseline).median < 0.0


class _Ties:
    """Which of candidates that tie to choose, and by what it stands out."""

    def __init__(
        self, incumbent: str | None, simplicity: Mapping[str, int], extra_bytes: Mapping[str, int | None]
    ) -> None:
        self._incumbent, self._simplicity, self._extra_bytes = incumbent, simplicity, extra_bytes

    def preferred(self, names: Sequence[str]) -> str:
        if self._incumbent is not None and self._incumbent in names:
            return self._incumbent
        least = min(map(self._rank, names))
        simplest = [name for name in names if self._rank(name) == least]
        room = (1.0 + MARGIN) * min(map(self._bytes, simplest))
        return min(name for name in simplest if self._bytes(name) <= room)

    def code(self, chosen: str, others: Sequence[str]) -> tuple[Code, str]:
        """Why `chosen` is preferred to `others`, in one word and in a few."""
        if chosen == self._incumbent:
            return "TIE_INCUMBENT", "served so far"
        as_simple = [name for name in others if self._rank(name) == self._rank(chosen)]
        if not as_simple:
            return "TIE_SIMPLEST", "simpler"
        if all(self._bytes(name) > (1.0 + MARGIN) * self._bytes(chosen) for name in as_simple):
            return "TIE_LEAST_MEMORY", "of those that are as simple it takes the least memory"
        return "TIE_BY_NAME", "none of them is known to be simpler or to take less memory, and it comes first by name"

    def _rank(self, name: str) -> float:
        return self._simplicity.get(name, math.inf)

    def _bytes(self, name: str) -> float:
        size = self._extra_bytes.get(name)
        return math.inf if size is None else size


def _rounds(times: Mapping[str, Sequence[float]], baseline: str) -> int:
    if baseline not in times:
        raise InputError(
            f"got times of {', '.join(times) or 'nothing'} with {baseline!r} as the baseline; "
            "a candidate that ran in every round is valid. Name one of them, or measure the baseline too."
        )
    counts = {name: len(series) for name, series in times.items()}
    if len(set(counts.values())) > 1:
        raise InputError(
            f"got different numbers of rounds ({', '.join(f'{name}: {n}' for name, n in counts.items())}); "
            "times of the same rounds are valid. Leave out the candidates that failed in one."
        )
    return counts[baseline]


def _confidence(candidates: int, looks: Sequence[int]) -> float:
    """Of one interval, so that all of them together keep to `ALPHA`."""
    return 1.0 - ALPHA / (max(1, candidates - 1) * len(looks))


@lru_cache(maxsize=1024)
def _rank(count: int, miss: float) -> int:
    """The largest r whose r-th smallest and r-th largest of `count` hold the median but for `miss`; 0 if none.

    The true median lies below the r-th smallest if fewer than r fall below it, each by the toss of a coin.
    """
    below = 0
    for rank in range(count // 2 + 1):
        below += math.comb(count, rank)
        if 2 * below / 2**count > miss:  # integers, divided exactly
            return rank
    return count // 2


def _why(
    chosen: str,
    baseline: str,
    ties: _Ties,
    tied: list[str],
    open_: list[str],
    rounds: int,
) -> tuple[Code, str]:
    tied = [name for name in tied if name not in open_]  # of the others nothing is known
    others = [name for name in tied if name != chosen]
    if chosen == baseline and open_:
        return (
            "AMBIGUOUS_AT_BUDGET",
            f"{rounds} rounds do not tell whether {', '.join(open_)} is faster than {baseline} by {MARGIN:.0%}",
        )
    if chosen == baseline:
        return "BASELINE_NO_CLEAR_GAIN", f"nothing is faster than {baseline} by {MARGIN:.0%}"
    if not others:
        best = "" if open_ else ", and the fastest of all"
        return "FASTER_CLEAR", f"clearly faster than {baseline}, by more than {MARGIN:.0%}{best}"
    code, why = ties.code(chosen, others)
    return code, f"clearly faster than {baseline}; as fast as {', '.join(others)} within {MARGIN:.0%}, and {why}"


def _verdict(name: str, chosen: str, baseline: str, bench: _Bench, is_open: bool, reason: str) -> Verdict:
    speedup = Speedup(1.0, 1.0, 1.0) if name == baseline else _speedup(bench.compare(name, baseline))
    if name == chosen:
        return Verdict("chosen", speedup, reason)
    if bench.is_faster(chosen, than=name):
        return Verdict("slower", speedup, f"slower than {chosen} by more than {MARGIN:.0%}")
    if is_open:
        return Verdict("tie", speedup, f"the rounds do not tell it from {chosen}")
    if bench.may_be_faster(chosen, than=name):
        return Verdict("tie", speedup, f"not faster than {chosen} by {MARGIN:.0%}")
    return Verdict("tie", speedup, f"as fast as {chosen}, within {MARGIN:.0%}")


def _speedup(log_ratio: Interval) -> Speedup:
    """Of the logarithm of a time over another's: the ends change places with the sign."""
    low, middle, high = (math.exp(-end) for end in reversed(log_ratio))
    bounded = low > 0.0 and math.isfinite(high)
    return Speedup(low if bounded else None, middle, high if bounded else None)
