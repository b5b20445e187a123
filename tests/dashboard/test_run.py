"""The page Run, and the tables of what a run has told."""

import dataclasses
import signal

import psutil
import pytest
from compiled_logprobs_dashboard import runs
from compiled_logprobs_dashboard.tables.run import NEARLY, Loss, Seen, decided, losses, outlook, standings

from tests.helpers.dashboard_pages import metrics_of, opened, table_of, text_of
from tests.helpers.dashboard_runs import FIRST, PROBLEM, START, TINY, event, wait_until
from tests.helpers.dashboard_stores import all_failed, good, problem

# --- what a run has told ----------------------------------------------------------------------------------------------


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
    assert [(loss.problem.rows, loss.backend, loss.outcome) for loss in seen.losses] == [
        (4, "cpp", "crashed"),
        (4, None, "not decided"),
    ]
    assert seen.finished == 1 and seen.current.rows == 8


@pytest.mark.parametrize(
    "wrong",
    [
        b"\n",
        b"no JSON\n",
        b"[1]\n",
        b'{"event": 3}\n',
        b'{"event": "problem"}\n',
        b'{"event": "decision", "decision": {"problem": {}}}\n',
        b'{"event": "start", "problems": 7, "device": "", "environment": ""}\n',
        b"[" * 100_000 + b"\n",
        b"\xff\xfe\n",
        b'{"event": "of a later release"}\n',
    ],
    ids=lambda line: line[:30].decode("ascii", "replace"),
)
def test_a_line_that_is_no_event_harms_nothing(told, wrong):
    seen = told(START, wrong, FIRST)
    assert seen.current is not None and len(seen.problems) == 2


def test_a_log_stays_short(told):
    assert len(told(START, *[event("lost", candidate="x", outcome="failed", reason="r")] * 1000).log) == 200


def test_the_outlook():
    what = TINY.problems()[0]
    nothing = outlook(Seen(), 60, 5)
    assert (nothing.share, nothing.seconds_left, nothing.measured) == (0, None, False)
    begun = Seen(problems=[what] * 4, current=what)
    assert outlook(begun, 60, 0).seconds_left == 240, "the budget of each: at most, about"
    assert outlook(begun, 60, 30).share == pytest.approx(0.125)
    late = outlook(begun, 60, 1000)
    assert late.share == pytest.approx(NEARLY / 4) and 180 < late.seconds_left < 184 and not late.measured
    failed = Seen(problems=[what] * 2, losses=[Loss(what, None, "not decided", "")])
    assert outlook(failed, 60, 70).share == 0.5 and outlook(failed, 60, 70).seconds_left == 60
    stored = dataclasses.replace(good(), tuning_seconds=1e6)  # already, not measured by this run
    known = Seen(problems=[what] * 4, decisions=[stored, good()], measured=1)
    view = outlook(known, 60, 5.0)
    assert view.measured and view.seconds_left == pytest.approx(2 * 5.0) and view.share == 0.5


def test_standings_name_how_many_problems_each_was_timed_in():
    table = standings([good(), good(problem(64)), all_failed(problem(2048))])
    rows = {row["backend"]: row for row in table.to_dict("records")}
    assert table["backend"].iloc[0] == "cpp"
    assert (rows["cpp"]["won"], rows["cpp"]["timed"], rows["cpp"]["did not get through"]) == (2, 2, 1)
    assert rows["cpp"]["median speed-up over plain log_softmax"] == pytest.approx(1.2 * 6.67)
    assert (rows["eager"]["won"], rows["eager"]["timed"]) == (1, 3)
    assert rows["third"]["timed"] == 0 and rows["third"]["median speed-up over plain log_softmax"] != 0
    assert rows["flash_attn"]["cannot run it"] == 2 and rows["flash_attn"]["did not get through"] == 1
    assert standings([]).empty


def test_winners_and_losses_are_told_as_they_are():
    table = decided([good(), all_failed(problem(64))])
    assert list(table["winner"]) == ["eager", "cpp"] and list(table["rows"]) == [64, 512]
    assert table["speed-up over plain log_softmax"].iloc[1].startswith("8.00x (")
    assert table["speed-up over the baseline"].iloc[1].startswith("6.67x (")
    found = losses([Loss(problem(), "third\u202e", "crashed", "line\nline"), Loss(None, None, "not decided", "no")])
    assert found["backend"].tolist() == ["third", "all"] and found["reason"].tolist() == ["line line", "no"]
    assert found["problem"].iloc[1] == ""
    unchecked = {**good().candidates, "cpp": dataclasses.replace(good().winner, checks=())}
    assert decided([good(candidates=unchecked)])["sign check"].tolist() == ["not stored"]
    assert decided([]).empty and losses([]).empty


# --- the page ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def page(scenario, monkeypatch, tmp_path):
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # so that it waits for nobody else who measures
    monkeypatch.setattr(psutil, "getloadavg", lambda: (0.0, 0.0, 0.0))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    scenario("no profile")
    yield opened("run")
    signal.signal(signal.SIGINT, before)


@pytest.mark.slow
def test_a_run_from_the_button_to_its_end(page):
    assert metrics_of(page)["Problems to measure"] == "4" and not page.button(key="run_start").disabled
    assert page.code[0].value == "compiled-logprobs profile --device=cpu --preset=quick --budget=60"
    fields = {"vocab": ["512"], "rows": ["4"], "dtype": ["float32"], "mode": ["forward"], "backends": ["eager"]}
    for key, value in fields.items():
        page.multiselect(key=f"run_{key}").set_value(value)
    page.number_input(key="run_budget").set_value(2).run()
    assert metrics_of(page)["Problems to measure"] == "1" and page.code[0].value == TINY.command_line()
    page.button(key="run_start").click().run()
    assert not page.exception and "A run is going on" in text_of(page) and page.button(key="run_start").disabled
    assert "A run is going on" in text_of(opened("run")), "in another tab, or after a reload"
    wait_until(lambda: "The last run has finished" in text_of(page.run()))
    assert "1 of 1 problems decided, 1 of them measured by this run." in text_of(page)
    assert table_of(page, "won").to_dict("records")[0]["backend"] == "eager"
    assert "All of this is stored already" in text_of(page) and page.button(key="run_start").disabled
    page.checkbox(key="run_again").check().run()
    assert metrics_of(page)["Problems to measure"] == "1" and not page.button(key="run_start").disabled


@pytest.mark.slow
def test_what_is_not_valid_is_said_and_so_is_a_run_that_died(page, monkeypatch):
    page.multiselect(key="run_vocab").set_value(["<b>x</b>"]).run()
    assert not page.exception and "got vocabulary '<b>x</b>'" in text_of(page)
    assert "run_start" not in [button.key for button in page.button]
    monkeypatch.setenv("COMPILED_LOGPROBS_PROFILES", "/dev/null/profiles")
    run = runs.RUNS.start(TINY)
    wait_until(lambda: not run.is_running)
    page.multiselect(key="run_vocab").set_value([]).run()
    assert "The last run ended before it was done" in text_of(page) and "exit code 2" in text_of(page)
    assert "cannot be written" in "\n".join(one.value for one in page.code)
