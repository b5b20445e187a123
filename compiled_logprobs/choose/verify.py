"""Whether stored decisions still hold: check and time each winner again, as tuning does, and compare."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from compiled_logprobs.backends import backends_for
from compiled_logprobs.choose.staleness import holds, why_not_holds
from compiled_logprobs.choose.tune import WAIT_S, logits_backend_for
from compiled_logprobs.decision import MARGIN, Decision, Speedup, speedup_in_words
from compiled_logprobs.machine.environment import fingerprint_of, without_paths
from compiled_logprobs.problem import Problem, problem_to_dict
from compiled_logprobs.store.files import Store
from compiled_logprobs.tuning.presets import is_among
from compiled_logprobs.tuning.process import Event
from compiled_logprobs.tuning.tuner import Tuner, TuningFailed, alone_on

Standing = Literal["holds", "wrong", "failed", "regressed", "unverifiable"]


@dataclass(frozen=True)
class Verification:
    """What became of a stored decision when its winner was checked and timed again."""

    decision: Decision
    source: str
    """The store, such as 'user store'."""
    outcome: Standing
    """Holds; wrong: the check stops the winner; failed: it does not get through; regressed: see `verify`; unverifiable:
    it could not be found out, which says nothing against it."""
    why: str
    speedup: Speedup | None = None
    """Of the winner over the baseline, now; None where it was not timed, or is the baseline."""
    rows: int | None = None
    """N of the inputs that were timed now."""

    @property
    def is_failure(self) -> bool:
        return self.outcome in ("wrong", "failed", "regressed")

    def to_dict(self) -> dict[str, Any]:
        """For programs: plain values only."""
        then = _speedup_then(self.decision)
        return {
            "problem": problem_to_dict(self.decision.problem),
            "from": self.source,
            "chosen": self.decision.chosen,
            "baseline": self.decision.baseline,
            "measured_at": self.decision.measured_at,
            "outcome": self.outcome,
            "why": self.why,
            "speedup_then": None if then is None else dataclasses.asdict(then),
            "rows_then": self.decision.measured_rows,
            "speedup_now": None if self.speedup is None else dataclasses.asdict(self.speedup),
            "rows_now": self.rows,
        }


def stored_decisions(
    stores: dict[str, Store], device: torch.device, **values: Sequence[Any]
) -> list[tuple[Decision, str]]:
    """The decisions for `device` and their stores, the first for each problem; of `values` as for `is_among`."""
    chosen: dict[Problem, tuple[Decision, str]] = {}
    for label, store in stores.items():
        for _, decision in store.decisions(fingerprint_of(device)):
            if is_among(decision.problem, **values):
                chosen.setdefault(decision.problem, (decision, label))
    # Those that share compiled code follow one another.
    order = sorted(chosen, key=lambda problem: (problem.vocab, *map(str, problem[3:]), problem.rows))
    return [chosen[problem] for problem in order]


def verify(
    decisions: Sequence[tuple[Decision, str]],
    device: torch.device,
    *,
    budget_s: float,
    on_event: Callable[[Event], None] = lambda event: None,
) -> Iterator[Verification]:
    """Check each winner again, and time it beside its baseline, as tuning does. Nothing that is stored changes.

    A winner has regressed if the whole interval of its speed-up over the baseline lies below 1.03, so that the baseline
    would serve now; or, where as many rows were timed of the same baseline, below the whole stored interval by more
    than 3 %. A second measurement has to say so, too. What is within that is noise.

    Args:
        decisions: what to verify, and where it is from.
        device: where.
        budget_s: seconds for the rounds of each measurement; fewer rows are timed where these would take longer.
        on_event: told what happens.

    Yields:
        For each decision what became of it, as soon as it is known.
    """
    with Tuner(device, on_event=on_event) as tuner:
        for decision, source in decisions:
            event = {"event": "problem", "problem": decision.problem, "known": False, "undecided": False}
            on_event({**event, "budget_s": budget_s})
            reason = why_not_holds(decision, decision.chosen)
            if not decision.is_decided:
                reason = f"{speedup_in_words(decision)}; `compiled-logprobs profile` measures it again, for longer"
            if reason is not None:
                yield Verification(decision, source, "unverifiable", without_paths(reason))
                continue
            with alone_on(device, WAIT_S) as is_alone:
                if is_alone:
                    result = _measure_again(tuner, decision, source, budget_s)
                    if result.outcome == "regressed":
                        with Tuner(device, on_event=on_event) as another:
                            result = _measure_again(another, decision, source, budget_s)
                else:
                    reason = f"another process has been measuring on {device} for {WAIT_S:g} s"
                    result = Verification(decision, source, "unverifiable", reason)
            yield result


def _measure_again(tuner: Tuner, decision: Decision, source: str, budget_s: float) -> Verification:
    asked = [name for name in (decision.chosen, decision.baseline) if name in backends_for(decision.problem)]
    try:
        handed_on = logits_backend_for(decision.problem, tuner.device)
        now, _ = tuner.decide(decision.problem, budget_s, names=asked, logits_backend=handed_on)
    except TuningFailed as error:
        return Verification(decision, source, "unverifiable", f"it could not be measured: {error}")
    outcome, why = _compare(decision, now)
    candidate = now.candidates[decision.chosen]
    speedup = None if decision.chosen == decision.baseline else candidate.speedup
    return Verification(decision, source, outcome, why, speedup, now.measured_rows if candidate.measured else None)


def _compare(decision: Decision, now: Decision) -> tuple[Standing, str]:
    """What `now`, of the chosen backend and the baseline alone, says of `decision`, and why."""
    candidate, baseline = now.candidates[decision.chosen], decision.baseline
    checks = f"passed {candidate.checks_passed} of {len(candidate.checks)} checks"
    if candidate.outcome == "wrong":
        return "wrong", candidate.reason
    if candidate.outcome in ("failed", "crashed", "timeout"):
        return "failed", f"{candidate.outcome}: {candidate.reason}"
    if not candidate.measured:  # out of memory, which others may have taken
        return "unverifiable", f"{candidate.outcome}: {candidate.reason}"
    if decision.chosen == baseline:
        return "holds", checks
    if now.baseline != baseline or candidate.speedup is None:
        return "unverifiable", f"{checks}, but the baseline {baseline!r:.100} could not be timed beside it"
    if candidate.speedup.high is None:
        return "unverifiable", f"{checks}, and {now.rounds} rounds are too few to tell how fast it is"
    slower = how_it_regressed(decision, candidate.speedup, now.timed)
    return ("regressed", slower) if slower else ("holds", f"{candidate.speedup} the speed of {baseline}, {checks}")


def how_it_regressed(decision: Decision, now: Speedup, timed: Problem) -> str | None:
    """Why the winner of `decision`, with the speed-up `now` in what was timed, is slower than it was; None if it is
    not."""
    then, high = _speedup_then(decision), now.high or math.inf
    if high < 1.0 + MARGIN:
        was = then or "not known"
        return f"no longer faster than {decision.baseline} by {MARGIN:.0%}: {now} its speed now, {was} then"
    is_comparable = timed == decision.timed and holds(decision, decision.baseline)
    if then is not None and then.low is not None and is_comparable and high * (1.0 + MARGIN) < then.low:
        return f"{now} the speed of {decision.baseline} now, {then} then: less by more than the noise and {MARGIN:.0%}"
    return None


def _speedup_then(decision: Decision) -> Speedup | None:
    return None if decision.chosen == decision.baseline else decision.winner.speedup
