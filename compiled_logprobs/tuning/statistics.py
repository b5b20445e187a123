"""Choosing by paired rounds: which candidate, if any, is clearly faster than the baseline, and when to stop measuring.

Times are compared within a round, as logarithms of ratios: what slows a whole round down cancels. Medians and
intervals of these come from order statistics, so nothing is assumed about how the noise is distributed, and one round
with a hiccup counts no more than any other.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import median
from typing import NamedTuple

from compiled_logprobs.backends import BUILT_IN, BUILT_IN_FROM_HIDDEN, EAGER
from compiled_logprobs.decision import MARGIN, Candidate, Speedup

ALPHA = 0.01
"""The chance that any interval of one tuning, of a candidate against the baseline at any of the looks, misses its true
median."""
LOOKS = (20, 40, 80, 160, 320, 640, 1280)
"""After how many rounds the times are looked at; each look costs a share of `ALPHA`."""
MOST, EVER = 0.7, 0.4
"""To replace the baseline or the incumbent, a candidate that is not clearly faster has to be faster by the margin in
this share of the rounds, or in this share of its own than the other ever was: under heavy noise, a quarter of the
rounds of equal candidates lies beyond the margin too often."""

BEHIND, BEHIND_ROUNDS, BEHIND_SURE = 1.25, (8, 12), 0.99
"""How many times as long as another a candidate has to take, both in so many first rounds and in all of so many or
more, with intervals that are so sure of themselves, to be timed no further. A bad start alone costs nobody a place."""


class Interval(NamedTuple):
    """A median and the ends of its confidence interval, infinite where the rounds are too few to give any."""

    low: float
    median: float
    high: float


@dataclass(frozen=True)
class Selection:
    """What was chosen, and why."""

    chosen: str
    code: str
    """ONLY_ONE, FASTER_CLEAR, TIE_INCUMBENT, TIE_SIMPLEST, TIE_LEAST_MEMORY, TIE_BY_NAME, INCUMBENT_IN_DOUBT,
    BASELINE_NO_CLEAR_GAIN or LEAST_REGRET."""
    reason: str
    verdicts: dict[str, Candidate]
    """Outcome, reason, and speed-up over the baseline of each, the baseline among them."""
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
    return _speedup(interval(logs, _confidence(candidates)))


def fewest_rounds(candidates: int) -> int:
    """How many rounds it takes before any of `candidates`, the baseline included, can be chosen over the baseline."""
    miss = 1.0 - _confidence(candidates)
    return next(rounds for rounds in range(1, 1024) if _rank(rounds, miss) > 0)


def far_behind(times: Mapping[str, Sequence[float]], keep: str | None = None) -> dict[str, str]:
    """Candidates that no round can save, each with one that is far ahead of it: their time is better spent on telling
    the others apart. Never the first, which is the baseline, nor `keep`, nor the fastest of the others."""
    baseline, *others = times
    first, least = BEHIND_ROUNDS
    if len(times[baseline]) < least or len(others) < 2:
        return {}
    logs = {name: [math.log(seconds) for seconds in series] for name, series in times.items()}
    in_order = sorted(logs, key=lambda name: median(logs[name]))
    fastest, kept = in_order[0], {baseline, keep, next(name for name in in_order if name != baseline)}

    def is_behind(name: str) -> bool:
        differences = [a - b for a, b in zip(logs[name], logs[fastest], strict=True)]
        return all(interval(part, BEHIND_SURE).low > math.log(BEHIND) for part in (differences[:first], differences))

    return {name: fastest for name in others if name not in kept and is_behind(name)}


def select(
    times: Mapping[str, Sequence[float]],
    *,
    incumbent: str | None = None,
    extra_bytes: Mapping[str, int | None] | None = None,
    final: bool = False,
) -> Selection | None:
    """Choose by the rounds so far.

    A candidate may replace the baseline if its whole interval is faster by the margin. Of those that may, the one of
    the smallest median leads; those whose interval against the leader does not exclude the margin tie with it, and of
    these the incumbent is chosen, else the simplest, of equally simple ones that of the least memory, and of those that
    take as much, within the margin, the first by name. An incumbent that the rounds do not tell from the baseline, but
    that is the faster of the two by its median, counts as one that may.

    What the rounds do not settle in the end is settled by least regret. Of the candidates that are not clearly slower
    than another, the one with the best lower quartile is chosen, unless it is within the margin of what would be chosen
    otherwise: another process, or memory that is handed out, only adds to a time, and may do so in every second round.
    To replace the baseline or the incumbent, it has to be faster by the margin in `MOST` of the rounds, too, or in
    `EVER` of its own than the other ever was.

    Args:
        times: seconds, by candidate and round; the same rounds for all. Only of candidates that ran in every round. The
            first is the baseline.
        incumbent: the candidate that has served so far, which only a clear win replaces.
        extra_bytes: peak memory; what is unknown counts as the most.
        final: no further round will come; this takes the place of the looks that are left.

    Returns:
        None to go on measuring: no look is due, or the rounds do not settle the choice and more are to come.
    """
    baseline = next(iter(times))
    rounds = len(times[baseline])
    if not final and rounds not in LOOKS and rounds < LOOKS[-1]:
        return None
    final = final or rounds >= LOOKS[-1]
    bench = _Bench(times, baseline)
    ties = _Ties(incumbent, extra_bytes or {})
    clear = [name for name in times if name != baseline and bench.is_faster(name, than=baseline)]
    if incumbent is not None and incumbent in times and bench.is_in_doubt(incumbent):
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
    by_rounds, settled = chosen, not open_
    if not settled:
        chosen = bench.least_regret(by_rounds, in_most=by_rounds in (baseline, incumbent))
    if chosen != by_rounds:
        open_ = [name for name in times if name != chosen and not bench.is_faster(chosen, than=name)]
    if not settled and (chosen == baseline or chosen != by_rounds):
        code, reason = "LEAST_REGRET", _why_least_regret(chosen, bench, open_)
    else:
        # Of what is open nothing else is known.
        code, reason = _why(chosen, bench, ties, [name for name in tied if name not in (*open_, chosen)], open_)
    verdicts = {name: _verdict(name, chosen, bench, name in open_, reason) for name in times}
    return Selection(chosen, code, reason, verdicts, rounds, settled)


class _Bench:
    """Paired comparisons of any two candidates."""

    def __init__(self, times: Mapping[str, Sequence[float]], baseline: str) -> None:
        self.baseline, self.rounds, self.is_alone = baseline, len(times[baseline]), len(times) == 1
        self._logs = {name: [math.log(seconds) for seconds in series] for name, series in times.items()}
        self._confidence = _confidence(len(times))
        self._margin = math.log1p(MARGIN)
        self._compared: dict[tuple[str, str], Interval] = {}

    def compare(self, name: str, other: str) -> Interval:
        """Of the logarithm of `name`'s time over `other`'s: below 0 is faster."""
        if (name, other) not in self._compared:
            differences = [a - b for a, b in zip(self._logs[name], self._logs[other], strict=True)]
            self._compared[name, other] = interval(differences, self._confidence)
        return self._compared[name, other]

    def is_faster(self, name: str, *, than: str) -> bool:
        """Clearly, by the margin."""
        return self.compare(name, than).high < -self._margin

    def may_be_faster(self, name: str, *, than: str) -> bool:
        """Whether the rounds so far leave it possible by the margin."""
        return self.compare(name, than).low < -self._margin

    def least_regret(self, otherwise: str, *, in_most: bool) -> str:
        """The candidate with the best lower quartile of those that no other is clearly faster than; `otherwise`, where
        that is within the margin of it, or, if so asked, faster or within it in too many of the rounds."""
        standing = [
            name
            for name in self._logs
            if not any(self.is_faster(other, than=name) for other in self._logs if other != name)
            and self.may_be_faster(name, than=otherwise)
            and self._low(name) < self._low(otherwise) - self._margin
            and (not in_most or self._is_in_most(name, otherwise))
        ]
        return min(standing, key=self._low, default=otherwise)

    def _low(self, name: str) -> float:
        """The lower quartile."""
        return sorted(self._logs[name])[(self.rounds - 1) // 4]

    def _is_in_most(self, name: str, other: str) -> bool:
        """Whether `name` was faster by the margin in `MOST` of the rounds, or in `EVER` of them than the other ever."""
        ours, theirs = self._logs[name], self._logs[other]
        wins = sum(a - b < -self._margin for a, b in zip(ours, theirs, strict=True))
        beyond = sum(a < min(theirs) - self._margin for a in ours)
        return wins >= MOST * self.rounds or beyond >= EVER * self.rounds

    def is_in_doubt(self, name: str) -> bool:
        """Whether `name` was faster than the baseline, and may be by the margin, but not clearly."""
        compared = self.compare(name, self.baseline)
        return compared.median < 0.0 and compared.low < -self._margin <= compared.high


class _Ties:
    """Which of candidates that tie to choose, and by what it stands out.

    Plain torch is the simplest, then come the others of the package as they are listed. Third parties' are all equally
    simple, in whatever order they were registered.
    """

    def __init__(self, incumbent: str | None, extra_bytes: Mapping[str, int | None]) -> None:
        self._incumbent, self._extra_bytes = incumbent, extra_bytes
        in_order = sorted((*BUILT_IN, *BUILT_IN_FROM_HIDDEN), key=lambda name: name != EAGER)
        self._simplicity = {name: rank for rank, name in enumerate(in_order)}

    def preferred(self, names: Sequence[str]) -> str:
        if self._incumbent is not None and self._incumbent in names:
            return self._incumbent
        least = min(map(self._rank, names))
        simplest = [name for name in names if self._rank(name) == least]
        room = (1.0 + MARGIN) * min(map(self._bytes, simplest))
        return min(name for name in simplest if self._bytes(name) <= room)

    def code(self, chosen: str, others: Sequence[str]) -> tuple[str, str]:
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


def _confidence(candidates: int) -> float:
    """Of one interval, so that all of them together, at all looks, keep to `ALPHA`."""
    return 1.0 - ALPHA / (max(1, candidates - 1) * len(LOOKS))


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


def _why(chosen: str, bench: _Bench, ties: _Ties, tied: list[str], open_: list[str]) -> tuple[str, str]:
    """Of `chosen`, in one word and in a sentence."""
    baseline, unknown = bench.baseline, f"{bench.rounds} rounds do not tell whether"
    if bench.is_alone:
        return "ONLY_ONE", f"nothing but {chosen} could be measured"
    if chosen == baseline:
        return "BASELINE_NO_CLEAR_GAIN", f"nothing is faster than {baseline} by {MARGIN:.0%}"
    still = f"; {unknown} {', '.join(open_)} is faster still" if open_ else ""
    if bench.is_in_doubt(chosen):
        reason = f"served so far, and {unknown} it is still faster than {baseline} by {MARGIN:.0%}"
        return "INCUMBENT_IN_DOUBT", reason + still
    if not tied:
        best = "" if open_ else ", and the fastest of all"
        return "FASTER_CLEAR", f"clearly faster than {baseline}, by more than {MARGIN:.0%}{best}{still}"
    code, why = ties.code(chosen, tied)
    return code, f"clearly faster than {baseline}; as fast as {', '.join(tied)} within {MARGIN:.0%}, and {why}{still}"


def _why_least_regret(chosen: str, bench: _Bench, open_: list[str]) -> str:
    """The same sentence, where the rounds do not settle the choice."""
    others, baseline = ", ".join(open_), bench.baseline
    if chosen == baseline:
        what = f"whether {others} is faster than {baseline} by {MARGIN:.0%}, and nothing is in most of them"
    else:
        what = f"{chosen} from {others}, and {chosen} has the best lower quartile"
    return f"settled by least regret, not by the rounds: {bench.rounds} rounds do not tell {what}"


def _verdict(name: str, chosen: str, bench: _Bench, is_open: bool, reason: str) -> Candidate:
    speedup = Speedup(1.0, 1.0, 1.0) if name == bench.baseline else _speedup(bench.compare(name, bench.baseline))
    if name == chosen:
        return Candidate("chosen", reason, speedup=speedup)
    if bench.is_faster(chosen, than=name):
        return Candidate("slower", f"slower than {chosen} by more than {MARGIN:.0%}", speedup=speedup)
    if is_open:
        reason = f"the rounds do not tell it from {chosen}"
    elif bench.may_be_faster(chosen, than=name):
        reason = f"not faster than {chosen} by {MARGIN:.0%}"
    else:
        reason = f"as fast as {chosen}, within {MARGIN:.0%}"
    return Candidate("tie", reason, speedup=speedup)


def _speedup(log_ratio: Interval) -> Speedup:
    """Of the logarithm of a time over another's: the ends change places with the sign."""
    low, middle, high = (math.exp(-end) for end in reversed(log_ratio))
    bounded = low > 0.0 and math.isfinite(high)
    return Speedup(low if bounded else None, middle, high if bounded else None)
