"""Why `backend="auto"` takes the backend that it takes: the walk through the steps, for people and for programs."""

import itertools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from compiled_logprobs.choose import rule
from compiled_logprobs.choose.distance import distance
from compiled_logprobs.choose.memory import Choice, family_of
from compiled_logprobs.choose.rule import Context, Pending
from compiled_logprobs.choose.tune import meanwhile
from compiled_logprobs.decision import PLAIN, Decision
from compiled_logprobs.errors import BackendUnavailable, LogProbsError, ProfileError
from compiled_logprobs.machine.environment import MATCHED, as_matched, environment_at
from compiled_logprobs.policy import Policy
from compiled_logprobs.problem import RESULTS, Problem, bucket, problem_to_dict

_SOURCES = {
    "small": "fewer than 2^20 logits, and no profile decides it: the first of the list that is ready without compiling",
    "tuned here": "measured by this process",
    "ranks": "agreed between the ranks by tune(group=...)",
    "user store": "stored in the user's profiles",
    "project profiles": "stored in the profiles of the current folder",
    "bundled profiles": "stored in the profiles that came with the package",
    "near": "stored for the same problem with another number of rows; tune(...) measures this one",
    "related": "stored for the nearest kind of problem that was measured",
    "default rule": "by the default rule: the first that can run it and passes a short check",
    "meanwhile": "what its decision chose is compiled in the background, for later calls; this needs no compiling",
    "row invariant": "the first that declares invariant rows and passes the check of them, for all calls of a kind",
    "set aside": "the backend that served it failed, and is set aside in this process",
}


class Neighbour(NamedTuple):
    """A stored decision, and the fields of its key that are not those of the problem."""

    store: str
    """Such as 'user store'."""
    environment: str
    """Its fingerprint."""
    problem: Problem
    differs: dict[str, tuple[Any, Any]]
    """By field of the problem, or fact of the environment: there, and here."""

    def __str__(self) -> str:
        parts = [f"{name} is {there} there, and {here} here" for name, (there, here) in self.differs.items()]
        return f"{self.problem} ({self.store}): {'; '.join(parts) or 'nothing differs'}"


@dataclass(frozen=True)
class Explanation:
    """What serves a call, and why. `str()` is for people."""

    problem: Problem
    backend: str | None
    """None where the next call will find out."""
    source: str | None
    """Where the choice comes from, such as "user store" or "default rule"; None where there is none yet."""
    why: str
    steps: dict[str, str]
    """What each step of the rule said, in order, up to the one that decides."""
    decision: Decision | None
    """The measurement behind the choice, if there is one."""
    stale: str | None
    """What has changed since that measurement."""
    differs: dict[str, tuple[object, object]]
    """Facts of the environment that were others then (there, here), of those that need not be the same."""
    problem_differs: dict[str, tuple[object, object]]
    """By field of the problem, there and here: in what the problem of the decision is another one."""
    nearest: tuple[Neighbour, ...]
    """The stored decisions for problems that are like it, where none is for exactly this one: in the order of
    `distance`, then those whose keys differ in the fewest fields."""
    set_aside: dict[str, str]
    """What the backends raised that failed on such a call in this process, and do not serve it any more."""

    @property
    def headline(self) -> str:
        """What serves, such as 'compiled, by the decision for temperature none at N = 512: 2.10x (2.04 to 2.15) the
        speed of log_softmax and gather'."""
        if self.decision is None or self.source not in ("near", "related"):
            return self.backend or "not decided yet"
        winner, speed = self.decision.winner, ""
        if winner.speedup_over_plain is not None:
            speed = f": {winner.speedup_over_plain} the speed of {PLAIN} and gather"
        elif winner.speedup is not None and self.backend != self.decision.baseline:
            speed = f": {winner.speedup} the speed of {self.decision.baseline}"
        return f"{self.backend}, by the decision for {what_was_measured(self.decision.problem, self.problem)}{speed}"

    def to_dict(self) -> dict[str, Any]:
        """For programs: plain values only."""
        return {
            **vars(self),
            "headline": self.headline,
            "problem": problem_to_dict(self.problem),
            "bucket_rows": bucket(self.problem).rows,
            "decision": None if self.decision is None else self.decision.to_dict(),
            "nearest": [
                {**neighbour._asdict(), "problem": problem_to_dict(neighbour.problem)} for neighbour in self.nearest
            ],
        }

    def __str__(self) -> str:
        lines = [f"{rule.describe(self.problem)}: {self.headline}", f"  {self.why}"]
        *before, _ = self.steps.items()
        lines += [f"  {step}: {reason}" for step, reason in before]
        if self.stale:
            lines.append(f"  stale: {self.stale}")
        lines += [f"  set aside: {name} raised {error}" for name, error in self.set_aside.items()]
        lines += [f"  nearest: {neighbour}" for neighbour in self.nearest]
        if self.decision is not None:
            lines += _lines_of(self.decision)
        lines += [f"  {name} was {there} then, and is {here} here" for name, (there, here) in self.differs.items()]
        return "\n".join(lines)


