"""The worker program itself: the fastest right backend, whatever the others do, within time and memory."""

import re
import socket
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from compiled_logprobs.backends import backends, get_backend, is_loaded
from compiled_logprobs.backends.eager import Eager
from compiled_logprobs.check.run import check_backend
from compiled_logprobs.decision import MEASURED, PLAIN
from compiled_logprobs.machine import clock
from compiled_logprobs.machine.bandwidth import Bandwidth
from compiled_logprobs.machine.clock import MIB, extra_peak_bytes, why_no_peak
from compiled_logprobs.machine.environment import fingerprint_of
from compiled_logprobs.problem import Problem, bucket, problem_to_dict
from compiled_logprobs.tuning import rounds as rounds_module
from compiled_logprobs.tuning import sizes as sizes_module
from compiled_logprobs.tuning import tuner as tuner_module
from compiled_logprobs.tuning import worker as worker_module
from compiled_logprobs.tuning.sizes import sizes_of
from compiled_logprobs.tuning.statistics import BEHIND_ROUNDS, LOOKS, fewest_rounds
from compiled_logprobs.tuning.tally import Tally
from compiled_logprobs.tuning.tuner import Tuner
from compiled_logprobs.tuning.worker import Job, bytes_of_check
from tests.helpers.backends_for_tuning import (
    FLOOD_BYTES,
    FOLDER_VARIABLE,
    Right,
    WrongSign,
    has_ended,
    pids,
    registered,
)
from tests.helpers.fake_cuda import FakeCuda

CPU = torch.device("cpu")
PROBLEM = Problem("cpu", rows=256, vocab=4096, dtype=torch.float32, layout="rows")

# --- the program, with right and wrong candidates and those that do it harm -------------------------------------------

REASONS = {  # first those that end the program, which the others then begin anew
    "exits": ("crashed", r"compile: ended with exit code 3; it said: .*no device"),
    "hangs_in_import": ("timeout", r"import: no end after 3 s"),
    "wrong_sign": ("wrong", r"returns the loss: .* \(log_prob_sign, .*\)"),
    "meddles_with_streams": ("failed", r"compile: RuntimeError: it is done"),
    "only_here": ("failed", r"compile: RuntimeError: it is done"),
    "raises_from_home": ("failed", r"compile: FileNotFoundError: no caf\? in my tables/fast.bin, nor in \w+\.py"),
    "raises_memory_error": ("oom", r"compile: MemoryError: the arena is full"),
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
    "fast": "Remembers",
    "only_here": "only_here:Here",
}

HERE = "from tests.helpers.backends_for_tuning import LeavesChildren\nclass Here(LeavesChildren): ..."


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """All of them, in a home with a name that is found again wherever it turns up.

    One is imported from where only this process has been told to look, as from beside the script of whoever calls.
    """
    resource = pytest.importorskip("resource", reason="Windows has none")
    with pytest.MonkeyPatch.context() as patch:
        home = tmp_path_factory.mktemp("home") / "Margarethe of somewhere"
        home.mkdir()
        patch.setenv("HOME", str(home))
        patch.setenv("USER", "margarethe")
        patch.setenv(FOLDER_VARIABLE, str(home))
        patch.setitem(tuner_module.LIMITS_S, "import", 3.0)
        (home / "only_here.py").write_text(HERE)
        patch.syspath_prepend(str(home))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with registered(**TARGETS), Tuner(CPU, short=True) as tuner:
            decision, evidence = tuner.decide(PROBLEM, 60.0, names=list(TARGETS))
            again, _ = tuner.decide(PROBLEM._replace(rows=96), 0.0, names=["fast"])
            loaded_here = [name for name in TARGETS if name != "an_instance" and is_loaded(name)]
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * (
            1 if sys.platform == "darwin" else 1024
        )
        return SimpleNamespace(**locals())


@pytest.mark.slow
def test_the_fastest_right_backend_is_chosen_and_each_failure_has_its_reason(mixed):
    decision = mixed.decision
    assert decision.chosen == "fast" and decision.baseline == "eager" and decision.settled
    assert decision.winner.outcome == "chosen" and decision.winner.speedup.low > 1.03
    assert decision.candidates["eager"].reason == "slower than fast by more than 3%"
    for name, (outcome, reason) in REASONS.items():
        candidate = decision.candidates[name]
        assert candidate.outcome == outcome and re.fullmatch(reason, candidate.reason), candidate
        assert candidate.seconds is candidate.speedup is candidate.speedup_over_plain is None
    assert decision.candidates["wrong_sign"].first_call_seconds > 0.0


