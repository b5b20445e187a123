"""The worker program: nothing that happens in there costs more than the candidate, and nothing of it stays behind."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from compiled_logprobs.backends.eager import Eager
from compiled_logprobs.check.run import check_backend
from compiled_logprobs.machine.clock import MIB, extra_peak_bytes, why_no_peak
from compiled_logprobs.problem import Problem, problem_to_dict
from compiled_logprobs.store.files import ROOT_VARIABLE
from compiled_logprobs.tuning import tuner as tuning
from compiled_logprobs.tuning import worker as program
from compiled_logprobs.tuning.process import Worker, WorkerLost
from compiled_logprobs.tuning.tuner import Tuner
from compiled_logprobs.tuning.worker import Work
from tests.helpers.backends_for_tuning import FLOOD_BYTES, FOLDER_VARIABLE, has_ended, is_running, pids, registered
from tests.helpers.disks import a_full_disk

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals, forks and groups of processes are tested")

resource = pytest.importorskip("resource", reason="Windows has none")

CPU = torch.device("cpu")
PROBLEM = Problem("cpu", rows=64, vocab=512, dtype=torch.float32, needs_grad=True)
SECONDS = 60.0
START_S = 120.0


def pid_of(worker: Worker) -> int:
    return worker._process.pid


def threads_of_workers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("worker ")]


def no_thread_is_left() -> bool:
    for thread in threads_of_workers():
        thread.join(20.0)
    return not threads_of_workers()


def outcomes(decision):
    return {name: (candidate.outcome, candidate.reason) for name, candidate in decision.candidates.items()}


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """Where backends leave the ids of their processes."""
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    return tmp_path


# --- whatever ends the program, or holds it up ------------------------------------------------------------------------

LOST = {
    "exits": ("Exits", "crashed", "compile: ended with exit code 3"),
    "segfaults": ("Segfaults", "crashed", "compile: killed by SIGSEGV"),
    "killed": ("KillsItself", "crashed", "compile: killed by SIGKILL, as the system does when memory runs out"),
    "interrupts": ("RaisesKeyboardInterrupt", "crashed", "compile: killed by SIGINT; it said: "),
    "exits_in_check": ("ExitsInTheCheck", "crashed", "check: ended with exit code 6"),
    "writes": ("WritesOnThePipes", "crashed", r"compile: wrote 'gibberish\n' where only the worker program writes"),
    "floods": ("FloodsThePipes", "crashed", r"compile: wrote 'gibberish\n' where only the worker program writes"),
    "forks": ("ForksAndExits", "crashed", "compile: ended with exit code 4"),
    "loops": ("Loops", "timeout", "compile: no end after 5 s"),
    "hangs": ("HangsInImport", "timeout", "import: no end after 3 s"),
}


@pytest.fixture(scope="module")
def lost(tmp_path_factory):
    """A decision in spite of all of these, and what they left in their folder."""
    folder = tmp_path_factory.mktemp("pids")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(FOLDER_VARIABLE, str(folder))
        patch.setitem(tuning.LIMITS_S, "import", 3.0)
        patch.setitem(tuning.LIMITS_S, "compile", 5.0)
        names = {name: target for name, (target, _, _) in LOST.items()}
        with registered(**names, right="Right"), Tuner(CPU, short=True) as tuner:
            decision, evidence = tuner.decide(PROBLEM, SECONDS, names=[*names, "right"])
            assert is_running(pid_of(tuner._worker))  # it is kept for the next problem
    return decision, evidence.seconds, folder


@pytest.mark.parametrize("name", LOST)
def test_what_ends_the_program_costs_the_candidate(lost, name):
    _, outcome, reason = LOST[name]
    candidate = lost[0].candidates[name]
    assert candidate.outcome == outcome
    assert candidate.reason.startswith(reason) if reason.endswith(": ") else candidate.reason == reason
    assert "/" not in candidate.reason.replace("[...]", "")


def test_the_others_are_measured_all_the_same(lost):
    decision, times, _ = lost
    assert set(times) == {"eager", "right"} and decision.chosen in times
    assert all(decision.candidates[name].measured for name in times)
    assert {len(series) for series in times.values()} == {decision.rounds} and decision.rounds >= 20


def test_a_child_that_holds_the_pipes_is_neither_waited_for_nor_left(lost):
    (child,) = pids(lost[2], "forked")
    assert has_ended(child)


def test_what_loops_is_gone(lost):
    (looping,) = pids(lost[2], "looping")
    assert has_ended(looping)


def test_no_thread_listens_to_what_is_gone(lost):
    assert no_thread_is_left()


# --- nuisances --------------------------------------------------------------------------------------------------------


def test_what_candidates_print_and_read_stays_out_of_the_protocol(folder):
    """They flood both streams, write events to standard output, read what could be jobs, and leave a child behind."""
    names = {"floods": "Floods", "writes": "WritesEvents", "reads": "ReadsStandardInput", "leaves": "LeavesAChild"}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with registered(**names), Tuner(CPU, short=True) as tuner:
        decision, evidence = tuner.decide(PROBLEM, 5.0, names=list(names))
        again, _ = tuner.decide(PROBLEM, 0.0, names=list(names))
        (child,) = pids(folder, "child")
        assert is_running(child)
    assert has_ended(child)
    assert set(evidence.seconds) == {"eager", *names}, outcomes(decision)
    assert all(candidate.measured for candidate in (*decision.candidates.values(), *again.candidates.values()))
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * (1 if sys.platform == "darwin" else 1024)
    assert grown < FLOOD_BYTES / 2
    assert no_thread_is_left()


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell who started whom")
@pytest.mark.parametrize(
    ("target", "left"), [("LeavesADaemon", 2), ("LeavesADaemonAndExits", 1), ("LeavesAnOrphanAndExits", 1)]
)
def test_a_child_in_a_session_of_its_own_is_not_left(folder, target, left):
    with registered(leaves=target), Tuner(CPU, short=True) as tuner:
        decision, _ = tuner.decide(PROBLEM, 0.0, names=["leaves"])
    children = pids(folder, "daemon") + pids(folder, "orphan")
    assert len(children) == left and all(map(has_ended, children)), outcomes(decision)
    assert decision.candidates["leaves"].measured is (target == "LeavesADaemon")


def test_only_what_the_program_started_is_ended(folder):
    command = [sys.executable, "-c", "import time; time.sleep(600)"]
    with Worker() as worker, subprocess.Popen(command, start_new_session=True) as bystander:
        worker.next_event(within=START_S)
        worker.end()
        assert bystander.poll() is None
        bystander.kill()


# --- crashes that others have caused ----------------------------------------------------------------------------------


@pytest.mark.parametrize("later", ["ExitsLater", "ExitsSoon"])
def test_a_crash_while_another_is_at_work_costs_whoever_caused_it(later):
    """Whether a third or eager itself is at work by then."""
    with registered(later=later, right="Right"), Tuner(CPU, short=True) as tuner:
        decision, evidence = tuner.decide(PROBLEM, 5.0, names=["later", "right"])
    assert decision.candidates["later"].outcome == "crashed"
    assert "ended with exit code 9" in decision.candidates["later"].reason
    assert set(evidence.seconds) == {"eager", "right"} and decision.baseline == "eager", outcomes(decision)


def test_where_only_one_can_have_caused_a_crash_it_costs_that_one():
    with registered(later="ExitsSoon"), Tuner(CPU, short=True) as tuner:
        decision, evidence = tuner.decide(PROBLEM._replace(rows=2048, vocab=4096), 60.0, names=["later"])
    assert outcomes(decision)["later"][0] == "crashed" and set(evidence.seconds) == {"eager"}


def test_one_that_was_out_before_costs_nobody_when_it_crashes():
    told = []
    with registered(later="WrongAndExitsLater", right="Right"), Tuner(CPU, short=True, on_event=told.append) as tuner:
        decision, evidence = tuner.decide(PROBLEM._replace(rows=2048, vocab=4096), 60.0, names=["later", "right"])
    assert decision.candidates["later"].outcome == "wrong" and set(evidence.seconds) == {"eager", "right"}
    assert "program_lost" in [event["event"] for event in told]


# --- memory -----------------------------------------------------------------------------------------------------------


def job(problem, **changes):
    return {
        "problem": problem_to_dict(problem),
        "device": "cpu",
        "threads": torch.get_num_threads(),
        "candidates": [["eager", ""]],
        "checked": [],
        "incumbent": None,
        "simplicity": {"eager": 0},
        "short": False,
        "seconds": SECONDS,
        "strict": False,
        "seed": 1,
    } | changes


@pytest.mark.skipif(why_no_peak("cpu") is not None, reason=str(why_no_peak("cpu")))
@pytest.mark.parametrize(
    "problem",
    [
        Problem("cpu", 1024, 2048, torch.float32, needs_grad=True),
        Problem("cpu", 1024, 2048, torch.bfloat16, needs_grad=True, entropy=True, temperature="per_token"),
        Problem("cpu", 1024, 2048, torch.float32, needs_grad=True, layout="other", masked_logits=True),
        Problem("cpu", 1024, 2048, torch.float32, needs_grad=True, inplace_backward=True),
    ],
    ids=lambda problem: problem.details() or "plain",
)
def test_a_check_takes_no_more_than_is_reckoned_with(problem):
    taken = extra_peak_bytes(lambda: check_backend("eager", problem, device="cpu", seed=1), "cpu")
    assert 0.1 * program.bytes_of_check(problem) < taken <= program.bytes_of_check(problem)


def test_rows_shrink_to_what_is_free_and_the_record_says_so(monkeypatch):
    problem = Problem("cpu", 4096, 2048, torch.float32, needs_grad=True)
    free, told, peak = 240 * MIB, [], None  # of 4096 rows, less than four copies can have half
    checked = program.check_backend

    def check(*arguments, **options):
        nonlocal peak
        peak = extra_peak_bytes(lambda: told.append(checked(*arguments, **options)), "cpu")
        return told.pop()

    monkeypatch.setattr(program, "free_memory", lambda device: free)
    monkeypatch.setattr(program, "check_backend", check)
    Work(job(problem), lambda event, **fields: told.append({"event": event, **fields})).run()
    (found,) = (event for event in told if event["event"] == "checked")
    (measuring,) = (event for event in told if event["event"] == "measuring")
    assert 1 < found["rows"] < problem.rows and found["fewer_for_memory"]
    assert peak is None or peak <= program.SHARE_OF_FREE_MEMORY * free
    assert 1 < measuring["rows"] < problem.rows
    assert measuring["rows"] * problem.vocab * 4 * 4 <= program.SHARE_OF_FREE_MEMORY * free


def test_nothing_is_called_where_there_is_no_room_for_a_row(monkeypatch):
    monkeypatch.setattr(program, "free_memory", lambda device: MIB)
    monkeypatch.setattr(program, "check_backend", lambda *_, **__: pytest.fail("it is checked"))
    told = []
    Work(job(PROBLEM), lambda event, **fields: told.append({"event": event, **fields})).run()
    (lost,) = (event for event in told if event["event"] == "lost")
    assert lost["outcome"] == "oom" and "may take 0 MiB of what is free" in lost["reason"]


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is set by what Linux tells of a process")
def test_a_check_that_runs_out_of_memory_is_tried_with_fewer_rows():
    problem = Problem("cpu", 4096, 512, torch.float32, needs_grad=True)
    told = []
    with registered(needs="NeedsMemoryInTheCheck"), Tuner(CPU, on_event=told.append) as tuner:
        decision, evidence = tuner.decide(problem, 1.0, names=["needs"])
    found = {event["candidate"]: event for event in told if event["event"] == "checked"}
    assert found["eager"]["rows"] == 4096 and not found["eager"]["fewer_for_memory"]
    assert found["needs"]["rows"] < 4096 and found["needs"]["fewer_for_memory"]
    assert set(evidence.seconds) == {"eager", "needs"}, outcomes(decision)
    words = f"; checked with {found['needs']['rows']} rows, for which there was memory"
    assert (words in decision.reason) is (decision.chosen == "needs")
    assert decision.checked_rows == found[decision.chosen]["rows"]


# --- disks ------------------------------------------------------------------------------------------------------------

CALL = """
import json, warnings
import torch
import compiled_logprobs as clp

