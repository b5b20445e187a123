"""The page Run, and the tables of what a run has told."""

import json
import threading

import pytest
from compiled_logprobs_dashboard import runs
from compiled_logprobs_dashboard.tables.run import NEARLY, Loss, Seen, decided, losses, outlook, standings

from tests.helpers.dashboard_pages import metrics_of, opened, table_of, text_of
from tests.helpers.dashboard_runs import FIRST, PROBLEM, START, TINY, event, wait_until
from tests.helpers.dashboard_stores import all_failed, good, good_candidates, problem, publish, undecided, with_changes


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
    assert outlook(Seen(), 60, 5) == (0, None, False)
    begun = Seen(problems=[what] * 4, current=what)
    assert outlook(begun, 60, 0).seconds_left == 240, "the limit of each: at most, about"
    assert outlook(begun, 60, 30).share == pytest.approx(0.125)
    late = outlook(begun, 60, 1000)
    assert late.share == pytest.approx(NEARLY / 4) and 180 < late.seconds_left < 184 and not late.measured
    failed = Seen(problems=[what] * 2, losses=[Loss(what, None, "not decided", "")])
    assert outlook(failed, 60, 70) == (0.5, 60, False)
    stored = good(tuning_seconds=1e6)  # already, not measured by this run
    assert outlook(Seen([what] * 4, decisions=[stored, good()], measured=1), 60, 5.0) == (0.5, 10.0, True)


def test_standings_and_winners_are_told_as_they_are():
    table = standings([good(), good(problem(64)), all_failed(problem(2048))])
    rows = {row["backend"]: row for row in table.to_dict("records")}
    assert table["backend"].iloc[0] == "cpp" and standings([]).empty
    counts = ("won", "timed", "did not get through", "cannot run it")
    assert [rows["cpp"][name] for name in counts] == [2, 2, 1, 0] and [rows["eager"][name] for name in counts][:2] == [
        1,
        3,
    ]
    assert [rows["flash_attn"][name] for name in counts] == [0, 0, 1, 2]
    assert rows["cpp"]["median speed-up over plain log_softmax"] == pytest.approx(1.2 * 6.67)
    unchecked = with_changes(good_candidates(), "cpp", checks=())
    table = decided([good(candidates=unchecked), all_failed(problem(64))])
    assert list(table["winner"]) == ["eager", "cpp"] and list(table["rows"]) == [64, 512]
    assert table["speed-up over plain log_softmax"].iloc[1].startswith("8.00x (")
    assert table["speed-up over the baseline"].iloc[1].startswith("6.67x (")
    assert list(table["sign check"]) == ["2 of 2", "not stored"] and decided([]).empty
    open_ = [undecided()]
    assert decided(open_)["winner"].tolist() == ["undecided"] and standings(open_)["won"].sum() == 0
    assert not decided(open_).astype(str).map(lambda text: "1.00x" in text).any(axis=None)
    found = losses([Loss(problem(), "third\u202e", "crashed", "line\nline"), Loss(None, None, "not decided", "no")])
    assert found["backend"].tolist() == ["third", "all"] and found["reason"].tolist() == ["line line", "no"]
    assert found["problem"].iloc[1] == "" and losses([]).empty


SCRIPT = """
import pathlib, sys, time
sys.stdout.buffer.write({})
sys.stdout.flush()
while not pathlib.Path({!r}).exists():
    time.sleep(0.01)
sys.stdout.buffer.write({})
sys.stderr.write("a word")
"""


@pytest.fixture
def page(scenario, quiet):
    scenario("no profile")
    return opened("run")


@pytest.mark.slow
def test_a_run_from_the_button_to_its_end(page, scenario, program, tmp_path):
    assert metrics_of(page)["Problems to measure"] == "4" and not page.button(key="run_start").disabled
    assert page.code[0].value == "compiled-logprobs profile --device=cpu --preset=quick"
    fields = {"vocabulary": ["512"], "rows": ["4"], "dtype": ["float32"], "mode": ["forward"], "backends": ["eager"]}
    for key, value in fields.items():
        page.multiselect(key=f"run_{key}").set_value(value)
    page.number_input(key="run_budget").set_value(2).run()
    assert metrics_of(page)["Problems to measure"] == "1" and page.code[0].value == TINY.command_line()

    (posed,), go = TINY.problems(), tmp_path / "go"
    decision = good(posed)
    start = event("start", device="cpu", environment="0" * 16, problems=[PROBLEM])
    end = event("end", done=1, total=1, seconds=1.0, interrupted=False)
    told = event("decision", decision=json.loads(decision.to_json())) + end
    program(SCRIPT.format(start + FIRST, str(go), told))
    page.button(key="run_start").click().run()
    assert not page.exception and "A run is going on" in text_of(page) and page.button(key="run_start").disabled
    assert "A run is going on" in text_of(opened("run")), "in another tab, or after a reload"
    go.touch()
    wait_until(lambda: "The last run has finished" in text_of(page.run()))
    assert "1 of 1 problems decided; 1 were measured by this run." in text_of(page)
    assert table_of(page, "won").to_dict("records")[0]["backend"] == "cpp"
    assert "a word" in [code.value for code in page.code]

    publish(scenario("no profile"), decision)
    assert "All of this is stored already" in text_of(page.run()) and page.button(key="run_start").disabled
    page.checkbox(key="run_again").check().run()
    assert metrics_of(page)["Problems to measure"] == "1" and not page.button(key="run_start").disabled


@pytest.mark.slow
def test_what_is_not_valid_is_said_and_so_is_a_run_that_died(page, program):
    page.multiselect(key="run_vocabulary").set_value(["<b>x</b>"]).run()
    assert not page.exception and "got model '<b>x</b>'" in text_of(page)
    assert "run_start" not in [button.key for button in page.button]
    program("raise SystemExit('it cannot be written')")
    run = runs.RUNS.start(TINY)
    wait_until(lambda: not run.is_running)
    page.multiselect(key="run_vocabulary").set_value([]).run()
    assert "The last run ended before it was done" in text_of(page) and "exit code 1" in text_of(page)
    assert "it cannot be written" in [code.value for code in page.code]
    wait_until(lambda: not [thread for thread in threading.enumerate() if thread.name == "run"])
    runs.RUNS.start(TINY)  # the lock is free again
