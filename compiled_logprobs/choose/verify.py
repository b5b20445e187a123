"""Whether stored decisions still hold: each winner is checked and timed again. Nothing that is stored changes."""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch

from compiled_logprobs.backends import backends, why_not
from compiled_logprobs.choose import rule as decisions
from compiled_logprobs.choose.serving import WAIT_S
from compiled_logprobs.decision import Decision, Speedup
from compiled_logprobs.machine.environment import fingerprint_of, without_paths
from compiled_logprobs.problem import Problem, bucket, mode_name, problem_to_dict
from compiled_logprobs.store.files import Store
from compiled_logprobs.tuning.process import Event
from compiled_logprobs.tuning.statistics import MARGIN, look
from compiled_logprobs.tuning.tuner import Tuner, TuningFailed, alone_on, speedup_of

Outcome = Literal["holds", "wrong", "failed", "regressed", "unverifiable"]
FAILURES = ("wrong", "failed", "regressed")


class Stored(NamedTuple):
    """A decision, and the store that it comes from."""

    decision: Decision
    source: str
    """Such as 'user store'."""


@dataclass(frozen=True)
class Verification:
    """What became of one stored decision when its winner was checked and timed again."""

    decision: Decision
    source: str
    outcome: Outcome
    """Holds; wrong: the check stops the winner; failed: it does not get through; regressed: see `verify`; unverifiable: it
    could not be found out, which says nothing against it."""
    why: str
    speedup: Speedup | None = None
    """Of the winner over the baseline, now; None where it was not timed, or is the baseline."""
    rows: int | None = None
    """N of the inputs that were timed now."""

    @property
    def is_failure(self) -> bool:
        return self.outcome in FAILURES

    def to_dict(self) -> dict[str, Any]:
        """For programs: plain values only."""
        return {
            "problem": problem_to_dict(self.decision.problem),
            "from": self.source,
            "chosen": self.decision.chosen,
            "baseline": self.decision.baseline,
            "measured_at": self.decision.measured_at,
            "outcome": self.outcome,
            "why": self.why,
            "speedup_then": _plain(_speedup_then(self.decision)),
            "rows_then": self.decision.measured_rows,
            "speedup_now": _plain(self.speedup),
            "rows_now": self.rows,
        }


def stored_decisions(
    stores: dict[str, Store],
    device: torch.device,
    *,
    vocabs: Collection[int] = (),
    rows: Collection[int] = (),
    dtypes: Collection[torch.dtype] = (),
    modes: Collection[str] = (),
) -> list[Stored]:
    """The decisions for `device` in `stores`, the first for each problem; of these values only, where some are named.

    Those that chose a backend which is not registered here are among them, so that they can be told.
    """
    tops = {bucket(Problem(device.type, n, 1, torch.float32)).rows for n in rows}
    environment = fingerprint_of(device)
    found: dict[Problem, Stored] = {}
    for label, store in stores.items():
        for _, decision in store.decisions(environment):
            problem = decision.problem
            asked = (
                (not vocabs or problem.vocab in vocabs)
                and (not tops or problem.rows in tops)
                and (not dtypes or problem.dtype in dtypes)
                and (not modes or mode_name(problem) in modes)
            )
            if problem not in found and asked:
                found[problem] = Stored(decision, label)
    # Those that share compiled code follow one another.
    order = sorted(found, key=lambda one: (one.vocab, str(one.dtype), str(one.out_dtype), *one[5:], one.rows))
    return [found[problem] for problem in order]


def verify(
    found: Sequence[Stored],
    device: torch.device,
    *,
    budget_s: float,
    on_event: Callable[[Event], None] = lambda event: None,
) -> Iterator[Verification]:
    """Check each winner again, and time it again beside its baseline, in the worker program, where a crash is an outcome.

    The check is that of tuning, with all its inputs. The times are compared as tuning compares them: paired, in shuffled
    rounds, by an interval for the median that misses the true one in at most 1 % of the runs. A winner has regressed if
    either of these holds, and holds again in a second measurement, by a new program:

    * the whole interval of its speed-up over the baseline lies below 1.03: by the rule of choosing, the baseline would
      serve now;
    * the whole interval lies below the whole interval that is stored, by more than 3 %: the upper end now is less than
      the lower end then over 1.03. Asked only where as many rows were timed as then, and the code of the baseline is what it
      was.

    What is within that is noise. Where the baseline itself was chosen, it is only checked.

    Args:
        found: what to verify.
        device: where.
        budget_s: seconds for each measurement, as for tuning; fewer rows are timed where the rounds would take longer.
        on_event: told what happens.

    Yields:
        For each decision what became of it, as soon as it is known.
    """
    with Tuner(device, on_event=on_event) as tuner:
        for one in found:
            on_event({"event": "problem", "problem": one.decision.problem, "known": False})
            reason = why_unverifiable(one.decision)
            if reason is not None:
                yield Verification(*one, "unverifiable", reason)
                continue
            with alone_on(device, WAIT_S) as alone:
                if not alone:
                    reason = f"another process has been measuring on {device} for {WAIT_S:g} s"
                    result = Verification(*one, "unverifiable", reason)
                else:
                    result = _measured(tuner, one, budget_s)
                    if result.outcome == "regressed":
                        with Tuner(device, on_event=on_event) as another:
                            result = _seconded(result, _measured(another, one, budget_s))
            yield result


