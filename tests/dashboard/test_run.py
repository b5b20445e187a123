"""The page Run and what it shows: what to know before, the form, a run from start to end, and what failed."""

import dataclasses
import os
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("streamlit", reason="the extra `dashboard` is not installed")

import streamlit as st
import torch
from compiled_logprobs_dashboard import preflight
from compiled_logprobs_dashboard import runs as jobs
from compiled_logprobs_dashboard.following import Following, Loss
from compiled_logprobs_dashboard.preflight import START_S
from compiled_logprobs_dashboard.runs import Request
from compiled_logprobs_dashboard.tables.run import decided, losses, standings
from streamlit.testing.v1 import AppTest

from compiled_logprobs.errors import InputError
from compiled_logprobs.machine import clock
from compiled_logprobs.store.files import Store
from compiled_logprobs.tuning.tuner import alone_on
from tests.helpers.dashboard_stores import SCENARIOS, all_failed, good, problem, scenario
from tests.helpers.nvml_library import build, use

__all__ = ["scenario"]

APP = Path(__file__).parent.parent / "compiled_logprobs" / "dashboard" / "app.py"
LIMIT_S = 120
TINY = Request(
    "cpu", vocabs=(512,), rows=(4,), dtypes=("float32",), modes=("forward",), backends=("eager",), budget_s=2.0
)


@pytest.fixture(autouse=True)
def state(monkeypatch, tmp_path):
    """Where runs keep their state; none that a test started goes on after it."""
    folder = tmp_path / "run"
    monkeypatch.setattr(jobs, "state_folder", lambda: folder)
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0))  # whatever else this machine does
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    st.cache_resource.clear()
    yield folder
    signal.signal(signal.SIGINT, before)
    st.cache_resource.clear()
    job = jobs.latest()
    if job is not None and jobs.is_running(job):
        os.killpg(job.pid, signal.SIGKILL)


def open_page() -> AppTest:
    test = AppTest.from_file(str(APP), default_timeout=60).run()
    test.switch_page("app_pages/run.py").run()
    assert not test.exception, test.exception
    return test


def metrics(test: AppTest) -> dict[str, str]:
    return {metric.label: metric.value for metric in test.metric}


def texts(test: AppTest) -> str:
    shown = [*test.caption, *test.info, *test.warning, *test.error, *test.subheader, *test.markdown]
    return "\n".join(one.value for one in shown).replace("\\", "")


def fill(test: AppTest, *, rows: tuple[str, ...]) -> None:
    test.multiselect(key="run_vocab").set_value(["512"])
    test.multiselect(key="run_rows").set_value(list(rows))
    test.multiselect(key="run_dtype").set_value(["float32"])
    test.multiselect(key="run_mode").set_value(["forward"])
    test.multiselect(key="run_backends").set_value(["eager"])
    test.number_input(key="run_budget").set_value(2)
    test.run()
    assert not test.exception, test.exception


def until(test: AppTest, said: str) -> None:
    """Look again and again, as the page itself does, until it shows that."""
    limit = time.monotonic() + LIMIT_S
    while said not in texts(test):
        assert time.monotonic() < limit, texts(test)
        time.sleep(0.3)
        test.run()
        assert not test.exception, test.exception


@pytest.mark.parametrize("name", SCENARIOS)
def test_it_opens_with_any_profiles(scenario, name):
    scenario(name)
    test = open_page()
    assert metrics(test)["Problems to measure"] == "4" and not test.button(key="run_start").disabled
    assert test.code[0].value == "compiled-logprobs profile --device=cpu --preset=quick --budget=60"


