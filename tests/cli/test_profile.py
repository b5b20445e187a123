"""`profile` on the command line: what it prints and stores, and what survives an interruption."""

import json
import signal
import subprocess
import sys

import pytest
import torch

from compiled_logprobs.choose import tune
from compiled_logprobs.decision import Speedup
from compiled_logprobs.errors import ProfileError
from compiled_logprobs.problem import Problem
from compiled_logprobs.store import user_store
from compiled_logprobs.store.files import Store
from compiled_logprobs.tuning.tuner import TuningFailed
from tests.helpers.stored_decisions import FakeTuner, all_measured, decided, measured, publish

ASKED = ("--device", "cpu", "--dtype", "float32", "--mode", "forward", "--vocab", "4096")
EAGER_ONLY = (*ASKED, "--backend", "eager")
PROGRAM = [sys.executable, "-m", "compiled_logprobs", "profile", *EAGER_ONLY]


def last_line(text: str) -> str:
    return text.rstrip().splitlines()[-1]


class Noting(FakeTuner):
    """Notes the candidates, too."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[set[str]] = []

    def decide(self, problem, seconds, *, names=None, **options):
        self.names.append(set(names))
        return super().decide(problem, seconds, names=names, **options)


@pytest.fixture
def tuner(monkeypatch, tmp_path) -> Noting:
    """Nothing is measured; the lock is this test's own."""
    made = Noting()
    made.answer = lambda problem: decided(problem, seed=len(made.asked))
    monkeypatch.setattr(tune, "Tuner", made)
    monkeypatch.setattr("compiled_logprobs.tuning.tuner.tempfile.gettempdir", lambda: str(tmp_path))
    return made


def test_a_run_ends_with_a_table_and_is_stored(run, tuner):
    cpp = measured("cpp", speedup=Speedup(1.7, 1.8, 1.9), speedup_over_plain=Speedup(2.4, 2.5, 2.6))
    tuner.answer = lambda problem: decided(problem, "cpp", candidates={**all_measured(), "cpp": cpp})
    result = run("profile", *ASKED, "--rows", "100")
    (row,) = (line for line in result.stdout.splitlines() if " 4096 " in line)
    assert row.split()[:5] == ["128", "4096", "float32", "forward", "cpp"]  # the bucket's top
    assert row.split()[5:9] == ["2.50x", "(2.40", "to", "2.60)"] and row.split()[9] == "1.80x"
    assert "over log_softmax" in result.stdout and "over eager" in result.stdout
    told = "cpp, 2.50x (2.40 to 2.60) the speed of log_softmax and gather, 1.80x (1.70 to 1.90) of eager"
    assert told in result.stderr
    assert last_line(result.stdout) == f"1 of 1 problems decided, 1 of them stored in {user_store().root}"
    ((_, stored),) = user_store().decisions()
    assert stored.problem.rows == 128 and result.exit_code == 0


def test_what_is_stored_is_measured_again_only_on_demand(run, tuner):
    first = run("profile", *ASKED, "--rows", "100", "--progress", "none")
    assert run("profile", *ASKED, "--rows", "128", "--progress", "none").stdout == first.stdout
    assert len(tuner.asked) == 1
    result = run("profile", *ASKED, "--rows", "128", "--again", "--json")
    (told,) = json.loads(result.stdout, parse_constant=pytest.fail)["decisions"]
    ((_, stored),) = user_store().decisions()
    assert len(tuner.asked) == 2 and told["seed"] == stored.seed == 2


def test_fewer_backends_never_replace_a_decision_of_more_and_more_are_measured(run, tuner):
    problem = Problem("cpu", 128, 4096, torch.float32)
    wide = decided(problem, "compiled")
    publish(wide)
    run("profile", *EAGER_ONLY, "--rows", "128", "--progress", "none", "--again")
    publish(decided(problem, candidates={"eager": measured("eager")}))
    run("profile", *ASKED, "--rows", "128", "--progress", "none")
    assert tuner.names[0] == set(wide.candidates)
    assert tuner.names[1] >= {"cpp", "compiled", "flash_attn"}


