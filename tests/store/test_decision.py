"""The answer: what it says of itself, and that its JSON gives it back, or refuses what is not it."""

import dataclasses
import json

import pytest

from compiled_logprobs.decision import (
    QUANTILES,
    Candidate,
    CaseEvidence,
    Check,
    Decision,
    Evidence,
    Speedup,
    Spread,
    Token,
    speedup_in_words,
    winner_in_words,
)
from compiled_logprobs.errors import ProfileError
from tests.helpers.stored_decisions import LARGE, decided, measured, undecided


def test_json_gives_back_the_decision_whatever_else_it_tells():
    decision = decided(LARGE._replace(entropy=True, temperature="per_token"), "cpp")
    assert Decision.from_json(decision.to_json()) == decision
    assert list(json.loads(decision.to_json())) == [field.name for field in dataclasses.fields(Decision)]
    told = decision.to_dict() | {"of a later release": 1}
    assert {"worst_error", "calls_to_pay"} <= told["candidates"]["cpp"].keys()
    assert Decision.from_json(json.dumps(told).encode()) == decision


NOT_DECISIONS = {
    "half a file": (lambda fields: json.dumps(fields)[:300], "truncated"),
    "a missing field": (lambda fields: json.dumps({n: v for n, v in fields.items() if n != "rounds"}), "`rounds`"),
    "an unknown outcome": (
        lambda fields: json.dumps(fields | {"candidates": {"eager": {"outcome": "won", "reason": ""}}}),
        "candidates.*outcome",
    ),
    "a problem that is none": (lambda fields: json.dumps(fields | {"problem": {"rows": 1}}), "a problem is rows"),
    "a choice that was not measured": (lambda fields: json.dumps(fields | {"chosen": "flash_attn"}), "its chosen"),
}


@pytest.mark.parametrize(("spoil", "why"), NOT_DECISIONS.values(), ids=NOT_DECISIONS)
def test_what_is_no_decision_is_refused_with_the_reason(spoil, why):
    with pytest.raises(ProfileError, match=why):
        Decision.from_json(spoil(json.loads(decided().to_json())).encode())


def test_evidence_comes_back_without_its_defaults():
    worst = (Token(3, 17, -0.25, "nan", None), Token(4, None, 1.5, 1.25, 0.25))
    spread = Spread("log_prob", 7, tuple(0.1 * number for number in range(len(QUANTILES))), worst)
    checks = (Check("runs"), Check("log_prob_error", False, 0.3, 0.1, "off"))
    evidence = Evidence(
        5, "2026-11-24T07:00:00Z", {"eager": [1.0, 2.0]}, {"eager": (CaseEvidence("wide", 7, checks, (spread,)),)}
    )
    assert Evidence.from_json(evidence.to_json()) == evidence
    assert json.loads(evidence.to_json())["cases"]["eager"][0]["checks"][0] == {"name": "runs"}
    with pytest.raises(ProfileError, match=r"cases.*errors\[0\].worst\[0\].true"):
        Evidence.from_json(evidence.to_json().replace(b'"nan"', b'"large"'))


@pytest.mark.parametrize(
    ("first", "seconds", "slow", "calls"),
    [(1.0, 0.1, 0.2, 5), (0.05, 0.1, 0.2, 1), (1.0, 0.2, 0.1, None), (1.0, 0.1, 0.1, None), (None, 0.1, 0.2, None)],
)
def test_compiling_pays_after_as_many_calls_as_it_took_longer(first, seconds, slow, calls):
    """It was timed at half of the rows: what a call saves grows with them."""
    compiled = measured("compiled", first_call_seconds=first, seconds=seconds)
    candidates = {"compiled": compiled, "eager": measured("eager", seconds=slow)}
    decision = decided(chosen="compiled", measured_rows=LARGE.rows // 2, candidates=candidates)
    assert decision.calls_to_pay("compiled") == calls


def test_the_worst_error_is_the_largest_share_of_a_limit():
    checks = (Check("a", True, 1.0, 10.0), Check("b", True, -3.0, 10.0), Check("c", True, 5.0, None), Check("d"))
    assert measured("eager", checks=checks).worst_error == 0.3
    assert Candidate("failed", "it raised").worst_error is None
    assert measured("eager", checks=checks).checks_passed == 4


def test_undecided_is_called_undecided_and_says_between_whom():
    decision = undecided()
    assert not decision.is_decided and decision.to_dict()["is_decided"] is False and decided().to_dict()["is_decided"]
    assert "is_decided" not in json.loads(decision.to_json())  # it follows from the code
    assert (winner_in_words(decision), winner_in_words(decided(LARGE, "cpp"))) == ("undecided", "cpp")
    words = "undecided: 12 rounds do not tell whether cpp (4.83x, 0.24 to 31.85) is faster than eager; eager serves by "
    assert speedup_in_words(decision) == f"{words}least regret"
    few = measured("compiled", "tie", speedup=Speedup(None, 1.5, None))
    both = dataclasses.replace(decision, candidates=decision.candidates | {"compiled": few})
    assert "whether cpp (4.83x, 0.24 to 31.85) or compiled (1.50x) is" in speedup_in_words(both)
    assert "undecided" not in speedup_in_words(decided())
