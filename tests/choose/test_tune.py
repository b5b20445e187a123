"""Measuring: once, within a budget, alone on the device; on demand; and of a stale decision only what has changed."""

import contextlib
import dataclasses
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import Mock

import pytest
import torch
from filelock import FileLock

import compiled_logprobs as clp
from compiled_logprobs.backends.compiled import Compiled
from compiled_logprobs.backends.cpp import Cpp
from compiled_logprobs.choose import memory, rule, tune
from compiled_logprobs.choose.memory import Choice, Memory
from compiled_logprobs.machine.environment import fingerprint_of
from compiled_logprobs.policy import Policy
from compiled_logprobs.store import ROOT_VARIABLE, user_store
from compiled_logprobs.tuning import headway
from compiled_logprobs.tuning.headway import headway_of
from compiled_logprobs.tuning.tuner import TuningFailed
from tests.helpers.disks import a_file
from tests.helpers.stored_decisions import (
    CPU,
    LARGE,
    NEW,
    FakeTuner,
    all_measured,
    chosen,
    decided,
    evidence_of,
    measured,
    publish,
    raising,
    undecided,
)

pytestmark = pytest.mark.usefixtures("elsewhere")
LOGITS, LABELS = torch.randn(1024, 1031), torch.randint(1031, (1024,))
OLD = "2026-01-02T03:04:05Z"


# By the first call


def test_a_new_problem_is_measured_once(fake, capsys, monkeypatch):
    assert chosen(LARGE._replace(rows=1020)) == ("eager", "tuned here") and fake.asked == [LARGE._replace(rows=1020)]
    said = capsys.readouterr().err.splitlines()
    assert said == [
        "compiled_logprobs: measuring which backend is fastest for 1024 x 1031 float32 on cpu (not 16-byte aligned)"
        ": at most 60 s to compile and check them, then 20 s to time them (COMPILED_LOGPROBS_MODE=lookup prevents it)",
        "compiled_logprobs: eager serves it: eager is faster",
    ]
    for rows in (1020, 1024, 1018):
        chosen(LARGE._replace(rows=rows))
    monkeypatch.setattr(memory, "MEMORY", Memory())
    assert chosen() == ("eager", "user store")
    assert len(fake.asked) == 1 and not capsys.readouterr().err


def test_threads_that_come_at_once_measure_once(fake):
    def slowly(problem):
        time.sleep(0.2)  # so that the others come meanwhile
        return decided(problem)

    fake.answer = slowly
    with ThreadPoolExecutor(8) as threads:
        choices = [threads.submit(chosen) for _ in range(8)]
    assert {choice.result()[0] for choice in choices} == {"eager"} and len(fake.asked) == 1


@pytest.fixture
def left_behind(monkeypatch, tmp_path):
    """The folder of a compiler's cache, in which nothing was compiled yet."""
    monkeypatch.setattr(headway, "cache_folder", lambda: tmp_path / "cache")


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_what_is_ready_serves_until_the_rest_is_compiled(fake, left_behind, clock, monkeypatch, capsys):
    """What passes the check in the background is not checked again."""
    monkeypatch.setattr("compiled_logprobs.choose.rule.check_backend", lambda *_, **__: pytest.fail("it checked"))
    going_on = Mock()
    fake.answer = raising(TuningFailed("the budget ended"))
    fake.getting_ready = going_on
    assert [chosen(), chosen()] == [("eager", "default rule")] * 2
    assert ", at first by what is ready, while the rest is compiled in the background. " in capsys.readouterr().err
    why = "because measuring came to no decision: the budget ended"
    assert f"{why}; the rest is compiled in the background" in str(clp.explain(LOGITS, LABELS))
    memory.MEMORY.undecided[LARGE].headway.note_compiled("cpp", "its code")
    memory.MEMORY.undecided[LARGE].headway.said["cpp"]["checked"] = {}
    clock[0] += memory.READY_S - 1
    assert chosen() == ("eager", "default rule")
    clock[0] += 2
    assert chosen() == ("cpp", "default rule") and len(fake.asked) == 1
    going_on.is_alive.side_effect = AssertionError
    clock[0] += 1000
    assert chosen() == ("cpp", "default rule")


