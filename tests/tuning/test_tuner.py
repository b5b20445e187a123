"""Deciding by what the worker program says: what its loss costs, when the budget ends, and what the decision tells."""

import contextlib
import json
import math
import os
import subprocess
import sys
import tempfile
import threading
import time

import pytest
import torch

from compiled_logprobs.backends import code_of
from compiled_logprobs.decision import PLAIN, Decision, Evidence
from compiled_logprobs.machine import clock
from compiled_logprobs.problem import Problem
from compiled_logprobs.tuning import headway as headway_module
from compiled_logprobs.tuning import tuner as tuner_module
from compiled_logprobs.tuning.headway import MOST_CUTS, MOST_SLOW, headway_of
from compiled_logprobs.tuning.statistics import fewest_rounds
from compiled_logprobs.tuning.tally import Tally
from compiled_logprobs.tuning.tuner import Tuner, TuningFailed, alone_on, get_ready_apart
from tests.helpers.backends_for_tuning import FOLDER_VARIABLE, has_ended, pids, registered
from tests.helpers.fake_cuda import FakeCuda
from tests.helpers.scripted_worker import CHECK, CRASH, HANG, ScriptedWorkers, Takes, checked, ready, rounds, step

CPU = torch.device("cpu")
PROBLEM = Problem("cpu", rows=250, vocab=4096, dtype=torch.float32, needs_grad=True)
ENOUGH = fewest_rounds(2)


@pytest.fixture
def scripted(monkeypatch):
    """Third parties' backends `a` and `b`, and programs that play these scripts."""
    with registered(a="Right", b="Same"):
        yield lambda *scripts: ScriptedWorkers(monkeypatch, *scripts)


def decide(names="ab", seconds=20.0, **options):
    with Tuner(CPU, short=True) as tuner:
        return tuner.decide(PROBLEM, seconds, names=list(names), **options)


def outcomes(decision):
    return {name: candidate.outcome for name, candidate in decision.candidates.items()}


# --- the decision -----------------------------------------------------------------------------------------------------


def test_events_become_a_decision_that_is_written_and_read_as_it_is(scripted):
    case = {"case": "normal", "rows": 16, "checks": [CHECK], "errors": []}
    workers = scripted(
        [
            *ready("eager", "a"),
            {"event": "evidence", "candidate": "a", "cases": [case]},
            {"event": "lost", "candidate": "b", "outcome": "unsupported", "reason": "has no backward"},
            {"event": "memory", "candidate": "a", "bytes": 1000, "multiple": 0.5},
            *rounds(20, eager=2.0, a=1.0, plain=3.0, host={"eager": 0.5, "a": 0.25}),
        ]
    )
    decision, evidence = decide()
    assert (decision.chosen, decision.code, decision.baseline) == ("a", "FASTER_CLEAR", "eager") and decision.settled
    assert outcomes(decision) == {"eager": "slower", "a": "chosen", "b": "unsupported"}
    assert decision.problem == PROBLEM._replace(rows=256)  # the top of its bucket
    assert workers.jobs[0]["problem"]["rows"] == 256 and workers.jobs[0]["candidates"][0][0] == "eager"
    winner = decision.winner
    assert (winner.fingerprint, winner.extra_bytes, winner.first_call_seconds) == ("print of a", 1000, 2.0)
    assert winner.speedup.median == pytest.approx(2.0) and winner.speedup_over_plain.median == pytest.approx(3.0)
    assert winner.speedup_over_plain.low == pytest.approx(3.0)  # without noise
    assert decision.candidates["eager"].speedup_over_plain.median == pytest.approx(1.5)
    assert decision.plain_seconds == 3.0
    assert winner.host_seconds == 0.25 and evidence.host_seconds == {"eager": [0.5] * 20, "a": [0.25] * 20}
    assert evidence.seconds == {"eager": [2.0] * 20, "a": [1.0] * 20, PLAIN: [3.0] * 20}
    assert evidence.cases["a"][0].checks[0].figure == 0.5
    assert (evidence.seed, evidence.measured_at) == (decision.seed, decision.measured_at)
    assert decision.left_out == ("cpp", "compiled", "triton", "flash_attn") and decision.rounds == 20
    assert decision.bandwidth == {} and "before it was asked for" in decision.telemetry_reason
    assert Decision.from_json(decision.to_json()) == decision and Evidence.from_json(evidence.to_json()) == evidence


