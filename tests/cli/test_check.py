"""`check` on the command line: what it prints, where, and its exit codes."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from compiled_logprobs.check.report import CheckReport, ProblemReport
from compiled_logprobs.check.run import check_backend
from compiled_logprobs.decision import Check
from compiled_logprobs.problem import Problem

ROOT = Path(__file__).parents[2]
FUNCTIONS = "tests.helpers.functions_to_check"


def report_of(subject: object, *wrong: str, **options: object) -> CheckReport:
    """A report in which the checks named are wrong."""
    checks = tuple(
        Check(name, name not in wrong, 0.5, 0.25, "it was [/red] off" if name in wrong else "")
        for name in ("runs", "log_prob_sign", "log_prob_error")
    )
    problems = (Problem("cpu", 97, 33, dtype) for dtype in (torch.float32, torch.bfloat16))
    results = tuple(ProblemReport(problem, checks, ()) for problem in problems)
    causes = ("the sign is the other way round",) if wrong else ()
    name = subject if isinstance(subject, str) else subject.__name__
    return CheckReport(name, results, options.get("seed") or 0, True, None, causes)


@pytest.fixture
def judged(monkeypatch):
    """Nothing is checked: the checks named by the test are wrong. Holds what was asked."""
    asked: dict[str, object] = {"wrong": ()}

    def check(subject, **options):
        asked.update(options)
        if callable(subject):
            subject(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64))
        return report_of(subject, *asked["wrong"], **options)

    monkeypatch.setattr("compiled_logprobs.cli.check.check_backend", check)
    return asked


def test_what_passes_takes_a_screen_and_v_shows_the_rest(run, judged):
    result = run("check", "eager", env={"COLUMNS": "80"})
    lines = result.stdout.splitlines()
    assert result.exit_code == 0 and lines[0] == "eager: passed 6 of 6 checks"
    assert len(lines) < 24 and all(len(line) <= 80 for line in lines)
    assert result.stdout.count("log_prob_error") == 1 and "--seed 0 repeats these inputs" in result.stdout
    assert lines[-1].startswith("-v shows each check")
    result = run("check", "eager", "-v")
    assert result.stdout.startswith("eager: passed 6 of 6 checks\n")
    assert result.stdout.count("no log-probability is positive") == 2 and "-v shows" not in result.stdout


def test_what_is_wrong_comes_first_with_its_cause_and_reasons(run, judged):
    judged["wrong"] = ("log_prob_sign",)
    result = run("check", f"{FUNCTIONS}:positive")
    assert result.exit_code == 1
    assert result.stdout.startswith(
        "positive: wrong: log_prob_sign\n"
        "likely cause: the sign is the other way round\n"
        "  log_prob_sign: it was [/red] off\n"
    )
    assert re.search("^log_prob_sign +wrong ", result.stdout, re.M) and "\x1b" not in result.stdout


@pytest.mark.parametrize("wrong", [(), ("runs", "log_prob_error")])
def test_json_is_one_object_even_if_the_function_prints(run, judged, wrong):
    judged["wrong"] = wrong
    result = run("check", f"{FUNCTIONS}:talkative", "--json", "--seed", "7")
    (report,) = json.loads(result.stdout, parse_constant=pytest.fail)["reports"]
    assert result.exit_code == len(wrong) // 2 and report["passed"] == (not wrong)
    assert report["subject"] == "talkative" and report["reasons"] == [*wrong] and report["seed"] == 7
    assert {"name", "meaning", "problem", "passed", "figure", "limit", "detail"} <= report["checks"][0].keys()
    assert "checking" in result.stderr


def test_of_what_a_function_prints_a_few_lines_are_shown(run, monkeypatch):
    def check(subject, **options):
        for _ in range(30):
            subject(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64))
        return report_of(subject)

    monkeypatch.setattr("compiled_logprobs.cli.check.check_backend", check)
    result = run("check", f"{FUNCTIONS}:talkative")
    assert result.stderr == 10 * "checking [/red] me\n" + "... and 20 lines more that it prints\n"


def test_the_options_reach_the_check(run, judged):
    call = "f(labels, logits)"
    run("check", f"{FUNCTIONS}:good", "--call", call, "--returns", "loss", "--vocab", "gpt2", "--no-ignore-index")
    asked = {"call": call, "returns": "loss", "vocab": 50257, "ignore_index": False, "device": None}
    assert asked.items() <= judged.items()


def test_several_vocabularies_are_checked_one_after_another(run, judged):
    result = run("check", f"{FUNCTIONS}:good", "--vocab", "gpt2,32000", "--vocab", "qwen3")
    assert re.findall("^With a vocabulary of (.*):$", result.stdout, re.M) == ["50257", "32000", "151936"]
    assert judged["vocab"] == 151936
    result = run("check", f"{FUNCTIONS}:good", "--vocab", "32000,")
    assert result.exit_code == 2 and "in which a value is empty" in result.stderr


def test_a_backend_of_ones_own_is_checked_as_one(run, judged):
    assert run("check", f"{FUNCTIONS}:Borrowed").stdout.startswith("borrowed: passed 6 of 6 checks\n")


def test_out_of_memory_is_said_in_a_line(run, monkeypatch):
    monkeypatch.setattr("compiled_logprobs.cli.check.check_backend", Mock(side_effect=MemoryError("40 GiB")))
    result = run("check", "eager")
    assert result.exit_code == 2 and result.stdout == ""
    assert result.stderr == "out of memory: 40 GiB\nAsk for fewer rows, or free some memory.\n"


def test_a_mistake_of_our_own_does_not_look_like_a_wrong_backend(run, monkeypatch):
    monkeypatch.setattr("compiled_logprobs.cli.check.check_backend", Mock(side_effect=RuntimeError("a mistake")))
    result = run("check", "eager")
    assert result.exit_code == 2 and "RuntimeError: a mistake" in result.stderr


def test_a_function_from_hidden_states_is_checked_as_one(run, judged):
    assert run("check", "whole").exit_code == 0 and judged["from_hidden"] is False  # its name says so
    assert run("check", "eager", "--from-hidden").exit_code == 0 and judged["from_hidden"] is True


def test_without_a_target_every_backend_is_checked_or_listed_with_its_reason(run, monkeypatch):
    monkeypatch.setattr(
        "compiled_logprobs.cli.check.check_backend",
        lambda subject, **options: (check_backend if subject == "flash_attn" else report_of)(subject, **options),
    )
    names = {False: ["flash_attn", "eager"], True: ["whole"]}
    monkeypatch.setattr("compiled_logprobs.cli.check.backends", lambda from_hidden=False: names[from_hidden])
    result = run("check", "--device", "cpu")
    unavailable, *passed, _ = result.stdout.splitlines()
    assert result.exit_code == 0 and passed == ["eager: passed 6 of 6 checks", "whole: passed 6 of 6 checks"], (
        result.output
    )
    assert unavailable.startswith("backend 'flash_attn' cannot run")
    result = run("check", "--device", "cpu", "--json")
    assert json.loads(result.stdout)["unavailable"].keys() == {"flash_attn"}


@pytest.mark.slow
def test_python_m_is_the_same_program_and_finds_functions_in_the_current_directory(tmp_path):
    (tmp_path / "mine.py").write_text(f"from {FUNCTIONS} import without_ignored\n")
    process = subprocess.run(
        [sys.executable, "-P", "-m", "compiled_logprobs", "check", "mine:without_ignored"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "dashboard")))},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert process.returncode == 1, process.stderr
    assert process.stdout.startswith("without_ignored: wrong: runs\nlikely cause: has no ignored labels")
