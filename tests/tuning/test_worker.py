"""The worker program itself: the fastest right backend, whatever the others do, within time and memory."""

import re
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from compiled_logprobs.backends import backends, get_backend, is_loaded
from compiled_logprobs.backends.eager import Eager
from compiled_logprobs.check.run import check_backend
from compiled_logprobs.decision import MEASURED, PLAIN
from compiled_logprobs.machine.clock import MIB, extra_peak_bytes, why_no_peak
from compiled_logprobs.machine.environment import fingerprint_of
from compiled_logprobs.problem import Problem, bucket, problem_to_dict
from compiled_logprobs.store.files import ROOT_VARIABLE
from compiled_logprobs.tuning import worker as worker_module
from compiled_logprobs.tuning.tuner import Tuner
from compiled_logprobs.tuning.worker import Job, bytes_of_check
from tests.helpers.backends_for_tuning import Right, Wrong, registered
from tests.helpers.disks import a_full_disk

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
PROBLEM = Problem("cpu", rows=256, vocab=4096, dtype=torch.float32, layout="rows")
SMALL = PROBLEM._replace(rows=64, vocab=512)


def decide(problem=PROBLEM, seconds=30.0, *, short=True, on_event=lambda event: None, **targets):
    """Decide between eager and the backends given by name; `compiled`, which takes long, is left out."""
    with registered(**targets), Tuner(CPU, short=short, on_event=on_event) as tuner:
        return tuner.decide(problem, seconds, names=list(targets))


def outcomes(decision):
    return {name: candidate.outcome for name, candidate in decision.candidates.items()}


# --- the fastest right one, and what becomes of the others ------------------------------------------------------------

