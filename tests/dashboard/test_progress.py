"""What a run has told, from the events that it writes; and the tables of it."""

import pytest
from compiled_logprobs_dashboard.progress import NEARLY, Loss, Seen, outlook
from compiled_logprobs_dashboard.tables.measure import decided, losses

from tests.helpers import dashboard_stores as stores
from tests.helpers.dashboard_runs import FIRST, PROBLEM, START, TINY, event


@pytest.fixture
def told(tmp_path):
    """What events say that are added to those before."""
    seen, file = Seen(), tmp_path / "events.jsonl"

    def hear(*lines: bytes) -> Seen:
        with file.open("ab") as events:
            events.write(b"".join(lines))
        seen.read(file)
        return seen.copy()

    return hear


def test_events_are_read_as_they_come_also_in_parts(told):
    seen = told(START, FIRST[:20])
    assert len(seen.problems) == 2 and seen.current is None
    assert told(FIRST[20:], event("step", step="check", candidate="cpp")).doing == "checking cpp"
    both = event("step", step="time", candidate="eager") + event("round", seconds={"eager": 1.0, "cpp": 2.0})
    assert told(both, both, both).doing == "timing eager, cpp: round 3"
    assert seen.current is None, "a tab looks at a copy"


def test_what_failed_is_told_for_each_problem(told):
    seen = told(
        START,
        FIRST,
        event("lost", candidate="cpp", outcome="crashed", reason="killed by SIGSEGV"),
        event("lost", candidate="flash_attn", outcome="unavailable", reason="needs a CUDA or ROCm device"),
        event("failed", reason="nothing got through"),
        event("problem", problem={**PROBLEM, "rows": 8}, known=False, index=2, total=2),
    )
    lost = [(loss.problem.rows, loss.backend, loss.outcome) for loss in seen.losses]
    assert lost == [(4, "cpp", "crashed"), (4, None, "not decided")]
    assert seen.finished == 1 and seen.current.rows == 8


@pytest.mark.parametrize(
    "wrong",
    [
        b"no JSON",
        b"[1]",
        b'{"event": 3}',
        b'{"event": "decision", "decision": {"problem": {}}}',
        b"[" * 100_000,
        b"\xff",
    ],
    ids=lambda line: line[:20].decode("ascii", "replace"),
)
def test_a_line_that_is_no_event_harms_nothing(told, wrong):
    later = event("lost", candidate="x", outcome="failed", reason="r")
    seen = told(START, wrong + b"\n", event("of a later release"), FIRST, *[later] * 1000)
    assert seen.current is not None and len(seen.problems) == 2 and len(seen.log) == 200


def test_the_outlook():
    (what,) = TINY.problems()
    assert outlook(Seen(), 60, 5) == (0, None)
    begun = Seen(problems=[what] * 4, current=what)
    assert outlook(begun, 60, 0).seconds_left == 240, "the limit of each, about"
    assert outlook(begun, 60, 30).share == pytest.approx(0.125)
    late = outlook(begun, 60, 1000)
    assert late.share == pytest.approx(NEARLY / 4) and 180 < late.seconds_left < 184
    failed = Seen(problems=[what] * 2, losses=[Loss(what, None, "not decided", "")])
    assert outlook(failed, 60, 70) == (0.5, 60)
    stored = stores.good(tuning_seconds=1e6)  # already, not measured by this run
    assert outlook(Seen([what] * 4, decisions=[stored, stores.good()], measured=1), 60, 5.0) == (0.5, 10.0)


def test_what_was_decided_is_told_as_it_is():
    unchecked = stores.with_changes(stores.good_candidates(), "cpp", checks=())
    failed = stores.all_failed(stores.problem(64))
    table = decided([stores.good(candidates=unchecked), failed, stores.wrong_sign(), stores.undecided()])
    assert table["winner"].tolist() == ["? undecided after 12 rounds", "cpp", "eager", "cpp"]
    assert table["check"].tolist() == ["✓ 2 of 2", "✗ compiled", "✗ cpp", "not stored"]
    assert table["speed-up"].tolist()[1] == "8.00x (7.60 to 8.40)" and table["over"].tolist()[1] == "plain log_softmax"
    assert table.iloc[0][["speed-up", "over", "memory"]].tolist() == [""] * 3 and table["ms"].isna().iloc[0]
    assert decided([]).empty
    lost = Loss(stores.problem(), "third\u202e", "crashed", "line\nline")
    found = losses([lost, Loss(None, None, "not decided", "no")])
    assert found["backend"].tolist() == ["third", "all"] and found["reason"].tolist() == ["line line", "no"]
    assert found["problem"].iloc[1] == "" and losses([]).empty