def test_one_that_is_far_behind_is_slower_by_the_rounds_that_it_had(scripted):
    behind = {"event": "behind", "candidate": "b", "other": "a"}
    first, rest = rounds(8, eager=2.0, a=1.0, b=4.0, plain=3.0), rounds(12, eager=2.0, a=1.0, plain=3.0)
    scripted([*ready("eager", "a", "b"), *first, behind, *rest])
    decision, evidence = decide()
    assert outcomes(decision) == {"eager": "slower", "a": "chosen", "b": "slower"} and decision.rounds == 20
    slow = decision.candidates["b"]
    assert slow.reason == "slower than a by more than 25% in the first 8 rounds, and timed no further"
    assert (slow.seconds, slow.speedup.median, round(slow.speedup_over_plain.median, 9)) == (4.0, 0.5, 0.75)
    assert {name: len(series) for name, series in evidence.seconds.items()} == {"eager": 20, "a": 20, "b": 8, PLAIN: 20}
    assert Decision.from_json(decision.to_json()) == decision


def test_one_that_is_far_behind_runs_again_where_the_program_is_lost(scripted):
    behind = {"event": "behind", "candidate": "b", "other": "a"}
    lost = [*ready("eager", "a", "b"), *rounds(8, eager=2.0, a=1.0, b=4.0), behind, step("a", "time"), CRASH]
    workers = scripted(lost, [*ready("eager", "b"), *rounds(20, eager=2.0, b=1.0)])
    assert outcomes(decide()[0]) == {"eager": "slower", "a": "crashed", "b": "chosen"}
    assert [name for name, _ in workers.jobs[1]["candidates"]] == ["eager", "b"]


def test_one_that_was_far_behind_serves_where_that_other_proves_to_be_wrong(scripted):
    """By the rounds that it had."""
    behind = {"event": "behind", "candidate": "b", "other": "a"}
    first, rest = rounds(12, eager=2.0, a=0.1, b=1.0, plain=3.0), rounds(8, eager=2.0, a=0.1, plain=3.0)
    lost = {"event": "lost", "candidate": "a", "outcome": "wrong", "reason": "row 0 is off by 1"}
    scripted([*ready("eager", "a", "b"), *first, behind, *rest, step("a", "full size"), lost])
    decision, evidence = decide()
    assert outcomes(decision) == {"eager": "slower", "a": "wrong", "b": "chosen"} and decision.rounds == 12
    assert {name: len(series) for name, series in evidence.seconds.items()} == {"eager": 12, "b": 12, PLAIN: 12}


def test_where_plain_torch_fails_in_a_round_it_has_no_line(scripted):
    scripted([*ready("eager", "a"), *rounds(19, eager=2.0, a=1.0, plain=3.0), *rounds(1, eager=2.0, a=1.0)])
    decision, evidence = decide("a")
    assert decision.chosen == "a" and decision.plain_seconds is decision.winner.speedup_over_plain is None
    assert set(evidence.seconds) == {"eager", "a"}


def test_what_time_and_memory_were_short_for_is_said(scripted):
    short = [{**event, "fewer_for_memory": True} if event["event"] == "checked" else event for event in ready("eager")]
    scripted(
        [
            *short,
            {"event": "measuring", "rows": 64, "vocab": 4096},
            *rounds(20, eager=1.0),
            {"event": "proven", "rows": 128, "bytes": None},
        ]
    )
    decision, _ = decide("")
    assert (decision.measured_rows, decision.proven_rows, decision.checked_rows) == (64, 128, 16)
    assert decision.reason == (
        "nothing but eager could be measured; checked with 16 rows, for which there was memory; "
        "measured with 64 rows, for which there was time and memory"
    )


def test_the_first_call_is_that_of_the_first_problem_of_a_kind(scripted):
    """A later one of another N finds the code compiled."""
    quick = [{**event, "seconds": 0.1} if event["event"] == "first_call" else event for event in ready("eager")]
    both = [*ready("eager"), *rounds(20, eager=1.0), {"event": "done"}]
    both += [*quick, *rounds(20, eager=1.0)]
    scripted(both)
    with Tuner(CPU) as tuner:
        first, second = (tuner.decide(PROBLEM._replace(rows=rows), 20.0, names=[])[0] for rows in (128, 256))
    assert first.candidates["eager"].first_call_seconds == second.candidates["eager"].first_call_seconds == 2.0


