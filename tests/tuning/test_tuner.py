"""Deciding by measurement: the fastest right backend, whatever the others do, within the budget, as a record."""

import json
import math
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from compiled_logprobs.backends import backends, get_backend, is_loaded
from compiled_logprobs.backends.eager import Eager
from compiled_logprobs.decision import MEASURED, Decision
from compiled_logprobs.machine.environment import fingerprint_of
from compiled_logprobs.problem import Problem, bucket
from compiled_logprobs.tuning import tuner as tuning
from compiled_logprobs.tuning.rounds import Measurement
from compiled_logprobs.tuning.statistics import fewest_rounds, look
from compiled_logprobs.tuning.tuner import Tuner, TuningFailed, alone_on
from tests.helpers.backends_for_tuning import TIMED_CALLS, Right, Wrong, is_running, registered

CPU = torch.device("cpu")
# Large enough for the passes over memory, which `Right` has fewer of, to be most of the time.
PROBLEM = Problem("cpu", rows=256, vocab=4096, dtype=torch.float32, needs_grad=True)
SMALL = PROBLEM._replace(vocab=512)
SECONDS = 60.0


def decide(problem=PROBLEM, seconds=SECONDS, *, strict=False, on_event=lambda event: None, **targets):
    """Decide between eager and the backends given by name; `compiled`, which takes long, is left out."""
    with registered(**targets), Tuner(CPU, short=True, on_event=on_event) as tuner:
        return tuner.decide(problem, seconds, strict=strict, names=list(targets))


def outcomes(decision):
    return {name: candidate.outcome for name, candidate in decision.candidates.items()}


# --- the fastest right one --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mixed():
    """Right, wrong and crashing ones."""
    return decide(
        wrong="Wrong",
        wrong_sign="WrongSign",
        wrong_for_many="WrongForMany",
        crashes="Segfaults",
        right="Right",
        same="Same",
    )


def test_the_fastest_right_backend_is_chosen(mixed):
    decision, _ = mixed
    assert decision.chosen == "right" and decision.baseline == "eager" and decision.settled
    assert decision.winner.outcome == "chosen" and decision.winner.speedup.low > 1.03
    others = outcomes(decision)
    # The choice is settled as soon as it cannot be faster than the right one: how much slower it is may still be open then.
    assert others.pop("same") in ("slower", "tie")
    assert others == {
        "eager": "slower",
        "wrong": "wrong",
        "wrong_sign": "wrong",
        "wrong_for_many": "wrong",
        "crashes": "crashed",
        "right": "chosen",
    }


def test_the_record_says_why_the_others_are_not(mixed):
    candidates = mixed[0].candidates
    assert candidates["eager"].reason == "slower than right by more than 3%"
    assert re.match(r"log_prob_error, .*gradient_error.*: normal: \S+, limit \S+$", candidates["wrong"].reason)
    assert candidates["wrong_sign"].reason.startswith("log_prob_error, ")
    assert re.match(r"log_prob_error, .*: 256 rows, all and some: \S+, limit \S+$", candidates["wrong_for_many"].reason)
    assert 0 < candidates["wrong_for_many"].checks_passed < len(candidates["wrong_for_many"].checks)
    assert candidates["crashes"].reason == "compile: killed by SIGSEGV"


def test_what_the_check_found_case_by_case_comes_along(mixed):
    """Of all that got as far as the check, the wrong ones above all."""
    decision, evidence = mixed
    assert set(evidence.cases) == {name for name, one in decision.candidates.items() if one.checks}
    for name, by_case in evidence.cases.items():
        told = {check.name: check for case in by_case for check in case.checks}
        assert told.keys() == {check.name for check in decision.candidates[name].checks}
        failed = {check.name for case in by_case for check in case.checks if not check.passed}
        assert failed == {check.name for check in decision.candidates[name].checks if not check.passed}
    positive = next(case for case in evidence.cases["wrong_sign"] if case.case == "normal")
    worst = positive.errors[0].worst[0]
    assert worst.got == 0.0 > worst.true  # no backend's result may be positive, so that what is gets cut
    assert worst.error == pytest.approx(-worst.true, rel=1e-3)


