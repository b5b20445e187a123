"""How `auto` is served: where it looks, in which order, what it does on a miss, and what it never does twice."""

import contextlib
import dataclasses
import json
import shutil
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from filelock import FileLock, Timeout

import compiled_logprobs as clp
from compiled_logprobs.backends import get_backend
from compiled_logprobs.backends.compiled import Compiled
from compiled_logprobs.backends.eager import Eager
from compiled_logprobs.choose import rule as decisions
from compiled_logprobs.choose import serving
from compiled_logprobs.choose.serving import why_no_tuning
from compiled_logprobs.decision import Candidate, Evidence, Record
from compiled_logprobs.machine.clock import MIB
from compiled_logprobs.machine.environment import fingerprint_of
from compiled_logprobs.policy import Policy, policy
from compiled_logprobs.problem import Problem, bucket
from compiled_logprobs.store import ROOT_VARIABLE, user_store
from compiled_logprobs.store import files as store
from compiled_logprobs.store.files import Store
from compiled_logprobs.tuning import tuner
from compiled_logprobs.tuning.tuner import TuningFailed
from tests.helpers.stored_decisions import (
    CPU,
    LARGE,
    FakeTuner,
    all_measured,
    decided,
    measured,
    publish,
    publish_record,
)
from tests.store.test_decision import FIELDS, plain, within, wrong_values

SMALL = LARGE._replace(rows=8)
LOGITS, LABELS = torch.randn(1024, 1031), torch.randint(1031, (1024,))
TRUE = LOGITS.double().log_softmax(-1).gather(-1, LABELS[:, None])[:, 0]


def serve(asked: Problem = LARGE) -> str:
    return serving.serve(asked, CPU, policy())


def source(asked: Problem = LARGE) -> str:
    answer = decisions.served(asked, policy())
    assert answer is not None
    return answer.source


def assert_right() -> None:
    """The public function serves a call, and its result is right."""
    out = clp.log_probs_from_logits(LOGITS, LABELS)
    torch.testing.assert_close(out.double(), TRUE, atol=1e-5, rtol=0)


def passed_over(told) -> int:
    """How many warnings speak of a profile; torch's compiler has warnings of its own."""
    return sum("is passed over" in str(warning.message) for warning in told)


def as_in_a_new_process() -> None:
    decisions._served.clear()
    decisions._hot.clear()
    decisions._decided.clear()
    decisions._set_aside.clear()
    store._warned.clear()


@pytest.fixture
def gate(monkeypatch):
    """No check is run: what is in this dict, else what passes everything, is found by it."""
    found: dict[str, serving._Short] = {}
    monkeypatch.setattr(serving, "_short_check", lambda name, *_: found.get(name, serving._Short(True, True)))
    return found


@pytest.fixture
def fake(monkeypatch, mode):
    """New problems are measured, by a stand-in."""
    mode("tune")
    made = FakeTuner()
    monkeypatch.setattr(serving, "Tuner", made)
    return made


@pytest.fixture
def nothing_measures(monkeypatch):
    def fail(*_, **__):
        pytest.fail("it measured")

    monkeypatch.setattr(serving, "Tuner", fail)
    monkeypatch.setattr(serving, "check_backend", fail)


@pytest.fixture
def own_registry(monkeypatch):
    """A registry that forgets what a test registers."""
    module = sys.modules["compiled_logprobs.backends"]  # a function of that name stands before it in the package
    monkeypatch.setattr(module, "_targets", dict(module._targets))
    monkeypatch.setattr(module, "_loaded", dict(module._loaded))


