"""A store whose sign check has details: of what the real gate found of right and wrong functions, with small inputs."""

import dataclasses
from functools import cache

import torch

import compiled_logprobs as clp
from compiled_logprobs.decision import Candidate, CaseEvidence, Check, Decision, Evidence
from compiled_logprobs.problem import Problem
from compiled_logprobs.store.files import Store
from tests.helpers.dashboard_stores import good, good_candidates, here, problem
from tests.helpers.stored_decisions import evidence_of
from tests.helpers.wrong_backends import good as right

SMALL = Problem("cpu", 12, 1031, torch.float32)


def half_a_nat_off(logits, labels):
    return right(logits, labels) - 0.5 * (labels != -100)


def nan_in_front(logits, labels):
    return right(logits, labels).index_fill(0, torch.tensor([0])[: len(labels)], torch.nan)


@cache
def gate(function) -> tuple[tuple[Check, ...], tuple[CaseEvidence, ...]]:
    """The verdicts, and the same case by case."""
    report = clp.check_backend(function, SMALL, seed=5)
    (result,) = report.results
    return result.checks, result.cases


def checked(what: Problem, *, with_failures: bool) -> tuple[Decision, Evidence]:
    """eager and cpp right; if asked for, compiled is half a nat off, `nan` has a NaN in front, `lost` crashed."""
    candidates = good_candidates()
    passed, cases = gate(right)
    seconds = {}
    found = {"eager": cases, "cpp": cases}
    for name in ("eager", "cpp"):
        candidates[name] = dataclasses.replace(candidates[name], checks=passed)
        seconds[name] = [candidates[name].seconds * (1 + 0.01 * n) for n in range(20)]
    del candidates["compiled"]
    if with_failures:
        for name, function in (("compiled", half_a_nat_off), ("nan", nan_in_front)):
            verdicts, found[name] = gate(function)
            candidates[name] = Candidate("wrong", "log_prob_error: off", "0" * 16, checks=verdicts)
        candidates["lost"] = Candidate("crashed", "check: killed by SIGSEGV", "1" * 16)
    decision = good(what, candidates=candidates)
    return decision, evidence_of(decision, seconds, **found)


def detailed(where: Store) -> None:
    """float32 where something failed, bfloat16 where nothing did."""
    for dtype, with_failures in ((torch.float32, True), (torch.bfloat16, False)):
        decision, evidence = checked(problem(512, dtype=dtype), with_failures=with_failures)
        where.publish(here(), decision, evidence)
