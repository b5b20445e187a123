"""One decision from those that several ranks made of the same problem, on the times of the slowest.

Ranks that work together wait for the last of them. So a candidate takes in each round what it took on the rank where it took
longest in its round of that number, and the choice is made by these times as it is on one device.
"""

import dataclasses
from collections.abc import Mapping
from statistics import median

from compiled_logprobs.records import Candidate, Decision
from compiled_logprobs.tuning.select import look
from compiled_logprobs.tuning.tuner import TuningFailed, simplicity, speedup_of

Times = dict[str, list[float]]


def on_the_slowest(found: Mapping[int, tuple[Decision, Times]], incumbent: str | None) -> tuple[Decision, Times]:
    """The decision by all in `found`, given by rank, and the times that it rests on.

    Where ranks had time or memory for different N, times are taken in proportion, for the least of these N. Of ranks that
    took different numbers of rounds, the first rounds count, as many as all have. A candidate that came to nothing on one
    rank comes to that.

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
        rank: {name: [s * rows / decision.measured_rows for s in series[:rounds]] for name, series in times.items()}
        for rank, (decision, times) in found.items()
    }
    everywhere = [name for name in alone if all(name in times for times in by_rank.values())]
    slowest = {name: list(map(max, *(times[name] for times in by_rank.values()))) for name in everywhere}
    candidates = {
        name: _worst(name, {rank: decision.candidates[name] for rank, (decision, _) in found.items()}, by_rank)
        for name in first.candidates
    }
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
    return decision, slowest


def _worst(name: str, fates: Mapping[int, Candidate], times: Mapping[int, Times]) -> Candidate:
    """What became of a candidate where it fared worst: where it was not timed, else where it took longest."""
    lost = next((rank for rank in fates if name not in times[rank]), None)
    if lost is not None:
        return dataclasses.replace(fates[lost], reason=f"rank {lost}: {fates[lost].reason}")
    rank = max(fates, key=lambda rank: median(times[rank][name]))
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