@pytest.fixture
def elsewhere(tmp_path, monkeypatch) -> Path:
    """The current folder, which has no profiles yet."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def bundled(tmp_path, monkeypatch) -> Store:
    made = Store(tmp_path / "bundled")
    monkeypatch.setattr(store, "bundled_store", lambda: made)
    return made


# The order of looking


def test_what_is_stored_is_looked_up_in_order(mode, nothing_measures, elsewhere, bundled, monkeypatch):
    mode("tune")
    publish(decided(), bundled)
    assert (serve(), source()) == ("eager", "bundled profiles")
    as_in_a_new_process()
    publish(decided(chosen="compiled"), Store(elsewhere / "profiles"))
    assert (serve(), source()) == ("compiled", "project profiles")
    as_in_a_new_process()
    publish(decided())
    assert (serve(), source()) == ("eager", "user store")
    monkeypatch.setattr(Store, "read", lambda *_: pytest.fail("it looked again"))
    assert (serve(LARGE._replace(rows=1020)), source()) == ("eager", "user store")  # the same bucket


def test_what_this_process_measured_stands_before_what_is_stored(fake, elsewhere):
    fake.answer = lambda problem: decided(problem, chosen="compiled")
    assert (serve(), source()) == ("compiled", "tuned here")
    publish(decided(chosen="eager"))
    decisions.forget(LARGE)
    assert (serve(), source()) == ("compiled", "tuned here") and len(fake.asked) == 1


def test_the_nearest_number_of_rows_serves_where_nothing_may_be_measured(mode, nothing_measures, elsewhere):
    mode("lookup")
    for rows, chosen in ((2048, "eager"), (8192, "compiled"), (2**16, "eager")):
        publish(decided(LARGE._replace(rows=rows), chosen))
    assert [serve(LARGE._replace(rows=rows)) for rows in (1100, 6144, 2**15)] == ["eager", "compiled", "eager"]
    assert source(LARGE._replace(rows=6000)) == "nearest"
    assert serve(LARGE._replace(rows=8192)) == "compiled" and source(LARGE._replace(rows=8192)) == "user store"


def test_other_problems_are_not_near(mode, gate, elsewhere):
    mode("lookup")
    for other in (LARGE._replace(vocab=1032), LARGE._replace(needs_grad=True), LARGE._replace(dtype=torch.float16)):
        publish(decided(other._replace(rows=2048)))
    assert (serve(), source()) == ("cpp", "default rule")


def test_what_could_not_be_stored_can_be_the_nearest_too(mode, nothing_measures, elsewhere):
    mode("lookup")
    decisions.remember_decision(decided(LARGE._replace(rows=2048)))
    assert (serve(), source()) == ("eager", "nearest")


def test_the_default_rule_comes_last(mode, gate, elsewhere):
    mode("lookup")
    assert (serve(), source()) == ("cpp", "default rule")
    gate["cpp"] = serving._Short(False, None)
    assert (serve(LARGE._replace(rows=2048)), source(LARGE._replace(rows=2048))) == (
        "compiled",
        "default rule",
    )


def test_small_problems_are_for_eager_unless_a_profile_decides_them(mode, nothing_measures):
    mode("tune")
    assert (serve(SMALL), source(SMALL)) == ("eager", "small")
    publish(decided(SMALL._replace(rows=bucket(SMALL).rows * 2), chosen="compiled"))
    decisions.forget(SMALL)
    assert (serve(SMALL), source(SMALL)) == ("eager", "small")  # where launches count, another N says little
    publish(decided(bucket(SMALL), chosen="compiled"))
    decisions.forget(SMALL)
    assert (serve(SMALL), source(SMALL)) == ("compiled", "user store")


def test_off_looks_at_nothing_that_is_stored(mode, gate, monkeypatch):
    mode("off")
    publish(decided())
    monkeypatch.setattr(Store, "read", lambda *_: pytest.fail("it looked"))
    assert (serve(), source()) == ("cpp", "default rule")


def test_each_mode_remembers_for_itself(mode, gate, elsewhere):
    mode("off")
    assert serve() == "cpp"
    publish(decided())
    mode("lookup")
    assert serve() == "eager"
    mode("off")
    assert serve() == "cpp"


# Measuring once


def test_a_new_problem_is_measured_once(fake, elsewhere, capsys):
    assert serve(LARGE._replace(rows=1020)) == "eager"
    assert fake.asked == [LARGE._replace(rows=1020)] and source() == "tuned here"
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith("compiled_logprobs: measuring which backend is fastest for 1024 x 1031 float32 on cpu")
    assert "for at most 20 s (COMPILED_LOGPROBS_MODE=lookup prevents it)" in said[0]
    assert said[1:] == ["compiled_logprobs: eager serves it: eager is faster"]
    for rows in (1020, 1024, 1018):
        serve(LARGE._replace(rows=rows))
    as_in_a_new_process()
    assert (serve(), source()) == ("eager", "user store")
    assert len(fake.asked) == 1 and not capsys.readouterr().err


def test_threads_that_come_at_once_measure_once(fake, elsewhere):
    def slowly(problem):
        time.sleep(0.3)  # so that the others come meanwhile
        return decided(problem)

    fake.answer = slowly
    names, start = [], threading.Barrier(8)

    def work():
        start.wait(10)
        names.append(serve())

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert names == ["eager"] * 8 and len(fake.asked) == 1


def test_threads_that_come_at_once_get_right_results(elsewhere):
    """With the real gate, under the default rule."""
    results, start = [], threading.Barrier(6)

    def work():
        start.wait(10)
        results.append(clp.log_probs_from_logits(LOGITS, LABELS))

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert len(results) == 6 and source() == "default rule"
    for out in results:
        torch.testing.assert_close(out.double(), TRUE, atol=1e-5, rtol=0)


def test_no_decision_in_time_is_not_tried_again(fake, gate, elsewhere, capsys):
    def fail(problem):
        raise TuningFailed("the budget ended")

    fake.answer = fail
    assert (serve(), source()) == ("cpp", "default rule")
    assert "not decided: the budget ended. The default rule serves it in this process" in capsys.readouterr().err
    serve()
    assert len(fake.asked) == 1 and not list(user_store().decisions())


@pytest.mark.parametrize("error", [OSError("Resource temporarily unavailable"), RuntimeError("can't start new thread")])
def test_a_machine_that_has_no_room_to_measure_serves_all_the_same(fake, gate, elsewhere, capsys, error):
    def fail(problem):
        raise error

    fake.answer = fail
    assert (serve(), source()) == ("cpp", "default rule")
    assert f"not decided: {error}. The default rule serves it" in capsys.readouterr().err


def test_out_of_memory_and_faults_of_the_device_are_raised_as_they_are(fake, elsewhere):
    def fail(problem):
        raise torch.OutOfMemoryError("no memory")

    fake.answer = fail
    with pytest.raises(torch.OutOfMemoryError):
        serve()


def test_the_budget_of_a_process_is_used_up_in_the_end(fake, gate, elsewhere, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(serving.time, "monotonic", lambda: clock[0])

    def answer(problem):
        clock[0] += 11.0
        return decided(problem)

    fake.answer = answer
    with clp.autotune(budget_s=10):  # 30 s in all
        sources = []
        for number in range(5):
            problem = LARGE._replace(vocab=1031 + number)
            serve(problem)
            sources.append(source(problem))
        assert sources == ["tuned here"] * 3 + ["default rule"] * 2
        assert why_no_tuning(LARGE, CPU, policy()) == "the process has used up its 30 s for measuring"
    with clp.autotune(budget_s=20):
        assert why_no_tuning(LARGE._replace(vocab=2000), CPU, policy()) is None


def test_a_budget_of_0_measures_nothing(fake, gate, elsewhere):
    with clp.autotune(budget_s=0):
        assert serve() == "cpp"
        assert why_no_tuning(LARGE, CPU, policy()) == "the process has used up its 0 s for measuring"
    assert not fake.asked


def test_an_interruption_leaves_nothing_half_done(fake, elsewhere):
    def interrupted(problem):
        raise KeyboardInterrupt

    fake.answer = interrupted
    with pytest.raises(KeyboardInterrupt):
        serve()
    fake.answer = decided
    assert (serve(), source()) == ("eager", "tuned here")


class Closed:
    """A standard error whose reader is gone."""

    def write(self, text):
        raise BrokenPipeError

    flush = write


@pytest.mark.parametrize("stderr", [None, Closed()])
def test_nobody_has_to_hear_of_it(fake, elsewhere, monkeypatch, stderr):
    monkeypatch.setattr(sys, "stderr", stderr)
    assert serve() == "eager" and source() == "tuned here"


def test_another_process_that_measures_is_waited_for_and_its_decision_taken(fake, elsewhere, monkeypatch, tmp_path):
    monkeypatch.setattr(tuner.tempfile, "gettempdir", lambda: str(tmp_path))
    lock = FileLock(tmp_path / "compiled-logprobs-cpu.lock")
    lock.acquire()
    thread = threading.Thread(target=serve)
    thread.start()
    time.sleep(0.2)
    assert thread.is_alive() and not decisions._served
    publish(decided(chosen="compiled"))
    lock.release()
    thread.join(30)
    assert source() == "user store" and not fake.asked


def test_another_process_is_not_waited_for_beyond_the_budget(fake, gate, elsewhere, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(tuner.tempfile, "gettempdir", lambda: str(tmp_path))
    with FileLock(tmp_path / "compiled-logprobs-cpu.lock"), clp.autotune(budget_s=0.2):
        assert (serve(), source()) == ("cpp", "default rule")
    assert "not decided: another process was measuring on this device all the time" in capsys.readouterr().err
    assert not fake.asked


# What no longer holds


def test_a_winner_whose_code_has_changed_is_not_used(mode, gate, elsewhere):
    mode("lookup")
    candidates = all_measured() | {"eager": measured("eager", fingerprint="0" * 16)}
    publish(decided(candidates=candidates))
    assert (serve(), source()) == ("cpp", "default rule")


def test_a_winner_that_cannot_run_here_is_not_used(mode, gate, elsewhere, monkeypatch):
    mode("lookup")
    publish(decided(chosen="compiled"))
    monkeypatch.setattr(Compiled, "why_not", lambda self, problem: "no compiler")
    assert (serve(), source()) == ("cpp", "default rule")


class Doubling(Eager):
    """A backend of somebody else's."""

    name = "doubling"


