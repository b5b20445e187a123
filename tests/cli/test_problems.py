"""The options that say what a call can be, and what they say of it in code."""

import json

import pytest
import torch
from typer.testing import CliRunner

from compiled_logprobs.cli.calls import calls_of
from compiled_logprobs.cli.main import app
from compiled_logprobs.problem import Problem
from compiled_logprobs.store import user_store
from tests.helpers.stored_decisions import decided, publish

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