logits, labels = torch.randn(1024, 1031, requires_grad=True), torch.randint(1031, (1024,))
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    out = clp.log_probs_from_logits(logits, labels)
    out.sum().backward()
true = logits.detach().double().log_softmax(-1).gather(-1, labels[:, None])[:, 0]
assert (out.detach() - true).abs().max() < 1e-5 and logits.grad.isfinite().all()
found = clp.explain(logits, labels)
outcomes = {name: (one.outcome, one.reason) for name, one in found.decision.candidates.items()}
print(json.dumps([found.backend, found.source, outcomes, [str(one.message) for one in told]]))
"""


@pytest.fixture
def full(tmp_path):
    """The environment of a process that finds no room on its disk, wherever it keeps something."""
    place = a_full_disk(tmp_path)
    names = ("TMPDIR", "XDG_CACHE_HOME", "XDG_DATA_HOME", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", ROOT_VARIABLE)
    yield {**os.environ, **dict.fromkeys(names, str(place))}
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_full_disk_costs_the_candidates_that_need_room_and_nobody_else(full, monkeypatch):
    for name, value in full.items():
        monkeypatch.setenv(name, value)
    with registered(right="Right"), Tuner(CPU, short=True) as tuner:
        decision, evidence = tuner.decide(PROBLEM, SECONDS, names=["cpp", "compiled", "right"])
        assert is_running(pid_of(tuner._worker))
    assert set(evidence.seconds) == {"eager", "right"} and decision.chosen in evidence.seconds
    for name in ("cpp", "compiled"):
        outcome, reason = outcomes(decision)[name]
        assert outcome in ("unavailable", "failed") and "No space left on device" in reason, (name, outcome, reason)


def test_a_call_is_served_where_the_disk_is_full(full):
    path = os.pathsep.join(filter(None, sys.path))
    environment = {**full, "PYTHONPATH": path, "COMPILED_LOGPROBS_MODE": "tune", "COMPILED_LOGPROBS_BUDGET_S": "60"}
    called = subprocess.run([sys.executable, "-c", CALL], env=environment, capture_output=True, text=True, timeout=300)
    assert called.returncode == 0, called.stderr
    backend, source, found, told = json.loads(called.stdout)
    assert (backend, source) == ("eager", "tuned here") and found["eager"][0] == "chosen"
    for name in ("cpp", "compiled"):
        assert found[name][0] in ("unavailable", "failed") and "No space left on device" in found[name][1], found
    assert [one for one in told if "cannot be written: the disk is full" in one], told


# --- the life of the program ------------------------------------------------------------------------------------------


def test_one_program_serves_several_problems_and_ends_with_the_tuner(folder):
    with registered(tells="TellsItsProcess"), Tuner(CPU, short=True) as tuner:
        for rows in (64, 96, 128):
            decision, _ = tuner.decide(PROBLEM._replace(rows=rows), 0.0, names=["tells"])
            assert decision.problem.rows == rows and decision.candidates["tells"].measured
        (pid,) = pids(folder, "worker")
        assert is_running(pid)
    assert has_ended(pid)
    assert no_thread_is_left()


def test_a_program_that_was_lost_is_replaced(folder):
    with registered(tells="TellsItsProcess", exits="Exits"), Tuner(CPU, short=True) as tuner:
        decision, _ = tuner.decide(PROBLEM, 0.0, names=["tells", "exits"])
        assert decision.candidates["exits"].outcome == "crashed" and decision.candidates["tells"].measured
        assert len(pids(folder, "worker")) == 2
        (pid,) = filter(is_running, pids(folder, "worker"))
    assert has_ended(pid)


def test_a_program_that_ends_between_two_problems_is_replaced():
    """As where a candidate's own thread crashes it, or the system takes its memory."""
    with Tuner(CPU, short=True) as tuner:
        tuner.decide(PROBLEM, 0.0, names=[])
        first = pid_of(tuner._worker)
        os.kill(first, signal.SIGKILL)
        assert has_ended(first)
        decision, _ = tuner.decide(PROBLEM, 0.0, names=[])
        assert decision.chosen == "eager" and pid_of(tuner._worker) != first


