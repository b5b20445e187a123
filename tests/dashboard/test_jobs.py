"""A profile run started as the dashboard starts it: real processes, real signals, and what is left of it on disk."""

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace

import pytest
from compiled_logprobs_dashboard import following
from compiled_logprobs_dashboard import runs as jobs
from compiled_logprobs_dashboard.following import NEARLY, Following, Loss, Seen, outlook
from compiled_logprobs_dashboard.runs import Request, RunRefused

from compiled_logprobs.errors import InputError
from compiled_logprobs.problem import problem_to_dict
from compiled_logprobs.store import user_store

pytestmark = pytest.mark.skipif(os.name != "posix", reason="runs are started on Linux and macOS")

TINY = Request(
    "cpu", vocabs=(512,), rows=(4,), dtypes=("float32",), modes=("forward",), backends=("eager",), budget_s=2.0
)
LONG = replace(TINY, rows=tuple(2**n for n in range(2, 18)), budget_s=60.0)
"""Many problems: long enough to be interrupted, and each is over in a second or so."""
LIMIT_S = 120


@pytest.fixture
def folder(tmp_path):
    """Where runs keep their state; none that a test started goes on after it."""
    # As in the server: a process that was started in the background of a shell ignores Ctrl-C, and so would what it starts.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield tmp_path / "run"
    signal.signal(signal.SIGINT, before)
    job = jobs.latest(tmp_path / "run")
    if job is not None and jobs.is_running(job):
        os.killpg(job.pid, signal.SIGKILL)
        wait_until(lambda: not jobs.is_running(job))


def wait_until(true, limit=LIMIT_S):
    until = time.monotonic() + limit
    while not true():
        assert time.monotonic() < until, "it took too long"
        time.sleep(0.05)


def test_a_run_goes_to_its_end_and_is_stored(folder):
    job = jobs.start(TINY, folder)
    reader = Following(job)
    assert jobs.is_running(job) and reader.status() == "running"
    assert jobs.latest(folder) == job
    with pytest.raises(RunRefused, match="A run is going on already"):
        jobs.start(TINY, folder)
    assert jobs.latest(folder) == job
    wait_until(lambda: not jobs.is_running(job))
    assert reader.status() == "finished", job.said()
    seen = reader.seen()
    assert seen.finished == seen.measured == len(seen.problems) == len(seen.decisions) == 1
    assert seen.decisions[0].chosen == "eager" and seen.current is None and seen.losses == []
    assert [decision.chosen for _, decision in user_store().decisions()] == ["eager"]
    assert any("decided: " in line and "eager" in line for line in seen.log) and seen.log[-1].startswith(
        "finished after 1 of 1"
    )
    wait_until(lambda: job.exit_code is not None, limit=10)
    assert job.exit_code == 0
    assert jobs.cancel(job) is None
    # Another dashboard finds it as it is.
    again = Following(jobs.latest(folder))
    assert again.status() == "finished" and again.seen().decisions == seen.decisions

    # What is stored already is not measured again; and the next run takes the place of this one.
    second = jobs.start(TINY, folder)
    wait_until(lambda: not jobs.is_running(second))
    seen = Following(second).seen()
    assert len(seen.decisions) == 1 and seen.measured == 0
    assert not job.events.exists() and jobs.latest(folder) == second


def test_a_cancelled_run_keeps_what_is_finished(folder):
    job = jobs.start(LONG, folder)
    reader = Following(job)
    wait_until(lambda: reader.seen().finished >= 1)
    thread = jobs.cancel(job)
    assert reader.status() in ("stopping", "cancelled")
    jobs.cancel(job)  # pressing twice is harmless
    thread.join(LIMIT_S)
    assert not jobs.is_running(job) and reader.status() == "cancelled"
    seen = reader.seen()
    assert seen.ended["interrupted"] and len(seen.decisions) == len(list(user_store().decisions())) >= 1
    assert seen.finished < len(seen.problems)
    wait_until(lambda: job.exit_code is not None, limit=10)
    assert job.exit_code == 130


STARTER = """
import json, sys
from pathlib import Path
from compiled_logprobs_dashboard import jobs
asked = {name: tuple(value) if isinstance(value, list) else value for name, value in json.loads(sys.argv[1]).items()}
print(jobs.start(jobs.Request(**asked), Path(sys.argv[2])).id)
"""