def test_without_the_check_the_wrong_one_would_win():
    candidates = {"eager": Eager(), "right": Right(), "wrong": Wrong()}
    measurement = Measurement(PROBLEM, candidates, look_at_results=False)
    for _ in measurement.rounds():
        selection = look(measurement.times(), baseline="eager")
        if selection is not None:
            break
    assert selection.chosen == "wrong"
    speedups = {name: verdict.speedup.median for name, verdict in selection.verdicts.items()}
    assert speedups["wrong"] > 2 * speedups["right"]


def test_the_winner_is_proven_at_the_full_size_where_fewer_rows_were_timed():
    """What fits into the budget is few rows; what is wrong with more of them must not serve more."""
    problem = Problem("cpu", rows=65536, vocab=4096, dtype=torch.float32)
    decision, _ = decide(problem, seconds=4.0, fast="Remembers")
    assert decision.chosen == "fast" and decision.measured_rows < problem.rows
    assert f"measured with {decision.measured_rows} rows" in decision.reason
    assert decision.proven_rows == problem.rows
    decision, _ = decide(problem, seconds=4.0, fast="RemembersWrong")
    assert outcomes(decision) == {"eager": "chosen", "fast": "wrong"}
    assert decision.candidates["fast"].reason.startswith("with 65536 rows, the log-probability of row 0 is off by 1")
    assert decision.proven_rows == decision.measured_rows


def test_a_candidate_that_changes_torch_for_the_others_is_out():
    decision, _ = decide(SMALL, changes="ChangesThreads")
    assert outcomes(decision) == {"eager": "chosen", "changes": "failed"}
    assert decision.candidates["changes"].reason.endswith("it left torch with another number of threads, default dtype")


def test_the_first_call_is_that_of_the_first_problem_of_a_kind():
    """Later ones of another N find the code compiled."""
    with registered(slow="SlowAtFirst"), Tuner(CPU, short=True) as tuner:
        first, second = (tuner.decide(SMALL._replace(rows=rows), SECONDS, names=["slow"])[0] for rows in (128, 256))
        assert first.candidates["slow"].first_call_seconds == second.candidates["slow"].first_call_seconds > 0.5


def test_only_what_is_right_was_timed(mixed):
    decision, evidence = mixed
    times = evidence.seconds
    assert set(times) == {"eager", "right", "same"}
    assert {len(series) for series in times.values()} == {decision.rounds}
    for name, candidate in decision.candidates.items():
        timed = name in times
        assert (candidate.outcome in MEASURED) is timed
        assert (candidate.seconds is not None) is (candidate.speedup is not None) is timed
    assert decision.candidates["wrong"].first_call_seconds > 0
    assert not all(check.passed for check in decision.candidates["wrong"].checks)
    assert all(check.passed for check in decision.winner.checks) and decision.winner.checks


def test_the_record_has_the_fingerprints_of_what_was_measured(mixed):
    candidates = mixed[0].candidates
    assert candidates["right"].fingerprint == candidates["crashes"].fingerprint == Right().fingerprint()
    assert candidates["eager"].fingerprint == get_backend("eager").fingerprint()


def test_what_was_left_out_is_said(mixed):
    assert mixed[0].left_out == ("cpp", "compiled", "flash_attn")


def test_a_bucket_is_decided_at_its_top():
    decision, _ = decide(SMALL._replace(rows=250))
    assert decision.problem == SMALL and decision.chosen == "eager"
    assert decision.measured_rows == 256


# --- what becomes of those that fail ----------------------------------------------------------------------------------

