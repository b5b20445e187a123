"""The options that say what a call can be, and what they say of it in code."""

import json

import pytest
import torch
from typer.testing import CliRunner

from compiled_logprobs.backends import get_backend
from compiled_logprobs.cli.calls import calls_of
from compiled_logprobs.cli.main import app
from compiled_logprobs.problem import Problem
from compiled_logprobs.store import user_store
from tests.helpers.stored_decisions import decided, measured, publish

PROBLEM = Problem("cpu", 512, 4096, torch.bfloat16)
ASKED = ("--device", "cpu", "--vocab", "4096", "--rows", "512", "--dtype", "bf16")
COMBINED = (
    *("--mode", "forward,inplace", "--temperature", "none", "--temperature", "per-token", "--layout", "slice"),
    *("--labels", "2", "--entropy", "--no-entropy", "--argmax", "--sum-p-squared", "--masked"),
)


def test_they_combine_in_profile_and_explain(run, tuner, mode):
    mode("lookup")
    base = PROBLEM._replace(layout="slice", labels_per_row=2, masked_logits=True, argmax=True, sum_p_squared=True)
    wanted = {
        base._replace(needs_grad=inplace, inplace_backward=inplace, temperature=temperature, entropy=entropy)
        for inplace in (False, True)
        for temperature in ("none", "per_token")
        for entropy in (False, True)
    }
    run("profile", *ASKED, *COMBINED, "--progress", "none")
    assert set(tuner.asked) == wanted
    explained = json.loads(run("explain", *ASKED, *COMBINED, "--json").stdout)["explanations"]
    problems = [explanation["problem"] for explanation in explained]
    assert len(problems) == 8 and {problem["layout"] for problem in problems} == {"slice"}
    assert run("explain", *ASKED, *COMBINED).stdout.count("512 x 4096 bfloat16 on cpu (") == 8


def test_problems_from_hidden_states_are_asked_for_by_their_options(run, tuner, mode):
    mode("lookup")
    options = ("--hidden", "64,128", "--mode", "forward,backward,inplace", "--memory-limit", "512MiB", "--bias")
    run("profile", *ASKED, *options, "--softcap", "--progress", "none")
    base = PROBLEM._replace(bias=True, softcap=True, memory_limit=2**29)
    wanted = [
        base._replace(hidden=size, needs_grad=grad, weight_grad=grad) for size in (64, 128) for grad in (False, True)
    ]
    assert sorted(tuner.asked, key=str) == sorted(wanted, key=str)
    (explained,) = (
        json.loads(run("explain", *ASKED, "--hidden", "64", "--no-weight-grad", "--json").stdout)["problem"],
    )
    assert explained["needs_grad"] and explained["hidden"] == 64 and not explained["weight_grad"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            ("--hidden", "64", "--mode", "inplace"),
            "got the mode inplace with a hidden size; it is valid for logits alone",
        ),
        (("--bias",), "got bias without a hidden size; it is valid with one"),
        (
            ("--hidden", "64", "--memory-limit", "lots"),
            "got memory limit 'lots'; bytes, or a number of KiB, MiB or GiB",
        ),
        (("--hidden", "0"), "got hidden size '0'; a whole number from 1 on is valid"),
    ],
)
def test_what_does_not_go_together_with_hidden_states_is_told(run, options, said):
    result = run("profile", *ASKED, *options)
    assert result.exit_code == 2 and said in result.stderr


def test_decisions_from_hidden_states_are_shown_filtered_and_pruned_like_others(run, tmp_path):
    problem = PROBLEM._replace(hidden=64, needs_grad=True, memory_limit=2**29)
    names = ("eager", "whole", "chunked_64")
    candidates = {name: measured(name, fingerprint=get_backend(name, problem).fingerprint()) for name in names}
    timed = {"measured_vocab": 1024, "bandwidth": {}}
    publish(decided(problem, "chunked_64", candidates=candidates, **timed))
    publish(decided(PROBLEM))
    shown = run("show", "--hidden", "64").stdout
    assert "chunked_64" in shown and "hidden 64, frozen weight, within 512 MiB" in shown
    assert "fewer rows or columns were timed" in shown and "no longer count" not in shown
    for options, count in (
        ((), 2),
        (("--hidden", "64"), 1),
        (("--memory-limit", "600MiB"), 1),
        (("--hidden", "65"), 0),
    ):
        listed = json.loads(run("show", *options, "--json").stdout)["decisions"]
        assert sum(decision["from"] == "user store" for decision in listed) == count
    archive = tmp_path / "profiles.zip"
    assert run("export", str(archive)).exit_code == 0
    assert "same: 512 x 64 x 4096 bfloat16 on cpu" in run("import", str(archive)).stdout
    pruned = json.loads(run("prune", "--dry-run", "--json").stdout)
    assert not [file for file in pruned["files"] if "h64" in file["path"]]


