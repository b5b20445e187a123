"""`verify`: winners that became wrong, slow, or crash are found; what is within noise, or cannot be known, is no
failure."""

import contextlib
import dataclasses
import json
import tempfile
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from compiled_logprobs.choose import verify as module
from compiled_logprobs.choose.verify import Verification, how_it_regressed, stored_decisions, verify
from compiled_logprobs.cli.main import app
from compiled_logprobs.decision import Candidate, Decision, Speedup
from compiled_logprobs.problem import Problem
from compiled_logprobs.store import user_store
from compiled_logprobs.store.files import Store
from compiled_logprobs.tuning.tuner import TuningFailed
from tests.helpers.backends_for_tuning import registered
from tests.helpers.stored_decisions import (
    CPU,
    NEW,
    FakeTuner,
    all_measured,
    decided,
    measured,
    publish,
    raising,
    undecided,
)

PROBLEM = Problem("cpu", rows=256, vocab=4096, dtype=torch.float32, needs_grad=True)
QUIET = ("--progress", "none", "--budget", "10")


def run(*arguments):
    return CliRunner().invoke(app, ("verify", "--device", "cpu", *arguments))


def files(store: Store) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in store.root.rglob("*") if path.is_file()}


def won_by(name: str = "compiled", speedup: Speedup | None = None, **changes) -> Decision:
    candidates = {**all_measured(), name: measured("compiled", speedup=speedup or Speedup(1.5, 1.6, 1.7)), **changes}
    return decided(PROBLEM, name, candidates=candidates)


CHANGED = {"eager": measured("eager", fingerprint=NEW)}


# Real faults


