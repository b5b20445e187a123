"""The worker program from outside: whatever happens in there costs the candidate, and nothing of it stays behind."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from types import SimpleNamespace

import psutil
import pytest
import torch

from compiled_logprobs.problem import Problem
from compiled_logprobs.tuning import tuner as tuner_module
from compiled_logprobs.tuning.process import Worker, WorkerLost
from compiled_logprobs.tuning.statistics import fewest_rounds
from compiled_logprobs.tuning.tuner import Tuner
from tests.helpers.backends_for_tuning import FLOOD_BYTES, FOLDER_VARIABLE, has_ended, is_running, pids, registered

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals and groups of processes are tested")

resource = pytest.importorskip("resource", reason="Windows has none")

CPU = torch.device("cpu")
PROBLEM = Problem("cpu", rows=64, vocab=512, dtype=torch.float32, needs_grad=True)
START_S = 120.0


def pid_of(worker: Worker) -> int:
    return worker._process.pid


def no_thread_is_left() -> bool:
    threads = [thread for thread in threading.enumerate() if thread.name.startswith("worker ")]
    for thread in threads:
        thread.join(20.0)
    return not any(thread.is_alive() for thread in threads)


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """Where backends leave the ids of their processes."""
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    return tmp_path


# --- without a process ------------------------------------------------------------------------------------------------


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


# --- what candidates do to it -----------------------------------------------------------------------------------------

LOST = {
    "exits": ("Exits", "crashed", "compile: ended with exit code 3; it said: no device"),
    "writes": ("WritesOnThePipes", "crashed", r"compile: wrote 'gibberish\n' where only the worker program writes"),
    "hangs": ("HangsInImport", "timeout", "import: no end after 3 s"),
}


@pytest.mark.slow
def test_what_ends_the_program_costs_the_candidate_and_the_others_are_measured(monkeypatch, folder):
    monkeypatch.setitem(tuner_module.LIMITS_S, "import", 3.0)
    names = {name: target for name, (target, _, _) in LOST.items()}
    with registered(**names, right="TellsItsProcess"), Tuner(CPU, short=True) as tuner:
        decision, evidence = tuner.decide(PROBLEM, 5.0, names=[*names, "right"])
        kept = pid_of(tuner._worker)
        assert is_running(kept)  # it serves the next problem
        again, _ = tuner.decide(PROBLEM._replace(rows=96), 0.0, names=["right"])
        assert again.candidates["right"].measured and pid_of(tuner._worker) == kept
        assert (
            again.rounds >= fewest_rounds(2) and again.plain_seconds is None
        )  # a budget of nothing has no room for it
    told = {name: (candidate.outcome, candidate.reason) for name, candidate in decision.candidates.items()}
    assert {name: told[name] for name in LOST} == {name: tuple(expected[1:]) for name, expected in LOST.items()}
    assert {"eager", "right"} <= set(evidence.seconds) and not set(LOST) & set(evidence.seconds)
    assert pids(folder, "worker") == [kept] and has_ended(kept)
    assert no_thread_is_left()


@pytest.mark.slow
def test_what_candidates_print_and_read_stays_out_of_the_protocol(monkeypatch, folder):
    """They flood both streams, write events to standard output, read what could be jobs, and leave children behind.

    One is imported from where only this process has been told to look, as from beside the script of whoever calls.
    """
    names = {"floods": "Floods", "writes": "WritesEvents", "reads": "ReadsStandardInput", "leaves": "LeavesChildren"}
    lines = ("from tests.helpers.backends_for_tuning import Right", "class Here(Right):", "    pass")
    (folder / "only_here.py").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(str(folder))
    names["here"] = "only_here:Here"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with registered(**names), Tuner(CPU, short=True) as tuner:
        decision, evidence = tuner.decide(PROBLEM, 3.0, names=list(names))
        children = pids(folder, "child")
        assert len(children) == 2 and all(map(is_running, children))
    assert all(map(has_ended, children))
    assert {"eager", *names} <= set(evidence.seconds), decision.candidates
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * (1 if sys.platform == "darwin" else 1024)
    assert grown < FLOOD_BYTES
    assert no_thread_is_left()


# --- its life ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_silence_is_a_timeout_and_a_job_that_is_none_ends_it_with_what_it_said(monkeypatch, tmp_path):
    (tmp_path / "json.py").write_text("raise SystemExit('a file in the current folder hides no module')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    monkeypatch.setenv("COMPILED_LOGPROBS_MODE", "tune")
    with Worker() as worker:
        assert worker.next_event(within=START_S) == {"event": "ready"}
        # A candidate may call the public functions, which never tune in there.
        assert psutil.Process(pid_of(worker)).environ()["COMPILED_LOGPROBS_MODE"] == "off"
        with pytest.raises(WorkerLost, match="^no end after 0 s$") as caught:
            worker.next_event(within=0.2)
        assert caught.value.outcome == "timeout" and worker._process.poll() is None
        worker.send({"problem": "none"})
        with pytest.raises(WorkerLost, match="^ended with exit code 1; it said: Traceback ") as caught:
            worker.next_event(within=START_S)
        assert caught.value.outcome == "crashed" and 'File "worker.py"' in caught.value.reason
        worker.send({})  # to nobody
        worker.end()
    assert no_thread_is_left()


@pytest.mark.slow
def test_it_ends_when_there_is_nobody_to_send_jobs(monkeypatch, tmp_path):
    """It starts though the current folder was removed."""
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with Worker() as worker:
        worker.next_event(within=START_S)
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
def test_it_does_not_outlive_a_parent_that_is_killed(folder):
    """Though a candidate holds it up; and the parent has no `__main__` guard."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    script = folder / "script.py"
    script.write_text(TUNE)
    parent = subprocess.Popen([sys.executable, str(script)], env=environment)
    try:
        until = time.monotonic() + START_S
        while not pids(folder, "looping") and parent.poll() is None and time.monotonic() < until:
            time.sleep(0.02)
        (worker,) = pids(folder, "looping")
        assert is_running(worker)
    finally:
        parent.kill()
        parent.wait()
    assert has_ended(worker)
