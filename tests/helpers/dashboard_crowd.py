"""Hundreds of candidates in one decision, as a foreign profile may have."""

import dataclasses

from compiled_logprobs.decision import Candidate, CaseEvidence, Check, Decision, Evidence, Spread
from compiled_logprobs.problem import Problem
from tests.helpers import dashboard_stores as stores
from tests.helpers.stored_decisions import evidence_of

COUNT = 200


def crowded(what: Problem | None = None, failing: int = 0) -> Decision:
    """`COUNT` more candidates, each a little slower than the one before; the last have failed a check."""
    candidates = stores.good_candidates()
    wrong = (Check("sign", False, 1.0, 0.0, "positive"),)
    for number in range(COUNT):
        ratio = 2.0 - number / COUNT
        like = dataclasses.replace(candidates["compiled"], speedup=stores.about(ratio), seconds=0.2 / ratio)
        failed = Candidate("wrong", "sign: positive", "0" * 16, checks=wrong)
        candidates[f"crowd{number:03}"] = like if number < COUNT - failing else failed
    return stores.good(what, candidates=candidates)


def details(decision: Decision, inputs: int, checks: int) -> Evidence:
    """The same of each candidate, with so many kinds of input and so many checks."""
    told = tuple(Check(f"check {number}") for number in range(checks))
    spread = Spread("log_prob", 10, (1e-7,) * 9, ())
    cases = tuple(CaseEvidence(f"input {number}", 4, told, (spread,)) for number in range(inputs))
    return evidence_of(decision, **{name: cases for name, one in decision.candidates.items() if one.checks})