@pytest.mark.slow
def test_winners_that_became_wrong_or_crash_are_found(tmp_path, monkeypatch):
    """By the worker program, with the code that was measured: what it calls has changed."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # with a lock of its own
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    store = Store(tmp_path / "store")
    with registered(wrong="WrongSign", crashes="Exits"):
        for rows, name in ((4, "wrong"), (8, "crashes")):
            candidates = {**all_measured(), name: measured(name)}
            publish(decided(PROBLEM._replace(rows=rows), name, candidates=candidates), store)
        before = files(store)
        result = run("--store", str(store.root), "--json", "--progress", "none", "--budget", "1")
    assert result.exit_code == 1 and "Traceback" not in result.stderr, result.output
    wrong, crashes = json.loads(result.stdout, parse_constant=pytest.fail)["decisions"]
    assert wrong["outcome"] == "wrong" and wrong["why"].startswith("returns the loss: ")
    assert crashes["outcome"] == "failed" and crashes["why"].startswith("crashed: compile: ")
    assert files(store) == before


# What is beyond noise


@pytest.mark.parametrize(
    ("then", "now", "rows", "regressed"),
    [
        ((1.50, 1.60, 1.70), (1.46, 1.48, 1.50), 256, False),  # they touch
        ((1.50, 1.60, 1.70), (1.40, 1.43, 1.456), 256, True),  # 1.50 / 1.03 = 1.4563
        ((1.50, 1.60, 1.70), (1.40, 1.43, 1.457), 256, False),
        ((1.50, 1.60, 1.70), (1.40, 1.43, 1.456), 128, False),  # of another number of rows
        ((1.04, 1.05, 1.06), (1.00, 1.01, 1.029), 256, True),  # the baseline would serve now
        ((1.04, 1.05, 1.06), (1.00, 1.01, 1.031), 256, False),
        ((1.50, 1.60, 1.70), (0.90, 0.95, 1.02), 128, True),
        ((None, 9.00, None), (1.40, 1.43, 1.456), 256, False),
    ],
)
def test_what_counts_as_a_regression(then, now, rows, regressed):
    reason = how_it_regressed(won_by(speedup=Speedup(*then)), Speedup(*now), PROBLEM._replace(rows=rows))
    assert (reason is not None) == regressed, reason


@pytest.fixture
def again(monkeypatch):
    """`again(decision, candidate...)`: what becomes of it, given the winner as each measurement finds it."""

    def verified(decision: Decision, *winners: Candidate, baseline: str = "eager") -> Verification:
        answers = [
            decided(PROBLEM, candidates=all_measured() | {"compiled": winner}, baseline=baseline) for winner in winners
        ]
        monkeypatch.setattr(module, "Tuner", FakeTuner(lambda problem: answers.pop(0)))
        monkeypatch.setattr(module, "alone_on", lambda *_: contextlib.nullcontext(True))
        (result,) = verify([(decision, "here")], CPU, budget_s=1.0)
        assert not answers
        return result

    return verified


@pytest.mark.parametrize(
    ("outcome", "becomes"),
    [
        ("wrong", "wrong"),
        *((outcome, "failed") for outcome in ("failed", "timeout", "crashed")),
        *((outcome, "unverifiable") for outcome in ("oom", "unavailable", "unsupported")),
    ],
)
def test_what_each_outcome_says_of_the_winner(again, outcome, becomes):
    result = again(won_by(), Candidate(outcome, "so it is"))
    assert result.outcome == becomes and "so it is" in result.why


def test_an_undecided_one_is_passed_over(again):
    result = again(undecided(PROBLEM))
    assert (result.outcome, result.is_failure) == ("unverifiable", False)
    assert result.why.startswith("undecided: 12 rounds do not tell whether cpp (4.83x, 0.24 to 31.85) is faster than ")


SLOW, FAST = (measured("compiled", speedup=Speedup(low, low + 0.01, low + 0.02)) for low in (0.9, 2.0))


@pytest.mark.parametrize(
    ("winners", "baseline", "outcome", "why"),
    [
        ([FAST], "eager", "holds", "2.01x (2.00 to 2.02) the speed of eager, passed 1 of 1 checks"),
        ([SLOW, FAST], "eager", "holds", "2.01x"),  # the first found the machine busy
        ([SLOW, SLOW], "eager", "regressed", "no longer faster than eager by 3%: 0.91x"),
        ([FAST], "cpp", "unverifiable", "the baseline 'eager' could not be timed beside it"),
        ([measured("compiled", speedup=Speedup(None, 2.0, None))], "eager", "unverifiable", "10 rounds are too few"),
    ],
    ids=["fast", "confirmed not", "confirmed", "no baseline", "few rounds"],
)
def test_what_the_times_say(again, winners, baseline, outcome, why):
    result = again(won_by(), *winners, baseline=baseline)
    assert result.outcome == outcome and why in result.why
    assert result.is_failure == (outcome == "regressed") and result.to_dict()["speedup_then"]["median"] == 1.6


def test_a_baseline_that_was_chosen_is_checked_only(again):
    result = again(decided(PROBLEM), measured("compiled"))
    assert result.outcome == "holds" and result.speedup is None and result.why == "passed 1 of 1 checks"


# What cannot be verified


@pytest.fixture
def nothing_starts(monkeypatch):
    monkeypatch.setattr("compiled_logprobs.tuning.tuner.Worker", lambda *_: pytest.fail("a worker is started"))


def test_what_is_not_what_was_measured_is_unverifiable_and_no_failure(nothing_starts):
    problems = [PROBLEM._replace(rows=rows) for rows in (1, 2, 4)]
    publish(dataclasses.replace(won_by("theirs"), problem=problems[0]))
    publish(decided(problems[1], candidates=all_measured() | CHANGED))
    publish(decided(problems[2]._replace(dtype=torch.float64), "cpp"))
    before = files(user_store())
    result = run("--json", *QUIET, "--store", str(user_store().root))
    assert result.exit_code == 2
    became = {each["chosen"]: each for each in json.loads(result.stdout)["decisions"]}
    assert {each["outcome"] for each in became.values()} == {"unverifiable"}
    assert became["theirs"]["why"] == "it chose backend 'theirs', which is not registered here"
    assert became["eager"]["why"] == "backend 'eager' has changed since it was measured"
    assert became["cpp"]["why"].startswith("backend 'cpp' cannot run here: ")
    shown = run(*QUIET, "--store", str(user_store().root))
    assert shown.exit_code == 2 and shown.stdout.endswith("0 of 3 decisions verified, 0 of them hold\n")
    assert shown.stdout.count("\nunverifiable: ") == 3
    assert files(user_store()) == before


def test_a_device_that_others_measure_on_and_a_tuner_that_fails_are_no_failures(monkeypatch):
    monkeypatch.setattr(module, "Tuner", FakeTuner(raising(TuningFailed("the worker program was lost"))))
    for is_alone, why in (
        (False, "another process has been measuring on cpu for 600 s"),
        (True, "it could not be measured: the worker program was lost"),
    ):
        monkeypatch.setattr(module, "alone_on", lambda *_, is_alone=is_alone: contextlib.nullcontext(is_alone))
        (result,) = verify([(decided(PROBLEM), "here")], CPU, budget_s=1.0)
        assert (result.outcome, result.why) == ("unverifiable", why)


def test_why_it_is_unverifiable_has_no_path(monkeypatch):
    monkeypatch.setattr(module, "why_not_holds", lambda *_: f"no {Path.home()}/secret/kernel.so")
    (result,) = verify([(decided(PROBLEM), "here")], CPU, budget_s=1.0)
    assert result.why.startswith("no ") and "secret" not in result.why


# Which decisions


def test_each_problem_is_verified_once_as_it_would_serve(tmp_path):
    publish(decided(PROBLEM, seed=1))
    publish(decided(PROBLEM, seed=2), Store(tmp_path / "profiles"))
    publish(decided(PROBLEM._replace(rows=512), seed=3), Store(tmp_path / "profiles"))
    both = {"user store": user_store(), "project profiles": Store(tmp_path / "profiles")}
    chosen = stored_decisions(both, CPU)
    assert [(source, decision.seed) for decision, source in chosen] == [("user store", 1), ("project profiles", 3)]


@pytest.mark.parametrize(
    ("asked", "count"),
    [
        ({}, 4),
        ({"rows": [200]}, 3),  # the bucket of 256
        ({"rows": [257]}, 0),
        ({"dtypes": [torch.bfloat16]}, 1),
        ({"modes": ["backward", "forward"], "vocabs": [4096]}, 3),
    ],
    ids=str,
)
def test_only_what_is_asked_for(asked, count):
    others = {"needs_grad": False}, {"dtype": torch.bfloat16}, {"rows": 1024, "vocab": 8192}
    for other in ({}, *others):
        publish(decided(PROBLEM._replace(**other)))
    assert len(stored_decisions({"user store": user_store()}, CPU, **asked)) == count


def test_without_stored_decisions_it_says_so_and_ends_with_2(nothing_starts):
    result = run("--store", str(user_store().root))
    assert result.exit_code == 2 and result.stdout == ""
    assert "ProfileError: no decision is stored for cpu in environment " in result.stderr


def test_an_interruption_tells_what_is_finished(monkeypatch):
    def verified(decisions, *_, **__):
        yield Verification(*decisions[0], "holds", "passed")
        raise KeyboardInterrupt

    publish(decided(PROBLEM))
    monkeypatch.setattr(module, "verify", verified)
    result = run("--json", *QUIET, "--store", str(user_store().root))
    told = json.loads(result.stdout)
    assert result.exit_code == 130 and told["interrupted"] and len(told["decisions"]) == 1