OTHERS_CHANGED = {
    "backend 'doubling' was registered after this was measured": {},
    "backend 'compiled' has changed since this was measured": {"compiled": measured("compiled", fingerprint="0" * 16)},
    "backend 'compiled' could not run this when it was measured, and can now": {
        "compiled": Candidate("unavailable", "no compiler", get_backend("compiled").fingerprint())
    },
}


@pytest.fixture(params=OTHERS_CHANGED, ids=["new", "changed", "available"])
def stale(request, own_registry, elsewhere) -> str:
    """Why the decision that is stored no longer holds."""
    if "registered" in request.param:
        clp.register_backend("doubling", f"{__name__}:Doubling")
    publish(decided(candidates=all_measured() | OTHERS_CHANGED[request.param]))
    return request.param


def test_another_candidate_that_changed_makes_it_stale_and_it_still_serves(stale, mode, nothing_measures):
    mode("lookup")
    assert (serve(), source()) == ("eager", "user store")
    assert decisions.served(LARGE, policy()).stale == stale
    assert clp.explain(LOGITS, LABELS).stale == stale


def test_where_it_can_what_is_stale_is_measured_again(stale, fake):
    better = "doubling" if "registered" in stale else "compiled"
    fake.answer = lambda problem: decided(
        problem, chosen=better, candidates=all_measured() | {better: measured(better)}
    )
    assert (serve(), source()) == (better, "tuned here") and len(fake.asked) == 1
    as_in_a_new_process()
    assert (serve(), source()) == (better, "user store") and len(fake.asked) == 1


def test_what_is_stale_serves_where_it_could_not_be_measured_again(stale, fake):
    def fail(problem):
        raise TuningFailed("the budget ended")

    fake.answer = fail
    assert (serve(), source()) == ("eager", "user store") and len(fake.asked) == 1


def test_backends_that_the_run_was_not_asked_about_do_not_make_it_stale(own_registry, elsewhere, mode):
    mode("lookup")
    clp.register_backend("doubling", f"{__name__}:Doubling")
    publish(decided(left_out=("doubling",)))
    serve()
    assert decisions.served(LARGE, policy()).stale is None


@pytest.mark.parametrize("target", [Doubling(), "__main__:Doubling"])
def test_a_backend_that_no_worker_can_import_does_not_make_it_stale(own_registry, elsewhere, fake, target, monkeypatch):
    monkeypatch.setattr(sys.modules["__main__"], "Doubling", Doubling, raising=False)
    clp.register_backend("doubling", target)
    get_backend("doubling")
    publish(decided(candidates=all_measured() | {"doubling": Candidate("unavailable", "only this process")}))
    assert (serve(), source()) == ("eager", "user store") and not fake.asked


# Set aside


def test_a_winner_that_failed_is_set_aside_in_every_mode(mode, gate, elsewhere, nothing_measures):
    publish(decided(chosen="compiled"))
    mode("lookup")
    assert serve() == "compiled"
    decisions.set_aside("compiled", LARGE._replace(rows=1020), RuntimeError("it broke"))
    assert (serve(), source()) == ("eager", "set aside")
    for other in ("tune", "off"):
        mode(other)
        assert serve() != "compiled"
    larger = LARGE._replace(rows=2048)
    publish(decided(larger, chosen="compiled"))
    mode("lookup")
    assert serve(larger) == "compiled"
    decisions.forget(LARGE)
    assert (serve(), source()) == ("cpp", "default rule")  # nor does the nearest decision bring it back


