"""How exact a row is, and that it has the same bits whatever it came with, of every backend whose kernels are ours."""

import pytest
import torch

from compiled_logprobs.backends import get_backend
from compiled_logprobs.operation.autograd import PlainFormula, compute
from compiled_logprobs.operation.contract import Wanted
from compiled_logprobs.operation.reference import reference

EPS = torch.finfo(torch.float32).eps
OURS = ["cpp", "eager", "the formula", pytest.param("compiled", marks=pytest.mark.slow)]


def backend_called(name):
    return PlainFormula() if name == "the formula" else get_backend(name)


def hard_rows(dtype):
    """Logits [2, V], labels [2, 1] and a temperature, by what is hard about them."""
    tail = torch.cat([torch.zeros(2, 1), -17 + 2 * torch.rand(2, 262143) - 1], -1)
    yield "one dominant logit over a long tail", tail.to(dtype), torch.tensor([[0], [77]]), 1.0
    ordinary = 3 * torch.randn(2, 262144)
    for shift in (1e3, -1e3, 1e4, -1e4):
        yield f"shifted by {shift:g}", (ordinary + shift).to(dtype), torch.tensor([[5], [262143]]), 0.7
    cold = torch.full((2, 262144), -1.0)
    cold[:, :3] = torch.tensor([5.0, 4.0, 1.0])
    yield "the least temperature", cold.to(dtype), torch.tensor([[0], [2]]), 1.2e-38


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_within_sixteen_rounding_errors_of_float64(name, dtype):
    torch.manual_seed(0)
    for what, logits, labels, t in hard_rows(dtype):
        log_probs, entropy = compute(backend_called(name), logits, labels, t, wanted=Wanted(entropy=True))
        true = reference(logits, labels, t)
        for got, truth in ((log_probs, true.log_probs), (entropy, true.entropy)):
            error = (got.double() - truth).abs() / truth.abs().clamp(min=1.0)
            assert float(error.max()) <= 16 * EPS, f"{what}: {float(error.max()) / EPS:.3g} eps"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "vocab"), [("cpp", 1031), ("cpp", 40), pytest.param("compiled", 1031, marks=pytest.mark.slow)]
)
def test_the_ratio_of_old_and_new_probabilities_starts_at_one(name, vocab, dtype):
    """Those of the old ones have the entropy beside them, and came with other rows."""
    backend = get_backend(name)
    assert backend.row_invariant
    logits, labels = (4 * torch.randn(4096, vocab)).to(dtype), torch.randint(vocab, (4096, 3))
    temperature = 0.5 + torch.rand(4096)
    old, entropy = compute(backend, logits, labels, temperature, wanted=Wanted(entropy=True))
    for count in (1, 2, 3, 5, 96, 4096):
        for requires_grad in (False, True):
            part = logits[:count].clone().requires_grad_(requires_grad)
            (new,) = compute(backend, part, labels[:count], temperature[:count])
            assert torch.equal(new, old[:count]), count
    for start in range(0, 4096, 7):  # fewer rows than a vector has numbers, over and over, since few have other bits
        rows = slice(start, start + 7)
        again = compute(backend, logits[rows], labels[rows], temperature[rows], wanted=Wanted(entropy=True))
        assert torch.equal(again[0], old[rows]) and torch.equal(again[1], entropy[rows]), start
