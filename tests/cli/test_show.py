"""`show`, `explain` and `doctor` on the command line, and `--version`."""

import csv
import json
import os
import socket
from pathlib import Path

import pytest
import torch
from typer.main import get_command

import compiled_logprobs
from compiled_logprobs.backends import backends
from compiled_logprobs.cli.main import app
from compiled_logprobs.cli.options import device_of
from compiled_logprobs.decision import Speedup
from compiled_logprobs.machine.environment import environment_of
from compiled_logprobs.problem import Problem
from tests.helpers.stored_decisions import NEW, all_measured, decided, measured, publish, undecided

PROBLEM = Problem("cpu", 384, 4096, torch.float32)
SLICE = Problem("cpu", 16384, 151936, torch.bfloat16, needs_grad=True, temperature="number", layout="slice")
EXPLAIN = ("explain", "--device", "cpu", "--rows", "300", "--vocab", "4096", "--dtype", "float32", "--mode", "forward")


def test_show_lists_what_is_stored_and_where_it_comes_from(run):
    publish(decided(PROBLEM))
    result = run("show")
    assert result.exit_code == 0
    (row,) = (line for line in result.stdout.splitlines() if " 4096 " in line)
    assert row.split()[:8] == ["384", "4096", "float32", "forward", "eager", "not", "timed", "baseline"]
    assert row.rstrip().endswith("user store")
    assert "side by side" not in result.stdout and "not timed where they would take too long" in result.stdout
    text = run("show", "--json").stdout
    (decision,) = (one for one in json.loads(text)["decisions"] if one["from"] == "user store")
    assert decision["problem"]["vocab"] == 4096 and decision["chosen"] == "eager"
    assert str(Path(compiled_logprobs.__file__).parent) not in text
    assert os.environ.get("HOME", "/root") not in text


def test_show_says_how_many_no_longer_count_since_their_winner_has_changed(run):
    publish(decided(PROBLEM))
    told = "1 of these 2 no longer counts here: the winner has changed"
    assert told not in run("show", "--vocab", "4096").stdout
    candidates = {**all_measured(), "cpp": measured("cpp", fingerprint=NEW)}
    publish(decided(PROBLEM._replace(rows=64), "cpp", candidates=candidates))
    assert told in run("show", "--vocab", "4096").stdout


def test_show_sorts_and_writes_csv(run):
    for rows, chosen, median in ((64, "cpp", 2.0), (128, "eager", 4.0), (256, "compiled", 3.0)):
        winner = measured(chosen, speedup_over_plain=Speedup(1.5, median, 5.0), seconds=1 / median)
        publish(decided(PROBLEM._replace(rows=rows), chosen, candidates={**all_measured(), chosen: winner}))
    publish(undecided(PROBLEM._replace(rows=96)))  # whose figures are nobody's, and so the last
    for order, rows in (
        ("problem", [64, 96, 128, 256]),
        ("winner", [256, 64, 128, 96]),
        ("time", [128, 256, 64, 96]),
        ("speed-up", [128, 256, 64, 96]),
    ):
        lines = [*csv.DictReader(run("show", "--csv", "--vocab", "4096", "--sort", order).stdout.splitlines())]
        assert [int(line["rows"]) for line in lines] == rows
    assert lines[0].items() >= {"chosen": "eager", "speedup_over_plain_high": "5.0", "from": "user store"}.items()
    assert lines[-1].items() >= {"chosen": "undecided", "is_decided": "False", "seconds": "", "speedup_low": ""}.items()