def test_a_failed_winner_of_a_profile_serves_on_by_eager_where_a_hit_is_required(mode, elsewhere, monkeypatch):
    mode("lookup")
    publish(decided(chosen="compiled"))

    def broken(self, *_, **__):
        raise RuntimeError("the driver is gone")

    monkeypatch.setattr(Compiled, "forward", broken)
    with clp.autotune(require_hit=True):
        with pytest.warns(RuntimeWarning, match="backend 'compiled' failed on .*the driver is gone"):
            assert_right()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert_right()


# require_hit and row_invariant


@pytest.mark.parametrize("asked", ["tune", "lookup"])
def test_a_required_hit_that_is_none_is_told(asked, mode, elsewhere, nothing_measures):
    mode(asked)
    publish(decided(LARGE._replace(rows=2048)))  # the nearest is no hit
    with clp.autotune(require_hit=True), pytest.raises(clp.ProfileError) as error:
        clp.log_probs_from_logits(LOGITS, LABELS)
    assert str(error.value) == (
        "no profile decides 1024 x 1031 float32 on cpu (not 16-byte aligned), and require_hit=True forbids to measure or "
        "guess. Run `compiled-logprobs profile` or tune(...) for it on this machine, or set require_hit=False.\n"
        "Nearest in the profiles: 2048 x 1031 float32 on cpu (user store): rows is 2048 there, and 1024 here"
    )


def test_what_was_guessed_before_is_no_hit_either(mode, gate, elsewhere):
    mode("lookup")
    assert serve() == "cpp"
    with clp.autotune(require_hit=True), pytest.raises(clp.ProfileError):
        serve()


def test_a_hit_may_be_required_in_a_mode_that_has_none(mode, nothing_measures):
    mode("off")
    publish(decided())
    with clp.autotune(require_hit=True):
        with pytest.raises(
            clp.ProfileError, match="the mode is 'off', in which no profile is looked at.*Set the mode to"
        ):
            serve()
        assert serve(SMALL) == "eager"


@pytest.mark.parametrize("asked", ["tune", "lookup"])
def test_a_required_hit_serves(asked, mode, elsewhere, bundled, nothing_measures):
    mode(asked)
    publish(decided(), bundled)
    with clp.autotune(require_hit=True):
        assert_right()
        assert (serve(), source()) == ("eager", "bundled profiles")
        assert serve(SMALL) == "eager"  # by rule


def test_a_stale_hit_is_a_hit_and_not_measured_again(stale, mode, nothing_measures):
    mode("tune")
    with clp.autotune(require_hit=True):
        assert (serve(), source()) == ("eager", "user store")


def test_only_candidates_with_invariant_rows_are_admitted(mode, elsewhere, nothing_measures):
    mode("tune")
    no = {"row_invariant": False}
    candidates = all_measured() | {name: measured(name, **no) for name in ("cpp", "compiled")}
    publish(decided(chosen="compiled", candidates=candidates))
    publish(decided(LARGE._replace(needs_grad=True), chosen="compiled", candidates=dict(candidates)))
    assert serve() == "compiled"
    with clp.autotune(row_invariant=True):
        assert serve() == "eager" and source() == "user store"
    assert serve() == "compiled"


def test_by_the_default_rule_too(mode, gate, elsewhere):
    mode("off")
    gate["cpp"] = gate["compiled"] = serving._Short(True, False)
    with clp.autotune(row_invariant=True):
        assert (serve(), source()) == ("eager", "default rule")
        gate["cpp"] = gate["compiled"] = gate["eager"] = serving._Short(True, None)
        assert serve(LARGE._replace(rows=2048)) == "eager"  # the first answer stands for all N
        with pytest.raises(clp.BackendUnavailable) as error:
            serve(LARGE._replace(rows=2048, entropy=True))
    assert str(error.value) == (
        "no backend that can run 2048 x 1031 float32 on cpu (gradient, entropy, not 16-byte aligned) has rows whose bits do not "
        "depend on N, which row_invariant=True asks for. Tried: cpp, compiled, flash_attn, eager. "
        "Set row_invariant=False, or keep N the same."
    )
    assert serve() == "cpp"


def test_small_problems_too_though_they_are_never_measured(mode, gate, elsewhere, fake):
    with clp.autotune(row_invariant=True):
        assert serve(SMALL) == "cpp"  # as it is going to serve large ones
        with clp.autotune(require_hit=True):
            assert serve(SMALL._replace(entropy=True)) == "cpp"
    assert not fake.asked


def test_none_that_is_invariant_is_no_reason_to_measure_again(fake, gate, elsewhere):
    no = {"row_invariant": False}
    none = {name: measured(name, **no) for name in ("eager", "cpp", "compiled", "flash_attn")}
    for problem in (LARGE, LARGE._replace(needs_grad=True)):
        publish(decided(problem, candidates=dict(none)))
    gate["eager"] = gate["cpp"] = gate["compiled"] = serving._Short(True, False)
    with clp.autotune(row_invariant=True), pytest.raises(clp.BackendUnavailable):
        serve()
    assert not fake.asked and serve() == "eager"


