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


def test_it_takes_what_check_backend_takes():
    assert inspect.signature(assert_log_probs).parameters == inspect.signature(clp.check_backend).parameters
