"""Decisions made by hand, for tests that look one up: nothing is measured."""

import dataclasses
from datetime import datetime, timezone
from typing import Any

import torch

from compiled_logprobs.backends import get_backend
from compiled_logprobs.choose import auto, rule
from compiled_logprobs.decision import Candidate, Check, Decision, Evidence, Speedup
from compiled_logprobs.machine.environment import environment_at
from compiled_logprobs.policy import policy
from compiled_logprobs.problem import Problem, bucket
from compiled_logprobs.store import user_store
from compiled_logprobs.store.files import Store

CPU = torch.device("cpu")
LARGE = Problem("cpu", 1024, 1031, torch.float32, aligned=False)
"""What a call with `torch.randn(1024, 1031)` poses; its N is the top of its bucket."""
NEW = "0" * 16
"""A fingerprint that nothing has."""


def measured(name: str, outcome: str = "slower", **changes: Any) -> Candidate:
    """A candidate that was timed, with today's code."""
    fields: dict[str, Any] = {
        "fingerprint": changes.get("fingerprint") or get_backend(name).fingerprint(),
        "speedup": Speedup(0.9, 1.0, 1.1),
        "seconds": 2e-3,
        "first_call_seconds": 0.5,
        "extra_bytes": 1000,
        "extra_multiple": 0.5,
        "percent_of_bandwidth": 40.0,
        "checks": (Check("sign", True, 0.0, 0.0, "as it should be"),),
        "repeatable": True,
        "row_invariant": True,
    }
    return Candidate(outcome, f"{outcome}, as it was", **{**fields, **changes})  # type: ignore[arg-type]


def all_measured() -> dict[str, Candidate]:
    """The candidates that come with the package, before one is chosen."""
    return {
        "eager": measured("eager"),
        "cpp": measured("cpp"),
        "compiled": measured("compiled"),
        **{
            name: Candidate("unavailable", "needs a GPU", get_backend(name).fingerprint())
            for name in ("triton", "flash_attn")
        },
    }


def decided(problem: Problem = LARGE, chosen: str = "eager", **changes: Any) -> Decision:
    """A decision for `problem` between the backends that come with the package, measured here and now."""
    fields: dict[str, Any] = {
        "chosen": chosen,
        "code": "FASTER_CLEAR",
        "reason": f"{chosen} is faster",
        "candidates": changes.get("candidates") or all_measured(),
        "left_out": (),
        "baseline": "eager",
        "plain_seconds": 4e-3,
        "rounds": 10,
        "settled": True,
        "measured_rows": problem.rows,
        "proven_rows": problem.rows,
        "checked_rows": problem.rows,
        "short_check": False,
        "environment": environment_at(CPU).to_dict(),
        "bandwidth": {"read": 1e10},
        "telemetry": {"clock": 3.5, "events": ("none",)},
        "telemetry_reason": None,
        "seed": 0,
        "measured_at": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "tuning_seconds": 5.0,
    }
    decision = Decision(problem=problem, **{**fields, **changes})
    if decision.candidates[chosen].measured:
        decision.candidates[chosen] = dataclasses.replace(decision.candidates[chosen], outcome="chosen")
    return decision


def undecided(problem: Problem = LARGE, **changes: Any) -> Decision:
    """One that a machine full of noise left open between eager and cpp."""
    doubtful = measured("cpp", "tie", speedup=Speedup(0.24, 4.83, 31.85))
    fields = {"code": "LEAST_REGRET", "settled": False, "rounds": 12}
    return decided(problem, candidates=all_measured() | {"cpp": doubtful}, **fields, **changes)


def evidence_of(decision: Decision, seconds: dict[str, list[float]] | None = None, **cases: Any) -> Evidence:
    """Evidence that belongs to `decision`."""
    return Evidence(decision.seed, decision.measured_at, seconds or {}, cases)


def publish(decision: Decision, store: Store | None = None) -> None:
    """Store it, by default where the user's are."""
    (store or user_store()).publish(environment_at(CPU), decision, evidence_of(decision))


def chosen(problem: Problem = LARGE) -> tuple[str, str]:
    """The backend that serves, and the source of the choice."""
    name, _ = auto.choose(problem, CPU, policy())
    choice = rule.remembered(rule.context_of(problem, CPU, policy()))
    assert not isinstance(choice, str)
    return name, choice.source


def raising(error: BaseException) -> Any:
    """An answer of `FakeTuner`."""

    def fail(problem: Problem) -> Decision:
        raise error

    return fail


class FakeTuner:
    """In the place of `Tuner`: decides at once, and notes what it was asked."""

    short = True
    device = CPU
    getting_ready = None

    def __init__(self, answer: Any = decided) -> None:
        """`answer`: from a problem to a decision; may raise."""
        self.asked: list[Problem] = []
        self.options: list[dict[str, Any]] = []
        """Of each call."""
        self.answer = answer

    def __call__(self, device: torch.device, **options: Any) -> "FakeTuner":
        return self

    def __enter__(self) -> "FakeTuner":
        return self

    def __exit__(self, *_: object) -> None: ...

    def decide(self, problem: Problem, seconds: float, **options: Any) -> tuple[Decision, Evidence]:
        self.asked.append(problem)
        self.options.append({"seconds": seconds, **options})
        decision = self.answer(bucket(problem))
        return decision, evidence_of(decision, {"eager": [2e-3]})