@pytest.mark.parametrize("order", [(1024, 2048), (2048, 1024)])
def test_with_invariant_rows_one_backend_serves_all_n_with_and_without_gradient(order, nothing_measures, mode):
    # Forward alone and forward with the gradient have winners of their own; the ratio must not see that.
    mode("lookup")
    publish(decided(chosen="eager"))
    publish(decided(LARGE._replace(needs_grad=True), chosen="cpp"))
    logits = torch.randn(2048, 1031)
    labels = torch.randint(1031, (2048,))
    with clp.autotune(row_invariant=True):
        old = [clp.log_probs_from_logits(logits[:n], labels[:n]) for n in order]
        new = [clp.log_probs_from_logits(logits[:n].requires_grad_(), labels[:n]) for n in reversed(order)]
        few = clp.log_probs_from_logits(logits[:3], labels[:3])
    least = min(order)
    for one in (*old, *new):
        assert ((one[:least] - old[0][:least]).exp() == 1.0).all()
    assert torch.equal(few, old[0][:3])
    assert {answer.name for answer in decisions._served.values()} == {"cpp"}


@pytest.mark.parametrize("order", [(64, 1024, 4096), (4096, 1024, 64)])
def test_with_invariant_rows_the_answer_does_not_depend_on_which_n_comes_first(order, mode, gate, elsewhere):
    """On ranks that have the same profiles, and begin with other N."""
    mode("lookup")
    for rows, chosen in ((64, "compiled"), (1024, "cpp"), (2048, "eager")):
        publish(decided(LARGE._replace(rows=rows, needs_grad=True), chosen=chosen))
    with clp.autotune(row_invariant=True):
        assert [serve(LARGE._replace(rows=rows)) for rows in order] == ["eager"] * 3
        assert source() == "user store"


def test_with_invariant_rows_what_is_tuned_later_changes_nothing(mode, gate, elsewhere):
    mode("lookup")
    larger = LARGE._replace(rows=4096, needs_grad=True)
    publish(decided(LARGE._replace(needs_grad=True), chosen="cpp"))
    with clp.autotune(row_invariant=True):
        assert serve() == "cpp"
        decisions.remember_decision(decided(larger, chosen="eager"))
        assert serve() == "cpp" == serve(larger)
        decisions.remember_decision(decided(larger, chosen="eager"), "ranks")  # but what ranks agree upon holds
        assert serve() == "eager" == serve(LARGE._replace(rows=8))


@pytest.mark.parametrize("asked", [LARGE, LOGITS], ids=["a problem", "logits"])
def test_with_invariant_rows_tune_measures_what_serves_then(asked, fake, elsewhere):
    arguments = (asked, LABELS) if asked is LOGITS else (asked,)
    fake.answer = lambda problem: decided(problem, "cpp")
    with clp.autotune(row_invariant=True):
        [decision] = clp.tune(*arguments)
        assert decision.problem == LARGE._replace(needs_grad=True)
        assert (serve(), source()) == ("cpp", "tuned here") and len(fake.asked) == 1


def test_with_invariant_rows_what_the_one_backend_cannot_run_is_told(mode, gate, elsewhere, monkeypatch):
    mode("off")
    with clp.autotune(row_invariant=True):
        assert serve() == "cpp"
        monkeypatch.setattr(serving, "why_not", lambda name, problem: "is tired" if name == "cpp" else None)
        with pytest.raises(clp.BackendUnavailable, match="'cpp', which serves such problems .* is tired"):
            serve(LARGE._replace(rows=4096, layout="other"))


# Why nothing is measured


def test_why_nothing_is_measured(monkeypatch, elsewhere, own_registry):
    under = Policy()
    assert why_no_tuning(LARGE, CPU, under) is None
    assert why_no_tuning(LARGE, CPU, under._replace(mode="lookup")) == "the mode is 'lookup'"
    assert why_no_tuning(LARGE, CPU, under._replace(mode="off")) == "the mode is 'off'"
    assert why_no_tuning(LARGE, CPU, under._replace(require_hit=True)) == "require_hit=True forbids it"
    assert why_no_tuning(SMALL, CPU, under) == "it has fewer than 2^20 logits"
    only_eager = LARGE._replace(dtype=torch.float64)
    assert why_no_tuning(only_eager, CPU, under) == "only eager can run it"
    clp.register_backend("doubling", "no_such_package:Doubling")  # which nobody imports
    assert why_no_tuning(only_eager, CPU, under) is None
    assert why_no_tuning(LARGE._replace(device_type="mps"), torch.device("mps"), under) == "nothing is measured on mps"
    with monkeypatch.context() as context:
        context.setattr(serving, "_forked", True)
        assert why_no_tuning(LARGE, CPU, under) == "this process is a forked child of another"
    publish(decided(candidates=all_measured() | {"doubling": measured("eager")}))
    assert why_no_tuning(LARGE, CPU, under) == "it has been measured already, and what was chosen may not serve now"


RANKS = "this process is one of several ranks; call tune(..., group=...) on all of them"


@pytest.mark.parametrize(("size", "told"), [("2", RANKS), ("64", RANKS), ("1", None), ("", None), ("many", None)])
def test_one_of_several_ranks_measures_nothing(monkeypatch, elsewhere, size, told):
    monkeypatch.setenv("WORLD_SIZE", size)
    assert why_no_tuning(LARGE, CPU, Policy()) == told


def test_nor_does_a_process_that_has_joined_a_group(elsewhere, fake, gate):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        assert why_no_tuning(LARGE, CPU, Policy()) == RANKS
        assert serve() == "cpp" and not fake.asked
    finally:
        dist.destroy_process_group()
    assert why_no_tuning(LARGE, CPU, Policy()) is None