def test_another_n_is_not_measured_beside_what_is_compiled_in_the_background(fake, left_behind, clock, monkeypatch):
    """What passes the check there serves it, too."""
    monkeypatch.setattr("compiled_logprobs.choose.rule.check_backend", lambda *_, **__: pytest.fail("it checked"))
    others = [LARGE._replace(rows=rows) for rows in (2048, 4096, 8192)]
    fake.answer, fake.getting_ready = raising(TuningFailed("the budget ended")), Mock()
    assert [chosen(), chosen(others[0])] == [("eager", "default rule")] * 2 and len(fake.asked) == 1
    why = rule.why_not_measure(rule.context_of(others[0], CPU, Policy()))
    assert why.startswith("at 1024 rows measuring came to no decision: the budget ended; the rest is compiled in the b")
    memory.MEMORY.undecided[LARGE].headway.said["cpp"] = {"checked": {}}
    assert chosen(others[1]) == ("cpp", "default rule") and len(fake.asked) == 1
    fake.getting_ready.is_alive.return_value, fake.answer = False, decided
    clock[0] += memory.READY_S + 1
    assert chosen(others[2])[1] == "tuned here" and len(fake.asked) == 2
    assert "came to no decision" in rule.why_not_measure(rule.context_of(LARGE, CPU, Policy()))


def test_what_another_process_left_behind_while_this_waited_for_it_counts(fake, left_behind, monkeypatch):
    @contextlib.contextmanager
    def wait(device, within):
        headway_of(fingerprint_of(CPU), LARGE).note_cut(None, in_rounds=True)
        yield True

    monkeypatch.setattr(tune, "alone_on", wait)
    chosen()
    assert fake.options[0]["in_all"] and fake.options[0]["headway"].too_slow == 1


def test_the_first_process_has_its_budget_for_all_of_it(fake, left_behind, monkeypatch, capsys):
    """What it leaves undecided is stored by the next one, which has time to compile."""
    fake.answer = undecided
    assert chosen()[1] == "tuned here" and not list(user_store().decisions())
    assert ": 20 s to compile, check and time them, the first time on this machine" in capsys.readouterr().err
    monkeypatch.setattr(memory, "MEMORY", Memory())
    assert chosen()[1] == "tuned here" and len(list(user_store().decisions())) == 1
    assert "at most 60 s to compile" in capsys.readouterr().err
    assert [options["in_all"] for options in fake.options] == [True, False]
    assert chosen(LARGE._replace(vocab=1033)) and fake.options[-1]["in_all"], "each kind compiles code of its own"


def test_what_a_decision_chose_is_compiled_in_the_background(
    nothing_measures, left_behind, clock, mode, monkeypatch, capsys
):
    """What was measured beside it and needs no compiling serves meanwhile; and later processes do not wait."""
    mode("tune")
    candidates = all_measured() | {"cpp": measured("cpp", seconds=1e-3)}
    publish(decided(LARGE._replace(rows=512), "compiled", candidates=candidates))
    going_on, started = Mock(), []
    monkeypatch.setattr(tune, "compile_apart", lambda problem, name, *_: started.append((problem, name)) or going_on)
    warm = {"cpp"}
    for backend in (Cpp, Compiled):
        monkeypatch.setattr(backend, "is_warm", lambda self, problem: self.name in warm)
    assert [chosen(), chosen()] == [("cpp", "meanwhile")] * 2 and started == [(LARGE, "compiled")]
    assert "compiled, which serves 1024 x 1031 float32 on cpu" in capsys.readouterr().err
    explanation = clp.explain(LOGITS, LABELS)
    assert explanation.decision.chosen == "compiled" and explanation.why.startswith("what its decision chose is comp")
    warm.clear()
    clock[0] += memory.READY_S + 1
    assert clp.explain(LOGITS, LABELS).source == "meanwhile"
    assert chosen() == ("eager", "meanwhile")
    going_on.is_alive.return_value = False
    clock[0] += memory.READY_S + 1
    assert chosen() == ("compiled", "near") and len(started) == 1
    left = headway_of(fingerprint_of(CPU), LARGE)
    assert left.is_first, "nobody has begun to measure"
    left.note_compiled("compiled", Compiled().fingerprint())
    monkeypatch.setattr(memory, "MEMORY", Memory())
    assert chosen() == ("compiled", "near") and len(started) == 1


def test_nothing_is_compiled_in_the_background_where_nothing_may_be_started(left_behind, mode, monkeypatch):
    publish(decided(chosen="compiled"))
    monkeypatch.setattr(Compiled, "is_warm", lambda *_: False)
    monkeypatch.setattr(tune, "compile_apart", lambda *_: pytest.fail("it started a program"))
    for name, options in (("lookup", {}), ("tune", {"require_hit": True})):
        mode(name)
        with clp.autotune(**options):
            assert chosen() == ("compiled", "user store")
        memory.MEMORY.choices.clear()
    monkeypatch.setattr(memory.MEMORY, "is_forked", True)
    assert chosen() == ("compiled", "user store")