@pytest.mark.parametrize("command", ["show", "profile --progress none", "explain --device cpu", "doctor"])
def test_in_80_columns_lines_fit_and_numbers_are_whole(run, tuner, monkeypatch, command):
    cpp = measured("cpp", speedup_over_plain=Speedup(10.25, 12.5, 13.75), speedup=Speedup(1.5, 1.75, 2.0))
    tuner.answer = lambda problem: decided(problem, "cpp", candidates={**all_measured(), "cpp": cpp})
    publish(tuner.answer(SLICE))
    monkeypatch.setenv("COLUMNS", "80")
    asked = "--vocab qwen3 --rows 16384 --dtype bf16 --mode backward --temperature number --layout slice"
    lines = run(*command.split(), *([] if command == "doctor" else asked.split())).stdout.splitlines()
    assert max(map(len, lines)) <= 80 and "".join(lines).isascii()
    row = "16384  151936  bfloat16  backward  slice, temperature  cpp       12.50x"
    assert row in lines or command.startswith(("doctor", "explain"))


def test_show_says_so_where_nothing_is_stored(run, tmp_path):
    result = run("show", "--store", str(tmp_path))
    assert result.exit_code == 0 and "`compiled-logprobs profile` measures some" in result.stdout
    assert json.loads(run("show", "--store", str(tmp_path), "--json").stdout) == {"decisions": []}


def test_explain_tells_of_every_candidate(run, mode):
    mode("lookup")
    assert "not decided yet\n  the next call takes the first of" in run(*EXPLAIN).stdout
    publish(decided(PROBLEM, "cpp"))
    after = run(*EXPLAIN)
    assert "300 x 4096 float32 on cpu: cpp" in after.stdout
    assert "FASTER_CLEAR: cpp is faster" in after.stdout and "1 of 1 checks" in after.stdout
    assert "log_softmax and gather, which people use today: 4 ms a call" in after.stdout
    told = json.loads(run(*EXPLAIN, "--json").stdout, parse_constant=pytest.fail)
    assert told["backend"] == "cpp" and told["source"] == "user store" and told["bucket_rows"] == 384


def test_doctor_tells_machine_versions_and_backends_and_neither_host_nor_home(run, monkeypatch):
    result = run("doctor")
    assert result.exit_code == 0 and "no: needs a CUDA or ROCm device" in result.stdout
    for expected in ("cpu model", "cpu capability", "torch", "triton", "C++ compiler", *backends()):
        assert expected in result.stdout
    monkeypatch.setattr("compiled_logprobs.cli.show.why_not", lambda *_: f"cannot read {Path.home()}/secret/kernel.so")
    result = run("doctor", "--json")
    told = json.loads(result.stdout, parse_constant=pytest.fail)
    assert told.keys() == {"environments", "cpp_compiler", "backends"}
    assert told["environments"][0]["fingerprint"] == environment_of().fingerprint()
    asked = [(row["name"], row["problem"]) for row in told["backends"] if row["problem"].endswith("on cpu")]
    both = (("4096 x 151936", backends()), ("4096 x 1024 x 151936", backends(from_hidden=True)))
    dtypes = ("float32", "bfloat16")
    assert asked == [(name, f"{size} {dtype} on cpu") for size, names in both for name in names for dtype in dtypes]
    assert str(Path.home()) not in result.stdout and "secret" not in result.stdout
    if len(socket.gethostname()) > 3:
        assert socket.gethostname() not in result.stdout


@pytest.mark.parametrize("command", [[], *([name] for name in get_command(app).commands)], ids=str)
def test_h_is_help_in_lines_that_fit(run, monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "80")
    result = run(*command, "-h")
    assert result.exit_code == 0 and result.stdout == run(*command, "--help").stdout
    assert max(map(len, result.stdout.splitlines())) <= 80 and result.stdout.isascii()
    assert "..." not in result.stdout.partition("Commands:")[2]


def test_the_version_is_shown(run):
    assert run("--version").stdout.startswith("compiled-logprobs ")


@pytest.mark.parametrize(
    ("asked", "device"), [(None, "cuda:1"), ("cuda", "cuda:1"), ("cuda:0", "cuda:0"), ("cpu:0", "cpu")]
)
def test_on_a_machine_with_gpus_the_device_is_the_one_that_is_meant(monkeypatch, asked, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("compiled_logprobs.cli.options.checked_device", torch.device)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert device_of(asked) == torch.device(device)