def test_an_accelerator_needs_room_for_it(monkeypatch, elsewhere):
    """As on a GPU: three times the logits and 2 GiB have to be free."""
    cuda = torch.device("cuda")
    problem = LARGE._replace(device_type="cuda", rows=2**20, vocab=1024)  # 4 GiB
    monkeypatch.setattr(serving, "_others_can_run", lambda problem: True)
    monkeypatch.setattr(decisions, "fingerprint_of", lambda device: "0" * 16)
    for free, told in [
        (14 * 1024 * MIB, None),
        (14 * 1024 * MIB - 1, "14.0 GiB of the device's memory are free, and 14.0 GiB are needed"),
        (2 * 1024 * MIB, "2.0 GiB of the device's memory are free, and 14.0 GiB are needed"),
        (None, "0.0 GiB of the device's memory are free, and 14.0 GiB are needed"),
    ]:
        monkeypatch.setattr(serving, "free_memory", lambda device, free=free: free)
        assert why_no_tuning(problem, cuda, Policy()) == told


# Profiles that are broken, foreign or out of reach


def damaged(kind: str, path: Path) -> None:
    content = json.loads(path.read_text())
    if kind == "digest":
        content["record"]["chosen"] = "compiled"
        path.write_text(json.dumps(content))
    elif kind == "problem":
        content["problem"]["vocab"] += 1
        path.write_text(json.dumps(content))
    elif kind == "environment":
        content["environment"] = "0" * 16
        path.write_text(json.dumps(content))
    elif kind == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif kind == "binary":
        path.write_bytes(bytes(range(256)))
    elif kind == "directory":
        path.unlink()
        path.mkdir()
    elif kind == "link to itself":
        path.unlink()
        path.symlink_to(path)


@pytest.mark.parametrize(
    "kind", ["digest", "problem", "environment", "truncated", "binary", "directory", "link to itself"]
)
def test_a_damaged_profile_is_a_miss_with_one_warning(kind, mode, gate, elsewhere):
    mode("lookup")
    publish(decided())
    damaged(kind, user_store().path(fingerprint_of(CPU), LARGE))
    with pytest.warns(RuntimeWarning, match="is passed over") as told:
        assert_right()
    assert passed_over(told) == 1 and source() == "default rule"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decisions.forget(LARGE)
        assert_right()
        clp.explain(LOGITS, LABELS)


def test_a_damaged_profile_is_measured_anew_and_replaced(fake, elsewhere):
    publish(decided())
    damaged("digest", user_store().path(fingerprint_of(CPU), LARGE))
    with pytest.warns(RuntimeWarning, match="the digest is another"):
        assert serve() == "eager"
    as_in_a_new_process()
    assert (serve(), source()) == ("eager", "user store") and len(fake.asked) == 1


def test_a_damaged_profile_does_not_hide_the_one_behind_it(mode, elsewhere, bundled, nothing_measures):
    mode("lookup")
    publish(decided())
    publish(decided(), bundled)
    damaged("truncated", user_store().path(fingerprint_of(CPU), LARGE))
    with pytest.warns(RuntimeWarning, match="is passed over"):
        assert (serve(), source()) == ("eager", "bundled profiles")


@pytest.mark.parametrize(("owner", "name"), FIELDS, ids=lambda part: getattr(part, "__name__", part))
def test_a_field_of_another_type_is_a_miss_with_a_warning(owner, name, mode, gate, elsewhere):
    """Whoever wrote it: the digest is right."""
    mode("lookup")
    for value in wrong_values(owner, name):
        as_in_a_new_process()
        record = plain(decided())
        within(record, owner)[name] = value
        publish_record(LARGE, record)
        with pytest.warns(RuntimeWarning, match=f"its decision has no valid .*{name}") as told:
            assert_right()
        assert passed_over(told) == 1 and source() == "default rule"


@pytest.mark.parametrize("record", [{}, {"chosen": "eager"}, {"\ud800": "\ud800"}, {"record": plain(decided())}])
def test_a_record_of_something_else_is_a_miss_with_a_warning(record, mode, gate, elsewhere):
    mode("lookup")
    publish_record(LARGE, record)
    with pytest.warns(RuntimeWarning, match="is passed over: its decision has no valid"):
        assert_right()


@pytest.mark.parametrize(
    "name", ["other", "os:system", "antigravity", "antigravity:fly", "auto", "", "../eager", "é\n"]
)
def test_a_profile_that_names_an_unknown_backend_imports_nothing(name, mode, gate, elsewhere):
    mode("lookup")
    publish(decided(chosen=name, candidates=all_measured() | {name: measured("eager")}))
    before = set(sys.modules)
    with pytest.warns(
        RuntimeWarning, match="which is not registered here; registered are cpp, compiled.*\\n.*register_backend"
    ) as told:
        assert_right()
    assert passed_over(told) == 1 and source() == "default rule"
    assert "antigravity" not in sys.modules and set(sys.modules) == before


def test_unknown_backends_among_the_others_do_no_harm(mode, elsewhere, nothing_measures):
    mode("lookup")
    publish(decided(candidates=all_measured() | {"antigravity:fly": measured("eager")}))
    assert (serve(), source()) == ("eager", "user store") and "antigravity" not in sys.modules


def test_a_baseline_of_another_place_does_no_harm(mode, elsewhere, nothing_measures):
    mode("lookup")
    publish(decided(baseline="other", candidates=all_measured() | {"other": measured("eager")}))
    assert serve() == "eager"
    assert "the speed of other" in str(clp.explain(LOGITS, LABELS))


def a_file(tmp_path: Path) -> Path:
    (tmp_path / "file").write_text("")
    return tmp_path / "file"


def a_file_system(tmp_path: Path, options: str) -> Path:
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
    if subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("needs the right to mount a file system")
    return place


def a_read_only_file_system(tmp_path: Path) -> Path:
    return a_file_system(tmp_path, "ro")


def a_full_disk(tmp_path: Path) -> Path:
    place = a_file_system(tmp_path, "size=64k")
    with contextlib.suppress(OSError), (place / "all of it").open("wb", buffering=0) as file:
        while True:
            file.write(b"0" * 4096)
    assert shutil.disk_usage(place).free == 0
    return place


