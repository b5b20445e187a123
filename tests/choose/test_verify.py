"""`verify`: winners that became wrong, slow, or crash are found; what is within noise, or cannot be known, is no failure."""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from compiled_logprobs.choose import rule as decisions
from compiled_logprobs.choose.serving import tune_all
from compiled_logprobs.choose.verify import Stored, _how_it_regressed, stored_decisions, verify, why_unverifiable
from compiled_logprobs.cli.main import app
from compiled_logprobs.decision import Candidate, Decision, Evidence, Speedup
from compiled_logprobs.machine.environment import environment_at
from compiled_logprobs.problem import Problem
from compiled_logprobs.store import user_store
from compiled_logprobs.store.files import Store
from compiled_logprobs.tuning import tuner
from tests.helpers.backends_for_tuning import registered
from tests.helpers.backends_that_change import VARIABLE
from tests.helpers.stored_decisions import CPU, all_measured, decided, measured, publish

PROBLEM = Problem("cpu", rows=256, vocab=4096, dtype=torch.float32, needs_grad=True)
NAMES = {"stays": "Changes", "wrong": "BecomesWrong", "slow": "BecomesSlow", "crashes": "Crashes"}
TARGETS = {name: f"backends_that_change:{target}" for name, target in NAMES.items()}
QUIET = ("--progress", "none", "--budget", "10")


def run(*arguments):
    return CliRunner().invoke(app, ("verify", "--device", "cpu", *arguments))


def files(store: Store) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in store.root.rglob("*") if path.is_file()}


def has_changed(name: str, fingerprint: str = "0" * 16) -> dict:
    candidates = all_measured()
    candidates[name] = dataclasses.replace(candidates[name], fingerprint=fingerprint)
    return candidates