def test_what_could_not_be_decided_or_stored_is_exit_2(run, tuner, tmp_path, monkeypatch):
    def fail(problem):
        raise TuningFailed("nothing could be measured")

    tuner.answer, answer = fail, tuner.answer
    result = run("profile", *ASKED, "--rows", "100", "--progress", "none")
    assert result.exit_code == 2 and "not decided: nothing could be measured" in result.stdout
    tuner.answer = answer

    def full(*_, **__):
        raise ProfileError("the disk is full")

    monkeypatch.setattr(Store, "publish", full)
    with pytest.warns(RuntimeWarning, match="the disk is full\nWhat was measured holds in this process only"):
        result = run("profile", *ASKED, "--rows", "100", "--progress", "none", "--out", str(tmp_path))
    assert result.exit_code == 2
    assert last_line(result.stdout) == f"1 of 1 problems decided, 0 of them stored in {tmp_path}"


def test_an_unwritable_folder_is_said_before_anything_is_measured(run, tuner, tmp_path):
    (tmp_path / "file").write_text("")
    result = run("profile", *ASKED, "--progress", "none", "--out", str(tmp_path / "file"))
    assert result.exit_code == 2 and result.stdout == "" and not tuner.asked
    assert result.stderr.startswith("ProfileError: the profile ") and "cannot be written" in result.stderr


def test_a_wrong_candidate_is_exit_1(run, tuner):
    candidates = {"eager": measured("eager"), "cpp": measured("cpp", "wrong")}
    tuner.answer = lambda problem: decided(problem, candidates=candidates)
    result = run("profile", *ASKED, "--rows", "100", "--progress", "none")
    assert result.exit_code == 1 and "cpp: wrong on 128 x 4096 float32 on cpu, forward: " in result.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--preset", "huge"), "got preset 'huge'; quick, standard, full are valid"),
        (("--vocab", "qwen9"), "got vocabulary 'qwen9'"),
        (("--vocab", ","), "got ',', in which a value is empty"),
        (("--rows", "64,x"), "got number of rows 'x'"),
        (("--device", "cuda:7"), "torch sees 0 CUDA or ROCm devices here"),
        (("--device", "tpu"), "got --device tpu"),
        (("--device", "meta"), "profiles are measured on cpu and cuda"),
        (("--backend", "fastest"), "got target 'fastest'; a backend's name (cpp, "),
        (("--backend", "tests.helpers.functions_to_check:right"), "which is a function; a Backend is valid"),
        (("--progress", "jsonl", "--json"), "which both write to standard output"),
    ],
)
def test_wrong_arguments_measure_nothing(run, tuner, monkeypatch, arguments, said):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = run("profile", *arguments)
    assert result.exit_code == 2 and not tuner.asked
    assert said in result.stderr and result.stdout == "" and "Traceback" not in result.stderr


@pytest.mark.slow
def test_events_are_json_one_a_line_and_an_interruption_keeps_what_is_finished(tmp_path):
    """A real SIGINT, after the first of many problems."""
    rows = ",".join(str(2**n) for n in range(2, 12))
    process = subprocess.Popen(
        [*PROGRAM, "--rows", rows, "--progress", "jsonl", "--out", str(tmp_path / "out")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # As in a terminal: what a shell starts in the background ignores it, and what that starts, too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    lines = []
    assert process.stdout is not None
    for line in process.stdout:
        lines.append(json.loads(line, parse_constant=pytest.fail))
        if lines[-1]["event"] == "decision":
            process.send_signal(signal.SIGINT)
            break
    rest, errors = process.communicate(timeout=60)
    lines += [json.loads(line) for line in rest.splitlines()]
    assert process.returncode == 130, errors
    assert [lines[0]["event"], lines[1]["event"], lines[1]["index"]] == ["start", "problem", 1]
    assert {"step", "checked", "round"} < {line["event"] for line in lines}
    assert lines[-1]["event"] == "end" and lines[-1]["interrupted"] and lines[-1]["total"] == len(lines[0]["problems"])
    assert len(list(Store(tmp_path / "out").decisions())) == lines[-1]["done"] >= 1


@pytest.mark.slow
def test_a_reader_that_goes_away_ends_it_quietly(tmp_path):
    command = " ".join([*PROGRAM, "--rows", "2,4,8", "--progress", "jsonl", "--out", str(tmp_path)]) + " | head -n 1"
    process = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=120)
    assert json.loads(process.stdout)["event"] == "start"
    assert "Traceback" not in process.stderr
