"""`tune(group=...)`: ranks measure, each on its own device, and all hold the same decisions afterwards, or the baseline.

The schedule is the same for every rank, whatever happens on any of them: three steps of a `Meeting`, in each of which all say
something, if only that they failed, and what the first rank concludes holds for all.

1. arrive   All say which problems they were asked for, their environment, on which device of which machine they are, and which
            backends they can use. Conclusion: the plan. For each problem either the decision that the first rank's store holds,
            or the backends to measure, which are those that all ranks have; and the ranks that measure: the first on each device.
2. measure  These measure, at the same time, and say what they found; the others say nothing. Conclusion: the decisions, on the
            times of the slowest: each candidate takes in each round what it took on the rank where it took longest, since
            ranks that work together wait for the last.
3. hold     All say the digest of each decision as they hold it, or why they cannot. Conclusion: where they agree.

Where there is no conclusion, since something failed or a rank was silent for too long, all hold the baseline, which every rank
has; so does a rank that comes late, when it gets there. The first rank stores what was measured, once all hold it.
"""

import dataclasses
import hashlib
import json
import platform
import warnings
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from compiled_logprobs.backends import BUILT_IN, EAGER, backends, code_of, target_of, why_not
from compiled_logprobs.choose import rule as decisions
from compiled_logprobs.choose import serving
from compiled_logprobs.choose.meeting import Meeting, Over, by_rank
from compiled_logprobs.choose.rule import Served
from compiled_logprobs.choose.slowest import on_the_slowest
from compiled_logprobs.decision import Candidate, Decision, Evidence
from compiled_logprobs.errors import InputError, LogProbsError
from compiled_logprobs.machine.environment import MATCHED, environment_at, fingerprint_of
from compiled_logprobs.policy import Policy, checked_budget, policy
from compiled_logprobs.problem import Problem, bucket, problem_to_dict
from compiled_logprobs.store import user_store
from compiled_logprobs.tuning.tuner import Tuner, TuningFailed, alone_on, name_of

LOCK_S = 120.0
"""How long a rank waits for another process, none of the group's, that measures on its device."""

Plain = dict[str, Any]
"""What ranks tell each other, as JSON has it."""


def tune_together(
    asked: Callable[[], tuple[list[Problem], torch.device]], group: Any, *, budget_s: float | None, again: bool
) -> list[Decision]:
    """Decide the problems that `asked` returns, on all ranks of `group`; see `tune`, and the module for the schedule."""
    meeting = Meeting(group)
    rank = _Rank(meeting, asked, budget_s, again)
    try:
        plan = meeting.step(rank.arrive, rank.plan)
        found = meeting.step(lambda: rank.measure(plan), lambda said: rank.choose(plan, said))
        apart = meeting.step(lambda: rank.hold(plan, found), rank.compare)
    except Over as over:
        if over.is_input:
            raise InputError(over.reason) from None
        if rank.problems is None:
            raise LogProbsError(over.reason) from None
        return rank.settle([over.reason] * len(rank.problems))
    except BaseException as error:  # of this rank alone, where the others may know no better than to hold the baseline
        rank.settle([f"{type(error).__name__}: {error}"] * len(rank.problems or []))
        raise
    agreed = rank.settle(apart)
    if meeting.rank == 0:
        rank.store(agreed, found)
    return agreed


