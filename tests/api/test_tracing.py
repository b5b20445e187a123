"""Inside other people's graphs: torch.compile, torch.export, fake tensors."""

import math

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

import compiled_logprobs as clp
from compiled_logprobs.operation.reference import reference

VOCAB = 257


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(function):
    """As a user's graph, traced with its backward; run without Inductor, which takes seconds to compile it."""
    return torch.compile(function, fullgraph=True, backend="aot_eager")


def inputs(*rows: int):
    return torch.randn(*rows, VOCAB, requires_grad=True), torch.randint(VOCAB, rows)


@pytest.mark.slow
@pytest.mark.parametrize("per_token", [False, True])
def test_a_users_graph_takes_it_whole_forward_and_backward(per_token):
    logits, labels = inputs(2, 5)
    labels[0, 1] = -100
    temperature = torch.rand(2, 5) + 0.5 if per_token else 0.7

    @torch.compile(fullgraph=True)
    def loss(logits, labels, temperature):
        scaled = logits * 2.0
        out = clp.log_probs_from_logits(scaled, labels, temperature=temperature, return_entropy=True)
        return out.log_probs, out.entropy

    log_probs, entropy = loss(logits, labels, temperature)
    g, h = torch.randn(2, 5), torch.randn(2, 5)
    (gradient,) = torch.autograd.grad([log_probs, entropy], logits, [g, h])
    true = reference(logits.detach() * 2, labels[..., None], temperature, grad_log_probs=g[..., None], grad_entropy=h)
    torch.testing.assert_close(log_probs.double(), true.log_probs[..., 0], atol=1e-5, rtol=0)
    torch.testing.assert_close(entropy.double(), true.entropy, atol=1e-5, rtol=0)
    torch.testing.assert_close(gradient.double(), 2 * true.gradient, atol=1e-5, rtol=0)
    assert (log_probs <= 0).all()


def test_a_new_temperature_compiles_a_users_graph_at_most_once_more():
    counter = CompileCounterWithBackend("eager")
    loss = torch.compile(
        lambda x, y, t: clp.log_probs_from_logits(x, y, temperature=t).sum(), fullgraph=True, backend=counter
    )
    logits, labels = inputs(4)
    for temperature in (0.5, 0.7, 0.9, 1.1, 2.0):
        loss(logits, labels, temperature)
    assert counter.frame_count <= 2


def test_an_invalid_label_or_temperature_makes_its_row_nan_in_a_graph():
    """And in place is a permission that a graph does not use."""
    logits, labels = inputs(3)
    labels[1] = VOCAB
    graph = compiled(lambda x, y, t: clp.log_probs_from_logits(x * 2, y, temperature=t, inplace_backward=True))
    for temperature, invalid in ((1.5, [False, True, False]), *((bad, [True] * 3) for bad in (-1.0, math.nan))):
        out = graph(logits, labels, temperature)
        (gradient,) = torch.autograd.grad(out.sum(), logits)
        assert out.isnan().tolist() == invalid and gradient.isnan().all(-1).tolist() == invalid
        true = reference(logits.detach() * 2, labels[:, None], temperature, grad_log_probs=torch.ones(3, 1))
        torch.testing.assert_close(gradient.double(), 2 * true.gradient, atol=1e-5, rtol=0, equal_nan=True)


def test_a_graph_takes_every_result_and_sees_what_was_not_asked_for():
    logits, labels = inputs(4)
    labels[1] = -100
    options = dict.fromkeys(("return_logsumexp", "return_argmax", "return_sum_p_squared"), True)

    @compiled
    def graph(logits, labels):
        out = clp.log_probs_from_logits(logits * 2, labels, **options)
        assert isinstance(out, clp.LogProbs) and out.logsumexp is not None
        return out

    out = graph(logits, labels)
    (gradient,) = torch.autograd.grad(out.logsumexp.sum() + out.log_probs.sum(), logits)
    ones = {"grad_log_probs": torch.ones(4, 1), "grad_logsumexp": torch.ones(4)}
    true = reference(logits.detach() * 2, labels[:, None], **ones)
    assert isinstance(out, clp.LogProbs) and out._fields == ("log_probs", "logsumexp", "argmax", "sum_p_squared")
    assert torch.equal(out.argmax, true.argmax)
    for name in ("logsumexp", "sum_p_squared"):
        torch.testing.assert_close(getattr(out, name).double(), getattr(true, name), atol=1e-5, rtol=0)
    torch.testing.assert_close(gradient.double(), 2 * true.gradient, atol=1e-5, rtol=0)


def test_export():
    class Model(torch.nn.Module):
        def forward(self, logits, labels):
            return clp.log_probs_from_logits(logits, labels, temperature=0.7, return_argmax=True)

    logits, labels = inputs(4)
    logits = logits.detach()
    exported = torch.export.export(Model(), (logits, labels)).module()(logits, labels)
    assert isinstance(exported, clp.LogProbs)
    torch.testing.assert_close(exported, Model()(logits, labels))


@pytest.mark.slow
def test_fake_tensors_run_the_plain_formula():
    """Also where `compiled` is warm: called under a fake mode, it has crashed the interpreter."""
    real_logits, real_labels = inputs(4)
    clp.log_probs_from_logits(real_logits, real_labels, backend="compiled")
    with FakeTensorMode() as mode:
        logits, labels = mode.from_tensor(real_logits), mode.from_tensor(real_labels)
        for backend in ("auto", "compiled"):
            out, entropy = clp.log_probs_from_logits(logits, labels, return_entropy=True, backend=backend)
            assert out.shape == (4,) and entropy.shape == (4,) and out.dtype == torch.float32
        with pytest.raises(clp.BackendUnavailable):
            clp.log_probs_from_logits(logits, labels, backend="fastest")
    assert clp.log_probs_from_logits(logits, labels).shape == (4,)  # fake tensors outside of their mode