@pytest.fixture(scope="module", autouse=True)
def alone(tmp_path_factory):
    """No real measurement is waited for, and no two threads for each other, which on a busy machine would be the noise."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        folder = str(tmp_path_factory.mktemp("locks"))
        patch.setattr(tempfile, "tempdir", folder)
        patch.setenv("TMPDIR", folder)
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory) -> Store:
    """A decision that was really measured for each of the backends, in which it is the winner."""
    store = Store(tmp_path_factory.mktemp("tuned"))
    with registered(**TARGETS):
        for rows, name in zip((96, 128, 192, 256), NAMES, strict=True):
            problem = PROBLEM._replace(rows=rows)
            (found,) = tune_all([problem], CPU, store=store, names=[name], budget_s=10.0)
            assert isinstance(found, Decision) and found.chosen == name, found
    return store


def verified(store: Store, *arguments) -> tuple[int, dict[str, dict]]:
    """Exit code, and what became of each winner, by the command line."""
    with registered(**TARGETS):
        result = run("--store", str(store.root), "--json", *QUIET, *arguments)
    assert "Traceback" not in result.stderr, result.stderr
    found = json.loads(result.stdout, parse_constant=pytest.fail)
    return result.exit_code, {one["chosen"]: one for one in found["decisions"]}


# Real faults


def test_winners_that_stayed_as_they_were_hold(tuned):
    """As people see it."""
    before = files(tuned)
    with registered(**TARGETS):
        result = run("--store", str(tuned.root), "--rows", "90,192", "--budget", "10")
    assert result.exit_code == 0, result.output
    for row, rows, name in zip(
        (line for line in result.stdout.splitlines() if " 4096 " in line), ("96", "192"), ("stays", "slow"), strict=True
    ):
        assert row.split()[:5] == [rows, "4096", "float32", "backward", name] and " holds " in row
        assert f"holds: {rows} x 4096 float32 on cpu, backward: {name}: " in result.stderr
    assert result.stdout.endswith("2 of 2 decisions verified, 2 of them hold\n")
    assert files(tuned) == before


def test_winners_that_became_wrong_or_slow_or_crash_are_found(tuned, monkeypatch):
    monkeypatch.setenv(VARIABLE, "1")
    before = files(tuned)
    code, found = verified(tuned)
    assert code == 1
    assert {name: one["outcome"] for name, one in found.items()} == {
        "stays": "holds",
        "wrong": "wrong",
        "slow": "regressed",
        "crashes": "failed",
    }
    assert found["wrong"]["why"].startswith("log_prob_error, ")
    assert found["slow"]["why"].startswith("no longer faster than eager by 3%: 0.")
    assert found["slow"]["speedup_now"]["high"] < 1.0 < found["slow"]["speedup_then"]["low"]
    assert found["crashes"]["why"] == "crashed: compile: killed by SIGSEGV"
    assert files(tuned) == before


@pytest.fixture(scope="module")
def by_hand():
    """What became of decisions that say what is not so, or no longer: one worker program for all."""
    fast, then = Speedup(90.0, 100.0, 110.0), dict(all_measured())
    stays = measured_as("stays")
    less = {**then, "stays": dataclasses.replace(stays, speedup=fast)}
    fewer = {**then, "stays": dataclasses.replace(stays, speedup=Speedup(1.05, 1.2, 1.4))}
    asked = [
        decided(PROBLEM, "stays", candidates=less),
        decided(PROBLEM._replace(rows=256), "stays", candidates=fewer, measured_rows=128),
        decided(PROBLEM, "eager"),
    ]
    events = []
    with registered(**TARGETS):
        found = list(verify([Stored(one, "here") for one in asked], CPU, budget_s=10.0, on_event=events.append))
    return found, events


def measured_as(name: str):
    with registered(**TARGETS):
        return measured(name)


def test_a_winner_that_is_faster_by_less_than_it_was_has_regressed(by_hand):
    found = by_hand[0][0]
    assert found.outcome == "regressed" and found.is_failure
    assert found.speedup.low > 1.0
    assert found.why.endswith("100.00x (90.00 to 110.00) then: less by more than the noise and 3%")


def test_as_many_rows_are_timed_as_then(by_hand):
    found, events = by_hand
    assert found[1].outcome == "holds" and found[1].rows == 128
    sizes = [event["rows"] for event in events if event["event"] == "measuring"]
    assert sizes[-3:-1] == [256, 128]


def test_a_baseline_that_was_chosen_is_checked_only(by_hand):
    found = by_hand[0][2]
    assert found.outcome == "holds" and found.speedup is None and found.why.startswith("passed ")


# What is beyond noise


@pytest.mark.parametrize(
    ("then", "now", "rows", "regressed"),
    [
        ((1.50, 1.60, 1.70), (1.46, 1.48, 1.50), 256, False),  # they touch
        ((1.50, 1.60, 1.70), (1.40, 1.43, 1.456), 256, True),  # 1.50 / 1.03 = 1.4563
        ((1.50, 1.60, 1.70), (1.40, 1.43, 1.457), 256, False),
        ((1.50, 1.60, 1.70), (1.40, 1.43, 1.456), 128, False),  # of another number of rows
        ((1.50, 1.60, 1.70), (1.80, 1.90, 2.00), 256, False),
        ((1.04, 1.05, 1.06), (1.00, 1.01, 1.029), 256, True),  # the baseline would serve now
        ((1.04, 1.05, 1.06), (1.00, 1.01, 1.031), 256, False),
        ((1.50, 1.60, 1.70), (0.90, 0.95, 1.02), 128, True),
        ((None, 9.00, None), (1.40, 1.43, 1.456), 256, False),
    ],
)
def test_what_counts_as_a_regression(then, now, rows, regressed):
    candidates = {**all_measured(), "compiled": measured("compiled", speedup=Speedup(*then))}
    decision = decided(PROBLEM, "compiled", candidates=candidates)
    why = _how_it_regressed(decision, Speedup(*now), now[2], rows)
    assert (why is not None) == regressed, why


def test_a_speed_up_over_other_code_is_not_compared():
    candidates = {**has_changed("eager"), "compiled": measured("compiled", speedup=Speedup(1.5, 1.6, 1.7))}
    decision = decided(PROBLEM, "compiled", candidates=candidates)
    assert _how_it_regressed(decision, Speedup(1.1, 1.2, 1.3), 1.3, 256) is None


@pytest.mark.parametrize(
    ("outcome", "becomes"),
    [
        ("wrong", "wrong"),
        *((outcome, "failed") for outcome in ("failed", "timeout", "crashed")),
        *((outcome, "unverifiable") for outcome in ("oom", "unavailable", "unsupported")),
    ],
)
def test_what_each_outcome_says_of_the_winner(monkeypatch, outcome, becomes):
    now = decided(PROBLEM, candidates={**all_measured(), "compiled": Candidate(outcome, "so it is")})
    monkeypatch.setattr(tuner.Tuner, "decide", lambda *_, **__: (now, Evidence({"eager": [1.0] * 20})))
    monkeypatch.setattr("compiled_logprobs.choose.verify.why_unverifiable", lambda *_: None)
    (found,) = verify([Stored(decided(PROBLEM, "compiled"), "here")], CPU, budget_s=1.0)
    assert found.outcome == becomes and "so it is" in found.why


def test_a_regression_is_measured_twice(monkeypatch):
    """The first measurement finds the machine busy, the second does not."""
    candidates = {**all_measured(), "compiled": measured("compiled", speedup=Speedup(1.5, 1.6, 1.7))}
    decision = decided(PROBLEM, "compiled", candidates=candidates)
    times = [{"eager": [1.0] * 20, "compiled": [slow] * 20} for slow in (1.1, 0.625)]
    told = [times[0], times[1]]

    def decide(self, problem, seconds, names):
        return decided(PROBLEM, "compiled"), Evidence(told.pop(0))

    monkeypatch.setattr(tuner.Tuner, "decide", decide)
    monkeypatch.setattr(decisions, "holds", lambda *_: True)
    monkeypatch.setattr("compiled_logprobs.choose.verify.why_unverifiable", lambda *_: None)
    (found,) = verify([Stored(decision, "here")], CPU, budget_s=1.0)
    assert found.outcome == "holds" and "a first measurement, which this did not confirm: no longer faster" in found.why
    told += [times[0], times[0]]
    (found,) = verify([Stored(decision, "here")], CPU, budget_s=1.0)
    assert found.outcome == "regressed" and told == []


# What cannot be verified


@pytest.fixture
def nothing_starts(monkeypatch):
    monkeypatch.setattr(tuner, "Worker", lambda: pytest.fail("a worker is started"))


def test_what_is_not_what_was_measured_is_unverifiable_and_no_failure(nothing_starts):
    problems = [PROBLEM._replace(rows=rows) for rows in (1, 2, 4)]
    foreign = all_measured()
    foreign["theirs"] = foreign.pop("compiled")
    away = {**all_measured(), "flash_attn": dataclasses.replace(measured("eager"), fingerprint="0" * 16)}
    publish(decided(problems[0], "theirs", candidates=foreign))
    publish(decided(problems[1], "eager", candidates=has_changed("eager")))
    publish(decided(problems[2], "flash_attn", candidates=away))
    before = files(user_store())
    result = run("--json", *QUIET, "--store", str(user_store().root))
    assert result.exit_code == 2
    found = {one["chosen"]: one for one in json.loads(result.stdout)["decisions"]}
    assert {one["outcome"] for one in found.values()} == {"unverifiable"}
    assert found["theirs"]["why"].startswith("backend 'theirs' is not registered here; name it with --backend")
    assert found["eager"]["why"].startswith("the code of backend 'eager' has changed since it was measured")
    assert found["flash_attn"]["why"] == "backend 'flash_attn' cannot run here: needs a CUDA or ROCm device"
    shown = run(*QUIET, "--store", str(user_store().root))
    assert shown.exit_code == 2 and shown.stdout.endswith("0 of 3 decisions verified, 0 of them hold\n")
    assert shown.stdout.count("\nunverifiable: ") == 3
    assert files(user_store()) == before


def test_a_device_that_others_measure_on_is_no_failure(nothing_starts, monkeypatch):
    monkeypatch.setattr("compiled_logprobs.choose.verify.alone_on", lambda *_: contextlib.nullcontext(False))
    (found,) = verify([Stored(decided(PROBLEM), "here")], CPU, budget_s=1.0)
    assert found.outcome == "unverifiable" and "another process has been measuring on cpu" in found.why


def test_a_tuning_that_fails_is_no_failure_of_the_winner(monkeypatch):
    def fail(*_, **__):
        raise tuner.TuningFailed("the worker program was lost")

    monkeypatch.setattr(tuner.Tuner, "decide", fail)
    (found,) = verify([Stored(decided(PROBLEM), "here")], CPU, budget_s=1.0)
    assert found.outcome == "unverifiable" and found.why == "it could not be measured: the worker program was lost"


def test_a_backend_of_ones_own_is_named(monkeypatch):
    theirs = all_measured()
    theirs["right"] = theirs.pop("compiled")
    publish(decided(PROBLEM, "right", candidates=theirs))
    with registered():
        result = run(*QUIET, "--backend", "backends_for_tuning:Right", "--store", str(user_store().root), "--json")
        (found,) = json.loads(result.stdout)["decisions"]
        assert found["why"].startswith("the code of backend 'right' has changed")


# Which decisions


def test_each_problem_is_verified_once_as_it_would_serve(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    publish(decided(PROBLEM, seed=1))
    publish(decided(PROBLEM, seed=2), Store(tmp_path / "profiles"))
    publish(decided(PROBLEM._replace(rows=512), seed=3), Store(tmp_path / "profiles"))
    both = {"user store": user_store(), "project profiles": Store(tmp_path / "profiles")}
    found = stored_decisions(both, CPU)
    assert [(one.source, one.decision.seed) for one in found] == [("user store", 1), ("project profiles", 3)]


@pytest.mark.parametrize(
    ("asked", "count"),
    [
        ({}, 4),
        ({"rows": [200]}, 3),  # the bucket of 256
        ({"rows": [257, 500]}, 0),
        ({"vocabs": [4096]}, 3),
        ({"dtypes": [torch.bfloat16]}, 1),
        ({"modes": ["forward"]}, 1),
        ({"modes": ["backward", "forward"], "vocabs": [4096]}, 3),
    ],
    ids=str,
)
def test_only_what_is_asked_for(asked, count):
    for problem in (
        PROBLEM,
        PROBLEM._replace(needs_grad=False),
        PROBLEM._replace(dtype=torch.bfloat16),
        PROBLEM._replace(rows=1024, vocab=8192),
    ):
        publish(decided(problem))
    assert len(stored_decisions({"user store": user_store()}, CPU, **asked)) == count


def test_what_is_no_decision_is_passed_over():
    user_store().publish(environment_at(CPU), PROBLEM, {"chosen": "eager"})
    with pytest.warns(RuntimeWarning, match="is passed over"):
        assert stored_decisions({"user store": user_store()}, CPU) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "ProfileError: no decision is stored for cpu in environment "),
        (("--vocab", "qwen9"), "got vocabulary 'qwen9'"),
        (("--device", "tpu"), "got --device tpu"),
        (("--progress", "jsonl", "--json"), "which both write to standard output"),
        (("--backend", "functions_to_check:right"), "which is a function; a Backend is valid"),
    ],
)
def test_what_cannot_be_verified_is_said(nothing_starts, arguments, said):
    result = run("--store", str(user_store().root), *arguments)
    assert result.exit_code == 2 and result.stdout == ""
    assert said in result.stderr and "Traceback" not in result.stderr


# The command line


def program(store: Store, *arguments) -> subprocess.Popen:
    command = [sys.executable, "-m", "compiled_logprobs", "verify", "--device", "cpu", "--store", str(store.root)]
    return subprocess.Popen(
        [*command, "--budget", "10", "--progress", "jsonl", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def test_an_interruption_tells_what_is_finished(tmp_path):
    """A real SIGINT, after the first of several decisions."""
    store = Store(tmp_path / "store")
    for rows in (4, 8, 16, 32):
        publish(decided(Problem("cpu", rows, 512, torch.float32)), store)
    before = files(store)
    process = program(store)
    lines = []
    for line in process.stdout:
        lines.append(json.loads(line, parse_constant=pytest.fail))
        if lines[-1]["event"] == "verified":
            process.send_signal(signal.SIGINT)
            break
    rest, errors = process.communicate(timeout=60)
    lines += [json.loads(line) for line in rest.splitlines()]
    assert process.returncode == 130, errors
    assert lines[0]["event"] == "start" and len(lines[0]["problems"]) == 4
    assert lines[-1]["event"] == "end" and lines[-1]["interrupted"] and 1 <= lines[-1]["done"] < 4
    (first,) = (line["verification"] for line in lines if line["event"] == "verified")
    assert first["chosen"] == "eager" and first["outcome"] == "holds"
    assert files(store) == before


def test_why_unverifiable_has_no_path(monkeypatch):
    monkeypatch.setattr("compiled_logprobs.choose.verify.why_not", lambda *_: f"no {Path.home()}/secret/kernel.so")
    assert "secret" not in why_unverifiable(decided(PROBLEM))
