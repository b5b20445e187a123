"""What people use today: it computes the same numbers, and takes as much memory as is reckoned with."""

import pytest
import torch

from compiled_logprobs.machine.clock import extra_peak_bytes, why_no_peak
from compiled_logprobs.operation.contract import Wanted, wanted_by
from compiled_logprobs.operation.plain import bytes_of_plain, plain
from compiled_logprobs.operation.reference import reference
from compiled_logprobs.problem import Problem

TEMPERATURES = {"none": 1.0, "number": 0.7, "per_token": torch.linspace(0.5, 1.5, 128)}


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_computes_what_the_reference_does(dtype, temperature):
    logits, labels = torch.randn(128, 33).to(dtype), torch.randint(33, (128, 2))
    *numbers, argmax, sums = plain(logits, labels, TEMPERATURES[temperature], wanted=Wanted(True, True, True, True))
    true = reference(logits, labels, TEMPERATURES[temperature])
    truths = true.log_probs, true.entropy, true.logsumexp, true.sum_p_squared
    for number, truth in zip((*numbers, sums), truths, strict=True):
        torch.testing.assert_close(number.double(), truth, rtol=1e-5, atol=1e-5)
    assert torch.equal(argmax, true.argmax) and numbers[0].dtype == torch.float32
    assert len(plain(logits, labels, 1.0)) == 1


@pytest.mark.slow
@pytest.mark.skipif(why_no_peak("cpu") is not None, reason=str(why_no_peak("cpu")))
@pytest.mark.parametrize("needs_grad", [False, True])
def test_it_takes_as_much_memory_as_is_reckoned_with(needs_grad):
    problem = Problem(
        "cpu", 128, 2**16, torch.bfloat16, needs_grad=needs_grad, entropy=needs_grad, logsumexp=needs_grad
    )
    logits = torch.randn(problem.rows, problem.vocab).to(problem.dtype).requires_grad_(needs_grad)
    labels = torch.randint(problem.vocab, (problem.rows, 1))

    def call():
        results = plain(logits, labels, 0.7, wanted=wanted_by(problem))
        return torch.autograd.grad(results, logits, [*map(torch.ones_like, results)]) if needs_grad else results

    call()
    assert 0.4 < extra_peak_bytes(call, "cpu") / bytes_of_plain(problem) < 1.1