REASONS = {
    "wrong": ("wrong", r"log_prob_error, .*: normal: \S+, limit \S+"),
    "wrong_sign": ("wrong", r"log_prob_error, .*"),
    "wrong_for_many": ("wrong", r"log_prob_error, .*: 256 rows, all and some: \S+, limit \S+"),
    "changes_threads": ("failed", r".*it left torch with another number of threads, default dtype"),
    "raises_unencodable": ("failed", r"compile: RuntimeError: no such file: caf\? \x00 €"),
    "raises_from_home": ("failed", r"compile: FileNotFoundError: no tables in my tables/fast.bin, nor in \w+\.py"),
    "raises_memory_error": ("oom", r"compile: MemoryError: the arena is full"),
    "asks_for_a_petabyte": ("oom", r"compile: RuntimeError: .*allocate memory.*1125899906842624 bytes.*"),
    "tells_a_number": ("failed", r"import: TypeError: fingerprint\(\) returned 7; a string is valid"),
    "needs_flat_logits": ("unsupported", r"takes flat logits only"),
    "needs_another_machine": ("unavailable", r"needs a quantum computer"),
    "not_a_backend": (
        "unavailable",
        r"backend 'not_a_backend': '[\w.]+:NotABackend' is a NotABackend, not a Backend.*",
    ),
    "missing": ("unavailable", r"backend 'missing' cannot be imported from 'no_such_package:Backend': ModuleNot.*"),
    "an_instance": ("unavailable", r"only the process that registered it knows it; register it by its place, .*"),
}
TARGETS = {name: "".join(word.capitalize() for word in name.split("_")) for name in REASONS} | {
    "not_a_backend": "NotABackend",
    "missing": "no_such_package:Backend",
    "an_instance": Right(),
    "asks_for_a_petabyte": "AsksForAPetabyte",
    "tells_a_number": "TellsANumber",
    "fast": "Remembers",
}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Right and wrong ones and failures, in a home with a name that is found again wherever it turns up."""
    with pytest.MonkeyPatch.context() as patch:
        home = tmp_path_factory.mktemp("home") / "Margarethe of somewhere"
        home.mkdir()
        patch.setenv("HOME", str(home))
        patch.setenv("USER", "margarethe")
        return decide(**TARGETS)


def test_the_fastest_right_backend_is_chosen(mixed):
    decision, _ = mixed
    assert decision.chosen == "fast" and decision.baseline == "eager" and decision.settled
    assert decision.winner.outcome == "chosen" and decision.winner.speedup.low > 1.03
    assert decision.candidates["eager"].reason == "slower than fast by more than 3%"


@pytest.mark.parametrize("name", REASONS)
def test_a_failure_is_an_outcome_with_a_reason(mixed, name):
    outcome, reason = REASONS[name]
    candidate = mixed[0].candidates[name]
    assert candidate.outcome == outcome
    assert re.fullmatch(reason, candidate.reason)
    assert candidate.seconds is candidate.speedup is candidate.speedup_over_plain is None


def test_only_what_is_right_was_timed(mixed):
    decision, evidence = mixed
    assert set(evidence.seconds) == {"eager", "fast", PLAIN}
    assert {len(series) for series in evidence.seconds.values()} == {decision.rounds} and decision.rounds >= 20
    timed = [decision.candidates[name] for name in ("eager", "fast")]
    assert all(candidate.outcome in MEASURED and candidate.speedup_over_plain for candidate in timed)
    assert decision.plain_seconds > 0.0
    assert decision.candidates["wrong"].first_call_seconds > 0.0


def test_what_the_check_saw_case_by_case_comes_along(mixed):
    """Of all that got as far as the check, the wrong ones above all."""
    decision, evidence = mixed
    assert set(evidence.cases) == {name for name, candidate in decision.candidates.items() if candidate.checks}
    for name, by_case in evidence.cases.items():
        failed = {check.name for case in by_case for check in case.checks if not check.passed}
        assert failed == {check.name for check in decision.candidates[name].checks if not check.passed}
    positive = next(case for case in evidence.cases["wrong_sign"] if case.case == "normal")
    worst = positive.errors[0].worst[0]
    assert worst.got == 0.0 > worst.true  # no backend's result may be positive, so that what is gets cut
    assert worst.error == pytest.approx(-worst.true, rel=1e-3)


def test_the_decision_is_of_this_environment_and_of_this_code(mixed):
    decision, _ = mixed
    assert decision.environment["fingerprint"] == fingerprint_of(CPU)
    assert decision.candidates["wrong"].fingerprint == Wrong().fingerprint()
    assert decision.candidates["eager"].fingerprint == get_backend("eager").fingerprint()
    assert decision.bandwidth["read"] > 0.0 and decision.winner.percent_of_bandwidth > 0.0
    assert decision.telemetry is None and "NVIDIA" in decision.telemetry_reason
    assert decision.measured_rows == PROBLEM.rows > decision.checked_rows  # the short check has few
    assert type(decision).from_json(decision.to_json()) == decision


def test_the_decision_tells_no_path_and_no_name(mixed):
    text = "".join(part.to_json().decode() for part in mixed)
    places = {Path.home(), tempfile.gettempdir(), sys.prefix, Path(torch.__file__).parent, *sys.path}
    assert not [place for place in map(str, places) if len(place) > 1 and place in text]
    assert not re.search(r"margarethe|site-packages|[\"' (]/\w", text, re.IGNORECASE)
    assert not re.search(rf"\b{re.escape(socket.gethostname())}\b", text)


def test_nothing_of_it_was_loaded_here(mixed):
    with registered(**TARGETS):
        assert not [name for name in TARGETS if name != "an_instance" and is_loaded(name)]
    assert not set(TARGETS) & set(backends())


# --- time -------------------------------------------------------------------------------------------------------------


def test_the_winner_is_proven_at_the_full_size_where_fewer_rows_were_timed():
    """What fits into the budget is few rows; what is wrong with more of them must not serve more."""
    problem = Problem("cpu", rows=65536, vocab=4096, dtype=torch.float32)
    with registered(fast="Remembers", wrong="RemembersWrong"), Tuner(CPU, short=True) as tuner:
        right, wrong = (tuner.decide(problem, 3.0, names=[name])[0] for name in ("fast", "wrong"))
    assert right.chosen == "fast" and right.measured_rows < problem.rows == right.proven_rows
    assert outcomes(wrong) == {"eager": "chosen", "wrong": "wrong"}
    assert wrong.candidates["wrong"].reason.startswith("with 65536 rows, the log-probability of row 0 is off by 1")
    assert wrong.proven_rows == wrong.measured_rows


def test_n_shrinks_where_time_is_short():
    decision, _ = decide(PROBLEM._replace(rows=4096), seconds=4.0, slow="SlowByRow")
    assert decision.problem.rows == 4096 and 1 < decision.measured_rows < 4096
    assert decision.measured_rows == bucket(PROBLEM._replace(rows=decision.measured_rows)).rows
    assert decision.candidates["slow"].measured


# --- memory -----------------------------------------------------------------------------------------------------------


def order(problem, **changes):
    return {
        "problem": problem_to_dict(problem),
        "device": "cpu",
        "threads": torch.get_num_threads(),
        "candidates": [["eager", ""]],
        "checked": [],
        "incumbent": None,
        "simplicity": {"eager": 0},
        "short": False,
        "plain": True,
        "seconds": 30.0,
        "strict": False,
        "seed": 1,
    } | changes


def run_here(problem, **changes):
    """The events of a job in this process."""
    told = []
    Job(order(problem, **changes), lambda event, **fields: told.append({"event": event, **fields})).run()
    return told


@pytest.mark.skipif(why_no_peak("cpu") is not None, reason=str(why_no_peak("cpu")))
@pytest.mark.parametrize(
    "problem",
    [
        Problem("cpu", 1024, 2048, torch.bfloat16, needs_grad=True, entropy=True, temperature="per_token"),
        Problem("cpu", 1024, 2048, torch.float32, needs_grad=True, layout="other", masked_logits=True),
    ],
    ids=lambda problem: problem.details(),
)
def test_a_check_takes_no_more_than_is_reckoned_with(problem):
    taken = extra_peak_bytes(lambda: check_backend("eager", problem, device="cpu", seed=1), "cpu")
    assert 0.1 * bytes_of_check(problem) < taken <= bytes_of_check(problem)


def test_rows_shrink_to_what_is_free_and_the_events_say_so(monkeypatch):
    problem = Problem("cpu", 4096, 1024, torch.float32, needs_grad=True)
    free = 120 * MIB  # of 4096 rows, less than four copies can have half
    monkeypatch.setattr(worker_module, "free_memory", lambda device: free)
    told = run_here(problem, seconds=1.0)
    (checked,) = (event for event in told if event["event"] == "checked")
    (measuring,) = (event for event in told if event["event"] == "measuring")
    assert 1 < checked["rows"] < problem.rows and checked["fewer_for_memory"]
    assert 1 < measuring["rows"] < problem.rows
    assert measuring["rows"] * problem.vocab * 4 * 4 <= worker_module.SHARE_OF_FREE_MEMORY * free


def test_nothing_is_called_where_there_is_no_room_for_a_row(monkeypatch):
    monkeypatch.setattr(worker_module, "free_memory", lambda device: MIB)
    monkeypatch.setattr(worker_module, "check_backend", lambda *_, **__: pytest.fail("it is checked"))
    (lost,) = (event for event in run_here(SMALL) if event["event"] == "lost")
    assert lost["outcome"] == "oom" and "may take 0 MiB of what is free" in lost["reason"]


def test_where_nobody_gets_through_at_the_full_size_each_has_its_own_outcome(monkeypatch):
    forward = Eager.forward

    def few_only(self, logits, *rest, entropy):
        if len(logits) > 1024:
            raise MemoryError("too many rows")
        return forward(self, logits, *rest, entropy=entropy)

    monkeypatch.setattr(Eager, "forward", few_only)
    told = run_here(Problem("cpu", 2048, 4096, torch.float32), short=True)
    (lost,) = (event for event in told if event["event"] == "lost")
    assert (lost["candidate"], lost["outcome"]) == ("eager", "oom") and "too many rows" in lost["reason"]
    assert told[-1]["event"] == "circumstances" and told[-1]["percent"] == {}


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is set by what Linux tells of a process")
def test_a_check_that_runs_out_of_memory_is_tried_with_fewer_rows():
    told = []
    problem = Problem("cpu", 4096, 256, torch.float32, needs_grad=True)
    decision, _ = decide(problem, 1.0, short=False, on_event=told.append, needs="NeedsMemoryInTheCheck")
    checked = {event["candidate"]: event for event in told if event["event"] == "checked"}
    assert checked["eager"]["rows"] == 4096 and not checked["eager"]["fewer_for_memory"]
    assert checked["needs"]["rows"] < 4096 and checked["needs"]["fewer_for_memory"]
    assert all(decision.candidates[name].measured for name in ("eager", "needs")), decision.candidates


# --- disks ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def full_disk(tmp_path, monkeypatch):
    """No room on the disk, wherever something is kept."""
    place = a_full_disk(tmp_path)
    names = ("TMPDIR", "XDG_CACHE_HOME", "XDG_DATA_HOME", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", ROOT_VARIABLE)
    for name in names:
        monkeypatch.setenv(name, str(place))
    yield
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.usefixtures("full_disk")
def test_a_full_disk_costs_the_candidates_that_need_room_and_nobody_else():
    with registered(right="Right"), Tuner(CPU, short=True) as tuner:
        decision, _ = tuner.decide(SMALL, 2.0, names=["cpp", "right"])
    assert all(decision.candidates[name].measured for name in ("eager", "right"))
    cpp = decision.candidates["cpp"]
    assert cpp.outcome in ("unavailable", "failed") and "No space left on device" in cpp.reason, cpp