def test_a_run_outlives_the_dashboard_and_can_be_cancelled_from_the_next(folder):
    starter = subprocess.run(
        [sys.executable, "-c", STARTER, json.dumps(vars(LONG)), str(folder)],
        capture_output=True, text=True, timeout=LIMIT_S, check=True,
    )  # fmt: skip
    job = jobs.latest(folder)
    assert job.id == starter.stdout.strip() and job.request == LONG
    assert jobs.is_running(job)
    reader = Following(job)
    wait_until(lambda: reader.seen().current is not None)
    jobs.cancel(job).join(LIMIT_S)
    assert not jobs.is_running(job) and reader.status() == "cancelled"
    assert job.exit_code is None  # nobody saw its end
    assert reader.seen().ended["interrupted"]


def test_a_killed_run_has_died_and_leaves_no_lock(folder):
    job = jobs.start(LONG, folder)
    os.killpg(job.pid, signal.SIGKILL)
    wait_until(lambda: not jobs.is_running(job))
    assert Following(job).status() == "died"
    wait_until(lambda: job.exit_code is not None, limit=10)
    assert job.exit_code == -signal.SIGKILL


STUBBORN = """
import signal, sys, time
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN)
print('{"event": "ready"}', flush=True)
time.sleep(600)
"""


def test_a_run_that_does_not_listen_is_killed(folder, monkeypatch):
    monkeypatch.setattr(jobs, "GRACE_S", {"SIGINT": 0.3, "SIGTERM": 0.3})
    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda command, **rest: popen([sys.executable, "-c", STUBBORN], **rest))
    job = jobs.start(TINY, folder)
    wait_until(lambda: job.events.read_text().strip())
    jobs.cancel(job).join(LIMIT_S)
    wait_until(lambda: job.exit_code is not None, limit=10)
    assert job.exit_code == -signal.SIGKILL and Following(job).status() == "cancelled"


def test_a_run_that_could_not_begin_says_why(folder, monkeypatch):
    monkeypatch.setenv("COMPILED_LOGPROBS_PROFILES", "/dev/null/profiles")
    job = jobs.start(TINY, folder)
    wait_until(lambda: not jobs.is_running(job))
    wait_until(lambda: job.exit_code is not None, limit=10)
    assert job.exit_code == 2
    assert "cannot be written" in job.said() and Following(job).status() == "died"


def test_many_may_look_at_once(folder, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("started"))
    path = jobs._lock_path(folder)
    path.touch()
    with jobs._lock(path, 0, look=True) as one, jobs._lock(path, 0, look=True) as two:
        assert one is not None and two is not None
        with jobs._lock(path, 0) as lock:
            assert lock is None


def test_only_one_of_many_tabs_starts_a_run(folder, monkeypatch):
    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda command, **rest: popen([sys.executable, "-c", STUBBORN], **rest))
    started, refused = [], []

    def press():
        try:
            started.append(jobs.start(TINY, folder))
        except RunRefused as error:
            refused.append(str(error))

    threads = [threading.Thread(target=press) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(started) == 1 and len(refused) == 7
    assert jobs.latest(folder) == started[0]


def test_a_request_that_is_not_valid_starts_nothing(folder):
    for wrong in (replace(TINY, preset="huge"), replace(TINY, dtypes=("float8",)), replace(TINY, modes=("sideways",))):
        with pytest.raises(InputError):
            jobs.start(wrong, folder)
    assert not folder.exists()


def test_a_place_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunRefused, match="state cannot be kept in .*Mend that"):
        jobs.start(TINY, tmp_path / "file" / "run")


def in_the_way(path, what):
    if what == "a folder":
        path.mkdir()
    elif what == "a link":
        path.symlink_to(path.with_name("elsewhere"))
    else:
        path.write_text("")
        path.chmod(0o000)


@pytest.mark.parametrize("what", ["a folder", "a link", "another user's file"])
def test_a_lock_that_cannot_be_opened_is_a_reason_and_no_traceback(folder, tmp_path, monkeypatch, what):
    if what == "another user's file" and os.geteuid() == 0:
        pytest.skip("root may open any file")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert jobs.why_not(folder) is None
    lock = jobs._lock_path(folder)
    in_the_way(lock, what)
    folder.mkdir()
    (folder / jobs.LATEST).write_text(json.dumps({**RIGHT, "lock": str(lock)}))
    assert "Whether a run is going on cannot be told" in jobs.why_not(folder) and str(lock) in jobs.why_not(folder)
    with pytest.raises(RunRefused, match="set TMPDIR to a folder of your own"):
        jobs.start(TINY, folder)
    job = jobs.latest(folder)
    assert not jobs.is_running(job) and jobs.cancel(job) is None and Following(job).status() == "died"


