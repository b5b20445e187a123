"""A store whose sign check has details: of what the real gate found of right and wrong functions, with small inputs."""

from functools import cache

import torch

import compiled_logprobs as clp
from compiled_logprobs.decision import Candidate, CaseEvidence, Check, Decision, Evidence
from compiled_logprobs.problem import Problem
from compiled_logprobs.store.files import Store
from tests.helpers.dashboard_stores import good, good_candidates, here, problem, with_changes
from tests.helpers.functions_to_check import good as right
from tests.helpers.functions_to_check import half_a_nat_off, nan_in_front
from tests.helpers.stored_decisions import evidence_of

SMALL = Problem("cpu", 12, 1031, torch.float32)


@cache
def gate(function) -> tuple[tuple[Check, ...], tuple[CaseEvidence, ...]]:
    """The verdicts, and the same case by case."""
    (result,) = clp.check_backend(function, SMALL, seed=5).results
    return result.checks, result.cases


def checked(what: Problem, *, with_failures: bool) -> tuple[Decision, Evidence]:
    """eager and cpp right; if asked for, compiled is half a nat off, `nan` has a NaN in front, `lost` crashed."""
    passed, cases = gate(right)
    candidates = with_changes(good_candidates(), "eager", "cpp", checks=passed)
    del candidates["compiled"]
    by_case = {"eager": cases, "cpp": cases}
    if with_failures:
        for name, function in (("compiled", half_a_nat_off), ("nan", nan_in_front)):
            verdicts, by_case[name] = gate(function)
            candidates[name] = Candidate("wrong", "log_prob_error: off", "0" * 16, checks=verdicts)
        candidates["lost"] = Candidate("crashed", "check: killed by SIGSEGV", "1" * 16)
    decision = good(what, candidates=candidates)
    return decision, evidence_of(decision, {"eager": [0.2] * 20, "cpp": [0.03] * 20}, **by_case)


def detailed(where: Store) -> None:
    """float32 where something failed, bfloat16 where nothing did."""
    for dtype, with_failures in ((torch.float32, True), (torch.bfloat16, False)):
        where.publish(here(), *checked(problem(512, dtype=dtype), with_failures=with_failures))