def test_nothing_is_decided_where_nothing_could_be_measured(scripted):
    scripted([{"event": "lost", "candidate": name, "outcome": "oom", "reason": "no room"} for name in ("eager", "a")])
    with pytest.raises(TuningFailed, match=r"^no backend could be measured: eager: oom: no room; a: oom: no room$"):
        decide("a")


def test_an_environment_other_than_this_process_is_refused(scripted, monkeypatch):
    workers = scripted([])
    monkeypatch.setattr(tuner_module, "fingerprint_of", lambda device: "another")
    with pytest.raises(TuningFailed, match="finds itself in another environment"):
        decide()
    assert workers.ended == 1


def test_the_device_is_named_with_its_index_and_what_is_queued_there_is_waited_for(scripted, monkeypatch):
    """The worker program has another current device than this process, here 1."""
    gpu = FakeCuda()
    gpu.reserved = 2**20
    monkeypatch.setattr(clock, "cuda", gpu)
    monkeypatch.setattr(tuner_module, "fingerprint_of", str)  # no environment is that
    workers = scripted([])
    with Tuner(torch.device("cuda")) as tuner, pytest.raises(TuningFailed, match="in another environment"):
        tuner.decide(PROBLEM._replace(device_type="cuda"), 20.0, names=[])
    assert workers.jobs[0]["device"] == "cuda:1" and gpu.calls == ["synchronize cuda:1"]


# --- what the loss of a program costs ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("end", "outcome"), [(CRASH, "crashed"), (HANG, "timeout")])
@pytest.mark.parametrize("at", ["import", "time", "full size"])
def test_it_costs_the_candidate_at_work_and_the_others_begin_anew(scripted, at, end, outcome):
    rest = [*ready("eager", "b"), *rounds(20, eager=2.0, b=1.0)]
    workers = scripted([*ready("eager"), *rounds(3, eager=9.0), step("a", at), end], rest)
    decision, evidence = decide()
    assert outcomes(decision) == {"eager": "slower", "a": outcome, "b": "chosen"}
    assert decision.candidates["a"].reason.startswith(f"{at}: ")
    assert evidence.seconds["eager"] == [2.0] * 20  # rounds of two programs are not compared
    assert [name for name, _ in workers.jobs[1]["candidates"]] == ["eager", "b"]
    assert workers.jobs[1]["checked"] == ["eager"]  # what has passed is not checked again
    assert workers.jobs[1]["seed"] == workers.jobs[0]["seed"]


def test_where_eager_is_lost_another_is_the_baseline(scripted):
    scripted([step("eager", "compile"), CRASH], [*ready("a", "b"), *rounds(20, a=1.0, b=1.0)])
    decision, _ = decide()
    assert decision.candidates["eager"].outcome == "crashed" and decision.baseline == "a"


def test_one_that_is_out_already_costs_nobody_when_it_ends_the_program(scripted):
    out = {"event": "lost", "candidate": "a", "outcome": "wrong", "reason": "log_prob_error"}
    scripted([*ready("eager"), step("a", "check"), out, CRASH], [*ready("eager"), *rounds(20, eager=1.0)])
    decision, _ = decide("a")
    assert outcomes(decision) == {"eager": "chosen", "a": "wrong"}


def test_where_nobody_can_be_blamed_nothing_is_decided(scripted):
    scripted([*ready("eager"), CRASH])
    with pytest.raises(TuningFailed, match="^the worker program was lost at the step 'inputs': killed by SIGSEGV$"):
        decide("")


def test_plain_torch_costs_its_line_alone(scripted):
    rest = [*ready("eager", "a"), *rounds(20, eager=2.0, a=1.0)]
    workers = scripted([*ready("eager", "a"), step(None, "time"), CRASH], rest)
    decision, _ = decide("a")
    assert outcomes(decision) == {"eager": "slower", "a": "chosen"} and decision.plain_seconds is None
    assert [job["plain"] for job in workers.jobs] == [True, False]


def test_a_program_that_ends_between_two_problems_is_replaced(scripted):
    script = [*ready("eager"), *rounds(20, eager=1.0)]
    workers = scripted(script, script)
    told = []
    with Tuner(CPU, on_event=told.append) as tuner:
        for rows in (128, 256):
            decision, _ = tuner.decide(PROBLEM._replace(rows=rows), 20.0, names=[])
            assert outcomes(decision) == {"eager": "chosen"}
    assert "program_lost" in [event["event"] for event in told] and workers.ended == 2