def test_a_dashboard_with_another_temporary_folder_sees_the_run(folder, tmp_path, monkeypatch):
    places = [tmp_path / "one", tmp_path / "other"]
    for place in places:
        place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(places[0]))
    job = jobs.start(LONG, folder)
    monkeypatch.setattr(tempfile, "tempdir", str(places[1]))
    assert jobs.is_running(jobs.latest(folder)) and Following(jobs.latest(folder)).status() == "running"
    with pytest.raises(RunRefused, match="A run is going on already"):
        jobs.start(TINY, folder)
    jobs.cancel(jobs.latest(folder)).join(LIMIT_S)
    assert not jobs.is_running(job)
    shutil.rmtree(places[0])
    assert jobs.why_not(folder) is None
    second = jobs.start(TINY, folder)
    wait_until(lambda: not jobs.is_running(second))
    assert Following(second).status() == "finished"


def test_elsewhere_the_command_line_is_pointed_to(folder, monkeypatch):
    monkeypatch.setattr(jobs, "why_not", lambda folder: "not here")
    with pytest.raises(RunRefused, match="not here"):
        jobs.start(TINY, folder)


def test_the_command_line_is_the_same_run():
    assert TINY.command_line() == (
        "compiled-logprobs profile --device=cpu --preset=quick --vocab=512 --rows=4 --dtype=float32 --mode=forward "
        "--backend=eager --budget=2"
    )
    assert Request("cuda:1", again=True).arguments() == [
        *("profile", "--device=cuda:1", "--preset=quick", "--budget=60", "--again")
    ]
    assert {problem.device_type for problem in Request("cuda:1").problems()} == {"cuda"}


RIGHT = {
    "id": "20261124T120000-0123abcd",
    "pid": 4711,
    "host": platform.node(),
    "started_at": 1.0,
    "lock": "/nowhere/at/all.lock",
    "request": {"device": "cpu", "vocabs": [512]},
}


def wrong_states():
    yield "not JSON", "{"
    yield "a list", "[]"
    yield "deep", "[" * 100_000
    yield "no request", json.dumps({**RIGHT, "request": None})
    yield "an unknown field", json.dumps({**RIGHT, "folder": "/"})
    yield "an unknown option", json.dumps({**RIGHT, "request": {"device": "cpu", "shell": "rm"}})
    yield "an unknown preset", json.dumps({**RIGHT, "request": {"device": "cpu", "preset": "x"}})
    yield "a name that leads elsewhere", json.dumps({**RIGHT, "id": "../../20261124T120000-0123abcd"})
    yield "every process of this user", json.dumps({**RIGHT, "pid": -1})
    yield "our own group", json.dumps({**RIGHT, "pid": 0})
    yield "a text for a number", json.dumps({**RIGHT, "pid": "4711"})
    yield "a lock that lies nowhere", json.dumps({**RIGHT, "lock": "run.lock"})
    yield "no lock", json.dumps({name: value for name, value in RIGHT.items() if name != "lock"})
    yield "another machine", json.dumps({**RIGHT, "host": "elsewhere"})


@pytest.mark.parametrize(("what", "text"), list(wrong_states()), ids=[what for what, _ in wrong_states()])
def test_a_state_that_cannot_be_trusted_is_none(tmp_path, what, text):
    assert jobs.latest(tmp_path) is None
    (tmp_path / jobs.LATEST).write_text(text)
    assert jobs.latest(tmp_path) is None


def test_a_state_that_can_be_trusted_is_read(tmp_path):
    (tmp_path / jobs.LATEST).write_text(json.dumps(RIGHT))
    job = jobs.latest(tmp_path)
    assert job.request == Request("cpu", vocabs=(512,)) and job.pid == 4711
    assert not jobs.is_running(job) and Following(job).status() == "died"
    assert job.said() == "" and job.exit_code is None


def job_with(tmp_path, *lines: bytes):
    (tmp_path / jobs.LATEST).write_text(json.dumps(RIGHT))
    job = jobs.latest(tmp_path)
    job.events.write_bytes(b"".join(lines))
    return job


PROBLEM = problem_to_dict(TINY.problems()[0])


def line(event: str, **fields: object) -> bytes:
    return json.dumps({"event": event, **fields}).encode() + b"\n"