FAILURES = {
    "raises_unpicklable": ("failed", r"compile: LocalError: \('in the way', .*\)"),
    "raises_unencodable": ("failed", r"compile: RuntimeError: no such file: caf\? \x00 €"),
    "raises_from_home": ("failed", r"compile: FileNotFoundError: no tables in my tables/fast.bin, nor in \w+\.py"),
    "raises_memory_error": ("oom", r"compile: MemoryError: the arena is full"),
    "asks_for_a_petabyte": ("oom", r"compile: RuntimeError: .*allocate memory.*1125899906842624 bytes.*"),
    "runs_into_a_limit": ("oom", r"compile: RuntimeError: .*allocate memory.*1073741824 bytes.*"),
    "out_of_memory_in_the_check": ("oom", r"check: RuntimeError: .*allocate memory.*"),
    "tells_a_number": ("failed", r"import: TypeError: fingerprint\(\) returned 7; a string is valid"),
    "needs_no_gradient": ("unsupported", r"has no backward"),
    "needs_another_machine": ("unavailable", r"needs a quantum computer"),
    "not_a_backend": ("unavailable", r"backend 'not_a_backend': '\w+:NotABackend' is a NotABackend, not a Backend.*"),
    "missing": ("unavailable", r"backend 'missing' cannot be imported from 'no_such_package:Backend': ModuleNot.*"),
    "an_instance": ("unavailable", r"only the process that registered it knows it; register it by its place, .*"),
    "raises_system_exit": ("crashed", r"compile: ended with exit code 1; it said: the licence has run out"),
    "raises_unprintable": ("crashed", r"compile: ended with exit code 1; it said: .*ValueError: no words for it"),
    "exits_in_import": ("crashed", r"import: ended with exit code 5; it said: no device"),
}
TARGETS = {name: "".join(word.capitalize() for word in name.split("_")) for name in FAILURES} | {
    "not_a_backend": "NotABackend",
    "missing": "no_such_package:Backend",
    "an_instance": Right(),
    "asks_for_a_petabyte": "AsksForAPetabyte",
    "tells_a_number": "TellsANumber",
    "runs_into_a_limit": "RunsIntoALimit",
}


@pytest.fixture(scope="module")
def failed(tmp_path_factory):
    """One of each kind, in a home with a name that is found again wherever it turns up."""
    with pytest.MonkeyPatch.context() as patch:
        home = tmp_path_factory.mktemp("home") / "Margarethe of somewhere"
        home.mkdir()
        patch.setenv("HOME", str(home))
        patch.setenv("USER", "margarethe")
        decision, _ = decide(SMALL, **TARGETS)
    return decision


@pytest.mark.parametrize("name", FAILURES)
def test_a_failure_is_an_outcome_with_a_reason(failed, name):
    if name == "runs_into_a_limit" and sys.platform != "linux":
        pytest.skip("the limit is set by what Linux tells of a process")
    outcome, reason = FAILURES[name]
    candidate = failed.candidates[name]
    assert candidate.outcome == outcome
    assert re.fullmatch(reason, candidate.reason)
    assert candidate.seconds is None and candidate.speedup is None


def test_the_others_are_measured(failed):
    assert failed.chosen == "eager" and failed.winner.measured and failed.rounds >= 10


def test_nothing_of_it_was_loaded_here(mixed, failed):
    with registered(**TARGETS):
        assert not [name for name in TARGETS if name != "an_instance" and is_loaded(name)]
    assert not set(TARGETS) & set(backends())


# --- the record -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["mixed", "failed"])
def test_the_record_comes_back_as_it_was(which, request):
    found = request.getfixturevalue(which)
    decision = found[0] if which == "mixed" else found
    text = json.dumps(decision.record(), allow_nan=False)
    again = Decision.from_record(decision.problem, json.loads(text))
    assert again == decision
    text.encode("utf-8")


@pytest.mark.parametrize("which", ["mixed", "failed"])
def test_the_record_tells_no_path_and_no_name(which, request):
    found = request.getfixturevalue(which)
    text = json.dumps((found[0] if which == "mixed" else found).to_dict(), ensure_ascii=False)
    places = {Path.home(), tempfile.gettempdir(), sys.prefix, Path(torch.__file__).parent, *sys.path}
    assert not [place for place in map(str, places) if len(place) > 1 and place in text]
    assert not re.search(r"margarethe|site-packages|[\"' (]/\w", text, re.IGNORECASE)
    assert not re.search(rf"\b{re.escape(socket.gethostname())}\b", text)


def test_the_record_is_of_this_environment(mixed):
    decision, _ = mixed
    assert decision.environment["fingerprint"] == fingerprint_of(CPU)
    assert decision.bandwidth["read"] > 0
    assert decision.telemetry is None and "NVIDIA" in decision.telemetry_reason
    assert decision.tuning_seconds > 0 and decision.short_check
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", decision.measured_at)
    assert decision.measured_rows == PROBLEM.rows > decision.checked_rows  # the short check has few
    numbers = [value for value in asdict(decision.winner).values() if isinstance(value, float)]
    assert numbers and all(map(math.isfinite, numbers))