def test_events_are_passed_on_as_json_without_the_evidence_and_an_interrupt_ends_the_program(scripted):
    script = [{"event": "evidence", "candidate": "eager", "cases": []}, *ready("eager"), *rounds(20, eager=1.0)]
    workers = scripted(script, script)
    told = []
    with Tuner(CPU, on_event=told.append) as tuner:
        tuner.decide(PROBLEM, 20.0, names=[])
    assert json.loads(json.dumps(told, allow_nan=False)) == told
    assert {event["event"] for event in told} == {
        *("ready", "started", "step", "loaded", "first_call", "checked", "measuring", "round", "done")
    }

    def interrupt(event):
        raise KeyboardInterrupt

    with Tuner(CPU, on_event=interrupt) as tuner, pytest.raises(KeyboardInterrupt):
        tuner.decide(PROBLEM, 20.0, names=[])
    assert workers.ended == 2


# --- budgets ----------------------------------------------------------------------------------------------------------


READY = r"the 60 s for importing, compiling and checking"


def test_what_does_not_get_ready_decides_nothing(scripted):
    scripted([HANG])
    with pytest.raises(TuningFailed, match=rf"^{READY} ended at the step 'start'$"):
        decide(strict=True)


@pytest.mark.parametrize("strict", [True, False])
def test_importing_compiling_and_checking_take_nothing_of_the_budget(scripted, strict):
    """Which bounds the rounds: so it does, too, where a program is lost and all of that is done again."""
    first = [*checked("eager"), step("a", "check"), 30.0, CRASH]
    workers = scripted(first, [step("eager", "import"), 25.0, *ready("eager"), 15.0, *rounds(20, eager=1.0)])
    decision, _ = decide("a", strict=strict)
    assert outcomes(decision) == {"eager": "chosen", "a": "crashed"} and decision.tuning_seconds == 70.0
    assert [job["seconds"] for job in workers.jobs] == ([19.0] * 2 if strict else [20.0] * 2)


def test_a_third_partys_backend_that_hangs_costs_a_share_of_what_is_left(scripted):
    scripted([*checked("eager"), step("a", "import"), HANG], [*ready("eager"), *rounds(20, eager=1.0)])
    decision, _ = decide("a", strict=True)
    assert outcomes(decision) == {"eager": "chosen", "a": "timeout"}
    assert decision.candidates["a"].reason == "import: no end after 15 s"
    assert decision.code == "ONLY_ONE" and decision.tuning_seconds == 15.0


@pytest.mark.parametrize(("in_all", "what"), [(True, "the budget of 20 s"), (False, READY)])
def test_one_of_our_own_that_is_not_ready_in_time_decides_nothing_and_goes_on_in_the_background(
    scripted, left_behind, in_all, what
):
    """A decision without it would be stored. The next process finds its code compiled."""
    later = [*checked("compiled")[3:], *checked("triton"), step(None, "inputs")]
    workers = scripted([*checked("eager"), step("compiled", "compile"), HANG, *later, HANG])
    headway = headway_of("here", PROBLEM)
    failed = pytest.raises(TuningFailed, match=rf"^{what} ended at the step 'compile' of 'compiled'$")
    with Tuner(CPU, short=True) as tuner, failed:
        tuner.decide(PROBLEM, 20.0, names=["compiled", "triton"], strict=True, in_all=in_all, headway=headway)
    tuner.getting_ready.join(10)
    assert not tuner.getting_ready.is_alive() and workers.ended == 1 and workers.now == (20.0 if in_all else 60.0)
    assert headway.passed == ["eager", "compiled", "triton"] and all(map(headway.has_compiled, headway.passed))


@pytest.mark.parametrize("before", [5.0, 12.0])
def test_a_budget_for_all_of_it_leaves_the_rounds_the_rest(scripted, before):
    """And where it ends in the rounds, nothing goes on with them."""
    workers = scripted([before, *ready("eager", "a"), *rounds(ENOUGH - 1, eager=2.0, a=1.0), step("a", "time"), HANG])
    failed = pytest.raises(TuningFailed, match=r"^the budget of 20 s ended at the step 'time' of 'a'$")
    with Tuner(CPU, short=True) as tuner, failed:
        tuner.decide(PROBLEM, 20.0, names=["a"], strict=True, in_all=True)
    assert workers.now == 20.0 and workers.ended == 1 and tuner.getting_ready is None
    assert workers.jobs[0]["in_all"]


