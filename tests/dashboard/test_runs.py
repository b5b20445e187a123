"""Profile runs: what to know before, a child that is followed, cancelled and killed, and one at a time."""

import dataclasses
import json
import os
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
import torch
from compiled_logprobs_dashboard import runs
from compiled_logprobs_dashboard.runs import READY_S, START_S, Request, RunRefused, Runs, preflight
from typer.testing import CliRunner

from compiled_logprobs.cli import profile
from compiled_logprobs.cli.main import app
from compiled_logprobs.errors import InputError
from compiled_logprobs.machine import clock
from compiled_logprobs.store import user_store
from compiled_logprobs.store.files import Store
from compiled_logprobs.tuning.tuner import alone_on
from tests.helpers.dashboard_runs import LIMIT_S, LONG, TINY, event, wait_until

pytestmark = pytest.mark.usefixtures("quiet")


def test_the_command_line_is_the_same_run():
    assert TINY.command_line() == (
        "compiled-logprobs profile --device=cpu --preset=quick --vocab=512 --rows=4 --dtype=float32 --mode=forward "
        "--backend=eager --budget=2"
    )
    again = Request("cuda:1", again=True)
    assert again.arguments() == ["profile", "--device=cuda:1", "--preset=quick", "--again"]
    assert {problem.device_type for problem in again.problems()} == {"cuda"}
    assert Request("cpu", backends=("package.module:Mine",)).valid()
    for wrong in ({"preset": "huge"}, {"dtypes": ("float8",)}, {"modes": ("sideways",)}, {"backends": ("mine",)}):
        for act in (Runs().start, preflight):
            with pytest.raises(InputError):
                act(dataclasses.replace(TINY, **wrong))


OTHERS = {"temperatures": ("number", "per_token"), "layouts": ("slice",), "labels": (2,), "entropy": (True, False)}
RESULTS = {"logsumexp": (True,), "argmax": (False,), "sum_p_squared": (True,)}


@pytest.mark.parametrize(
    "options", [{"preset": "rl"}, {**OTHERS, **RESULTS, "masked": (True,), "budget_s": 5.0, "again": True}]
)
def test_the_command_measures_what_is_asked_for(monkeypatch, options):
    request, posed = Request("cpu", **options), []
    monkeypatch.setattr(profile, "tune_all", lambda problems, *_, **__: posed.extend(problems) or iter(()))
    CliRunner().invoke(app, [*request.arguments(), "--progress=jsonl"])
    assert posed == request.problems() and len(posed) == (12 if request.preset == "rl" else 16)


def test_the_time_and_the_memory_that_it_may_take(monkeypatch):
    request = dataclasses.replace(TINY, rows=(64, 512), dtypes=("float32", "bfloat16"), budget_s=10.0)
    monkeypatch.setattr(clock, "free_memory", lambda device: 2**30)
    check = preflight(request)
    assert len(check.problems) == check.to_measure == 4 and check.warnings == ()
    assert check.most_seconds == START_S + 4 * (READY_S + 10) and check.likely_seconds is None
    assert preflight(request, seconds_before=[1.0, 4.0, 99.0]).likely_seconds == START_S + 16
    assert preflight(request, seconds_before=[99.0]).likely_seconds == check.most_seconds, "never more than that"
    assert (check.largest.rows, check.largest.dtype) == (512, torch.float32)
    assert check.free_bytes == 2**30 and check.needed_bytes in (3 * 512 * 512 * 4, 4 * 512 * 512 * 4)
    monkeypatch.setattr(clock, "free_memory", lambda device: check.needed_bytes)
    (warning,) = preflight(request).warnings
    assert "fewer rows will be timed" in warning
    monkeypatch.setattr(clock, "free_memory", lambda device: None)
    assert preflight(request).free_bytes is None


def test_a_busy_machine_is_said(monkeypatch):
    monkeypatch.setattr(psutil, "getloadavg", lambda: (50.0, 0.0, 0.0))
    with alone_on(torch.device("cpu"), LIMIT_S) as alone:
        assert alone
        told = " ".join(preflight(TINY).warnings)
    assert "Another process of this library is measuring on cpu now" in told and "50.0 programs ran or waited" in told


def test_what_keeps_it_from_being_stored(monkeypatch, tmp_path):
    assert preflight(TINY, store=Store(tmp_path / "not" / "yet")).obstacles == ()
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage._replace(free=1000))
    assert preflight(TINY, store=Store(tmp_path)).obstacles[0].endswith("has 1000 bytes left. Free some space.")
    monkeypatch.setattr(os, "access", lambda place, mode: False)
    assert "cannot be written" in preflight(TINY, store=Store(tmp_path)).obstacles[0]


WAITING = f"import time; print({json.dumps(event('ready').decode())}, flush=True); time.sleep(600)"
STUBBORN = "import signal\nfor n in (2, 15): signal.signal(n, signal.SIG_IGN)\n" + WAITING


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "code"), [(WAITING, -signal.SIGINT), (STUBBORN, -signal.SIGKILL)], ids=["listens", "does not"]
)
def test_a_cancelled_run_ends_in_any_case(program, monkeypatch, text, code):
    monkeypatch.setattr(runs, "GRACE_S", (20.0, 20.0) if text == WAITING else (0.3, 0.3))
    program(text)
    run = runs.RUNS.start(TINY)
    wait_until(lambda: run.events.read_bytes().strip())
    thread = run.cancel()
    assert run.status() in ("stopping", "cancelled")
    run.cancel()  # pressing twice is harmless
    thread.join(LIMIT_S)
    assert run.process.wait(LIMIT_S) in (code, 1) and run.status() == "cancelled"


@pytest.mark.slow
def test_only_one_of_many_tabs_starts_a_run_and_no_second_dashboard_does(program):
    program(WAITING)
    desks = [*[runs.RUNS] * 4, Runs()]
    with ThreadPoolExecutor(len(desks)) as tabs:
        errors = [future.exception() for future in [tabs.submit(desk.start, TINY) for desk in desks]]
    refused = [str(error) for error in errors if isinstance(error, RunRefused)]
    assert errors.count(None) == 1 and len(refused) == 4 and "A run is going on already" in refused[0]
    for desk in (runs.RUNS, desks[-1]):
        if desk.latest is not None:
            desk.latest.process.kill()


def test_a_place_that_cannot_be_written_is_said(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(runs, "user_state_path", lambda *_, **__: tmp_path / "file")
    with pytest.raises(RunRefused, match="files cannot be kept in .*Mend that"):
        runs.RUNS.start(TINY)


@pytest.mark.slow
def test_a_cancelled_run_keeps_what_is_finished():
    run = runs.RUNS.start(LONG)
    wait_until(lambda: run.seen().finished >= 1)
    run.cancel().join(LIMIT_S)
    seen = run.seen()
    assert run.status() == "cancelled" and seen.end["interrupted"] and seen.finished < len(seen.problems), run.said()
    assert len(seen.decisions) == len(list(user_store().decisions())) and seen.measured == len(seen.decisions)
    assert any("measured: " in line and "eager" in line for line in seen.log)
    assert preflight(LONG).stored == len(seen.decisions), "what is stored already is not measured again"