# --- budgets ----------------------------------------------------------------------------------------------------------


def test_a_budget_that_is_over_before_anything_runs_decides_nothing():
    with pytest.raises(TuningFailed, match=r"^the budget of 0.1 s ended at the step 'start'$"):
        decide(seconds=0.1, strict=True)


def test_a_third_partys_backend_that_hangs_costs_a_share_of_what_is_left():
    decision, _ = decide(SMALL, seconds=24.0, strict=True, hangs="HangsInImport")
    assert outcomes(decision) == {"eager": "chosen", "hangs": "timeout"}
    assert decision.code == "ONLY_ONE" and decision.reason == "nothing but eager could be measured"
    assert decision.candidates["hangs"].reason.startswith("import: no end after ")


def test_one_of_our_own_that_is_not_ready_when_the_budget_ends_decides_nothing(monkeypatch):
    """It may just be compiling for the first time on this machine, and a decision without it would be stored."""
    monkeypatch.setattr(tuning, "BUILT_IN", {**tuning.BUILT_IN, "hangs": ""})
    with pytest.raises(TuningFailed, match=r"^the budget of 8 s ended at the step 'import' of 'hangs'$"):
        decide(SMALL, seconds=8.0, strict=True, hangs="HangsInImport")


def test_a_budget_that_ends_after_too_few_rounds_decides_nothing():
    with pytest.raises(TuningFailed, match=r"^the budget of 8 s ended at the step 'time' of 'hangs'$"):
        decide(SMALL, seconds=8.0, strict=True, hangs="HangsInEarlyRounds")


def test_a_budget_that_ends_after_enough_rounds_decides_by_these():
    decision, evidence = decide(seconds=20.0, strict=True, undecided="Undecided")
    assert fewest_rounds(2) <= decision.rounds == len(evidence.seconds["eager"]) == len(evidence.seconds["undecided"])
    assert decision.chosen == "eager" and not decision.settled and decision.code == "AMBIGUOUS_AT_BUDGET"
    assert decision.candidates["undecided"].outcome == "tie"
    assert decision.tuning_seconds < 20.0
    assert decision.bandwidth  # the worker program knew when to end, and told the rest


def test_a_budget_is_too_short_for_one_round_only():
    """What the rounds cannot tell is not said: a decision that rests on one would be stored for good."""
    decision, _ = decide(seconds=0.0, right="Right")
    assert decision.rounds >= fewest_rounds(2)


def test_a_call_that_does_not_return_is_out_when_the_budget_ends():
    """It may be the fastest of the rounds before, and so it was chosen."""
    decision, evidence = decide(seconds=8.0, strict=True, hangs="HangsInRounds", right="Right")
    assert decision.candidates["hangs"].outcome == "timeout"
    assert re.fullmatch(r"time: no end after \d+ s", decision.candidates["hangs"].reason)
    assert set(evidence.seconds) == {"eager", "right"} and decision.rounds == TIMED_CALLS
    assert decision.telemetry is None and decision.bandwidth == {}
    assert Decision.from_record(decision.problem, json.loads(json.dumps(decision.record()))) == decision


def test_a_crash_right_when_the_budget_ends_is_a_crash():
    """Its rounds before are enough for a choice, and it is the fastest of them."""
    seconds, rounds = 8.0, 0
    began = time.monotonic()

    def on_event(event):
        nonlocal rounds
        rounds += event["event"] == "round"
        if rounds == TIMED_CALLS:
            time.sleep(max(0.0, began + seconds + 0.5 - time.monotonic()))  # meanwhile it crashes

    decision, evidence = decide(seconds=seconds, strict=True, on_event=on_event, crashes="ExitsInRounds")
    assert outcomes(decision) == {"eager": "chosen", "crashes": "crashed"} and set(evidence.seconds) == {"eager"}
    assert decision.rounds == TIMED_CALLS