def explain_problem(problem: Problem, device: torch.device, under: Policy) -> Explanation:
    """What the next call of `problem` on `device` takes; nothing is measured or checked to find out."""
    context = rule.context_of(problem, device, under)
    trace = dict(rule.walk(context))
    *_, (step, outcome) = trace.items()
    if isinstance(outcome, Choice) and step != "remembered":
        outcome = trace[step] = meanwhile(context, outcome)
    choice = outcome if isinstance(outcome, Choice) else None
    decision, stale = (None, None) if isinstance(outcome, str) else (outcome.decision, outcome.stale)
    differs = {} if decision is None else _differing(decision.problem, bucket(problem))
    is_exact = decision is not None and not differs
    now = environment_at(device).to_dict()
    then = now if decision is None else decision.environment
    return Explanation(
        problem=problem,
        backend=None if choice is None else choice.backend,
        source=None if choice is None else choice.source,
        why=_why(context, trace),
        steps={step: _in_words(said) for step, said in trace.items()},
        decision=decision,
        stale=stale,
        differs={name: (then.get(name), value) for name, value in now.items() if then.get(name) != value},
        problem_differs=differs,
        nearest=() if is_exact or under.row_invariant else tuple(nearest_stored(context)),
        set_aside=context.memory.failures(problem),
    )


def nearest_stored(context: Context, most: int = 3) -> list[Neighbour]:
    """The first `most` by `distance`, then of the fewest fields that differ, ranked by file names, then read; of
    those that decide, since no other serves."""
    asked, here = bucket(context.problem), environment_at(context.device)
    facts, names = here.to_dict(), MATCHED.get(context.device.type, MATCHED["cpu"])
    ranked: list[tuple[tuple[float, ...], Neighbour]] = []
    for label, store in context.stores.items():
        environments = store.environments()
        for fingerprint, problem in store.problems():
            differs, order = _differing(problem, asked), distance(asked, problem)
            if fingerprint != here.fingerprint():
                other = environments.get(fingerprint, {})
                both = {name: (other.get(name), facts[name]) for name in names}
                differs |= {name: pair for name, pair in both.items() if _counts(name, *pair)}
            if fingerprint != here.fingerprint() or family_of(problem) != family_of(asked):
                order = (math.inf, len(differs), *order)
            ranked.append((order, Neighbour(label, fingerprint, problem, differs)))
    ranked.sort(key=lambda pair: pair[0])
    read = ((near, context.stores[near.store].read(near.environment, near.problem)) for _, near in ranked)
    return list(itertools.islice((near for near, decision in read if decision and decision.is_decided), most))


def what_was_measured(there: Problem, here: Problem) -> str:
    """In what the problem of a decision, `there`, is another one than `here`, such as 'temperature none at N = 512'."""
    words = {
        **{name: f"{'' if getattr(there, name) else 'no '}{name.replace('_', ' ')}" for name in RESULTS},
        "labels_per_row": f"{there.labels_per_row} label{'s' if there.labels_per_row != 1 else ''} a row",
        "layout": f"layout {there.layout}",
        "temperature": f"temperature {there.temperature.replace('_', ' ')}",
        "aligned": "aligned to 16 bytes" if there.aligned else "not aligned to 16 bytes",
    }
    kind = ", ".join(word for name, word in words.items() if getattr(there, name) != getattr(here, name))
    return f"{kind} at N = {there.rows}" if kind else f"N = {there.rows}"


def refusal(context: Context) -> LogProbsError:
    """What the call raises where no step has a choice, with the nearest decision that is stored."""
    problem, policy = context.problem, context.policy
    if policy.row_invariant:
        return BackendUnavailable(
            f"got {rule.describe(problem)} with row_invariant=True, and no backend that can run such calls declares "
            "rows whose bits do not depend on N and passes the check of them. Set row_invariant=False, or keep N the "
            "same."
        )
    if policy.mode == "off":
        return ProfileError(
            "the mode is 'off', in which no profile is looked at, and require_hit=True asks for one. "
            "Set the mode to 'lookup' or 'tune', or set require_hit=False."
        )
    nearest = "".join(f"\nNearest in the profiles: {neighbour}" for neighbour in nearest_stored(context, most=1))
    return ProfileError(
        f"no profile decides {rule.describe(bucket(problem))}, and require_hit=True forbids to measure or guess. "
        "Run `compiled-logprobs profile` or tune(...) for it on this machine, or set require_hit=False."
        f"{nearest}"
    )


