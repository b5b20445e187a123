"""The check from hidden states: every backend passes, and its own cases have verdicts of their own."""

import pytest
import torch

import compiled_logprobs as clp
from compiled_logprobs.check.hidden_cases import HiddenCaseInputs, cases_from_hidden
from compiled_logprobs.check.hidden_function import Embedding, with_all_from_hidden
from compiled_logprobs.problem import Problem

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
        report = clp.check_backend(name, problem)
    except clp.BackendUnavailable as error:
        pytest.skip(str(error))
    assert report.passed, (report, [check for check in report.checks if not check.passed])
    assert {"hidden_gradient_error", "weight_gradient_error"} <= {check.name for check in report.checks}


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