@pytest.mark.parametrize("done", [ENOUGH - 1, ENOUGH])
def test_a_budget_that_ends_in_the_rounds_decides_by_these_if_they_are_enough(scripted, done):
    """And not otherwise: what the rounds cannot tell is not stored for good."""
    script = [*ready("eager", "a"), *rounds(done, eager=2.0, a=1.0), step("eager", "time"), 20.0, HANG]
    scripted(script)
    if done < ENOUGH:
        with pytest.raises(TuningFailed, match=r"^the budget of 20 s ended at the step 'time' of 'eager'$"):
            decide("a", strict=True)
    else:
        decision, _ = decide("a", strict=True)
        assert decision.rounds == done and decision.chosen in ("eager", "a")


@pytest.mark.parametrize(
    ("end", "outcome"), [((HANG,), "timeout"), ((30.0, CRASH), "crashed")], ids=["does not return", "crashes"]
)
def test_one_that_is_stuck_or_crashes_when_the_budget_ends_is_out(scripted, end, outcome):
    """Though it was the fastest of the rounds before, which are enough."""
    in_rounds = rounds(ENOUGH, eager=2.0, a=1.0)
    scripted([*ready("eager", "a"), *in_rounds, step("a", "time"), *end])
    decision, evidence = decide("a", seconds=30.0, strict=True)
    assert outcomes(decision) == {"eager": "chosen", "a": outcome}
    assert set(evidence.seconds) == {"eager"} and decision.rounds == ENOUGH


def test_without_a_strict_budget_each_step_has_its_own_limit(scripted):
    workers = scripted([*ready("eager"), step("a", "import"), HANG], [*ready("eager"), *rounds(20, eager=1.0)])
    decision, _ = decide("a", seconds=1.0)
    assert decision.candidates["a"].reason == "import: no end after 120 s"
    assert [job["seconds"] for job in workers.jobs] == [1.0, 1.0]  # what hung is not taken from the others
    assert not workers.jobs[0]["strict"] and math.isfinite(decision.tuning_seconds)


COMPILE_ON = """
import os, pathlib, time, torch
from compiled_logprobs.problem import Problem
from compiled_logprobs.tuning.headway import Headway
from compiled_logprobs.tuning.tuner import compile_apart
from tests.helpers.backends_for_tuning import FOLDER_VARIABLE, registered

with registered(loops="Loops"):
    problem = Problem("cpu", 64, 512, torch.float32)
    thread = compile_apart(problem, "loops", torch.device("cpu"), Headway(None, problem))
while not list(pathlib.Path(os.environ[FOLDER_VARIABLE]).glob("looping-*")):
    time.sleep(0.05)
assert thread.is_alive()
"""


@pytest.mark.slow
def test_what_goes_on_in_the_background_ends_with_the_process(monkeypatch, tmp_path):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    subprocess.run([sys.executable, "-c", COMPILE_ON], check=True, timeout=120)
    (worker,) = pids(tmp_path, "looping")
    assert has_ended(worker, within=0.0)


# --- from process to process ------------------------------------------------------------------------------------------


@pytest.fixture
def left_behind(monkeypatch, tmp_path):
    """The folder of a compiler's cache, of this test alone."""
    monkeypatch.setattr(headway_module, "cache_folder", lambda: tmp_path)
    return tmp_path


class SlowMachine:
    """What the worker program says where each step takes so many seconds, and what is compiled need not be again."""

    budget = 20.0

    def __init__(
        self, *, check: float = 0.0, one_round: float = 0.0, begin: float = 0.0, look: float = 0.0, **compiling: float
    ) -> None:
        self.check, self.one_round, self.begin, self.look = check, one_round, begin, look
        if begin:
            self.budget = 5.0
        self.compiling = {"cpp": 10.0, "compiled": 10.0, **compiling}

    def __call__(self, job):
        names = [name for name, _ in job["candidates"]]
        for name in names:
            told = {event.get("step", event["event"]): event for event in checked(name)}
            yield from (Takes(2.0), told["import"], {**told["loaded"], "fingerprint": code_of(name)}, told["compile"])
            yield Takes(self.compiling.get(name, 0.0))
            self.compiling[name] = 0.0
            yield told["first_call"]
            if name not in job["checked"]:
                yield from (told["check"], Takes(self.check), told["checked"])
        yield from (step(None, "inputs"), {"event": "measuring", "rows": 256, "vocab": 4096})
        for event in rounds(20, **{name: 1.0 + place for place, name in enumerate(names)}):
            yield from (event, Takes(self.begin + self.one_round / 4 ** job["too_slow"]))
        yield from (step("eager", "full size"), Takes(self.look / 4 ** job["too_slow"]))


