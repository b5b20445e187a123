"""`profile` on the command line: what it prints and stores, and what survives an interruption."""

import json
import re
import subprocess
import sys
from unittest.mock import Mock

import pytest
import torch

from compiled_logprobs.cli.progress import Bar
from compiled_logprobs.decision import Speedup
from compiled_logprobs.errors import ProfileError
from compiled_logprobs.problem import Problem
from compiled_logprobs.store import user_store
from compiled_logprobs.store.files import Store
from compiled_logprobs.tuning.tuner import TuningFailed
from tests.helpers.stored_decisions import all_measured, decided, measured, publish, undecided

ASKED = ("--device", "cpu", "--dtype", "float32", "--mode", "forward", "--vocab", "4096")
EAGER_ONLY = (*ASKED, "--backend", "eager")


def test_a_run_ends_with_a_table_and_is_stored(run, tuner):
    cpp = measured("cpp", speedup=Speedup(1.7, 1.8, 1.9), speedup_over_plain=Speedup(2.4, 2.5, 2.6))
    tuner.answer = lambda problem: decided(problem, "cpp", candidates={**all_measured(), "cpp": cpp})
    result = run("profile", *ASKED, "--rows", "100")
    (row,) = (line for line in result.stdout.splitlines() if " 4096 " in line)
    assert row.split()[:5] == ["128", "4096", "float32", "forward", "cpp"]  # the bucket's top
    assert row.split()[5:10] == ["2.50x", "2.40", "to", "2.60", "1.80x"]
    assert "Speed-ups are over log_softmax" in result.stdout and "over eager" in result.stdout
    told = "cpp, 2.50x (2.40 to 2.60) the speed of log_softmax and gather, 1.80x (1.70 to 1.90) of eager"
    assert told in result.stderr
    counts, *calls = result.stdout.splitlines()[-3:]
    assert counts == f"1 of 1 problems decided, 1 of them stored in {user_store().root}"
    assert calls == ["Decided for V of 4096, float32, N near 128:", "  log_probs_from_logits(logits, labels)"]
    ((_, stored),) = user_store().decisions()
    assert stored.problem.rows == 128 and result.exit_code == 0


def test_undecided_is_no_winner(run, tuner):
    tuner.answer = lambda problem: undecided(problem) if problem.rows == 128 else decided(problem, "cpp")
    result = run("profile", *ASKED, "--rows", "64,128", "--progress", "none")
    decided_row, undecided_row = (line.split() for line in result.stdout.splitlines() if "  4096  " in line)
    assert decided_row[4] == "cpp" and undecided_row == ["128", "4096", "float32", "forward", "undecided"]
    assert "forward: undecided: 12 rounds do not tell whether cpp (4.83x, 0.24 to 31.85) is faster" in result.stdout
    counts = "1 of 2 problems decided, 1 undecided (run profile again: they get more time), 2 of them stored in "
    assert counts in result.stdout and "N near 64:" in result.stdout and result.exit_code == 0


def test_what_is_stored_is_measured_again_only_on_demand(run, tuner):
    first = run("profile", *ASKED, "--rows", "100", "--progress", "none")
    assert run("profile", *ASKED, "--rows", "128", "--progress", "none").stdout == first.stdout
    assert len(tuner.asked) == 1
    result = run("profile", *ASKED, "--rows", "128", "--again", "--json")
    (told,) = json.loads(result.stdout, parse_constant=pytest.fail)["decisions"]
    ((_, stored),) = user_store().decisions()
    assert len(tuner.asked) == 2 and told["seed"] == stored.seed == 2


def test_what_was_left_undecided_is_measured_again_for_longer_and_said(run, tuner):
    publish(undecided(Problem("cpu", 128, 4096, torch.float32), tuning_seconds=50.0))
    result = run("profile", *ASKED, "--rows", "128")
    said = "128 x 4096 float32 on cpu, forward: undecided before; measured again for up to 150 s"
    assert said in result.stderr and tuner.options[-1]["seconds"] == 150.0
    assert "undecided before" not in run("profile", *ASKED, "--rows", "128").stderr


