"""`profile`, `show` and `explain` on the command line: what they print and store, and what survives an interruption."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from compiled_logprobs.api.functions import problem_of
from compiled_logprobs.cli import options
from compiled_logprobs.cli.main import app
from compiled_logprobs.errors import InputError, ProfileError
from compiled_logprobs.machine.environment import environment_at
from compiled_logprobs.problem import MODES, Problem, as_it_lies, mode_name
from compiled_logprobs.store import user_store
from compiled_logprobs.store.files import EVIDENCE, Store
from compiled_logprobs.tuning import presets
from compiled_logprobs.tuning.tuner import TuningFailed
from tests.helpers.stored_decisions import decided

EAGER_ONLY = ("--backend", "eager", "--dtype", "float32", "--mode", "forward", "--vocab", "4096")
PROGRAM = [sys.executable, "-m", "compiled_logprobs", "profile", "--device", "cpu", *EAGER_ONLY]


def run(*arguments):
    return CliRunner().invoke(app, arguments)


def last_line(text: str) -> str:
    return text.rstrip().splitlines()[-1]


@pytest.fixture
def measured():
    """One problem, measured and stored."""
    result = run("profile", "--device", "cpu", *EAGER_ONLY, "--rows", "100", "--progress", "none")
    assert result.exit_code == 0, result.output
    return result


def test_the_standard_preset_is_what_the_readme_says():
    problems = presets.grid("cpu")
    assert {problem.vocab for problem in problems} == {151936, 128256}
    assert {problem.dtype for problem in problems} == {torch.float32, torch.bfloat16}
    assert {problem.needs_grad for problem in problems} == {False, True}
    assert len(problems) == len(set(problems))


@pytest.mark.parametrize("preset", presets.PRESETS)
@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_every_preset_makes_distinct_problems(preset, device_type):
    problems = presets.grid(device_type, preset)
    assert len(problems) == len(set(problems)) > 0
    assert all(mode_name(problem) in MODES for problem in problems)


def test_what_is_named_replaces_that_part_of_the_preset():
    problems = presets.grid("cpu", "quick", vocabs=[8], rows=[3], modes=["inplace"])
    assert problems == [
        Problem("cpu", 3, 8, dtype, needs_grad=True, inplace_backward=True) for dtype in (torch.float32, torch.bfloat16)
    ]


def test_rows_of_an_odd_vocabulary_are_not_aligned():
    (problem,) = presets.grid("cpu", vocabs=[50257], rows=[8], dtypes=[torch.bfloat16], modes=["entropy"])
    logits, labels = torch.zeros(8, 50257, dtype=torch.bfloat16), torch.zeros(8, 1, dtype=torch.int64)
    assert problem == problem_of(logits, labels, 1.0, entropy=True) and not problem.aligned
    assert mode_name(problem) == "entropy"
    assert as_it_lies(problem._replace(aligned=True)) == problem
    assert as_it_lies(problem._replace(aligned=True, layout="rows")).aligned


def test_models_are_known_by_name():
    assert {name: presets.vocab_of(name) for name in presets.MODELS} == {
        "qwen3": 151936,
        "llama3": 128256,
        "gemma3": 262144,
        "deepseek-v3": 129280,
        "gpt-oss": 201088,
        "gpt2": 50257,
        "llama2": 32000,
    }
    assert presets.vocab_of("12345") == 12345 and presets.vocab_of("Qwen3") == 151936


@pytest.mark.parametrize(
    ("convert", "text", "said"),
    [
        (presets.vocab_of, "qwen9", "got vocabulary 'qwen9'; a number or one of qwen3, llama3"),
        (presets.vocab_of, "0", "got vocabulary '0'"),
        (presets.vocab_of, "²", "got vocabulary '²'"),
        (presets.rows_of, "-1", "got number of rows '-1'; a whole number from 1 on is valid"),
        (presets.rows_of, str(2**31), "below 2^31"),
        (presets.dtype_of, "float", "got dtype 'float'; float32, bfloat16, float16 are valid"),
        (presets.mode_of, "training", "got mode 'training'; forward, backward, inplace, entropy are valid"),
    ],
)
def test_what_is_not_known_is_said_with_what_is(convert, text, said):
    with pytest.raises(InputError) as error:
        convert(text)
    assert said in str(error.value)


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
        (("--backend", "fastest"), "got target 'fastest'; a backend's name (cpp, compiled, flash_attn, eager)"),
        (("--backend", "tests.helpers.functions_to_check:right"), "which is a function; a Backend is valid"),
        (("--progress", "dots"), "got --progress dots; bar, jsonl, none are valid"),
        (("--progress", "jsonl", "--json"), "which both write to standard output"),
    ],
)
def test_wrong_arguments_measure_nothing(monkeypatch, arguments, said):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("compiled_logprobs.cli.profile.tune_all", lambda *a, **k: pytest.fail("it measures"))
    result = run("profile", *arguments)
    assert result.exit_code == 2
    assert said in result.stderr and result.stdout == ""
    assert "Traceback" not in result.stderr


@pytest.mark.slow
def test_a_run_ends_with_a_table_and_is_stored(measured):
    (row,) = (line for line in measured.stdout.splitlines() if " 4096 " in line)
    assert row.split()[:6] == ["128", "4096", "float32", "forward", "eager", "baseline"]  # the bucket's top
    assert row.rstrip().endswith("%") and " of " in row
    assert last_line(measured.stdout) == f"1 of 1 problems decided, 1 of them stored in {user_store().root}"
    (stored,) = user_store().decisions()
    assert stored[1].rows == 128


@pytest.mark.slow
def test_a_second_run_measures_nothing(measured, monkeypatch):
    monkeypatch.setattr("compiled_logprobs.tuning.tuner.Worker", lambda: pytest.fail("a worker is started"))
    again = run("profile", "--device", "cpu", *EAGER_ONLY, "--rows", "128", "--progress", "none")
    assert again.exit_code == 0
    assert again.stdout == measured.stdout


@pytest.mark.slow
def test_again_measures_again(measured):
    ((_, before),) = user_store().decisions()
    result = run("profile", "--device", "cpu", *EAGER_ONLY, "--rows", "128", "--progress", "none", "--again", "--json")
    ((_, after),) = user_store().decisions()
    assert result.exit_code == 0 and after["seed"] != before["seed"]
    (decision,) = json.loads(result.stdout, parse_constant=pytest.fail)["decisions"]
    assert decision["seed"] == after["seed"] and decision["left_out"] == ["cpp", "compiled", "flash_attn"]


@pytest.mark.slow
def test_events_are_json_one_a_line():
    result = run("profile", "--device", "cpu", *EAGER_ONLY, "--rows", "2,100", "--progress", "jsonl")
    assert result.exit_code == 0
    events = [json.loads(line, parse_constant=pytest.fail) for line in result.stdout.splitlines()]
    kinds = [event["event"] for event in events]
    assert kinds[0] == "start" and kinds[-1] == "end"
    assert [len(events[0]["problems"]), kinds.count("problem"), kinds.count("decision")] == [2, 2, 2]
    assert [event["index"] for event in events if event["event"] == "problem"] == [1, 2]
    assert {"step", "checked", "round"} < set(kinds)
    assert events[-1]["done"] == 2 and not events[-1]["interrupted"]


@pytest.mark.slow
def test_an_interruption_keeps_what_is_finished(tmp_path):
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
        lines.append(json.loads(line))
        if lines[-1]["event"] == "decision":
            process.send_signal(signal.SIGINT)
            break
    rest, errors = process.communicate(timeout=60)
    lines += [json.loads(line) for line in rest.splitlines()]
    assert process.returncode == 130, errors
    assert lines[-1]["event"] == "end" and lines[-1]["interrupted"]
    stored = [path for path in (tmp_path / "out").rglob("decisions/*.json") if not path.name.endswith(EVIDENCE)]
    assert len(stored) == lines[-1]["done"] >= 1
    shown = run("show", "--store", str(tmp_path / "out"), "--json")
    assert len(json.loads(shown.stdout)["decisions"]) == lines[-1]["done"]


def test_an_unwritable_folder_is_said_before_anything_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr("compiled_logprobs.tuning.tuner.Worker", lambda: pytest.fail("a worker is started"))
    (tmp_path / "file").write_text("")
    result = run("profile", "--device", "cpu", *EAGER_ONLY, "--progress", "none", "--out", str(tmp_path / "file"))
    assert result.exit_code == 2 and result.stdout == ""
    assert result.stderr.startswith("ProfileError: the profile ") and "cannot be written" in result.stderr
    assert (tmp_path / "file").read_text() == ""


@pytest.mark.slow
def test_what_could_not_be_stored_in_the_end_is_counted(tmp_path, monkeypatch):
    def full(*_, **__):
        raise ProfileError("the disk is full")

    monkeypatch.setattr(Store, "publish", full)
    arguments = ("--device", "cpu", *EAGER_ONLY, "--rows", "100", "--progress", "none", "--out", str(tmp_path))
    with pytest.warns(RuntimeWarning, match="the disk is full\nWhat was measured holds in this process only"):
        result = run("profile", *arguments)
    assert result.exit_code == 2
    assert last_line(result.stdout) == f"1 of 1 problems decided, 0 of them stored in {tmp_path}"


def test_fewer_backends_never_replace_a_decision_of_more(monkeypatch):
    asked = []
    monkeypatch.setattr(
        "compiled_logprobs.tuning.tuner.Tuner.decide", lambda self, problem, seconds, names, **_: asked.append(names)
    )
    problem = Problem("cpu", 128, 4096, torch.float32)
    wide = decided(problem, "compiled")  # eager and compiled
    user_store().publish(environment_at(torch.device("cpu")), wide)
    run("profile", "--device", "cpu", *EAGER_ONLY, "--rows", "128", "--progress", "none", "--again")
    assert [set(names) for names in asked] == [set(wide.candidates) | {"eager"}]


@pytest.mark.slow
def test_a_decision_of_fewer_backends_is_not_all_that_is_asked_for(measured, monkeypatch):
    asked = []

    def decide(self, problem, seconds, names, **_):
        asked.append(names)
        raise TuningFailed("enough is known")

    monkeypatch.setattr("compiled_logprobs.tuning.tuner.Tuner.decide", decide)
    arguments = ("--vocab", "4096", "--rows", "128", "--dtype", "float32", "--mode", "forward", "--progress", "none")
    result = run("profile", "--device", "cpu", *arguments)
    assert asked == [["cpp", "compiled", "flash_attn", "eager"]] and result.exit_code == 2


@pytest.mark.slow
def test_a_reader_that_goes_away_ends_it_quietly(tmp_path):
    command = " ".join([*PROGRAM, "--rows", "2,4,8", "--progress", "jsonl", "--out", str(tmp_path)]) + " | head -n 1"
    process = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=120)
    assert json.loads(process.stdout)["event"] == "start"
    assert "Traceback" not in process.stderr


@pytest.mark.slow
def test_show_lists_what_is_stored_and_where_it_comes_from(measured):
    result = run("show")
    assert result.exit_code == 0
    (row,) = (line for line in result.stdout.splitlines() if " 4096 " in line)
    assert row.rstrip().endswith("user store")
    (decision,) = (one for one in json.loads(run("show", "--json").stdout)["decisions"] if one["from"] == "user store")
    assert decision["problem"]["vocab"] == 4096 and decision["chosen"] == "eager"


def test_show_says_so_where_nothing_is_stored(tmp_path):
    result = run("show", "--store", str(tmp_path))
    assert result.exit_code == 0
    assert "`compiled-logprobs profile` measures some" in result.stdout
    assert json.loads(run("show", "--store", str(tmp_path), "--json").stdout) == {"decisions": []}


@pytest.mark.slow
def test_explain_tells_of_every_candidate(monkeypatch):
    monkeypatch.setenv("COMPILED_LOGPROBS_MODE", "lookup")
    asked = ("--device", "cpu", "--rows", "300", "--vocab", "4096", "--dtype", "float32", "--mode", "forward")
    before = run("explain", *asked)
    assert before.exit_code == 0
    assert "not decided yet" in before.stdout and "the next call takes the first of" in before.stdout
    run("profile", "--device", "cpu", *EAGER_ONLY, "--rows", "300", "--progress", "none")
    after = run("explain", *asked)
    assert "300 x 4096 float32 on cpu: eager" in after.stdout
    assert "ONLY_ONE: nothing but eager could be measured" in after.stdout and "checks" in after.stdout
    found = json.loads(run("explain", *asked, "--json").stdout, parse_constant=pytest.fail)
    assert found["backend"] == "eager" and found["source"] == "tuned here" and found["bucket_rows"] == 384


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--vocab", "big"), "got vocabulary 'big'"),
        (("--temperature", "hot"), "got temperature 'hot'; none, number, per_token are valid"),
        (("--layout", "square"), "got layout 'square'; flat, rows, other are valid"),
        (("--mode", "train"), "got mode 'train'"),
    ],
)
def test_explain_says_what_it_does_not_know(arguments, said):
    result = run("explain", "--device", "cpu", *arguments)
    assert result.exit_code == 2 and said in result.stderr


@pytest.mark.slow
def test_no_table_names_the_host_or_a_place_of_the_package(measured):
    text = run("show", "--json").stdout
    assert str(Path(options.__file__).parents[1]) not in text
    assert os.environ.get("HOME", "/root") not in text


@pytest.mark.parametrize(
    ("asked", "device"), [(None, "cuda:1"), ("cuda", "cuda:1"), ("cuda:0", "cuda:0"), ("cpu", "cpu"), ("cpu:0", "cpu")]
)
def test_on_a_machine_with_gpus_the_device_is_the_one_that_is_meant(monkeypatch, asked, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert options.device_of(asked) == torch.device(device)
    with pytest.raises(InputError, match="torch sees 2 CUDA or ROCm devices here"):
        options.device_of("cuda:2")