def test_a_run_from_the_button_to_its_end_and_one_that_is_cancelled(scenario):
    store = scenario("no profile")
    test = open_page()
    fill(test, rows=("4",))
    assert metrics(test)["Problems to measure"] == "1"
    assert test.code[0].value == TINY.command_line()
    test.button(key="run_start").click().run()
    assert not test.exception and "A run is going on" in texts(test)
    assert test.button(key="run_start").disabled
    other = open_page()  # another tab, or the same after a reload
    assert "A run is going on" in texts(other)
    until(test, "The last run has finished")
    assert "1 of 1 problems decided, 1 of them measured by this run." in texts(test)
    assert [record.chosen for _, record in store.decisions()] == ["eager"]
    (standing,) = [frame.value for frame in test.dataframe if "won" in frame.value]
    assert standing.to_dict("records")[0]["backend"] == "eager" and standing["won"].tolist() == [1]
    assert metrics(test)["Problems to measure"] == "0" and "All of this is stored already" in texts(test)
    assert test.button(key="run_start").disabled
    test.checkbox(key="run_again").check().run()
    assert metrics(test)["Problems to measure"] == "1" and not test.button(key="run_start").disabled

    test = open_page()
    fill(test, rows=tuple(str(2**n) for n in range(2, 17)))
    assert metrics(test)["Problems to measure"] == "14"  # one of 15 is stored already
    test.button(key="run_start").click().run()
    reader = Following(jobs.latest())
    limit = time.monotonic() + LIMIT_S
    while reader.seen().finished < 2:
        assert time.monotonic() < limit
        time.sleep(0.1)
    test.run()
    test.button(key="run_cancel").click().run()
    until(test, "The last run was cancelled")
    kept = len(list(store.decisions()))
    assert 2 <= kept < 15 and kept == len(Following(jobs.latest()).seen().decisions)
    assert not test.button(key="run_start").disabled


def test_a_run_that_died_says_so_with_what_it_said_last(scenario, monkeypatch):
    scenario("no profile")
    with monkeypatch.context() as patch:
        patch.setenv("COMPILED_LOGPROBS_PROFILES", "/dev/null/profiles")
        job = jobs.start(TINY)
    limit = time.monotonic() + LIMIT_S
    while jobs.is_running(job) or job.exit_code is None:
        assert time.monotonic() < limit
        time.sleep(0.1)
    test = open_page()
    assert "The last run ended before it was done" in texts(test) and "exit code 2" in texts(test)
    assert "cannot be written" in "\n".join(one.value for one in test.code)


def test_what_is_not_valid_is_said_and_cannot_be_started(scenario):
    scenario("no profile")
    test = open_page()
    test.multiselect(key="run_vocab").set_value(["<b>x</b>"])
    test.run()
    assert not test.exception
    assert "got vocabulary '<b>x</b>'" in texts(test)
    assert "run_start" not in [button.key for button in test.button]


def test_where_runs_cannot_be_started_it_points_to_the_command_line(monkeypatch):
    monkeypatch.setattr(jobs, "why_not", lambda *_: "`compiled-logprobs profile` does the same")
    test = open_page()
    assert "does the same" in texts(test) and not test.button


def test_the_time_it_may_take():
    check = preflight.preflight(dataclasses.replace(TINY, rows=(4, 64, 1024), budget_s=10.0))
    assert len(check.problems) == check.to_measure == 3
    assert check.most_seconds == START_S + 30 and check.likely_seconds is None
    check = preflight.preflight(
        dataclasses.replace(TINY, rows=(4, 64, 1024), budget_s=10.0), seconds_before=[1.0, 4.0, 99.0]
    )
    assert check.likely_seconds == START_S + 12
    check = preflight.preflight(TINY, seconds_before=[99.0])
    assert check.likely_seconds == START_S + 2  # never more than the budget