@pytest.mark.parametrize(
    ("machine", "processes", "out"),
    [
        (SlowMachine(), 2, None),
        (SlowMachine(check=25.0), 4, None),
        (SlowMachine(cpp=40.0, compiled=50.0), 4, None),
        (SlowMachine(one_round=10.0), 5, None),
        (SlowMachine(look=200.0), 4, None),
        (SlowMachine(begin=0.5), 6, None),
        (SlowMachine(compiled=1e6), 2 + MOST_CUTS, "compiled"),
        (SlowMachine(check=50.0, one_round=10.0, compiled=1e6), 9, "compiled"),
    ],
    ids=[
        "quick",
        "slow checks",
        "slow compilers",
        "slow rounds",
        "slow look",
        "slow to begin",
        "one never ends",
        "all of it",
    ],
)
def test_each_process_goes_on_where_the_last_one_ended(monkeypatch, left_behind, machine, processes, out):
    """None of them lives on to compile in the background, and none waits longer than the one before."""
    monkeypatch.setattr(tuner_module, "get_ready_apart", lambda worker, headway: worker.end())
    workers, tried, decision = ScriptedWorkers(monkeypatch, *[machine] * 20), 0, None
    while decision is None:
        headway, began, tried = headway_of("here", PROBLEM), workers.now, tried + 1
        assert headway.is_first == (tried == 1)
        options = {"names": ["cpp", "compiled"], "strict": True, "in_all": headway.is_first, "headway": headway}
        with contextlib.suppress(TuningFailed), Tuner(CPU, short=True) as tuner:
            decision, _ = tuner.decide(PROBLEM, headway.budget(machine.budget), **options)
        assert workers.now - began <= (20.0 if headway.is_first else 80.0)
    assert tried <= processes and decision.chosen == "eager"
    assert [name for name, outcome in outcomes(decision).items() if outcome == "timeout"] == [out] * bool(out)
    assert all(candidate.checks for name, candidate in decision.candidates.items() if name != out)
    left = headway_of("here", PROBLEM._replace(rows=64))  # whatever N
    assert not (left.passed or left.cut or left.too_slow or left.is_first) and left.has_compiled("cpp")


def test_what_was_left_behind_counts_for_the_same_code_alone(left_behind, monkeypatch):
    headway = headway_of("here", PROBLEM)
    for event in checked("eager", "cpp", "a"):
        headway.hear({**event, "fingerprint": code_of(event["candidate"])} if event["event"] == "loaded" else event)
    assert headway.passed == ["eager", "cpp"], "of a third party nothing is known without importing it"
    assert headway_of("here", PROBLEM).said == headway.said and headway_of("elsewhere", PROBLEM).is_first
    headway.hear({**checked("cpp")[1], "fingerprint": "of new code"})
    headway.keep()
    assert headway_of("here", PROBLEM).passed == ["eager"]


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"{}", b"[]", b"[" * 100_000, b'{"said": {"cpp": 3}, "cut": {}, "too_slow": 0}'),
        *(b'{"said": {}, "cut": {"cpp": 1e999}, "too_slow": 0}', b'{"said": {}, "cut": {}, "too_slow": Infinity}'),
    ],
)
def test_what_cannot_be_read_was_never_left_behind(left_behind, content):
    headway = headway_of("here", PROBLEM)
    headway.path.write_bytes(content)
    again = headway_of("here", PROBLEM)
    assert not (again.said or again.cut or again.is_first or again.has_compiled("cpp"))


def known(*names):
    """What is said of our own until they have passed the check, but for the steps."""
    events = (event for event in checked(*names) if event["event"] != "step")
    return [
        {**event, "fingerprint": code_of(event["candidate"])} if "fingerprint" in event else event for event in events
    ]


