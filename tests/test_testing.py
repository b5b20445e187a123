"""`compiled_logprobs.testing`, as another project's tests use it."""

import inspect

import pytest
import torch

import compiled_logprobs as clp
from compiled_logprobs.testing import assert_log_probs
from tests.helpers.functions_to_check import PROBLEM, good, labels_first, positive


def test_a_wrong_function_fails_with_its_verdict_and_cause():
    with pytest.raises(AssertionError) as failure:
        assert_log_probs(positive, PROBLEM, seed=3)
    verdict, cause, *details, seed = str(failure.value).splitlines()
    assert verdict.startswith("positive: wrong: log_prob_sign, ")
    assert cause.startswith("likely cause: returns the loss: ")
    assert details[0].startswith("  log_prob_sign: one row: largest log-probability ")
    assert seed == "seed=3 repeats these inputs."


def test_a_right_function_passes_as_it_is_called():
    assert_log_probs(good, PROBLEM)
    assert_log_probs(labels_first, PROBLEM, call="f(labels, logits)")
    assert_log_probs(positive, PROBLEM, returns="loss")
    assert_log_probs("eager", PROBLEM._replace(dtype=torch.bfloat16), short=True, device="cpu")


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (
            lambda x, y: good(x, y).to("meta"),
            "fails for an ordinary input: its result is on meta, and the logits on cpu",
        ),
        (lambda x, y: (good(x, y), None), r"returns 2 results \(\[12\], NoneType\) where one is expected"),
        (
            lambda x, y: good(x.cuda(), y.cuda()).cpu(),
            r"raises .*\. The inputs are on a CPU: check it where its device is",
        ),
    ],
    ids=["meta", "a tuple", "cuda"],
)
def test_what_cannot_be_judged_fails_with_what_it_gives_instead(function, said):
    if "CUDA" in said and torch.cuda.is_available():
        pytest.skip("which it could be here")
    with pytest.raises(AssertionError, match=f"likely cause: {said}"):
        assert_log_probs(function, PROBLEM)


def test_it_takes_what_check_backend_takes():
    assert inspect.signature(assert_log_probs).parameters == inspect.signature(clp.check_backend).parameters