@pytest.mark.parametrize("place", [a_file, a_read_only_file_system, a_full_disk])
def test_tune_measures_where_nothing_can_be_stored_and_this_process_uses_it(
    place, fake, elsewhere, tmp_path, monkeypatch
):
    root = place(tmp_path)
    try:
        monkeypatch.setenv(ROOT_VARIABLE, str(root))
        with pytest.warns(
            RuntimeWarning, match="cannot be written.*\\n.*\\nWhat was measured holds in this process only."
        ):
            [decision] = clp.tune(LARGE)
        assert decision.chosen == "eager" and fake.asked == [LARGE]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert_right()
            assert (serve(), source()) == ("eager", "tuned here")
        with pytest.raises(clp.ProfileError, match="cannot be written"):
            list(serving.tune_all([LARGE], CPU))  # as the command line asks, before it measures
        assert fake.asked == [LARGE]
    finally:
        if root.is_dir():
            subprocess.run(["umount", "-l", str(root)], check=True)


@pytest.mark.parametrize("place", [a_file, a_read_only_file_system, a_full_disk])
def test_a_store_that_cannot_be_written_costs_a_warning(place, fake, elsewhere, tmp_path, monkeypatch):
    root = place(tmp_path)
    try:
        monkeypatch.setenv(ROOT_VARIABLE, str(root))
        with pytest.warns(
            RuntimeWarning, match="cannot be written.*\\n.*\\nWhat was measured holds in this process only."
        ):
            assert_right()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert_right()
            assert (serve(), source()) == ("eager", "tuned here")
            decisions.forget(LARGE)  # as another policy finds it
            assert (serve(), source()) == ("eager", "tuned here")
        assert len(fake.asked) == 1
    finally:
        if root.is_dir():
            subprocess.run(["umount", "-l", str(root)], check=True)


def test_a_profile_may_be_one_of_a_newer_release(mode, gate, elsewhere):
    mode("lookup")
    publish(decided())
    path = user_store().path(fingerprint_of(CPU), LARGE)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema": 2}))
    with pytest.warns(RuntimeWarning, match="a newer release wrote it, with schema 2.*\\n.*Upgrade"):
        assert_right()


# On demand


def test_tune_measures_the_call_and_stores_it(fake, elsewhere, mode):
    mode("off")  # on demand is on demand
    [decision] = clp.tune(LOGITS[:1020].requires_grad_(), LABELS[:1020], temperature=0.5, return_entropy=True)
    assert decision.problem == LARGE._replace(needs_grad=True, temperature="number", entropy=True)
    [(_, record)] = user_store().decisions()
    assert record == decision
    mode("lookup")
    assert (serve(decision.problem), source(decision.problem)) == ("eager", "tuned here")
    LOGITS.requires_grad_(False)


def test_tune_measures_each_bucket_once(fake, elsewhere):
    problems = [LARGE._replace(rows=rows) for rows in (1000, 1024, 5000, 800)]
    decisions_ = clp.tune(iter(problems))
    assert [decision.problem.rows for decision in decisions_] == [1024, 6144]
    assert [bucket(problem).rows for problem in fake.asked] == [1024, 6144]
    assert clp.tune(LARGE) == [decisions_[0]] and len(fake.asked) == 2  # known
    assert clp.tune([]) == []


def test_tune_measures_again_what_is_known_if_asked_to_or_if_it_is_stale(fake, elsewhere):
    publish(decided(chosen="compiled"))
    assert [one.chosen for one in clp.tune(LARGE)] == ["compiled"] and not fake.asked
    assert [one.chosen for one in clp.tune(LARGE, again=True)] == ["eager"] and len(fake.asked) == 1
    as_in_a_new_process()
    assert (serve(), source()) == ("eager", "user store")
    publish(decided(candidates=all_measured() | {"eager": measured("eager", fingerprint="0" * 16)}))
    clp.tune(LARGE)
    assert len(fake.asked) == 2


def test_after_tune_this_process_takes_what_it_returned(fake, gate, elsewhere, mode):
    mode("lookup")
    assert serve() == "cpp" and source() == "default rule"
    publish(decided())  # by another process, in the meantime
    clp.tune(LARGE)
    assert (serve(), source()) == ("eager", "user store") and not fake.asked


def test_tune_takes_a_device_and_a_budget(fake, elsewhere, monkeypatch):
    seen = []
    monkeypatch.setattr(
        fake, "decide", lambda problem, seconds, names, **_: seen.append(seconds) or (decided(problem), Evidence())
    )
    clp.tune(LARGE, device="cpu", budget_s=3)
    clp.tune(LARGE, again=True)
    with clp.autotune(budget_s=7):
        clp.tune(LARGE, again=True)
    assert seen == [3.0, 20.0, 7.0]


def test_on_demand_a_short_check_is_not_enough(fake, elsewhere):
    publish(decided(short_check=True))
    clp.tune(LARGE)
    assert fake.asked == [LARGE]
    clp.tune(LARGE)
    assert fake.asked == [LARGE]  # what it found is in full


def test_a_decision_that_had_a_failure_is_measured_anew_after_a_day(mode, fake, elsewhere):
    mode("tune")
    failed = all_measured() | {
        "compiled": Candidate("failed", "no space left on device", measured("compiled").fingerprint)
    }
    publish(decided(candidates=dict(failed)))
    assert serve() == "eager" and not fake.asked
    decisions.forget(LARGE)
    publish(decided(candidates=dict(failed), measured_at="2026-01-01T00:00:00Z"))
    assert serve() == "eager" and fake.asked == [LARGE]