class _Rank:
    """What this rank does in each step."""

    def __init__(
        self,
        meeting: Meeting,
        asked: Callable[[], tuple[list[Problem], torch.device]],
        budget_s: float | None,
        again: bool,
    ) -> None:
        self._meeting, self._asked, self._budget_s, self._again = meeting, asked, budget_s, again
        self.problems: list[Problem] | None = None
        """None until it is known which these are."""
        self._held: list[Decision | None] = []

    def arrive(self) -> Plain:
        """Step 1: what the plan depends on."""
        problems, self._device = self._asked()
        problems = self.problems = list(dict.fromkeys(map(bucket, problems)))
        self._seconds = policy().budget_s if self._budget_s is None else checked_budget(self._budget_s, "budget_s")
        return {
            "problems": [problem_to_dict(problem) for problem in problems],
            "environment": environment_at(self._device).matched(),
            "place": f"{_machine()} {name_of(self._device)}",
            "backends": {name: _told_of(name, problems) for name in backends()},
        }

    def plan(self, said: list[Plain]) -> Plain:
        """The conclusion of step 1."""
        _require_the_same(said)
        first_there: dict[str, int] = {}
        for number, one in enumerate(said):
            first_there.setdefault(one["place"], number)
        return {
            "measuring": list(first_there.values()),
            "problems": [
                self._planned(problem, *_shared(index, [one["backends"] for one in said]))
                for index, problem in enumerate(self.problems or [])
            ],
        }

    def _planned(self, problem: Problem, names: list[str], missing: dict[str, str]) -> Plain:
        if EAGER in missing:
            raise LogProbsError(f"the ranks run different releases, as {EAGER} shows: {missing[EAGER]}")
        store, environment = user_store(), fingerprint_of(self._device)
        known = None if self._again else serving.current(store, problem, self._device, names)
        if known is not None and known.chosen not in names:
            known = None
        standing = decisions.decision_in(store, environment, problem)
        holds = standing is not None and decisions.holds(standing, standing.chosen)
        return {
            "known": None if known is None else _plain(known),
            "names": names,
            "missing": missing,
            "incumbent": standing.chosen if standing is not None and holds else None,
        }

    def measure(self, plan: Plain) -> list[Plain | None]:
        """Step 2: what came of each problem that is not known; of none, where another rank measures on this device."""
        if self._meeting.rank not in plan["measuring"]:
            return []
        with Tuner(self._device, on_event=lambda event: self._meeting.sign_of_life()) as tuner:
            return [
                self._measured(tuner, problem, one) if one["known"] is None else None
                for problem, one in zip(self.problems or [], plan["problems"], strict=True)
            ]

    def _measured(self, tuner: Tuner, problem: Problem, planned: Plain) -> Plain:
        try:
            with alone_on(self._device, LOCK_S) as alone:
                if not alone:
                    raise TuningFailed(f"another process has been measuring on {self._device} for {LOCK_S:g} s")
                self._meeting.sign_of_life()
                names, incumbent = planned["names"], planned["incumbent"]
                decision, evidence = tuner.decide(problem, self._seconds, names=names, incumbent=incumbent)
        except Exception as error:  # noqa: BLE001  it is for this problem; the others are to be told, whatever it is
            return {"failed": f"{type(error).__name__}: {error}"}
        return {"record": _plain(decision), "evidence": _plain(evidence)}

    def choose(self, plan: Plain, said: list[list[Plain]]) -> list[Plain]:
        """The conclusion of step 2: for each problem the decision and what it rests on, or why there is none."""
        chosen: list[Plain] = []
        for index, planned in enumerate(plan["problems"]):
            if planned["known"] is not None:
                chosen.append({"record": planned["known"], "evidence": None})
                continue
            measured = {rank: said[rank][index] for rank in plan["measuring"]}
            try:
                for rank, one in measured.items():
                    if "failed" in one:
                        raise TuningFailed(f"rank {rank}: {one['failed']}")
                by_rank = {
                    rank: (
                        Decision.from_json(json.dumps(one["record"]).encode()),
                        Evidence.from_json(json.dumps(one["evidence"]).encode()),
                    )
                    for rank, one in measured.items()
                }
                decision, evidence = on_the_slowest(by_rank, planned["incumbent"])
            except LogProbsError as error:
                chosen.append({"failed": str(error)})
            else:
                chosen.append({"record": _plain(decision), "evidence": _plain(evidence)})
        return chosen

    def hold(self, plan: Plain, found: list[Plain]) -> list[Plain]:
        """Step 3: each of the decisions as this rank will hold it."""
        said = []
        for planned, one in zip(plan["problems"], found, strict=True):
            self._held.append(None)
            if "failed" in one:
                said.append({"why_not": one["failed"]})
                continue
            decision = _limited(Decision.from_json(json.dumps(one["record"]).encode()), planned["missing"])
            if decisions.usable(Served(decision.chosen, "ranks", decision), Policy()) is None:
                why = f"backend {decision.chosen!r} cannot run here, or has other code"
                said.append({"why_not": f"rank {self._meeting.rank}: {why}"})
                continue
            self._held[-1] = decision
            said.append({"digest": hashlib.sha256(decision.to_json()).hexdigest()})
        return said

    def compare(self, said: list[list[Plain]]) -> list[str | None]:
        """The conclusion of step 3: for each problem, why the ranks do not hold the same; None where they do."""
        apart = []
        for ones in zip(*said, strict=True):
            reasons = dict.fromkeys(one["why_not"] for one in ones if "why_not" in one)
            others = by_rank(["it holds another decision" if one != ones[0] else None for one in ones])
            apart.append("; ".join(reasons) or others or None)
        return apart

    def settle(self, apart: list[str | None]) -> list[Decision]:
        """Let what all ranks hold serve from now on; with a reason why there is no such decision, the baseline."""
        settled, told = [], []
        for index, (problem, why) in enumerate(zip(self.problems or [], apart, strict=True)):
            decision = None if why else self._held[index]
            if decision is None:
                decision = _baseline(problem, why or "", self._device)
                told.append(f"{problem}: {why}")
            decisions.remember_decision(decision, "ranks")
            settled.append(decision)
        if told:
            warnings.warn(
                f"rank {self._meeting.rank} of the group holds {EAGER}, as all its ranks are to, for "
                f"{'; for '.join(told)}.\nCall tune(..., group=...) again on all of them when that is mended.",
                RuntimeWarning,
                stacklevel=4,
            )
        return settled

    def store(self, agreed: list[Decision], found: list[Plain]) -> None:
        """Store those of the decisions in `agreed` that were measured now."""
        store, environment = user_store(), fingerprint_of(self._device)
        for decision, one in zip(agreed, found, strict=True):
            # What others have registered, and a stored decision chose, may serve them well.
            foreign = decisions.unregistered_choice(store, environment, decision.problem)
            if decision.rounds > 0 and one["evidence"] is not None and (foreign is None or self._again):
                serving.publish(store, decision, Evidence.from_json(json.dumps(one["evidence"]).encode()), self._device)