@pytest.mark.slow
def test_only_what_is_right_was_timed_and_the_evidence_is_of_all_that_were_checked(mixed):
    decision, evidence = mixed.decision, mixed.evidence
    assert set(evidence.seconds) == {"eager", "fast", PLAIN} and decision.plain_seconds > 0.0
    assert {len(series) for series in evidence.seconds.values()} == {decision.rounds} and decision.rounds >= 20
    timed = [decision.candidates[name] for name in ("eager", "fast")]
    assert all(candidate.outcome in MEASURED and candidate.speedup_over_plain for candidate in timed)
    assert set(evidence.cases) == {name for name, candidate in decision.candidates.items() if candidate.checks}
    for name, by_case in evidence.cases.items():
        failed = {check.name for case in by_case for check in case.checks if not check.passed}
        assert failed == {check.name for check in decision.candidates[name].checks if not check.passed}
    positive = next(case for case in evidence.cases["wrong_sign"] if case.case == "normal")
    worst = positive.errors[0].worst[0]
    assert worst.got > 0.0 > worst.true
    assert worst.error == pytest.approx(worst.got - worst.true, rel=1e-3)


@pytest.mark.slow
def test_the_decision_is_of_this_environment_and_of_this_code_and_tells_no_path_and_no_name(mixed):
    decision = mixed.decision
    assert decision.environment["fingerprint"] == fingerprint_of(CPU)
    assert decision.candidates["wrong_sign"].fingerprint == WrongSign().fingerprint()
    assert decision.candidates["eager"].fingerprint == get_backend("eager").fingerprint()
    assert decision.bandwidth["read"] > 0.0 and decision.winner.percent_of_bandwidth > 0.0
    assert decision.telemetry is None and "NVIDIA" in decision.telemetry_reason
    assert decision.measured_rows == PROBLEM.rows > decision.checked_rows  # the short check has few
    assert type(decision).from_json(decision.to_json()) == decision
    text = "".join(part.to_json().decode() for part in (decision, mixed.evidence))
    places = {Path.home(), tempfile.gettempdir(), sys.prefix, Path(torch.__file__).parent, *sys.path}
    assert not [place for place in map(str, places) if len(place) > 1 and place in text]
    assert not re.search(r"margarethe|site-packages|[\"' (]/\w", text, re.IGNORECASE)
    assert not re.search(rf"\b{re.escape(socket.gethostname())}\b", text)


@pytest.mark.slow
def test_the_program_serves_the_next_problem_and_nothing_of_it_stays(mixed):
    assert mixed.again.candidates["fast"].measured and mixed.again.rounds < 20
    assert mixed.again.plain_seconds is None  # a budget of nothing has no room for it
    children, workers = pids(mixed.home, "child"), pids(mixed.home, "worker")
    assert len(children) == 2 * len(workers) and all(map(has_ended, [*children, *workers]))
    assert mixed.loaded_here == [] and not set(TARGETS) & set(backends())
    assert mixed.grown < FLOOD_BYTES


# --- time and memory, in this process ---------------------------------------------------------------------------------


def run_here(problem, **changes):
    """The events of a job in this process."""
    order = {
        "problem": problem_to_dict(problem),
        "device": "cpu",
        "threads": torch.get_num_threads(),
        "candidates": [["eager", ""]],
        "checked": ["eager"],
        "incumbent": None,
        "logits_backend": None,
        "short": True,
        "plain": False,
        "seconds": 1.0,
        "strict": False,
        "in_all": False,
        "too_slow": 0,
        "seed": 1,
    }
    told = []
    Job(order | changes, lambda event, **fields: told.append({"event": event, **fields})).run()
    return told


def of(kind, told):
    return [event for event in told if event["event"] == kind]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Remembers", "RemembersWrong"])
def test_the_winner_is_proven_at_the_full_size_where_fewer_rows_were_timed(name):
    """What fits into the budget is few rows; what is wrong with more of them must not serve more."""
    problem = Problem("cpu", rows=65536, vocab=1024, dtype=torch.float32)
    target = f"tests.helpers.backends_for_tuning:{name}"
    with registered(fast=target):
        told = run_here(problem, candidates=[["eager", ""], ["fast", target]], checked=["eager", "fast"])
    assert of("measuring", told)[0]["rows"] < problem.rows
    if name == "Remembers":
        assert [event["rows"] for event in of("proven", told)] == [problem.rows]
    else:
        (lost,) = of("lost", told)
        assert (lost["candidate"], lost["outcome"]) == ("fast", "wrong") and not of("proven", told)
        assert lost["reason"].startswith("with 65536 rows, the log-probability of row 0 is off by 1")


