"""Deciding again: one changed candidate costs the measurement of that one, the incumbent and the baseline."""

import dataclasses

import pytest
import torch

from compiled_logprobs.backends import get_backend
from compiled_logprobs.choose.renewal import decide
from compiled_logprobs.decision import Evidence
from compiled_logprobs.problem import Problem
from compiled_logprobs.tuning.tuner import Tuner, TuningFailed
from tests.helpers.backends_for_tuning import registered
from tests.helpers.stored_decisions import LARGE, all_measured, decided, measured

OLD = "2026-01-02T03:04:05Z"
NEW = "0" * 16
"""A fingerprint that nothing has."""


class Answers:
    """In the place of a tuner: notes whom it was to measure, and gives the answers in turn."""

    def __init__(self, *chosen, short=False, **changes):
        self.asked, self.short, self.chosen, self.changes = [], short, list(chosen), changes

    def decide(self, problem, seconds, *, strict, names, incumbent):
        self.asked.append((set(names) | {"eager"}, incumbent, seconds))
        chosen = self.chosen.pop(0)
        found = {name: measured(name) for name in self.asked[-1][0]}
        return decided(problem, chosen, candidates=found | self.changes.get("found", {}), left_out=()), Evidence()


def standing(chosen="cpp", **changes):
    return decided(chosen=chosen, candidates=all_measured() | changes, measured_at=OLD)


def renewed(answers, stands, **options):
    return decide(answers, LARGE, 10.0, standing=stands, **options)[0]


def test_one_that_changed_is_measured_beside_the_incumbent_and_the_baseline():
    answers = Answers("cpp")
    decision = renewed(answers, standing(compiled=measured("compiled", fingerprint=NEW)))
    assert answers.asked == [({"eager", "cpp", "compiled"}, "cpp", 10.0)]
    carried = decision.candidates["flash_attn"]
    assert carried.measured_at == OLD and carried.outcome == "unavailable"
    assert decision.candidates["cpp"].measured_at is None and decision.left_out == ()


def test_only_those_that_were_asked_for_are_measured():
    stands = standing(compiled=measured("compiled", fingerprint=NEW), cpp=measured("cpp", fingerprint=NEW))
    answers = Answers("eager")
    decision = renewed(answers, dataclasses.replace(stands, chosen="eager"), names=["eager", "cpp"])
    assert answers.asked == [({"eager", "cpp"}, "eager", 10.0)]
    assert decision.candidates["compiled"] == dataclasses.replace(stands.candidates["compiled"], measured_at=OLD)


def test_what_was_carried_over_before_keeps_its_date():
    kept = dataclasses.replace(measured("compiled"), measured_at="2025-01-01T00:00:00Z")
    stands = standing("eager", cpp=measured("cpp", fingerprint=NEW), compiled=kept)
    decision = renewed(Answers("cpp"), stands)
    assert decision.chosen == "cpp" and decision.candidates["compiled"].measured_at == "2025-01-01T00:00:00Z"
    assert decision.calls_to_pay("compiled") is None  # no faster than the baseline of its own run


def test_a_new_winner_replaces_the_incumbent():
    decision = renewed(Answers("compiled"), standing(compiled=measured("compiled", fingerprint=NEW)))
    assert decision.chosen == "compiled"


def test_everything_is_measured_where_the_incumbent_has_lost_what_it_had():
    """It is no faster than the baseline now: what was slower than it then may be the fastest."""
    answers = Answers("eager", "compiled")
    changed = measured("flash_attn", fingerprint=NEW)
    stands = standing(compiled=measured("compiled"), flash_attn=changed)
    assert renewed(answers, stands).chosen == "compiled"
    assert [names for names, _, _ in answers.asked] == [
        {"eager", "cpp", "flash_attn"},
        {"eager", "cpp", "compiled", "flash_attn"},
    ]
    with pytest.raises(TuningFailed, match="the budget of 0 s ended when the standing choice had failed"):
        decide(Answers("eager"), LARGE, 0.0, standing=stands, strict=True)


@pytest.mark.parametrize(
    "stands",
    [
        None,
        standing(cpp=measured("cpp", fingerprint=NEW)),
        standing("compiled", eager=measured("eager", fingerprint=NEW)),
        dataclasses.replace(standing(compiled=measured("compiled", fingerprint=NEW)), settled=False),
        dataclasses.replace(standing(compiled=measured("compiled", fingerprint=NEW)), short_check=True),
        dataclasses.replace(standing("cpp", compiled=measured("compiled", fingerprint=NEW)), baseline="compiled"),
        standing(),
    ],
    ids=[
        "nothing stands",
        "incumbent changed",
        "baseline changed",
        "unsettled",
        "short",
        "other baseline",
        "no change",
    ],
)
def test_everything_is_measured_where_little_still_holds(stands):
    answers = Answers("eager")
    renewed(answers, stands)
    assert [names for names, _, _ in answers.asked] == [{"eager", "cpp", "compiled", "flash_attn"}]


def test_everything_is_measured_on_request_and_the_incumbent_is_one_all_the_same():
    answers = Answers("eager")
    renewed(answers, standing(compiled=measured("compiled", fingerprint=NEW)), again=True)
    assert answers.asked == [({"eager", "cpp", "compiled", "flash_attn"}, "cpp", 10.0)]


def test_for_real():
    """Of four backends one gets another code: its worker program times three."""
    problem = Problem("cpu", rows=256, vocab=1024, dtype=torch.float32, needs_grad=True)
    timed = []

    def on_event(event):
        if event["event"] == "round":
            timed.append(frozenset(event["seconds"]))

    with registered(right="Right", same="Same", slow="SlowByRow"):
        names = ["right", "same", "slow"]
        with Tuner(torch.device("cpu"), short=True, on_event=on_event) as tuner:
            first, _ = tuner.decide(problem, 30.0, names=names)
            assert set(timed) == {frozenset({"eager", *names})}
            changed = first.candidates["slow"]
            stands = dataclasses.replace(
                first, candidates=first.candidates | {"slow": dataclasses.replace(changed, fingerprint=NEW)}
            )
            for name in names:  # loaded here, too, so that their code can be compared
                get_backend(name)
            timed.clear()
            again, _ = decide(tuner, problem, 30.0, standing=stands, names=names)
    assert set(timed) == {frozenset({"eager", first.chosen, "slow"})}
    assert again.chosen == first.chosen
    carried = (set(names) - {first.chosen, "slow"}).pop()
    assert again.candidates[carried].measured_at == first.measured_at