def test_an_accelerators_memory_is_the_callers_and_a_call_that_compiles_there_says_so_once(left_behind, capsys):
    choice = Choice("compiled", "near", decided(GPU, "compiled"))
    context = rule.Context(GPU, Policy(), torch.device("cuda"), "here", {}, memory.MEMORY, tune.tune_in_call)
    for said in (
        "compiled, which serves 1024 x 1031 float32 on cuda (not 16-byte aligned), is compiled in this call",
        "",
    ):
        assert tune.meanwhile(context, choice) == choice
        assert said in (told := capsys.readouterr().err) and bool(said) == bool(told)


@pytest.mark.parametrize("error", [TuningFailed("the budget ended"), OSError("busy"), RuntimeError("no thread")])
def test_what_could_not_be_decided_is_said_and_not_tried_again(fake, checks, capsys, error):
    fake.answer = raising(error)
    assert [chosen(), chosen()] == [("cpp", "default rule")] * 2 and len(fake.asked) == 1
    assert f"not decided: {error}. The default rule serves it in this process" in capsys.readouterr().err
    assert not list(user_store().decisions())


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no memory"), KeyboardInterrupt()])
def test_out_of_memory_and_interruptions_are_raised_and_leave_nothing_half_done(fake, error):
    fake.answer = raising(error)
    with pytest.raises(type(error)):
        chosen()
    fake.answer = decided
    assert chosen() == ("eager", "tuned here")