@pytest.mark.parametrize(
    ("options", "rows"),
    [
        ((), [64, 512, 512, 512]),
        (("--temperature", "number"), [512]),
        (("--layout", "slice", "--no-entropy"), [512]),
        (("--mode", "backward", "--entropy"), [512]),
        (("--logsumexp",), []),
        (("--rows", "50"), [64]),
        (("--dtype", "fp32"), []),
        (("--vocab", "qwen3", "--labels", "1"), []),
        (("--masked",), []),
    ],
)
def test_show_and_verify_take_those_that_are_named(run, options, rows):
    special = ({"temperature": "number"}, {"layout": "slice"}, {"needs_grad": True, "entropy": True}, {"rows": 64})
    for changes in special:
        publish(decided(PROBLEM._replace(**changes)))
    listed = json.loads(run("show", *options, "--json").stdout)["decisions"]
    assert [decision["problem"]["rows"] for decision in listed if decision["from"] == "user store"] == rows
    if not rows:
        nothing = run("verify", *options, "--device", "cpu", "--store", str(user_store().root))
        assert nothing.exit_code == 2 and "no decision is stored for cpu" in nothing.stderr


def test_a_line_for_each_call_below_the_sizes_that_it_was_measured_for():
    both = [PROBLEM._replace(layout="slice", temperature="number", needs_grad=gradient) for gradient in (False, True)]
    inplace = PROBLEM._replace(needs_grad=True, inplace_backward=True)
    odd = PROBLEM._replace(
        rows=64,
        labels_per_row=4,
        entropy=True,
        argmax=True,
        masked_logits=True,
        temperature="per_token",
        out_dtype=torch.bfloat16,
    )
    hidden = PROBLEM._replace(hidden=64, bias=True, softcap=True, memory_limit=2**29)
    assert calls_of([hidden])[1] == (
        "  log_probs_from_hidden(hidden[..., :64], weight, labels, bias=bias, softcap=softcap, memory_limit=536870912)"
    )
    assert calls_of([*both, inplace, inplace._replace(rows=64), odd]) == [
        "Decided for V of 4096, bfloat16, N near 512, with and without gradient:",
        "  log_probs_from_logits(logits[:, :-1], labels, temperature=0.7)",
        "Decided for V of 4096, bfloat16, N near 64 and 512, with gradient:",
        "  log_probs_from_logits(logits, labels, inplace_backward=True)",
        "Decided for V of 4096, bfloat16, N near 64:",
        "  log_probs_from_logits(logits, labels[..., :4], temperature=one_a_token, return_entropy=True, "
        "return_argmax=True, masked_logits=True, out_dtype=None)",
    ]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("profile --layout ", ("flat", "rows", "slice")),
        ("profile --mode forward,ba", ("forward,backward",)),
        ("verify --vocab q", ("qwen3",)),
        ("profile --preset ", ("quick", "standard", "full")),
        ("check ca", ()),
        ("check e", ("eager",)),
        ("profile --backend cp", ("cpp",)),
    ],
)
def test_shells_complete_values(shell, line, offered):
    line = f"compiled-logprobs {line}"
    asked = {"COMP_WORDS": line, "COMP_CWORD": str(line.count(" ")), "_TYPER_COMPLETE_ARGS": line}
    environment = {"_COMPILED_LOGPROBS_COMPLETE": f"complete_{shell}", "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    result = CliRunner().invoke(app, [], prog_name="compiled-logprobs", env=asked | environment)
    assert all(value in result.stdout for value in offered)
    assert offered or not result.stdout.strip().removeprefix("_files")