def test_a_crash_in_the_rounds_lets_the_others_begin_anew():
    decision, evidence = decide(crashes="ExitsInRounds", right="Right")
    assert outcomes(decision) == {"eager": "slower", "crashes": "crashed", "right": "chosen"}
    crashed = decision.candidates["crashes"]
    assert crashed.reason == "time: ended with exit code 7"
    assert crashed.checks and crashed.first_call_seconds > 0 and crashed.seconds is None
    assert {len(series) for series in evidence.seconds.values()} == {decision.rounds} and decision.rounds >= 20


def test_what_a_hanging_candidate_takes_is_not_taken_from_the_others(monkeypatch):
    monkeypatch.setitem(tuning.LIMITS_S, "import", 5.0)
    decision, _ = decide(seconds=5.0, hangs="HangsInImport", right="Right")
    assert decision.candidates["hangs"].outcome == "timeout"
    assert decision.candidates["hangs"].reason == "import: no end after 5 s"
    assert decision.rounds >= 20


def test_n_shrinks_where_time_is_short():
    decision, _ = decide(PROBLEM._replace(rows=4096), seconds=5.0, slow="SlowByRow")
    assert decision.problem.rows == 4096
    assert 1024 <= decision.measured_rows < 4096
    assert decision.measured_rows == bucket(PROBLEM._replace(rows=decision.measured_rows)).rows
    words = f"; measured with {decision.measured_rows} rows, for which there was time and memory"
    assert decision.reason.endswith(words)
    assert decision.candidates["slow"].outcome == "slower"


def test_nothing_is_decided_where_nothing_could_be_measured(monkeypatch):
    """Eager itself takes too long, as far as the limit tells."""
    monkeypatch.setitem(tuning.LIMITS_S, "compile", 0.0)
    failures = r"^no backend could be measured: eager: timeout: compile: no end after 0 s; right: timeout: .*"
    with pytest.raises(TuningFailed, match=failures):
        decide(SMALL, right="Right")


def test_an_environment_other_than_this_process_is_refused(monkeypatch):
    monkeypatch.setattr(tuning, "fingerprint_of", lambda device: "another")
    with pytest.raises(TuningFailed, match="finds itself in another environment"):
        decide(SMALL)


# --- alone on the device ----------------------------------------------------------------------------------------------

HOLD = """
import sys, torch
from compiled_logprobs.tuning.tuner import alone_on
with alone_on(torch.device("cpu"), 60) as alone:
    print(alone, flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def own_locks(monkeypatch, tmp_path):
    """So that no real measurement is waited for."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return tmp_path


@pytest.fixture
def holder(own_locks):
    """Another process that has the lock."""
    with subprocess.Popen([sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"True\n"
        yield process
        process.kill()


def test_the_device_is_for_one_process_at_a_time(holder):
    with alone_on(CPU, 0.2) as alone:
        assert not alone
    holder.stdin.close()
    with alone_on(CPU, 60.0) as alone:  # waits
        assert alone
        holder.wait(60)
    with alone_on(CPU, 0.0) as alone:
        assert alone


def test_a_process_that_dies_lets_go_of_the_device(holder):
    holder.kill()
    with alone_on(CPU, 60.0) as alone:
        assert alone
    assert not is_running(holder.pid)


def test_the_device_is_for_one_thread_at_a_time(own_locks):
    found = []

    def other(within):
        with alone_on(CPU, within) as alone:
            found.append(alone)

    with alone_on(CPU, 0.0) as alone:
        assert alone
        thread = threading.Thread(target=other, args=(0.0,))
        thread.start()
        thread.join()
        patient = threading.Thread(target=other, args=(60.0,))
        patient.start()
        time.sleep(0.2)
        assert found == [False]
    patient.join()
    assert found == [False, True]


def test_an_error_lets_go_of_the_device(own_locks):
    with pytest.raises(KeyboardInterrupt), alone_on(CPU, 0.0):
        raise KeyboardInterrupt
    with alone_on(CPU, 0.0) as alone:
        assert alone


def test_without_a_place_for_locks_there_is_no_order(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "file"))
    with alone_on(CPU, 0.0) as alone, alone_on(CPU, 0.0) as also:
        assert alone and also
