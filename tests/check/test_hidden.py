"""The check from hidden states: every backend passes, and its own cases have verdicts of their own."""

import pytest
import torch

import compiled_logprobs as clp
from compiled_logprobs.check.hidden_cases import HiddenCaseInputs, cases_from_hidden
from compiled_logprobs.check.hidden_function import Embedding, with_all_from_hidden
from compiled_logprobs.check.report import MEANING
from compiled_logprobs.problem import Problem
from compiled_logprobs.testing import assert_log_probs
from tests.helpers import hidden_functions_to_check as functions

PROBLEM = Problem("cpu", 512, 301, torch.float32, needs_grad=True, hidden=64, weight_grad=True)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, torch.bfloat16) for name in ("whole", "chunked_vocab", "chunked_64", "eager")),
        ("chunked_256", torch.float32),
        ("linear_cross_entropy", torch.float32),
    ],
)
def test_every_backend_passes(name, dtype):
    problem = PROBLEM._replace(dtype=dtype)
    problem = problem if name == "linear_cross_entropy" else with_all_from_hidden(problem)
    try:
        report = clp.check_backend(name, problem, seed=1)
    except clp.BackendUnavailable as error:
        pytest.skip(str(error))
    assert report.passed, (report, [check for check in report.checks if not check.passed])
    limits = {check.name: check.limit for check in report.checks}
    assert limits["hidden_gradient_error"] and limits["weight_gradient_error"]


@pytest.mark.parametrize("right", functions.RIGHT_FUNCTIONS, ids=lambda right: right.__name__)
def test_no_right_function_is_stopped(right):
    dtype = torch.float32 if right is functions.of_torch else torch.bfloat16
    report = clp.check_backend(right, functions.PROBLEM._replace(dtype=dtype), from_hidden=True, seed=1)
    assert report.passed, (report, [check for check in report.checks if not check.passed])


@pytest.mark.parametrize("wrong", functions.WRONG_FUNCTIONS, ids=lambda wrong: wrong.wrong)
def test_a_wrong_function_is_stopped_for_the_right_reason_and_given_the_right_cause(wrong):
    report = clp.check_backend(wrong.function, functions.PROBLEM._replace(dtype=wrong.dtype), seed=1)
    assert not report.passed and wrong.reason in report.reasons
    assert report.causes[0].startswith(wrong.cause), report.causes


def test_arguments_in_another_order_are_said_to_be():
    def labels_second(hidden, labels, weight):
        return functions.whole(hidden, weight, labels)

    problem = PROBLEM._replace(vocab=37)
    report = clp.check_backend(labels_second, problem, call="f(hidden, weight, labels)")
    assert report.causes[0] == 'takes the labels before the weight: say call="f(hidden, labels, weight)" (--call)'
    assert_log_probs(labels_second, problem, call="f(hidden, labels, weight)", from_hidden=True, short=True)
    with pytest.raises(AssertionError, match="likely cause: returns the loss"):
        assert_log_probs(lambda hidden, weight, labels: -functions.whole(hidden, weight, labels), problem, short=True)


def test_a_call_may_name_the_options_of_hidden_states_alone():
    with pytest.raises(clp.InputError, match="with hidden, weight and labels, and may name bias, temperature"):
        clp.check_backend(functions.whole, PROBLEM, call="f(hidden, weight, labels, logits)")


def test_each_kind_of_check_of_hidden_states_stops_one():
    own = {name for name in MEANING if name.startswith(("hidden_", "weight_", "bias_", "frozen_"))}
    stopped = {wrong.reason for wrong in functions.WRONG_FUNCTIONS}
    # Each error has a twin, the mean square, which the same mistakes trip.
    assert {name.replace("rmse", "error") for name in own} <= {name.replace("rmse", "error") for name in stopped}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_embedded_logits_are_exact(dtype):
    logits = (3.0 * torch.randn(7, 301)).add_(1e4 * (dtype == torch.float32)).to(dtype)
    hidden, weight = Embedding()(logits)
    assert hidden.shape == (7, 64) and torch.equal(hidden @ weight.T, logits)


def test_what_is_written_over_is_noticed():
    embedding = Embedding()
    _, weight = embedding(torch.randn(3, 17))
    assert embedding.overwritten() == []
    weight[0, 0] += 1
    assert embedding.overwritten() == ["weight was"]


def test_a_short_check_has_more_rows_than_a_chunk():
    cases = cases_from_hidden(PROBLEM, short=True, foreign=False, options=(), elsewhere=False)
    assert all(case.rows > 256 for case in cases) and len(cases) == 2
    assert clp.check_backend("chunked_64", PROBLEM, short=True).passed


def test_products_of_small_integers_are_exact():
    _, case = cases_from_hidden(PROBLEM, short=True, foreign=False, options=(), elsewhere=False)
    assert case.exact
    inputs = HiddenCaseInputs(case, PROBLEM._replace(dtype=torch.bfloat16), torch.Generator())
    counts = ~inputs.ignored.all(-1)
    product = inputs.hidden[counts] @ inputs.weight.T
    assert torch.equal(product.double(), inputs.hidden[counts].double() @ inputs.weight.double().T)
    assert bool(inputs.hidden[~counts].isnan().all()) and len(counts) > int(counts.sum())


def test_a_hidden_size_and_from_hidden_have_to_agree():
    with pytest.raises(clp.InputError, match="has no hidden size; hidden=64 is valid"):
        clp.check_backend("whole", PROBLEM._replace(hidden=None, weight_grad=False), from_hidden=True)