def test_the_budget_of_a_process_is_used_up_in_the_end(fake, checks, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(tune.time, "monotonic", lambda: clock[0])

    def answer(problem):
        clock[0] += 11.0
        return decided(problem)

    fake.answer = answer
    with clp.autotune(budget_s=10):  # none is begun after 30 s
        sources = [chosen(LARGE._replace(vocab=1031 + number))[1] for number in range(5)]
    assert sources == ["tuned here"] * 3 + ["default rule"] * 2
    assert [options["seconds"] for options in fake.options] == [10.0] * 3, "the whole budget, whatever went before"


@pytest.mark.parametrize("call", [chosen, lambda: clp.tune(LARGE)], ids=["call", "tune"])
def test_another_process_that_measures_is_waited_for_and_its_decision_taken(fake, tmp_path, call):
    thread = threading.Thread(target=call)
    with FileLock(tmp_path / "compiled-logprobs-cpu.lock"):
        thread.start()
        time.sleep(0.2)
        assert thread.is_alive() and not memory.MEMORY.choices
        publish(decided(chosen="compiled"))
    thread.join(30)
    assert chosen() == ("compiled", "user store") and not fake.asked


def test_another_process_is_waited_for_only_so_long(fake, checks, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tune, "WAIT_S", 0.1)
    with FileLock(tmp_path / "compiled-logprobs-cpu.lock"), clp.autotune(budget_s=0.2):
        assert chosen() == ("cpp", "default rule")
        with pytest.raises(clp.LogProbsError, match="another process has been measuring on cpu for 0.1 s; wait for it"):
            clp.tune(LARGE)
    assert "not decided: another process was measuring on this device all the time" in capsys.readouterr().err
    assert not fake.asked


def test_where_nothing_can_be_stored_it_is_measured_all_the_same_and_said(fake, tmp_path, monkeypatch):
    monkeypatch.setenv(ROOT_VARIABLE, str(a_file(tmp_path)))
    message = "cannot be written.*\\n.*\\nWhat was measured holds in this process only."
    with pytest.warns(RuntimeWarning, match=message):
        assert chosen() == ("eager", "tuned here")
    with pytest.warns(RuntimeWarning, match=message):
        clp.tune(LARGE._replace(vocab=1033))
    memory.MEMORY.forget(LARGE)  # as another policy finds it
    assert [chosen(LARGE._replace(vocab=vocab)) for vocab in (1031, 1033)] == [("eager", "tuned here")] * 2
    with pytest.raises(clp.ProfileError, match="cannot be written"):
        list(tune.tune_all([LARGE], CPU))  # as the command line asks, before it measures
    assert len(fake.asked) == 2


@pytest.mark.parametrize("stderr", [None, Mock(write=Mock(side_effect=BrokenPipeError))], ids=["none", "closed"])
def test_nobody_has_to_hear_of_it(fake, monkeypatch, stderr):
    monkeypatch.setattr(sys, "stderr", stderr)
    assert chosen() == ("eager", "tuned here")


# On demand


def test_tune_measures_the_call_and_stores_it(fake, mode):
    mode("off")  # on demand is on demand
    [decision] = clp.tune(LOGITS[:1020].clone().requires_grad_(), LABELS[:1020], temperature=0.5, return_entropy=True)
    assert decision.problem == LARGE._replace(needs_grad=True, temperature="number", entropy=True)
    assert [stored for _, stored in user_store().decisions()] == [decision]
    mode("lookup")
    assert chosen(decision.problem) == ("eager", "tuned here")


def test_tune_measures_each_bucket_once(fake):
    decisions = clp.tune(LARGE._replace(rows=rows) for rows in (1000, 1024, 5000, 800))
    assert [decision.problem.rows for decision in decisions] == [1024, 6144] and len(fake.asked) == 2
    assert clp.tune(LARGE) == [decisions[0]] and clp.tune([]) == [] and len(fake.asked) == 2


@pytest.mark.parametrize(
    ("stored", "again", "measures"),
    [
        (decided(), False, False),
        (decided(), True, True),
        (undecided(), False, True),
        (decided(short_check=True), False, True),  # on demand that is not enough
        (decided(candidates=all_measured() | {"eager": measured("eager", fingerprint=NEW)}), False, True),
        (decided(candidates={"eager": measured("eager")}), False, True),
    ],
    ids=["known", "again", "undecided", "short check", "changed", "fewer candidates"],
)
def test_tune_measures_again_where_what_is_stored_is_not_enough(stored, again, measures, fake):
    publish(stored)
    clp.tune(LARGE, again=again)
    assert bool(fake.asked) == measures
    fake.asked.clear()
    clp.tune(LARGE)
    assert not fake.asked


@pytest.mark.parametrize(("took", "asked", "gets"), [(5.0, 20.0, 20.0), (30.0, 20.0, 90.0), (500.0, 20.0, 600.0)])
def test_what_was_left_undecided_is_measured_for_longer(fake, took, asked, gets):
    """Three times as long as it took, but at most 600 s; what was decided as long as is asked for."""
    told = []
    publish(undecided(tuning_seconds=took))
    publish(decided(LARGE._replace(rows=64), tuning_seconds=took))
    problems = [LARGE, LARGE._replace(rows=64)]
    list(tune.tune_all(problems, CPU, budget_s=asked, again=True, on_event=told.append))
    assert [options["seconds"] for options in fake.options] == [gets, asked]
    assert [(event["undecided"], event["budget_s"]) for event in told] == [(True, gets), (False, asked)]


def test_after_tune_this_process_takes_what_it_returned(fake, checks, mode):
    mode("lookup")
    assert chosen() == ("cpp", "default rule")
    publish(decided())  # by another process, in the meantime
    clp.tune(LARGE)
    assert chosen() == ("eager", "user store") and not fake.asked


def test_tune_takes_a_device_and_a_budget(fake):
    clp.tune(LARGE, device="cpu", budget_s=3)
    clp.tune(LARGE, again=True)
    with clp.autotune(budget_s=7):
        clp.tune(LARGE, again=True)
    assert [options["seconds"] for options in fake.options] == [3.0, 20.0, 7.0]


def test_tune_tells_what_could_not_be_decided_keeps_the_rest_and_lets_go_of_the_device(fake, tmp_path):
    def answer(problem):
        if problem.vocab == 1031:
            raise TuningFailed("no backend could be measured")
        return decided(problem)

    fake.answer = answer
    with pytest.raises(clp.LogProbsError, match="no backend could be measured") as error:
        clp.tune([LARGE._replace(vocab=1032, aligned=True), LARGE, LARGE._replace(vocab=1033)])
    assert [decision.problem.vocab for _, decision in user_store().decisions()] == [1032]
    with FileLock(tmp_path / "compiled-logprobs-cpu.lock", timeout=0):  # though the traceback lives on
        assert error.value


GPU = LARGE._replace(device_type="cuda")


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((LOGITS,), {}, "got logits without labels; logits and labels on the device to measure, or problems, are"),
        ((LOGITS, LABELS), {"device": "cpu"}, "got logits and device='cpu'"),
        ((LOGITS, LABELS[:3]), {}, "labels"),
        ((LARGE, LABELS), {}, "got labels beside problems; problems, or logits and labels, are valid"),
        (([LARGE, "1024 x 1031"],), {}, "got a str among the problems"),
        ((LARGE._replace(rows=-4),), {}, "problem whose rows is -4; an integer of 0 or more is valid"),
        ((LARGE._replace(dtype=torch.int64),), {}, "problem whose dtype is torch.int64; torch.float32, torch.bfloat16"),
        ((LARGE._replace(device_type="mars"),), {}, "got device='mars'; e.g. 'cpu' or 'cuda:0' is valid"),
        (([LARGE, GPU],), {}, "got problems and devices of types cpu, cuda; one is valid. Tune them apart."),
        ((LARGE,), {"device": "meta"}, "got problems and devices of types cpu, meta; one is valid"),
        ((LARGE,), {"budget_s": "long"}, "got budget_s='long'; a number of seconds, 0 or more, is valid"),
    ],
)
def test_wrong_arguments_of_tune_are_told(arguments, options, message, nothing_measures):
    with pytest.raises(clp.InputError) as error:
        clp.tune(*arguments, **options)
    assert message in str(error.value)