def test_the_memory_it_needs(monkeypatch):
    request = Request(
        "cpu", vocabs=(1000,), rows=(64, 512), dtypes=("float32", "bfloat16"), modes=("forward", "backward")
    )
    monkeypatch.setattr(clock, "free_memory", lambda device: 2**30)
    check = preflight.preflight(request)
    assert (check.largest.rows, check.largest.dtype) == (512, torch.float32)
    assert check.logits_bytes == 512 * 1000 * 4
    assert check.needed_bytes in (3 * check.logits_bytes, 4 * check.logits_bytes) and check.free_bytes == 2**30
    assert check.warnings == ()
    monkeypatch.setattr(clock, "free_memory", lambda device: check.needed_bytes)
    (warning,) = preflight.preflight(request).warnings
    assert "fewer rows will be timed" in warning
    monkeypatch.setattr(clock, "free_memory", lambda device: None)
    assert preflight.preflight(request).free_bytes is None


def test_memory_that_the_driver_keeps_is_not_free(monkeypatch, tmp_path):
    use(build(tmp_path), monkeypatch)
    gpu = SimpleNamespace(uuid="aaaaaaaa-0000-0000-0000-000000000000", pci_domain_id=0, pci_bus_id=10, pci_device_id=0)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    assert preflight._free_bytes(torch.device("cuda:0")) == 1000 - 100 - 50


def test_a_busy_machine_is_said(monkeypatch):
    monkeypatch.setattr(os, "getloadavg", lambda: (50.0, 0.0, 0.0))
    with alone_on(torch.device("cpu"), 0) as alone:
        assert alone
        waits, busy = preflight.preflight(TINY).warnings
    assert "Another process of this library is measuring on cpu now" in waits
    assert "50.0 programs ran or waited" in busy


def test_what_keeps_it_from_being_stored(monkeypatch, tmp_path):
    assert preflight.preflight(TINY, store=Store(tmp_path / "not" / "yet")).obstacles == ()
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage._replace(free=1000))
    (full,) = preflight.preflight(TINY, store=Store(tmp_path)).obstacles
    assert full.endswith("has 0 MiB left. Free some space.")
    monkeypatch.setattr(os, "access", lambda place, mode: False)
    (closed,) = preflight.preflight(TINY, store=Store(tmp_path)).obstacles
    assert "cannot be written" in closed


def test_a_request_that_is_not_valid_is_an_error():
    with pytest.raises(InputError):
        preflight.preflight(dataclasses.replace(TINY, modes=("x",)))


def test_standings_name_how_many_problems_each_was_timed_in():
    table = standings([good(), good(problem(64)), all_failed(problem(2048))])
    rows = {row["backend"]: row for row in table.to_dict("records")}
    assert table["backend"].iloc[0] == "cpp"
    assert (rows["cpp"]["won"], rows["cpp"]["timed"], rows["cpp"]["did not get through"]) == (2, 2, 1)
    assert rows["cpp"]["median speed-up over the baseline"] == pytest.approx(6.67)
    assert (rows["eager"]["won"], rows["eager"]["timed"]) == (1, 3)
    assert rows["third"]["timed"] == 0 and rows["third"]["median speed-up over the baseline"] != 0
    assert rows["flash_attn"]["cannot run it"] == 2 and rows["flash_attn"]["did not get through"] == 1
    assert standings([]).empty


def test_winners_and_losses_are_told_as_they_are():
    table = decided([good(), all_failed(problem(64))])
    assert list(table["winner"]) == ["eager", "cpp"] and list(table["rows"]) == [64, 512]
    assert table["speed-up over the baseline"].iloc[1].startswith("6.67x (")
    found = losses([Loss(problem(), "third\u202e", "crashed", "line\nline"), Loss(None, None, "not decided", "no")])
    assert found.to_dict("records")[0] == {
        "problem": found["problem"].iloc[0], "backend": "third", "outcome": "crashed", "reason": "line line",
    }  # fmt: skip
    assert found.to_dict("records")[1] == {"problem": "", "backend": "all", "outcome": "not decided", "reason": "no"}
    unchecked = dataclasses.replace(good().winner, checks=())
    table = decided([good(candidates={**good().candidates, "cpp": unchecked})])
    assert table["sign check"].tolist() == ["not stored"]
    assert decided([]).empty and losses([]).empty