def test_what_another_process_has_registered_is_not_lost(mode, fake, elsewhere):
    mode("tune")
    others = all_measured() | {"mine": measured("eager")}
    publish(decided(chosen="mine", candidates=others))
    with pytest.warns(RuntimeWarning, match="it chose the backend 'mine', which is not registered here"):
        assert serve() == "eager" and fake.asked == [LARGE]
    ((_, record),) = user_store().decisions()
    assert record["chosen"] == "mine"
    with pytest.raises(
        clp.LogProbsError, match="stored chose backend 'mine', which is not registered here, and would be lost"
    ):
        clp.tune(LARGE)
    clp.tune(LARGE, again=True)
    ((_, record),) = user_store().decisions()
    assert record["chosen"] == "eager"


def test_a_backend_that_cannot_say_what_it_is_is_not_used(mode, gate, elsewhere, monkeypatch):
    mode("lookup")
    publish(decided(chosen="compiled"))

    def broken(self, *_):
        raise FileNotFoundError("<stdin>")

    monkeypatch.setattr(Compiled, "fingerprint", broken)
    assert (serve(), source()) == ("cpp", "default rule")


def test_tune_tells_what_could_not_be_decided_and_keeps_the_rest(fake, elsewhere):
    def answer(problem):
        if problem.vocab == 1031:
            raise TuningFailed("no backend could be measured")
        return decided(problem)

    fake.answer = answer
    with pytest.raises(clp.LogProbsError, match="no backend could be measured"):
        clp.tune([LARGE._replace(vocab=1032), LARGE, LARGE._replace(vocab=1033)])
    assert [decision.problem.vocab for _, decision in user_store().decisions()] == [1032]


@pytest.mark.parametrize("again", [False, True])
def test_tune_takes_what_another_process_has_decided_while_it_waited(fake, elsewhere, monkeypatch, tmp_path, again):
    monkeypatch.setattr(tuner.tempfile, "gettempdir", lambda: str(tmp_path))
    found = []
    thread = threading.Thread(target=lambda: found.extend(clp.tune(LARGE, again=again)))
    with FileLock(tmp_path / "compiled-logprobs-cpu.lock"):
        thread.start()
        time.sleep(0.2)
        assert thread.is_alive()
        publish(decided(chosen="compiled"))
    thread.join(30)
    assert [one.chosen for one in found] == (["eager"] if again else ["compiled"])
    assert len(fake.asked) == again


def test_whoever_measures_stores_it_before_the_next_one_looks(fake, elsewhere, monkeypatch, tmp_path):
    """Of two that come at once, the second takes what the first has found."""
    monkeypatch.setattr(tuner.tempfile, "gettempdir", lambda: str(tmp_path))
    lock, held = FileLock(tmp_path / "compiled-logprobs-cpu.lock"), []
    real = Store.publish

    def watched(self, *arguments):
        try:
            with lock.acquire(timeout=0):
                held.append(False)
        except Timeout:
            held.append(True)
        return real(self, *arguments)

    monkeypatch.setattr(Store, "publish", watched)
    serve()
    clp.tune(LARGE, again=True)
    assert held == [True, True]


def test_a_failure_that_is_told_does_not_hold_the_device(fake, elsewhere, monkeypatch, tmp_path):
    monkeypatch.setattr(tuner.tempfile, "gettempdir", lambda: str(tmp_path))

    def fail(problem):
        raise TuningFailed("no backend could be measured")

    fake.answer = fail
    with pytest.raises(clp.LogProbsError) as error:
        clp.tune(LARGE)
    with FileLock(tmp_path / "compiled-logprobs-cpu.lock", timeout=0):  # though the traceback lives on
        assert error.value


def test_tune_waits_for_another_process_only_so_long(fake, elsewhere, monkeypatch, tmp_path):
    monkeypatch.setattr(tuner.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(serving, "WAIT_S", 0.1)
    told = "another process has been measuring on cpu for 0.1 s; wait for its end"
    with FileLock(tmp_path / "compiled-logprobs-cpu.lock"), pytest.raises(clp.LogProbsError, match=told):
        clp.tune(LARGE)
    assert not fake.asked


GPU = LARGE._replace(device_type="cuda")


@pytest.mark.parametrize(
    ("arguments", "options", "told"),
    [
        (
            (LOGITS,),
            {},
            "got logits without labels; logits and labels on the device to measure, or problems, are valid",
        ),
        ((LOGITS, LABELS), {"device": "cpu"}, "got logits and device='cpu'"),
        ((LOGITS, LABELS[:3]), {}, "labels"),
        ((LARGE, LABELS), {}, "got labels beside problems; problems, or logits and labels, are valid"),
        (([LARGE, "1024 x 1031"],), {}, "got a str among the problems"),
        ((5,), {}, "got a int among the problems"),
        ((LARGE,), {"device": "nonsense"}, "got device='nonsense'; e.g. 'cpu' or 'cuda:0' is valid"),
        (([LARGE, GPU],), {}, "got problems and devices of types cpu, cuda; one is valid. Tune them apart."),
        ((LARGE,), {"device": "cuda"}, "got problems and devices of types cpu, cuda; one is valid"),
        ((LARGE,), {"budget_s": -1}, "got budget_s=-1; a number of seconds, 0 or more, is valid"),
        ((LARGE,), {"budget_s": "long"}, "got budget_s='long'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_arguments_of_tune_are_told(arguments, options, told, nothing_measures):
    with pytest.raises(clp.InputError) as error:
        clp.tune(*arguments, **options)
    assert told in str(error.value)


def test_all_fields_of_a_record_are_tried_here():
    """What the tests above go through is what a record has."""
    assert {name for owner, name in FIELDS if owner is Record} == {field.name for field in dataclasses.fields(Record)}