def test_the_checks_of_what_was_carried_over_stay_in_the_evidence():
    """A later run measures one candidate alone."""
    first = decided()
    tune.publish(user_store(), first, dataclasses.replace(evidence_of(first), cases={"cpp": (), "compiled": ()}), CPU)
    carried = all_measured() | {"cpp": measured("cpp", measured_at=OLD)}
    later = decided(candidates=carried, seed=1)
    tune.publish(user_store(), later, dataclasses.replace(evidence_of(later), cases={"eager": ()}), CPU)
    evidence = user_store().evidence(fingerprint_of(CPU), later)
    assert evidence is not None and set(evidence.cases) == {"eager", "cpp"}


# Only what has changed


ALL = {"eager", "cpp", "compiled", "triton", "flash_attn"}
CHANGED = {name: measured(name, fingerprint=NEW) for name in ALL}


def standing(winner="cpp", *renewed, **changes):
    """A decision of old, since when the backends `renewed` have changed."""
    candidates = all_measured() | {name: CHANGED[name] for name in renewed}
    return decided(chosen=winner, candidates=candidates, measured_at=OLD, **changes)


def renew(stands, *winners, **options):
    """The new decision, given the winner of each measurement; and the candidates of each."""
    left = list(winners)

    def answer(problem):
        names = {*tuner.options[-1]["names"], "eager"}  # the baseline is always measured
        return decided(problem, left.pop(0), candidates={name: measured(name) for name in names})

    tuner = FakeTuner(answer)
    tuner.short = False
    decision, _ = tune.decide(tuner, LARGE, 10.0, standing=stands, **options)
    return decision, [{*asked["names"], "eager"} for asked in tuner.options]


def test_one_that_changed_is_measured_beside_the_incumbent_and_the_baseline():
    decision, asked = renew(standing("cpp", "compiled"), "cpp", names=ALL)
    assert asked == [{"eager", "cpp", "compiled"}]
    carried = decision.candidates["flash_attn"]
    assert carried.measured_at == OLD and carried.outcome == "unavailable"
    assert decision.candidates["cpp"].measured_at is None and decision.left_out == ()


def test_what_was_carried_over_before_keeps_its_date_and_a_new_winner_replaces_the_incumbent():
    stands = standing("eager", "cpp")
    stands.candidates["compiled"] = measured("compiled", measured_at="2025-01-01T00:00:00Z")
    decision, _ = renew(stands, "cpp")
    assert decision.chosen == "cpp" and decision.candidates["compiled"].measured_at == "2025-01-01T00:00:00Z"


def test_only_those_that_were_asked_for_are_measured():
    decision, asked = renew(standing("eager", "compiled", "cpp"), "eager", names=["eager", "cpp"])
    assert asked == [{"eager", "cpp"}]
    assert decision.candidates["compiled"] == dataclasses.replace(CHANGED["compiled"], measured_at=OLD)


def test_everything_is_measured_where_the_incumbent_has_lost_what_it_had():
    """It is no faster than the baseline now: what was slower than it then may be the fastest."""
    decision, asked = renew(standing("cpp", "flash_attn"), "eager", "compiled")
    assert decision.chosen == "compiled" and asked == [{"eager", "cpp", "flash_attn"}, ALL]


@pytest.mark.parametrize(
    ("stands", "again"),
    [
        (None, False),
        (standing("cpp", "cpp"), False),
        (standing("compiled", "eager"), False),
        (standing("cpp", "compiled", settled=False), False),
        (standing("cpp", "compiled", short_check=True), False),
        (standing("cpp", "compiled", baseline="compiled"), False),
        (standing(), False),
        (standing("cpp", "compiled"), True),
    ],
    ids=["nothing", "incumbent changed", "baseline changed", "unsettled", "short", "baseline", "no change", "asked to"],
)
def test_everything_is_measured_where_little_still_holds(stands, again):
    assert renew(stands, "eager", again=again)[1] == [ALL]
