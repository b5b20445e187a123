"""The worker program from outside: how it ends, and that nothing of it stays behind."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from compiled_logprobs.tuning.process import Worker, WorkerLost
from tests.helpers.backends_for_tuning import FOLDER_VARIABLE, has_ended, pids

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals and groups of processes are tested")

START_S = 120.0


@pytest.mark.parametrize(
    ("code", "said", "reason"),
    [
        (3, [], "ended with exit code 3"),
        (-signal.SIGSEGV, [], "killed by SIGSEGV"),
        (-signal.SIGKILL, [], "killed by SIGKILL, as the system does when memory runs out"),
        (1, ["Traceback:\n", "  no /opt/some/file.so\n"], "ended with exit code 1; it said: Traceback: no file.so"),
    ],
)
def test_how_it_ended_is_told_in_words(code, said, reason):
    worker = object.__new__(Worker)
    worker._process, worker._tail = SimpleNamespace(returncode=code), deque(said)
    assert worker._how_it_ended() == reason


@pytest.mark.parametrize("executable", ["/nowhere/python", ""])
def test_a_program_that_cannot_be_started_is_lost(monkeypatch, executable):
    monkeypatch.setattr(sys, "executable", executable)
    with pytest.raises(WorkerLost, match="the worker program cannot be started: ") as caught:
        Worker()
    assert caught.value.outcome == "crashed"


def test_a_process_that_nothing_ends_holds_nobody_up(monkeypatch):
    """As one that waits within a driver."""

    def wait(timeout):
        raise subprocess.TimeoutExpired("worker", timeout)

    closed = []
    worker = object.__new__(Worker)
    worker._process = SimpleNamespace(
        pid=2**30,  # nobody's
        poll=lambda: 0,
        kill=lambda: None,
        wait=wait,
        stdin=SimpleNamespace(close=lambda: closed.append(True)),
    )
    worker.end()
    assert closed


@pytest.mark.slow
def test_silence_is_a_timeout_and_a_job_that_is_none_ends_it_with_what_it_said(monkeypatch, tmp_path):
    (tmp_path / "json.py").write_text("raise SystemExit('a file in the current folder hides no module')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    monkeypatch.setenv("COMPILED_LOGPROBS_MODE", "tune")
    with Worker() as worker:
        assert worker.next_event(within=START_S) == {"event": "ready"}
        # A candidate may call the public functions, which never tune in there.
        assert psutil.Process(worker._process.pid).environ()["COMPILED_LOGPROBS_MODE"] == "off"
        with pytest.raises(WorkerLost, match="^no end after 0 s$") as caught:
            worker.next_event(within=0.2)
        assert caught.value.outcome == "timeout" and worker._process.poll() is None
        worker._lines.put("gibberish\n")
        with pytest.raises(WorkerLost, match=r"^wrote 'gibberish\\n' where only the worker program writes$"):
            worker.next_event(within=START_S)
        worker.send({"problem": "none"})
        with pytest.raises(WorkerLost, match="^ended with exit code 1; it said: Traceback ") as caught:
            worker.next_event(within=START_S)
        assert caught.value.outcome == "crashed" and 'File "worker.py"' in caught.value.reason
        worker.send({})  # to nobody
        worker.end()
    threads = [thread for thread in threading.enumerate() if thread.name.startswith("worker ")]
    for thread in threads:
        thread.join(20.0)
    assert not any(thread.is_alive() for thread in threads)


TWO_THREADS = """
import threading, time
threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
print(flush=True)
time.sleep(600)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="other systems have a priority for all threads of a process")
def test_all_its_threads_give_way():
    worker = object.__new__(Worker)
    command, pipe = [sys.executable, "-c", TWO_THREADS], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, start_new_session=True) as worker._process:
        worker._process.stdout.readline()
        worker.give_way()
        threads = [int(task.name) for task in Path(f"/proc/{worker._process.pid}/task").iterdir()]
        priorities = [os.getpriority(os.PRIO_PROCESS, thread) for thread in threads]
        worker.end()
    assert priorities == [19, 19]


@pytest.mark.slow
def test_it_ends_when_there_is_nobody_to_send_jobs(monkeypatch, tmp_path):
    """It starts though the current folder was removed, and outlives the thread that started it."""
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with ThreadPoolExecutor(1) as threads:
        started = threads.submit(Worker).result()
        event = threads.submit(started.next_event, within=START_S)
    with started as worker:
        assert event.result() == {"event": "ready"}
        worker._process.stdin.close()
        assert worker._process.wait(20.0) == 0


TUNE = """
import torch
from compiled_logprobs.problem import Problem
from compiled_logprobs.tuning.tuner import Tuner
from tests.helpers.backends_for_tuning import registered

with registered(loops="Loops"), Tuner(torch.device("cpu"), short=True) as tuner:
    tuner.decide(Problem("cpu", 64, 512, torch.float32, needs_grad=True), 600.0, names=["loops"])
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell a process of its parent's death")
def test_it_does_not_outlive_a_parent_that_is_killed(tmp_path):
    """Though a candidate holds it up; and the parent has no `__main__` guard."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), FOLDER_VARIABLE: str(tmp_path)}
    script = tmp_path / "script.py"
    script.write_text(TUNE)
    parent = subprocess.Popen([sys.executable, str(script)], env=environment)
    try:
        until = time.monotonic() + START_S
        while not pids(tmp_path, "looping") and parent.poll() is None and time.monotonic() < until:
            time.sleep(0.02)
        (worker,) = pids(tmp_path, "looping")
        assert not has_ended(worker, within=0.0)
    finally:
        parent.kill()
        parent.wait()
    assert has_ended(worker)