@pytest.mark.slow
def test_n_shrinks_where_time_is_short(monkeypatch):
    forward = Eager.forward

    def slow_by_row(self, inputs, wanted):
        time.sleep(1e-4 * inputs.logits.shape[:-1].numel())
        return forward(self, inputs, wanted)

    monkeypatch.setattr(Eager, "forward", slow_by_row)
    (measuring,) = of("measuring", run_here(PROBLEM._replace(rows=4096, vocab=65536)))
    assert 1 < measuring["rows"] < 4096 and measuring["rows"] == bucket(PROBLEM._replace(rows=measuring["rows"])).rows


@pytest.mark.parametrize("strict", [False, True])
def test_n_does_not_shrink_because_compiling_and_checking_took_long(monkeypatch, strict):
    now = [0.0]

    def check(name, problem, **options):
        now[0] += 1000.0
        return check_backend(name, problem, **options)

    monkeypatch.setattr(worker_module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(worker_module, "check_backend", check)
    monkeypatch.setitem(sizes_module.PILOT_LOGITS, "cpu", 2**14)
    problem = Problem("cpu", 256, 1024, torch.float32)
    told = run_here(problem, checked=[], seconds=20.0, strict=strict)
    (measuring,) = of("measuring", told)
    assert now[0] == 1000.0 and measuring["rows"] == problem.rows


@pytest.mark.parametrize(("strict", "plain"), [(False, False), (True, False), (True, True)])
def test_n_shrinks_where_rounds_take_longer_than_the_first_calls_told(monkeypatch, strict, plain):
    """As where other programs have begun to work: a budget that may not be exceeded has rounds enough all the same."""
    now, forward, plain_forward = [0.0], Eager.forward, rounds_module.plain

    def slowly(self, inputs, wanted):
        rows = inputs.logits.shape[:-1].numel()
        now[0] += rows / 256 if rows > 16 else 1e-4
        return forward(self, inputs, wanted)

    def more_slowly(logits, *arguments, **options):
        now[0] += 1.2 * len(logits) / 256
        return plain_forward(logits, *arguments, **options)

    def timed(call, device, **options):
        before = now[0]
        call()
        return clock.Time(now[0] - before, now[0] - before)

    monkeypatch.setattr(worker_module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(clock, "time_call", timed)
    monkeypatch.setattr(worker_module, "measured_bandwidth", lambda device: Bandwidth(1e10, 1e10, 1e10, 1))
    monkeypatch.setattr(Eager, "forward", slowly)
    monkeypatch.setattr(rounds_module, "plain", more_slowly)
    monkeypatch.setitem(sizes_module.PILOT_LOGITS, "cpu", 2**14)
    seconds = 24.0 if plain else 12.0
    told = run_here(Problem("cpu", 256, 1024, torch.float32), seconds=seconds, strict=strict, plain=plain)
    *_, measuring = of("measuring", told)
    rounds = of("round", told[told.index(measuring) :])
    assert (measuring["rows"] < 256) == strict and len(rounds) >= fewest_rounds(1)
    if plain:
        return  # there is no time for the rest
    without, with_bandwidth = told[-3], told[-1]
    assert without["event"] == with_bandwidth["event"] == "circumstances", "what nobody chooses by comes last"
    assert not without["bandwidth"] and with_bandwidth["bandwidth"]["read"] == 1e10


def test_what_was_behind_one_that_fails_runs_again_and_the_listener_counts_the_same_rounds(monkeypatch):
    at, timed_calls = [], []

    def timed(call, device, **options):
        call()
        timed_calls.append(at[-1])
        if (
            at[-1] == ("fast", "time") and timed_calls.count(at[-1]) > 2 + BEHIND_ROUNDS[-1] + 3
        ):  # two before the rounds
            raise RuntimeError("it broke")
        seconds = {"eager": 1.0, "fast": 0.1, "slow": 0.5}[at[-1][0]]
        return clock.Time(seconds, seconds)

    monkeypatch.setattr(Job, "_step", lambda self, name, step: at.append((name, step)))
    monkeypatch.setattr(clock, "time_call", timed)
    monkeypatch.setattr(clock, "flush_cache", lambda device: None)
    monkeypatch.setattr(worker_module, "measured_bandwidth", lambda device: Bandwidth(1e10, 1e10, 1e10, 1))
    target = "tests.helpers.backends_for_tuning:Right"
    names, problem = ["eager", "fast", "slow"], Problem("cpu", 64, 512, torch.float32)
    with registered(fast=target, slow=target):
        told = run_here(problem, candidates=[[name, target] for name in names], checked=names, seconds=1000.0)
        tally = Tally(problem, names, None)
        for event in told:
            tally.hear(event)
        decision, evidence = tally.decide(CPU, short=True, tuning_seconds=1.0)
    assert [event["other"] for event in of("behind", told)] == ["fast"]
    assert decision.candidates["fast"].outcome == "failed" and decision.chosen == "slow" and decision.settled
    assert {name: len(series) for name, series in evidence.seconds.items()} == dict.fromkeys(
        ("eager", "slow"), LOOKS[0]
    )


def test_the_first_calls_keep_an_accelerator_busy(monkeypatch):
    """With fewer rows it is the host's time for a call that would tell how long a row takes."""
    monkeypatch.setattr(clock, "cuda", FakeCuda())
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    problem = Problem("cuda", 8192, 151936, torch.bfloat16, needs_grad=True)
    order = {"problem": problem_to_dict(problem), "device": "cuda:1", "threads": torch.get_num_threads()}
    Job(order, lambda event, **fields: None)  # which makes the device the current one
    pilot = sizes_of(problem, torch.device("cuda:1")).pilot(lambda part: True)
    assert pilot == problem._replace(rows=2**27 // 151936)


@pytest.mark.slow
@pytest.mark.skipif(why_no_peak("cpu") is not None, reason=str(why_no_peak("cpu")))
@pytest.mark.parametrize(
    "problem",
    [
        Problem("cpu", 1024, 2048, torch.bfloat16, needs_grad=True, entropy=True, temperature="per_token"),
        Problem("cpu", 1024, 2048, torch.float32, needs_grad=True, layout="slice", masked_logits=True),
    ],
    ids=lambda problem: problem.details(),
)
def test_a_check_takes_no_more_than_is_reckoned_with(problem):
    taken = extra_peak_bytes(lambda: check_backend("eager", problem, device="cpu", seed=1), "cpu")
    assert 0.1 * bytes_of_check(problem) < taken <= bytes_of_check(problem)


@pytest.mark.slow
@pytest.mark.parametrize("short_of", ["free", "granted"])
def test_rows_shrink_to_the_memory_there_is_and_the_events_say_so(monkeypatch, short_of):
    """By what is free, before the check; and by what the check gets, where the system does not grant it."""
    problem, free = Problem("cpu", 4096, 1024, torch.float32, needs_grad=True), 120 * MIB
    if short_of == "free":  # of 4096 rows, less than four copies can have half
        for module in (worker_module, sizes_module):
            monkeypatch.setattr(module, "free_memory", lambda device: free)
    else:

        def check(name, problem, **options):
            return check_backend(name, problem, **options) if problem.rows < 2048 else torch.empty(2**50)

        monkeypatch.setattr(worker_module, "check_backend", check)
    told = run_here(problem, checked=[], short=False)
    (checked,), (measuring,) = of("checked", told), of("measuring", told)
    assert 1 < checked["rows"] < problem.rows and checked["fewer_for_memory"]
    assert (measuring["rows"] < problem.rows) == (short_of == "free")
    if short_of == "free":
        assert measuring["rows"] * problem.vocab * 4 * 4 <= sizes_module.SHARE_OF_FREE_MEMORY * free


def test_nothing_is_checked_where_there_is_no_room_for_a_row(monkeypatch):
    for module in (worker_module, sizes_module):
        monkeypatch.setattr(module, "free_memory", lambda device: MIB)
    monkeypatch.setattr(worker_module, "check_backend", lambda *_, **__: pytest.fail("it is checked"))
    (lost,) = of("lost", run_here(PROBLEM._replace(rows=64, vocab=512), checked=[]))
    assert lost["outcome"] == "oom" and "may take 0 of what is free" in lost["reason"]


@pytest.mark.slow
def test_where_nobody_gets_through_at_the_full_size_each_has_its_own_outcome(monkeypatch):
    forward = Eager.forward

    def few_only(self, inputs, wanted):
        if len(inputs.logits) > 1024:
            raise MemoryError("too many rows")
        return forward(self, inputs, wanted)

    monkeypatch.setattr(Eager, "forward", few_only)
    told = run_here(Problem("cpu", 2048, 4096, torch.float32), seconds=60.0)
    (lost,) = of("lost", told)
    assert (lost["candidate"], lost["outcome"]) == ("eager", "oom") and "too many rows" in lost["reason"]
    assert told[-1]["event"] == "circumstances" and told[-1]["percent"] == {}