def why_unverifiable(decision: Decision) -> str | None:
    """Why the choice of `decision` is not what was measured, or cannot run here; None if it can be verified."""
    name = decision.chosen
    if name not in backends():
        return f"backend {name!r:.100} is not registered here; name it with --backend package.module:Class"
    if (reason := why_not(name, decision.problem)) is not None:
        return f"backend {name!r} cannot run here: {without_paths(reason)}"
    if not decisions.holds(decision, name):
        return f"the code of backend {name!r} has changed since it was measured; `compiled-logprobs profile` measures it anew"
    return None


def _measured(tuner: Tuner, one: Stored, budget_s: float) -> Verification:
    decision = one.decision
    name = decision.chosen
    asked = [name, *([decision.baseline] if decision.baseline in backends() else [])]
    try:
        now, evidence = tuner.decide(decision.problem, budget_s, names=asked)
        if now.measured_rows != decision.measured_rows and now.candidates[name].measured and name != decision.baseline:
            # Checked with all rows, and timed with as many as then: how much faster it is depends on their number.
            problem = decision.problem._replace(rows=decision.measured_rows)
            now, evidence = tuner.decide(problem, budget_s, names=asked)
    except TuningFailed as error:
        return Verification(*one, "unverifiable", f"it could not be measured: {error}")
    fate = now.candidates[name]
    if fate.outcome == "wrong":
        return Verification(*one, "wrong", fate.reason)
    if fate.outcome in ("failed", "crashed", "timeout"):
        return Verification(*one, "failed", f"{fate.outcome}: {fate.reason}")
    if not fate.measured:  # out of memory, which others may have taken
        return Verification(*one, "unverifiable", f"{fate.outcome}: {fate.reason}")
    checks = f"passed {fate.checks_passed} of {len(fate.checks)} checks"
    if name == decision.baseline:
        return Verification(*one, "holds", checks, rows=now.measured_rows)
    if decision.baseline not in evidence.seconds:
        why = f"{checks}, but the baseline {decision.baseline!r:.100} could not be timed beside it"
        return Verification(*one, "unverifiable", why, rows=now.measured_rows)
    both = {each: evidence.seconds[each] for each in (decision.baseline, name)}
    selection = look(both, baseline=decision.baseline, final=True)
    assert selection is not None
    speedup = speedup_of(selection.verdicts[name].speedup)
    if speedup.high is None:
        why = f"{checks}, and {selection.rounds} rounds are too few to tell how fast it is"
        return Verification(*one, "unverifiable", why, speedup, now.measured_rows)
    slower = _how_it_regressed(decision, speedup, speedup.high, now.measured_rows)
    if slower is not None:
        return Verification(*one, "regressed", slower, speedup, now.measured_rows)
    return Verification(
        *one, "holds", f"{speedup} the speed of {decision.baseline}, {checks}", speedup, now.measured_rows
    )


def _seconded(first: Verification, second: Verification) -> Verification:
    """`second`, which tells of `first` where it does not agree."""
    if second.is_failure:
        return second
    return replace(second, why=f"{second.why}; a first measurement, which this did not confirm: {first.why}")


def _how_it_regressed(decision: Decision, now: Speedup, high: float, rows: int) -> str | None:
    if high < 1.0 + MARGIN:
        return f"no longer faster than {decision.baseline} by {MARGIN:.0%}: {now} its speed now, {_then(decision)} then"
    then = _speedup_then(decision)
    is_comparable = rows == decision.measured_rows and decisions.holds(decision, decision.baseline)
    if then is not None and then.low is not None and is_comparable and high * (1.0 + MARGIN) < then.low:
        return f"{now} the speed of {decision.baseline} now, {then} then: less by more than the noise and {MARGIN:.0%}"
    return None


def _speedup_then(decision: Decision) -> Speedup | None:
    return None if decision.chosen == decision.baseline else decision.winner.speedup


def _then(decision: Decision) -> str:
    return str(_speedup_then(decision) or "not known")


def _plain(speedup: Speedup | None) -> dict[str, float | None] | None:
    return None if speedup is None else {"low": speedup.low, "median": speedup.median, "high": speedup.high}