def _machine() -> str:
    """What tells this machine from every other, for as long as it runs. It is never stored."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    except OSError:
        return platform.node()


def _told_of(name: str, problems: Sequence[Problem]) -> Plain:
    """What has to be the same on all ranks, and why it cannot run the problems; a third party's is not imported to find out."""
    if name in BUILT_IN:
        return {"code": code_of(name), "why_not": [why_not(name, problem) for problem in problems]}
    target = target_of(name)
    code = target if isinstance(target, str) else f"an object of class {type(target).__name__}"
    return {"code": code, "why_not": [None] * len(problems)}


def _require_the_same(said: list[Plain]) -> None:
    """Raise InputError where ranks ask for other problems than the first, and LogProbsError where their environments differ."""
    here = said[0]
    for rank, one in enumerate(said):
        if one["problems"] != here["problems"]:
            counts = f"{len(one['problems'])} there, {len(here['problems'])} here"
            raise InputError(
                f"got other problems on rank {rank} of the group than on its first ({counts}); the same on all ranks are "
                "valid. Pass the same ones, in the same order."
            )
    for rank, one in enumerate(said):
        if one["environment"] != here["environment"]:
            names = MATCHED.get(here["environment"]["device_type"], MATCHED["cpu"])
            differs = [
                f"{name} is {one['environment'].get(name)} there and {here['environment'].get(name)} on the first"
                for name in ("device_type", *names)
                if one["environment"].get(name) != here["environment"].get(name)
            ]
            raise LogProbsError(f"rank {rank} is in another environment: {', '.join(differs)}")


def _shared(index: int, ranks: list[dict[str, Plain]]) -> tuple[list[str], dict[str, str]]:
    """The backends that all ranks have and can run the problem of that index with; and why the others are not among them."""
    shared, missing = [], {}
    for name in dict.fromkeys(name for rank in ranks for name in rank):
        known = next(rank[name] for rank in ranks if name in rank)
        reasons = [
            "it is not registered"
            if name not in rank
            else "it has other code than elsewhere"
            if rank[name]["code"] != known["code"]
            else rank[name]["why_not"][index]
            for rank in ranks
        ]
        # What nobody can run is for the tuner to say.
        if any(reasons) and not all(reasons):
            missing[name] = by_rank(reasons)
        else:
            shared.append(name)
    return shared, missing


def _limited(decision: Decision, missing: dict[str, str]) -> Decision:
    """`decision` without the candidates that some rank lacks, so that none of them serves under any policy."""
    candidates = {
        name: dataclasses.replace(candidate, outcome="unavailable", reason=f"not on all ranks: {missing[name]}")
        if name in missing
        else candidate
        for name, candidate in decision.candidates.items()
    }
    left_out = {*decision.left_out, *missing} - set(candidates)
    return dataclasses.replace(decision, candidates=candidates, left_out=tuple(sorted(left_out)))


def _baseline(problem: Problem, reason: str, device: torch.device) -> Decision:
    """What all ranks hold where they agree upon nothing else: nothing was measured for it."""
    return Decision(
        problem=problem,
        chosen=EAGER,
        code="RANKS_DIFFER",
        reason=f"it is what all ranks have: {reason}",
        candidates={EAGER: Candidate("chosen", "the baseline", code_of(EAGER))},
        left_out=tuple(name for name in backends() if name != EAGER),
        baseline=EAGER,
        plain_seconds=None,
        rounds=0,
        settled=False,
        measured_rows=0,
        proven_rows=0,
        checked_rows=0,
        short_check=True,
        environment=environment_at(device).to_dict(),
        bandwidth={},
        telemetry=None,
        telemetry_reason="nothing was measured",
        seed=0,
        measured_at=datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        tuning_seconds=0.0,
    )


def _plain(answer: Decision | Evidence) -> Plain:
    plain: Plain = json.loads(answer.to_json())
    return plain