@pytest.mark.parametrize("event", ["started", "step", "round"])
def test_an_interrupt_ends_the_program(event):
    pid = None

    def on_event(told):
        nonlocal pid
        if told["event"] == event and pid is None:
            pid = pid_of(tuner._worker)
            raise KeyboardInterrupt

    with Tuner(CPU, short=True, on_event=on_event) as tuner:
        with pytest.raises(KeyboardInterrupt):
            tuner.decide(PROBLEM, 0.0, names=[])
        assert has_ended(pid)
        decision, _ = tuner.decide(PROBLEM, 0.0, names=[])  # and it can go on
        assert decision.chosen == "eager"
    assert no_thread_is_left()


TUNE = """
import sys
import torch
from backends_for_tuning import leave_pid, registered
from compiled_logprobs.backends.eager import Eager
from compiled_logprobs.problem import Problem
from compiled_logprobs.store.files import problem_to_dict
from compiled_logprobs.tuning import tuner as tuning
from compiled_logprobs.tuning.process import Worker

class Told(Worker):
    def __init__(self):
        super().__init__()
        leave_pid("started", self._process.pid)

tuning.Worker = Told
with registered(loops="Loops"), tuning.Tuner(torch.device("cpu"), short=True) as tuner:
    tuner.decide(Problem("cpu", 64, 512, torch.float32, needs_grad=True), 600.0, names=["loops"])
"""