def test_fewer_backends_never_replace_a_decision_of_more_and_more_are_measured(run, tuner):
    problem = Problem("cpu", 128, 4096, torch.float32)
    wide = decided(problem, "compiled")
    publish(wide)
    run("profile", *EAGER_ONLY, "--rows", "128", "--progress", "none", "--again")
    assert set(tuner.options[-1]["names"]) == set(wide.candidates)
    publish(decided(problem, candidates={"eager": measured("eager")}))
    run("profile", *ASKED, "--rows", "128", "--progress", "none")
    assert set(tuner.options[-1]["names"]) >= {"cpp", "compiled", "flash_attn"}


def test_what_could_not_be_decided_or_stored_is_exit_2(run, tuner, tmp_path, monkeypatch):
    arguments = ("profile", *ASKED, "--rows", "100", "--progress", "none", "--out", str(tmp_path))
    tuner.answer, answer = Mock(side_effect=TuningFailed("nothing could be measured")), tuner.answer
    result = run(*arguments)
    assert result.exit_code == 2 and "not decided: nothing could be measured" in result.stdout
    tuner.answer = answer
    monkeypatch.setattr(Store, "publish", Mock(side_effect=ProfileError("the disk is full")))
    with pytest.warns(RuntimeWarning, match="the disk is full\nWhat was measured holds in this process only"):
        result = run(*arguments)
    assert result.exit_code == 2
    assert f"\n1 of 1 problems decided, 0 of them stored in {tmp_path}\n" in result.stdout


def test_a_wrong_candidate_is_exit_1(run, tuner):
    candidates = {"eager": measured("eager"), "cpp": measured("cpp", "wrong")}
    tuner.answer = lambda problem: decided(problem, candidates=candidates)
    result = run("profile", *ASKED, "--rows", "100", "--progress", "none")
    assert result.exit_code == 1 and "cpp: wrong on 128 x 4096 float32 on cpu, forward: " in result.stdout


def test_events_are_json_one_a_line_and_an_interruption_keeps_what_is_finished(run, tuner, tmp_path):
    answer = tuner.answer

    def interrupt_the_second(problem):
        if len(tuner.asked) == 2:
            raise KeyboardInterrupt
        return answer(problem)

    tuner.answer = interrupt_the_second
    result = run("profile", *ASKED, "--rows", "8,16,32", "--progress", "jsonl", "--out", str(tmp_path))
    start, *events, end = (json.loads(line, parse_constant=pytest.fail) for line in result.stdout.splitlines())
    assert result.exit_code == 130 and start["event"] == "start" and len(start["problems"]) == 3
    assert [event["event"] for event in events] == ["problem", "decision", "problem"] and events[2]["index"] == 2
    assert end["event"] == "end" and end["interrupted"] and (end["done"], end["total"]) == (1, 3)
    assert len(list(Store(tmp_path).decisions())) == 1


def test_a_narrow_terminal_cuts_what_the_bar_says_and_no_number(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("FORCE_COLOR", "1")
    problem = Problem("cpu", 512, 151936, torch.bfloat16, needs_grad=True, temperature="number", layout="slice")
    with Bar() as bar:
        bar.start([problem] * 12, "cpu", "0" * 16)
        bar.event({"event": "problem", "problem": problem})
        bar.result(ProfileError("no"))
    assert re.search(r"1/12\S* \S*0:00:0\d\S* .*512 x 151936 bfloat16 on cpu.*…", capsys.readouterr().err)


@pytest.mark.slow
def test_a_reader_that_goes_away_ends_it_quietly(tmp_path):
    program = [sys.executable, "-m", "compiled_logprobs", "profile", *EAGER_ONLY, "--rows", "2,4,8"]
    command = " ".join([*program, "--progress", "jsonl", "--out", str(tmp_path)]) + " | head -n 1"
    process = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=120)
    assert json.loads(process.stdout)["event"] == "start"
    assert "Traceback" not in process.stderr
