"""One decision from those of several ranks."""

import dataclasses

import pytest

from compiled_logprobs.choose.slowest import on_the_slowest
from compiled_logprobs.decision import Candidate, Decision, Evidence
from compiled_logprobs.tuning.tuner import TuningFailed
from tests.helpers.stored_decisions import LARGE, decided, measured


def of_rank(rounds: int = 40, rows: int = LARGE.rows, **seconds: float) -> tuple[Decision, Evidence]:
    """What a rank decided whose candidates always took so long."""
    candidates = {name: measured(name, seconds=each) for name, each in seconds.items()}
    decision = decided(chosen="eager", candidates=candidates, rounds=rounds, measured_rows=rows, proven_rows=rows)
    return decision, Evidence({name: [each] * rounds for name, each in seconds.items()})


def changed(found: tuple[Decision, Evidence], name: str, **fields) -> tuple[Decision, Evidence]:
    """The same, with other fields of one candidate."""
    decision, evidence = found
    candidates = {**decision.candidates, name: dataclasses.replace(decision.candidates[name], **fields)}
    return dataclasses.replace(decision, candidates=candidates), evidence


def test_of_one_rank_it_is_that_ranks():
    one = of_rank(eager=2.0, cpp=1.0)
    assert on_the_slowest({3: one}, None) == one


def test_what_is_fast_on_one_and_slow_on_another_is_slow():
    found = {0: of_rank(eager=2.0, cpp=0.5, compiled=1.0), 2: of_rank(eager=2.2, cpp=3.0, compiled=1.1)}
    decision, evidence = on_the_slowest(found, None)
    assert (decision.chosen, decision.code) == ("compiled", "FASTER_CLEAR")
    assert evidence.seconds == {"eager": [2.2] * 40, "cpp": [3.0] * 40, "compiled": [1.1] * 40}
    assert {name: one.seconds for name, one in decision.candidates.items()} == {
        "eager": 2.2,
        "cpp": 3.0,
        "compiled": 1.1,
    }
    assert decision.candidates["cpp"].outcome == "slower" and decision.candidates["compiled"].outcome == "chosen"
    assert decision.candidates["compiled"].speedup.median == pytest.approx(2.0)
    assert decision.reason.endswith("; on the slowest of 2 devices")
    assert decision.settled and decision.rounds == 40


def test_round_by_round():
    """A rank that is slow in one half of the rounds, and another that is in the other: together they always are."""
    one, other = of_rank(eager=2.0, cpp=1.0), of_rank(eager=2.0, cpp=1.0)
    one[1].seconds["cpp"][::2] = [4.0] * 20
    other[1].seconds["cpp"][1::2] = [4.0] * 20
    decision, evidence = on_the_slowest({0: one, 1: other}, None)
    assert evidence.seconds["cpp"] == [4.0] * 40 and decision.chosen == "eager"


def test_as_many_rounds_as_all_have():
    decision, evidence = on_the_slowest({0: of_rank(80, eager=2.0, cpp=1.0), 1: of_rank(20, eager=2.0, cpp=1.0)}, None)
    assert decision.rounds == len(evidence.seconds["cpp"]) == 20 and decision.chosen == "cpp"


def test_in_proportion_to_the_rows():
    """The second had memory for half as many."""
    found = {0: of_rank(eager=2.0, cpp=1.0), 1: of_rank(rows=512, eager=1.5, cpp=0.6)}
    decision, evidence = on_the_slowest(found, None)
    assert decision.measured_rows == decision.proven_rows == 512
    assert evidence.seconds["eager"] == [1.5] * 40 and evidence.seconds["cpp"] == [0.6] * 40


@pytest.mark.parametrize("rank", [0, 1])
def test_what_failed_on_one_has_failed(rank):
    found = {0: of_rank(eager=2.0, cpp=1.0), 1: of_rank(eager=2.0, cpp=1.0)}
    decision, evidence = found[rank]
    lost = {**decision.candidates, "cpp": Candidate("oom", "out of memory at the step 'time'")}
    found[rank] = dataclasses.replace(decision, candidates=lost), Evidence({"eager": evidence.seconds["eager"]})
    decision, evidence = on_the_slowest(found, None)
    assert decision.chosen == "eager" and set(evidence.seconds) == {"eager"}
    assert decision.candidates["cpp"].outcome == "oom"
    assert decision.candidates["cpp"].reason == f"rank {rank}: out of memory at the step 'time'"


def test_no_common_baseline():
    other = of_rank(eager=2.0, cpp=1.0)
    other = dataclasses.replace(other[0], baseline="cpp"), other[1]
    with pytest.raises(TuningFailed, match="and is eager on rank 0, cpp on rank 5"):
        on_the_slowest({0: of_rank(eager=2.0, cpp=1.0), 5: other}, None)


def test_the_incumbent_wins_a_tie():
    found = {rank: of_rank(eager=2.0, cpp=1.0, compiled=1.0) for rank in range(2)}
    assert on_the_slowest(found, None)[0].chosen == "cpp"
    assert on_the_slowest(found, "compiled")[0].code == "TIE_INCUMBENT"


def test_memory_and_what_the_check_found_are_those_of_the_worst():
    found = {
        0: changed(of_rank(eager=2.0, cpp=1.0), "cpp", extra_bytes=10, extra_multiple=0.1, row_invariant=True),
        1: changed(of_rank(eager=2.0, cpp=1.0), "cpp", extra_bytes=30, extra_multiple=0.3, row_invariant=False),
    }
    cpp = on_the_slowest(found, None)[0].candidates["cpp"]
    assert (cpp.extra_bytes, cpp.extra_multiple, cpp.row_invariant, cpp.repeatable) == (30, 0.3, False, True)
    found[0] = changed(found[0], "cpp", extra_bytes=None, extra_multiple=None, repeatable=None)
    cpp = on_the_slowest(found, None)[0].candidates["cpp"]
    assert (cpp.extra_bytes, cpp.extra_multiple, cpp.repeatable) == (None, None, None)