@pytest.mark.parametrize(
    "check", [{}, {"event": "checked", "candidate": "cpp"}, {**known("cpp")[-1], "checks": [{"name": 3}]}]
)
def test_what_another_release_left_behind_in_another_form_is_not_known(left_behind, check):
    headway = headway_of("here", PROBLEM)
    headway.said = {"cpp": {event["event"]: event for event in known("cpp")}}
    headway.keep()
    assert headway_of("here", PROBLEM).passed == ["cpp"]
    headway.said["cpp"]["checked"], headway.too_slow = check, 10**6
    headway.keep()
    again = headway_of("here", PROBLEM)
    assert again.passed == [] and again.too_slow == MOST_SLOW and again.budget(20.0) == 20.0
    assert Tally(PROBLEM, ["eager", "cpp"], None, 20.0, headway=again).passed == []


def test_what_a_call_compiled_and_a_later_program_checked_has_passed(left_behind):
    headway = headway_of("here", PROBLEM)
    headway.note_compiled("cpp", code_of("cpp"))
    headway = headway_of("here", PROBLEM)
    assert headway.has_compiled("cpp") and not headway.passed
    for event in known("cpp"):
        headway.hear(event)
    tally = Tally(PROBLEM, ["eager", "cpp"], None, 20.0, headway=headway_of("here", PROBLEM))
    assert tally.passed == ["cpp"] and tally.candidates["cpp"].first_call_seconds == 2.0


def test_one_that_goes_on_in_the_background_keeps_what_others_have_written_meanwhile(left_behind):
    background, other = headway_of("here", PROBLEM), headway_of("here", PROBLEM)
    for event in known("eager"):
        other.hear(event)
    other.note_cut("compiled", in_rounds=False)
    other.note_cut(None, in_rounds=True)
    for event in known("cpp"):
        background.hear(event)
    other.note_cut("compiled", in_rounds=False)
    left = headway_of("here", PROBLEM)
    assert (left.passed, left.cut, left.too_slow) == (["eager", "cpp"], {"compiled": 2}, 1)


def test_where_all_were_cut_all_are_tried_again(left_behind):
    headway = headway_of("here", PROBLEM)
    headway.cut = {"eager": MOST_CUTS, "cpp": MOST_CUTS + 1}
    assert Tally(PROBLEM, ["eager", "cpp"], None, 20.0, headway=headway).alive == ["eager", "cpp"]
    assert Tally(PROBLEM, ["eager", "cpp", "compiled"], None, 20.0, headway=headway).alive == ["compiled"]


def test_without_room_for_a_thread_nothing_goes_on(scripted, monkeypatch):
    def fail(thread):
        raise RuntimeError("can't start new thread")

    workers = scripted([])
    monkeypatch.setattr(threading.Thread, "start", fail)
    with pytest.raises(RuntimeError, match="new thread"):
        get_ready_apart(workers._start(), None)
    assert workers.ended == 1


def test_where_nothing_can_be_left_behind_nobody_is_the_first(left_behind):
    (left_behind / "compiled-logprobs").touch()
    headway = headway_of("here", PROBLEM)
    headway.note_cut("cpp", in_rounds=False)
    assert not headway.is_first and headway.has_compiled("cpp")


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


@pytest.mark.slow
@pytest.mark.parametrize("dies", [False, True])
def test_the_device_is_for_one_process_at_a_time(own_locks, dies):
    with subprocess.Popen([sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"True\n"
        with alone_on(CPU, 0.2) as alone:
            assert not alone
        holder.kill() if dies else holder.stdin.close()
        with alone_on(CPU, 60.0) as alone:  # waits
            assert alone
            holder.wait(60)
    assert has_ended(holder.pid)


def test_the_device_is_for_one_thread_at_a_time_and_an_error_lets_go_of_it(own_locks):
    told = []

    def other(within):
        with alone_on(CPU, within) as alone:
            told.append(alone)

    with contextlib.suppress(KeyboardInterrupt), alone_on(CPU, 0.0) as alone:
        assert alone
        threads = [threading.Thread(target=other, args=(within,)) for within in (0.0, 60.0)]
        for thread in threads:
            thread.start()
        threads[0].join()
        time.sleep(0.1)
        assert told == [False]
        raise KeyboardInterrupt
    threads[1].join()
    assert told == [False, True]


def test_without_a_place_for_locks_there_is_no_order(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "file"))
    with alone_on(CPU, 0.0) as alone, alone_on(CPU, 0.0) as also:
        assert alone and also
