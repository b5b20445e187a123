"""One decision from those that several ranks made of the same problem, on the times of the slowest.

Ranks that work together wait for the last of them. So a candidate takes in each round what it took on the rank where it took
longest in its round of that number, and the choice is made by these times as it is on one device.
"""

import dataclasses
import math
from collections.abc import Mapping
from statistics import median

from compiled_logprobs.decision import Candidate, Decision, Evidence
from compiled_logprobs.tuning.statistics import look
from compiled_logprobs.tuning.tuner import TuningFailed, simplicity, speedup_of

Times = dict[str, list[float]]


def on_the_slowest(found: Mapping[int, tuple[Decision, Evidence]], incumbent: str | None) -> tuple[Decision, Evidence]:
    """The decision by all in `found`, given by rank, and what it rests on.

    Where ranks had time or memory for different N, times are taken in proportion, for the least of these N. Of ranks that
    took different numbers of rounds, the first rounds count, as many as all have. A candidate that came to nothing on one
    rank comes to that. What the check found of a candidate is from the rank whose verdict counts.

    Raises:
        TuningFailed: the baseline is not the same on all.
    """
    first, alone = next(iter(found.values()))
    if len(found) == 1:
        return first, alone
    baselines = {rank: decision.baseline for rank, (decision, _) in found.items()}
    if len(set(baselines.values())) > 1:
        told = ", ".join(f"{name} on rank {rank}" for rank, name in baselines.items())
        raise TuningFailed(f"what others are compared with could not be measured everywhere, and is {told}")

    rows = min(decision.measured_rows for decision, _ in found.values())
    rounds = min(decision.rounds for decision, _ in found.values())
    by_rank = {
        rank: {
            name: [s * rows / decision.measured_rows for s in series[:rounds]]
            for name, series in evidence.seconds.items()
        }
        for rank, (decision, evidence) in found.items()
    }
    everywhere = [name for name in alone.seconds if all(name in times for times in by_rank.values())]
    slowest = {name: list(map(max, *(times[name] for times in by_rank.values()))) for name in everywhere}
    candidates, cases = {}, {}
    for name in first.candidates:
        fates = {rank: decision.candidates[name] for rank, (decision, _) in found.items()}
        rank = _slowest_rank(name, by_rank)
        candidates[name] = _fate(name, fates, rank, by_rank)
        if name in found[rank][1].cases:
            cases[name] = found[rank][1].cases[name]
    selection = look(
        slowest,
        baseline=first.baseline,
        incumbent=incumbent,
        simplicity=simplicity(),
        extra_bytes={name: candidates[name].extra_bytes for name in everywhere},
        final=True,
    )
    assert selection is not None
    for name, verdict in selection.verdicts.items():
        candidates[name] = dataclasses.replace(
            candidates[name],
            outcome=verdict.outcome,
            reason=verdict.reason,
            speedup=speedup_of(verdict.speedup),
            seconds=median(slowest[name]),
        )
    every = [decision for decision, _ in found.values()]
    decision = dataclasses.replace(
        first,
        chosen=selection.chosen,
        code=selection.code,
        reason=f"{selection.reason}; on the slowest of {len(found)} devices",
        candidates=candidates,
        rounds=selection.rounds,
        settled=selection.settled,
        measured_rows=rows,
        proven_rows=min(one.proven_rows for one in every),
        checked_rows=min(one.checked_rows for one in every),
        tuning_seconds=max(one.tuning_seconds for one in every),
    )
    return decision, Evidence(decision.seed, decision.measured_at, slowest, cases)


def _slowest_rank(name: str, times: Mapping[int, Times]) -> int:
    """Where a candidate fared worst: where it was not timed, else where it took longest."""
    return max(times, key=lambda rank: median(times[rank][name]) if name in times[rank] else math.inf)


def _fate(name: str, fates: Mapping[int, Candidate], rank: int, times: Mapping[int, Times]) -> Candidate:
    """What became of a candidate, given the rank on which it fared worst."""
    if name not in times[rank]:
        return dataclasses.replace(fates[rank], reason=f"rank {rank}: {fates[rank].reason}")
    largest = max(fates.values(), key=lambda one: one.extra_bytes or 0)
    return dataclasses.replace(
        fates[rank],
        extra_bytes=None if None in [one.extra_bytes for one in fates.values()] else largest.extra_bytes,
        extra_multiple=None if None in [one.extra_multiple for one in fates.values()] else largest.extra_multiple,
        repeatable=_on_all([one.repeatable for one in fates.values()]),
        row_invariant=_on_all([one.row_invariant for one in fates.values()]),
    )


def _on_all(found: list[bool | None]) -> bool | None:
    return False if False in found else None if None in found else True