START = line("start", device="cpu", environment="0" * 16, problems=[PROBLEM, {**PROBLEM, "rows": 8}])
FIRST = line("problem", problem=PROBLEM, known=False, index=1, total=2)


def test_events_are_read_as_they_come_also_in_parts(tmp_path):
    job = job_with(tmp_path, START, FIRST[:20])
    reader = Following(job)
    assert len(reader.seen().problems) == 2 and reader.seen().current is None
    with job.events.open("ab") as file:
        file.write(FIRST[20:] + line("step", step="check", candidate="cpp"))
    assert reader.seen().current.rows == 4 and reader.seen().doing == "checking cpp"
    with job.events.open("ab") as file:
        for _ in range(3):
            file.write(line("step", step="time", candidate="eager") + line("round", seconds={"eager": 1.0, "cpp": 2.0}))
    assert reader.seen().doing == "timing eager, cpp: round 3"


def test_events_of_a_long_run_are_read_to_the_end_at_once(tmp_path):
    many = [line("of a later release", text="x" * 1000)] * (2 * following.CHUNK_BYTES // 1000)
    end = line("end", done=2, total=2, seconds=1.0, interrupted=False)
    assert Following(job_with(tmp_path, START, *many, end)).status() == "finished"


def test_a_tab_looks_at_a_copy(tmp_path):
    job = job_with(tmp_path, START, FIRST)
    reader = Following(job)
    seen = reader.seen()
    before = list(seen.log)
    with job.events.open("ab") as file:
        file.write(line("failed", reason="nothing got through"))
    assert reader.seen().losses and not seen.losses and list(seen.log) == before


def test_a_run_that_cannot_be_noted_down_is_ended(tmp_path, monkeypatch):
    started = []
    real = jobs.subprocess.Popen
    monkeypatch.setattr(jobs.subprocess, "Popen", lambda *a, **k: started.append(real(*a, **k)) or started[-1])

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(jobs.os, "replace", full)
    with pytest.raises((OSError, RunRefused)):
        jobs.start(TINY, tmp_path)
    (process,) = started
    wait_until(lambda: process.poll() is not None)
    assert jobs.latest(tmp_path) is None


def test_what_failed_is_told_for_each_problem(tmp_path):
    job = job_with(
        tmp_path,
        START,
        FIRST,
        line("lost", candidate="cpp", outcome="crashed", reason="killed by SIGSEGV"),
        line("lost", candidate="flash_attn", outcome="unavailable", reason="needs a CUDA or ROCm device"),
        line("failed", reason="nothing got through"),
        line("problem", problem={**PROBLEM, "rows": 8}, known=False, index=2, total=2),
    )
    seen = Following(job).seen()
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
def test_a_line_that_is_no_event_harms_nothing(tmp_path, wrong):
    seen = Following(job_with(tmp_path, START, wrong, FIRST)).seen()
    assert seen.current is not None and len(seen.problems) == 2


def test_a_log_stays_short(tmp_path):
    seen = Following(
        job_with(tmp_path, START, *[line("lost", candidate="x", outcome="failed", reason="r")] * 1000)
    ).seen()
    assert len(seen.log) == 200


def test_the_outlook():
    problem = next(iter(TINY.problems()))
    nothing = outlook(Seen(), 60, 5)
    assert (nothing.share, nothing.seconds_left, nothing.measured) == (0, None, False)
    begun = Seen(problems=[problem] * 4, current=problem)
    assert outlook(begun, 60, 0).seconds_left == 240  # the budget of each: at most, about
    assert outlook(begun, 60, 30).share == pytest.approx(0.125)
    late = outlook(begun, 60, 1000)
    assert late.share == pytest.approx(NEARLY / 4) and 180 < late.seconds_left < 184
    assert not late.measured
    failed = Seen(problems=[problem] * 2, losses=[Loss(problem, None, "not decided", "")])
    assert outlook(failed, 60, 70).share == 0.5 and outlook(failed, 60, 70).seconds_left == 60


def test_the_outlook_goes_by_what_problems_took(folder):
    job = jobs.start(TINY, folder)
    wait_until(lambda: not jobs.is_running(job))
    (decision,) = Following(job).seen().decisions
    took = decision.tuning_seconds
    known = replace(decision, tuning_seconds=1e6)  # of an earlier run: stored already, not measured by this one
    seen = Seen(problems=[decision.problem] * 4, decisions=[known, decision], measured=1)
    view = outlook(seen, 60, took)
    assert view.measured and view.seconds_left == pytest.approx(2 * took) and view.share == 0.5