@pytest.mark.parametrize("when", ["started", "looping"])
def test_the_program_does_not_outlive_a_parent_that_is_killed(folder, when):
    """Whether it is starting then or deep in foreign code; and the parent has no `__main__` guard."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    script = folder / "script.py"
    script.write_text(TUNE)
    parent = subprocess.Popen([sys.executable, str(script)], env=environment)
    try:
        until = time.monotonic() + START_S
        while not pids(folder, when) and parent.poll() is None and time.monotonic() < until:
            time.sleep(0.02)
        (worker,) = pids(folder, when)
        assert is_running(worker)
    finally:
        parent.kill()
        parent.wait()
    assert has_ended(worker)


# --- the program by itself --------------------------------------------------------------------------------------------


def test_a_program_that_cannot_be_started_is_lost(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(WorkerLost, match="the worker program cannot be started: .*No such file") as caught:
        Worker()
    assert caught.value.outcome == "crashed"


def test_it_imports_what_this_process_would_import(monkeypatch, tmp_path):
    """A module beside the script of whoever calls, or on a path that was added by hand."""
    lines = ("from backends_for_tuning import Right", "class Here(Right):", "    pass")
    (tmp_path / "only_here.py").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(str(tmp_path))
    with registered(here="only_here:Here"), Tuner(CPU, short=True) as tuner:
        decision, _ = tuner.decide(PROBLEM, 0.0, names=["here"])
    assert decision.candidates["here"].measured, decision.candidates["here"].reason


def test_a_current_folder_that_is_gone_is_passed_over(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend("")
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with Worker() as worker:
        assert worker.next_event(within=START_S) == {"event": "ready"}


def test_a_file_in_the_current_folder_hides_no_module(monkeypatch, tmp_path):
    (tmp_path / "json.py").write_text("raise SystemExit('hidden')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    with Worker() as worker:
        assert worker.next_event(within=START_S) == {"event": "ready"}


def test_a_job_that_is_none_ends_it_with_what_it_said():
    with Worker() as worker:
        assert worker.next_event(within=START_S) == {"event": "ready"}
        worker.send({"problem": "none"})
        with pytest.raises(WorkerLost) as caught:
            worker.next_event(within=START_S)
        assert caught.value.outcome == "crashed"
        assert caught.value.reason.startswith("ended with exit code 1; it said: Traceback ")
        assert 'File "worker.py"' in caught.value.reason and str(Path(__file__).parent.parent) not in str(caught.value)
        worker.send({})  # to nobody
        assert worker._process.poll() is not None
    assert no_thread_is_left()


def test_silence_is_a_timeout_and_the_end_of_it_is_complete():
    worker = Worker()
    assert worker.next_event(within=START_S) == {"event": "ready"}
    with pytest.raises(WorkerLost, match="^no end after 0 s$") as caught:
        worker.next_event(within=0.2)
    assert caught.value.outcome == "timeout" and worker._process.poll() is None
    for _ in range(2):
        worker.end()
        assert not is_running(pid_of(worker))
    assert no_thread_is_left()


def test_it_ends_when_there_is_nobody_to_send_jobs():
    with Worker() as worker:
        worker.next_event(within=START_S)
        worker._process.stdin.close()
        assert worker._process.wait(20.0) == 0


def test_it_never_tunes_by_itself(monkeypatch):
    """Whatever the mode of the process that asks: a candidate may call the public functions."""
    monkeypatch.setenv("COMPILED_LOGPROBS_MODE", "tune")
    with Worker() as worker:
        worker.next_event(within=START_S)
        environment = Path(f"/proc/{pid_of(worker)}/environ")
        if not environment.exists():
            pytest.skip("the environment of another process is read from Linux's files")
        assert b"COMPILED_LOGPROBS_MODE=off" in environment.read_bytes().split(b"\0")


def test_events_are_json_without_nan():
    with registered(right="Right"), Tuner(CPU, short=True, on_event=lambda e: told.append(e)) as tuner:
        told = []
        tuner.decide(PROBLEM, 0.0, names=["right"])
    assert json.loads(json.dumps(told, allow_nan=False)) == told
    assert {"started", "step", "loaded", "first_call", "checked", "measuring", "memory", "round", "done"} <= {
        event["event"] for event in told
    }


def test_where_nobody_gets_through_at_the_full_size_each_has_its_own_outcome(monkeypatch):
    """In this process: the program itself goes on, where it used to end for want of a first round."""
    forward = Eager.forward

    def few_only(self, logits, *rest, entropy):
        if len(logits) > 1024:
            raise MemoryError("too many rows")
        return forward(self, logits, *rest, entropy=entropy)

    monkeypatch.setattr(Eager, "forward", few_only)
    told = []
    problem = Problem("cpu", 2048, 4096, torch.float32)
    Work(job(problem, short=True), lambda event, **fields: told.append({"event": event, **fields})).run()
    (lost,) = (event for event in told if event["event"] == "lost")
    assert (lost["candidate"], lost["outcome"]) == ("eager", "oom") and "too many rows" in lost["reason"]
    assert told[-1]["event"] == "circumstances" and told[-1]["percent"] == {}
