"""A store whose sign check has details: of what the real gate found of right and wrong functions, with small inputs."""

import dataclasses
from functools import cache

import torch

import compiled_logprobs as clp
from compiled_logprobs.decision import Candidate, CaseEvidence, Check, Decision, Evidence
from compiled_logprobs.problem import Problem
from compiled_logprobs.store.files import Store
from tests.helpers.dashboard_stores import good, good_candidates, here, problem
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
    candidates, (passed, cases) = good_candidates(), gate(right)
    del candidates["compiled"]
    by_case, seconds = {"eager": cases, "cpp": cases}, {}
    for name in by_case:
        candidates[name] = dataclasses.replace(candidates[name], checks=passed)
        seconds[name] = [candidates[name].seconds * (1 + 0.01 * n) for n in range(20)]
    if with_failures:
        for name, function in (("compiled", half_a_nat_off), ("nan", nan_in_front)):
            verdicts, by_case[name] = gate(function)
            candidates[name] = Candidate("wrong", "log_prob_error: off", "0" * 16, checks=verdicts)
        candidates["lost"] = Candidate("crashed", "check: killed by SIGSEGV", "1" * 16)
    decision = good(what, candidates=candidates)
    return decision, evidence_of(decision, seconds, **by_case)


def detailed(where: Store) -> None:
    """float32 where something failed, bfloat16 where nothing did."""
    for dtype, with_failures in ((torch.float32, True), (torch.bfloat16, False)):
        decision, evidence = checked(problem(512, dtype=dtype), with_failures=with_failures)
        where.publish(here(), decision, evidence)