def _why(context: Context, trace: dict[str, Choice | Pending | str]) -> str:
    outcome = list(trace.values())[-1]
    if isinstance(outcome, str):
        error = refusal(context)
        return f"the next call raises {type(error).__name__}: {str(error).splitlines()[0]}"
    why = outcome.reason if isinstance(outcome, Pending) else _SOURCES[outcome.source]
    if "measure" in trace and isinstance(trace["measure"], Pending):
        meanwhile = rule.related(context)
        if isinstance(meanwhile, Choice) and meanwhile.decision is not None and meanwhile.source == "related":
            measured = what_was_measured(meanwhile.decision.problem, context.problem)
            why += f"; where it must not, {meanwhile.backend} serves, by the decision for {measured}"
    if isinstance(outcome, Choice) and outcome.source == "related" and rule.is_checked(context, outcome) is None:
        why += ", once it has passed a short check"
    return f"{why}; nothing is measured now, because {outcome.unmeasured}" if outcome.unmeasured else why


def _differing(there: Problem, here: Problem) -> dict[str, tuple[Any, Any]]:
    """The fields that differ: there, and here."""
    both, mine = problem_to_dict(there), problem_to_dict(here)
    return {name: (value, mine[name]) for name, value in both.items() if value != mine[name]}


def _counts(name: str, there: Any, here: Any) -> bool:
    """Whether a fact that has to be the same is not."""
    return bool(as_matched(name, there) != as_matched(name, here))


def _in_words(outcome: Choice | Pending | str) -> str:
    if isinstance(outcome, Choice):
        return f"{outcome.backend}, {outcome.source}"
    return outcome if isinstance(outcome, str) else outcome.reason


def _lines_of(decision: Decision) -> list[str]:
    how = "short check" if decision.short_check else "full check"
    at = f", timed with {decision.timed_in_words}" if decision.timed_in_words else ""
    lines = [f"  {decision.code}: {decision.reason}"]
    if decision.rounds:
        measured = f"measured {decision.measured_at} at N = {decision.problem.rows}{at}"
        lines.append(f"  {measured}: {decision.rounds} rounds, {how}")
    width = max(map(len, decision.candidates))
    # The fastest first; then, in the order of their names, those that were not timed.
    for name, candidate in sorted(decision.candidates.items(), key=lambda item: (item[1].seconds or math.inf, item[0])):
        lines.append(f"  {name:{width}}  {candidate.outcome}: {candidate.reason}")
        if figures := candidate_figures(decision, name):
            lines.append(f"  {'':{width}}  {figures}")
    if decision.plain_seconds is not None:
        lines.append(f"  {PLAIN} and gather, which people use today: {decision.plain_seconds * 1e3:.3g} ms a call")
    return lines


def candidate_figures(decision: Decision, name: str) -> str:
    """The figures of one candidate, in words; empty where nothing was measured."""
    candidate = decision.candidates[name]
    parts = []
    if candidate.seconds is not None:
        of_host = "" if candidate.host_seconds is None else f" (of the host {candidate.host_seconds * 1e3:.3g} ms)"
        parts.append(f"{candidate.seconds * 1e3:.3g} ms a call{of_host}")
    if candidate.speedup_over_plain is not None:
        parts.append(f"{candidate.speedup_over_plain} the speed of {PLAIN} and gather")
    if candidate.speedup is not None and name != decision.baseline:
        parts.append(f"{candidate.speedup} the speed of {decision.baseline}")
    if candidate.extra_multiple is not None:
        parts.append(f"{candidate.extra_multiple:.2f} x the logits of extra memory")
    if candidate.percent_of_bandwidth is not None:
        parts.append(f"{candidate.percent_of_bandwidth:.0f} % of bandwidth")
    if candidate.checks:
        worst = candidate.worst_error
        of_budget = "" if worst is None else f", at most {worst:.0%} of the error that is allowed"
        parts.append(f"{candidate.checks_passed} of {len(candidate.checks)} checks{of_budget}")
    if candidate.row_invariant is not None:
        parts.append("row invariant" if candidate.row_invariant else "rows depend on N")
    if candidate.measured_at is not None:
        parts.append(f"measured {candidate.measured_at}, and unchanged since")
    if candidate.first_call_seconds is not None:
        pays = decision.calls_to_pay(name)
        then = f", paid for after {pays:.0f} call{'' if pays == 1 else 's'}" if pays is not None else ""
        parts.append(f"first call {candidate.first_call_seconds:.2g} s{then}")
    return ", ".join(parts)
