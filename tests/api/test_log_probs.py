"""What more than log-probabilities comes back as: a named tuple of what was asked for."""

import copy
import itertools
import pickle

import pytest
import torch
from torch.utils import _pytree

import compiled_logprobs as clp
from compiled_logprobs.operation.reference import reference
from compiled_logprobs.problem import RESULTS

COMBINATIONS = [set(names) for count in range(1, 5) for names in itertools.combinations(RESULTS, count)]


@pytest.mark.parametrize("asked", COMBINATIONS, ids=lambda names: ",".join(sorted(names)))
def test_it_unpacks_into_what_was_asked_for_and_has_the_rest_as_none(asked):
    logits, labels = torch.randn(2, 3, 50), torch.randint(50, (2, 3))
    labels[0, 1] = -100
    result = clp.log_probs_from_logits(logits, labels, **{f"return_{name}": True for name in asked})
    true = reference(logits, labels[..., None])
    in_order = ["log_probs", *(name for name in RESULTS if name in asked)]
    assert isinstance(result, clp.LogProbs) and list(result._fields) == in_order
    for name, part in zip(in_order, result, strict=True):
        assert part is getattr(result, name) and part.shape == (2, 3)
        truth = true.log_probs[..., 0] if name == "log_probs" else getattr(true, name)
        torch.testing.assert_close(part.double(), truth.double(), atol=1e-5, rtol=0)
    assert all(getattr(result, name) is None for name in set(RESULTS) - asked)
    put_together = type(result)(*result)  # as the wrappers of torch.nn.parallel do with what has these two
    assert hasattr(result, "_asdict") and hasattr(result, "_fields") and isinstance(put_together, clp.LogProbs)
    for again in (copy.copy(result), pickle.loads(pickle.dumps(result)), _pytree.tree_map(lambda part: part, result)):
        assert type(again) is type(result) and all(map(torch.equal, again, result))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_results_have_the_dtype_that_was_asked_for_and_a_column_is_an_integer(dtype):
    asked = {f"return_{name}": True for name in RESULTS}
    result = clp.log_probs_from_logits(
        torch.randn(3, 50), torch.zeros(3, 2, dtype=torch.int64), out_dtype=dtype, **asked
    )
    assert [part.dtype for part in result] == [dtype, dtype, dtype, torch.int64, dtype]
    assert result.log_probs.shape == (3, 2) and result.argmax.shape == (3,)


def test_entropy_and_logsumexp_carry_a_gradient_and_the_others_none():
    logits, labels = torch.randn(3, 50, requires_grad=True), torch.tensor([4, -100, 7])
    result = clp.log_probs_from_logits(logits * 1, labels, **{f"return_{name}": True for name in RESULTS})
    assert [part.requires_grad for part in result] == [True, True, True, False, False]
    (gradient,) = torch.autograd.grad(result.logsumexp.square().sum(), logits)  # a z-loss
    true = reference(logits.detach(), labels[:, None], grad_logsumexp=2 * result.logsumexp.detach())
    torch.testing.assert_close(gradient.double(), true.gradient, atol=1e-5, rtol=0)
    assert (gradient[1] == 0).all()


def test_tune_and_explain_are_asked_for_the_same():
    options = {"return_entropy": True, "return_argmax": True, "return_sum_p_squared": True}
    problem = clp.explain(torch.randn(3, 50), torch.zeros(3, dtype=torch.int64), **options).problem
    assert [name for name in RESULTS if getattr(problem, name)] == ["entropy", "argmax", "sum_p_squared"]
